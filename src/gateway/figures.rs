//! The engines' own words for what an answer took: tokens and speeds.

mod usual;

use serde::Deserialize;

/// What an engine tells of one answer. `None`: it does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    /// All of the prompt, also what came from a cache.
    pub prompt: Option<u64>,
    pub cached: Option<u64>,
    pub completion: Option<u64>,
    pub prompt_per_second: Option<f64>,
    pub tokens_per_second: Option<f64>,
}

/// The names of the OpenAI API, old and new, and Anthropic's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    prompt_tokens_details: Option<Details>,
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    input_tokens_details: Option<Details>,
    /// Anthropic's `input_tokens` are what neither was read from the cache nor written to it.
    cache_read_input_tokens: Option<u64>,
    cache_creation_input_tokens: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Details {
    cached_tokens: Option<u64>,
}

impl Usage {
    /// Anthropic tells the prompt in its first event and the rest in its last: what is told again
    /// replaces what was told before.
    pub fn absorb(&mut self, later: Usage) {
        self.prompt_tokens = later.prompt_tokens.or(self.prompt_tokens);
        self.completion_tokens = later.completion_tokens.or(self.completion_tokens);
        self.prompt_tokens_details = later.prompt_tokens_details.or(self.prompt_tokens_details);
        self.input_tokens = later.input_tokens.or(self.input_tokens);
        self.output_tokens = later.output_tokens.or(self.output_tokens);
        self.input_tokens_details = later.input_tokens_details.or(self.input_tokens_details);
        self.cache_read_input_tokens =
            later.cache_read_input_tokens.or(self.cache_read_input_tokens);
        self.cache_creation_input_tokens =
            later.cache_creation_input_tokens.or(self.cache_creation_input_tokens);
    }

    fn prompt(&self) -> Option<u64> {
        let apart = [self.cache_read_input_tokens, self.cache_creation_input_tokens];
        let apart: u64 = apart.iter().flatten().sum();
        self.prompt_tokens.or(self.input_tokens.map(|fresh| fresh.saturating_add(apart)))
    }

    fn cached(&self) -> Option<u64> {
        let details = self.prompt_tokens_details.or(self.input_tokens_details);
        details.and_then(|details| details.cached_tokens).or(self.cache_read_input_tokens)
    }

    fn completion(&self) -> Option<u64> {
        self.completion_tokens.or(self.output_tokens)
    }
}

/// llama.cpp's own figures, in its answers and in the last event of every stream.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Timings {
    /// Without what came from the cache.
    prompt_n: Option<u64>,
    cache_n: Option<u64>,
    predicted_n: Option<u64>,
    prompt_per_second: Option<f64>,
    predicted_per_second: Option<f64>,
}

impl Timings {
    fn prompt(&self) -> Option<u64> {
        self.prompt_n.map(|fresh| fresh.saturating_add(self.cache_n.unwrap_or(0)))
    }
}

/// `None`: the answer held neither.
pub fn figures(usage: Option<Usage>, timings: Option<Timings>) -> Option<Figures> {
    if usage.is_none() && timings.is_none() {
        return None;
    }
    let (usage, timings) = (usage.unwrap_or_default(), timings.unwrap_or_default());
    let speed = |speed: Option<f64>| speed.filter(|speed| speed.is_finite() && *speed > 0.0);
    Some(Figures {
        prompt: usage.prompt().or(timings.prompt()),
        cached: usage.cached().or(timings.cache_n),
        completion: usage.completion().or(timings.predicted_n),
        prompt_per_second: speed(timings.prompt_per_second),
        tokens_per_second: speed(timings.predicted_per_second),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Body {
        usage: Option<Usage>,
        timings: Option<Timings>,
    }

    fn of_json(body: &str) -> Option<Figures> {
        let body: Body = serde_json::from_str(body).unwrap();
        figures(body.usage, body.timings)
    }

    #[test]
    fn cached_tokens_are_a_part_of_the_prompt() {
        let cached = |prompt, cached, completion| {
            let (prompt, cached, completion) = (Some(prompt), Some(cached), Some(completion));
            Some(Figures { prompt, cached, completion, ..Figures::default() })
        };
        // OpenAI chat, OpenAI responses, Anthropic.
        for body in [
            r#"{"usage":{"prompt_tokens":10,"completion_tokens":4,"prompt_tokens_details":{"cached_tokens":7}}}"#,
            r#"{"usage":{"input_tokens":10,"output_tokens":4,"input_tokens_details":{"cached_tokens":7}}}"#,
            r#"{"usage":{"input_tokens":2,"cache_creation_input_tokens":1,"cache_read_input_tokens":7,"output_tokens":4}}"#,
        ] {
            assert_eq!(of_json(body), cached(10, 7, 4), "{body}");
        }
    }

    #[test]
    fn llama_cpp_tells_its_speed() {
        let timings = r#"{"cache_n":1,"prompt_n":2,"prompt_per_second":100.5,"predicted_n":4,"predicted_per_second":20.25}"#;
        let expected = Some(Figures {
            prompt: Some(3),
            cached: Some(1),
            completion: Some(4),
            prompt_per_second: Some(100.5),
            tokens_per_second: Some(20.25),
        });
        assert_eq!(of_json(&format!("{{\"timings\":{timings}}}")), expected);
        let both = format!(
            "{{\"usage\":{{\"prompt_tokens\":3,\"completion_tokens\":4}},\"timings\":{timings}}}"
        );
        assert_eq!(of_json(&both), expected);
    }
}
