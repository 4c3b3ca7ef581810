//! Anthropic's official Python client. Needs WHARF_TEST_PYTHON (an interpreter with the package
//! anthropic); the test command sets it.

mod support;

use support::{gpu, serve, standin};

const KEY: &str = "key-of-a-client-0001";

// contract: POST /v1/messages
// contract: POST /v1/messages/count_tokens
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn anthropics_client_gets_messages_streams_token_counts_and_its_typed_exceptions() {
    let Some(python) = support::python("anthropic") else { return };
    let models = standin("ada", "14GiB", "--load 100ms")
        + &standin("bob", "14GiB", "--load 100ms")
        + &standin("broken", "4GiB", "--load 50ms --fatal-line 'CUDA out of memory' --exit-code 1");
    let settings = format!(
        "{}\nauth: {{ keys: [{{ name: client, key: {KEY}, models: [\"*\"], scopes: [inference] }}] }}",
        gpu("24GiB", "50ms")
    );
    let world = serve(&settings, &models, &[]).await;
    support::run_script(&python, "anthropic_client.py", &[&world.server.talk.gateway, KEY], &world)
        .await;
    world.stop().await;
}
