//! HTTPS on the listeners: a real `wharf serve` with certificates made for the test.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{CertificateParams, KeyPair, date_time_ymd};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use support::EXE;
use support::ports::free_ports;

const PATIENCE: Duration = Duration::from_secs(60);

struct World {
    child: Option<Child>,
    dir: tempfile::TempDir,
    gateway: u16,
    control: u16,
    door: u16,
}

impl World {
    /// The files are there, but nothing is served yet.
    fn new(connections: u32, tls: bool) -> World {
        let dir = tempfile::tempdir().unwrap();
        let first = free_ports(44);
        let world = World { child: None, gateway: first, control: first + 1, door: first + 2, dir };
        world.configure(connections, tls);
        world
    }

    fn configure(&self, connections: u32, tls: bool) {
        let World { gateway, control, door, .. } = self;
        let tls = if tls { "tls: { cert_file: wharf.pem, key_file: wharf.key }" } else { "" };
        let (engines, last) = (gateway + 4, gateway + 43);
        let model = support::standin("ada", "1GiB", "");
        let yaml = format!(
            "listen:\n  gateway: 127.0.0.1:{gateway}\n  orchestrator: 127.0.0.1:{control}\n  \
             connections: {connections}\n  {tls}\nports: {door}-{door}\nengine_ports: {engines}-{last}\n\
             gpu: {{ provider: none, memory: [24GiB] }}\nmodels:\n{model}"
        );
        std::fs::write(self.path("models.yaml"), yaml).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A new pair under the configured names; `None`: the key that was there before.
    fn certificate(&self, year: i32, with_key: bool) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(vec!["wharf.lan".to_owned()]).unwrap();
        params.not_after = date_time_ymd(year, 1, 2);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        if with_key {
            std::fs::write(self.path("wharf.key"), key.serialize_pem()).unwrap();
        }
        std::fs::write(self.path("wharf.pem"), certificate.pem()).unwrap();
        certificate.der().clone()
    }

    async fn serve(&mut self) {
        let log = std::fs::File::create(self.path("wharf.log")).unwrap();
        let mut command = Command::new(EXE);
        command.args(["serve", "--config", "models.yaml"]).current_dir(self.dir.path());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap());
        self.said("serving").await;
    }

    async fn said(&self, words: &str) {
        let heard = async {
            while !self.log().contains(words) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        let heard = timeout(PATIENCE, heard).await;
        assert!(heard.is_ok(), "{words:?} was not said:\n{}", self.log());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("wharf.log")).unwrap_or_default()
    }

    fn wharf(&self, args: &[&str]) -> Output {
        let mut command = Command::new(EXE);
        command.args(args).args(["--config", "models.yaml"]).current_dir(self.dir.path());
        command.env_remove("WHARF_URL").env_remove("WHARF_ORCHESTRATOR");
        command.output().unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
            let _ = child.wait();
        }
    }
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Trusts that certificate and no other.
async fn connect(
    port: u16,
    certificate: &CertificateDer<'static>,
    alpn: &[&[u8]],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let name = ServerName::try_from("wharf.lan").unwrap();
    timeout(PATIENCE, TlsConnector::from(Arc::new(config)).connect(name, stream)).await.unwrap()
}

/// One request; the connection stays.
async fn ask<S>(stream: &mut S, request: &str) -> String
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !whole(&answer) {
        match timeout(PATIENCE, stream.read_buf(&mut answer)).await.unwrap() {
            Ok(1..) => {}
            _ => break,
        }
    }
    String::from_utf8(answer).unwrap()
}

fn whole(answer: &[u8]) -> bool {
    let answer = String::from_utf8_lossy(answer).to_lowercase();
    let Some((head, body)) = answer.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    match length {
        Some(length) => body.len() >= length.parse().unwrap(),
        None => body.ends_with("0\r\n\r\n"),
    }
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n")
}

fn chat(stream: bool) -> String {
    let body = format!(
        r#"{{"model":"ada","stream":{stream},"max_tokens":5,"messages":[{{"role":"user","content":"hi"}}]}}"#
    );
    let length = body.len();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

// contract: RULE every listener can speak HTTPS
#[tokio::test]
async fn every_listener_speaks_https_and_nothing_else() {
    let mut world = World::new(100, true);
    let certificate = world.certificate(2999, true);
    world.serve().await;

    for port in [world.gateway, world.control, world.door] {
        let mut stream = connect(port, &certificate, &[b"h2", b"http/1.1"]).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]), "HTTP/1.1 only");
        let answer = ask(&mut stream, &get("/health")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(connect(port, &certificate, &[b"h2"]).await.is_err(), "HTTP/2 is not spoken");

        let mut plain = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let answer = ask(&mut plain, &get("/health")).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
        assert!(answer.contains("https_required") && answer.contains("https://localhost"));
    }
    let mut stream = connect(world.gateway, &certificate, &[]).await.unwrap();
    for streamed in [false, true, true] {
        let answer = ask(&mut stream, &chat(streamed)).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("ada-1"), "{answer}");
    }
    // The client commands find the scheme and trust what is configured, whatever its name.
    let output = world.wharf(&["status"]);
    assert!(output.status.success() && text(&output).contains("ada"), "{}", text(&output));
    let told = text(&world.wharf(&["status", "--json"]));
    let status: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!(status["models"]["ada"]["state"], "ready");
    let stranger = Command::new(EXE)
        .args(["status", "--url", &format!("https://127.0.0.1:{}", world.control)])
        .current_dir(std::env::temp_dir())
        .output()
        .unwrap();
    assert_eq!(stranger.status.code(), Some(3), "{}", text(&stranger));
    assert!(text(&stranger).contains("certificate"), "{}", text(&stranger));
}

