//! A name that leads to one of several models (`routes:`): who is asked, and who is asked next.
//!
//! A key may use a member of a route if it may use the route, by its name, or the member by its own.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;

use super::admit::{self, Wishes};
use super::auth;
use super::reject::Reject;
use super::routes::Inference;
use crate::config::catalog::{ApiKey, Catalog, ModelSpec, Route, RouteKind};
use crate::http1::Fields;
use crate::orchestrator::{Handle, View};
use crate::scheduler::record::ResidencyView;

/// `within` where the file does not say.
const WITHIN_USUAL: Duration = Duration::from_secs(30);

/// The model that is asked, and those that are asked if it cannot serve.
#[derive(Debug)]
pub struct Chosen {
    pub spec: Arc<ModelSpec>,
    pub rest: VecDeque<Arc<ModelSpec>>,
    /// How long each but the last may keep the request waiting.
    pub within: Duration,
}

/// The models behind a name, an alias or a route, for this key and at this moment.
pub fn choose(
    handle: &Handle,
    catalog: &Catalog,
    requested: &str,
    key: Option<&ApiKey>,
) -> Result<Chosen, Reject> {
    let route = catalog.routes.get(requested).filter(|_| catalog.resolve(requested).is_none());
    let Some(route) = route else {
        let spec = Arc::clone(admit::model(catalog, requested, key)?);
        return Ok(Chosen { spec, rest: VecDeque::new(), within: WITHIN_USUAL });
    };
    let known: Vec<_> = route.models.iter().filter_map(|name| catalog.resolve(name)).collect();
    if known.is_empty() {
        let message = format!(
            "the route \"{requested}\" leads to models of peers alone, and these have not told \
             their models yet"
        );
        let status = StatusCode::SERVICE_UNAVAILABLE;
        return Err(Reject::new(status, "peer_unavailable", message).model(requested));
    }
    let mut allowed: VecDeque<Arc<ModelSpec>> = known
        .into_iter()
        .filter(|spec| auth::may_use(key, spec.name.as_str(), requested))
        .cloned()
        .collect();
    if route.kind == RouteKind::AnyOf {
        let view = handle.view();
        let standings: Vec<_> = allowed.iter().map(|spec| standing(handle, &view, spec)).collect();
        allowed = best(&standings).and_then(|at| allowed.remove(at)).into_iter().collect();
    }
    let Some(spec) = allowed.pop_front() else { return Err(admit::not_allowed(requested, key)) };
    Ok(Chosen { spec, rest: allowed, within: route.within.unwrap_or(WITHIN_USUAL) })
}

/// Whether a key sees a route.
pub fn may_see(catalog: &Catalog, name: &str, route: &Route, key: Option<&ApiKey>) -> bool {
    let mut members = route.models.iter().filter_map(|member| catalog.resolve(member));
    auth::may_use(key, name, name)
        || members.any(|spec| auth::may_use(key, spec.name.as_str(), name))
}

/// How soon a model would serve one more request; less is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    /// With so many requests under way.
    Ready(u32),
    /// Or ready and full, or under notice.
    Soon,
    Down,
    /// It could not be started, and is not tried now.
    Failed,
}

fn standing(handle: &Handle, view: &View, spec: &ModelSpec) -> Standing {
    if let Some(gate) = handle.gates().get(&spec.name).filter(|gate| gate.is_open()) {
        return Standing::Ready(gate.in_flight());
    }
    match view.model(&spec.name).map(|model| &model.residency) {
        Some(ResidencyView::Ready | ResidencyView::Starting { .. } | ResidencyView::Waking) => {
            Standing::Soon
        }
        Some(ResidencyView::Failed { .. } | ResidencyView::Lost) => Standing::Failed,
        _ => Standing::Down,
    }
}

/// The first among equals.
fn best(standings: &[Standing]) -> Option<usize> {
    (0..standings.len()).min_by_key(|&at| (standings[at], at))
}

/// What a request needs to be asked of another model.
#[derive(Debug)]
pub struct Others {
    pub rest: VecDeque<Arc<ModelSpec>>,
    pub within: Duration,
    pub inference: &'static Inference,
    /// As the client sent it.
    pub body: Bytes,
    pub headers: Fields,
    pub wishes: Wishes,
    pub key: Option<ApiKey>,
    /// Who could not serve, and why: for whoever is told that nobody could.
    pub failed: Vec<String>,
}

