//! Brings a model's weights into its cache before anything is drained for it.
//!
//! By a container of the model's own image, with its volumes and environment, that does nothing
//! else: the hub's client in there knows best where its cache is and what is in it already.
//! See `weights.py`, which runs in it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bollard::container::AttachContainerResults;
use bollard::models::{ContainerCreateBody, HostConfig, HostConfigLogConfig};
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, CreateContainerOptions, WaitContainerOptionsBuilder,
};
use futures_util::StreamExt as _;
use serde_json::json;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::client::PROMPT;
use super::errors::{self, Subject};
use super::weights_report::{Report, Step};
use super::{DockerRuntime, create, labels, start, watched};
use crate::config::catalog::{DockerSpec, ModelSpec};
use crate::engine::{self, HubModel};
use crate::runtime::Progress;
use crate::scheduler::event::{Fault, FaultKind};

const SCRIPT: &str = include_str!("weights.py");
/// The script speaks every half second while bytes come, and gives the hub 10 s to answer.
const SILENCE_MAX: Duration = Duration::from_secs(180);
const HF_TOKEN: &str = "HF_TOKEN";
const HF_TOKEN_FILE: &str = "HF_TOKEN_FILE";

/// What became of a model's weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Weights {
    /// They do not come from the hub.
    Elsewhere,
    /// Of this repository, and in the model's cache.
    Present(String),
    /// They cannot be fetched ahead, for this reason; the engine fetches them while it starts.
    LeftToEngine(String),
}

/// What was found out in this process, so that later swaps do not pay for it again. Should
/// somebody clear a cache, the engine fetches while it starts.
#[derive(Default)]
pub struct Known(Mutex<BTreeMap<Key, Weights>>);

/// Everything that decides which files go where.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    image: String,
    hub: HubModel,
    volumes: Vec<String>,
    env: BTreeMap<String, String>,
    user: Option<String>,
}

impl std::fmt::Debug for Known {
    /// Its keys hold secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Known")
    }
}

impl Known {
    fn get(&self, key: &Key) -> Option<Weights> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    fn put(&self, key: Key, weights: Weights) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key, weights);
    }
}

/// A token for the hub from Wharf's own environment: HF_TOKEN, or the file that HF_TOKEN_FILE
/// names (a secret of compose, say).
pub fn hub_token() -> Result<Option<String>, Fault> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    if let Some(token) = variable(HF_TOKEN) {
        return Ok(Some(token));
    }
    let Some(file) = variable(HF_TOKEN_FILE) else { return Ok(None) };
    match std::fs::read_to_string(&file) {
        Ok(token) => Ok(Some(token.trim().to_owned()).filter(|token| !token.is_empty())),
        Err(error) => Err(Fault::new(
            FaultKind::BadSpec,
            format!("HF_TOKEN_FILE names {file}, which cannot be read: {error}"),
        )),
    }
}

/// Makes the weights present where the model keeps them. The image must be here.
/// `installation`: for the container's label; `None`: not for a running Wharf (`wharf pull`).
pub async fn fetch(
    runtime: &DockerRuntime,
    model: &ModelSpec,
    installation: Option<&str>,
    progress: &Progress,
) -> Result<Weights, Fault> {
    let docker = super::docker_spec(model)?;
    let image = docker.image.clone().filter(|_| docker.container.is_none());
    let (Some(image), Some(hub)) = (image, engine::hub_model(model)) else {
        return Ok(Weights::Elsewhere);
    };
    let key = Key {
        image,
        hub,
        volumes: docker.volumes.clone(),
        env: docker.env.clone(),
        user: docker.user.clone(),
    };
    if let Some(known) = runtime.weights.get(&key) {
        return Ok(known);
    }
    let weights = if docker.volumes.is_empty() {
        Weights::LeftToEngine(
            "it has no volume for them, so they are lost with its container: add \
             `volumes: [\"hf-cache:/root/.cache/huggingface\"]`"
                .to_owned(),
        )
    } else {
        let errand = Errand::new(runtime, model, docker, &key, installation)?;
        errand.run(progress.clone()).await?
    };
    if let Weights::LeftToEngine(why) = &weights {
        tracing::warn!(model = %model.name, "its weights are not fetched ahead of a swap: {why}");
    }
    runtime.weights.put(key, weights.clone());
    Ok(weights)
}

/// One container's worth of work.
struct Errand {
    runtime: DockerRuntime,
    model: ModelSpec,
    docker: DockerSpec,
    image: String,
    hub: HubModel,
    installation: Option<String>,
    token: Option<String>,
}

impl Errand {
    fn new(
        runtime: &DockerRuntime,
        model: &ModelSpec,
        docker: &DockerSpec,
        key: &Key,
        installation: Option<&str>,
    ) -> Result<Errand, Fault> {
        // The configured one goes first, as it does in the engine's own container.
        let configured = key.hub.token.clone().or_else(|| docker.env.get(HF_TOKEN).cloned());
        Ok(Errand {
            runtime: runtime.clone(),
            model: model.clone(),
            docker: docker.clone(),
            image: key.image.clone(),
            hub: key.hub.clone(),
            installation: installation.map(str::to_owned),
            token: match configured {
                Some(token) => Some(token).filter(|token| !token.is_empty()),
                None => hub_token()?,
            },
        })
    }

