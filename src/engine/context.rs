//! How long a prompt may be: the engine's own word, asked once when it is ready.

use std::time::Duration;

use http::StatusCode;
use serde_json::Value;

use super::request;
use crate::config::catalog::{EngineKind, ModelSpec};
use crate::runtime::Endpoint;

const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// In tokens; `None`: this engine does not tell.
pub async fn context_length(spec: &ModelSpec, endpoint: &Endpoint) -> Option<u64> {
    let path = match spec.engine {
        EngineKind::Vllm => "/v1/models",
        EngineKind::Llamacpp => "/props",
        EngineKind::Ollama | EngineKind::Openai | EngineKind::Http => return None,
    };
    let answer = request::get(endpoint, path, ANSWER_LIMIT).await.ok()?;
    if answer.status != StatusCode::OK {
        return None;
    }
    read(spec, &answer.json())
}

fn read(spec: &ModelSpec, told: &Value) -> Option<u64> {
    let length = match spec.engine {
        EngineKind::Vllm => {
            let mut models = told["data"].as_array()?.iter();
            &models.find(|model| model["id"] == spec.served_name())?["max_model_len"]
        }
        // Of one slot: what one request can have.
        _ => &told["default_generation_settings"]["n_ctx"],
    };
    length.as_u64().filter(|length| *length > 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_engine_says_it_in_its_own_way() {
        let mut spec = ModelSpec { engine: EngineKind::Vllm, ..ModelSpec::plain("ada") };
        let list = json!({"data": [
            {"id": "other", "max_model_len": 1}, {"id": "ada", "max_model_len": 8192},
        ]});
        assert_eq!(read(&spec, &list), Some(8192));
        assert_eq!(read(&spec, &json!({"data": [{"id": "ada"}]})), None);
        spec.engine = EngineKind::Llamacpp;
        let props = json!({"default_generation_settings": {"n_ctx": 4096}, "total_slots": 4});
        assert_eq!(read(&spec, &props), Some(4096));
        assert_eq!(read(&spec, &json!({})), None);
    }
}
