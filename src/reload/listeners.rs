//! The addresses on which Wharf listens, and changing them while it serves.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::Router;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::config::catalog::Settings;
use crate::gateway::{self, Content, Site, Threads};
use crate::orchestrator::Handle;
use crate::runtime::process::ProcessRuntime;

/// How long a taken listener port is retried (a predecessor may just be leaving).
const BIND_WITHIN: Duration = Duration::from_secs(3);
/// Control answers are short; inference streams get `drain_timeout`.
const CONTROL_GRACE: Duration = Duration::from_secs(2);

/// What is served where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Gateway,
    Orchestrator,
    /// One address for both: the orchestrator's routes win, the rest is inference.
    Both,
}

impl Role {
    const fn key(self) -> &'static str {
        match self {
            Role::Gateway => "listen.gateway",
            Role::Orchestrator | Role::Both => "listen.orchestrator",
        }
    }
}

fn wanted(settings: &Settings) -> BTreeMap<SocketAddr, Role> {
    if settings.gateway == settings.orchestrator {
        return BTreeMap::from([(settings.gateway, Role::Both)]);
    }
    BTreeMap::from([(settings.gateway, Role::Gateway), (settings.orchestrator, Role::Orchestrator)])
}

/// What the roles serve, and on which threads.
#[derive(Clone, Debug)]
pub struct Routers {
    pub control: Router,
    pub inference: Content,
    pub threads: Threads,
}

impl Routers {
    fn of(&self, role: Role) -> Content {
        match role {
            Role::Gateway => self.inference.clone(),
            Role::Orchestrator => self.control.clone().into(),
            Role::Both => {
                let inference = self.inference.router.clone();
                // No control path is one of inference: those may still take the short way.
                let router = self.control.clone().fallback_service(inference);
                Content { router, ..self.inference.clone() }
            }
        }
    }
}

/// Addresses that are bound and not served yet.
#[derive(Debug)]
pub struct Bound(Vec<(SocketAddr, TcpListener)>);

impl Bound {
    /// Before anything is started: a taken port must cost nothing.
    ///
    /// # Errors
    /// A port is taken: the message names by whom.
    pub async fn all(settings: &Settings) -> anyhow::Result<Bound> {
        let mut bound = Vec::new();
        for (address, role) in wanted(settings) {
            bound.push((address, bind(role.key(), address).await?));
        }
        Ok(Bound(bound))
    }
}

#[derive(Debug)]
struct Open {
    role: Role,
    /// What is served there: an address that stays may get another role.
    site: Site,
    stop: CancellationToken,
}

#[derive(Debug)]
pub struct Listeners {
    routers: Routers,
    handle: Handle,
    open: BTreeMap<SocketAddr, Open>,
    serving: JoinSet<()>,
    stop: CancellationToken,
    hurry: CancellationToken,
}

impl Listeners {
    /// `stop` ends them all; `hurry` ends their grace.
    pub fn new(
        routers: Routers,
        handle: Handle,
        stop: CancellationToken,
        hurry: CancellationToken,
    ) -> Listeners {
        let (open, serving) = (BTreeMap::new(), JoinSet::new());
        Listeners { routers, handle, open, serving, stop, hurry }
    }

    /// Binds what `settings` add. Nothing that is served changes before [`Listeners::follow`].
    ///
    /// # Errors
    /// A port is taken: the message names by whom.
    pub async fn prepare(&mut self, settings: &Settings) -> anyhow::Result<Bound> {
        let wanted = wanted(settings);
        let mut bound = Vec::new();
        for (address, role) in &wanted {
            if self.open.contains_key(address) {
                continue;
            }
            // `0.0.0.0:80` and `127.0.0.1:80` exclude each other: the old one has to go first.
            let same_port = |old: &SocketAddr| old.port() == address.port() && old.port() != 0;
            let in_the_way: Vec<SocketAddr> = self
                .open
                .keys()
                .filter(|old| !wanted.contains_key(old))
                .copied()
                .filter(same_port)
                .collect();
            for old in &in_the_way {
                self.close(old);
            }
            match bind(role.key(), *address).await {
                Ok(listener) => bound.push((*address, listener)),
                Err(error) => {
                    drop(bound);
                    self.reopen(&in_the_way).await;
                    return Err(error);
                }
            }
        }
        Ok(Bound(bound))
    }

