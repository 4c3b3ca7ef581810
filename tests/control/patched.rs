use hyper::Method;
use serde_json::{Value, json};

use super::support::{gpu, serve, standin};

fn settings() -> String {
    gpu("24GiB", "50ms")
        + "\nauth: { keys: [] }\nswap: { max_wait: 30s }\ndefaults: { ttl: 20m }\nports: off\n"
            .replace("ports: off\n", "")
            .as_str()
}

// contract: GET /config
#[tokio::test]
async fn the_configuration_in_force_has_the_pools_keys_and_no_secrets() {
    let models = standin("ada", "4GiB", "--load 50ms").replace(
        "    process:\n",
        "    warmup: true\n    process:\n      env: { HF_TOKEN: hf-s3cret-token }\n",
    );
    let env = [("MAX_CONCURRENT_MODELS", "7")];
    let world = serve(&settings(), &models, &env).await;
    let config = world.config().await;
    for key in [
        "default_ttl_minutes",
        "min_ttl_minutes",
        "max_ttl_minutes",
        "check_interval_seconds",
        "warmup_models",
        "port_range",
        "max_concurrent_models",
        "memory_limit_mb",
        "auto_unload",
        "graceful_shutdown_seconds",
        "ollama_base_url",
    ] {
        assert!(config.get(key).is_some(), "{key}: {config:#}");
    }
    assert_eq!(config["default_ttl_minutes"], 20);
    assert_eq!(config["warmup_models"], json!(["ada"]));
    assert_eq!(config["graceful_shutdown_seconds"], 60);
    assert_eq!(config["memory_limit_mb"], 24 * 1024 - 256);
    assert_eq!(config["swap"]["max_wait"], "30s");
    assert_eq!(config["origins"]["swap.max_wait"], "file");
    assert_eq!(config["max_concurrent_models"], 7);
    assert_eq!(config["origins"]["swap.max_concurrent_models"], "environment");
    assert_eq!(config["models"]["ada"]["runtime"]["process"]["env"]["HF_TOKEN"], "***");
    assert!(!config.to_string().contains("s3cret"), "{config:#}");
    // What the environment says cannot be patched away, and whoever tries is told.
    let (status, answer) = world.patch(json!({ "max_concurrent_models": 3 })).await;
    assert_eq!((status, &answer["max_concurrent_models"]), (200, &json!(7)), "{answer:#}");
    assert!(answer["notes"][0].as_str().unwrap().contains("MAX_CONCURRENT_MODELS"), "{answer:#}");
    world.stop().await;
}

// contract: PATCH /config
#[tokio::test]
async fn a_patch_is_in_force_at_once_outlives_a_kill_and_can_be_taken_back() {
    let models = standin("ada", "4GiB", "--load 50ms") + &standin("b.c", "4GiB", "--load 50ms");
    let mut world = serve(&settings(), &models, &[]).await;
    assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    let engines = world.engine_pids();
    let (status, answer) = world
        .patch(json!({
            "default_ttl_minutes": 15,
            "swap": { "min_residency": "1s" },
            "models": { "b.c": { "ttl": "5m", "tags": null } },
        }))
        .await;
    assert_eq!(status, 400, "tags are no policy: {answer:#}");
    assert_eq!(world.config().await["default_ttl_minutes"], 20, "all or nothing");
    let (status, answer) = world
        .patch(json!({
            "default_ttl_minutes": 15,
            "swap": { "min_residency": "1s" },
            "models": { "b.c": { "ttl": "5m" } },
        }))
        .await;
    assert_eq!(status, 200, "{answer:#}");
    assert_eq!(answer["adjusted"], json!(["ada", "b.c"]), "{answer:#}");
    assert_eq!(answer["settings"], json!(["swap.min_residency"]));
    assert_eq!(world.engine_pids(), engines, "no engine was touched");
    let in_force = async |world: &super::support::World| {
        let config = world.config().await;
        let model = world.server.talk.get("/models/b.c").await.unwrap();
        (
            config["default_ttl_minutes"].clone(),
            config["swap"]["min_residency"].clone(),
            model["ttl_seconds"].clone(),
        )
    };
    let patched = (json!(15), json!("1s"), json!(300.0));
    assert_eq!(in_force(&world).await, patched);
    world.server.kill_and_restart().await.unwrap();
    assert_eq!(in_force(&world).await, patched, "kept: {}", world.log());
    assert_eq!(world.config().await["origins"]["defaults.ttl"], "patch");
    // A file without that model: the patch is left out and told, and nothing else is lost.
    let yaml = world.yaml();
    world.write(&yaml.replace("  b.c:\n", "  bcd:\n"));
    let (status, answer) = world.post("/config/reload", Value::Null).await;
    assert_eq!(status, 200, "{answer:#}");
    assert_eq!(answer["left_out"][0]["what"], "patch: models.b.c.ttl", "{answer:#}");
    world.server.kill_and_restart().await.unwrap();
    let config = world.config().await;
    assert_eq!(config["left_out"][0]["what"], "patch: models.b.c.ttl", "{config:#}");
    assert!(world.log().contains("patch: models.b.c.ttl is left out"), "{}", world.log());
    assert_eq!(config["default_ttl_minutes"], 15);
    world.write(&yaml);
    world.post("/config/reload", Value::Null).await;
    assert_eq!(in_force(&world).await, patched, "it fits again");
    let (status, answer) = world
        .patch(json!({
            "default_ttl_minutes": null,
            "swap.min_residency": null,
            "models.b.c.ttl": null,
        }))
        .await;
    assert_eq!(status, 200, "{answer:#}");
    assert_eq!(in_force(&world).await, (json!(20), json!("3s"), json!(1200.0)));
    assert_eq!(world.config().await["patches"], json!({}));
    world.stop().await;
}

