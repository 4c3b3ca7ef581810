use hyper::Method;
use serde_json::{Value, json};

use super::support::{EXE, World, gpu, serve, standin};
use super::until;

fn settings() -> String {
    let engine = format!(
        "{{ engine: openai, vram: 4GiB, process: {{ cmd: \"{EXE} engine --host 127.0.0.1 --port \
         ${{PORT}} --name ${{model}} --vram 4GiB --load 50ms --tokens-per-second 5\" }} }}"
    );
    let private = engine.replace("engine --host", "engine --ctx 4096 --host");
    gpu("24GiB", "50ms")
        + &format!(
            "\nregistration: {{ templates: [chat] }}\ntemplates:\n  chat: {engine}\n  private: {private}\n"
        )
}

async fn world() -> World {
    serve(&settings(), &standin("ada", "4GiB", "--load 50ms"), &[]).await
}

async fn delete(world: &World, path: &str) -> (u16, Value) {
    world.server.talk.call(Method::DELETE, path, Value::Null).await.unwrap()
}

async fn listed(world: &World) -> Vec<String> {
    let models = world.server.talk.get("/models").await.unwrap();
    let rows = models["models"].as_array().unwrap().iter();
    rows.map(|row| row["model_id"].as_str().unwrap().to_owned()).collect()
}

// contract: POST /models/register
// contract: DELETE /models/{id}
#[tokio::test]
async fn a_registered_model_serves_outlives_a_kill_and_can_be_removed() {
    let mut world = world().await;
    let body = json!({
        "model_id": "qwen2.5-coder:7b",
        "display_name": "Qwen 2.5 Coder 7B",
        "model_type": "code",
        "warmup": false,
        "ttl_minutes": 15,
        "priority": "high",
        "tags": ["code", "python", "fast"],
    });
    let (status, answer) = world.post("/models/register", body.clone()).await;
    assert_eq!((status, &answer["status"]), (201, &json!("success")), "{answer:#}");
    assert_eq!(answer["model_id"], "qwen2.5-coder:7b");
    assert_eq!(answer["registered"], true);
    let name = "qwen2.5-coder:7b";
    assert!(world.server.talk.chat(name, false, &[]).await.unwrap().is_from(name));
    let (status, _) = world.patch(json!({ "models": { name: { "ttl": "7m" } } })).await;
    assert_eq!(status, 200);
    let check = async |world: &World| {
        assert_eq!(listed(world).await, ["ada", name], "each once: {}", world.log());
        let row = world.server.talk.get(&format!("/models/{name}")).await.unwrap();
        let shown = (&row["display_name"], &row["model_type"], &row["priority"], &row["tags"]);
        let wanted = json!(["Qwen 2.5 Coder 7B", "code", "high", ["code", "python", "fast"]]);
        assert_eq!(json!([shown.0, shown.1, shown.2, shown.3]), wanted);
        assert_eq!(row["ttl_seconds"], 420.0, "the patch outranks it");
    };
    check(&world).await;
    world.server.kill_and_restart().await.unwrap();
    check(&world).await;
    // The same again replaces it; it is not there twice.
    let (status, _) = world.post("/models/register", body).await;
    assert_eq!(status, 200);
    check(&world).await;
    assert!(world.server.talk.chat(name, false, &[]).await.unwrap().is_from(name));
    let talk = world.server.talk.clone();
    let stream = tokio::spawn(async move { talk.chat(name, true, &[]).await });
    world.until("the stream runs", |status| status["in_flight"] == 1).await;
    let (status, answer) = delete(&world, &format!("/models/{name}")).await;
    assert_eq!((status, &answer["status"]), (200, &json!("success")), "{answer:#}");
    assert!(stream.await.unwrap().unwrap().is_from(name), "drained: {}", world.log());
    assert_eq!(listed(&world).await, ["ada"]);
    world.until("its engine is gone", |_| world.engine_pids().is_empty()).await;
    assert_eq!(delete(&world, &format!("/models/{name}")).await.0, 404);
    world.server.kill_and_restart().await.unwrap();
    assert_eq!(listed(&world).await, ["ada"]);
    assert_eq!(world.config().await["patches"], json!({}), "its patches went with it");
    world.stop().await;
}

