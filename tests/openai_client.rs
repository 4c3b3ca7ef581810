//! The official Python client. Needs WHARF_TEST_PYTHON (an interpreter with the package openai);
//! the test command sets it.

mod support;

use support::{gpu, serve, standin};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_official_python_client_works_and_raises_its_typed_exceptions() {
    let Some(python) = support::python("openai") else { return };
    let models = standin("ada", "14GiB", "--load 200ms")
        + &standin("bob", "14GiB", "--load 200ms")
        + &standin("broken", "4GiB", "--load 50ms --fatal-line 'CUDA out of memory' --exit-code 1");
    let world = serve(&gpu("24GiB", "100ms"), &models, &[]).await;
    let key = |name: &str, key: &str, models: &str, more: &str| {
        format!("    - {{ name: {name}, key: {key}, models: [{models}], {more} }}\n")
    };
    let keys = key("reader", "key-of-a-reader-001", "\"*\"", "scopes: [read]")
        + &key("narrow", "key-of-ada-only-001", "ada", "scopes: [inference]")
        + &key(
            "limited",
            "key-with-a-limit-001",
            "\"*\"",
            "scopes: [inference], limits: { requests_per_minute: 1 }",
        );
    let settings = format!("{}\nauth:\n  keys:\n{keys}", gpu("24GiB", "10ms"));
    let few = standin("ada", "4GiB", "") + &standin("bob", "4GiB", "");
    let keyed = serve(&settings, &few, &[]).await;
    let gateways = [&*world.server.talk.gateway, &*keyed.server.talk.gateway];
    let args = [gateways[0], "ada", "bob", "broken", gateways[1]];
    support::run_script(&python, "openai_client.py", &args, &world).await;
    keyed.stop().await;
    world.stop().await;
}
