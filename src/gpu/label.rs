//! Who holds memory, in words: the command and the container of a process.

use crate::runtime::redact::Secrets;

/// Longest command shown.
const COMMAND_CHARS_MAX: usize = 80;
const CONTAINER_ID_CHARS: usize = 64;
/// As `docker ps` shows it.
const CONTAINER_ID_SHOWN: usize = 12;

/// `vllm serve (container 0123456789ab)`; says so where the process cannot be seen.
pub fn holder(pid: u32) -> String {
    let read = |file| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let mut label = command(&read("cmdline"));
    if label.is_empty() {
        label = String::from_utf8_lossy(&read("comm")).trim().to_owned();
    }
    if label.is_empty() {
        return "not visible from here (another pid namespace, or just ended)".to_owned();
    }
    if let Some(id) = container(&String::from_utf8_lossy(&read("cgroup"))) {
        label.push_str(&format!(" (container {id})"));
    }
    label
}

/// The program and what it runs, such as `vllm serve` or `python3 train.py`. Labels reach every
/// client, and further arguments are for those who may read them.
fn command(cmdline: &[u8]) -> String {
    let text = String::from_utf8_lossy(cmdline);
    let mut words = text.split(['\0', ' ']).filter(|word| !word.is_empty());
    let name = |word: &str| word.rsplit('/').next().unwrap_or_default().to_owned();
    let mut line = words.next().map(name).unwrap_or_default();
    let what = match words.next() {
        Some("-m") => words.next().map(|module| format!("-m {module}")),
        Some(word) if !word.starts_with('-') => Some(name(word)),
        _ => None,
    };
    line.extend(what.map(|what| format!(" {what}")));
    let line = Secrets::default().redact(&line);
    match line.char_indices().nth(COMMAND_CHARS_MAX) {
        Some((cut, _)) => format!("{}…", &line[..cut]),
        None => line.into_owned(),
    }
}

/// The short id of the container that a cgroup path names (docker, containerd, podman, Kubernetes).
fn container(cgroup: &str) -> Option<String> {
    cgroup
        .split(|c: char| !c.is_ascii_hexdigit())
        .find(|run| run.len() == CONTAINER_ID_CHARS)
        .map(|id| id[..CONTAINER_ID_SHOWN].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_short_and_hold_no_secret() {
        assert_eq!(
            command(b"/usr/bin/vllm\0serve\0org/m\0--api-key\0s3cret\0--hf-token=abc\0"),
            "vllm serve"
        );
        for (cmdline, shown) in [
            ("python3\0-m\0vllm.entrypoints\0--x", "python3 -m vllm.entrypoints"),
            ("python3\0/home/me/train.py\0hf_AbCdEf0123456789", "python3 train.py"),
            ("tool\0hf_AbCdEf0123456789", "tool ***"),
            ("curl\0-H\0Authorization: Bearer abcdefghijkl", "curl"),
        ] {
            assert_eq!(command(cmdline.as_bytes()), shown);
        }
        let long = command(format!("python3\0{}", "é".repeat(500)).as_bytes());
        assert_eq!(long.chars().count(), COMMAND_CHARS_MAX + 1);
        assert_eq!(command(b""), "");
    }

    #[test]
    fn containers_are_found_in_both_cgroup_versions() {
        let id = "0123456789abcdef".repeat(4);
        for path in [
            format!("12:memory:/docker/{id}\n0::/"),
            format!("0::/system.slice/docker-{id}.scope"),
            format!("0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{id}.scope"),
        ] {
            assert_eq!(container(&path).as_deref(), Some("0123456789ab"), "{path}");
        }
        assert_eq!(container("0::/user.slice/session-2.scope"), None);
    }

    #[test]
    fn a_process_that_cannot_be_seen_is_said_to_be_so() {
        assert!(holder(u32::MAX).contains("not visible"));
        assert!(!holder(std::process::id()).contains("not visible"));
    }
}
