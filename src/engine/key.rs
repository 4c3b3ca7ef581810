//! The key that an engine asks of its callers: the one that its command or environment names, or
//! one that Wharf makes for it.

use super::command_line::CommandLine;
use crate::config::catalog::{DockerSpec, EngineKind, ModelSpec, RuntimeSpec};
use crate::runtime::{EngineKey, Given, LaunchKey};

const FLAG: &[&str] = &["--api-key"];

/// The variable by which an engine takes its key. It wins over nothing: the flag comes first.
const fn variable(engine: EngineKind) -> Option<&'static str> {
    match engine {
        EngineKind::Vllm => Some("VLLM_API_KEY"),
        // Beside the keys of an `--api-key-file`, which go on being good.
        EngineKind::Llamacpp => Some("LLAMA_API_KEY"),
        // Unknown servers might refuse what they do not know.
        EngineKind::Openai | EngineKind::Ollama | EngineKind::Http => None,
    }
}

/// What a command or an environment says of the key.
enum Said {
    Nothing,
    This(EngineKey),
    /// Something that only the engine's own shell could tell, or that no header can carry.
    Unreadable,
    /// Explicitly none.
    Off,
}

/// For an instance about to start. `inherited`: the environment that a process gets from Wharf's.
/// `None`: the operating system gave no randomness.
pub fn launch_key(
    spec: &ModelSpec,
    inherited: impl Fn(&str) -> Option<String>,
) -> Option<LaunchKey> {
    let env = match &spec.runtime {
        // What a container of somebody else's was given is seen once it runs.
        RuntimeSpec::External(_)
        | RuntimeSpec::Ollama(_)
        | RuntimeSpec::Docker(DockerSpec { container: Some(_), .. }) => {
            return Some(LaunchKey::None);
        }
        RuntimeSpec::Docker(docker) => &docker.env,
        RuntimeSpec::Process(process) => &process.env,
    };
    let inherits = matches!(spec.runtime, RuntimeSpec::Process(_));
    let value = |name: &str| {
        let own = env.get(name).cloned();
        own.or_else(|| inherits.then(|| inherited(name)).flatten())
    };
    let variable = variable(spec.engine);
    match said(spec.engine, &CommandLine::of(spec), value) {
        Said::This(key) => Some(LaunchKey::Configured(key)),
        Said::Unreadable | Said::Off => Some(LaunchKey::None),
        Said::Nothing => match variable {
            Some(variable) => EngineKey::random().map(|key| LaunchKey::Made { variable, key }),
            None => Some(LaunchKey::None),
        },
    }
}

/// Of an engine that runs already: one of ours met again, or a container that somebody else made.
pub fn running_key(spec: &ModelSpec, given: &Given) -> Option<EngineKey> {
    // Some engines write over the arguments that the system shows: the configured ones come first.
    let lines = [CommandLine::of(spec), CommandLine::from_words(given.args.clone())];
    lines.iter().find_map(|line| {
        match said(spec.engine, line, |name| given.env.get(name).cloned()) {
            Said::This(key) => Some(key),
            Said::Nothing | Said::Unreadable | Said::Off => None,
        }
    })
}

/// The flag stands in a script, and its value is the shell's to tell.
pub fn is_unreadable(line: &CommandLine) -> bool {
    !line.can_append && line.value(FLAG).is_some_and(|text| text.contains(['$', '`']))
}

fn said(engine: EngineKind, line: &CommandLine, env: impl Fn(&str) -> Option<String>) -> Said {
    if is_unreadable(line) {
        return Said::Unreadable;
    }
    let from_flag = line.value(FLAG).map(str::to_owned);
    let Some(text) = from_flag.or_else(|| variable(engine).and_then(env)) else {
        return Said::Nothing;
    };
    // llama-server takes a list.
    let first = text.split(',').next().unwrap_or_default().trim();
    match first {
        "" => Said::Off,
        first => EngineKey::new(first).map_or(Said::Unreadable, Said::This),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> CommandLine {
        CommandLine::from_words(shell_words::split(text).unwrap())
    }

    fn known(engine: EngineKind, text: &str, env: &[(&str, &str)]) -> Option<String> {
        let value = |name: &str| {
            env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        };
        match said(engine, &line(text), value) {
            Said::This(key) => Some(key.expose().to_owned()),
            Said::Nothing => Some("nothing".to_owned()),
            Said::Unreadable | Said::Off => None,
        }
    }

    #[test]
    fn the_flag_counts_before_the_variable_of_that_engine() {
        use EngineKind::{Llamacpp, Openai, Vllm};
        let env = [("VLLM_API_KEY", "v-env"), ("LLAMA_API_KEY", "l-env")];
        let key = |engine, text| known(engine, text, &env);
        assert_eq!(key(Vllm, "vllm serve m --api-key one two --port 1").as_deref(), Some("one"));
        assert_eq!(key(Vllm, "vllm serve m").as_deref(), Some("v-env"));
        assert_eq!(key(Llamacpp, "llama-server --api-key=a,b").as_deref(), Some("a"));
        assert_eq!(key(Llamacpp, "llama-server").as_deref(), Some("l-env"));
        assert_eq!(key(Openai, "x --api-key k").as_deref(), Some("k"));
        assert_eq!(key(Openai, "x").as_deref(), Some("nothing"));
        assert_eq!(known(Llamacpp, "x --api-key-file f", &[]).as_deref(), Some("nothing"));
    }

    #[test]
    fn what_only_a_shell_could_tell_is_not_guessed() {
        assert_eq!(known(EngineKind::Vllm, "sh -c 'vllm serve m --api-key $K'", &[]), None);
        assert_eq!(known(EngineKind::Vllm, "vllm serve m", &[("VLLM_API_KEY", "")]), None);
        let literal = known(EngineKind::Vllm, "vllm serve m --api-key 'pa$$word'", &[]);
        assert_eq!(literal.as_deref(), Some("pa$$word"), "no shell reads it");
    }
}
