//! What the stand-in can be told: its speed, its memory, its faults.

use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::units::Bytes;

const LLAMA_WAIT: Duration = Duration::from_secs(30);

// Of a flag given twice (in the configuration and again by Wharf) the last counts, as for vLLM.
#[derive(Args, Clone, Debug)]
#[command(args_override_self = true)]
pub struct Options {
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen on
    #[arg(long, env = "WHARF_PORT", default_value_t = 8000)]
    pub port: u16,
    /// Model name to serve; repeatable. Replies begin with it
    #[arg(
        long = "name",
        visible_alias = "served-model-name",
        alias = "alias",
        num_args = 1..,
        env = "WHARF_MODEL",
        default_value = "standin"
    )]
    pub names: Vec<String>,
    /// Which engine it resembles while loading, in its log and on its paths
    #[arg(long, value_enum, default_value_t = Style::Plain)]
    pub style: Style,
    /// Key that /v1 paths demand as `Authorization: Bearer KEY`; else VLLM_API_KEY or LLAMA_API_KEY
    #[arg(long)]
    pub api_key: Option<String>,
    /// A further path that answers as /health does
    #[arg(long, value_name = "PATH", value_parser = plain_path)]
    pub health_path: Option<String>,

    #[command(flatten)]
    pub load: LoadOptions,
    #[command(flatten)]
    pub speed: SpeedOptions,
    #[command(flatten)]
    pub end: EndOptions,
    #[command(flatten)]
    pub faults: FaultOptions,
    #[command(flatten)]
    pub ollama: OllamaOptions,
    #[command(flatten)]
    pub real: RealEngineFlags,
}

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Ollama (with --style ollama: one server, every --name a model)")]
pub struct OllamaOptions {
    /// How long a model stays after a request that says nothing of it
    #[arg(long, value_parser = humantime::parse_duration, default_value = "5m")]
    pub keep_alive: Duration,
    /// Models loaded at once; 0: no bound
    #[arg(long, default_value_t = 0)]
    pub max_loaded: u32,
}

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Load and memory")]
pub struct LoadOptions {
    /// Time from start to readiness, over all phases
    #[arg(long = "load", value_parser = humantime::parse_duration, default_value = "0s")]
    pub load_time: Duration,
    /// Memory taken on each GPU of WHARF_GPUS, entered in the folder WHARF_VRAM_LEDGER
    #[arg(long, value_parser = parse_bytes)]
    pub vram: Option<Bytes>,
    /// Host RAM taken from the start
    #[arg(long, value_parser = parse_bytes, default_value = "0")]
    pub host_ram: Bytes,
    /// Memory kept on each GPU while asleep
    #[arg(long, value_parser = parse_bytes, default_value = "600MiB")]
    pub residue: Bytes,
    /// Time that going to sleep takes
    #[arg(long, value_parser = humantime::parse_duration, default_value = "100ms")]
    pub sleep_time: Duration,
    /// Time that waking up takes
    #[arg(long, value_parser = humantime::parse_duration, default_value = "100ms")]
    pub wake_time: Duration,
    /// Worker processes, which hold the memory and outlive a SIGKILL of their parent alone
    #[arg(long, default_value_t = 0)]
    pub children: u16,
    /// Be such a worker
    #[arg(long, hide = true)]
    pub worker: bool,
}

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Speed")]
pub struct SpeedOptions {
    /// Tokens per second of one reply; 0: as fast as possible
    #[arg(long, default_value_t = 0.0)]
    pub tokens_per_second: f64,
    /// Time to the first token
    #[arg(long, value_parser = humantime::parse_duration, default_value = "0s")]
    pub ttft: Duration,
    /// Tokens of a reply whose request gives no max_tokens
    #[arg(long, default_value_t = 16)]
    pub reply_tokens: u32,
    /// Prompt tokens to report; otherwise the words of the prompt are counted
    #[arg(long)]
    pub prompt_tokens: Option<u32>,
    /// Time of one piece of work of --style http, unless its body says {"seconds": 2.5}
    #[arg(long, value_parser = humantime::parse_duration, default_value = "1s")]
    pub work: Duration,
    /// Requests served at once; the others wait
    #[arg(long, visible_alias = "max-num-seqs", alias = "parallel", default_value_t = 256)]
    pub slots: u32,
}

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "End")]
pub struct EndOptions {
    /// On SIGTERM: fast | drain:5s (waits for replies in flight, so long at most) |
    /// fixed:5s (always waits) | stuck-on-stream (vLLM: does not end while a client holds a
    /// stream, which gets no more tokens) | llama[:30s] (waits so long while a stream is open) |
    /// refuse (ignores the signal)
    #[arg(long, default_value = "fast")]
    pub shutdown: Shutdown,
    /// Time that the process lingers after it closed its port
    #[arg(long, value_parser = humantime::parse_duration, default_value = "0s")]
    pub release_lag: Duration,
}

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Faults")]
pub struct FaultOptions {
    /// Crash so long after becoming ready
    #[arg(long, value_parser = humantime::parse_duration)]
    pub crash_after_load: Option<Duration>,
    /// Crash when the Nth request arrives
    #[arg(long)]
    pub crash_on_request: Option<u64>,
    /// Exit code of a crash
    #[arg(long, default_value_t = 1)]
    pub exit_code: u8,
    /// Fall silent half-way through the load, for ever
    #[arg(long)]
    pub hang_load: bool,
    /// /health never answers 200
    #[arg(long)]
    pub wrong_health: bool,
    /// Print this line half-way through the load, then see --fatal-then
    #[arg(long, allow_hyphen_values = true)]
    pub fatal_line: Option<String>,
    /// What follows the fatal line
    #[arg(long, value_enum, default_value_t = FatalThen::Exit)]
    pub fatal_then: FatalThen,
    /// Reset the connection of every Nth request before any answer
    #[arg(long)]
    pub reset_connection_every: Option<u64>,
    /// Time to the response head
    #[arg(long, value_parser = humantime::parse_duration, default_value = "0s")]
    pub slow_head: Duration,
    /// Refuse to load this LoRA adapter (by name); repeatable
    #[arg(long)]
    pub fail_adapter: Vec<String>,
    /// Time that loading an adapter takes
    #[arg(long, value_parser = humantime::parse_duration, default_value = "0s")]
    pub adapter_time: Duration,
    /// Answer every request with this HTTP status
    #[arg(long, value_parser = clap::value_parser!(u16).range(400..=599))]
    pub fail_with: Option<u16>,
}

