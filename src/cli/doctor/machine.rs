//! The machine: programs, Docker, GPUs, the store and its disk, the clock.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, access};

use super::{Check, Running};
use crate::config::catalog::{Catalog, GpuProvider, GpuRequest, ModelSpec, RuntimeSpec, Settings};
use crate::gpu::{GpuKind, Gpus};
use crate::runtime::docker::{Daemon, DockerRuntime};
use crate::store::{MEMORY, Store};
use crate::units::Bytes;

/// Less is soon used up by logs and the ledger.
const DISK_FAIL: Bytes = Bytes::mib(100);
const DISK_WARN: Bytes = Bytes::gib(2);
/// Keys, certificates and times of day go wrong beyond.
const SKEW_MAX: Duration = Duration::from_secs(30);
/// 2024: a clock that was never set shows 1970 or its firmware's date.
const CLOCK_MIN: Duration = Duration::from_secs(1_704_067_200);

/// The programs of process models.
pub(super) fn programs(catalog: &Catalog) -> Option<Check> {
    const NAME: &str = "programs";
    let mut programs = BTreeSet::new();
    let mut missing = Vec::new();
    for spec in catalog.models.values() {
        let RuntimeSpec::Process(process) = &spec.runtime else { continue };
        let Some(program) = process.argv.first() else { continue };
        let path = process.env.get("PATH").cloned().or_else(|| std::env::var("PATH").ok());
        let found = match program.contains('/') {
            true => is_program(&process.cwd.clone().unwrap_or_default().join(program)),
            false => {
                let path = path.unwrap_or_default();
                std::env::split_paths(&path).any(|folder| is_program(&folder.join(program)))
            }
        };
        if !found {
            missing.push(format!("{program} ({})", spec.name));
        }
        programs.insert(program.as_str());
    }
    if programs.is_empty() {
        return None;
    }
    Some(match missing.is_empty() {
        true => Check::ok(NAME, format!("{} can be run", Vec::from_iter(programs).join(", "))),
        false => Check::fail(
            NAME,
            format!("not found or not executable: {}", missing.join(", ")),
            "install it, or write its whole path into `process.cmd`",
        ),
    })
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

fn in_docker(catalog: &Catalog) -> Vec<&ModelSpec> {
    let models = catalog.models.values().map(|spec| &**spec);
    models.filter(|spec| matches!(spec.runtime, RuntimeSpec::Docker(_))).collect()
}

pub(super) async fn docker(catalog: &Catalog) -> Vec<Check> {
    const NAME: &str = "docker";
    let models = in_docker(catalog);
    let runtime = DockerRuntime::new(catalog.settings.docker_host.clone());
    let daemon = match runtime.about().await {
        Ok(daemon) => daemon,
        Err(_) if models.is_empty() => {
            return vec![Check::ok(NAME, "not reachable, and no model needs it")];
        }
        Err(fault) => return vec![Check::failed(NAME, fault.message)],
    };
    let mut checks = vec![Check::ok(NAME, format!("{} at {}", daemon.title, runtime.host()))];
    if let Some(first) = models.iter().find(|spec| spec.gpus != GpuRequest::None) {
        checks.push(gpu_runtime(&daemon, first));
    }
    for spec in models {
        let RuntimeSpec::Docker(docker) = &spec.runtime else { continue };
        let Some(container) = &docker.container else { continue };
        let fix =
            "make it without starting it: `docker compose create`, or `docker create --name …`";
        match runtime.find_named(container).await {
            Ok(Some(_)) => {}
            Ok(None) => {
                let told = format!("there is no container {container} ({})", spec.name);
                checks.push(Check::fail(NAME, told, fix));
            }
            Err(fault) => checks.push(Check::failed(NAME, fault.message)),
        }
    }
    checks
}

/// How containers get GPUs: by the NVIDIA runtime, or by CDI.
fn gpu_runtime(daemon: &Daemon, user: &ModelSpec) -> Check {
    const NAME: &str = "docker";
    let cdi = daemon.devices.iter().filter(|device| device.starts_with("nvidia.com/gpu")).count();
    let runtime = daemon.runtimes.iter().any(|name| name.contains("nvidia"));
    match (runtime, cdi) {
        (true, _) => Check::ok(NAME, "GPUs by the NVIDIA runtime"),
        (false, 1..) => Check::ok(NAME, format!("GPUs by CDI ({cdi} devices)")),
        (false, 0) => Check::warn(
            NAME,
            format!(
                "knows neither an NVIDIA runtime nor CDI devices, and {} wants a GPU",
                user.name
            ),
            "install the NVIDIA Container Toolkit, `nvidia-ctk runtime configure --runtime=docker`, \
             restart Docker; for CPU engines say `gpus: 0`",
        ),
    }
}

pub(super) async fn gpus(catalog: &Catalog) -> Check {
    const NAME: &str = "gpu";
    let settings = &catalog.settings.gpu;
    let here = |spec: &ModelSpec| spec.takes_a_port() && spec.gpus != GpuRequest::None;
    let wanted = catalog.models.values().any(|spec| here(spec));
    let declare = "install the NVIDIA driver (`nvidia-smi` must work), or declare \
                   `gpu: { provider: none, memory: [24GiB] }`; for CPU engines say `gpus: 0`";
    if settings.provider == GpuProvider::Simulated {
        return Check::ok(NAME, format!("simulated: {} declared", settings.memory.len()));
    }
    // Nothing is written: the folder is for simulated memory only.
    let gpus = match Gpus::open(settings, Path::new(".")).await {
        Ok(gpus) => gpus,
        Err(error) => return Check::fail(NAME, error.to_string(), declare),
    };
    let about = gpus.describe();
    if gpus.kind() != GpuKind::Nvml {
        return match wanted && settings.memory.is_empty() {
            true => {
                Check::warn(NAME, format!("{about}; models take turns, one at a time"), declare)
            }
            false => Check::ok(NAME, about),
        };
    }
    let memory = match gpus.sample().await {
        Ok(memory) => memory,
        Err(no_proof) => return Check::failed(NAME, format!("{about}: {}", no_proof.message)),
    };
    let each = gpus.gpus().iter().map(|gpu| {
        let free = memory.iter().find(|now| now.gpu == gpu.id).map(|now| now.free);
        let free = free.map_or_else(|| "unknown".to_owned(), |free| free.to_string());
        format!("GPU {} {} {}, {free} free", gpu.id, gpu.name, gpu.total)
    });
    Check::ok(NAME, format!("{about}; {}", each.collect::<Vec<_>>().join("; ")))
}

/// The file, its folder, and the room on its disk.
pub(super) fn store(settings: &Settings, running: Option<&Running>) -> Vec<Check> {
    const NAME: &str = "store";
    let path = &settings.store;
    let mut checks = Vec::new();
    // A running Wharf writes it, and tells of it itself.
    if running.is_none() {
        let health = Store::inspect(path);
        checks.push(match health.ok {
            true => Check::ok(NAME, health.detail),
            false => Check::failed(NAME, health.detail),
        });
    }
    let state = settings.state_dir();
    for (what, path) in [("the store", path), ("the state folder", &state)] {
        let folder = if path == Path::new(MEMORY) { continue } else { folder_of(path) };
        if let Err(error) = access(&folder, AccessFlags::W_OK | AccessFlags::X_OK) {
            let told = format!("{} of {what} cannot be written: {error}", folder.display());
            let fix =
                "make it writable for the user that Wharf runs as, or name another with `store:`";
            checks.push(Check::fail(NAME, told, fix));
        }
    }
    checks.push(disk(&folder_of(&state)));
    checks
}

/// Where something lies or will lie: the nearest folder that is there.
fn folder_of(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut above = absolute.ancestors().skip(usize::from(!absolute.is_dir()));
    above.find(|folder| folder.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

fn disk(folder: &Path) -> Check {
    const NAME: &str = "disk";
    let place = folder.display();
    let free = match statvfs(folder) {
        Ok(disk) => Bytes(disk.blocks_available() * disk.fragment_size()),
        Err(error) => {
            return Check::warn(NAME, format!("{place}: {error}"), "look at it with `df`");
        }
    };
    let told = format!("{free} free at {place}");
    let fix = "free some space, shorten `retention`, or name another place with `store:`";
    match free {
        free if free < DISK_FAIL => Check::fail(NAME, told, fix),
        free if free < DISK_WARN => Check::warn(NAME, told, fix),
        _ => Check::ok(NAME, told),
    }
}

/// Against the daemon's, where there is one.
pub(super) async fn clock(catalog: &Catalog) -> Check {
    const NAME: &str = "clock";
    let docker = DockerRuntime::new(catalog.settings.docker_host.clone());
    let daemon = docker.about().await.ok().and_then(|daemon| daemon.now);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let shown = humantime::format_rfc3339_seconds(UNIX_EPOCH + now);
    if now < CLOCK_MIN {
        let fix = "set it (`timedatectl set-ntp true`): certificates and `keep` go by it";
        return Check::fail(NAME, format!("{shown} cannot be"), fix);
    }
    let skew = daemon.map_or(Duration::ZERO, |then| now.abs_diff(Duration::from_secs(then)));
    if skew > SKEW_MAX {
        let told = format!("{shown}, {} s apart from Docker's machine", skew.as_secs());
        return Check::warn(NAME, told, "synchronise both (`timedatectl set-ntp true`)");
    }
    Check::ok(NAME, shown.to_string())
}
