//! What /proc tells about processes: identity, groups, environments, listeners.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};

use crate::runtime::redact::Secrets;

/// The columns of /proc/PID/stat that tell one process from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    pub pid: u32,
    pub state: char,
    pub parent: u32,
    pub group: u32,
    pub threads: u32,
    /// Field 22, clock ticks since boot: tells a reused pid from the one meant.
    pub start_ticks: u64,
}

impl Stat {
    /// Dead, though perhaps not yet reaped. A leader whose other threads still run is not.
    pub fn is_gone(&self) -> bool {
        matches!(self.state, 'Z' | 'X') && self.threads <= 1
    }
}

pub fn stat(pid: u32) -> Option<Stat> {
    // One read: to ask for its size (0) and to grow a buffer costs several times the line itself.
    let mut line = [0; 1024];
    let read = fs::File::open(format!("/proc/{pid}/stat")).ok()?.read(&mut line).ok()?;
    parse_stat(&String::from_utf8_lossy(line.get(..read)?))
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The command stands in parentheses and may hold spaces and parentheses itself.
    let (pid, rest) = text.split_once(" (")?;
    let (_, rest) = rest.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').take(20).collect();
    let number = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
    Some(Stat {
        pid: pid.parse().ok()?,
        state: fields.first()?.chars().next()?,
        parent: u32::try_from(number(1)?).ok()?,
        group: u32::try_from(number(2)?).ok()?,
        threads: u32::try_from(number(17)?).ok()?,
        start_ticks: number(19)?,
    })
}

/// Every process that can be seen, zombies included.
pub fn all() -> Vec<Stat> {
    pids().filter_map(stat).collect()
}

fn pids() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// The `WHARF_*` part of a process's first environment; empty where it may not be read.
pub fn wharf_environ(pid: u32) -> BTreeMap<String, String> {
    environ_where(pid, |entry| entry.starts_with(b"WHARF_"))
}

/// A process's whole first environment: it holds secrets. Empty where it may not be read.
pub fn environ(pid: u32) -> BTreeMap<String, String> {
    environ_where(pid, |_| true)
}

fn environ_where(pid: u32, wanted: impl Fn(&[u8]) -> bool) -> BTreeMap<String, String> {
    let bytes = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    bytes
        .split(|byte| *byte == 0)
        .filter(|entry| wanted(entry))
        .filter_map(|entry| {
            let (key, value) = std::str::from_utf8(entry).ok()?.split_once('=')?;
            Some((key.to_owned(), value.to_owned()))
        })
        .collect()
}

/// A process's arguments, its program first: they may hold secrets.
pub fn args(pid: u32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = bytes.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    words.map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// Command line for messages, cut to a readable length.
pub fn command_line(pid: u32) -> String {
    const CHARS_MAX: usize = 120;
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&bytes).replace('\0', " ");
    let line = match line.trim() {
        "" => fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default(),
        line => line.to_owned(),
    };
    Secrets::default().redact(line.trim()).chars().take(CHARS_MAX).collect()
}

/// `roots` and everything that descends from them, as far as `all` shows it.
pub fn with_descendants(all: &[Stat], roots: impl Iterator<Item = u32>) -> BTreeSet<u32> {
    let mut found: BTreeSet<u32> = roots.collect();
    loop {
        let before = found.len();
        found.extend(
            all.iter()
                .filter(|stat| found.contains(&stat.parent))
                .map(|stat| stat.pid)
                .collect::<Vec<_>>(),
        );
        if found.len() == before {
            return found;
        }
    }
}

/// The process that listens on a TCP port of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Occupant {
    pub pid: u32,
    pub command: String,
}

impl std::fmt::Display for Occupant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pid {} ({})", self.pid, self.command)
    }
}

/// Whether every socket that listens on `port` is one of this process: the usual case, told
/// without a look at everybody.
pub fn listens_alone(pid: u32, port: u16) -> bool {
    let mut wanted = sockets_on(port);
    if wanted.is_empty() {
        return false;
    }
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        if let Ok(link) = fs::read_link(fd.path())
            && let Some(link) = link.to_str()
        {
            wanted.remove(link);
        }
    }
    wanted.is_empty()
}

