//! Which requests are of the short way.

use std::mem::MaybeUninit;
use std::net::SocketAddr;

use bytes::Bytes;
use httparse::{ParserConfig, Status};

use super::super::infer::Asking;
use super::super::receive::Content;
use super::super::site::Site;
use super::{BUFFER_MAX, Request};
use crate::http1::{self, Fields};

/// Whoever sends more goes the long way.
const HEADERS_MAX: usize = 64;

/// What a connection's next bytes are.
pub enum Verdict {
    /// And how many of them it took.
    Whole(Request, usize),
    /// Of the short way, as soon as there are so many.
    Partial(usize),
    Special,
}

/// Leaves to hyper whatever is not plain: another method or path, a head in parts or with two
/// meanings, a web page's request, a body that is chunked or large.
pub fn judge(text: &[u8], site: &Site, peer: SocketAddr) -> Verdict {
    read(text, site, peer).unwrap_or(Verdict::Special)
}

fn read(text: &[u8], site: &Site, peer: SocketAddr) -> Option<Verdict> {
    let mut headers = [const { MaybeUninit::uninit() }; HEADERS_MAX];
    let mut head = httparse::Request::new(&mut []);
    let parsed =
        ParserConfig::default().parse_request_with_uninit_headers(&mut head, text, &mut headers);
    let Ok(Status::Complete(length)) = parsed else { return None };
    if head.method != Some("POST") || head.version != Some(1) {
        return None;
    }
    let target = head.path?;
    let (path, query) = match target.split_once('?') {
        Some((_, query)) if !is_usual(query) => return None,
        Some((path, query)) => (path, Some(query)),
        None => (target, None),
    };
    let Plain { host, body } = plain(head.headers)?;
    let (gateway, inference) = site.short_way(path, host)?;
    let total = length.checked_add(body).filter(|total| *total <= BUFFER_MAX)?;
    if text.len() < total {
        return Some(Verdict::Partial(total));
    }
    let kept = Bytes::copy_from_slice(&text[..total]);
    let body = Content::Whole { body: kept.slice(length..), kept: total };
    let headers = Fields::new(head.headers, text, kept);
    let query = query.map(str::to_owned);
    let asking = Asking { query, headers, body, peer: Some(peer), bound: None };
    Some(Verdict::Whole(Request { gateway, inference, asking }, total))
}

/// Without a fragment, or what else no query may hold.
fn is_usual(query: &str) -> bool {
    query.bytes().all(|byte| byte.is_ascii_graphic() && !b"#\"<>".contains(&byte))
}

/// What must be said, and once.
#[derive(Debug, PartialEq, Eq)]
struct Plain<'a> {
    host: &'a str,
    body: usize,
}

fn plain<'a>(headers: &[httparse::Header<'a>]) -> Option<Plain<'a>> {
    let (mut host, mut body) = (None, None);
    for header in headers {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        // Few lengths are of interest: most headers need no comparison.
        match header.name.len() {
            4 if is("host") => {
                let text = std::str::from_utf8(header.value).ok()?;
                if host.replace(text).is_some() {
                    return None;
                }
            }
            14 if is("content-length") => {
                let length = http1::length(header.value)?.try_into().ok()?;
                if body.replace(length).is_some() {
                    return None;
                }
            }
            10 if is("connection") && !header.value.eq_ignore_ascii_case(b"keep-alive") => {
                return None;
            }
            6 if is("origin") || is("expect") => return None,
            7 if is("upgrade") => return None,
            14 if is("sec-fetch-site") => return None,
            17 if is("transfer-encoding") => return None,
            _ => {}
        }
    }
    Some(Plain { host: host?, body: body? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain_of(lines: &str) -> Option<(String, usize)> {
        let text = format!("POST / HTTP/1.1\r\n{lines}\r\n");
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut head = httparse::Request::new(&mut headers);
        assert!(head.parse(text.as_bytes()).unwrap().is_complete());
        plain(head.headers).map(|plain| (plain.host.to_owned(), plain.body))
    }

    #[test]
    fn what_says_something_special_is_not_plain() {
        let usual = "Host: a:1\r\nContent-Length: 5\r\nConnection: Keep-Alive\r\nX: y\r\n";
        assert_eq!(plain_of(usual), Some(("a:1".to_owned(), 5)));
        for special in [
            "Host: b\r\n",
            "Content-Length: 5\r\n",
            "Connection: close\r\n",
            "Connection: keep-alive, X\r\n",
            "Origin: http://a:1\r\n",
            "Expect: 100-continue\r\n",
            "Upgrade: h2c\r\n",
            "Sec-Fetch-Site: same-origin\r\n",
            "Transfer-Encoding: chunked\r\n",
        ] {
            assert_eq!(plain_of(&format!("{usual}{special}")), None, "{special}");
        }
        for lacking in ["Host: a\r\n", "Content-Length: 5\r\n"] {
            assert_eq!(plain_of(lacking), None, "{lacking}");
        }
        for length in ["-1", "+5", "5, 5", "0x5", "", "99999999999999999999999"] {
            let lines = format!("Host: a\r\nContent-Length: {length}\r\n");
            assert_eq!(plain_of(&lines), None, "{length}");
        }
    }
}
