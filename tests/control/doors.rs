use hyper::Method;
use serde_json::{Value, json};

use super::support::{gpu, serve, standin};
use super::{call, free_ports, until};

const CHAT: &str = r#"{"messages":[{"role":"user","content":"who are you?"}],"max_tokens":8"#;

fn models() -> String {
    standin("ada", "4GiB", "--load 50ms")
        + &standin("bob", "4GiB", "--load 50ms")
        + &standin("cyd", "4GiB", "--load 50ms").replace("    vram", "    warmup: true\n    vram")
}

fn text(answer: &Value) -> &str {
    let choice = &answer["choices"][0];
    choice["message"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default().trim()
}

// contract: ports 8051–8099: `POST /v1/chat/completions`, `/v1/completions`, `GET /health`
#[tokio::test]
async fn each_model_has_a_port_of_its_own() {
    let first = free_ports(6);
    let settings = gpu("24GiB", "50ms") + &format!("\nports: {first}-{}\n", first + 5);
    let world = serve(&settings, &models(), &[]).await;
    // Warm-up models first, then by name.
    let port = |n: u16| first + n;
    let doors = world.config().await["front_doors"].clone();
    assert_eq!(doors, json!({ "ada": port(1), "bob": port(2), "cyd": port(0) }), "{}", world.log());
    let row = world.server.talk.get("/models/bob").await.unwrap();
    assert_eq!(row["port"], port(2));
    assert_eq!(row["endpoint"], format!("http://127.0.0.1:{}", port(2)));
    assert_eq!(world.server.talk.get("/health").await.unwrap()["available_ports"], 3);

    let url = |n: u16, path: &str| format!("http://127.0.0.1:{}{path}", port(n));
    let (status, health) = call(Method::GET, &url(2, "/health"), "").await.unwrap();
    assert_eq!((status, &health["model"], &health["port"]), (200, &json!("bob"), &json!(port(2))));
    assert_eq!((&health["status"], &health["requests_served"]), (&json!("stopped"), &json!(0)));
    // Whatever the body says, and if it says nothing: bob.
    for model in ["", r#","model":"bob""#, r#","model":"ada""#, r#","model":null"#, r#","model":7"#]
    {
        let body = format!("{CHAT}{model}}}");
        let (status, answer) =
            call(Method::POST, &url(2, "/v1/chat/completions"), &body).await.unwrap();
        assert_eq!(status, 200, "{model}: {answer:#}");
        assert!(text(&answer).starts_with("bob-1"), "{model}: {answer:#}");
    }
    let (status, answer) =
        call(Method::POST, &url(2, "/v1/completions"), r#"{"prompt":"x"}"#).await.unwrap();
    assert!(status == 200 && text(&answer).starts_with("bob-1"), "{status} {answer:#}");
    let (_, health) = call(Method::GET, &url(2, "/health"), "").await.unwrap();
    assert_eq!((&health["status"], &health["requests_served"]), (&json!("ready"), &json!(6)));
    let (status, answer) = call(Method::GET, &url(2, "/v1/models"), "").await.unwrap();
    assert_eq!(status, 404, "{answer}");

    // Whoever has a port keeps it; the next free one goes to who comes.
    let yaml = world.yaml();
    world.write(&(yaml.replace("  ada:\n", "  zoe:\n") + &standin("abe", "4GiB", "--load 50ms")));
    let (status, answer) = world.post("/config/reload", Value::Null).await;
    assert_eq!(status, 200, "{answer:#}");
    let doors = world.config().await["front_doors"].clone();
    assert_eq!(doors, json!({ "abe": port(3), "bob": port(2), "cyd": port(0), "zoe": port(4) }));
    until("ada's door closes", async || {
        tokio::net::TcpStream::connect(("127.0.0.1", port(1))).await.is_err().then_some(())
    })
    .await;
    world.write(&yaml.replace(&format!("ports: {first}-{}", first + 5), ""));
    world.post("/config/reload", Value::Null).await;
    assert_eq!(world.config().await["front_doors"], json!({}));
    world.stop().await;
}

#[tokio::test]
async fn a_taken_port_is_skipped_and_its_occupant_named_and_keys_count_at_doors() {
    let first = free_ports(4);
    let taken = std::net::TcpListener::bind(("127.0.0.1", first)).unwrap();
    let settings = gpu("24GiB", "50ms") + &format!("\nports: {first}-{}\n", first + 3);
    let world = serve(&settings, &models(), &[]).await;
    let doors = world.config().await["front_doors"].clone();
    assert_eq!(doors["cyd"], first + 1, "{doors}");
    let log = world.log();
    assert!(log.contains(&format!("{first} is skipped: it is taken by")), "{log}");
    let keyed = "auth: { keys: [{ name: a, key: first-first-first-first, models: [bob], scopes: [inference] }] }\n";
    world.write(&(keyed.to_owned() + &world.yaml()));
    world.post("/config/reload", Value::Null).await;
    let url = format!("http://127.0.0.1:{}/v1/chat/completions", first + 1);
    let (status, answer) = call(Method::POST, &url, &format!("{CHAT}}}")).await.unwrap();
    assert_eq!(status, 401, "{answer:#}");
    drop(taken);
    world.stop().await;
}
