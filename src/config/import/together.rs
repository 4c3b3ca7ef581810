//! Which models llama-swap runs side by side: groups, profiles, the matrix, and its default of one
//! at a time, as Wharf's `swap.mode` and `groups`.

use std::collections::{BTreeMap, BTreeSet};

use super::yaml::{Entry, Out};
use super::{Draft, File, Keys, texts};
use crate::config::tree::Node;

/// What is known of the models before.
#[derive(Default)]
pub(super) struct Wanted {
    pub models: Vec<String>,
    /// Fixed ports.
    pub ports: Vec<(String, u16)>,
}

/// A group of the result.
struct Group {
    name: String,
    models: Vec<String>,
    together: bool,
    exclusive: bool,
    persistent: bool,
}

impl Group {
    fn turns(name: &str, models: Vec<String>) -> Group {
        let name = name.replace('/', "-");
        Group { name, models, together: false, exclusive: false, persistent: false }
    }

    fn entry(self) -> Entry {
        let mut entries = vec![Entry::new("models", Out::texts(&self.models))];
        for (key, on) in [
            ("together", self.together),
            ("exclusive", self.exclusive),
            ("persistent", self.persistent),
        ] {
            if on {
                entries.push(Entry::new(key, Out::plain("true")));
            }
        }
        Entry::new(&self.name, Out::Map(entries))
    }
}

pub(super) fn convert(
    keys: &mut Keys<'_>,
    routing: Option<&Node>,
    wanted: &mut Wanted,
    file: &File,
    draft: &mut Draft,
) {
    let (mut groups_node, mut matrix_node) =
        (keys.take("groups").map(|(_, node)| node), keys.take("matrix").map(|(_, node)| node));
    if let Some(routing) = routing {
        let router = routing.get("router");
        let settings = router.and_then(|router| router.get("settings"));
        let uses_matrix =
            router.and_then(|router| router.get("use")).and_then(Node::text) == Some("matrix");
        groups_node = groups_node.or_else(|| settings?.get("groups").filter(|_| !uses_matrix));
        matrix_node = matrix_node.or_else(|| settings?.get("matrix").filter(|_| uses_matrix));
        priorities(routing, draft);
    }
    let profiles = keys.take("profiles").map(|(_, node)| node);
    let mut groups = match (matrix_node, groups_node, profiles) {
        (Some(matrix), ..) => self::matrix(matrix, wanted, file, draft),
        (None, Some(groups), _) => self::groups(groups, wanted, file, draft),
        (None, None, Some(profiles)) => self::profiles(profiles, wanted),
        (None, None, None) => Vec::new(),
    };
    let one_at_a_time = groups.is_empty() && matrix_node.is_none() && groups_node.is_none();
    if one_at_a_time {
        single_active(draft);
    }
    ports(one_at_a_time, &mut groups, wanted, draft);
    for group in &mut groups {
        // Names mean one thing.
        if wanted.models.contains(&group.name) {
            group.name.push_str("-group");
        }
    }
    if !groups.is_empty() {
        let groups = groups.into_iter().map(Group::entry).collect();
        draft.bottom.push(Entry::new("groups", Out::Map(groups)));
    }
}

fn single_active(draft: &mut Draft) {
    let mut mode = Entry::new("mode", Out::plain("single-active"));
    mode.comments = vec![
        "llama-swap runs one model at a time where nothing says otherwise; `multi-active` keeps"
            .to_owned(),
        "as many as fit into the GPUs.".to_owned(),
    ];
    match draft.top.iter_mut().find(|entry| entry.key == "swap") {
        Some(Entry { value: Out::Map(swap), .. }) => swap.insert(0, mode),
        _ => draft.top.push(Entry::new("swap", Out::Map(vec![mode]))),
    }
}

/// `routing.scheduler.settings.fifo.priority`
fn priorities(routing: &Node, draft: &mut Draft) {
    let path = ["scheduler", "settings", "fifo", "priority"];
    let node = path.iter().try_fold(routing, |node, key| node.get(key));
    for (key, value) in node.map(Node::entries).unwrap_or_default() {
        let priority = match value.text().and_then(|text| text.parse::<i64>().ok()) {
            Some(1..) => "high",
            Some(..=-1) => "low",
            _ => continue,
        };
        if let Some(model) = draft.models.iter_mut().find(|model| model.name == key.text) {
            model.set("priority", Out::plain(priority));
        }
    }
}