#[tokio::test]
async fn what_cannot_be_patched_is_refused_with_what_can() {
    let world = serve(&settings(), &standin("ada", "4GiB", "--load 50ms"), &[]).await;
    let before = world.config().await;
    for (body, said) in [
        (json!({ "models": { "ada": { "process": { "cmd": "evil" } } } }), "models.NAME.ttl"),
        (
            json!({ "models": { "ada": { "docker": { "image": "evil", "volumes": ["/:/h"] } } } }),
            "swap.mode",
        ),
        (json!({ "models": { "ada": { "env": { "LD_PRELOAD": "x" } } } }), "swap.mode"),
        (json!({ "defaults": { "process": { "cmd": "evil" } } }), "defaults.ttl"),
        (json!({ "templates": { "t": {} } }), "swap.mode"),
        (json!({ "registration": { "templates": ["t"] } }), "swap.mode"),
        (json!({ "listen": { "gateway": "0.0.0.0:1" } }), "swap.mode"),
        (json!({ "auth": { "keys": [], "open": true } }), "swap.mode"),
        (json!({ "announce": [{ "url": "http://evil" }] }), "swap.mode"),
        (json!({ "swap": { "max_wait": "soon" } }), "patch: swap.max_wait"),
        (
            json!({ "swap": { "max_wait": "60s" }, "queue": { "limit": "many" } }),
            "patch: queue.limit",
        ),
        (json!({ "models": { "nobody": { "ttl": "5m" } } }), "nobody"),
        (json!({ "models": { "ada": { "ttl": "${env.HOME}" } } }), "macros"),
        (json!({ "warmup_models": ["nobody"] }), "nobody"),
        (json!({ "default_ttl_minutes": "long" }), "minutes"),
        (json!({ "port_range": { "start": 1, "end": 2 } }), "ports"),
        (json!([]), "body"),
    ] {
        let (status, answer) = world.patch(body.clone()).await;
        assert_eq!(status, 400, "{body}: {answer:#}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(said), "{body}: {message}");
    }
    assert_eq!(world.config().await, before, "nothing was changed by any of them");
    let (status, answer) = world.patch(json!({ "check_interval_seconds": 10 })).await;
    assert_eq!((status, answer["notes"].as_array().map(Vec::len)), (200, Some(1)), "{answer:#}");
    let warmed = world.patch(json!({ "warmup_models": ["ada"] })).await;
    assert_eq!(warmed.0, 200, "{:#}", warmed.1);
    world.until("it is loaded", |status| status["models"]["ada"]["state"] == "ready").await;
    let (status, _) = world.server.talk.call(Method::PUT, "/config", json!({})).await.unwrap();
    assert_eq!(status, 405);
    world.stop().await;
}
