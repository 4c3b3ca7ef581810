//! Engines elsewhere, over https: a TLS server on loopback with certificates of an authority made
//! for the test, and a stand-in engine behind it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::{Value, json};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use support::ports::free_port;
use support::{EXE, World, serve};

const KEY: &str = "key-of-gpu2";

/// The engine that runs elsewhere; it wants its key.
struct Engine {
    child: Child,
    port: u16,
}

impl Engine {
    async fn start() -> Engine {
        let port = free_port();
        let child = Command::new(EXE)
            .args(["engine", "--port", &port.to_string(), "--name", "gpu2", "--api-key", KEY])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let engine = Engine { child, port };
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        engine
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An authority as a home lab has one.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    file: PathBuf,
}

impl Authority {
    fn new(dir: &Path) -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let file = dir.join("home-ca.pem");
        std::fs::write(&file, params.self_signed(&key).unwrap().pem()).unwrap();
        Authority { issuer: Issuer::new(params, key), file }
    }

    /// Serves TLS in front of a port, and returns its own.
    async fn front(&self, to: u16, name: &str, change: impl FnOnce(&mut CertificateParams)) -> u16 {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    let mut engine = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
                    let _ = copy_bidirectional(&mut stream, &mut engine).await;
                });
            }
        });
        port
    }
}

async fn world(external: Value, more: &str) -> World {
    let settings = "gpu: { provider: none, memory: [24GiB] }";
    let models = format!("  gpu2: {{ engine: openai, {more} external: {external} }}\n");
    serve(settings, &models, &[]).await
}

async fn refusal(world: &World) -> String {
    let mut talk = world.server.talk.clone();
    talk.orchestrator = talk.gateway.clone();
    let body = json!({ "model": "gpu2", "messages": [{ "role": "user", "content": "hi" }] });
    let (status, body) = talk.call(http::Method::POST, "/v1/chat/completions", body).await.unwrap();
    assert_eq!((status, &body["cause"]["kind"]), (503, &json!("bad_spec")), "{body:#}");
    body["error"]["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn an_engine_behind_a_private_authority_serves_once_that_is_named() {
    let engine = Engine::start().await;
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let port = authority.front(engine.port, "localhost", |_| {}).await;
    let url = format!("https://localhost:{port}");

    for more in ["", "canary: true,", "health: { path: none },"] {
        let external = json!({ "url": url, "ca": authority.file, "api_key": KEY });
        let world = world(external, more).await;
        for stream in [false, true, true] {
            let answer = world.server.talk.chat("gpu2", stream, &[]).await.unwrap();
            assert!(answer.is_from("gpu2"), "{more} {answer:?}\n{}", world.log());
        }
        assert!(!world.log().contains(KEY));
        world.stop().await;
    }

    for more in ["", "health: { path: none },"] {
        let world = world(json!({ "url": url, "api_key": KEY }), more).await;
        let message = refusal(&world).await;
        let wanted = format!("certificate of localhost:{port} is not trusted");
        assert!(message.contains(&wanted) && message.contains("external.ca"), "{message}");
        world.stop().await;
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_certificate_is_said() {
    let engine = Engine::start().await;
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let expire = |params: &mut CertificateParams| {
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2021, 1, 1);
    };
    let expired = authority.front(engine.port, "localhost", expire).await;
    let misnamed = authority.front(engine.port, "gpu2.lan", |_| {}).await;
    let missing = dir.path().join("missing.pem");
    for (port, ca, words) in [
        (expired, &authority.file, ["has expired", "renew"]),
        (misnamed, &authority.file, ["is for another name", "gpu2.lan"]),
        (engine.port, &authority.file, ["does not speak TLS", "http://"]),
        (misnamed, &missing, ["missing.pem", "PEM"]),
    ] {
        let external = json!({ "url": format!("https://localhost:{port}"), "ca": ca });
        let world = world(external, "").await;
        let message = refusal(&world).await;
        for word in words {
            assert!(message.contains(word), "no {word:?} in {message}");
        }
        world.stop().await;
    }
}