/// The oldest form: each profile is loaded whole, and everything else leaves.
fn profiles(node: &Node, wanted: &Wanted) -> Vec<Group> {
    let mut rest: BTreeSet<&String> = wanted.models.iter().collect();
    let mut groups = Vec::new();
    for (key, node) in node.entries() {
        let mut models = texts(node);
        models.retain(|model| wanted.models.contains(model));
        rest.retain(|model| !models.contains(model));
        let group = Group::turns(&key.text, models);
        groups.push(Group { together: true, exclusive: true, ..group });
    }
    alone("others", rest.into_iter().cloned().collect(), true, &mut groups);
    groups
}

/// Models of which one runs at a time, and then nothing else does.
fn alone(name: &str, models: Vec<String>, exclusive: bool, groups: &mut Vec<Group>) {
    if models.len() > 1 || exclusive && models.len() == 1 {
        groups.push(Group { exclusive, ..Group::turns(name, models) });
    }
}

fn groups(node: &Node, wanted: &Wanted, file: &File, draft: &mut Draft) -> Vec<Group> {
    let mut rest: BTreeSet<String> = wanted.models.iter().cloned().collect();
    let mut groups = Vec::new();
    // Exclusive groups whose members take turns: one model of all of them at a time.
    let mut turns: Vec<String> = Vec::new();
    let any_persistent = node
        .entries()
        .iter()
        .any(|(_, g)| g.get("persistent").and_then(Node::text) == Some("true"));
    for (key, node) in node.entries() {
        let mut group = Keys::of(node, &format!("groups.{}", key.text));
        let flag = |group: &mut Keys<'_>, key, usual| group.flag(key).unwrap_or(usual);
        let swap = flag(&mut group, "swap", true);
        let exclusive = flag(&mut group, "exclusive", true);
        let persistent = flag(&mut group, "persistent", false);
        let mut models = group.take("members").map(|(_, node)| texts(node)).unwrap_or_default();
        models.retain(|model| wanted.models.contains(model));
        rest.retain(|model| !models.contains(model));
        let path = group.path.clone();
        group.rest(file, draft);
        match (swap, exclusive, persistent) {
            (true, true, false) => turns.extend(models),
            (true, _, persistent) => {
                groups.push(Group { persistent, ..Group::turns(&key.text, models) });
            }
            (false, _, true) => {
                // A group of one keeps its member without tying it to the others.
                let count = models.len();
                for (at, model) in models.into_iter().enumerate() {
                    let name = if count == 1 {
                        key.text.clone()
                    } else {
                        format!("{}-{}", key.text, at + 1)
                    };
                    groups.push(Group { persistent: true, ..Group::turns(&name, vec![model]) });
                }
            }
            (false, true, false) => {
                let why = "its members run side by side, and nothing else does: here they are \
                           loaded together, at the first request for one of them";
                draft.note(file, key.place, &path, why, "leave the group out to load them singly");
                let group = Group::turns(&key.text, models);
                groups.push(Group { together: true, exclusive: !any_persistent, ..group });
            }
            // Side by side is what Wharf does anyway, as far as they fit.
            (false, false, false) => {}
        }
    }
    turns.extend(rest);
    if any_persistent && turns.len() < wanted.models.len() {
        let why = "beside a persistent group no other can be exclusive: of the models in \
                   `one-at-a-time` one runs at a time, and others may run beside it";
        draft.note(file, node.place, "groups", why, "memory decides what else stays");
    }
    alone("one-at-a-time", turns, !any_persistent, &mut groups);
    groups
}

/// Combinations of models that may run side by side.
type Sets = Vec<BTreeSet<String>>;

