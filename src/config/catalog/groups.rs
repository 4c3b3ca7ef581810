//! Which models come and go together, and which are never up at the same time.
//!
//! A group is `together` (loading one loads all), or its members take turns. `exclusive` keeps
//! models outside the group away while one of its members is up; members of `persistent` groups
//! and pinned models stay beside it. An adapter stands for the model whose instance serves it.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Catalog, Group, ModelSpec};
use crate::units::ModelName;

/// What a requested name means.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'c> {
    pub spec: &'c Arc<ModelSpec>,
    /// `coding/qwen`: the group that is wanted with the model.
    pub group: Option<&'c str>,
}

impl Catalog {
    /// The model whose instance serves `name`: itself, or an adapter's base.
    pub fn serving(&self, name: &ModelName) -> Option<&Arc<ModelSpec>> {
        let spec = self.models.get(name)?;
        spec.adapter.as_ref().map_or(Some(spec), |adapter| self.models.get(&adapter.of))
    }

    /// The adapters that the instance of `base` serves.
    pub fn adapters_of<'a>(
        &'a self,
        base: &'a ModelName,
    ) -> impl Iterator<Item = &'a Arc<ModelSpec>> + 'a {
        self.models.values().filter(|m| m.adapter.as_ref().is_some_and(|a| a.of == *base))
    }

    /// A model by name or alias, or `group/model`. The longest configured name wins.
    pub fn asked(&self, name: &str) -> Option<Asked<'_>> {
        if let Some(spec) = self.resolve(name) {
            return Some(Asked { spec, group: None });
        }
        let at = |(at, _)| (&name[..at], &name[at + 1..]);
        name.rmatch_indices('/').map(at).find_map(|(group, model)| {
            let (group, members) = self.groups.get_key_value(group)?;
            let spec = self.resolve(model).filter(|spec| members.models.contains(&spec.name))?;
            Some(Asked { spec, group: Some(group) })
        })
    }

    /// The models whose instances make up a group.
    pub fn members(&self, group: &Group) -> BTreeSet<ModelName> {
        group.models.iter().filter_map(|name| Some(self.serving(name)?.name.clone())).collect()
    }

    fn has(&self, group: &Group, model: &ModelName) -> bool {
        group
            .models
            .iter()
            .any(|name| name == model || self.serving(name).is_some_and(|spec| spec.name == *model))
    }

    /// The groups that load `model` with others.
    pub fn together_with<'a>(
        &'a self,
        model: &'a ModelName,
    ) -> impl Iterator<Item = (&'a str, &'a Group)> + 'a {
        let with = self.groups.iter().filter(|(_, g)| g.together && self.has(g, model));
        with.map(|(name, group)| (name.as_str(), group))
    }

    /// The group that loading `model` by its plain name loads whole. With several of them only
    /// `group/model` tells which one is meant.
    pub fn company_of<'a>(&'a self, model: &'a ModelName) -> Option<&'a str> {
        let mut groups = self.together_with(model);
        let (first, _) = groups.next()?;
        groups.next().is_none().then_some(first)
    }

    pub fn are_mates(&self, one: &ModelName, other: &ModelName) -> bool {
        self.together_with(one).any(|(_, group)| self.has(group, other))
    }

    /// The persistent group that keeps `resident` where it is, for `other` is no member of it.
    pub fn persists_for(&self, resident: &ModelName, other: &ModelName) -> Option<&str> {
        let keeps = |g: &Group| g.persistent && self.has(g, resident) && !self.has(g, other);
        self.groups.iter().find(|(_, g)| keeps(g)).map(|(name, _)| name.as_str())
    }

    /// The group whose rules forbid that both are up at the same time.
    pub fn keeps_apart(&self, one: &ModelSpec, other: &ModelSpec) -> Option<&str> {
        if one.name == other.name || one.is_external() || other.is_external() {
            return None;
        }
        let stays = |outside: &ModelSpec, inside: &ModelName| {
            outside.pinned || self.persists_for(&outside.name, inside).is_some()
        };
        let forbids =
            |group: &Group| match (self.has(group, &one.name), self.has(group, &other.name)) {
                (true, true) => !group.together,
                (true, false) => group.exclusive && !stays(other, &one.name),
                (false, true) => group.exclusive && !stays(one, &other.name),
                (false, false) => false,
            };
        self.groups.iter().find(|(_, group)| forbids(group)).map(|(name, _)| name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::catalog::Adapter;

    fn catalog(groups: &[(&str, Group)]) -> Catalog {
        let mut catalog = Catalog::default();
        for name in ["a", "b", "c", "org/d"] {
            let spec = ModelSpec::plain(name);
            catalog.models.insert(spec.name.clone(), Arc::new(spec));
        }
        let sql = Adapter { of: "a".into(), source: "org/sql".into() };
        let sql = ModelSpec { adapter: Some(sql), ..ModelSpec::plain("sql") };
        catalog.models.insert(sql.name.clone(), Arc::new(sql));
        catalog.aliases.insert("short".into(), "b".into());
        catalog.groups = groups.iter().map(|(n, g)| ((*n).to_owned(), g.clone())).collect();
        catalog
    }

    fn group(models: &[&str]) -> Group {
        let models = models.iter().map(|&name| name.into()).collect();
        Group { models, together: false, exclusive: false, persistent: false }
    }

    fn apart<'c>(catalog: &'c Catalog, one: &str, other: &str) -> Option<&'c str> {
        let (one, other) = (&catalog.models[one], &catalog.models[other]);
        let (forth, back) = (catalog.keeps_apart(one, other), catalog.keeps_apart(other, one));
        assert_eq!(forth, back, "the rule has no direction");
        forth
    }

    #[test]
    fn a_profile_name_means_its_model_and_the_longest_name_wins() {
        let mut catalog =
            catalog(&[("team", group(&["a", "b", "org/d"])), ("team/org", group(&["a"]))]);
        let asked = |c: &Catalog, name: &str| {
            c.asked(name).map(|a| (a.spec.name.to_string(), a.group.map(str::to_owned)))
        };
        let of = |model: &str, group: &str| Some((model.to_owned(), Some(group.to_owned())));
        assert_eq!(asked(&catalog, "team/a"), of("a", "team"));
        assert_eq!(asked(&catalog, "team/short"), of("b", "team"), "an alias of a member");
        assert_eq!(asked(&catalog, "team/org/d"), of("org/d", "team"));
        assert_eq!(asked(&catalog, "team/org/a"), of("a", "team/org"));
        assert_eq!(asked(&catalog, "team/c"), None, "no member");
        assert_eq!(asked(&catalog, "team"), None, "a group is no model");
        let own = ModelSpec::plain("team/a");
        catalog.models.insert(own.name.clone(), Arc::new(own));
        assert_eq!(asked(&catalog, "team/a"), Some(("team/a".to_owned(), None)));
    }

    #[test]
    fn members_take_turns_and_exclusive_groups_are_alone() {
        let turns = catalog(&[("turns", group(&["a", "b"]))]);
        assert_eq!(apart(&turns, "a", "b"), Some("turns"));
        assert_eq!(apart(&turns, "a", "c"), None);
        let alone = Group { exclusive: true, together: true, ..group(&["a", "b"]) };
        let mut alone = catalog(&[("alone", alone)]);
        assert_eq!(apart(&alone, "a", "b"), None);
        assert_eq!(apart(&alone, "a", "c"), Some("alone"));
        Arc::make_mut(alone.models.get_mut("c").unwrap()).pinned = true;
        assert_eq!(apart(&alone, "a", "c"), None, "a pinned model stays beside it");
        let lasting = Group { persistent: true, ..group(&["org/d"]) };
        alone.groups.insert("lasting".into(), lasting);
        assert_eq!(apart(&alone, "b", "org/d"), None, "so does a persistent one");
        assert_eq!(alone.persists_for(&"org/d".into(), &"a".into()), Some("lasting"));
    }

    #[test]
    fn an_adapter_stands_for_its_base() {
        let catalog = catalog(&[("turns", group(&["sql", "b"]))]);
        assert_eq!(apart(&catalog, "a", "b"), Some("turns"));
        assert_eq!(catalog.serving(&"sql".into()).unwrap().name.as_str(), "a");
        assert_eq!(catalog.adapters_of(&"a".into()).count(), 1);
        assert_eq!(catalog.asked("turns/sql").unwrap().spec.name.as_str(), "sql");
    }

    #[test]
    fn a_plain_name_calls_a_group_only_where_it_is_clear_which() {
        let both = Group { together: true, ..group(&["a", "b"]) };
        let mut catalog = catalog(&[("one", both.clone())]);
        assert_eq!(catalog.company_of(&"a".into()), Some("one"));
        catalog.groups.insert("two".into(), both);
        assert_eq!(catalog.company_of(&"a".into()), None);
        assert!(catalog.are_mates(&"a".into(), &"b".into()));
    }
}
