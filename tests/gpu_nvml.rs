//! The NVML provider against a library that says what the test wants.

#[path = "support/fake_nvml.rs"]
mod fake_nvml;

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use fake_nvml::FakeNvml;
use wharf::config::catalog::{GpuProvider, GpuSettings};
use wharf::gpu::{GpuKind, Gpus};
use wharf::scheduler::event::{GpuMemory, NoProof};
use wharf::units::{Bytes, GpuId};

const DEADLINE: Duration = Duration::from_secs(30);

/// The fake library, or the end of the test where it cannot be built.
macro_rules! fake {
    ($state:expr) => {
        match FakeNvml::build($state) {
            Some(fake) => fake,
            None => return,
        }
    };
}

async fn open(fake: &FakeNvml) -> Gpus {
    Gpus::open_nvml(Some(fake.library()), DEADLINE).await.expect("NVML opens")
}

/// Samples until `good` says so.
async fn until(
    gpus: &Gpus,
    what: &str,
    good: impl Fn(&Result<Vec<GpuMemory>, NoProof>) -> bool,
) -> Result<Vec<GpuMemory>, NoProof> {
    let began = Instant::now();
    loop {
        let sample = gpus.sample().await;
        if good(&sample) {
            return sample;
        }
        assert!(began.elapsed() < DEADLINE, "waited too long for {what}: {sample:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A process that lives until the test ends it, or is over.
struct Process(Child);

impl Process {
    fn new() -> Process {
        Process(Command::new("sleep").arg("600").spawn().expect("a process"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("reaped");
    }
}

// contract: CONFIG processes and containers get their GPUs
#[tokio::test]
async fn memory_and_holders_are_read() {
    let child = Process::new();
    let pid = child.0.id();
    let fake = fake!(&format!(
        "count 2\ngpu 0 total 24576 used 100 reserved 476 mig 0 util 42\n\
         process 0 {pid} 9000\ngraphics 0 {pid} 9000\ngraphics 0 4000000000 500\n"
    ));
    let gpus = open(&fake).await;
    assert_eq!(gpus.kind(), GpuKind::Nvml);
    assert_eq!(gpus.describe(), "nvml (driver 550.54.15)");
    assert_eq!(gpus.gpus().len(), 2);
    assert_eq!(gpus.gpus()[0].total, Bytes::mib(24576));

    let sample = gpus.sample().await.expect("a sample");
    assert_eq!(sample[0].free, Bytes::mib(24576 - 100 - 476 - 9000), "reserved is not free");
    assert_eq!(sample[1].free, Bytes::mib(24576));
    assert_eq!(sample[0].holders.len(), 2, "listed twice is one holder");
    assert_eq!(sample[0].holders[0].pid, pid);
    assert_eq!(sample[0].holders[0].bytes, Bytes::mib(9000));
    assert!(sample[0].holders[0].label.starts_with("sleep 600"), "{:?}", sample[0].holders);
    assert!(sample[0].holders[1].label.contains("not visible"), "{:?}", sample[0].holders);

    assert_eq!(gpus.utilization().await[&GpuId(0)], 0.42);
    let env = gpus.engine_env(&[GpuId(1)]);
    assert_eq!(env["CUDA_VISIBLE_DEVICES"], gpus.gpus()[1].uuid);
    assert_eq!(env["WHARF_GPUS"], "1");
    drop(child);
}

#[tokio::test]
async fn bytes_come_back_after_the_process_is_gone() {
    let child = Process::new();
    let pid = child.0.id();
    let fake = fake!(&format!("engine 0 {pid} 20000 2000\n"));
    let gpus = open(&fake).await;
    let sample = gpus.sample().await.expect("a sample");
    assert_eq!(sample[0].holders[0].pid, pid);

    drop(child);
    let ended = Instant::now();
    let sample = until(&gpus, "the list to empty", |sample| {
        sample.as_ref().is_ok_and(|gpus| gpus[0].holders.is_empty())
    });
    assert_eq!(sample.await.expect("a sample")[0].free, Bytes::mib(4576), "not free yet");
    let freed = |sample: &Result<Vec<GpuMemory>, NoProof>| {
        sample.as_ref().is_ok_and(|gpus| gpus[0].free == Bytes::mib(24576))
    };
    until(&gpus, "the bytes", freed).await.expect("a sample");
    assert!(ended.elapsed() >= Duration::from_secs(2), "freed after {:?}", ended.elapsed());
}

#[tokio::test]
async fn bytes_that_never_come_back_stay_taken() {
    let child = Process::new();
    let pid = child.0.id();
    let fake = fake!(&format!("engine 0 {pid} 20000 -1\nprocess 0 1 500\n"));
    let gpus = open(&fake).await;
    drop(child);
    for _ in 0..100 {
        let sample = gpus.sample().await.expect("a sample");
        assert_eq!(sample[0].free, Bytes::mib(24576 - 20500));
        assert!(sample[0].holders.iter().all(|holder| holder.pid != pid));
    }
    fake.set("count 1\n");
    assert_eq!(gpus.sample().await.expect("a sample")[0].free, Bytes::mib(24576));
}

#[tokio::test]
async fn stand_ins_ledgers_can_be_the_memory() {
    let ledger = tempfile::tempdir().expect("a folder");
    let fake = fake!(&format!("count 2\nledger {} 0\n", ledger.path().display()));
    let gpus = open(&fake).await;
    let pid = std::process::id();
    let stat = std::fs::read_to_string("/proc/self/stat").expect("own stat");
    let after_name = stat.rsplit_once(") ").expect("a name").1;
    let start_ticks = after_name.split(' ').nth(19).expect("field 22");
    let entry = format!(
        "{{\"pid\":{pid},\"start_ticks\":{start_ticks},\"gpus\":[0,1],\"bytes\":{}}}",
        9u64 << 30
    );
    std::fs::write(ledger.path().join(format!("{pid}.json")), entry).expect("written");
    std::fs::write(
        ledger.path().join("1.json"),
        format!("{{\"pid\":{pid},\"start_ticks\":1,\"gpus\":[0],\"bytes\":{}}}", 1u64 << 30),
    )
    .expect("written");
    let sample = gpus.sample().await.expect("a sample");
    assert_eq!((sample[0].free, sample[1].free), (Bytes::gib(15), Bytes::gib(15)));
    assert_eq!(sample[1].holders[0].pid, pid);
}

#[tokio::test]
async fn unknown_error_in_flight_is_no_proof_until_it_is_over() {
    let fake = fake!("count 1\n");
    let gpus = open(&fake).await;
    gpus.sample().await.expect("a sample");

    fake.set("count 1\nfail 999\ninit 999\n");
    for _ in 0..2 {
        let error = gpus.sample().await.expect_err("no proof");
        assert!(error.message.contains("Unknown Error"), "{}", error.message);
        assert!(error.message.contains("restart the container"), "{}", error.message);
        assert!(gpus.utilization().await.is_empty());
    }
    fake.set("count 1\n");
    until(&gpus, "re-initialisation", Result::is_ok).await.expect("a sample");
}

#[tokio::test]
async fn a_lost_gpu_and_a_changed_one_are_no_proof() {
    let fake = fake!("count 1\n");
    let gpus = open(&fake).await;
    fake.set("fail 15\n");
    let error = gpus.sample().await.expect_err("no proof");
    assert!(error.message.contains("GPU 0") && error.message.contains("Xid"), "{error:?}");
    fake.set("uuid 0 GPU-other\n");
    let changed = |sample: &Result<Vec<GpuMemory>, NoProof>| {
        sample.as_ref().is_err_and(|error| error.message.contains("GPU-other"))
    };
    let error = until(&gpus, "the other GPU", changed).await.expect_err("no proof");
    assert!(error.message.contains("restart Wharf"), "{error:?}");
}

#[tokio::test]
async fn a_driver_that_hangs_is_given_up_and_may_come_back() {
    let fake = fake!("count 1\n");
    let deadline = Duration::from_secs(2);
    let gpus = Gpus::open_nvml(Some(fake.library()), deadline).await.expect("opens");
    fake.set("hang_ms 6000\n");
    // More than may wait for the thread.
    let all = futures_util::future::join_all((0..30).map(|_| gpus.sample())).await;
    for sample in all {
        let error = sample.expect_err("no proof");
        assert!(error.message.contains("NVML did not answer within 2s"), "{error:?}");
    }
    fake.set("count 1\n");
    until(&gpus, "an answer", Result::is_ok).await.expect("a sample");
}

// contract: CONFIG MIG devices are refused
#[tokio::test]
async fn what_cannot_be_opened_is_named_with_its_fix() {
    for (state, words) in [
        ("init 9\n", ["not loaded", "modprobe nvidia"]),
        ("init 18\n", ["different versions", "reboot"]),
        ("init 999\n", ["Unknown Error", "CDI"]),
        ("count 0\n", ["no GPU", "--gpus all"]),
        ("fail 4\n", ["permission", "/dev/nvidia"]),
        ("gpu 0 total 81920 used 0 reserved 0 mig 1 util 0\n", ["MIG mode", "-mig 0"]),
    ] {
        let fake = fake!(state);
        let error = Gpus::open_nvml(Some(fake.library()), DEADLINE).await.expect_err(state);
        let message = error.to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{state}: {message}");
    }
    let nowhere = Path::new("/nowhere/libnvidia-ml.so.1").to_owned();
    let error = Gpus::open_nvml(Some(nowhere), DEADLINE).await.expect_err("missing");
    assert!(error.to_string().contains("install the NVIDIA driver"), "{error}");
}

#[tokio::test]
async fn auto_goes_without_proof_where_nvml_does_not_load() {
    let settings = GpuSettings {
        provider: GpuProvider::Auto,
        reserve: Bytes::ZERO,
        memory: vec![Bytes::gib(24)],
        release_lag: Duration::ZERO,
        foreign: Vec::new(),
    };
    let gpus = Gpus::open(&settings, Path::new("/nowhere")).await.expect("open");
    if gpus.kind() == GpuKind::Nvml {
        eprintln!("SKIPPED: this machine has an NVIDIA driver");
        return;
    }
    assert_eq!(gpus.kind(), GpuKind::None);
    assert!(gpus.describe().contains("install the NVIDIA driver"), "{}", gpus.describe());
    assert_eq!(gpus.gpus().len(), 1);
}
