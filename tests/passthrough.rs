//! The pass-through with real processes: engines by their own paths, and a server that is no LLM's
//! between models that are.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test")]

mod support;

use std::time::Duration;

use serde_json::Value;
use support::{World, gpu, serve, standin};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(60);

/// After ComfyUI; as large as `ada`, so that one of them fits.
fn painter(more: &str) -> String {
    let exe = support::EXE;
    format!(
        "  painter:\n    engine: http\n    vram: 14GiB\n    aliases: [comfyui]\n{more}    http:\n      \
         activity: [\"POST /prompt\"]\n      queue: /queue\n      release: POST /free\n      \
         release_body: {{ unload_models: true, free_memory: true }}\n    process:\n      cmd: >-\n        \
         {exe} engine --style comfyui --host 127.0.0.1 --port ${{PORT}} --name painter --vram 14GiB \
         --load 200ms\n"
    )
}

fn settings(swap: &str) -> String {
    gpu("24GiB", "50ms") + "\nswap: { min_residency: 100ms, max_wait: 500ms" + swap + " }"
}

struct Reply {
    status: u16,
    head: String,
    body: String,
}

async fn open(world: &World, head: &str, body: &str) -> TcpStream {
    let address = world.server.talk.gateway.trim_start_matches("http://").to_owned();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let request = format!("{head}\r\nhost: localhost\r\ncontent-length: {length}\r\n");
    stream.write_all(format!("{request}\r\n{body}").as_bytes()).await.unwrap();
    stream
}

async fn ask(world: &World, line: &str, body: &str) -> Reply {
    let mut stream = open(world, &format!("{line} HTTP/1.1\r\nconnection: close"), body).await;
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Reply { status, head: head.to_lowercase(), body: body.to_owned() }
}

/// What the engines said, in the order of their starts.
fn engine_logs(world: &World) -> String {
    let mut files: Vec<_> = std::fs::read_dir(world.state_dir().join("logs"))
        .map(|files| files.flatten().map(|file| file.path()).collect())
        .unwrap_or_default();
    files.sort();
    files.iter().map(|file| std::fs::read_to_string(file).unwrap_or_default()).collect()
}

/// A WebSocket to the painter, its hello read.
async fn socket(world: &World) -> TcpStream {
    let head = "GET /comfyui/ws?clientId=1 HTTP/1.1\r\nconnection: Upgrade\r\n\
                upgrade: websocket\r\nsec-websocket-version: 13\r\n\
                sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==";
    let address = world.server.talk.gateway.trim_start_matches("http://").to_owned();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("{head}\r\nhost: localhost\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(timeout(PATIENCE, stream.read_u8()).await.unwrap().unwrap());
    }
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    assert!(answer.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "RFC 6455's own example: {answer}");
    let hello = frame(&mut stream).await.unwrap();
    assert_eq!(hello.0, 0x81);
    assert!(String::from_utf8(hello.1).unwrap().contains("queue_remaining"));
    stream
}

/// The next short frame: its first byte and its payload; `None`: closed.
async fn frame(stream: &mut TcpStream) -> Option<(u8, Vec<u8>)> {
    let mut head = [0; 2];
    timeout(PATIENCE, stream.read_exact(&mut head)).await.unwrap().ok()?;
    assert!(head[1] < 126, "short frames only");
    let mut payload = vec![0; usize::from(head[1])];
    timeout(PATIENCE, stream.read_exact(&mut payload)).await.unwrap().ok()?;
    Some((head[0], payload))
}

async fn send(stream: &mut TcpStream, first: u8, payload: &[u8]) {
    let mask = [1, 2, 3, 4];
    let mut bytes = vec![first, 0x80 | payload.len() as u8];
    bytes.extend(mask);
    bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    stream.write_all(&bytes).await.unwrap();
}