// contract: RULE a renewed certificate is taken up without a restart
#[tokio::test]
async fn a_renewed_certificate_is_taken_up_and_a_bad_one_is_not() {
    let mut world = World::new(100, true);
    let old = world.certificate(2998, true);
    world.serve().await;
    let mut lasting = connect(world.gateway, &old, &[]).await.unwrap();

    // A certificate without its key: what is in force stays, for reloads and by itself.
    world.certificate(2999, false);
    world.said("stays in force").await;
    let mut control = connect(world.control, &old, &[]).await.unwrap();
    let reload = "POST /config/reload HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n";
    let answer = ask(&mut control, reload).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("wharf.key"), "{answer}");
    connect(world.gateway, &old, &[]).await.unwrap();

    let new = world.certificate(2999, true);
    world.said("new connections get it").await;
    let mut fresh = connect(world.gateway, &new, &[]).await.unwrap();
    assert!(connect(world.gateway, &old, &[]).await.is_err(), "the old one is shown no more");
    for stream in [&mut lasting, &mut fresh] {
        let answer = ask(stream, &get("/v1/models")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    // Off and on again, without a restart.
    world.configure(100, false);
    let output = world.wharf(&["reload", "--url", &format!("https://127.0.0.1:{}", world.control)]);
    // The file no longer names the certificate.
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    kill(Pid::from_raw(world.child.as_ref().unwrap().id() as i32), Signal::SIGHUP).unwrap();
    world.said("settings changed: listen.tls").await;
    let mut plain = TcpStream::connect(("127.0.0.1", world.gateway)).await.unwrap();
    assert!(ask(&mut plain, &get("/v1/models")).await.starts_with("HTTP/1.1 200"));
    let answer = ask(&mut lasting, &get("/v1/models")).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
async fn who_only_knocks_holds_a_place_and_is_let_go() {
    let mut world = World::new(1, true);
    let certificate = world.certificate(2999, true);
    world.serve().await;
    let silent = TcpStream::connect(("127.0.0.1", world.gateway)).await.unwrap();
    // The silent one came first and holds the only place.
    let mut second = connect(world.gateway, &certificate, &[]).await.unwrap();
    let answer = ask(&mut second, &get("/v1/models")).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after"), "{answer}");
    // Control has places of its own.
    let mut control = connect(world.control, &certificate, &[]).await.unwrap();
    assert!(ask(&mut control, &get("/status")).await.starts_with("HTTP/1.1 200"));
    let again = async {
        loop {
            let mut stream = connect(world.gateway, &certificate, &[]).await.unwrap();
            if ask(&mut stream, &get("/v1/models")).await.starts_with("HTTP/1.1 200") {
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(PATIENCE, again).await.expect("the handshake has a deadline");
    drop(silent);
}

#[tokio::test]
async fn a_pair_that_cannot_be_used_is_named_before_anything_starts() {
    let world = World::new(100, true);
    for (args, code) in [(["check"], 1), (["serve"], 1)] {
        let output = world.wharf(&args);
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
        let told = text(&output);
        assert!(told.contains("listen.tls.cert_file wharf.pem cannot be read"), "{told}");
    }
    world.certificate(2999, true);
    assert!(world.wharf(&["check"]).status.success());
    world.certificate(2999, false);
    let told = text(&world.wharf(&["check"]));
    assert!(told.contains("wharf.key") && told.contains("wharf.pem"), "{told}");
    world.certificate(2021, true);
    let output = world.wharf(&["check"]);
    assert!(output.status.success(), "an old one can still be used: {}", text(&output));
    assert!(text(&output).contains("expired on 2021-01-02"), "{}", text(&output));
    // By flags, as in llama-swap.
    let flags = ["serve", "--tls-cert-file", "nowhere.pem", "--tls-key-file", "wharf.key"];
    let told = text(&world.wharf(&flags));
    assert!(told.contains("nowhere.pem cannot be read"), "{told}");
    let told = text(&world.wharf(&["serve", "--tls-cert-file", "wharf.pem"]));
    assert!(told.contains("--tls-key-file"), "{told}");
    assert!(!Path::new(&world.path("wharf.d")).join("installation").exists(), "nothing started");
}