impl Others {
    /// The refusal of the last one, with what became of those before it.
    pub fn told(&self, reject: Reject) -> Reject {
        if self.failed.is_empty() {
            return reject;
        }
        let message =
            format!("{} (tried before: {})", reject.problem().message, self.failed.join(", "));
        reject.saying(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Endpoint;
    use crate::units::{InstanceId, ModelName};

    fn world(kind: RouteKind) -> (Handle, Arc<Catalog>) {
        let mut catalog = Catalog::default();
        for name in ["ada", "bob", "eve"] {
            catalog.models.insert(ModelName::new(name), Arc::new(ModelSpec::plain(name)));
        }
        let models = ["ada", "bob", "gone/x", "eve"].map(str::to_owned).to_vec();
        catalog.routes.insert("any".to_owned(), Route { kind, models, within: None });
        let catalog = Arc::new(catalog);
        (Handle::for_tests(Arc::clone(&catalog)).0, catalog)
    }

    fn names(chosen: &Chosen) -> Vec<&str> {
        std::iter::once(&chosen.spec).chain(&chosen.rest).map(|spec| spec.name.as_str()).collect()
    }

    fn key(models: &[&str]) -> ApiKey {
        let models = models.iter().map(|model| (*model).to_owned()).collect();
        ApiKey { name: "k".to_owned(), models, ..ApiKey::default() }
    }

    #[test]
    fn a_ready_model_comes_first_and_of_several_the_least_used() {
        use Standing::{Down, Failed, Ready, Soon};
        for (standings, expected) in [
            (vec![Down, Down], 0),
            (vec![Failed, Down, Down], 1),
            (vec![Failed, Failed], 0),
            (vec![Down, Soon], 1),
            (vec![Soon, Down, Ready(9)], 2),
            (vec![Ready(2), Ready(1), Ready(1)], 1),
        ] {
            assert_eq!(best(&standings), Some(expected), "{standings:?}");
        }
        assert_eq!(best(&[]), None);
    }

    #[test]
    fn any_of_asks_one_and_failover_all_in_their_order() {
        let (handle, catalog) = world(RouteKind::AnyOf);
        let chosen = || choose(&handle, &catalog, "any", None).unwrap();
        assert_eq!(names(&chosen()), ["ada"], "nobody is ready");
        let endpoint = || Endpoint::new("http://127.0.0.1:1", None);
        let eve = handle.gate_for_tests(InstanceId(1), &"eve".into(), endpoint(), 4);
        assert_eq!(names(&chosen()), ["eve"]);
        let _bob = handle.gate_for_tests(InstanceId(2), &"bob".into(), endpoint(), 4);
        assert_eq!(names(&chosen()), ["bob"], "listed first");
        let busy = handle.try_lease(&"bob".into());
        assert_eq!(names(&chosen()), ["eve"], "used less");
        drop(busy);
        Handle::close_for_tests(&eve);
        assert_eq!(names(&chosen()), ["bob"]);

        let (handle, catalog) = world(RouteKind::Failover);
        let chosen = choose(&handle, &catalog, "any", None).unwrap();
        assert_eq!((names(&chosen), chosen.within), (vec!["ada", "bob", "eve"], WITHIN_USUAL));
        assert_eq!(names(&choose(&handle, &catalog, "bob", None).unwrap()), ["bob"]);
    }

    #[test]
    fn a_key_uses_of_a_route_what_its_patterns_name() {
        let (handle, catalog) = world(RouteKind::Failover);
        let of = |key: ApiKey| {
            let sees = may_see(&catalog, "any", &catalog.routes["any"], Some(&key));
            let chosen = choose(&handle, &catalog, "any", Some(&key));
            (sees, chosen.map(|chosen| names(&chosen).join(" ")).map_err(|reject| reject.code()))
        };
        assert_eq!(of(key(&["any"])), (true, Ok("ada bob eve".to_owned())));
        assert_eq!(of(key(&["b*", "eve"])), (true, Ok("bob eve".to_owned())));
        assert_eq!(of(key(&["zoe"])), (false, Err("model_not_allowed")));
    }

    #[test]
    fn a_route_of_which_nothing_is_known_yet_says_so() {
        let (handle, catalog) = world(RouteKind::Failover);
        let none = Catalog { models: Default::default(), ..Catalog::clone(&catalog) };
        let reject = choose(&handle, &none, "any", None).unwrap_err();
        assert_eq!((reject.code(), reject.problem().status.as_u16()), ("peer_unavailable", 503));
        assert_eq!(choose(&handle, &none, "zoe", None).unwrap_err().code(), "model_not_found");
    }
}
