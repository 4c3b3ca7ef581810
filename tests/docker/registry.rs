//! A small image registry on loopback, where Docker accepts plain HTTP.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use futures_util::StreamExt as _;

use super::run;

const LAYER_MIB: usize = 8;
const CHUNK: usize = 64 * 1024;

struct Content {
    manifest: String,
    config: String,
    layer: Vec<u8>,
}

/// Serves `open/model:1`, refuses `gated/model`, and knows nothing else. Returns its address.
pub async fn serve() -> String {
    let content = Arc::new(content());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let routes = Router::new()
        .route("/v2/", get(|| async { "{}" }))
        .route("/v2/{org}/{name}/{kind}/{reference}", get(answer))
        .with_state(content);
    tokio::spawn(async move { axum::serve(listener, routes).await });
    address
}

async fn answer(
    State(content): State<Arc<Content>>,
    Path((org, _name, kind, reference)): Path<(String, String, String, String)>,
) -> Response {
    let refusal = |status, code: &str| {
        let json = [("content-type", "application/json")];
        (status, json, format!(r#"{{"errors":[{{"code":"{code}","message":"{code}"}}]}}"#))
            .into_response()
    };
    if org == "gated" {
        return refusal(StatusCode::FORBIDDEN, "DENIED");
    }
    if org != "open" {
        return refusal(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN");
    }
    let kind_of_manifest = "application/vnd.docker.distribution.manifest.v2+json";
    match kind.as_str() {
        "manifests" => {
            let digest = digest(content.manifest.as_bytes());
            let headers =
                [("content-type", kind_of_manifest), ("docker-content-digest", digest.as_str())];
            (headers, content.manifest.clone()).into_response()
        }
        _ if reference == digest(content.config.as_bytes()) => {
            content.config.clone().into_response()
        }
        _ => slowly(Arc::clone(&content)),
    }
}

/// Slow enough for Docker to report progress on the way.
fn slowly(content: Arc<Content>) -> Response {
    let length = content.layer.len();
    let chunks = futures_util::stream::iter((0..length).step_by(CHUNK)).then(move |at| {
        let end = length.min(at + CHUNK);
        let chunk = content.layer[at..end].to_vec();
        async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Ok::<_, std::io::Error>(chunk)
        }
    });
    ([("content-length", length.to_string())], Body::from_stream(chunks)).into_response()
}

fn content() -> Content {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("weights"), vec![7_u8; LAYER_MIB << 20]).expect("a file");
    let tar = dir.path().join("layer.tar");
    run(Command::new("tar").arg("-C").arg(dir.path()).arg("-cf").arg(&tar).arg("weights"));
    let layer = std::fs::read(&tar).expect("the layer");
    let digest_of_layer = digest(&layer);
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{}},
            "rootfs":{{"type":"layers","diff_ids":["{digest_of_layer}"]}}}}"#
    );
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json",
            "config":{{"mediaType":"application/vnd.docker.container.image.v1+json",
                "size":{},"digest":"{}"}},
            "layers":[{{"mediaType":"application/vnd.docker.image.rootfs.diff.tar.gzip",
                "size":{},"digest":"{digest_of_layer}"}}]}}"#,
        config.len(),
        digest(config.as_bytes()),
        layer.len(),
    );
    Content { manifest, config, layer }
}

fn digest(bytes: &[u8]) -> String {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), bytes).expect("its content");
    let sum = run(Command::new("sha256sum").arg(file.path()));
    format!("sha256:{}", sum.split(' ').next().unwrap_or_default())
}
