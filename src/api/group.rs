//! Groups by their own name: all of them loaded, or unloaded.

use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use futures_util::future::join_all;
use http::StatusCode;
use serde_json::json;

use super::Api;
use super::change::{ensured, ready, unloaded};
use super::render::{self, Snapshot};
use crate::config::catalog::{Asked, Catalog, Group, ModelSpec};
use crate::gateway::reject::Reject;
use crate::scheduler::event::EnsureKind;

/// What a name in a control request means: a model before a group.
pub(super) enum Target<'c> {
    Model(Asked<'c>),
    Group(&'c str, &'c Group),
}

impl<'c> Target<'c> {
    pub fn of(catalog: &'c Catalog, name: &str) -> Option<Target<'c>> {
        let group = || catalog.groups.get_key_value(name).map(|(name, g)| Target::Group(name, g));
        catalog.asked(name).map(Target::Model).or_else(group)
    }

    pub fn name(&self) -> &str {
        match self {
            Target::Model(asked) => asked.spec.name.as_str(),
            Target::Group(name, _) => name,
        }
    }
}

/// Every member made ready. Those of a group that takes turns cannot be up together.
pub(super) async fn ensure(
    api: &Api,
    name: &str,
    group: &Group,
    kind: EnsureKind,
    timeout: Duration,
    wait: bool,
) -> Result<Response, Reject> {
    let catalog = api.handle.catalog();
    let members: Vec<&ModelSpec> =
        group.models.iter().filter_map(|model| Some(&**catalog.model(model)?)).collect();
    let names: Vec<&str> = members.iter().map(|spec| spec.name.as_str()).collect();
    if !group.together {
        let message = format!(
            "the models of group \"{name}\" take turns: load one of them ({}), or set \
             `together: true`",
            names.join(", ")
        );
        return Err(Reject::new(StatusCode::CONFLICT, "group_takes_turns", message).param("model"));
    }
    if !wait {
        for spec in &members {
            drop(api.handle.ensure_detached(spec.name.clone(), kind, timeout));
        }
        let body = json!({
            "status": "accepted",
            "model": name,
            "models": names,
            "message": "GET /status and GET /swaps tell how far they are",
        });
        return Ok((StatusCode::ACCEPTED, Json(body)).into_response());
    }
    let asked = api.handle.now();
    let each = members.iter().map(|spec| async {
        let answer = ensured(api, spec, kind, timeout, None).await;
        ready(api, &spec.name, answer, timeout, asked).await
    });
    let rows = join_all(each).await.into_iter().collect::<Result<Vec<_>, _>>()?;
    let at = Snapshot::of(&api.handle);
    let gone = names.iter().find(|name| !render::is_loaded(at.residency(&(**name).into())));
    if let Some(gone) = gone {
        let message = format!(
            "\"{gone}\" had to leave while the rest of group \"{name}\" was loaded: they do not \
             fit together"
        );
        return Err(Reject::new(StatusCode::CONFLICT, "group_does_not_fit", message).model(gone));
    }
    let waited = api.handle.now().since(asked);
    let body = json!({
        "status": "ready",
        "model": name,
        "state": "ready",
        "swapped": rows.iter().any(|row| row.swapped),
        "models": rows.iter().map(|row| row.json()).collect::<Vec<_>>(),
        "waited_seconds": render::seconds(waited),
        "message": format!("Group {name} loaded"),
    });
    Ok(Json(body).into_response())
}

pub(super) async fn unload(
    api: &Api,
    name: &str,
    group: &Group,
    force: bool,
    catalog: &Catalog,
) -> Result<Response, Reject> {
    let members = group.models.iter().filter_map(|model| catalog.model(model));
    let each = members.map(|spec| unloaded(api, spec, force, catalog));
    let were = join_all(each).await.into_iter().collect::<Result<Vec<bool>, _>>()?;
    let was_loaded = were.contains(&true);
    let message = match was_loaded {
        true => format!("Group {name} unloaded"),
        false => format!("Group {name} was not loaded"),
    };
    let body = json!({
        "status": "success",
        "model": name,
        "models": group.models,
        "was_loaded": was_loaded,
        "message": message,
    });
    Ok(Json(body).into_response())
}