fn matrix(node: &Node, wanted: &Wanted, file: &File, draft: &mut Draft) -> Vec<Group> {
    let mut keys = Keys::of(node, "matrix");
    let vars: BTreeMap<&str, &str> = keys
        .take("vars")
        .map(|(_, node)| node.entries())
        .unwrap_or_default()
        .iter()
        .filter_map(|(key, node)| Some((key.text.as_str(), node.text()?)))
        .collect();
    keys.leave(
        "evict_costs",
        "Wharf measures how long each model takes to come back",
        "`priority: high` keeps a model longer",
        file,
        draft,
    );
    let mut sets = Sets::new();
    if let Some((_, node)) = keys.take("sets") {
        let named: BTreeMap<&str, &str> = node
            .entries()
            .iter()
            .filter_map(|(key, node)| Some((key.text.as_str(), node.text()?)))
            .collect();
        for (key, node) in node.entries() {
            let parsed = Expression { vars: &vars, named: &named, depth: 0 }
                .sets(node.text().unwrap_or_default());
            match parsed {
                Some(found) => sets.extend(found),
                None => {
                    let path = format!("matrix.sets.{}", key.text);
                    let why = "its expression cannot be read";
                    draft.note(file, key.place, &path, why, "write it as a group by hand");
                }
            }
        }
    }
    keys.rest(file, draft);
    let (groups, exact) = as_groups(&sets, &wanted.models);
    if !exact {
        let why = "its sets cannot be said as models that take turns";
        let what = "Wharf decides by measured memory: what fits together stays together";
        draft.note(file, node.place, "matrix.sets", why, what);
    }
    groups
}

/// Models that are never side by side take turns. Whether that says all that the sets say.
fn as_groups(sets: &Sets, models: &[String]) -> (Vec<Group>, bool) {
    let beside = |a: &String, b: &String| sets.iter().any(|set| set.contains(a) && set.contains(b));
    let (alone, others): (Vec<&String>, Vec<&String>) =
        models.iter().partition(|model| !models.iter().any(|m| m != *model && beside(m, model)));
    let mut groups = Vec::new();
    let mut exact = true;
    let mut cliques: Vec<Vec<&String>> = Vec::new();
    for model in &others {
        let home = cliques.iter_mut().find(|clique| clique.iter().any(|m| !beside(m, model)));
        match home {
            Some(clique) => clique.push(model),
            None => cliques.push(vec![model]),
        }
    }
    for (at, clique) in cliques.iter().enumerate() {
        for (i, a) in clique.iter().enumerate() {
            // Members must exclude each other, and nobody outside.
            exact &= clique[i + 1..].iter().all(|b| !beside(a, b));
            exact &= cliques
                .iter()
                .enumerate()
                .all(|(other, clique)| other == at || clique.iter().all(|b| beside(a, b)));
        }
    }
    if !exact {
        cliques.clear();
    }
    for clique in cliques.into_iter().filter(|clique| clique.len() > 1) {
        let name = format!("turns-{}", groups.len() + 1);
        groups.push(Group::turns(&name, clique.into_iter().cloned().collect()));
    }
    self::alone("alone", alone.into_iter().cloned().collect(), true, &mut groups);
    (groups, exact)
}

/// `(a | b) & c`, `+name`: what may run side by side.
struct Expression<'e> {
    vars: &'e BTreeMap<&'e str, &'e str>,
    named: &'e BTreeMap<&'e str, &'e str>,
    depth: u8,
}

/// Expressions that expand to more are not followed.
const MOST_SETS: usize = 1000;

impl Expression<'_> {
    fn sets(&self, text: &str) -> Option<Sets> {
        let mut rest = text.trim();
        let sets = self.any(&mut rest)?;
        rest.is_empty().then_some(sets)
    }

    fn any(&self, rest: &mut &str) -> Option<Sets> {
        let mut sets = self.all(rest)?;
        while let Some(after) = rest.strip_prefix('|') {
            *rest = after.trim_start();
            sets.extend(self.all(rest)?);
        }
        Some(sets)
    }

    fn all(&self, rest: &mut &str) -> Option<Sets> {
        let mut sets = self.one(rest)?;
        while let Some(after) = rest.strip_prefix('&') {
            *rest = after.trim_start();
            let more = self.one(rest)?;
            sets = sets.iter().flat_map(|a| more.iter().map(move |b| a | b)).collect();
            if sets.len() > MOST_SETS {
                return None;
            }
        }
        Some(sets)
    }

    fn one(&self, rest: &mut &str) -> Option<Sets> {
        if let Some(after) = rest.strip_prefix('(') {
            *rest = after.trim_start();
            let sets = self.any(rest)?;
            *rest = rest.strip_prefix(')')?.trim_start();
            return Some(sets);
        }
        let is_ref = rest.starts_with('+');
        let text = rest.trim_start_matches('+');
        let end = text.find(|c: char| "&|()+".contains(c) || c.is_whitespace());
        let (name, after) = text.split_at(end.unwrap_or(text.len()));
        if name.is_empty() {
            return None;
        }
        *rest = after.trim_start();
        if is_ref {
            // A set that names itself has no end.
            let inner =
                Expression { depth: self.depth.checked_add(1).filter(|d| *d < 16)?, ..*self };
            return inner.sets(self.named.get(name)?);
        }
        let model = self.vars.get(name).copied().unwrap_or(name);
        Some(vec![BTreeSet::from([model.to_owned()])])
    }
}