    /// In a task of its own, as a request to Docker that is dropped half-way may still be carried
    /// out: whoever drops this future leaves a task that removes the container.
    async fn run(self, progress: Progress) -> Result<Weights, Fault> {
        let (mut reply, result) = oneshot::channel();
        tokio::spawn(async move {
            let outcome = match self.create().await {
                Ok(id) => {
                    let outcome = tokio::select! {
                        outcome = self.follow(&id, &progress) => outcome,
                        () = reply.closed() => {
                            Err(Fault::new(FaultKind::Cancelled, "not wanted any more"))
                        }
                    };
                    if let Err(fault) = start::remove(&self.runtime.client, &id).await {
                        // Docker removes it once it ends, which it does without our connection.
                        tracing::warn!(container = id, reason = fault.message, "not removed yet");
                    }
                    outcome
                }
                Err(fault) => Err(fault),
            };
            drop(reply.send(outcome));
        });
        let lost = |_| Fault::new(FaultKind::Internal, "the task that fetches weights ended early");
        result.await.map_err(lost)?
    }

    async fn create(&self) -> Result<String, Fault> {
        let client = &self.runtime.client;
        let docker = client.docker().await?;
        let body = self.body().await?;
        let created = docker.create_container(None::<CreateContainerOptions>, body).await;
        Ok(created.map_err(|error| self.refused(&error))?.id)
    }

    /// It holds secrets in its environment: never log it.
    async fn body(&self) -> Result<ContainerCreateBody, Fault> {
        let client = &self.runtime.client;
        let place = self.runtime.place.get(client).await?;
        let mut env: BTreeMap<String, String> = BTreeMap::new();
        if client.daemon().await?.default_runtime.contains("nvidia") {
            // CUDA images ask that runtime for every GPU unless told otherwise.
            env.insert("NVIDIA_VISIBLE_DEVICES".to_owned(), "void".to_owned());
        }
        env.extend(self.docker.env.clone());
        env.extend(self.token.clone().map(|token| (HF_TOKEN.to_owned(), token)));
        let want = json!({
            "repo": self.hub.repo,
            "revision": self.hub.revision,
            "download_dir": self.hub.download_dir,
        });
        let mut labels = labels::Labels::new();
        labels::write_errand(
            self.installation.as_deref(),
            &self.runtime.run,
            &self.model.name,
            &mut labels,
        );
        Ok(ContainerCreateBody {
            image: Some(self.image.clone()),
            entrypoint: Some(["python3", "-c", SCRIPT].map(str::to_owned).into()),
            cmd: Some(vec![want.to_string()]),
            env: Some(env.into_iter().map(|(key, value)| format!("{key}={value}")).collect()),
            user: self.docker.user.clone(),
            labels: Some(labels),
            // Its stdin ends with our connection, and the script with its stdin: whatever becomes
            // of Wharf, no download goes on unseen.
            open_stdin: Some(true),
            stdin_once: Some(true),
            attach_stdin: Some(true),
            host_config: Some(HostConfig {
                binds: Some(self.docker.volumes.clone()),
                network_mode: create::networks(&self.docker, place).first,
                auto_remove: Some(true),
                // Read once, through the connection.
                log_config: Some(HostConfigLogConfig {
                    typ: Some("none".to_owned()),
                    config: None,
                }),
                ..HostConfig::default()
            }),
            ..ContainerCreateBody::default()
        })
    }

    fn refused(&self, error: &bollard::errors::Error) -> Fault {
        let subject = Subject {
            model: self.model.name.as_str(),
            image: &self.image,
            port: 0,
            runtime: self.docker.runtime.as_deref().unwrap_or("?"),
        };
        errors::start_fault(self.runtime.client.host(), subject, error)
    }

    async fn follow(&self, id: &str, progress: &Progress) -> Result<Weights, Fault> {
        let client = &self.runtime.client;
        let docker = client.docker().await?;
        let options = AttachContainerOptionsBuilder::new()
            .stream(true)
            .stdin(true)
            .stdout(true)
            .stderr(true)
            .build();
        let attached = client.within(PROMPT, docker.attach_container(id, Some(options))).await?;
        let AttachContainerResults { mut output, input: _lifeline } = attached;
        progress.set("weights", None, format!("asking for {}", self.hub.repo));
        if let Err(error) = docker.start_container(id, None).await {
            let fault = self.refused(&error);
            return match fault.kind {
                FaultKind::CommandMissing => Ok(Weights::LeftToEngine(format!(
                    "image {} has no python3 that could fetch them",
                    self.image
                ))),
                _ => Err(fault),
            };
        }
        let mut report = Report::new(&self.hub.repo, self.token.as_deref());
        loop {
            let frame = match timeout(SILENCE_MAX, output.next()).await {
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => {
                    return Err(errors::fault(client.host(), "show a container's output", &error));
                }
                Ok(None) => return Err(report.broken_off(self.exit(id).await)),
                Err(_) => return Err(report.silent(SILENCE_MAX)),
            };
            match report.read(&frame.into_bytes(), progress) {
                None => {}
                Some(Step::Present) => return Ok(Weights::Present(self.hub.repo.clone())),
                Some(Step::Skip(why)) => return Ok(Weights::LeftToEngine(why)),
                Some(Step::Fault(fault)) => return Err(fault),
            }
        }
    }

    /// How it ended, if Docker has not yet removed it.
    async fn exit(&self, id: &str) -> Option<crate::runtime::ExitReport> {
        let docker = self.runtime.client.docker().await.ok()?;
        let options = WaitContainerOptionsBuilder::new().condition("removed").build();
        let ended =
            timeout(PROMPT, docker.wait_container(id, Some(options)).next()).await.ok()??;
        let code = match ended {
            Ok(ended) => ended.status_code,
            Err(bollard::errors::Error::DockerContainerWaitError { code, .. }) => code,
            Err(_) => return None,
        };
        Some(watched::report(i32::try_from(code).ok(), false))
    }
}
