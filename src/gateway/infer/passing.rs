//! The other way to a job: a request whose path names its model.

use std::net::SocketAddr;
use std::sync::Arc;

use super::super::account::Account;
use super::super::admit::Wishes;
use super::super::forward::Outgoing;
use super::super::receive::Held;
use super::super::routes::Api;
use super::super::underway::Queue;
use super::super::{Gateway, auth};
use super::{Job, options};
use crate::config::catalog::{ApiKey, Catalog, ModelSpec};
use crate::units::Time;

/// A request that is passed on as it came, by a path that names its model.
pub struct Passing<'a> {
    pub catalog: &'a Catalog,
    pub spec: Arc<ModelSpec>,
    pub key: Option<&'a ApiKey>,
    pub wishes: Wishes,
    pub account: Account,
    pub outgoing: Outgoing,
    pub held: Held,
    pub peer: Option<SocketAddr>,
    pub arrived: Time,
    pub is_visit: bool,
    pub queue: Option<Queue>,
}

impl Job {
    pub fn passing(gateway: &Arc<Gateway>, passing: Passing<'_>) -> Box<Job> {
        let Passing { catalog, spec, key, wishes, .. } = passing;
        Box::new(Job {
            account: passing.account,
            gateway: Arc::clone(gateway),
            api: Api::Other,
            options: options(&spec, &wishes, key),
            waiting: None,
            queue_timeout: catalog.settings.queue.timeout,
            spec,
            outgoing: passing.outgoing,
            held: passing.held,
            remove_usage: false,
            viewer: auth::viewer(key, passing.peer),
            arrived: passing.arrived,
            company: None,
            is_visit: passing.is_visit,
            queue: passing.queue,
            following: None,
            others: None,
        })
    }
}