/// Those that listen, as links in /proc/PID/fd show them.
fn sockets_on(port: u16) -> BTreeSet<String> {
    let mut inodes = BTreeSet::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let Ok(table) = fs::File::open(table) else { continue };
        inodes.extend(listening_inodes(BufReader::new(table).lines().map_while(Result::ok), port));
    }
    inodes.iter().map(|inode| format!("socket:[{inode}]")).collect()
}

/// Who listens on `port`, on any address. Empty where nobody does or where the owner may not be
/// seen (another user's process). Several, where a socket is shared.
pub fn listeners(port: u16) -> Vec<Occupant> {
    let links = sockets_on(port);
    if links.is_empty() {
        return Vec::new();
    }
    pids()
        .filter(|pid| {
            let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
            fds.flatten().any(|fd| {
                fs::read_link(fd.path())
                    .is_ok_and(|link| link.to_str().is_some_and(|link| links.contains(link)))
            })
        })
        .map(|pid| Occupant { pid, command: command_line(pid) })
        .collect()
}

/// The kernel lists those that listen first; behind them may come the connections of a busy machine.
fn listening_inodes(table: impl Iterator<Item = String>, port: u16) -> Vec<u64> {
    const LISTEN: &str = "0A";
    table
        .skip(1)
        .map_while(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (_, local_port) = fields.get(1)?.rsplit_once(':')?;
            let is_ours = u16::from_str_radix(local_port, 16).ok()? == port;
            let inode = is_ours.then(|| fields.get(9)?.parse().ok()).flatten();
            (*fields.get(3)? == LISTEN).then_some(inode)
        })
        .flatten()
        .collect()
}

/// Processes that the kernel killed for want of memory since boot, anywhere on the machine.
pub fn oom_kills() -> Option<u64> {
    let text = fs::read_to_string("/proc/vmstat").ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_spaces_and_parentheses_is_no_obstacle() {
        let line = "4711 (a (b) c) S 1 4711 4711 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 3 0 998877 1 2";
        let stat = parse_stat(line).expect("a stat line");
        assert_eq!(
            stat,
            Stat {
                pid: 4711,
                state: 'S',
                parent: 1,
                group: 4711,
                threads: 3,
                start_ticks: 998_877
            }
        );
        assert!(!stat.is_gone());
    }

    #[test]
    fn a_dead_leader_with_living_threads_is_not_gone() {
        let mut stat = stat(std::process::id()).expect("own stat");
        stat.state = 'Z';
        stat.threads = 2;
        assert!(!stat.is_gone());
        stat.threads = 1;
        assert!(stat.is_gone());
    }

    #[test]
    fn own_listener_is_found() {
        let own = std::process::id();
        let listed = |port| listeners(port).iter().any(|occupant| occupant.pid == own);
        // The kernel's table may miss a socket while others come and go, and another test may be
        // given the port.
        let until = |what: &str, is_so: &dyn Fn() -> bool| {
            let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while !is_so() {
                assert!(std::time::Instant::now() < end, "{what}");
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        };
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        until("it is listed", &|| listed(port) && listens_alone(own, port));
        assert!(!listens_alone(1, port), "somebody else does");
        drop(listener);
        until("it is closed", &|| !listed(port) && !listens_alone(own, port));
    }

    #[test]
    fn only_listening_sockets_count() {
        let table = "  sl  local_address rem_address   st\n\
            0: 0100007F:4653 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 77 1\n\
            1: 0100007F:4653 0100007F:D3C2 01 00000000:00000000 00:00000000 00000000     0        0 78 1";
        let inodes = |port| listening_inodes(table.lines().map(str::to_owned), port);
        assert_eq!(inodes(0x4653), [77]);
        assert_eq!(inodes(0x4654), Vec::<u64>::new());
    }
}
