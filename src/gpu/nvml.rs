//! NVML on a thread of its own: its calls block, and a wedged driver blocks them for ever.
//!
//! Any failure in mid-flight is "no proof": the library is dropped and loaded again, with backoff,
//! by later samples.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use nvml_wrapper::{Device, Nvml};
use tokio::sync::oneshot;

use super::{Gpu, GpuId, gpu_id, label};
use crate::scheduler::event::{GpuMemory, Holder, NoProof};
use crate::units::Bytes;

/// Questions that may wait for the thread; more mean that the driver hangs.
const ASKS_MAX: usize = 8;
/// Without persistence mode the driver wakes every GPU at initialisation, which takes seconds.
const OPEN_DEADLINE: Duration = Duration::from_secs(60);
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Drivers install the first name; the second belongs to development packages.
const LIBRARIES: [&str; 2] = ["libnvidia-ml.so.1", "libnvidia-ml.so"];
const MIG_ENABLED: u32 = 1;

/// Why NVML cannot be used. Each message names the fix.
#[derive(Debug)]
pub enum OpenError {
    /// There is no NVML, no driver or no GPU here.
    Absent(String),
    /// There is, but Wharf cannot work with it.
    Unusable(String),
}

#[derive(Debug)]
pub struct Opened {
    pub reader: Reader,
    pub gpus: Vec<Gpu>,
    pub driver: String,
}

/// Asks the thread. The thread ends when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Reader {
    asks: SyncSender<Ask>,
    deadline: Duration,
}

#[derive(Debug)]
enum Ask {
    Sample(oneshot::Sender<Result<Vec<GpuMemory>, NoProof>>),
    Utilization(oneshot::Sender<BTreeMap<GpuId, f32>>),
}

/// Loads NVML (`library`: another file than the system's) and lists the GPUs.
pub async fn open(library: Option<PathBuf>, deadline: Duration) -> Result<Opened, OpenError> {
    let (asks, inbox) = sync_channel(ASKS_MAX);
    let (opened, open) = oneshot::channel();
    let thread = std::thread::Builder::new().name("nvml".to_owned());
    let spawned = thread.spawn(move || match load(&library) {
        Ok((nvml, gpus, driver)) => {
            if opened.send(Ok((gpus.clone(), driver))).is_ok() {
                Thread { library, gpus, state: State::Loaded(nvml) }.serve(&inbox);
            }
        }
        // Nobody waits any more: the caller's deadline passed.
        Err(error) => drop(opened.send(Err(error))),
    });
    spawned.map_err(|error| OpenError::Unusable(format!("cannot start a thread: {error}")))?;
    let (gpus, driver) = match tokio::time::timeout(OPEN_DEADLINE, open).await {
        Ok(Ok(result)) => result?,
        Ok(Err(_)) => return Err(OpenError::Unusable("the NVML thread ended".to_owned())),
        Err(_) => return Err(OpenError::Unusable(no_answer(OPEN_DEADLINE))),
    };
    Ok(Opened { reader: Reader { asks, deadline }, gpus, driver })
}

impl Reader {
    pub async fn sample(&self) -> Result<Vec<GpuMemory>, NoProof> {
        let answer = self.ask(Ask::Sample).await;
        answer.unwrap_or_else(|| Err(NoProof { message: no_answer(self.deadline) }))
    }

    pub async fn utilization(&self) -> BTreeMap<GpuId, f32> {
        self.ask(Ask::Utilization).await.unwrap_or_default()
    }

    /// `None`: no answer within the deadline.
    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.asks.try_send(ask(answer)).ok()?;
        tokio::time::timeout(self.deadline, answered).await.ok()?.ok()
    }
}

fn no_answer(deadline: Duration) -> String {
    format!(
        "NVML did not answer within {}: the driver hangs (look for Xid errors in `dmesg`; \
         a reboot may be needed)",
        humantime::format_duration(deadline)
    )
}

struct Thread {
    library: Option<PathBuf>,
    /// As they were at start; ids and promises rest on them.
    gpus: Vec<Gpu>,
    state: State,
}

enum State {
    Loaded(Nvml),
    Failed { why: String, retry_at: Instant, delay: Duration },
}

