//! Load of the machine over the last hour, sampled at a fixed interval: CPU, host memory, network,
//! GPUs. For `GET /api/performance`; what Prometheus reads is in `scrape`.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use crate::orchestrator::Handle;
use crate::orchestrator::view::GpuFacts;

const INTERVAL: Duration = Duration::from_secs(5);
/// One hour.
const SAMPLES_MAX: usize = 720;
/// Network interfaces and cores beyond these are left out of a sample.
const PARTS_MAX: usize = 1024;
/// A sample on a machine that hardly answers is skipped.
const READ_WITHIN: Duration = Duration::from_secs(4);

#[derive(Clone, Debug)]
pub struct Sample {
    pub at: SystemTime,
    pub system: SystemLoad,
    pub gpus: Vec<GpuFacts>,
}

/// What the kernel does not tell is empty or 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SystemLoad {
    /// 0.0..=100.0 since the sample before.
    pub cpu_percent: Vec<f64>,
    pub memory: Memory,
    /// Over 1, 5 and 15 minutes.
    pub load_average: [f64; 3],
    pub network: Vec<Interface>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub total_kib: u64,
    pub available_kib: u64,
    pub free_kib: u64,
    pub swap_total_kib: u64,
    pub swap_free_kib: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

/// Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Performance(Arc<Mutex<VecDeque<Arc<Sample>>>>);

impl Performance {
    /// Oldest first.
    pub fn samples(&self) -> Vec<Arc<Sample>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    pub fn push(&self, sample: Sample) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        samples.push_back(Arc::new(sample));
        if samples.len() > SAMPLES_MAX {
            samples.pop_front();
        }
    }
}

/// Samples for as long as it is polled.
pub async fn sample(handle: Handle) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut before = CpuTimes::default();
    loop {
        ticks.tick().await;
        let read = tokio::task::spawn_blocking(Readings::of_the_kernel);
        let Ok(Ok(read)) = tokio::time::timeout(READ_WITHIN, read).await else { continue };
        let times = CpuTimes::parse(&read.stat);
        let system = read.load(times.percent_since(&before));
        before = times;
        let gpus = handle.view().gpus.clone();
        handle.performance().push(Sample { at: SystemTime::now(), system, gpus });
    }
}

/// Files of /proc as they stand.
#[derive(Debug, Default)]
struct Readings {
    stat: String,
    meminfo: String,
    loadavg: String,
    net: String,
}

impl Readings {
    fn of_the_kernel() -> Readings {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        Readings {
            stat: read("/proc/stat"),
            meminfo: read("/proc/meminfo"),
            loadavg: read("/proc/loadavg"),
            net: read("/proc/net/dev"),
        }
    }

    fn load(&self, cpu_percent: Vec<f64>) -> SystemLoad {
        let mut loads = self.loadavg.split_whitespace().map(|load| load.parse().unwrap_or(0.0));
        let load_average = std::array::from_fn(|_| loads.next().unwrap_or(0.0));
        let network = self.net.lines().filter_map(interface).take(PARTS_MAX).collect();
        SystemLoad { cpu_percent, memory: memory(&self.meminfo), load_average, network }
    }
}

fn memory(meminfo: &str) -> Memory {
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0)
    };
    Memory {
        total_kib: kib("MemTotal"),
        available_kib: kib("MemAvailable"),
        free_kib: kib("MemFree"),
        swap_total_kib: kib("SwapTotal"),
        swap_free_kib: kib("SwapFree"),
    }
}

/// `  eth0: 1234 5 0 0 0 0 0 0 5678 9 …`
fn interface(line: &str) -> Option<Interface> {
    let (name, counts) = line.split_once(':')?;
    let mut counts = counts.split_whitespace().map(str::parse);
    let received_bytes = counts.next()?.ok()?;
    let sent_bytes = counts.nth(7)?.ok()?;
    Some(Interface { name: name.trim().to_owned(), received_bytes, sent_bytes })
}

/// Idle and all jiffies of each core.
#[derive(Debug, Default)]
struct CpuTimes(Vec<(u64, u64)>);

impl CpuTimes {
    fn parse(stat: &str) -> CpuTimes {
        let cores = stat.lines().filter(|line| {
            line.strip_prefix("cpu")
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        });
        let times = cores.map(|line| {
            // user nice system idle iowait irq softirq steal; guest time is in user already.
            let counts = line.split_whitespace().skip(1).take(8);
            let counts: Vec<u64> = counts.map(|count| count.parse().unwrap_or(0)).collect();
            let idle = counts.get(3).unwrap_or(&0) + counts.get(4).unwrap_or(&0);
            (idle, counts.iter().sum())
        });
        CpuTimes(times.take(PARTS_MAX).collect())
    }

    fn percent_since(&self, before: &CpuTimes) -> Vec<f64> {
        let cores = self.0.iter().enumerate().map(|(core, (idle, all))| {
            let (idle_before, all_before) = before.0.get(core).copied().unwrap_or_default();
            let all = all.saturating_sub(all_before);
            let idle = idle.saturating_sub(idle_before).min(all);
            if all == 0 { 0.0 } else { (all - idle) as f64 * 100.0 / all as f64 }
        });
        cores.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cores_load_is_what_it_did_since_the_sample_before() {
        let first =
            CpuTimes::parse("cpu  9 9 9 9\ncpu0 10 0 10 80 0 0 0 0 5 5\ncpu1 0 0 0 0\nintr 5\n");
        let second = CpuTimes::parse("cpu0 30 0 20 150 0 0 0 0\ncpu1 0 0 0 0\n");
        assert_eq!(first.percent_since(&CpuTimes::default()), [20.0, 0.0]);
        assert_eq!(second.percent_since(&first), [30.0, 0.0]);
    }

    #[test]
    fn memory_load_and_network_are_read() {
        let read = Readings {
            stat: String::new(),
            meminfo: "MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 400 kB\nSwapTotal: 50 kB\nSwapFree: 20 kB\n".to_owned(),
            loadavg: "0.50 1.25 2.00 1/300 4711\n".to_owned(),
            net: "Inter-| Receive\n face |bytes\n    lo: 10 1 0 0 0 0 0 0 20 1 0 0 0 0 0 0\n".to_owned(),
        };
        let load = read.load(vec![1.0]);
        assert_eq!(load.load_average, [0.5, 1.25, 2.0]);
        let lo = Interface { name: "lo".to_owned(), received_bytes: 10, sent_bytes: 20 };
        assert_eq!(load.network, [lo]);
        assert_eq!((load.memory.total_kib, load.memory.available_kib), (1000, 400));
        assert_eq!((load.memory.swap_total_kib, load.memory.swap_free_kib), (50, 20));
    }

    #[test]
    fn only_the_last_hour_is_kept() {
        let performance = Performance::default();
        for second in 0..SAMPLES_MAX as u64 + 5 {
            let at = SystemTime::UNIX_EPOCH + Duration::from_secs(second);
            performance.push(Sample { at, system: SystemLoad::default(), gpus: Vec::new() });
        }
        let samples = performance.samples();
        assert_eq!(samples.len(), SAMPLES_MAX);
        assert_eq!(samples[0].at, SystemTime::UNIX_EPOCH + Duration::from_secs(5));
    }
}
