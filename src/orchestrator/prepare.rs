//! What is done for a start before there is room for it: its container is created, and its weights
//! are read into the page cache. Whoever drops it calls it off.

use std::path::Path;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::effects::Effects;
use crate::config::catalog::{RuntimeSpec, Settings};
use crate::engine;
use crate::gpu::host_memory;
use crate::runtime::read_ahead::{Bounds, Done, End, read_ahead};
use crate::runtime::{LaunchSpec, Made, Progress};
use crate::units::Bytes;

/// Reading less than this tells nobody anything.
const WORTH_TELLING: Duration = Duration::from_millis(50);
const STAGE: &str = "read_ahead";
const DOCKER_VOLUMES: &str = "/var/lib/docker/volumes";

#[derive(Debug)]
pub struct Prepared {
    pub made: Making,
    /// Its drop ends the reading.
    pub reading: Option<DropGuard>,
    pub progress: Progress,
}

/// A container under way.
#[derive(Debug)]
pub struct Making(Option<oneshot::Receiver<Made>>);

impl Making {
    /// What was made, once it is. `None`: nothing, the start makes it then (and says why not).
    pub async fn take(self) -> Option<Made> {
        self.0?.await.ok()
    }
}

impl Effects {
    /// While others leave: everything that needs no room.
    pub(super) fn prepare(
        &self,
        launch: &LaunchSpec,
        progress: Progress,
        settings: &Settings,
    ) -> Prepared {
        let (made, making) = oneshot::channel();
        let (runtimes, spec) = (self.runtimes.clone(), launch.clone());
        // Waited for at the end of Wharf: what is made then is removed again.
        self.runtimes.docker.track(async move {
            match runtimes.make(&spec).await {
                // Nobody there any more: it is dropped, and so removed.
                Ok(Some(container)) => drop(made.send(container)),
                Ok(None) => {}
                Err(fault) => {
                    let model = &spec.model.name;
                    tracing::debug!(%model, "not made ahead: {}", fault.message);
                }
            }
        });
        let reading = Effects::read_ahead(launch, settings, Some(progress.clone()));
        Prepared { made: Making(Some(making)), reading, progress }
    }

    /// Nobody has to leave: reading may still get ahead of an engine that takes long to begin.
    pub(super) fn prepare_start(
        &self,
        launch: &LaunchSpec,
        progress: Progress,
        settings: &Settings,
    ) -> Prepared {
        Prepared {
            made: Making(None),
            reading: Effects::read_ahead(launch, settings, None),
            progress,
        }
    }

    /// `progress`: until the start tells its own.
    fn read_ahead(
        launch: &LaunchSpec,
        settings: &Settings,
        progress: Option<Progress>,
    ) -> Option<DropGuard> {
        let most = launch.model.read_ahead.unwrap_or(settings.swap.read_ahead);
        let is_local =
            matches!(launch.model.runtime, RuntimeSpec::Process(_) | RuntimeSpec::Docker(_));
        if most == Bytes::ZERO || !is_local {
            return None;
        }
        let bounds = Bounds { most, reserve: settings.ram.reserve };
        let stop = CancellationToken::new();
        let (stopped, spec) = (stop.clone(), launch.model.clone());
        let before = progress.as_ref().map(Progress::stage);
        // A thread for blocking work: a disk may take its time.
        tokio::task::spawn_blocking(move || {
            let files = engine::weight_files(&spec, Some(Path::new(DOCKER_VOLUMES)));
            if files.is_empty() {
                return;
            }
            // A slow disk may have taken until the start tells its own stages.
            if let (Some(progress), Some(before)) = (&progress, before) {
                progress.follow(&before, STAGE);
            }
            // Of this machine, also where its GPUs are simulated.
            let available = || Some(host_memory()?.available);
            let told = |read: Bytes, total: Bytes| {
                if let Some(progress) = &progress {
                    let part = read.0 as f64 / total.0.max(1) as f64;
                    progress.go_on(STAGE, Some(part as f32), format!("{read} of {total}"));
                }
            };
            let Done { read, total, took, end } =
                read_ahead(&files, bounds, &stopped, available, told);
            if took >= WORTH_TELLING {
                let why = match end {
                    End::Whole => "whole",
                    End::Stopped => "the start ended or was called off",
                    End::Limit => "as much as `read_ahead` allows",
                    End::Memory => "more would leave too little memory",
                };
                let ms = took.as_millis() as u64;
                tracing::info!(model = %spec.name, %read, %total, ms, why, "read ahead");
            }
        });
        Some(stop.drop_guard())
    }
}
