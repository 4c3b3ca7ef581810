//! Models of other servers, as models of this catalog: those that the file lists, and those that a
//! peer was found to have.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::catalog::{Catalog, EngineKind, GpuRequest, Health, ModelSpec, Peer, RuntimeSpec};
use super::models::unfit;
use crate::units::ModelName;

/// Models of one peer that are taken up by its `*`.
pub const DISCOVERED_MAX: usize = 500;
const EVERY: &str = "*";

impl Peer {
    /// Names that the file lists.
    pub fn listed(&self) -> impl Iterator<Item = &str> {
        self.models.iter().map(String::as_str).filter(|model| *model != EVERY)
    }

    /// Whether whatever the peer has may be used.
    pub fn is_open(&self) -> bool {
        self.models.iter().any(|model| model == EVERY)
    }

    pub(super) fn listed_specs(&self) -> impl Iterator<Item = (ModelName, Arc<ModelSpec>)> {
        self.listed().map(|model| {
            let spec = self.spec(model);
            (spec.name.clone(), Arc::new(spec))
        })
    }

    /// One of its models, by the name that it has there.
    fn spec(&self, model: &str) -> ModelSpec {
        ModelSpec {
            engine: EngineKind::Openai,
            runtime: RuntimeSpec::External(self.at.clone()),
            gpus: GpuRequest::None,
            health: Health { path: Some("/v1/models".to_owned()), stall: Duration::from_secs(30) },
            upstream_name: Some(model.to_owned()),
            peer: Some(self.name.clone()),
            ..ModelSpec::plain(&format!("{}/{model}", self.name))
        }
    }
}

impl Catalog {
    /// A peer's model that no file names.
    pub fn is_discovered(&self, spec: &ModelSpec) -> bool {
        let Some(name) = &spec.peer else { return false };
        let peer = self.peers.get(name);
        !peer.is_some_and(|peer| peer.listed().any(|model| model == spec.served_name()))
    }
}

/// What peers were found to have. Of this run alone: nothing of it is kept.
#[derive(Clone, Debug, Default)]
pub struct Discovered(BTreeMap<String, (Arc<Peer>, Vec<String>)>);

impl Discovered {
    /// False: it is known already.
    pub fn learn(&mut self, peer: Arc<Peer>, mut models: Vec<String>) -> bool {
        models.retain(|model| unfit(&format!("{}/{model}", peer.name), "model").is_none());
        models.sort_unstable();
        models.dedup();
        let left_out = models.len().saturating_sub(DISCOVERED_MAX);
        models.truncate(DISCOVERED_MAX);
        let known = self.0.get(&peer.name);
        if known.is_some_and(|(before, known)| *before == peer && *known == models) {
            return false;
        }
        if left_out > 0 {
            let peer = &peer.name;
            tracing::warn!(peer, "{left_out} of its models are left out: list those wanted");
        }
        self.0.insert(peer.name.clone(), (peer, models));
        true
    }

