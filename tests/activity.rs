//! What Wharf tells of requests, end to end: rows of activity, tokens, cancelling, captures.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test")]

mod support;

use std::time::{Duration, Instant};

use base64::Engine as _;
use hyper::Method;
use serde_json::{Value, json};
use support::{EXE, World, gpu, serve, standin};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use wharf::cli::demo::talk::Talk;

/// Speaks to the gateway's port as `call` does to the orchestrator's.
fn at_gateway(world: &World) -> Talk {
    let gateway = &world.server.talk.gateway;
    let port = gateway.rsplit(':').next().unwrap().parse().unwrap();
    Talk::new(port, port)
}

/// The gateway's answer as text.
async fn exchange(world: &World, method: &str, path: &str, body: &str) -> String {
    let address = world.server.talk.gateway.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let ask = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(ask.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer
}

fn styled(name: &str, engine: &str) -> String {
    format!(
        "  {name}:\n    engine: {engine}\n    vram: 2GiB\n    process:\n      cmd: >-\n        {EXE} engine \
         --host 127.0.0.1 --port ${{PORT}} --name {name} --vram 2GiB --style {engine}\n"
    )
}

/// Sum of one kind of tokens over all models.
async fn counted(world: &World, kind: &str) -> f64 {
    let text = exchange(world, "GET", "/metrics", "").await;
    let lines = text.lines().filter(|line| {
        line.starts_with("orchestrator_tokens_total{") && line.contains(&format!("\"{kind}\""))
    });
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

// contract: GET /api/metrics
#[tokio::test]
async fn rows_of_every_api_agree_with_the_metrics() {
    let models = styled("ada", "vllm") + &styled("bob", "llamacpp");
    let world = serve(&gpu("24GiB", "50ms"), &models, &[]).await;
    let gateway = at_gateway(&world);
    let prompt = json!([{"role": "user", "content": "one two three"}]);
    for (path, model, stream) in [
        ("/v1/chat/completions", "ada", false),
        ("/v1/chat/completions", "bob", false),
        ("/v1/messages", "ada", false),
    ] {
        let body = json!({"model": model, "messages": prompt, "max_tokens": 5, "stream": stream});
        let (status, answer) = gateway.call(Method::POST, path, body).await.unwrap();
        assert_eq!(status, 200, "{answer}\n{}", world.log());
    }
    assert!(world.server.talk.chat("ada", true, &[]).await.unwrap().is_from("ada"));
    assert!(world.server.talk.chat("bob", true, &[]).await.unwrap().is_from("bob"));
    let body = json!({"model": "ada", "messages": prompt, "max_tokens": 5, "stream": true});
    exchange(&world, "POST", "/v1/messages", &body.to_string()).await;
    let body = json!({"model": "ada", "input": ["a b", "c"]});
    gateway.call(Method::POST, "/v1/embeddings", body).await.unwrap();
    gateway.call(Method::POST, "/v1/chat/completions", json!({"model": "nobody"})).await.unwrap();

    let rows = world.server.talk.get("/api/metrics").await.unwrap();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 8, "{rows:#?}");
    let of = |row: &Value, field: &str| row["tokens"][field].as_f64().unwrap();
    let sum = |field: &str| rows.iter().map(|row| of(row, field)).sum::<f64>();
    assert_eq!(counted(&world, "prompt").await, sum("input_tokens"));
    assert_eq!(counted(&world, "completion").await, sum("output_tokens"));
    for (row, (prompt, completion)) in
        rows.iter().zip([(3, 5), (3, 5), (3, 5), (3, 16), (3, 16), (3, 5), (3, 0), (0, 0)])
    {
        let told = (of(row, "input_tokens"), of(row, "output_tokens"));
        assert_eq!(told, (f64::from(prompt), f64::from(completion)), "{row:#}");
    }
    assert!(of(&rows[1], "tokens_per_second") > 0.0, "llama.cpp says so itself: {:#}", rows[1]);
    assert_eq!(rows[7]["resp_status_code"], 404);
    world.stop().await;
}

#[tokio::test]
async fn the_context_length_is_what_the_engine_says() {
    let models = styled("ada", "vllm") + &styled("bob", "llamacpp");
    let world = serve(&gpu("24GiB", "50ms"), &models, &[]).await;
    let gateway = at_gateway(&world);
    for name in ["ada", "bob"] {
        let row = gateway.get(&format!("/v1/models/{name}")).await.unwrap();
        assert_eq!(row["meta"]["context_length"], Value::Null, "nobody has said it yet");
        assert!(world.server.talk.chat(name, false, &[]).await.unwrap().is_from(name));
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let row = gateway.get(&format!("/v1/models/{name}")).await.unwrap();
            if row["meta"]["context_length"] == 4096 {
                break;
            }
            assert!(Instant::now() < until, "{row:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    world.stop().await;
}

// contract: POST /api/inflight/{id}/cancel
#[tokio::test]
async fn a_request_is_cancelled_by_its_id_on_either_port() {
    let models = standin("ada", "2GiB", "--tokens-per-second 2");
    let world = serve(&gpu("24GiB", "50ms"), &models, &[]).await;
    let control = &world.server.talk;
    for talk in [Talk::clone(control), at_gateway(&world)] {
        let asked = Talk::clone(control);
        let body = json!({"model": "ada", "max_tokens": 1000});
        let request = tokio::spawn(async move {
            let gateway = asked.gateway.rsplit(':').next().unwrap().parse().unwrap();
            Talk::new(gateway, gateway).call(Method::POST, "/v1/chat/completions", body).await
        });
        let until = Instant::now() + Duration::from_secs(20);
        let id = loop {
            let list = talk.get("/api/inflight").await.unwrap();
            if list["requests"][0]["stage"] == "forwarded" {
                break list["requests"][0]["id"].clone();
            }
            assert!(Instant::now() < until, "{list:#}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let path = format!("/api/inflight/{id}/cancel");
        let (status, told) = talk.call(Method::POST, &path, Value::Null).await.unwrap();
        assert_eq!((status, &told["status"]), (200, &json!("cancelled")));
        let (status, answer) = request.await.unwrap().unwrap();
        assert_eq!((status, &answer["error"]["code"]), (499, &json!("cancelled")), "{answer}");
        world.until("the lease has ended", |status| status["in_flight"] == 0).await;
    }
    world.stop().await;
}

// contract: GET /api/captures/{id}
#[tokio::test]
async fn captures_and_filters_come_from_the_file_and_go_with_it() {
    let settings = format!("captures: {{ enabled: true }}\n{}", gpu("24GiB", "50ms"));
    let models = standin("ada", "2GiB", "")
        + "    filters: { strip: [max_tokens], set: { max_completion_tokens: 2 } }\n";
    let world = serve(&settings, &models, &[]).await;
    let talk = &world.server.talk;
    let answer = talk.chat("ada", false, &[]).await.unwrap();
    assert_eq!(answer.text.trim(), "ada-1 ada-2", "two tokens, whatever the client sent");
    let capture = talk.get("/api/captures/1").await.unwrap();
    let body = capture["req_body"].as_str().unwrap();
    let body = base64::engine::general_purpose::STANDARD.decode(body).unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(body["max_tokens"], 16, "kept as the client sent it");
    let (status, _) =
        at_gateway(&world).call(Method::GET, "/api/captures/1", Value::Null).await.unwrap();
    assert_eq!(status, 200, "on the gateway's port too");

    let file = world.dir.path().join("models.yaml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("enabled: true", "enabled: false")).unwrap();
    let pid = i32::try_from(world.server.pid()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGHUP)
        .unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while talk.call(Method::GET, "/api/captures/1", Value::Null).await.unwrap().0 != 404 {
        assert!(Instant::now() < until, "{}", world.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    world.stop().await;
}