impl Thread {
    fn serve(mut self, inbox: &Receiver<Ask>) {
        while let Ok(ask) = inbox.recv() {
            match ask {
                // A question whose asker gave up is not worth a driver call.
                Ask::Sample(answer) if !answer.is_closed() => drop(answer.send(self.sample())),
                Ask::Utilization(answer) if !answer.is_closed() => {
                    drop(answer.send(self.utilization()));
                }
                Ask::Sample(_) | Ask::Utilization(_) => {}
            }
        }
    }

    fn sample(&mut self) -> Result<Vec<GpuMemory>, NoProof> {
        let read = self.nvml().and_then(|(nvml, gpus)| {
            gpus.iter().map(|gpu| read(nvml, gpu)).collect::<Result<Vec<_>, String>>()
        });
        read.map_err(|why| {
            self.fail(&why);
            NoProof { message: why }
        })
    }

    /// The loaded library, loaded again if it failed and a new attempt is due.
    fn nvml(&mut self) -> Result<(&Nvml, &[Gpu]), String> {
        if let State::Failed { why, retry_at, delay } = &mut self.state {
            if Instant::now() < *retry_at {
                return Err(why.clone());
            }
            match load(&self.library) {
                Ok((nvml, _, _)) => {
                    tracing::info!("NVML answers again");
                    self.state = State::Loaded(nvml);
                }
                Err(OpenError::Absent(new) | OpenError::Unusable(new)) => {
                    *delay = (*delay * 2).min(RETRY_MAX);
                    *retry_at = Instant::now() + *delay;
                    why.clone_from(&new);
                    return Err(new);
                }
            }
        }
        match &self.state {
            State::Loaded(nvml) => Ok((nvml, &self.gpus)),
            State::Failed { why, .. } => Err(why.clone()),
        }
    }

    /// Drops a library that failed: a stale handle would fail for ever.
    fn fail(&mut self, why: &str) {
        if matches!(self.state, State::Loaded(_)) {
            let retry_at = Instant::now() + RETRY_FIRST;
            self.state = State::Failed { why: why.to_owned(), retry_at, delay: RETRY_FIRST };
        }
    }

    fn utilization(&self) -> BTreeMap<GpuId, f32> {
        let State::Loaded(nvml) = &self.state else { return BTreeMap::new() };
        let read = |gpu: &Gpu| {
            let rates = nvml.device_by_index(u32::from(gpu.id.0)).ok()?.utilization_rates().ok()?;
            Some((gpu.id, (rates.gpu.min(100) as f32) / 100.0))
        };
        self.gpus.iter().filter_map(read).collect()
    }
}

/// Initialises NVML and lists the GPUs, which must all be usable.
fn load(library: &Option<PathBuf>) -> Result<(Nvml, Vec<Gpu>, String), OpenError> {
    let nvml = init(library)?;
    let unusable = |error: NvmlError| OpenError::Unusable(explain(&error, "GPUs"));
    let count = nvml.device_count().map_err(unusable)?;
    if count == 0 {
        return Err(OpenError::Absent(
            "the NVIDIA driver finds no GPU: in a container, pass one (`--gpus all`)".to_owned(),
        ));
    }
    let list = (0..count).map(|index| identify(&nvml, index)).collect::<Result<_, _>>();
    let gpus = list.map_err(OpenError::Unusable)?;
    let driver = nvml.sys_driver_version().unwrap_or_else(|_| "unknown".to_owned());
    Ok((nvml, gpus, driver))
}

fn init(library: &Option<PathBuf>) -> Result<Nvml, OpenError> {
    let one = |path: &std::ffi::OsStr| Nvml::builder().lib_path(path).init();
    let result = match library {
        Some(path) => one(path.as_os_str()),
        None => match one(LIBRARIES[0].as_ref()) {
            Err(NvmlError::LibloadingError(_)) => one(LIBRARIES[1].as_ref()),
            other => other,
        },
    };
    result.map_err(|error| {
        let why = explain(&error, "initialising");
        match error {
            NvmlError::LibloadingError(_) | NvmlError::DriverNotLoaded => OpenError::Absent(why),
            // A driver that is there but broken must not pass for "no GPU here".
            _ => OpenError::Unusable(why),
        }
    })
}

