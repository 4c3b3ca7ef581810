use std::sync::{Arc, Mutex};

use axum::Json;
use axum::extract::{OriginalUri, State};
use http::HeaderMap;
use serde_json::{Value, json};

use super::support::{gpu, serve, standin};
use super::{free_port, until};

type Heard = Arc<Mutex<Vec<(String, Value)>>>;

/// A registry that writes down what it is told.
async fn registry(port: u16) -> (Heard, tokio::task::JoinHandle<()>) {
    let heard = Heard::default();
    let hear = async |State(heard): State<Heard>,
                      uri: OriginalUri,
                      headers: HeaderMap,
                      body: Json<Value>| {
        assert_eq!(headers["authorization"], "Bearer registry-key");
        heard.lock().unwrap().push((uri.path().to_owned(), body.0));
        Json(json!({ "ok": true }))
    };
    let router = axum::Router::new().fallback(hear).with_state(Arc::clone(&heard));
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (heard, task)
}

async fn told(heard: &Heard, path: &str, model: &str) -> Value {
    until(&format!("{path} of {model}"), async || {
        let heard = heard.lock().unwrap();
        let found = heard.iter().find(|(to, body)| to == path && body["model_id"] == model);
        found.map(|(_, body)| body.clone())
    })
    .await
}

// contract: service discovery
#[tokio::test]
async fn registries_are_told_who_is_ready_and_who_is_gone_even_if_they_come_up_late() {
    let (late, dead) = (free_port(), free_port());
    let settings = gpu("24GiB", "50ms")
        + &format!(
            "\nannounce:\n  - {{ url: 'http://127.0.0.1:{late}/api/', key: registry-key }}\n  \
             - {{ url: 'http://127.0.0.1:{dead}' }}\n"
        );
    let models = standin("ada", "14GiB", "--load 50ms")
        .replace("    vram", "    tags: [fast]\n    vram")
        + &standin("bob", "14GiB", "--load 50ms");
    let world = serve(&settings, &models, &[]).await;
    // Nobody is there yet, and nothing waits for that.
    assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    until("it is told in the log", async || {
        world.log().contains(&format!("announce http://127.0.0.1:{late}/api")).then_some(())
    })
    .await;
    let (heard, _registry) = registry(late).await;
    let ada = told(&heard, "/api/register", "ada").await;
    let gateway = &world.server.talk.gateway;
    assert_eq!(ada["endpoint"], json!(gateway), "{ada:#}");
    assert_eq!(ada["health"], format!("{gateway}/health"));
    assert_eq!((&ada["name"], &ada["service"]), (&json!("wharf/ada"), &json!("wharf")));
    assert_eq!((&ada["model_type"], &ada["tags"]), (&json!("llm"), &json!(["fast"])));
    assert!(world.server.talk.chat("bob", false, &[]).await.unwrap().is_from("bob"));
    told(&heard, "/api/deregister", "ada").await;
    told(&heard, "/api/register", "bob").await;
    world.stop().await;
    let heard = heard.lock().unwrap();
    let last = heard.last().unwrap();
    assert_eq!(
        (last.0.as_str(), &last.1["model_id"]),
        ("/api/deregister", &json!("bob")),
        "{heard:#?}"
    );
    let registered = heard.iter().filter(|(path, _)| path == "/api/register").count();
    assert_eq!(registered, 2, "each once: {heard:#?}");
}
