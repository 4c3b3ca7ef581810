//! Anthropic's official Python client. Needs WHARF_TEST_PYTHON (an interpreter with the package
//! anthropic); the test command sets it.

mod support;

use support::{gpu, serve, standin};

const KEY: &str = "key-of-a-client-0001";

// contract: POST /v1/messages
// contract: POST /v1/messages/count_tokens
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn anthropics_client_gets_messages_streams_token_counts_and_its_typed_exceptions() {
    let Ok(python) = std::env::var("WHARF_TEST_PYTHON") else {
        support::skip("official anthropic client: WHARF_TEST_PYTHON is not set");
        return;
    };
    let models = standin("ada", "14GiB", "--load 100ms")
        + &standin("bob", "14GiB", "--load 100ms")
        + &standin("broken", "4GiB", "--load 50ms --fatal-line 'CUDA out of memory' --exit-code 1");
    let settings = format!(
        "{}\nauth: {{ keys: [{{ name: client, key: {KEY}, models: [\"*\"], scopes: [inference] }}] }}",
        gpu("24GiB", "50ms")
    );
    let world = serve(&settings, &models, &[]).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/anthropic_client.py");
    let output = tokio::process::Command::new(python)
        .args([script, &world.server.talk.gateway, KEY])
        .output()
        .await
        .unwrap();
    println!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stderr),
        world.log()
    );
    world.stop().await;
}
