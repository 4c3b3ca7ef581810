//! Who holds memory, in words: the command and the container of a process.

/// Longest command shown.
const COMMAND_CHARS_MAX: usize = 80;
const CONTAINER_ID_CHARS: usize = 64;
/// As `docker ps` shows it.
const CONTAINER_ID_SHOWN: usize = 12;

/// `vllm serve org/model (container 0123456789ab)`; says so where the process cannot be seen.
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

/// The program without its folder, and its arguments without secrets: labels reach clients.
fn command(cmdline: &[u8]) -> String {
    let text = String::from_utf8_lossy(cmdline);
    let mut words = text.split(['\0', ' ']).filter(|word| !word.is_empty());
    let program = words.next().unwrap_or_default();
    let mut shown = vec![program.rsplit('/').next().unwrap_or_default().to_owned()];
    let mut hide_next = false;
    for word in words {
        let secret = is_secret(word);
        shown.push(match word.split_once('=') {
            _ if hide_next => "…".to_owned(),
            Some((name, _)) if secret => format!("{name}=…"),
            _ => word.to_owned(),
        });
        hide_next = secret && word.starts_with('-') && !word.contains('=');
    }
    let line = shown.join(" ");
    match line.char_indices().nth(COMMAND_CHARS_MAX) {
        Some((cut, _)) => format!("{}…", &line[..cut]),
        None => line,
    }
}

fn is_secret(word: &str) -> bool {
    let name = word.split('=').next().unwrap_or_default().to_ascii_lowercase();
    ["key", "token", "secret", "passw"].iter().any(|part| name.contains(part))
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
            "vllm serve org/m --api-key … --hf-token=…"
        );
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