#[tokio::test]
async fn a_registration_that_does_not_fit_the_file_any_more_is_left_out_and_told() {
    let mut world = world().await;
    for name in ["new/one", "bob"] {
        let (status, answer) =
            world.post("/models/register", json!({ "model_id": name, "template": "chat" })).await;
        assert_eq!(status, 201, "{answer:#}");
    }
    let yaml = world.yaml();
    world.write(&(yaml.clone() + &standin("bob", "4GiB", "--load 50ms")));
    let (status, answer) = world.post("/config/reload", Value::Null).await;
    assert_eq!(status, 200, "{answer:#}");
    assert_eq!(answer["left_out"][0]["what"], "registered model bob", "{answer:#}");
    assert_eq!(listed(&world).await, ["ada", "bob", "new/one"], "each once");
    assert_eq!(world.server.talk.get("/models/bob").await.unwrap()["registered"], false);
    world.write(&yaml.replace("templates: [chat]", "templates: [private]"));
    world.server.kill_and_restart().await.unwrap();
    assert_eq!(listed(&world).await, ["ada"], "{}", world.log());
    assert_eq!(world.config().await["left_out"].as_array().map(Vec::len), Some(2));
    assert!(world.log().contains("registered model new/one is left out"), "{}", world.log());
    let (status, _) = delete(&world, "/models/bob").await;
    assert_eq!(status, 200, "what is left out can be removed");
    world.write(&yaml);
    world.post("/config/reload", Value::Null).await;
    assert_eq!(listed(&world).await, ["ada", "new/one"]);
    world.stop().await;
}

// contract: RULE a registration brings nothing that could be run
#[tokio::test]
async fn nothing_that_could_be_run_can_be_registered() {
    let world = world().await;
    let base = json!({ "model_id": "new", "template": "chat" });
    let with = |key: &str, value: Value| {
        let mut body = base.clone();
        body[key] = value;
        body
    };
    for (body, status, said) in [
        (with("cmd", json!("evil")), 400, "\"cmd\""),
        (with("command", json!(["evil"])), 400, "\"command\""),
        (with("image", json!("evil:latest")), 400, "\"image\""),
        (with("docker", json!({ "image": "evil" })), 400, "\"docker\""),
        (with("process", json!({ "cmd": "evil" })), 400, "\"process\""),
        (with("volumes", json!(["/:/host"])), 400, "\"volumes\""),
        (with("env", json!({ "LD_PRELOAD": "x" })), 400, "\"env\""),
        (with("external", json!({ "url": "http://evil" })), 400, "\"external\""),
        (with("upstream_name", json!("x")), 400, "\"upstream_name\""),
        (with("template", json!("private")), 400, "allowed are `chat`"),
        (with("display_name", json!("${env.HOME}")), 400, "macros"),
        (with("tags", json!(["${env.HOME}"])), 400, "macros"),
        (with("model_id", json!("--load=1h")), 400, "option"),
        (with("model_id", json!("a b; rm -rf /")), 400, "contains"),
        (with("model_id", json!("")), 400, "model_id"),
        (with("model_id", json!(7)), 400, "model_id"),
        (with("ttl_minutes", json!("15")), 400, "ttl_minutes"),
        (with("ttl_minutes", json!(-1)), 400, "time to live"),
        (with("priority", json!("urgent")), 400, "priority"),
        (with("model_id", json!("ada")), 409, "models.yaml"),
        (json!({}), 400, "model_id"),
    ] {
        let (answered, answer) = world.post("/models/register", body.clone()).await;
        assert_eq!(answered, status, "{body}: {answer:#}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(said), "{body}: {message}");
    }
    assert_eq!(listed(&world).await, ["ada"]);
    assert_eq!(delete(&world, "/models/ada").await.0, 409, "it comes from the file");
    assert_eq!(delete(&world, "/models/nobody").await.0, 404);
    world.stop().await;
}

#[tokio::test]
async fn what_was_registered_and_patched_comes_back_with_a_store_that_was_away_at_the_start() {
    let mut world = world().await;
    let (status, answer) =
        world.post("/models/register", json!({ "model_id": "bob", "template": "chat" })).await;
    assert_eq!(status, 201, "{answer:#}");
    let (status, _) = world.patch(json!({ "swap": { "max_wait": "41s" } })).await;
    assert_eq!(status, 200);
    let (store, aside) = (world.dir.path().join("wharf.db"), world.dir.path().join("aside.db"));
    std::fs::rename(&store, &aside).unwrap();
    std::fs::write(&store, "no database").unwrap();
    world.server.kill_and_restart().await.unwrap();
    assert_eq!(listed(&world).await, ["ada"], "{}", world.log());
    std::fs::rename(&aside, &store).unwrap();
    until("bob is back", async || (listed(&world).await == ["ada", "bob"]).then_some(())).await;
    let (status, answer) = world.patch(json!({ "swap": { "min_residency": "7s" } })).await;
    assert_eq!(status, 200, "{answer:#}");
    let patches = json!({ "swap.max_wait": "41s", "swap.min_residency": "7s" });
    assert_eq!(world.config().await["patches"], patches, "{}", world.log());
    world.stop().await;
}
