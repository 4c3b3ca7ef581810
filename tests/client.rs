//! The client commands against the real control API on loopback: exit codes, and what people read.

#[path = "support/control/mod.rs"]
mod control;
#[path = "support/ports.rs"]
mod ports;

use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use control::*;
use serde_json::Value;
use wharf::cli::client::{Client, Connection};
use wharf::cli::{ensure, load, logs, status, swaps, unload};
use wharf::orchestrator::handle::Message;
use wharf::scheduler::action::{Answer, Refusal};
use wharf::scheduler::event::Event;
use wharf::telemetry::logs::Source;
use wharf::telemetry::metrics::Metrics;
use wharf::units::*;

#[derive(Debug, Parser)]
enum Command {
    Status(status::Args),
    Ensure(ensure::Args),
    Load(load::Args),
    Unload(unload::Args),
    Logs(logs::Args),
    Swaps(swaps::Args),
}

/// Runs `wharf ARGS… --url URL` as the program would.
async fn wharf(url: &str, args: &[&str]) -> ExitCode {
    let words = [&["wharf"], args, &["--url", url]].concat();
    match Command::try_parse_from(words).expect("valid arguments") {
        Command::Status(args) => status::run(args).await,
        Command::Ensure(args) => ensure::run(args).await,
        Command::Load(args) => load::run(args).await,
        Command::Unload(args) => unload::run(args).await,
        Command::Logs(args) => logs::run(args).await,
        Command::Swaps(args) => swaps::run(args).await,
    }
}

/// Serves the world; its owner answers every ask by `decide`.
async fn serve(decide: fn(&Event) -> Answer) -> (String, Vec<wharf::orchestrator::Lease>) {
    let (mut puppet, leases) = world();
    let router = wharf::api::router(puppet.handle.clone(), Arc::new(Metrics::new()));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    tokio::spawn(async move { axum::serve(listener, router).await });
    tokio::spawn(async move {
        while let Some(message) = puppet.inbox.recv().await {
            if let Message::Ask { event, reply, .. } = message {
                let _ = reply.send(decide(&event));
            }
        }
    });
    (url, leases)
}

fn yes(event: &Event) -> Answer {
    match event {
        Event::UnloadAsked { .. } => Answer::Unloaded { was_loaded: true },
        _ => Answer::Ready { instance: InstanceId(7), swap: Some(SwapId(7)), swapped: true },
    }
}

fn no(_event: &Event) -> Answer {
    Answer::Refused(Refusal::StartFailed {
        swap: Some(SwapId(8)),
        fault: fault(),
        retry_at: Time(2_000_000),
    })
}

// contract: CLI exit codes, --url and WHARF_URL
// contract: CLI status
// contract: CLI ensure
// contract: CLI load
// contract: CLI unload
// contract: CLI swaps
#[tokio::test]
async fn exit_codes_say_what_happened() {
    let (url, _leases) = serve(yes).await;
    for args in [
        &["status"][..],
        &["status", "--json"],
        &["ensure", "mistral", "--timeout", "2m"],
        &["ensure", "gpt-4o-mini", "--no-wait", "--json"],
        &["load", "org/coder:7b"],
        &["unload", "org/coder:7b", "--force"],
        &["swaps"],
        &["swaps", "s8"],
        &["swaps", "--model", "org/coder:7b", "--limit", "3", "--json"],
    ] {
        assert_eq!(wharf(&url, args).await, ExitCode::SUCCESS, "{args:?}");
    }
    for args in [&["ensure", "nope"][..], &["load", "nope/x"], &["swaps", "s99"]] {
        assert_eq!(wharf(&url, args).await, ExitCode::from(4), "{args:?}");
    }
    let (url, _leases) = serve(no).await;
    assert_eq!(wharf(&url, &["ensure", "tiny"]).await, ExitCode::from(5));
    assert_eq!(wharf(&url, &["load", "tiny", "--json"]).await, ExitCode::from(5));

    let url = format!("http://127.0.0.1:{}", ports::free_port());
    assert_eq!(wharf(&url, &["status"]).await, ExitCode::from(3));
    assert_eq!(wharf("ftp://127.0.0.1", &["status"]).await, ExitCode::from(2));
}

fn at(url: &str) -> Connection {
    Connection { url: Some(url.to_owned()), ..Connection::default() }
}

async fn answers(url: &str, path: &str) -> Value {
    let connection = at(url);
    Client::new(&connection).expect("a URL").get(path).await.expect("an answer")
}

// contract: CLI exit codes, --url and WHARF_URL
#[tokio::test]
async fn the_address_comes_from_the_configuration_where_none_is_given() {
    let (url, _leases) = serve(yes).await;
    let file = tempfile::NamedTempFile::new().expect("a file");
    let listen = url.trim_start_matches("http://");
    // Wrong otherwise, and in need of a variable that only the server has.
    let yaml = format!("listen: {{ orchestrator: {listen} }}\nauth: ${{env.NOT_HERE}}\n");
    std::fs::write(file.path(), yaml).expect("written");
    let of_file = Connection { config: Some(file.path().to_owned()), ..Connection::default() };
    let client = Client::new(&of_file).expect("an address");
    assert_eq!(client.base(), url);
    assert!(client.get("/status").await.is_ok());
    let given = Connection { url: Some("127.0.0.1:9".to_owned()), ..of_file };
    assert_eq!(Client::new(&given).expect("an address").base(), "http://127.0.0.1:9");
}

