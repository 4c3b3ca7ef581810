//! Which part of a model's entry shapes the running engine, and which is policy that can change
//! under it. The one place that decides it, for a reload as for an adoption.

use std::borrow::Cow;

use serde::Serialize;

use super::catalog::{
    DockerSpec, EngineKind, GpuRequest, ModelSpec, PullPolicy, RuntimeSpec, Vram,
};

/// Raise when Wharf starts engines differently for the same model entry.
const LAUNCH_VERSION: u32 = 1;

#[derive(PartialEq, Serialize)]
struct Shape<'a> {
    version: u32,
    engine: EngineKind,
    runtime: Cow<'a, RuntimeSpec>,
    gpus: &'a GpuRequest,
    /// Only vLLM is told how much it may take; of any other engine it is what Wharf reckons with.
    vram: Option<Vram>,
    served_name: &'a str,
    port: Option<u16>,
    sleep: Option<u8>,
    #[serde(skip_serializing_if = "is_off")]
    lora: bool,
}

/// Left out then, so that models without adapters keep the hash they always had.
fn is_off(flag: &bool) -> bool {
    !flag
}

impl ModelSpec {
    fn shape(&self) -> Shape<'_> {
        // Every key is named: a new one has to be put on one side or the other.
        let ModelSpec {
            engine,
            runtime,
            gpus,
            vram,
            port,
            sleep,
            lora,
            // In `served_name`.
            name: _,
            upstream_name: _,
            // Words.
            aliases: _,
            display_name: _,
            description: _,
            model_type: _,
            tags: _,
            unlisted: _,
            metadata: _,
            registered: _,
            peer: _,
            size_gb: _,
            line: _,
            // Policy: who is served when, and who leaves when and how.
            priority: _,
            pinned: _,
            warmup: _,
            ttl: _,
            ttl_bounds: _,
            grace: _,
            keep: _,
            concurrency: _,
            waiting: _,
            include_usage: _,
            filters: _,
            answer_timeout: _,
            http: _,
            // Served by another model's instance.
            adapter: _,
            ram: _,
            stop: _,
            // How a start is judged (see `starts_like`).
            health: _,
            start_timeout: _,
            canary: _,
            warmup_request: _,
            read_ahead: _,
        } = self;
        Shape {
            version: LAUNCH_VERSION,
            engine: *engine,
            runtime: without_policy(runtime),
            gpus,
            vram: (*engine == EngineKind::Vllm).then_some(*vram),
            served_name: self.served_name(),
            port: *port,
            sleep: *sleep,
            lora: *lora,
        }
    }

    /// Whether an engine that was started for `other` can go on under this entry.
    pub fn runs_like(&self, other: &ModelSpec) -> bool {
        let (mut mine, theirs) = (self.shape(), other.shape());
        // One that could take adapters goes on without any.
        mine.lora |= theirs.lora;
        mine == theirs
    }

    /// Whether a start under way for `other` can go on: it is also judged in the same way, and was
    /// promised the same bytes.
    pub fn starts_like(&self, other: &ModelSpec) -> bool {
        let judged = |spec: &ModelSpec| {
            (spec.health.clone(), spec.start_timeout, spec.canary, spec.vram, spec.ram)
        };
        judged(self) == judged(other) && self.runs_like(other)
    }

    /// Hash of everything that shapes the running engine (FNV-1a: stable over builds and machines).
    pub fn shape_hash(&self) -> String {
        let bytes = serde_json::to_vec(&self.shape()).unwrap_or_default();
        let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
        format!("{hash:016x}")
    }
}

/// When an image is fetched changes nothing about the container that was made from it.
fn without_policy(runtime: &RuntimeSpec) -> Cow<'_, RuntimeSpec> {
    match runtime {
        RuntimeSpec::Docker(docker) if docker.pull != PullPolicy::default() => {
            let docker = DockerSpec { pull: PullPolicy::default(), ..docker.clone() };
            Cow::Owned(RuntimeSpec::Docker(docker))
        }
        runtime => Cow::Borrowed(runtime),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::catalog::ProcessSpec;
    use crate::units::{Bytes, Priority};

    type Edit = fn(&mut ModelSpec);

    fn docker(edit: impl FnOnce(&mut DockerSpec)) -> RuntimeSpec {
        let mut spec = DockerSpec { image: Some("engine:1".to_owned()), ..DockerSpec::default() };
        edit(&mut spec);
        RuntimeSpec::Docker(spec)
    }

    fn plain() -> ModelSpec {
        ModelSpec {
            runtime: docker(|_| {}),
            vram: Vram::Declared(Bytes::gib(4)),
            ..ModelSpec::plain("a")
        }
    }

    #[test]
    fn words_and_policy_leave_the_engine_as_it_is() {
        let edits: [Edit; 9] = [
            |spec| spec.description = Some("new words".to_owned()),
            |spec| spec.aliases = vec!["b".to_owned()],
            |spec| spec.priority = Priority::High,
            |spec| spec.ttl = Some(Duration::from_secs(60)),
            |spec| spec.pinned = true,
            |spec| spec.concurrency = Some(3),
            |spec| spec.stop.grace = Duration::from_secs(3),
            |spec| spec.vram = Vram::Declared(Bytes::gib(5)),
            |spec| spec.runtime = docker(|docker| docker.pull = PullPolicy::Always),
        ];
        for (at, edit) in edits.iter().enumerate() {
            let mut edited = plain();
            edit(&mut edited);
            assert!(!edited.is_same(&plain()), "edit {at} changes something");
            assert!(edited.runs_like(&plain()), "edit {at}");
            assert_eq!(edited.shape_hash(), plain().shape_hash(), "edit {at}");
        }
    }

    #[test]
    fn what_an_engine_is_started_with_shapes_it() {
        let edits: [Edit; 8] = [
            |spec| spec.runtime = docker(|docker| docker.image = Some("engine:2".to_owned())),
            |spec| spec.runtime = docker(|docker| docker.args = vec!["--more".to_owned()]),
            |spec| spec.runtime = docker(|docker| docker.user = Some("1000".to_owned())),
            |spec| spec.runtime = RuntimeSpec::Process(ProcessSpec::default()),
            |spec| spec.gpus = GpuRequest::Explicit(vec!["1".to_owned()]),
            |spec| spec.upstream_name = Some("served".to_owned()),
            |spec| spec.port = Some(9001),
            |spec| spec.engine = EngineKind::Llamacpp,
        ];
        for (at, edit) in edits.iter().enumerate() {
            let mut edited = plain();
            edit(&mut edited);
            assert!(!edited.runs_like(&plain()), "edit {at}");
            assert_ne!(edited.shape_hash(), plain().shape_hash(), "edit {at}");
        }
        let vllm = |gib| ModelSpec {
            engine: EngineKind::Vllm,
            vram: Vram::Declared(Bytes::gib(gib)),
            ..plain()
        };
        assert!(!vllm(4).runs_like(&vllm(5)), "it was given its share of the memory");
    }

    #[test]
    fn a_start_is_also_held_to_how_it_is_judged() {
        let edits: [Edit; 3] = [
            |spec| spec.health.path = Some("/elsewhere".to_owned()),
            |spec| spec.start_timeout = Some(Duration::from_secs(5)),
            |spec| spec.vram = Vram::Declared(Bytes::gib(5)),
        ];
        for edit in edits {
            let mut edited = plain();
            edit(&mut edited);
            assert!(edited.runs_like(&plain()) && !edited.starts_like(&plain()));
        }
    }
}