    async fn reopen(&mut self, addresses: &[SocketAddr]) {
        for address in addresses {
            let role = self.handle.catalog();
            let role = self::wanted(&role.settings).get(address).copied();
            match (role, bind("listen", *address).await) {
                (Some(role), Ok(listener)) => self.serve(*address, role, listener),
                (_, Err(error)) => tracing::error!("{error:#}"),
                (None, Ok(_)) => {}
            }
        }
    }

    /// Serves what was bound, gives what stays its role, and drains the rest.
    pub fn follow(&mut self, settings: &Settings, Bound(bound): Bound) {
        let wanted = wanted(settings);
        for (address, listener) in bound {
            if let Some(role) = wanted.get(&address) {
                self.serve(address, *role, listener);
            }
        }
        let gone: Vec<SocketAddr> =
            self.open.keys().filter(|address| !wanted.contains_key(address)).copied().collect();
        for address in gone {
            self.close(&address);
        }
        for (address, role) in wanted {
            if let Some(open) = self.open.get_mut(&address).filter(|open| open.role != role) {
                open.role = role;
                open.site.change(self.routers.of(role));
            }
        }
        while self.serving.try_join_next().is_some() {}
    }

    fn serve(&mut self, address: SocketAddr, role: Role, listener: TcpListener) {
        let is_inference = role != Role::Orchestrator;
        let threads = is_inference.then(|| self.routers.threads.clone());
        let site = Site::new(self.routers.of(role), threads);
        let stop = self.stop.child_token();
        self.spawn(listener, site.clone(), stop.clone(), is_inference);
        self.open.insert(address, Open { role, site, stop });
    }

    /// Of routes that serve inference.
    pub fn site(&self, router: Router) -> Site {
        Site::new(router, Some(self.routers.threads.clone()))
    }

    /// Serves a listener until `stop`, then lets its requests end.
    pub fn spawn(
        &mut self,
        listener: TcpListener,
        site: Site,
        stop: CancellationToken,
        inference: bool,
    ) {
        let (handle, ending) = (self.handle.clone(), self.stop.clone());
        let grace = async move {
            if !inference {
                return sleep(CONTROL_GRACE).await;
            }
            let swap = handle.catalog().settings.swap.clone();
            // Also one that a reload closed before has no more time than the others at the end.
            let at_the_end = async {
                ending.cancelled().await;
                sleep(swap.shutdown_timeout).await;
            };
            tokio::select! {
                () = sleep(swap.drain_timeout) => {}
                () = at_the_end => {}
            }
        };
        let hurry = self.hurry.clone();
        self.serving.spawn(gateway::serve_until(listener, site, stop, grace, hurry));
    }

    pub fn child_token(&self) -> CancellationToken {
        self.stop.child_token()
    }

    fn close(&mut self, address: &SocketAddr) {
        if let Some(open) = self.open.remove(address) {
            tracing::info!("no longer listening on {address}; what is under way there ends");
            open.stop.cancel();
        }
    }

    /// After `stop`: until every request has ended, or was cut.
    pub async fn ended(mut self) {
        while self.serving.join_next().await.is_some() {}
    }
}

async fn bind(key: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    let until = tokio::time::Instant::now() + BIND_WITHIN;
    let mut told = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                if tokio::time::Instant::now() >= until {
                    bail!(
                        "{key}: {address} is taken by {}; stop it or choose another port",
                        occupant(address.port()).await
                    );
                }
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(
                        "{key}: {address} is taken by {}; trying again for {} s",
                        occupant(address.port()).await,
                        BIND_WITHIN.as_secs()
                    );
                }
                sleep(Duration::from_millis(100)).await;
            }
            Err(error) => {
                return Err(error).with_context(|| format!("{key}: cannot listen on {address}"));
            }
        }
    }
}

/// Who listens on a port.
pub async fn occupant(port: u16) -> String {
    let listeners = ProcessRuntime::default().listeners(port).await;
    let unseen = || "a process that this user cannot see".to_owned();
    listeners.first().map_or_else(unseen, ToString::to_string)
}
