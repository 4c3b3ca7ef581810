//! Brings an image here, with progress, before anything is drained for it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bollard::models::CreateImageInfo;
use bollard::query_parameters::CreateImageOptionsBuilder;
use futures_util::StreamExt as _;
use tokio::time::{timeout, timeout_at};

use super::client::{Client, PROMPT};
use super::registry::{self, Reference};
use super::{DockerRuntime, errors, pace::Pace, place::Place};
use crate::config::catalog::{ModelSpec, PullPolicy};
use crate::runtime::Progress;
use crate::scheduler::event::{Fault, FaultKind};
use crate::units::Bytes;

/// A pull that neither brings nor unpacks anything for this long is given up, whatever it reports.
/// There is no other limit: a download takes as long as it takes.
const STALL: Duration = Duration::from_secs(300);
/// A disk with less than this is not even tried.
const DISK_FREE_MIN: Bytes = Bytes::mib(256);

/// Fetches the image that the model's container is made from. A named container has everything it needs.
pub async fn fetch(
    runtime: &DockerRuntime,
    model: &ModelSpec,
    progress: &Progress,
) -> Result<(), Fault> {
    let spec = super::docker_spec(model)?;
    let Some(image) = spec.image.as_deref().filter(|_| spec.container.is_none()) else {
        return Ok(());
    };
    let client = &runtime.client;
    let present = is_present(client, image).await?;
    match (spec.pull, present) {
        (PullPolicy::Missing | PullPolicy::Never, true) => Ok(()),
        (PullPolicy::Never, false) => Err(missing(model, image)),
        (PullPolicy::Missing, false) | (PullPolicy::Always, _) => {
            pull(runtime, image, progress).await.map_err(|fault| match present {
                true => hint_at_local(fault, image),
                false => fault,
            })
        }
    }
}

pub fn missing(model: &ModelSpec, image: &str) -> Fault {
    Fault::new(
        FaultKind::ImageMissing,
        format!(
            "image {image} is not on this Docker and `pull: never` forbids fetching it: \
             `docker pull {image}`, or build it, or set `pull: missing` for {}",
            model.name
        ),
    )
}

fn hint_at_local(fault: Fault, image: &str) -> Fault {
    let hint = "an older one is here, which `pull: missing` would use";
    Fault { message: format!("{} ({image}: {hint})", fault.message), ..fault }
}

pub async fn is_present(client: &Client, image: &str) -> Result<bool, Fault> {
    let docker = client.docker().await?;
    match timeout(PROMPT, docker.inspect_image(image)).await {
        Ok(Ok(_)) => Ok(true),
        Ok(Err(error)) if errors::is_missing(&error) => Ok(false),
        Ok(Err(error)) => Err(errors::fault(client.host(), "inspect an image", &error)),
        Err(_) => Err(errors::silent(client.host(), PROMPT)),
    }
}

async fn pull(runtime: &DockerRuntime, image: &str, progress: &Progress) -> Result<(), Fault> {
    let client = &runtime.client;
    let reference = Reference::parse(image).map_err(|why| bad_image(image, &why))?;
    let disk = Disk::of(runtime).await?;
    disk.has_room(DISK_FREE_MIN, image)?;
    let docker = client.docker().await?;
    let options = CreateImageOptionsBuilder::new().from_image(&reference.name).tag(&reference.tag);
    let credentials = registry::credentials(&reference.registry);
    let mut reports = docker.create_image(Some(options.build()), None, credentials);
    progress.set("pull", None, format!("asking {} for {image}", reference.registry));
    let mut layers = Layers::default();
    let mut moved = tokio::time::Instant::now();
    loop {
        let report = match timeout_at(moved + STALL, reports.next()).await {
            Ok(Some(Ok(report))) => report,
            Ok(Some(Err(error))) => {
                return Err(errors::pull_fault(client.host(), image, &reference.registry, &error));
            }
            Ok(None) => break,
            Err(_) => return Err(stalled(image, &reference.registry)),
        };
        if layers.note(report, Instant::now()) {
            moved = tokio::time::Instant::now();
        }
        // Docker keeps at least the unpacked image, and while unpacking the download beside it.
        disk.has_room(layers.to_come(), image)?;
        progress.set("pull", layers.fraction(), layers.detail());
    }
    if is_present(client, image).await? {
        return Ok(());
    }
    Err(Fault::new(FaultKind::FetchFailed, format!("the pull of {image} ended without the image")))
}

