//! Finding again what an earlier Wharf started.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::command::{INSTALLATION, LOG_FILE, identity_of};
use super::procfs::{self, Stat};
use crate::runtime::Identity;
use crate::units::InstanceId;

/// What is left of one instance.
#[derive(Debug)]
pub struct Remains {
    pub identity: Identity,
    /// Pid and start time. Where the leader is dead, its pid (known as the group's number) and the
    /// start of its oldest member.
    pub leader: (u32, u64),
    pub alive: bool,
    pub log: Option<PathBuf>,
}

struct Member {
    stat: Stat,
    identity: Identity,
    log: Option<PathBuf>,
}

pub fn scan(installation: &str) -> Vec<Remains> {
    let mut instances: BTreeMap<InstanceId, Vec<Member>> = BTreeMap::new();
    let own = std::process::id();
    for stat in procfs::all().into_iter().filter(|stat| !stat.is_gone() && stat.pid != own) {
        let env = procfs::wharf_environ(stat.pid);
        if env.get(INSTALLATION).is_none_or(|found| found != installation) {
            continue;
        }
        let Some(identity) = identity_of(&env) else { continue };
        let log = env.get(LOG_FILE).map(PathBuf::from);
        instances.entry(identity.instance).or_default().push(Member { stat, identity, log });
    }
    instances.into_values().filter_map(remains).collect()
}

fn remains(mut members: Vec<Member>) -> Option<Remains> {
    members.sort_by_key(|member| (member.stat.start_ticks, member.stat.pid));
    let leads = |member: &Member| member.stat.pid == member.stat.group;
    let alive = members.iter().position(leads);
    let member = members.into_iter().nth(alive.unwrap_or(0))?;
    Some(Remains {
        identity: member.identity,
        leader: (member.stat.group, member.stat.start_ticks),
        alive: alive.is_some(),
        log: member.log,
    })
}
