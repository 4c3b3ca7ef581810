//! An engine that answers at once: what is measured is the way to it.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use super::clock;
use super::pacer::Pacer;
use super::wire::{self, Events, Wanted};

/// Of a body; what the request wants stands in front.
const BODY_KEPT_MAX: usize = 64 * 1024;
const BACKLOG: u32 = 16 * 1024;

struct Upstream {
    usual: Vec<u8>,
    models: Vec<u8>,
    sized: Mutex<BTreeMap<usize, Arc<Vec<u8>>>>,
    pacer: Pacer,
}

/// Serves until it is killed.
pub fn serve(address: SocketAddr) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async move {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let listener = socket.listen(BACKLOG)?;
        let upstream = Arc::new(Upstream {
            usual: wire::json_answer(wire::ANSWER_BYTES),
            models: wire::json(
                "{\"object\":\"list\",\"data\":[{\"id\":\"bench\",\"object\":\"model\"}]}",
            ),
            sized: Mutex::default(),
            pacer: Pacer::start(),
        });
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let upstream = Arc::clone(&upstream);
            // Whoever hangs up has had enough.
            tokio::spawn(async move { upstream.connection(stream).await.ok() });
        }
    })
}

impl Upstream {
    async fn connection(&self, mut stream: TcpStream) -> io::Result<()> {
        let mut buffer = Vec::with_capacity(2048);
        let mut events = Events::new();
        loop {
            let head = loop {
                if let Some(end) = wire::head_end(&buffer) {
                    break end;
                }
                if stream.read_buf(&mut buffer).await? == 0 {
                    return Ok(());
                }
            };
            let length = wire::content_length(&buffer[..head]);
            if buffer.starts_with(b"GET ") {
                buffer.drain(..head + length);
                stream.write_all(&self.models).await?;
                continue;
            }
            let wanted = read_body(&mut stream, &mut buffer, head, length).await?;
            match wanted {
                Wanted::Json { bytes: wire::ANSWER_BYTES } => {
                    stream.write_all(&self.usual).await?;
                }
                Wanted::Json { bytes } => stream.write_all(&self.sized(bytes)).await?,
                Wanted::Stream { events: count, every: 0, usage } => {
                    stream.write_all(wire::STREAM_HEAD).await?;
                    for _ in 0..count {
                        stream.write_all(events.stamped(clock::now())).await?;
                    }
                    stream.write_all(events.end(usage)).await?;
                }
                Wanted::Stream { events: count, every, usage } => {
                    stream.write_all(wire::LAST_STREAM_HEAD).await?;
                    self.pacer.add(stream.into_std()?, count, every, usage);
                    return Ok(());
                }
            }
        }
    }

    fn sized(&self, bytes: usize) -> Arc<Vec<u8>> {
        let mut sized = self.sized.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(sized.entry(bytes).or_insert_with(|| Arc::new(wire::json_answer(bytes))))
    }
}

/// Takes the request out of `buffer`, of a large one only the front of its body.
async fn read_body(
    stream: &mut TcpStream,
    buffer: &mut Vec<u8>,
    head: usize,
    length: usize,
) -> io::Result<Wanted> {
    let kept = head + length.min(BODY_KEPT_MAX);
    while buffer.len() < kept {
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let wanted = wire::wanted(&buffer[head..kept]);
    let mut left = (head + length).saturating_sub(buffer.len());
    buffer.drain(..(head + length).min(buffer.len()));
    if left > 0 {
        let mut sink = vec![0; 256 * 1024];
        while left > 0 {
            let most = left.min(sink.len());
            let read = stream.read(&mut sink[..most]).await?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left -= read;
        }
    }
    Ok(wanted)
}