    /// The catalog with the models of its open peers, as far as they are known, and with no others.
    /// What was learned of a peer that is configured differently now does not count.
    pub fn merged(&self, catalog: Arc<Catalog>) -> Arc<Catalog> {
        let is_stale = catalog.models.values().any(|spec| catalog.is_discovered(spec));
        if !is_stale && self.0.is_empty() {
            return catalog;
        }
        let mut merged = Catalog::clone(&catalog);
        merged.models.retain(|_, spec| !catalog.is_discovered(spec));
        for (name, (peer, models)) in &self.0 {
            let same = catalog.peers.get(name).filter(|now| *now == peer && now.is_open());
            for spec in same.into_iter().flat_map(|peer| models.iter().map(|m| peer.spec(m))) {
                let name = spec.name.as_str();
                if merged.resolve(name).is_none() && !merged.routes.contains_key(name) {
                    merged.models.insert(spec.name.clone(), Arc::new(spec));
                }
            }
        }
        Arc::new(merged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;

    const FILE: &str = "
peers:
  gpu2: { url: 'http://10.0.0.2:8080', api_key: k, models: [llama, org/qwen] }
  far: { url: 'http://10.0.0.3:8080' }
models: { ada: { engine: openai, process: { cmd: x }, gpus: 0, port: 9001, aliases: [a] } }
";

    fn catalog(text: &str) -> Arc<Catalog> {
        Arc::new(parse(text, "models.yaml", &|_| None).unwrap().catalog)
    }

    fn names(catalog: &Catalog) -> Vec<&str> {
        catalog.models.keys().map(ModelName::as_str).collect()
    }

    fn learned(catalog: &Catalog, peer: &str, models: &[&str]) -> Discovered {
        let mut discovered = Discovered::default();
        let models = models.iter().map(|model| (*model).to_owned()).collect();
        discovered.learn(Arc::clone(&catalog.peers[peer]), models);
        discovered
    }

    #[test]
    fn listed_names_are_models_of_their_own() {
        let catalog = catalog(FILE);
        assert_eq!(names(&catalog), ["ada", "gpu2/llama", "gpu2/org/qwen"]);
        let spec = catalog.resolve("gpu2/org/qwen").unwrap();
        assert_eq!((spec.served_name(), spec.peer.as_deref()), ("org/qwen", Some("gpu2")));
        assert!(spec.is_external() && !catalog.is_discovered(spec));
    }

    #[test]
    fn a_listed_name_that_no_path_could_hold_is_refused() {
        let error = parse(&FILE.replace("llama,", "a/load,"), "models.yaml", &|_| None);
        assert!(error.unwrap_err().to_string().contains("gpu2/a/load"));
    }

    #[test]
    fn what_an_open_peer_has_comes_and_goes_and_a_reload_does_not_lose_it() {
        let file = catalog(FILE);
        let first = learned(&file, "far", &["x", "y", "bad name", "a/load", "x"]);
        let merged = first.merged(Arc::clone(&file));
        assert_eq!(names(&merged), ["ada", "far/x", "far/y", "gpu2/llama", "gpu2/org/qwen"]);
        assert!(merged.is_discovered(&merged.models["far/x"]));
        assert_eq!(names(&first.merged(Arc::clone(&merged))), names(&merged), "as it is");
        assert_eq!(names(&learned(&file, "far", &["y"]).merged(merged)).len(), 4, "x went");
        // Listed ones are the file's.
        let listed = learned(&file, "gpu2", &["more"]).merged(file);
        assert_eq!(names(&listed).len(), 3);
    }

    #[test]
    fn what_was_learned_elsewhere_is_not_told_of_a_changed_peer() {
        let file = catalog(FILE);
        let discovered = learned(&file, "far", &["x"]);
        let moved = catalog(&FILE.replace("10.0.0.3", "10.0.0.4"));
        assert!(!names(&discovered.merged(moved)).contains(&"far/x"));
        let gone = FILE.replace("  far: { url: 'http://10.0.0.3:8080' }\n", "");
        let before = discovered.merged(file);
        let after = Catalog { models: before.models.clone(), ..Catalog::clone(&catalog(&gone)) };
        assert!(!names(&discovered.merged(Arc::new(after))).contains(&"far/x"));
    }

    #[test]
    fn a_list_without_end_is_cut() {
        let file = catalog(FILE);
        let many: Vec<String> = (0..DISCOVERED_MAX + 9).map(|n| format!("m{n}")).collect();
        let mut discovered = Discovered::default();
        assert!(discovered.learn(Arc::clone(&file.peers["far"]), many.clone()));
        assert!(!discovered.learn(Arc::clone(&file.peers["far"]), many), "nothing new");
        assert_eq!(
            discovered.merged(Arc::clone(&file)).models.len(),
            file.models.len() + DISCOVERED_MAX
        );
    }
}