/// Two models on one fixed port take turns; where they must run together, or the port is Wharf's
/// own, Wharf chooses the port instead.
fn ports(one_at_a_time: bool, groups: &mut Vec<Group>, wanted: &Wanted, draft: &mut Draft) {
    let mut by_port: BTreeMap<u16, Vec<&String>> = BTreeMap::new();
    for (model, port) in &wanted.ports {
        by_port.entry(*port).or_default().push(model);
    }
    for (port, models) in by_port {
        let is_wharfs = matches!(port, 8080 | 8888 | 18_051..=18_999);
        let take_turns = one_at_a_time
            || groups.iter().any(|g| !g.together && models.iter().all(|m| g.models.contains(m)));
        if !is_wharfs && (models.len() == 1 || take_turns) {
            continue;
        }
        let taken = |model: &&&String| groups.iter().any(|g| g.models.contains(**model));
        if !is_wharfs && !models.iter().any(|model| taken(&model)) {
            let models = models.into_iter().cloned().collect();
            groups.push(Group::turns(&format!("port-{port}"), models));
            continue;
        }
        for model in models {
            free_port(model, port, draft);
        }
    }
}

/// `--port 8999` → `--port ${PORT}`.
fn free_port(name: &str, port: u16, draft: &mut Draft) {
    let Some(model) = draft.models.iter_mut().find(|model| model.name == *name) else { return };
    let process = model.entries.iter_mut().find(|entry| entry.key == "process");
    if let Some(Entry { value: Out::Map(process), .. }) = process
        && let Some(Entry { value: Out::Scalar(cmd), .. }) = process.first_mut()
    {
        let written = cmd.clone();
        for joint in [" ", "="] {
            *cmd = cmd.replace(&format!("--port{joint}{port}"), &format!("--port{joint}${{PORT}}"));
        }
        if *cmd != written {
            let inner = serde_json::from_str::<String>(cmd).unwrap_or_else(|_| cmd.clone());
            *cmd = match Out::text(inner) {
                Out::Scalar(text) => text,
                Out::List(_) | Out::Map(_) => written,
            };
            model.entries.retain(|entry| entry.key != "port");
            model.comment(format!("Port {port} was fixed; Wharf chooses one, so that it is free."));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets(text: &str) -> Vec<String> {
        let vars = BTreeMap::from([("a", "model-a"), ("b", "model-b")]);
        let named = BTreeMap::from([("both", "a & b"), ("round", "+round")]);
        let sets = Expression { vars: &vars, named: &named, depth: 0 }.sets(text);
        let line = |set: BTreeSet<String>| set.into_iter().collect::<Vec<_>>().join("+");
        sets.map_or_else(|| vec!["none".to_owned()], |sets| sets.into_iter().map(line).collect())
    }

    #[test]
    fn expressions_expand_to_sets() {
        assert_eq!(sets("a"), ["model-a"]);
        assert_eq!(sets("(a | b) & (c|d)"), ["c+model-a", "d+model-a", "c+model-b", "d+model-b"]);
        assert_eq!(sets("+both & v"), ["model-a+model-b+v"]);
        for bad in ["", "a &", "(a", "a b", "+no", "+round"] {
            assert_eq!(sets(bad), ["none"], "{bad}");
        }
    }

    #[test]
    fn sets_become_models_that_take_turns() {
        let set = |names: &str| names.split('+').map(str::to_owned).collect::<BTreeSet<_>>();
        let models: Vec<String> = ["g", "q", "v", "L"].map(str::to_owned).to_vec();
        let (groups, exact) = as_groups(&vec![set("g+v"), set("q+v"), set("L")], &models);
        assert!(exact);
        assert_eq!(groups[0].models, ["g", "q"]);
        assert_eq!(
            (groups[1].models.as_slice(), groups[1].exclusive),
            (&["L".to_owned()][..], true)
        );
        let (_, exact) = as_groups(&vec![set("g+v"), set("q+L")], &models);
        assert!(!exact, "two pairs exclude each other crosswise");
    }
}