/// Flags of the real engines, so that their command lines (and what Wharf adds to them) work
/// unchanged. Those without a use here are accepted and have no effect.
#[derive(Args, Clone, Debug)]
pub struct RealEngineFlags {
    /// vLLM: share of the GPU's memory to take, where --vram is not given
    #[arg(long, hide = true)]
    pub gpu_memory_utilization: Option<f64>,
    /// vLLM: seconds to drain on SIGTERM, where --shutdown is left at its default
    #[arg(long, hide = true)]
    pub shutdown_timeout: Option<u64>,
    #[arg(long, short = 'm', hide = true)]
    model: Option<String>,
    #[arg(long, hide = true, alias = "ctx-size")]
    max_model_len: Option<String>,
    #[arg(long, hide = true)]
    tensor_parallel_size: Option<u16>,
    #[arg(long, hide = true)]
    kv_cache_memory_bytes: Option<u64>,
    #[arg(long, hide = true)]
    enable_sleep_mode: bool,
    /// vLLM: may have LoRA adapters
    #[arg(long, hide = true)]
    pub enable_lora: bool,
    #[arg(long, hide = true)]
    enforce_eager: bool,
    #[arg(long, hide = true)]
    metrics: bool,
    #[arg(long, hide = true)]
    sse_ping_interval: Option<u64>,
    #[arg(long, hide = true, alias = "n-gpu-layers")]
    gpu_layers: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Style {
    /// vLLM: refuses connections and logs its load phases until ready; sleeps
    Vllm,
    /// llama-server: answers /health with 503 until ready; accepts any model name
    Llamacpp,
    /// Refuses connections until ready; sleeps
    Plain,
    /// Ollama: loads and unloads models by its API; --load is the time of one of them
    Ollama,
    /// No LLM server but something like ComfyUI: a page, POST /prompt, GET /queue, POST /free, /ws
    #[value(alias = "comfyui")]
    Http,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FatalThen {
    Exit,
    Hang,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    Fast,
    Drain(Duration),
    Fixed(Duration),
    StuckOnStream,
    Llama(Duration),
    Refuse,
}

impl FromStr for Shutdown {
    type Err = String;

    fn from_str(text: &str) -> Result<Shutdown, String> {
        let (mode, time) = match text.split_once(':') {
            Some((mode, time)) => {
                (mode, Some(humantime::parse_duration(time).map_err(|error| error.to_string())?))
            }
            None => (text, None),
        };
        match (mode, time) {
            ("fast", None) => Ok(Shutdown::Fast),
            ("drain", Some(time)) => Ok(Shutdown::Drain(time)),
            ("fixed", Some(time)) => Ok(Shutdown::Fixed(time)),
            ("stuck-on-stream", None) => Ok(Shutdown::StuckOnStream),
            ("llama", time) => Ok(Shutdown::Llama(time.unwrap_or(LLAMA_WAIT))),
            ("refuse", None) => Ok(Shutdown::Refuse),
            _ => Err("expected fast, drain:5s, fixed:5s, stuck-on-stream, llama[:30s] or refuse"
                .to_owned()),
        }
    }
}

impl Options {
    /// As the engines it stands in for take their key.
    pub fn take_key_from_env(&mut self) {
        let named = |name| std::env::var(name).ok().filter(|key| !key.is_empty());
        self.api_key = self
            .api_key
            .take()
            .or_else(|| named("VLLM_API_KEY"))
            .or_else(|| named("LLAMA_API_KEY"));
    }

    /// The name that an answer to `asked` carries; `None`: that model is not served.
    pub fn served_as(&self, asked: &str) -> Option<&str> {
        let first = self.names.first().map_or("standin", String::as_str);
        match self.names.iter().find(|name| *name == asked) {
            Some(name) => Some(name),
            None => (self.style == Style::Llamacpp).then_some(first),
        }
    }

    pub fn shutdown(&self) -> Shutdown {
        match (self.end.shutdown, self.real.shutdown_timeout) {
            (Shutdown::Fast, Some(seconds)) if seconds > 0 => {
                Shutdown::Drain(Duration::from_secs(seconds))
            }
            (shutdown, _) => shutdown,
        }
    }
}

fn plain_path(text: &str) -> Result<String, String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/-_.".contains(c);
    if text.starts_with('/') && text.chars().all(is_plain) {
        return Ok(text.to_owned());
    }
    Err("a path such as /custom-endpoint is expected".to_owned())
}

/// `9GiB`, `600MiB`, `1.5GB`, `4096`.
fn parse_bytes(text: &str) -> Result<Bytes, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        unit => return Err(format!("unknown unit {unit}: use MiB or GiB")),
    };
    let number: f64 = number.parse().map_err(|_| format!("{text} is no size such as 9GiB"))?;
    Ok(Bytes((number * factor as f64) as u64))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    fn parse(args: &[&str]) -> Options {
        Cli::try_parse_from([&["engine"], args].concat()).expect("valid").options
    }

    #[test]
    fn sizes_read_as_people_write_them() {
        assert_eq!(parse_bytes("9GiB"), Ok(Bytes::gib(9)));
        assert_eq!(parse_bytes("1.5GiB"), Ok(Bytes::mib(1536)));
        assert_eq!(parse_bytes("4096"), Ok(Bytes(4096)));
        assert!(parse_bytes("9 apples").is_err());
        assert!(parse_bytes("GiB").is_err());
    }

    #[test]
    fn what_wharf_adds_for_vllm_is_understood() {
        let options = parse(&[
            "--style",
            "vllm",
            "--served-model-name",
            "coder",
            "org/coder",
            "--gpu-memory-utilization",
            "0.85",
            "--shutdown-timeout",
            "5",
        ]);
        assert_eq!(options.names, ["coder", "org/coder"]);
        assert_eq!(options.served_as("org/coder"), Some("org/coder"));
        assert_eq!(options.served_as("other"), None);
        assert_eq!(options.shutdown(), Shutdown::Drain(Duration::from_secs(5)));
    }

    #[test]
    fn of_a_flag_given_twice_the_last_counts() {
        let options = parse(&["--port", "1", "--name", "a", "--port", "2", "--name", "b"]);
        assert_eq!(options.port, 2);
        assert_eq!(options.names, ["a", "b"], "names add up");
    }

    #[test]
    fn llama_server_answers_to_any_name() {
        let options = parse(&["--style", "llamacpp", "--alias", "tiny", "-m", "x.gguf"]);
        assert_eq!(options.served_as("another"), Some("tiny"));
        assert_eq!("llama".parse(), Ok(Shutdown::Llama(LLAMA_WAIT)));
        assert!("drain".parse::<Shutdown>().is_err());
    }
}