pub fn bad_image(image: &str, why: &str) -> Fault {
    Fault::new(FaultKind::BadSpec, format!("`{image}` is no image name: {why}"))
}

fn stalled(image: &str, registry: &str) -> Fault {
    Fault::new(
        FaultKind::FetchFailed,
        format!(
            "the pull of {image} from {registry} stalled: nothing came for {} s; it continues where \
             it was at the next attempt",
            STALL.as_secs()
        ),
    )
}

/// The disk that holds Docker's images, where Wharf can see it.
struct Disk {
    root_dir: Option<String>,
}

impl Disk {
    async fn of(runtime: &DockerRuntime) -> Result<Disk, Fault> {
        let daemon = runtime.client.daemon().await?;
        let here = *runtime.place.get(&runtime.client).await? == Place::Host;
        let root_dir = Some(daemon.root_dir.clone()).filter(|_| here);
        Ok(Disk { root_dir })
    }

    fn free(&self) -> Option<Bytes> {
        let stat = nix::sys::statvfs::statvfs(self.root_dir.as_deref()?).ok()?;
        Some(Bytes(stat.blocks_available().saturating_mul(stat.fragment_size())))
    }

    fn has_room(&self, need: Bytes, image: &str) -> Result<(), Fault> {
        match self.free() {
            Some(free) if free < need => Err(Fault::new(
                FaultKind::DiskFull,
                format!(
                    "no room for {image}: at least {need} more are needed, {free} are free under \
                     {}; `docker system df` shows what can go",
                    self.root_dir.as_deref().unwrap_or_default()
                ),
            )),
            _ => Ok(()),
        }
    }
}

/// Progress of a pull, added up over the layers that were announced so far.
#[derive(Debug, Default)]
struct Layers {
    by_id: BTreeMap<String, Layer>,
    pace: Pace,
    unpacking: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Layer {
    done: u64,
    total: u64,
    extracted: Option<i64>,
    /// How much of the download may be unpacked by now.
    unpacked: u64,
}

impl Layers {
    /// True if it tells of progress: "Waiting" and "Retrying" may go on for ever.
    fn note(&mut self, report: CreateImageInfo, now: Instant) -> bool {
        let (Some(id), Some(status)) = (report.id, report.status) else { return false };
        let detail = report.progress_detail.unwrap_or_default();
        let bytes = |n: Option<i64>| n.and_then(|n| u64::try_from(n).ok());
        let is_new = !self.by_id.contains_key(&id);
        let layer = self.by_id.entry(id).or_default();
        let before = *layer;
        match status.as_str() {
            "Downloading" => {
                layer.done = bytes(detail.current).unwrap_or(layer.done);
                layer.total = bytes(detail.total).unwrap_or(layer.total).max(layer.done);
            }
            "Extracting" | "Download complete" | "Verifying Checksum" => layer.done = layer.total,
            "Pull complete" | "Already exists" => {
                layer.done = layer.total;
                layer.unpacked = layer.total;
            }
            _ => {}
        }
        if status == "Extracting" {
            // Units differ (bytes, or seconds of a containerd store): any change will do.
            layer.extracted = detail.current;
            let is_bytes = bytes(detail.total) == Some(layer.total);
            let unpacked = bytes(detail.current).filter(|_| is_bytes);
            layer.unpacked = unpacked.unwrap_or(layer.total);
        }
        let moved = is_new || *layer != before;
        self.unpacking = status == "Extracting";
        self.pace.note(self.done(), now);
        moved
    }

    fn done(&self) -> u64 {
        self.by_id.values().map(|layer| layer.done).sum()
    }

