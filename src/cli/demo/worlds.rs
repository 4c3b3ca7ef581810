//! The worlds of the demo: machines that are not there, with engines that are.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::ValueEnum;

use crate::units::Bytes;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum World {
    /// One 24 GiB GPU, three models of which two at most fit together.
    #[default]
    Laptop,
    /// Two 24 GiB GPUs, a small pinned speech model, and a stranger that holds memory.
    Homelab,
    /// Eight 24 GiB GPUs and 25 models; a health sweep, kill -9 and adoption.
    Team,
    /// A planner and a coder that alternate: in order of arrival, then Wharf's own order.
    Agents,
}

/// One model of a world.
#[derive(Clone, Debug)]
pub struct DemoModel {
    pub name: String,
    pub vram: Bytes,
    /// Command of the engine; `${PORT}` is filled in by Wharf.
    pub command: String,
    pub extra: String,
    pub llama: bool,
}

#[derive(Clone, Debug)]
pub struct Stage {
    pub models: Vec<DemoModel>,
    pub gpus: Vec<Bytes>,
    pub foreign: Vec<Bytes>,
    pub simulated: bool,
}

/// Where real llama-server models come from.
#[derive(Clone, Debug)]
pub struct Llama {
    pub server: PathBuf,
    pub ggufs: Vec<PathBuf>,
}

impl World {
    /// What is special about it, in a line.
    pub const fn about(self) -> &'static str {
        match self {
            World::Laptop => "two of them at most fit at once",
            World::Homelab => {
                "whisper is pinned (it never leaves), and a stranger's program holds 5 GiB of GPU 1"
            }
            World::Team => "one model per GPU or two; Wharf is killed on the way and comes back",
            World::Agents => "they never fit together, and agents want them in turn",
        }
    }

    pub fn stage(self, exe: &Path, llama: Option<&Llama>) -> Stage {
        if let Some(llama) = llama {
            return llama_stage(llama);
        }
        let model = |name: &str, gib: f64, load: &str| standin(exe, name, gib, load, "");
        match self {
            World::Laptop => Stage {
                models: vec![
                    model("mistral", 13.0, "2s"),
                    model("coder", 17.0, "3s"),
                    model("llava", 9.0, "4s"),
                ],
                gpus: vec![Bytes::gib(24)],
                foreign: Vec::new(),
                simulated: true,
            },
            World::Homelab => Stage {
                models: vec![
                    standin(exe, "whisper", 2.0, "1s", "    pinned: true\n    warmup: true\n"),
                    model("mistral", 14.0, "2s"),
                    model("coder", 19.0, "3s"),
                    model("llava", 12.0, "2s"),
                    model("mixtral", 16.0, "3s"),
                ],
                gpus: vec![Bytes::gib(24), Bytes::gib(24)],
                foreign: vec![Bytes::ZERO, Bytes::gib(5)],
                simulated: true,
            },
            World::Team => Stage {
                models: (0..25)
                    .map(|n| model(&format!("team-{n:02}"), [9.0, 12.0, 18.0][n % 3], "1500ms"))
                    .collect(),
                gpus: vec![Bytes::gib(24); 8],
                foreign: Vec::new(),
                simulated: true,
            },
            World::Agents => Stage {
                models: vec![model("planner", 16.0, "2s"), model("coder", 18.0, "2s")],
                gpus: vec![Bytes::gib(24)],
                foreign: Vec::new(),
                simulated: true,
            },
        }
    }
}

fn standin(exe: &Path, name: &str, gib: f64, load: &str, extra: &str) -> DemoModel {
    let mib = (gib * 1024.0) as u64;
    DemoModel {
        name: name.to_owned(),
        vram: Bytes::mib(mib),
        command: format!(
            "{} engine --host 127.0.0.1 --port ${{PORT}} --name {name} --style vllm --load {load} \
             --vram {mib}MiB --tokens-per-second 60",
            exe.display()
        ),
        extra: extra.to_owned(),
        llama: false,
    }
}

/// Real llama-servers on the CPU: their memory is declared, because there is no GPU to read.
fn llama_stage(llama: &Llama) -> Stage {
    let models = llama
        .ggufs
        .iter()
        .map(|gguf| {
            let stem = gguf.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            let name = stem.unwrap_or_else(|| "model".to_owned());
            DemoModel {
                command: format!(
                    "{} -m {} --host 127.0.0.1 --port ${{PORT}} -t 1 -tb 1 --alias {name} --metrics \
                     --sse-ping-interval 1",
                    llama.server.display(),
                    gguf.display()
                ),
                name,
                vram: Bytes::gib(13),
                extra: String::new(),
                llama: true,
            }
        })
        .collect();
    Stage { models, gpus: vec![Bytes::gib(24)], foreign: Vec::new(), simulated: false }
}

impl Stage {
    /// Two models to ask for that are not loaded after the tour: one is asked, one ensured.
    pub fn to_try(&self) -> (&str, &str) {
        let evictable: Vec<&str> = self
            .models
            .iter()
            .filter(|model| model.extra.is_empty())
            .map(|model| model.name.as_str())
            .collect();
        // After the tour of a small world its last model is loaded, or all but these two.
        match evictable.as_slice() {
            [first, second, _] => (second, first),
            [first, _, third, _] => (first, third),
            [first, second] => (second, first),
            [.., asked, ensured] => (asked, ensured),
            [only] => (only, only),
            [] => ("model", "model"),
        }
    }

    /// The models.yaml of this stage.
    pub fn yaml(&self, gateway: u16, orchestrator: u16) -> String {
        let sizes = |sizes: &[Bytes]| {
            sizes.iter().map(|size| format!("{}MiB", size.as_mib())).collect::<Vec<_>>().join(", ")
        };
        let mut yaml = format!(
            "listen: {{ gateway: 127.0.0.1:{gateway}, orchestrator: 127.0.0.1:{orchestrator} }}\n\
             store: wharf.db\n\
             swap: {{ on_exit: stop, min_residency: 1s, max_wait: 8s }}\n"
        );
        let provider = if self.simulated { "simulated" } else { "none" };
        // Writing to a String cannot fail.
        let _ = write!(yaml, "gpu:\n  provider: {provider}\n  memory: [{}]\n", sizes(&self.gpus));
        if self.simulated {
            yaml.push_str("  release_lag: 1200ms\n");
        }
        if !self.foreign.is_empty() {
            let _ = writeln!(yaml, "  foreign: [{}]", sizes(&self.foreign));
        }
        yaml.push_str("models:\n");
        for model in &self.models {
            let engine = if model.llama { "llamacpp" } else { "vllm" };
            let _ = write!(
                yaml,
                "  {}:\n    engine: {engine}\n    process: {{ cmd: \"{}\" }}\n    gpus: 1\n    \
                 vram: {}MiB\n{}",
                model.name,
                model.command,
                model.vram.as_mib(),
                model.extra
            );
        }
        yaml
    }
}
