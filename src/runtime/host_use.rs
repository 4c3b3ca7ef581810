//! Host RAM of a container or of processes, as the kernel counts it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::scheduler::event::HostUse;
use crate::units::Bytes;

/// Where Docker's containers have their memory cgroup: unified or not, by systemd or by itself.
const PLACES: [(&str, &str, &str); 4] = [
    ("/sys/fs/cgroup/system.slice/docker-", ".scope", "memory.current"),
    ("/sys/fs/cgroup/docker/", "", "memory.current"),
    ("/sys/fs/cgroup/memory/system.slice/docker-", ".scope", "memory.usage_in_bytes"),
    ("/sys/fs/cgroup/memory/docker/", "", "memory.usage_in_bytes"),
];

/// `None` where the cgroup is not to be seen from here (Wharf in a container, rootless Docker).
pub fn of_container(id: &str) -> Option<HostUse> {
    PLACES.iter().find_map(|(before, after, usage)| {
        let folder = PathBuf::from(format!("{before}{id}{after}"));
        of_cgroup(&folder, usage)
    })
}

fn of_cgroup(folder: &Path, usage: &str) -> Option<HostUse> {
    let usage = fs::read_to_string(folder.join(usage)).ok()?.trim().parse().ok()?;
    let stat = fs::read_to_string(folder.join("memory.stat")).ok()?;
    let fields = stat.lines().filter_map(|line| {
        let (name, value) = line.split_once(' ')?;
        Some((name, value.parse().ok()?))
    });
    let fields: BTreeMap<&str, u64> = fields.collect();
    Some(of_counters(usage, |name| fields.get(name).copied()))
}

/// From a cgroup's counters, of the first or second kind. Files that nobody uses any more do not
/// count (as in `docker stats`).
pub fn of_counters(usage: u64, counter: impl Fn(&str) -> Option<u64>) -> HostUse {
    let either = |second: &str, first: &str| counter(second).or_else(|| counter(first));
    let held = either("anon", "total_rss").unwrap_or_default()
        + either("shmem", "total_shmem").unwrap_or_default();
    let unused = either("inactive_file", "total_inactive_file").unwrap_or_default();
    HostUse { held: Bytes(held), resident: Bytes(usage.saturating_sub(unused).max(held)) }
}

/// Of processes that belong together: what they share is counted once, as far as it can be told.
pub fn of_processes(pids: impl Iterator<Item = u32>) -> Option<HostUse> {
    let (mut anonymous, mut shared, mut files) = (0, 0, 0);
    for status in pids.filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/status")).ok()) {
        let bytes = |name: &str| kib(&status, name).unwrap_or_default() * 1024;
        anonymous += bytes("RssAnon");
        shared = shared.max(bytes("RssShmem"));
        files = files.max(bytes("RssFile"));
    }
    let held = anonymous + shared;
    (held > 0).then_some(HostUse { held: Bytes(held), resident: Bytes(held + files) })
}

fn kib(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_counts_what_it_holds_and_the_files_in_use() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect(name);
        write("memory.current", "1000\n");
        write("memory.stat", "anon 300\nfile 600\nshmem 100\ninactive_file 250\n");
        let used = of_cgroup(folder.path(), "memory.current");
        assert_eq!(used, Some(HostUse { held: Bytes(400), resident: Bytes(750) }));
        write("memory.usage_in_bytes", "2000\n");
        write("memory.stat", "cache 9\ntotal_rss 500\ntotal_inactive_file 1800\n");
        let used = of_cgroup(folder.path(), "memory.usage_in_bytes");
        assert_eq!(used, Some(HostUse { held: Bytes(500), resident: Bytes(500) }));
        assert_eq!(of_container("nowhere"), None);
    }

    #[test]
    fn processes_hold_what_they_allocate() {
        let of = |pid: u32| of_processes([pid].into_iter()).expect("it can be read");
        let block = std::hint::black_box(vec![1_u8; 64 << 20]);
        let own = of(std::process::id());
        assert!(own.held >= Bytes::mib(64) && own.resident >= own.held, "{own:?}");
        // Other tests of this process hold and free what they like; this one holds next to nothing.
        let mut small = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let its = of(small.id());
        small.kill().and_then(|()| small.wait()).expect("it ends");
        assert!(its.held < Bytes::mib(16) && its.resident >= its.held, "{its:?}");
        assert_eq!(block.len(), 64 << 20);
        assert_eq!(of_processes([u32::MAX].into_iter()), None);
    }
}
