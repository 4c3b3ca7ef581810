//! What a model's settings do to its requests: filters, the time for an answer, and its row in the
//! list of models.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use wharf::config::catalog::{Catalog, Filters, ModelSpec};
use wharf::gateway::Limits;

use crate::support::World;

const CHAT: &str = "/v1/chat/completions";

async fn world(change: impl FnOnce(&mut ModelSpec)) -> World {
    let edit = |catalog: &mut Catalog| {
        let mut spec = ModelSpec::clone(&catalog.models["mistral"]);
        change(&mut spec);
        catalog.models.insert(spec.name.clone(), Arc::new(spec));
    };
    let world = World::with(edit, Limits::default()).await;
    world.ready();
    world
}

fn filters(strip: &[&str], set: serde_json::Value) -> Filters {
    Filters {
        strip: strip.iter().map(|name| (*name).to_owned()).collect(),
        set: serde_json::from_value(set).unwrap(),
    }
}

/// What of a body reaches the engine.
async fn forwarded(world: &mut World, body: &'static str) -> String {
    let reply = world.spawn(world.post(CHAT, body));
    let exchange = world.engine.request().await;
    let got = String::from_utf8(exchange.body.clone()).unwrap();
    exchange.answer_json("{}").await;
    assert_eq!(reply.await.unwrap().status(), 200);
    got
}

#[tokio::test]
async fn parameters_are_stripped_and_set_and_the_rest_stays_as_it_was() {
    let mut world = world(|spec| {
        spec.filters = filters(&["top_k"], json!({"temperature": 0.5, "model": "other"}));
    })
    .await;
    assert_eq!(
        forwarded(&mut world, r#"{"model":"gpt-4o", "top_k":5 ,"temperature":1.50,"n": 1.0}"#)
            .await,
        r#"{"model":"mistral" ,"temperature":0.5,"n": 1.0}"#
    );
    assert_eq!(
        forwarded(&mut world, r#"{"model":"mistral"}"#).await,
        r#"{"temperature":0.5,"model":"mistral"}"#
    );
}

#[tokio::test]
async fn filters_and_the_question_for_usage_fit_together() {
    let mut world = world(|spec| spec.filters = filters(&["top_k"], json!({"seed": 7}))).await;
    assert_eq!(
        forwarded(&mut world, r#"{"top_k":5,"model":"gpt-4o","stream":true}"#).await,
        r#"{"stream_options":{"include_usage":true},"seed":7,"model":"mistral","stream":true}"#
    );
}

#[tokio::test]
async fn whether_an_answer_streams_is_what_the_filters_made_of_it() {
    let mut plain = world(|spec| spec.filters = filters(&["stream"], json!({}))).await;
    assert_eq!(
        forwarded(&mut plain, r#"{"model":"mistral","stream":true}"#).await,
        r#"{"model":"mistral"}"#,
        "usage is not asked of an answer that does not stream"
    );
    let mut options = world(|spec| spec.filters = filters(&["stream_options"], json!({}))).await;
    assert_eq!(
        forwarded(&mut options, r#"{"model":"mistral","stream":true,"stream_options":{}}"#).await,
        r#"{"model":"mistral","stream":true}"#,
        "a parameter that the model shall not get does not come from Wharf either"
    );
}

#[tokio::test]
async fn a_silent_engine_is_given_up_after_its_models_own_time() {
    let mut world = world(|spec| spec.answer_timeout = Some(Duration::from_millis(50))).await;
    let reply = world.spawn(world.post(CHAT, r#"{"model":"mistral"}"#));
    let exchange = world.engine.request().await;
    let (status, code, _) = reply.await.unwrap().error().await;
    assert_eq!((status, code.as_str()), (504, "upstream_timeout"));
    exchange.closed().await;
}

#[tokio::test]
async fn a_stream_whose_first_event_does_not_come_is_given_up_too() {
    let limits = Limits { reader_stall: Duration::from_millis(20), ..Limits::default() };
    let edit = |catalog: &mut Catalog| {
        let mut spec = ModelSpec::clone(&catalog.models["mistral"]);
        spec.answer_timeout = Some(Duration::from_millis(100));
        catalog.models.insert(spec.name.clone(), Arc::new(spec));
    };
    let mut world = World::with(edit, limits).await;
    world.ready();
    let reply = world.spawn(world.post(CHAT, r#"{"model":"mistral","stream":true}"#));
    let mut exchange = world.engine.request().await;
    exchange.stream().await;
    let text = reply.await.unwrap().text().await;
    assert!(text.contains("upstream_timeout"), "{text}");
    exchange.closed().await;
}

#[tokio::test]
async fn unlisted_models_work_but_are_not_listed_and_metadata_is_shown() {
    let mut world = world(|spec| {
        spec.unlisted = true;
        spec.metadata.insert("license".to_owned(), json!("apache-2.0"));
    })
    .await;
    let list = world.get("/v1/models").await.json().await;
    assert!(!list.to_string().contains("mistral"), "{list}");
    let row = world.get("/v1/models/mistral").await.json().await;
    assert_eq!(row["meta"]["metadata"]["license"], "apache-2.0", "{row}");
    forwarded(&mut world, r#"{"model":"mistral"}"#).await;
}
