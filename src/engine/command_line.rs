//! The configured command of a model, read the way its engine reads it.

use crate::config::catalog::{ModelSpec, RuntimeSpec};

#[derive(Debug)]
pub struct CommandLine {
    words: Vec<String>,
    /// Arguments added at the end reach the engine.
    pub can_append: bool,
}

impl CommandLine {
    pub fn of(spec: &ModelSpec) -> CommandLine {
        let words = match &spec.runtime {
            RuntimeSpec::Process(process) => process.argv.clone(),
            RuntimeSpec::Docker(docker) => {
                let entrypoint = docker.entrypoint.iter().flatten();
                entrypoint.chain(&docker.args).cloned().collect()
            }
            RuntimeSpec::External(_) | RuntimeSpec::Ollama(_) => Vec::new(),
        };
        CommandLine::from_words(words)
    }

    pub fn from_words(words: Vec<String>) -> CommandLine {
        // `sh -c "…"`: the engine's arguments lie inside the string, and none can be added.
        match shell_script(&words) {
            Some(script) => CommandLine {
                words: shell_words::split(script)
                    .unwrap_or_else(|_| script.split_whitespace().map(str::to_owned).collect()),
                can_append: false,
            },
            None => CommandLine { words, can_append: true },
        }
    }

    pub fn has(&self, flags: &[&str]) -> bool {
        self.values(flags).is_some()
    }

    /// The value after the last of these flags (`--port 80`, `--port=80`), as the last one wins.
    pub fn value(&self, flags: &[&str]) -> Option<&str> {
        self.values(flags)?.first().copied()
    }

    /// Every word up to the next flag, for a flag that takes several.
    pub fn values(&self, flags: &[&str]) -> Option<Vec<&str>> {
        let at = self.words.iter().rposition(|word| flags.contains(&&*flag_name(word)))?;
        if let Some((_, value)) = self.words[at].split_once('=') {
            return Some(vec![value]);
        }
        let rest = self.words[at + 1..].iter().map(String::as_str);
        Some(rest.take_while(|word| !is_flag(word)).collect())
    }

    /// The word right after `verb`, or else the very first one, if it is no flag: what a command
    /// such as `vllm serve MODEL` is about, whose beginning may be the image's entrypoint.
    pub fn positional(&self, verb: &str) -> Option<&str> {
        let after = self.words.iter().position(|word| word == verb).map_or(0, |at| at + 1);
        self.words.get(after).map(String::as_str).filter(|word| !is_flag(word))
    }

    pub fn words(&self) -> impl Iterator<Item = &str> {
        self.words.iter().map(String::as_str)
    }

    pub fn mentions(&self, text: &str) -> bool {
        self.words.iter().any(|word| word.contains(text))
    }
}

/// `--served_model_name=x` → `--served-model-name`: Python's engines take both spellings.
fn flag_name(word: &str) -> String {
    let name = word.split('=').next().unwrap_or_default();
    if name.starts_with("--") { name.replace('_', "-") } else { name.to_owned() }
}

fn is_flag(word: &str) -> bool {
    word.starts_with('-') && word.parse::<f64>().is_err()
}

fn shell_script(words: &[String]) -> Option<&str> {
    let program = words.first()?.rsplit('/').next()?;
    let option = words.get(1)?;
    let runs_script = option.starts_with('-') && !option.starts_with("--") && option.ends_with('c');
    (["sh", "bash", "dash", "zsh", "ash"].contains(&program) && runs_script)
        .then(|| words.get(2).map(String::as_str))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> CommandLine {
        let words = shell_words::split(text).expect("words");
        match shell_script(&words) {
            Some(script) => {
                CommandLine { words: shell_words::split(script).expect("words"), can_append: false }
            }
            None => CommandLine { words, can_append: true },
        }
    }

    #[test]
    fn flags_are_found_in_every_spelling() {
        let line = line("vllm serve m --port=1 --served_model_name a b --port 2 -tp 4 --temp -1");
        assert_eq!(line.value(&["--port"]), Some("2"));
        assert_eq!(line.values(&["--served-model-name"]), Some(vec!["a", "b"]));
        assert_eq!(line.value(&["--tensor-parallel-size", "-tp"]), Some("4"));
        assert_eq!(line.value(&["--temp"]), Some("-1"));
        assert!(!line.has(&["--host"]));
    }

    #[test]
    fn the_positional_follows_its_verb_or_comes_first() {
        let model = |text: &str| line(text).positional("serve").map(str::to_owned);
        assert_eq!(model("vllm serve org/a --port 1").as_deref(), Some("org/a"));
        assert_eq!(model("org/a --port 1").as_deref(), Some("org/a"));
        assert_eq!(model("sh -c 'exec vllm serve org/a'").as_deref(), Some("org/a"));
        assert_eq!(model("--model org/a"), None);
        assert_eq!(model("vllm serve --model org/a"), None);
    }

    #[test]
    fn a_shell_script_is_looked_into_but_not_added_to() {
        let line = line("/bin/bash -lc 'exec vllm serve m --port ${PORT}'");
        assert!(!line.can_append);
        assert_eq!(line.value(&["--port"]), Some("${PORT}"));
        assert!(line.mentions("${PORT}"));
    }
}
