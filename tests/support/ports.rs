//! Ports below those that the kernel gives to outgoing connections, so that none of these takes one
//! before it is listened on; the process id keeps test programs apart that run side by side.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};

/// A port that nobody has at the moment.
pub fn free_port() -> u16 {
    free_ports(1)
}

/// The first of `count` neighbouring ports that nobody has.
pub fn free_ports(count: u16) -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let step = NEXT.fetch_add(count, Ordering::Relaxed);
        let offset = (std::process::id() as u16).wrapping_mul(61).wrapping_add(step) % 9000;
        let first = 10_000 + offset;
        let free = |port| TcpListener::bind(("127.0.0.1", port)).is_ok();
        if (first..first + count).all(free) {
            return first;
        }
    }
}
