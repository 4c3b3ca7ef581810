//! Which of an engine's own paths clients may reach by pass-through: an allow-list per engine, as
//! every release of an engine brings paths that nobody here has looked at.
//!
//! Sources: vLLM `vllm/entrypoints/**/api_router.py` (0.31), llama.cpp `tools/server/server.cpp`,
//! Ollama `docs/api.md`, the `--api` routes of the Stable Diffusion web UI.

use http::Method;

use crate::config::catalog::EngineKind;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Allowed,
    /// For whoever has a key of scope `admin`.
    Development,
    /// Wharf starts, stops and moves models; what to do instead.
    Lifecycle(&'static str),
    Unlisted,
}

/// Methods (`HEAD` goes as `GET`) and a path; one `*` stands for any run of characters.
type Rule = (&'static str, &'static str);

const VLLM: &[Rule] = &[
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/chat/completions/render"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/completions/render"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/responses"),
    ("GET POST", "/v1/responses/*"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/v1/rerank"),
    ("POST", "/v2/rerank"),
    ("POST", "/rerank"),
    ("POST", "/v1/score"),
    ("POST", "/score"),
    ("POST", "/pooling"),
    ("POST", "/classify"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/audio/transcriptions"),
    ("POST", "/v1/audio/translations"),
    ("POST", "/v1/audio/speech"),
    ("GET POST", "/v1/audio/voices"),
    ("POST", "/v1/images/*"),
    ("GET", "/v1/realtime"),
    ("POST", "/inference/v1/generate"),
    ("POST", "/invocations"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/*"),
    ("GET", "/health"),
    ("GET POST", "/ping"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/load"),
    ("GET", "/tokenizer_info"),
];

const LLAMACPP: &[Rule] = &[
    ("POST", "/completion"),
    ("POST", "/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/chat/completions"),
    ("POST", "/chat/completions/input_tokens"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/chat/completions/input_tokens"),
    ("POST", "/v1/chat/completions/control"),
    ("POST", "/responses"),
    ("POST", "/responses/input_tokens"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/responses/input_tokens"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/infill"),
    ("POST", "/embedding"),
    ("POST", "/embeddings"),
    ("POST", "/v1/embeddings"),
    ("POST", "/rerank"),
    ("POST", "/reranking"),
    ("POST", "/v1/rerank"),
    ("POST", "/v1/reranking"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/apply-template"),
    ("POST", "/audio/transcriptions"),
    ("POST", "/v1/audio/transcriptions"),
    ("GET DELETE", "/v1/stream/*"),
    ("GET", "/health"),
    ("GET", "/v1/health"),
    ("GET", "/metrics"),
    ("GET", "/models"),
    ("GET", "/v1/models"),
    ("GET", "/props"),
    ("GET", "/slots"),
    ("GET", "/lora-adapters"),
    // Its web page and what that loads.
    ("GET", "/"),
    ("GET", "*.html"),
    ("GET", "*.js"),
    ("GET", "*.css"),
    ("GET", "*.svg"),
    ("GET", "*.png"),
    ("GET", "*.ico"),
    ("GET", "*.woff2"),
    ("GET", "*.webmanifest"),
    ("GET", "/_app/version.json"),
];

const OPENAI: &[Rule] = &[
    ("GET POST", "/v1/*"),
    ("DELETE", "/v1/responses/*"),
    ("POST", "/rerank"),
    ("POST", "/score"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/completion"),
    ("POST", "/infill"),
    ("GET POST", "/sdapi/v1/*"),
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/"),
];

const OLLAMA: &[Rule] = &[
    ("GET POST", "/v1/*"),
    ("GET", "/api/tags"),
    ("GET", "/api/ps"),
    ("GET", "/api/version"),
    ("POST", "/api/show"),
    ("POST", "/api/chat"),
    ("POST", "/api/generate"),
    ("POST", "/api/embed"),
    ("POST", "/api/embeddings"),
    ("GET", "/"),
];

/// Of every engine for language models, whatever the lists above say: what Wharf owns.
const LIFECYCLE: &[(&str, &str)] = &[
    ("/sleep", "POST /models/{name}/sleep"),
    ("/wake_up", "POST /models/{name}/wake"),
    ("/pause", "POST /models/{name}/sleep"),
    ("/resume", "POST /models/{name}/wake"),
    ("/scale_elastic_ep", "the model's arguments in models.yaml"),
    ("/update_config", "the model's arguments in models.yaml"),
    ("/*update_weights*", "the model's arguments in models.yaml"),
    ("/*weight_update", "the model's arguments in models.yaml"),
    ("/update_weight_version", "the model's arguments in models.yaml"),
    ("/init_weight_transfer_engine", "the model's arguments in models.yaml"),
    ("/v1/load_lora_adapter", "`adapter_of` in models.yaml"),
    ("/v1/unload_lora_adapter", "`adapter_of` in models.yaml"),
    ("/models/load", "POST /models/{name}/load"),
    ("/models/unload", "POST /models/{name}/unload"),
    ("/api/pull", "`wharf pull`"),
    ("/api/push", "Ollama's own port"),
    ("/api/create", "Ollama's own port"),
    ("/api/copy", "Ollama's own port"),
    ("/api/delete", "Ollama's own port"),
    ("/api/blobs/*", "Ollama's own port"),
    ("/sdapi/v1/server-*", "POST /models/{name}/unload"),
    ("/sdapi/v1/unload-checkpoint", "POST /models/{name}/unload"),
    ("/sdapi/v1/reload-checkpoint", "POST /models/{name}/load"),
];

/// Of the same engines: for development, or for one who may change what everybody gets.
const DEVELOPMENT: &[Rule] = &[
    ("GET", "/is_sleeping"),
    ("GET", "/is_paused"),
    ("POST", "/collective_rpc"),
    ("POST", "/reset_*_cache"),
    ("POST", "/start_profile"),
    ("POST", "/stop_profile"),
    ("GET", "/server_info"),
    ("POST", "/abort_requests"),
    ("POST", "/is_scaling_elastic_ep"),
    ("POST", "/weight_checker"),
    ("GET", "/weight_info"),
    ("GET", "/get_world_size"),
    ("POST", "/props"),
    ("POST", "/slots/*"),
    ("POST", "/lora-adapters"),
    ("GET POST", "/tools"),
    ("GET POST", "/cors-proxy"),
    ("GET POST PUT PATCH DELETE", "/v1/organization*"),
    ("POST", "/sdapi/v1/options"),
    ("POST", "/sdapi/v1/refresh-*"),
    ("POST", "/sdapi/v1/create/*"),
    ("POST", "/sdapi/v1/train/*"),
];

/// What may be done with a normalised path. Of a server that is no LLM's, everything: whoever
/// configured `engine: http` put that server there to be used.
pub fn judge(engine: EngineKind, method: &Method, path: &str) -> Verdict {
    let listed = match engine {
        EngineKind::Http => return Verdict::Allowed,
        EngineKind::Vllm => VLLM,
        EngineKind::Llamacpp => LLAMACPP,
        EngineKind::Openai => OPENAI,
        EngineKind::Ollama => OLLAMA,
    };
    // Some servers take `/Sleep` and `/sleep/` for `/sleep`: the wildcards may let neither by.
    let folded = path.to_ascii_lowercase();
    let folded = folded.trim_end_matches(['/', '.', ' ']);
    if let Some((_, instead)) = LIFECYCLE.iter().find(|(rule, _)| covers(rule, folded)) {
        return Verdict::Lifecycle(instead);
    }
    let holds = |rules: &[Rule], path: &str| {
        rules.iter().any(|(methods, rule)| takes(methods, method) && covers(rule, path))
    };
    if holds(DEVELOPMENT, folded) {
        return Verdict::Development;
    }
    if holds(listed, path) { Verdict::Allowed } else { Verdict::Unlisted }
}

fn takes(methods: &str, method: &Method) -> bool {
    let method = if method == Method::HEAD { "GET" } else { method.as_str() };
    methods.split(' ').any(|known| known == method)
}

fn covers(rule: &str, path: &str) -> bool {
    match rule.split_once('*') {
        None => rule == path,
        Some((start, rest)) => {
            let middle = rest.trim_end_matches('*');
            let inner = path.strip_prefix(start);
            match rest.len() == middle.len() {
                true => inner.is_some_and(|inner| inner.ends_with(middle)),
                false => inner.is_some_and(|inner| inner.contains(middle)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(engine: EngineKind, line: &str) -> Verdict {
        let (method, path) = line.split_once(' ').unwrap();
        judge(engine, &method.parse().unwrap(), path)
    }

    #[test]
    fn inference_and_reading_are_allowed() {
        for (engine, line) in [
            (EngineKind::Vllm, "POST /v1/chat/completions"),
            (EngineKind::Vllm, "HEAD /health"),
            (EngineKind::Vllm, "GET /v1/models/org"),
            (EngineKind::Llamacpp, "GET /"),
            (EngineKind::Llamacpp, "GET /_app/immutable/bundle.js"),
            (EngineKind::Llamacpp, "GET /slots"),
            (EngineKind::Llamacpp, "POST /apply-template"),
            (EngineKind::Openai, "POST /v1/anything/new"),
            (EngineKind::Openai, "POST /sdapi/v1/txt2img"),
            (EngineKind::Ollama, "POST /api/chat"),
            (EngineKind::Http, "PATCH /sleep"),
        ] {
            assert_eq!(verdict(engine, line), Verdict::Allowed, "{engine:?} {line}");
        }
    }

    #[test]
    fn what_wharf_owns_and_what_nobody_looked_at_is_not() {
        for (engine, line) in [
            (EngineKind::Vllm, "POST /v1/files"),
            (EngineKind::Vllm, "DELETE /v1/models/a"),
            (EngineKind::Vllm, "GET /docs"),
            (EngineKind::Vllm, "GET /"),
            (EngineKind::Llamacpp, "GET /etc/passwd"),
            (EngineKind::Llamacpp, "DELETE /slots/0"),
            (EngineKind::Openai, "PUT /v1/files"),
            (EngineKind::Openai, "GET /v1"),
            (EngineKind::Ollama, "GET /api/generate"),
        ] {
            assert_eq!(verdict(engine, line), Verdict::Unlisted, "{engine:?} {line}");
        }
        for engine in
            [EngineKind::Vllm, EngineKind::Llamacpp, EngineKind::Openai, EngineKind::Ollama]
        {
            for line in [
                "POST /sleep",
                "GET /Sleep/",
                "POST /wake_up",
                "POST /v1/load_lora_adapter",
                "POST /v1/Unload_LoRA_adapter/",
                "POST /start_weight_update",
                "DELETE /api/delete",
                "POST /api/blobs/sha256:1",
                "POST /models/load",
            ] {
                let found = verdict(engine, line);
                assert!(matches!(found, Verdict::Lifecycle(_)), "{engine:?} {line}: {found:?}");
            }
            for line in ["POST /collective_rpc", "POST /reset_prefix_cache", "POST /props"] {
                assert_eq!(verdict(engine, line), Verdict::Development, "{engine:?} {line}");
            }
        }
    }

    #[test]
    fn one_star_and_two() {
        assert!(covers("/a/*", "/a/") && covers("/a/*", "/a/b/c") && !covers("/a/*", "/a"));
        assert!(covers("*.js", "/x/y.js") && !covers("*.js", "/x/y.json"));
        assert!(covers("/*x*", "/axb") && covers("/*x*", "/x") && !covers("/*x*", "/ab"));
        assert!(!covers("/a", "/a/") && !covers("/reset_*_cache", "/reset_cache"));
    }
}
