//! Events and actions as one readable line each.

use std::fmt::Debug;

use wharf::scheduler::action::Action;
use wharf::scheduler::event::Event;

const LINE_MAX: usize = 260;

pub fn event(event: &Event) -> String {
    match event {
        Event::CatalogChanged(catalog) => {
            let models: Vec<_> = catalog.models.keys().map(|name| name.as_str()).collect();
            format!("CatalogChanged({})", models.join(" "))
        }
        Event::MemorySeen(Ok(sample)) => {
            let gpus: Vec<String> = sample
                .gpus
                .iter()
                .map(|gpu| {
                    let holders = gpu.holders.iter().map(|holder| match holder.instance {
                        Some(instance) => format!("{instance} {}", holder.bytes),
                        None => format!("stranger {}", holder.bytes),
                    });
                    let holders: Vec<String> = holders.collect();
                    format!("[{}] {} free ({})", gpu.gpu, gpu.free, holders.join(", "))
                })
                .collect();
            let host = sample.host.map(|host| format!("; {} host RAM", host.available));
            let host = host.unwrap_or_default();
            format!("MemorySeen @{}: {}{host}", sample.taken_at.0, gpus.join("; "))
        }
        event => cut(event),
    }
}

pub fn action(action: &Action) -> String {
    match action {
        Action::Record(record) => {
            let evicted: Vec<String> =
                record.evicted.iter().map(|evicted| evicted.instance.to_string()).collect();
            format!(
                "Record {} {} {:?} {:?} instance {:?} evicts [{}] phases {:?} now {:?} {}: {}",
                record.id,
                record.model,
                record.kind,
                record.cause,
                record.instance.map(|id| id.0),
                evicted.join(" "),
                record.phases.iter().map(|(phase, _)| phase.as_str()).collect::<Vec<_>>(),
                record.phase.map(|(phase, _)| phase.as_str()),
                record.outcome.as_ref().map_or("", |outcome| outcome.as_str()),
                record.decision,
            )
        }
        action => cut(action),
    }
}

fn cut(what: &impl Debug) -> String {
    let mut text = format!("{what:?}");
    if text.len() > LINE_MAX {
        let end = (0..=LINE_MAX).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}
