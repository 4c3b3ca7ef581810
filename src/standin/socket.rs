//! A WebSocket that says hello, as ComfyUI's does, and then echoes what it hears.

use std::io::{self, Error, ErrorKind};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const FRAME_BYTES_MAX: u64 = 16 << 20;
const HELLO: &[u8] = br#"{"type":"status","data":{"status":{"exec_info":{"queue_remaining":0}}}}"#;
const FIN_TEXT: u8 = 0x81;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xA;

/// To the client's close frame, or the end of its connection. `before`: what was read already.
pub async fn echo(mut stream: TcpStream, before: Bytes) -> io::Result<()> {
    write_frame(&mut stream, FIN_TEXT, HELLO).await?;
    let mut before = before;
    loop {
        let [first, second] = take(&mut stream, &mut before).await?;
        let length = match second & 0x7f {
            126 => u64::from(u16::from_be_bytes(take(&mut stream, &mut before).await?)),
            127 => u64::from_be_bytes(take(&mut stream, &mut before).await?),
            short => u64::from(short),
        };
        if second & 0x80 == 0 || length > FRAME_BYTES_MAX {
            return Err(Error::new(ErrorKind::InvalidData, "an unmasked or too large frame"));
        }
        let mask: [u8; 4] = take(&mut stream, &mut before).await?;
        let mut payload = vec![0; usize::try_from(length).map_err(Error::other)?];
        fill(&mut stream, &mut before, &mut payload).await?;
        for (byte, mask) in payload.iter_mut().zip(mask.iter().cycle()) {
            *byte ^= mask;
        }
        match first & 0x0f {
            PONG => {}
            PING => write_frame(&mut stream, 0x80 | PONG, &payload).await?,
            CLOSE => {
                write_frame(&mut stream, first, &payload).await?;
                return stream.shutdown().await;
            }
            _ => write_frame(&mut stream, first, &payload).await?,
        }
    }
}

async fn take<const N: usize>(stream: &mut TcpStream, before: &mut Bytes) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    fill(stream, before, &mut bytes).await?;
    Ok(bytes)
}

async fn fill(stream: &mut TcpStream, before: &mut Bytes, to: &mut [u8]) -> io::Result<()> {
    let early = before.len().min(to.len());
    before.copy_to_slice(&mut to[..early]);
    stream.read_exact(&mut to[early..]).await.map(|_| ())
}

/// Servers do not mask.
async fn write_frame(stream: &mut TcpStream, first: u8, payload: &[u8]) -> io::Result<()> {
    let mut frame = vec![first];
    match payload.len() {
        length @ 0..126 => frame.push(length as u8),
        length @ 126..=0xffff => {
            frame.push(126);
            frame.extend((length as u16).to_be_bytes());
        }
        length => {
            frame.push(127);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend(payload);
    stream.write_all(&frame).await
}
