//! `groups:`: models that come together, take turns, or keep others out.

use std::collections::BTreeMap;

use super::capacity::{capacity, fits, need_text, ram_capacity, ram_fits};
use super::catalog::{Group, SwapMode};
use super::decode::{At, Sink, Spot, Unread};
use super::models::{self, ReadModel};
use super::problem::nearest;
use super::routing::prefix_name;
use super::settings::ReadSettings;
use crate::units::ModelName;

pub(super) struct GroupAt {
    pub group: Group,
    pub spot: Spot,
    /// Whether every member is a model that could be read.
    complete: bool,
    /// Where each member stands.
    members: Vec<Spot>,
}

pub(super) fn read(
    at: &At<'_>,
    models: &models::Read,
    aliases: &BTreeMap<String, ModelName>,
    sink: &mut Sink,
) -> Vec<(String, GroupAt)> {
    let mut groups = Vec::new();
    if at.table(sink, "one group per name").is_none() {
        return groups;
    }
    for (key, node) in at.node.entries() {
        let at = at.entry(key, node);
        prefix_name(&key.text, "group", &at.key_spot(), sink);
        if let Some(group) = group(&at, models, aliases, sink) {
            groups.push((key.text.clone(), group));
        }
    }
    groups
}

fn group(
    at: &At<'_>,
    models: &models::Read,
    aliases: &BTreeMap<String, ModelName>,
    sink: &mut Sink,
) -> Option<GroupAt> {
    let mut table = at.table(sink, "`models` and `together`")?;
    let mut names: Vec<ModelName> = Vec::new();
    let mut members = Vec::new();
    let mut complete = true;
    if let Some(list) = table.take("models") {
        let items = list.list(sink, "a list of models").unwrap_or_default();
        if list.is_list() && items.is_empty() {
            sink.error(&list.spot, "this group is empty", "expected `models: [a, b]`");
        }
        for item in items {
            let Some(name) = item.string(sink, "a model's name") else { continue };
            if !models.names.contains(&name) {
                complete = false;
                let known = models.names.iter().map(String::as_str);
                let meant = aliases.get(&name).map(ModelName::as_str);
                let expected = match meant.or_else(|| nearest(&name, known)) {
                    Some(known) => format!("did you mean `{known}`?"),
                    None => "expected a name from `models:`".to_owned(),
                };
                let message = format!("no model is called `{}`", name.escape_debug());
                sink.error(&item.spot, message, expected);
            } else if names.iter().any(|known| known.as_str() == name) {
                sink.error(&item.spot, format!("`{name}` is listed twice"), "remove one");
            } else {
                complete &= models.get(&name).is_some();
                names.push(ModelName::new(name));
                members.push(item.spot);
            }
        }
    } else if !table.has_slip_of("models") && table.key_spot("members").is_none() {
        sink.error(&at.spot, "this group names no models", "expected `models: [a, b]`");
    }
    let mut flag = |key| table.take(key).and_then(|at| at.boolean(sink)).unwrap_or_default();
    let group = Group {
        models: names,
        together: flag("together"),
        exclusive: flag("exclusive"),
        persistent: flag("persistent"),
    };
    table.finish(
        sink,
        &[
            ("swap", Unread::Hint("did you mean `together` (the opposite)?")),
            ("members", Unread::Hint("did you mean `models`?")),
        ],
    );
    Some(GroupAt { group, spot: at.key_spot(), complete, members })
}

/// Whether the groups can do what they say.
pub(super) fn check(
    groups: &BTreeMap<String, GroupAt>,
    models: &models::Read,
    read: &ReadSettings,
    sink: &mut Sink,
) {
    let mut taking_turns: BTreeMap<&ModelName, &str> = BTreeMap::new();
    for (name, at) in groups {
        let members: Vec<&ReadModel> =
            at.group.models.iter().filter_map(|name| models.get(name.as_str())).collect();
        if at.group.together {
            together(name, at, &members, read, sink);
        } else {
            turns(name, at, &members, sink);
            for (model, spot) in at.group.models.iter().zip(&at.members) {
                if let Some(other) = taking_turns.insert(model, name) {
                    let message = format!("`{model}` takes turns in group `{other}` already");
                    sink.error(spot, message, "expected a model in one such group at most");
                }
            }
        }
        if at.group.exclusive {
            for model in models.models.iter().filter(|model| {
                let spec = &model.spec;
                spec.pinned && !spec.is_external() && !at.group.models.contains(&spec.name)
            }) {
                let other = &model.spec.name;
                let message = format!("`{name}` keeps all others out, and `{other}` is pinned");
                sink.error(&at.spot, message, format!("remove `exclusive`, or unpin `{other}`"));
            }
        }
    }
}

fn together(
    name: &str,
    at: &GroupAt,
    members: &[&ReadModel],
    read: &ReadSettings,
    sink: &mut Sink,
) {
    let swap = &read.settings.swap;
    let here = members.iter().filter(|m| !m.spec.is_external() && m.spec.adapter.is_none()).count();
    let most = match (swap.mode, swap.max_concurrent_models) {
        (SwapMode::SingleActive, _) => 1,
        (SwapMode::MultiActive, 0) => usize::MAX,
        (SwapMode::MultiActive, most) => most as usize,
    };
    if here > most {
        let message = format!("group `{name}` has {here} models, and {most} may be loaded at once");
        sink.error(&at.spot, message, "expected fewer, or more `swap.max_concurrent_models`")
            .help("with `swap.mode: single-active` only one model is loaded at a time");
    }
    if at.complete && !fits(members, read) {
        let needs: Vec<String> = members.iter().map(|m| need_text(&m.spec)).collect();
        let message = format!("group `{name}` cannot be resident together");
        sink.error(&at.spot, message, capacity(read)).help(needs.join(", "));
    }
    if at.complete && !ram_fits(members, read) {
        let message = format!("group `{name}` needs more host RAM than there is");
        sink.error(&at.spot, message, ram_capacity(read));
    }
}

/// One at a time: two that must both be loaded, or one that runs in the other, contradict it.
fn turns(name: &str, at: &GroupAt, members: &[&ReadModel], sink: &mut Sink) {
    for (model, spot) in members.iter().zip(&at.members) {
        let base = model.spec.adapter.as_ref().map(|adapter| &adapter.of);
        if let Some(base) = base.filter(|base| at.group.models.contains(base)) {
            let message = format!("`{}` runs in the instance of `{base}`", model.spec.name);
            sink.error(spot, message, "they cannot take turns: remove one of them");
        }
    }
    let names = |wanted: &dyn Fn(&ReadModel) -> bool| -> Vec<&str> {
        members.iter().filter(|m| wanted(m)).map(|m| m.spec.name.as_str()).collect()
    };
    let pinned = names(&|model| model.spec.pinned);
    if pinned.len() > 1 {
        let message = format!("{} are pinned, and take turns in `{name}`", pinned.join(" and "));
        sink.error(&at.spot, message, "expected one pinned model at most");
    }
    let warm = names(&|model| model.spec.warmup);
    if warm.len() > 1 {
        let message = format!("{} are warm-up models that take turns in `{name}`", warm.join(", "));
        sink.warning(&at.spot, message, "only one of them is loaded at a time");
    }
}
