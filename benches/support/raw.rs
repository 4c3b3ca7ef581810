//! HTTP by hand: one request on a connection of its own, timed to its first byte.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Nothing here takes so long.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub first_byte: Instant,
    pub text: String,
}

pub fn send(port: u16, method: &str, path: &str, body: &str) -> io::Result<TcpStream> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes())?;
    Ok(stream)
}

pub fn ask(port: u16, method: &str, path: &str, body: &str) -> io::Result<Answer> {
    let mut stream = send(port, method, path, body)?;
    let mut text = vec![0; 16];
    let read = stream.read(&mut text)?;
    let first_byte = Instant::now();
    text.truncate(read);
    stream.read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| io::Error::other(format!("no answer: {text:?}")))?;
    Ok(Answer { status, first_byte, text })
}

pub fn chat_body(model: &str, stream: bool, tokens: u32) -> String {
    serde_json::json!({
        "model": model, "stream": stream, "max_tokens": tokens,
        "messages": [{ "role": "user", "content": "who are you?" }],
    })
    .to_string()
}

pub fn chat(port: u16, model: &str) -> io::Result<Answer> {
    ask(port, "POST", "/v1/chat/completions", &chat_body(model, false, 1))
}

/// Polls so densely that what it sees late does not count.
pub fn until_healthy(port: u16) -> io::Result<Instant> {
    const PAUSE: Duration = Duration::from_micros(300);
    let until = Instant::now() + PATIENCE;
    loop {
        if let Ok(Answer { status: 200, .. }) = ask(port, "GET", "/health", "") {
            return Ok(Instant::now());
        }
        if Instant::now() >= until {
            return Err(io::Error::other("never healthy"));
        }
        std::thread::sleep(PAUSE);
    }
}

/// A port that nobody has.
pub fn free_port() -> io::Result<u16> {
    Ok(std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}
