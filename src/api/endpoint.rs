//! A row of the tables of routes: what a path takes, who may call it, and what answers.

use axum::handler::Handler;
use axum::routing::{self, MethodRouter};

use super::guard::Needs;

/// Methods and handler. Unlike axum's own, it can say which methods it takes.
#[derive(Clone, Debug)]
pub struct Endpoint<S> {
    /// Empty: every one.
    pub methods: &'static [&'static str],
    pub handler: MethodRouter<S>,
}

/// Path, who may call it, and the endpoint. There is no row that says nothing of who may call it.
pub type Row<S> = (&'static str, Needs, Endpoint<S>);

/// A row as tests and the OpenAPI document see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub path: &'static str,
    pub methods: &'static [&'static str],
    pub needs: Needs,
}

pub fn listed<S>(table: &[Row<S>]) -> Vec<Route> {
    let row =
        |(path, needs, endpoint): &Row<S>| Route { path, methods: endpoint.methods, needs: *needs };
    table.iter().map(row).collect()
}

macro_rules! endpoints {
    ($($name:ident: $methods:expr;)*) => {$(
        pub fn $name<H, T, S>(handler: H) -> Endpoint<S>
        where
            H: Handler<T, S>,
            T: 'static,
            S: Clone + Send + Sync + 'static,
        {
            Endpoint { methods: &$methods, handler: routing::$name(handler) }
        }
    )*};
}

endpoints! {
    get: ["GET"];
    post: ["POST"];
    patch: ["PATCH"];
    delete: ["DELETE"];
    any: [];
}