#[tokio::test]
async fn who_does_not_wait_hears_which_swap_began() {
    let (url, _leases) = serve(yes).await;
    let client = Client::new(&at(&url)).expect("a URL");
    let body = serde_json::json!({"wait": false});
    let limit = wharf::cli::client::READ_TIMEOUT;
    let path = "/models/tiny/load";
    let told = ensure::describe(&client.post(path, &body, limit).await.expect("accepted"));
    assert_eq!(told, "tiny: starting; swap s7; watch with `wharf swaps s7`");
    let (url, _leases) = serve(no).await;
    let client = Client::new(&at(&url)).expect("a URL");
    assert!(client.post(path, &body, limit).await.is_err(), "refused at once");
}

// contract: CLI logs
#[tokio::test]
async fn logs_are_told_line_by_line() {
    let (mut puppet, _leases) = world();
    let written = puppet.handle.logs().clone();
    written.push(Source::Proxy, "wharf began");
    written.push(Source::Model(MISTRAL.into()), "é loads");
    let router = wharf::api::router(puppet.handle.clone(), Arc::new(Metrics::new()));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    tokio::spawn(async move { axum::serve(listener, router).await });
    assert_eq!(wharf(&url, &["logs"]).await, ExitCode::SUCCESS);
    assert_eq!(wharf(&url, &["logs", "nope", "--follow"]).await, ExitCode::from(4));

    let client = Client::new(&at(&url)).expect("a URL");
    let mut lines = Vec::new();
    client.lines("/logs", |line| lines.push(line.to_owned())).await.expect("all of it");
    assert_eq!(lines, ["wharf began", "é loads"]);
    let told = std::cell::RefCell::new(Vec::new());
    let follow = client.lines("/logs/stream/mistral", |line| {
        told.borrow_mut().push(line.to_owned());
        match told.borrow().len() {
            1 => written.push(Source::Model(MISTRAL.into()), "é is ready"),
            _ => puppet.handle.refuse_new(),
        }
    });
    let followed = tokio::time::timeout(std::time::Duration::from_secs(20), follow).await;
    followed.expect("it ends with Wharf").expect("in order");
    assert_eq!(told.into_inner(), ["é loads", "é is ready"]);
    puppet.inbox.close();
}

#[tokio::test]
async fn status_reads_like_a_table() {
    let (url, _leases) = serve(yes).await;
    let told =
        status::describe(&url, &answers(&url, "/status").await, &answers(&url, "/gpus").await);
    assert!(told.contains("healthy, multi-active; 1 of 3 models ready, 2 in flight, 2 waiting"));
    let line = |beginning: &str| {
        let line = told.lines().find(|line| line.starts_with(beginning));
        line.unwrap_or_else(|| panic!("no {beginning} in\n{told}"))
    };
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(words(line("mistral")), "mistral ready 0 2 0 - -");
    assert!(words(line("org/coder:7b")).contains("starting (start) 0 0 2 9.0 s"));
    assert!(line("tiny").contains("CUDA out of memory"), "{told}");
    assert!(line("swap s9").contains("load_weights 40 %, about 9.0 s left"), "{told}");
    assert!(
        line("GPU 0").ends_with("18.0 of 24.0 GiB used, 20.0 GiB promised (mistral, org/coder:7b)")
    );
    let ram = line("Host RAM");
    assert!(ram.ends_with("24.0 of 64.0 GiB used, 12.0 GiB promised (mistral)"), "{ram}");
}

#[tokio::test]
async fn swaps_and_ensure_tell_phases_in_order() {
    let (url, _leases) = serve(yes).await;
    let list = swaps::list(&answers(&url, "/swaps").await);
    assert_eq!(list.lines().count(), 4, "{list}");
    assert!(list.lines().nth(1).is_some_and(|line| line.contains("start …")), "{list}");
    assert!(list.contains("drain 500 ms, prove 1.2 s, start 7.0 s"), "{list}");
    let one = swaps::one(&answers(&url, "/swaps/s8").await);
    for part in ["idle 41 s", "CUDA out of memory: declare", "  | loading", "2 requests wait"] {
        assert!(one.contains(part), "{part} in\n{one}");
    }
    let connection = at(&url);
    let client = Client::new(&connection).expect("a URL");
    let body = serde_json::json!({"model": "mistral"});
    let limit = wharf::cli::client::READ_TIMEOUT;
    let answer = client.post("/ensure_model", &body, limit).await.expect("ready");
    let told = ensure::describe(&answer);
    assert!(told.starts_with("mistral is ready after 9.0 s (swap s7)\n  drain 500 ms"), "{told}");
}
