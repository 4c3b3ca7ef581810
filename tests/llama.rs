//! Real llama-servers as processes. Needs WHARF_TEST_LLAMA (the server) and WHARF_TEST_GGUF (a
//! folder with ada.gguf and bob.gguf); the test command sets both.

mod support;

use serde_json::json;
use support::serve;

#[tokio::test]
async fn two_real_llama_servers_take_turns() {
    let (Ok(server), Ok(gguf)) =
        (std::env::var("WHARF_TEST_LLAMA"), std::env::var("WHARF_TEST_GGUF"))
    else {
        support::skip("real llama-server: WHARF_TEST_LLAMA and WHARF_TEST_GGUF are not set");
        return;
    };
    let model = |name: &str| {
        format!(
            "  {name}:\n    engine: llamacpp\n    vram: 14GiB\n    process:\n      cmd: >-\n        {server} -m \
             {gguf}/{name}.gguf --host 127.0.0.1 --port ${{PORT}} -t 1 -tb 1 --alias {name} \
             --metrics --sse-ping-interval 1\n"
        )
    };
    let settings = "gpu: { provider: none, memory: [24GiB] }\nswap: { min_residency: 100ms }";
    let world = serve(settings, &(model("ada") + &model("bob")), &[]).await;
    for name in ["ada", "bob", "ada"] {
        let answer = world.server.talk.chat(name, name == "ada", &[]).await.unwrap();
        assert!(answer.is_from(name), "{answer:?}\n{}", world.log());
        assert_eq!(world.engine_pids().len(), 1, "the first is gone before the second starts");
    }
    let swaps = world.swaps().await;
    assert_eq!(swaps.iter().filter(|swap| swap["result"] == json!("ready")).count(), 3);
    world.stop().await;
}