    fn total(&self) -> u64 {
        self.by_id.values().map(|layer| layer.total).sum()
    }

    /// Bytes that will certainly still be written: unpacked layers are at least as large.
    fn to_come(&self) -> Bytes {
        let to_come = |layer: &Layer| {
            layer.total.saturating_sub(layer.done) + layer.total.saturating_sub(layer.unpacked)
        };
        Bytes(self.by_id.values().map(to_come).sum())
    }

    fn fraction(&self) -> Option<f32> {
        let total = self.total();
        (total > 0).then(|| (self.done() as f64 / total as f64) as f32)
    }

    /// `1.2 GiB of 9.1 GiB, 85.0 MiB/s`
    fn detail(&self) -> String {
        let (done, total) = (Bytes(self.done()), Bytes(self.total()));
        if total == Bytes::ZERO {
            "waiting for the registry".to_owned()
        } else if self.unpacking && done == total {
            format!("unpacking {total}")
        } else {
            self.pace.detail(done, total)
        }
    }
}

#[cfg(test)]
mod tests {
    use bollard::models::ProgressDetail;

    use super::*;

    fn report(id: &str, status: &str, current: i64, total: i64) -> CreateImageInfo {
        CreateImageInfo {
            id: Some(id.to_owned()),
            status: Some(status.to_owned()),
            progress_detail: Some(ProgressDetail { current: Some(current), total: Some(total) }),
            ..CreateImageInfo::default()
        }
    }

    #[test]
    fn only_bytes_and_layers_are_progress() {
        let (now, mut layers) = (Instant::now(), Layers::default());
        for (status, current, moved) in [
            ("Pulling fs layer", 0, true),
            ("Waiting", 0, false),
            ("Downloading", 10, true),
            ("Downloading", 10, false),
            ("Retrying in 5 seconds", 0, false),
            ("Downloading", 11, true),
            ("Extracting", 3, true),
            ("Extracting", 3, false),
            ("Extracting", 4, true),
            ("Pull complete", 0, true),
        ] {
            assert_eq!(layers.note(report("a", status, current, 100), now), moved, "{status}");
        }
    }

    #[test]
    fn progress_adds_up_over_layers() {
        let (start, mut layers) = (Instant::now(), Layers::default());
        let mib = 1 << 20;
        layers.note(report("a", "Downloading", 0, 100 * mib), start);
        layers.note(report("b", "Downloading", 0, 300 * mib), start);
        assert_eq!(layers.fraction(), Some(0.0));
        let later = start + Duration::from_secs(2);
        layers.note(report("b", "Downloading", 100 * mib, 300 * mib), later);
        assert_eq!(layers.fraction(), Some(0.25));
        assert_eq!(layers.detail(), "100.0 MiB of 400.0 MiB, 50.0 MiB/s");
        assert_eq!(layers.to_come(), Bytes::mib(200 + 500));
        layers.note(report("a", "Download complete", 0, 0), later);
        assert_eq!(layers.to_come(), Bytes::mib(100 + 500));
        layers.note(report("a", "Extracting", 80 * mib, 100 * mib), later);
        assert_eq!(layers.to_come(), Bytes::mib(20 + 500), "most of it is on the disk already");
        layers.note(report("a", "Pull complete", 0, 0), later);
        assert_eq!(layers.fraction(), Some(0.5));
        assert_eq!(layers.to_come(), Bytes::mib(500));
    }

    #[test]
    fn a_layer_that_is_unpacked_at_an_unknown_rate_asks_for_no_room() {
        let (now, mut layers) = (Instant::now(), Layers::default());
        layers.note(report("a", "Downloading", 50, 100), now);
        assert_eq!(layers.to_come(), Bytes(50 + 100));
        layers.note(report("a", "Download complete", 0, 0), now);
        assert_eq!(layers.to_come(), Bytes(100));
        // Seconds, without a total.
        layers.note(report("a", "Extracting", 3, 0), now);
        assert_eq!(layers.to_come(), Bytes(0));
    }
}