// contract: any /comfyui/{path…}
#[tokio::test]
async fn looking_at_a_page_starts_nothing_and_work_does() {
    let world = serve(&settings(""), &painter(""), &[]).await;
    for line in [
        "GET /comfyui/",
        "GET /comfyui/queue",
        "POST /comfyui/free",
        "GET /comfyui/prompt",
        "GET /upstream/painter/history",
        "HEAD /upstream/comfyui/",
    ] {
        let reply = ask(&world, line, "").await;
        assert_eq!(reply.status, 503, "{line}: {}", reply.body);
        assert!(reply.head.contains("retry-after"), "{line}");
    }
    assert!(world.swaps().await.is_empty());
    assert_eq!(world.state_of("painter").await, "stopped");
    let reply = ask(&world, "POST /comfyui/prompt", r#"{"seconds":0.2}"#).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert!(reply.body.contains("\"prompt_id\""), "{}", reply.body);
    assert!(reply.head.contains("x-wharf-model: painter"), "{}", reply.head);
    let page = ask(&world, "GET /comfyui/", "").await;
    assert_eq!(page.status, 200);
    assert!(page.body.contains("stand-in"), "{}", page.body);
    let script = ask(&world, "GET /upstream/painter//./app.js", "").await;
    assert!(script.head.contains("text/javascript"), "{}", script.head);
    assert_eq!(world.swaps().await.len(), 1);
    world.stop().await;
}

#[tokio::test]
async fn a_model_with_work_in_its_queue_stays_and_releases_its_memory_before_it_goes() {
    let models = painter("") + &standin("ada", "14GiB", "--load 100ms");
    let world = serve(&settings(""), &models, &[]).await;
    for seconds in ["1.5", "1"] {
        let body = format!("{{\"seconds\":{seconds}}}");
        assert_eq!(ask(&world, "POST /comfyui/prompt", &body).await.status, 200);
    }
    let answer = world.server.talk.chat("ada", false, &[]).await.unwrap();
    assert!(answer.is_from("ada"), "{answer:?}\n{}", world.log());
    let log = engine_logs(&world);
    let done = log.find("Prompt executed 2").unwrap_or_else(|| panic!("work was cut: {log}"));
    let freed = log.find("freeing memory: ").unwrap_or_else(|| panic!("not released: {log}"));
    assert!(done < freed, "{log}");
    assert!(log.contains(r#""unload_models":true"#) && log.contains(r#""free_memory":true"#));
    assert_eq!(world.state_of("painter").await, "stopped");
    world.stop().await;
}

#[tokio::test]
async fn the_ttl_begins_when_the_queue_is_empty_and_lookers_do_not_move_it() {
    let world = serve(&settings(""), &painter("    ttl: 700ms\n"), &[]).await;
    let reply = ask(&world, "POST /comfyui/prompt", r#"{"seconds":2}"#).await;
    assert_eq!(reply.status, 200);
    let mut socket = socket(&world).await;
    let began = Instant::now();
    // A page that is left open: it asks again and again, and listens.
    let mut saw_work = false;
    loop {
        let queue = ask(&world, "GET /comfyui/queue", "").await;
        if queue.status == 503 {
            break;
        }
        if queue.status == 200 {
            let queue: Value = serde_json::from_str(&queue.body).unwrap_or_default();
            saw_work |= queue["queue_running"].as_array().is_some_and(|work| !work.is_empty());
        }
        assert!(began.elapsed() < PATIENCE, "it never leaves");
        sleep(Duration::from_millis(20)).await;
    }
    assert!(saw_work);
    assert!(engine_logs(&world).contains("Prompt executed 1"), "the work was not cut");
    assert!(frame(&mut socket).await.is_none(), "the socket ends with its engine");
    world.until("it is stopped", |s| s["models"]["painter"]["state"] == "stopped").await;
    let swaps = world.swaps().await;
    assert!(swaps.iter().any(|swap| swap["cause"] == "ttl"), "{swaps:#?}");
    world.stop().await;
}

#[tokio::test]
async fn a_websocket_speaks_with_its_engine_and_a_forced_stop_closes_it() {
    let models = painter("") + &standin("ada", "14GiB", "--load 100ms");
    let world = serve(&settings(", drain_timeout: 500ms"), &models, &[]).await;
    assert_eq!(ask(&world, "POST /comfyui/prompt", r#"{"seconds":600}"#).await.status, 200);
    let mut socket = socket(&world).await;
    send(&mut socket, 0x81, b"hello").await;
    assert_eq!(frame(&mut socket).await, Some((0x81, b"hello".to_vec())));
    send(&mut socket, 0x89, b"are you there").await;
    assert_eq!(frame(&mut socket).await, Some((0x8a, b"are you there".to_vec())));
    send(&mut socket, 0x02, b"half a ").await;
    assert_eq!(frame(&mut socket).await, Some((0x02, b"half a ".to_vec())));
    let mut other = self::socket(&world).await;
    send(&mut other, 0x88, b"\x03\xe8").await;
    assert_eq!(frame(&mut other).await, Some((0x88, b"\x03\xe8".to_vec())));
    assert_eq!(frame(&mut other).await, None);
    // Ten minutes of work outlast the drain deadline.
    let answer = world.server.talk.chat("ada", false, &[]).await.unwrap();
    assert!(answer.is_from("ada"), "{answer:?}\n{}", world.log());
    assert_eq!(frame(&mut socket).await, None);
    assert!(engine_logs(&world).contains("freeing memory"));
    world.stop().await;
}

// contract: any /upstream/{model}/{path…}
#[tokio::test]
async fn engines_are_reached_by_their_own_paths_and_not_moved() {
    let models = standin("\"org/qwen:7b\"", "4GiB", "--load 100ms --tokens-per-second 200")
        .replace("--name \"org/qwen:7b\"", "--name org/qwen:7b --style vllm")
        .replace("engine: openai", "engine: vllm");
    let world = serve(&settings(""), &models, &[]).await;
    let reply = ask(&world, "GET /upstream/org%2Fqwen:7b/v1/models", "").await;
    assert_eq!(reply.status, 200, "{}\n{}", reply.body, world.log());
    assert!(reply.body.contains("org/qwen:7b"), "{}", reply.body);
    let body = r#"{"model":"org/qwen:7b","stream":true,"max_tokens":8,"messages":[]}"#;
    let reply = ask(&world, "POST /upstream/org/qwen:7b/v1/chat/completions", body).await;
    assert_eq!(reply.status, 200);
    assert!(reply.head.contains("text/event-stream"), "{}", reply.head);
    assert!(reply.body.contains("qwen:7b-8") && reply.body.contains("[DONE]"), "{}", reply.body);
    for line in [
        "POST /upstream/org/qwen:7b/sleep?level=1",
        "POST /upstream/org/qwen:7b//%73leep",
        "POST /upstream/org/qwen:7b/v1/../wake_up",
        "GET /upstream/org/qwen:7b/is_sleeping",
        "POST /upstream/org/qwen:7b/collective_rpc",
    ] {
        let reply = ask(&world, line, "").await;
        assert_eq!(reply.status, 403, "{line}: {}", reply.body);
        assert!(reply.body.contains("path_not_allowed"), "{}", reply.body);
    }
    assert!(
        world.server.talk.chat("org/qwen:7b", false, &[]).await.unwrap().is_from("org/qwen:7b")
    );
    let list = ask(&world, "GET /upstream", "").await;
    let list: Value = serde_json::from_str(&list.body).unwrap();
    assert_eq!(list["data"][0]["url"], "/upstream/org/qwen:7b/");
    assert_eq!(list["data"][0]["state"], "ready");
    world.stop().await;
}