fn identify(nvml: &Nvml, index: u32) -> Result<Gpu, String> {
    let what = format!("GPU {index}");
    let explain = |error: NvmlError| explain(&error, &what);
    let device = nvml.device_by_index(index).map_err(explain)?;
    let uuid = device.uuid().map_err(explain)?;
    let name = device.name().map_err(explain)?;
    // Where MIG cannot be asked about, there is none.
    if device.mig_mode().is_ok_and(|mode| mode.current == MIG_ENABLED) {
        return Err(format!(
            "GPU {index} ({name}, {uuid}) is in MIG mode, which Wharf does not support yet: \
             switch it off (`nvidia-smi -i {index} -mig 0`) or hide this GPU from Wharf"
        ));
    }
    let total = Bytes(device.memory_info().map_err(explain)?.total);
    Ok(Gpu { id: gpu_id(index as usize), uuid, name, total })
}

fn read(nvml: &Nvml, gpu: &Gpu) -> Result<GpuMemory, String> {
    let what = format!("GPU {} ({})", gpu.id, gpu.uuid);
    let explain = |error: NvmlError| explain(&error, &what);
    let device = nvml.device_by_index(u32::from(gpu.id.0)).map_err(explain)?;
    let uuid = device.uuid().map_err(explain)?;
    if uuid != gpu.uuid {
        return Err(format!("{what} is now {uuid}: the GPUs changed; restart Wharf"));
    }
    let memory = device.memory_info().map_err(explain)?;
    let unused = memory.total.saturating_sub(memory.used).saturating_sub(memory.reserved);
    Ok(GpuMemory {
        gpu: gpu.id,
        uuid,
        total: Bytes(memory.total),
        // What the driver reserves is not free, whichever way a driver counts it.
        free: Bytes(memory.free.min(unused)),
        holders: holders(&device).map_err(explain)?,
    })
}

fn holders(device: &Device<'_>) -> Result<Vec<Holder>, NvmlError> {
    let compute = processes(|| device.running_compute_processes())?;
    let graphics = processes(|| device.running_graphics_processes())?;
    // A process with both kinds of context is listed twice with the same figure.
    let mut bytes = BTreeMap::<u32, Bytes>::new();
    for process in compute.into_iter().chain(graphics) {
        let used = match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Bytes(bytes),
            UsedGpuMemory::Unavailable => Bytes::ZERO,
        };
        let held = bytes.entry(process.pid).or_default();
        *held = used.max(*held);
    }
    let holder = |(pid, bytes)| Holder { pid, bytes, label: label::holder(pid), instance: None };
    Ok(bytes.into_iter().map(holder).collect())
}

fn processes(
    list: impl Fn() -> Result<Vec<ProcessInfo>, NvmlError>,
) -> Result<Vec<ProcessInfo>, NvmlError> {
    // Processes that begin between counting and listing outgrow the list: look once more.
    let listed = match list() {
        Err(NvmlError::InsufficientSize(_)) => list(),
        other => other,
    };
    match listed {
        // Some platforms cannot tell (WSL); the bytes still count.
        Err(NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_)) => Ok(Vec::new()),
        other => other,
    }
}

/// What is wrong and what to do about it.
fn explain(error: &NvmlError, what: &str) -> String {
    match error {
        NvmlError::LibloadingError(error) => format!(
            "NVML cannot be loaded ({error}): install the NVIDIA driver; in a container, start it \
             with the NVIDIA Container Toolkit (`--gpus all`)"
        ),
        NvmlError::DriverNotLoaded => "the NVIDIA driver is not loaded: `modprobe nvidia`, or \
             install the driver for this kernel and reboot"
            .to_owned(),
        NvmlError::LibRmVersionMismatch => "the NVIDIA driver and its library have different \
             versions: the driver was upgraded under way; reboot, or unload and load its modules"
            .to_owned(),
        NvmlError::Unknown => format!(
            "Failed to initialize NVML: Unknown Error ({what}): the GPUs were taken from this \
             container, as `systemctl daemon-reload` on the host does. Pass the device nodes \
             (`--device /dev/nvidia0 --device /dev/nvidiactl --device /dev/nvidia-uvm`) or use \
             CDI, and restart the container"
        ),
        NvmlError::GpuLost | NvmlError::ResetRequired => format!(
            "{what}: {error}. `dmesg` names the Xid error; reset it (`nvidia-smi --gpu-reset`) \
             or reboot"
        ),
        NvmlError::NoPermission => format!(
            "{what}: {error}: give the user of Wharf access to /dev/nvidia* (group `video` or a \
             udev rule)"
        ),
        NvmlError::FailedToLoadSymbol(symbol) => {
            format!("{what}: the NVIDIA driver is too old ({symbol}): 510 or newer is needed")
        }
        other => format!("{what}: NVML failed: {other}; `nvidia-smi` may say more"),
    }
}
