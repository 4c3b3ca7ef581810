//! Every path on which a body names its model.

use crate::support::World;

const JSON: [(&str, &str); 17] = [
    ("/v1/chat/completions", "/v1/chat/completions"),
    ("/chat/completions", "/v1/chat/completions"),
    ("/v1/completions", "/v1/completions"),
    ("/completions", "/v1/completions"),
    ("/v1/embeddings", "/v1/embeddings"),
    ("/v1/responses", "/v1/responses"),
    ("/v1/messages", "/v1/messages"),
    ("/v1/messages/count_tokens", "/v1/messages/count_tokens"),
    ("/v1/rerank", "/v1/rerank"),
    ("/rerank", "/rerank"),
    ("/v1/score", "/v1/score"),
    ("/v1/audio/speech", "/v1/audio/speech"),
    ("/v1/images/generations", "/v1/images/generations"),
    ("/tokenize", "/tokenize"),
    ("/detokenize", "/detokenize"),
    ("/infill", "/infill"),
    ("/completion", "/completion"),
];

// contract: POST /v1/chat/completions
// contract: POST /chat/completions
// contract: POST /v1/completions
// contract: POST /completions
// contract: POST /v1/embeddings
// contract: POST /v1/responses
// contract: POST /v1/messages
// contract: POST /v1/messages/count_tokens
// contract: POST /v1/rerank
// contract: POST /rerank
// contract: POST /v1/score
// contract: POST /v1/audio/speech
// contract: POST /v1/images/generations
// contract: POST /tokenize
// contract: POST /detokenize
// contract: POST /infill
// contract: POST /completion
#[tokio::test]
async fn every_json_path_reaches_the_engine_of_the_model_in_the_body() {
    let mut world = World::new().await;
    world.ready();
    for (path, upstream) in JSON {
        let reply = world.spawn(world.post(path, r#"{"model":"mistral"}"#));
        let exchange = world.engine.request().await;
        assert!(
            exchange.head.starts_with(&format!("post {upstream} ")),
            "{path}: {}",
            exchange.head
        );
        exchange.answer_json(r#"{"of":"the engine"}"#).await;
        let reply = reply.await.unwrap();
        assert_eq!(reply.headers()["x-wharf-model"], "mistral", "{path}");
        assert_eq!(
            (reply.status().as_u16(), reply.text().await.as_str()),
            (200, r#"{"of":"the engine"}"#),
            "{path}"
        );
    }
}

// contract: POST /v1/audio/transcriptions
// contract: POST /v1/audio/translations
// contract: POST /v1/images/edits
#[tokio::test]
async fn every_form_path_reaches_the_engine_of_the_model_in_the_form() {
    let mut world = World::new().await;
    world.ready();
    let form = "--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nbytes\r\n\
                --x\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nmistral\r\n--x--\r\n";
    for path in ["/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits"] {
        let mut request = world.post(path, form);
        let kind = "multipart/form-data; boundary=x".parse().unwrap();
        request.headers_mut().insert("content-type", kind);
        let reply = world.spawn(request);
        let exchange = world.engine.request().await;
        assert!(exchange.head.starts_with(&format!("post {path} ")), "{path}: {}", exchange.head);
        assert_eq!(exchange.body, form.as_bytes(), "{path}");
        exchange.answer_json("{}").await;
        assert_eq!(reply.await.unwrap().status(), 200, "{path}");
    }
}
