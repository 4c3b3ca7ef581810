//! Host RAM, from `/proc/meminfo`.
//!
//! Not from Wharf's own cgroup: where Wharf runs in a limited container, its engines are that
//! container's siblings (or live in containers with limits of their own), and what they share is
//! the machine. Who wants less to be used declares it: `ram: { total }`.

use crate::scheduler::event::HostMemory;
use crate::units::Bytes;

/// `None` where the kernel does not tell.
pub fn host_memory() -> Option<HostMemory> {
    parse(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse(meminfo: &str) -> Option<HostMemory> {
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
        Some(Bytes(kib.saturating_mul(1024)))
    };
    Some(HostMemory { total: kib("MemTotal")?, available: kib("MemAvailable")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn total_and_available_are_read() {
        let meminfo = "MemTotal:       16384000 kB\nMemFree:          102400 kB\n\
                       MemAvailable:    8192000 kB\nBuffers:            2048 kB\n";
        let host = parse(meminfo).expect("both lines are there");
        assert_eq!(host.total, Bytes(16_384_000 * 1024));
        assert_eq!(host.available, Bytes(8_192_000 * 1024));
    }

    #[test]
    fn what_an_old_kernel_does_not_tell_is_unknown() {
        assert_eq!(parse("MemTotal: 16384000 kB\nMemFree: 102400 kB\n"), None);
        assert_eq!(parse(""), None);
    }
}
