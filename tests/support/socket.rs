//! Docker behind a socket of ours that interferes with chosen requests while it is told to.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

/// What happens to a request that is interfered with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Interference {
    BreakOff,
    HoldBack,
}

/// A socket at `path` before the daemon at `host`: requests that contain `needle` meet the
/// interference while the returned flag, at first `on`, is set.
pub fn interfering(
    (host, path): (&str, &Path),
    needle: String,
    interference: Interference,
    on: bool,
) -> (String, Arc<AtomicBool>) {
    let listener = UnixListener::bind(path).expect("a socket");
    let flag = Arc::new(AtomicBool::new(on));
    let (is_on, real) = (Arc::clone(&flag), host.trim_start_matches("unix://").to_owned());
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (is_on, real, needle) = (Arc::clone(&is_on), real.clone(), needle.clone());
            tokio::spawn(async move {
                let Ok(docker) = UnixStream::connect(real).await else { return };
                let (mut from, mut to) = client.into_split();
                let (mut answers, mut asks) = docker.into_split();
                let back = async { drop(tokio::io::copy(&mut answers, &mut to).await) };
                let forth = async {
                    let mut piece = vec![0; 64 << 10];
                    while let Ok(read @ 1..) = from.read(&mut piece).await {
                        let is_meant = String::from_utf8_lossy(&piece[..read]).contains(&needle);
                        while is_meant && is_on.load(Ordering::SeqCst) {
                            match interference {
                                Interference::BreakOff => return,
                                Interference::HoldBack => {
                                    tokio::time::sleep(Duration::from_millis(20)).await;
                                }
                            }
                        }
                        if asks.write_all(&piece[..read]).await.is_err() {
                            return;
                        }
                    }
                };
                tokio::select! { () = back => {}, () = forth => {} }
            });
        }
    });
    (format!("unix://{}", path.display()), flag)
}
