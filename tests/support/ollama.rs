//! A stand-in for Ollama, as a process of its own.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use wharf::cli::demo::talk::Talk;

use super::EXE;
use super::ports::free_port;

pub struct Ollama {
    child: Child,
    pub talk: Talk,
    pub url: String,
}

impl Ollama {
    pub async fn start(flags: &[&str]) -> Ollama {
        let port = free_port();
        let child = Command::new(EXE)
            .args(["engine", "--style", "ollama", "--port", &port.to_string()])
            .args(flags)
            .stdout(Stdio::null())
            .spawn()
            .expect("a stand-in");
        let ollama =
            Ollama { child, talk: Talk::new(port, port), url: format!("http://127.0.0.1:{port}") };
        ollama.until("it answers", |_| true).await;
        ollama
    }

    pub async fn ps(&self) -> Option<Value> {
        Some(self.talk.get("/api/ps").await.ok()?["models"].clone())
    }

    pub async fn loaded(&self) -> Vec<String> {
        let rows = self.ps().await.expect("/api/ps");
        let names = rows.as_array().expect("rows").iter().map(|row| row["name"].as_str());
        names.map(|name| name.expect("a name").to_owned()).collect()
    }

    pub async fn until(&self, what: &str, wanted: impl Fn(&Value) -> bool) {
        let began = Instant::now();
        loop {
            let ps = self.ps().await;
            if ps.as_ref().is_some_and(&wanted) {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "{what} never came true: {ps:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.talk.call(http::Method::POST, path, body).await.expect("an answer")
    }
}

impl Drop for Ollama {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
