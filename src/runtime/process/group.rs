//! All processes of one instance, and how they are ended.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use super::command::{INSTALLATION, INSTANCE};
use super::pidfd::ExitWatch;
use super::procfs::{self, Stat};
use crate::runtime::Identity;

/// Between two SIGKILLs, for those who were forked meanwhile.
const KILL_EVERY: Duration = Duration::from_millis(100);

/// The processes of one instance: its group, whoever carries its identity, and their descendants.
#[derive(Clone, Debug)]
pub struct Group {
    leader: u32,
    start_ticks: u64,
    installation: String,
    instance: String,
}

impl Group {
    pub fn new(leader: u32, start_ticks: u64, identity: &Identity) -> Group {
        Group {
            leader,
            start_ticks,
            installation: identity.installation.clone(),
            instance: identity.instance.to_string(),
        }
    }

    /// Those that still live.
    fn members(&self) -> Vec<Stat> {
        let all = procfs::all();
        self.reap_orphans(&all);
        // While the leader exists, be it as a zombie, its pid and so the group's number cannot
        // have passed to strangers. Without it, only the environment tells.
        let group_is_ours =
            all.iter().any(|stat| stat.pid == self.leader && stat.start_ticks == self.start_ticks);
        let roots = all
            .iter()
            .filter(|stat| stat.start_ticks >= self.start_ticks && stat.pid != std::process::id())
            .filter(|stat| (group_is_ours && stat.group == self.leader) || self.is_named_by(stat))
            .map(|stat| stat.pid);
        let pids = procfs::with_descendants(&all, roots);
        all.into_iter().filter(|stat| pids.contains(&stat.pid) && !stat.is_gone()).collect()
    }

    fn is_named_by(&self, stat: &Stat) -> bool {
        let env = procfs::wharf_environ(stat.pid);
        env.get(INSTALLATION) == Some(&self.installation)
            && env.get(INSTANCE) == Some(&self.instance)
    }

    /// `members`, off the async threads: a machine may run thousands of processes.
    async fn members_now(&self) -> Vec<Stat> {
        let group = self.clone();
        tokio::task::spawn_blocking(move || group.members()).await.unwrap_or_default()
    }

    /// Signals every member: its group at once (in one call, so that no fork slips through between
    /// two), those outside it as soon as a look has found them, also where nobody waits for what
    /// comes back: who was seen then. As long as the leader is there, the number is ours.
    pub fn signal(&self, signal: Signal) -> JoinHandle<Vec<Stat>> {
        let at_once = self.leader_is_there() && self.signal_group(signal);
        let group = self.clone();
        tokio::task::spawn_blocking(move || group.signal_rest(signal, at_once))
    }

    /// Those outside the group, and the group where that was not done at once.
    fn signal_rest(&self, signal: Signal, at_once: bool) -> Vec<Stat> {
        let members = self.members();
        let in_group = members.iter().any(|stat| stat.group == self.leader);
        if in_group && !at_once {
            self.signal_group(signal);
        }
        for stat in members.iter().filter(|stat| stat.group != self.leader) {
            if let Ok(pid) = i32::try_from(stat.pid) {
                // It may have ended by itself since it was seen.
                let _ = kill(Pid::from_raw(pid), signal);
            }
        }
        members
    }

    fn leader_is_there(&self) -> bool {
        let leader = procfs::stat(self.leader);
        leader.is_some_and(|stat| stat.start_ticks == self.start_ticks && !stat.is_gone())
    }

    fn signal_group(&self, signal: Signal) -> bool {
        i32::try_from(self.leader).is_ok_and(|group| killpg(Pid::from_raw(group), signal).is_ok())
    }

    /// Waits until those `seen` and every other member are gone; `false` at the deadline.
    pub async fn gone_by(&self, mut seen: Vec<Stat>, deadline: Instant) -> bool {
        loop {
            // The environment of one that is ending cannot be read any more, so that a look might
            // miss it: who was seen once is waited for itself.
            let watches: Vec<ExitWatch> =
                seen.iter().map(|stat| ExitWatch::open(stat.pid, stat.start_ticks)).collect();
            let all_ended = join_all(watches.iter().map(ExitWatch::exited));
            if timeout_at(deadline, all_ended).await.is_err() {
                return false;
            }
            // Whether new ones were forked meanwhile.
            seen = self.members_now().await;
            if seen.is_empty() {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
        }
    }

    /// SIGKILL again and again, since members may fork meanwhile. What is left after `limit` (stuck
    /// in the kernel) comes back as an error, readable.
    pub async fn kill(&self, limit: Duration) -> Result<(), String> {
        let deadline = Instant::now() + limit;
        loop {
            let seen = self.signal(Signal::SIGKILL).await.unwrap_or_default();
            let round = deadline.min(Instant::now() + KILL_EVERY);
            if seen.is_empty() || self.gone_by(seen, round).await {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(self.survivors().await);
            }
        }
    }

    /// Takes away dead workers that fell to us when their leader died: to Wharf as the first
    /// process of a container. Everywhere else init does it.
    fn reap_orphans(&self, all: &[Stat]) {
        let dead = |stat: &Stat| stat.is_gone() && stat.group == self.leader;
        let ours = |stat: &Stat| stat.parent == std::process::id() && stat.pid != self.leader;
        for stat in all.iter().filter(|stat| dead(stat) && ours(stat)) {
            if let Ok(pid) = i32::try_from(stat.pid) {
                let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
            }
        }
    }

    async fn survivors(&self) -> String {
        let names: Vec<String> = self
            .members_now()
            .await
            .iter()
            .map(|stat| {
                let command = procfs::command_line(stat.pid);
                format!("pid {} ({command}, state {})", stat.pid, stat.state)
            })
            .collect();
        names.join(", ")
    }
}

/// Every living process of the group that `leader` leads, and their descendants.
pub fn pids_of(leader: u32) -> Vec<u32> {
    let all = procfs::all();
    let roots = all.iter().filter(|stat| stat.group == leader).map(|stat| stat.pid);
    let pids: BTreeSet<u32> = procfs::with_descendants(&all, roots);
    all.iter().filter(|stat| pids.contains(&stat.pid) && !stat.is_gone()).map(|s| s.pid).collect()
}
