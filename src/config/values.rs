//! Sizes, durations, addresses and port ranges as people write them.
//!
//! A reader's error is a hint at what was probably meant, or empty.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use crate::units::Bytes;

/// No timeout is longer; a deadline computed from it must not overflow a clock.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

/// `22GiB`, `512 MiB`, `1.5G` (binary, as Docker and nvidia-smi mean it), `24GB` (decimal), `0`.
pub(crate) fn size(text: &str) -> Result<Bytes, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim();
    let number: f64 = number.parse().map_err(|_| String::new())?;
    let scale: u64 = match unit.to_ascii_lowercase().as_str() {
        "b" => 1,
        "k" | "ki" | "kib" => 1 << 10,
        "m" | "mi" | "mib" => 1 << 20,
        "g" | "gi" | "gib" => 1 << 30,
        "t" | "ti" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "" if number == 0.0 => 1,
        "" => return Err(format!("a size needs a unit: did you mean `{text}GiB`?")),
        _ => return Err("expected one of the units KiB, MiB, GiB, TiB".to_owned()),
    };
    let bytes = number * scale as f64;
    // Exact for every size below 8 PiB, which is also the most that makes sense here.
    if bytes > (1_u64 << 53) as f64 {
        return Err("expected less than 8 PiB".to_owned());
    }
    Ok(Bytes(bytes.round() as u64))
}

/// `30s`, `5m`, `1h 30m`, `250ms`, `0`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    if let Ok(number) = text.parse::<f64>() {
        if number == 0.0 {
            return Ok(Duration::ZERO);
        }
        return Err(format!("a duration needs a unit: did you mean `{text}s`?"));
    }
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= LONGEST => Ok(duration),
        Ok(_) => Err("expected at most 366 days".to_owned()),
        Err(humantime::DurationError::UnknownUnit { unit, .. }) if !unit.is_empty() => {
            Err(format!("`{}` is no unit: expected ms, s, m, h or d", unit.escape_debug()))
        }
        Err(_) => Err(String::new()),
    }
}

/// `127.0.0.1:8080`, `[::1]:8080`, `localhost:8080`.
pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    let text = text.trim();
    if let Some(port) = text.strip_prefix("localhost:") {
        let port = port.parse().map_err(|_| "expected a port from 0 to 65535".to_owned())?;
        return Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    }
    text.parse().map_err(|_| {
        if let Ok(port) = text.trim_start_matches(':').parse::<u16>() {
            return format!("did you mean `127.0.0.1:{port}` (or `0.0.0.0:{port}` for everyone)?");
        }
        match text.rsplit_once(':') {
            Some((_, port)) if port.parse::<u16>().is_err() => {
                "expected a port from 0 to 65535".to_owned()
            }
            Some((host, port)) if host.parse::<std::net::IpAddr>().is_err() => {
                format!("expected an IP address, not a host name: `127.0.0.1:{port}`")
            }
            _ => "expected address and port, such as `127.0.0.1:8080`".to_owned(),
        }
    })
}

/// `18051-18999`, both ends included.
pub(super) fn port_range(text: &str) -> Result<(u16, u16), String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |s: &str| match s.trim().parse::<u16>() {
        Ok(0) | Err(_) => Err("expected ports from 1 to 65535, such as `18051-18999`".to_owned()),
        Ok(port) => Ok(port),
    };
    let (first, last) = (port(first)?, port(last)?);
    if first > last {
        return Err(format!("the first port is above the last: did you mean `{last}-{first}`?"));
    }
    Ok((first, last))
}

/// One size, a count times a size (`2 x 24GiB`), never more than 64.
pub(super) fn sizes(text: &str) -> Result<Vec<Bytes>, String> {
    let Some((left, right)) = text.split_once(['x', '×', '*']) else {
        return Ok(vec![size(text)?]);
    };
    let (count, one) = match (left.trim().parse::<usize>(), right.trim().parse::<usize>()) {
        (Ok(count), _) => (count, right),
        (_, Ok(count)) => (count, left),
        _ => return Err("expected a count times a size, such as `2 x 24GiB`".to_owned()),
    };
    if !(1..=64).contains(&count) {
        return Err("expected from 1 to 64 GPUs".to_owned());
    }
    Ok(vec![size(one)?; count])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_the_units_people_use() {
        assert_eq!(size("22GiB"), Ok(Bytes::gib(22)));
        assert_eq!(size(" 512 MiB "), Ok(Bytes::mib(512)));
        assert_eq!(size("1.5g"), Ok(Bytes::mib(1536)));
        assert_eq!(size("24GB"), Ok(Bytes(24_000_000_000)));
        assert_eq!(size("0"), Ok(Bytes::ZERO));
        assert_eq!(size("22").unwrap_err(), "a size needs a unit: did you mean `22GiB`?");
        for bad in ["", "GiB", "-1GiB", "1..2GiB", "99999999TiB", "1e3GiB", "NaN"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration("1h 30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        assert_eq!(duration("30").unwrap_err(), "a duration needs a unit: did you mean `30s`?");
        for bad in ["", "soon", "-5s", "900 years", "5 fortnights"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_and_ports() {
        assert_eq!(address("localhost:80"), Ok(SocketAddr::from(([127, 0, 0, 1], 80))));
        assert!(address("[::1]:80").is_ok());
        assert!(address("8080").unwrap_err().contains("127.0.0.1:8080"));
        assert!(address("127.0.0.1:80800").unwrap_err().contains("65535"));
        assert_eq!(port_range("8051-8099"), Ok((8051, 8099)));
        assert!(port_range("9-8").unwrap_err().contains("8-9"));
        assert_eq!(sizes("2 x 24GiB"), Ok(vec![Bytes::gib(24); 2]));
        assert_eq!(sizes("24GiB × 3"), Ok(vec![Bytes::gib(24); 3]));
    }
}
