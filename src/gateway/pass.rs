//! The pass-through: `/upstream/{model}/{path…}`, and llama-swap's ways to servers that are no
//! LLM's. Method, headers, query and body go on as they came (but for [`ollama`]); which paths may
//! is said by [`paths`].

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header, request};
use serde_json::json;

use super::account::Arrival;
use super::admit::{self, Wishes};
use super::answer::Answer;
use super::choose::choose;
use super::forward::{self, Outgoing};
use super::infer::{Job, Passing};
use super::path::{self, Target};
use super::receive::{self, Received};
use super::reject::Reject;
use super::underway;
use super::websocket::{self, Client};
use super::{Gateway, auth, multipart, not_loaded, ollama, pages, parse, site};
use crate::config::catalog::{ApiKey, Catalog, EngineKind, ModelSpec, Scope};
use crate::engine::paths::{self, Verdict};
use crate::http1::Fields;
use crate::units::Time;

/// Of a path in the row of its request.
const PATH_TOLD_MAX: usize = 200;
/// llama-swap reserves the first name; the second is what one would call it.
const COMFYUI_NAMES: [&str; 2] = ["comfyui_auto", "comfyui"];

/// Which models can be reached this way, and where.
pub async fn list(
    State(gateway): State<Arc<Gateway>>,
    headers: HeaderMap,
) -> Result<Response, Reject> {
    let catalog = gateway.handle.catalog();
    let key = auth::authorize(&catalog.settings, &headers, Scope::Inference)?;
    let view = gateway.handle.view();
    let listed = catalog.models.values().filter(|spec| !spec.unlisted);
    let rows = listed.filter(|spec| auth::may_use(key, spec.name.as_str(), spec.name.as_str()));
    let rows = rows.map(|spec| {
        let state = view.model(&spec.name).map_or("stopped", |model| model.residency.as_str());
        json!({
            "id": spec.name,
            "engine": spec.engine,
            "state": state,
            "url": format!("/upstream/{}/", path::encode(spec.name.as_str(), true)),
        })
    });
    Ok(Json(json!({ "object": "list", "data": rows.collect::<Vec<_>>() })).into_response())
}

pub async fn upstream(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    pass(gateway, request, "/upstream/", Names::InPath).await
}

/// To the path with a slash; for everybody, as it tells nothing.
pub async fn comfyui_moved(request: Request) -> Response {
    moved(request.method(), "/comfyui/", request.uri().query())
}

pub async fn comfyui(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    pass(gateway, request, "/comfyui", Names::ComfyUi).await
}

/// The model stands in the query or in the body, as in `/v1/audio/voices?model=`.
pub async fn named(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    let (uri, method) = (request.uri(), request.method());
    if uri.path() == "/sdapi/v1/sd-models"
        && method == Method::GET
        && in_query(uri).next().is_none()
    {
        return match pages::sd_models(&gateway, request.headers()) {
            Ok(list) => list.into_response(),
            Err(reject) => reject.into_response(),
        };
    }
    pass(gateway, request, "", Names::InQueryOrBody).await
}

/// Where a request names its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Names {
    InPath,
    ComfyUi,
    InQueryOrBody,
}

async fn pass(
    gateway: Arc<Gateway>,
    request: Request,
    prefix: &'static str,
    names: Names,
) -> Response {
    let id = admit::request_id(request.headers(), || gateway.fresh_id());
    let wants_page =
        request.method() == Method::GET && not_loaded::is_navigation(request.headers());
    let path: String = request.uri().path().chars().take(PATH_TOLD_MAX).collect();
    let mut arrival = Arrival::open(&gateway, request.method(), path, &id);
    let received = Arriving::receive(&gateway, request, prefix, names, &id, &mut arrival).await;
    let mut response = match received {
        Ok(Arrived::Elsewhere(response)) => response,
        Ok(Arrived::Ready(ready)) => ready.respond(wants_page).await,
        Err(reject) => arrival.turned_away(&gateway, reject),
    };
    response.headers_mut().insert(forward::REQUEST_ID, id);
    response
}

/// A request whose body is here.
struct Arriving<'a> {
    gateway: &'a Arc<Gateway>,
    catalog: &'a Catalog,
    head: request::Parts,
    body: Received,
    key: Option<&'a ApiKey>,
    wishes: Wishes,
    arrived: Time,
}

enum Arrived {
    Ready(Box<Ready>),
    /// A redirect.
    Elsewhere(Response),
}

/// What the request means.
struct Way {
    spec: Arc<ModelSpec>,
    /// The path behind the name.
    rest: String,
    /// What precedes `rest` in the client's path.
    base: String,
}

impl Arriving<'_> {
    async fn receive(
        gateway: &Arc<Gateway>,
        request: Request,
        prefix: &'static str,
        names: Names,
        id: &HeaderValue,
        arrival: &mut Arrival,
    ) -> Result<Arrived, Reject> {
        let arrived = gateway.handle.now();
        let catalog = gateway.handle.catalog();
        let (mut head, body) = request.into_parts();
        let entitled = authorize(&catalog, &head.headers)
            .inspect(|key| arrival.entitled(*key))
            .and_then(|key| Ok((key, Wishes::read(&head.headers)?)))
            .and_then(|(key, wishes)| Ok((key, wishes, gateway.sockets.asked(&mut head)?)));
        let (key, wishes, client) = match entitled {
            Ok(entitled) => entitled,
            Err(reject) => {
                receive::discard(body, &head.headers).await;
                return Err(reject);
            }
        };
        let queue = &catalog.settings.queue;
        let body =
            receive::receive(body, &head.headers, queue, &gateway.bodies, &gateway.limits).await?;
        arrival.received(&catalog, || head.headers.clone(), &body.bytes);
        let arriving = Arriving { gateway, catalog: &catalog, head, body, key, wishes, arrived };
        let way = arriving.way(prefix, names)?;
        if way.rest.is_empty() {
            let to = format!("{}/", way.base);
            let moved = moved(&arriving.head.method, &to, arriving.head.uri.query());
            arrival.visits();
            return Ok(Arrived::Elsewhere(moved));
        }
        arriving.ready(way, client, id, arrival).map(|ready| Arrived::Ready(Box::new(ready)))
    }

    fn way(&self, prefix: &str, names: Names) -> Result<Way, Reject> {
        let path = self.head.uri.path();
        let raw = path.strip_prefix(prefix).unwrap_or(path);
        match names {
            Names::InPath => {
                let Some((_, name, rest)) =
                    path::split_name(raw, |name| self.is_known(name).then_some(()))
                else {
                    let first = path::decoded(raw.split('/').next().unwrap_or(raw));
                    let first = first.unwrap_or_else(|| raw.to_owned());
                    return Err(admit::model(self.catalog, &first, self.key)
                        .err()
                        .unwrap_or_else(|| nameless("the path")));
                };
                // Of a route the one that is asked first: what is passed on is not sent twice.
                let spec = choose(&self.gateway.handle, self.catalog, &name, self.key)?.spec;
                let base = path[..path.len() - rest.len()].to_owned();
                Ok(Way { spec, rest: rest.to_owned(), base })
            }
            Names::ComfyUi => {
                let spec = self.comfyui()?;
                Ok(Way { spec, rest: raw.to_owned(), base: prefix.to_owned() })
            }
            Names::InQueryOrBody => {
                let name = match in_query(&self.head.uri).next() {
                    Some(name) => name,
                    None => self
                        .named_in_body()?
                        .ok_or_else(|| nameless("the query (`?model=`) or the body"))?,
                };
                let spec = Arc::clone(admit::model(self.catalog, &name, self.key)?);
                Ok(Way { spec, rest: raw.to_owned(), base: String::new() })
            }
        }
    }

    fn is_known(&self, name: &str) -> bool {
        self.catalog.resolve(name).is_some() || self.catalog.routes.contains_key(name)
    }

    /// The model that is ComfyUI: by llama-swap's name for it, by name or alias, or by its tag.
    fn comfyui(&self) -> Result<Arc<ModelSpec>, Reject> {
        let by_name = COMFYUI_NAMES.into_iter().find(|name| self.catalog.resolve(name).is_some());
        let tagged = || {
            let is_it = |spec: &&Arc<ModelSpec>| {
                spec.engine == EngineKind::Http
                    && spec.tags.iter().any(|tag| tag.eq_ignore_ascii_case("comfyui"))
            };
            self.catalog.models.values().find(is_it).map(|spec| spec.name.as_str())
        };
        let Some(name) = by_name.or_else(tagged) else {
            let message = "no model is ComfyUI: call one `comfyui`, or give it that alias or tag";
            return Err(Reject::new(StatusCode::NOT_FOUND, "model_not_found", message));
        };
        admit::model(self.catalog, name, self.key).map(Arc::clone)
    }

    fn ready(
        self,
        way: Way,
        client: Option<Client>,
        id: &HeaderValue,
        arrival: &mut Arrival,
    ) -> Result<Ready, Reject> {
        let Way { spec, rest, base } = way;
        let is_http = spec.engine == EngineKind::Http;
        let target = path::normalise(&rest, !is_http).map_err(|why| {
            let shown: String = rest.chars().take(200).collect();
            Reject::bad_request("path_invalid", format!("the path {shown} cannot be used: {why}"))
                .model(&spec.name)
        })?;
        self.check(&spec, &target)?;
        self.check_body(&spec)?;
        let Arriving { gateway, catalog, head, mut body, key, wishes, arrived } = self;
        if spec.engine == EngineKind::Ollama {
            body.bytes = ollama::guarded(body.bytes, &target.plain, spec.served_name())
                .map_err(|reject| reject.model(&spec.name))?;
        }
        let (is_work, queue) =
            underway::work_of(&gateway.watched, &spec, &head.method, &target.plain);
        // Of a server that is no LLM's, a socket is never work.
        let is_visit = is_http && (!is_work || client.is_some());
        // A page of hundreds of files costs no GPU anything: it is none of the requests counted.
        match is_visit {
            true => arrival.visits(),
            false => arrival.hold(gateway.limiter.enter(&catalog.settings, key)?),
        }
        arrival.asked(spec.name.as_str());
        let queue = queue.filter(|_| !is_visit);
        let query = head.uri.query().map_or(String::new(), |query| format!("?{query}"));
        let mut headers = forward::passed_lines(&Fields::from(&head.headers), id);
        if client.is_some() {
            websocket::ask(&mut headers);
        }
        let peer = site::peer(&head.extensions);
        let passing = Passing {
            catalog,
            spec: Arc::clone(&spec),
            key,
            wishes,
            account: arrival.admitted(spec.name.clone()),
            outgoing: Outgoing {
                method: head.method,
                path_and_query: format!("{}{query}", target.sent).into(),
                headers,
                body: body.bytes,
                hops: wishes.hops,
            },
            held: body.held,
            peer,
            arrived,
            is_visit,
            queue,
        };
        let job = Job::passing(gateway, passing);
        Ok(Ready { job, gateway: Arc::clone(gateway), spec, client, base })
    }

    /// Whether this engine's path is for this caller.
    fn check(&self, spec: &ModelSpec, target: &Target) -> Result<(), Reject> {
        let settings = &self.catalog.settings;
        let (method, shown) = (&self.head.method, &target.plain);
        let engine = spec.engine.as_str();
        let refused = |why: String| {
            let message = format!("{method} {shown} of engine {engine} is not passed on: {why}");
            Err(Reject::new(StatusCode::FORBIDDEN, "path_not_allowed", message).model(&spec.name))
        };
        if matches!(*method, Method::TRACE | Method::CONNECT) {
            return refused("that method shows or tunnels what is not the client's".to_owned());
        }
        match paths::judge(spec.engine, method, &target.plain) {
            Verdict::Allowed => {
                auth::authorize(settings, &self.head.headers, Scope::Inference).map(|_| ())
            }
            Verdict::Development => match self.key {
                Some(key) if auth::has_scope(key, Scope::Admin) => Ok(()),
                Some(_) => refused("a development path, it takes a key of scope admin".to_owned()),
                None => refused(
                    "a development path, it takes a key of scope admin, and auth.keys is empty"
                        .to_owned(),
                ),
            },
            Verdict::Lifecycle(instead) => {
                refused(format!("Wharf itself does what it does; use {instead}"))
            }
            Verdict::Unlisted => refused("it is not in that engine's list".to_owned()),
        }
    }

    /// One instance may serve models that this key may not use (adapters, another server's): the
    /// body may name no other model than the path does.
    fn check_body(&self, spec: &Arc<ModelSpec>) -> Result<(), Reject> {
        // llama-server answers for its one model whatever it is called.
        if matches!(spec.engine, EngineKind::Http | EngineKind::Llamacpp) {
            return Ok(());
        }
        self.check_encoding(spec)?;
        let in_body = self.named_in_body()?;
        // Left out, it is the base of an adapter, or (of Ollama's `/api/show`) in another field.
        let must_name = spec.adapter.is_some() || spec.engine == EngineKind::Ollama;
        if in_body.is_none() && must_name && self.head.method == Method::POST {
            return Err(nameless("the body").model(&spec.name));
        }
        let mut named = in_query(&self.head.uri).chain(in_body);
        let Some(name) = named.find(|name| !self.is_known_as(spec, name)) else { return Ok(()) };
        let shown: String = name.chars().take(parse::NAME_SHOWN_MAX).collect();
        let message = format!(
            "this request is one to model \"{}\" and names \"{shown}\" too; name one of them",
            spec.name
        );
        Err(Reject::bad_request("model_mismatch", message).param("model").model(&spec.name))
    }

    /// Whether the server of `spec` can take `name` for no other model.
    fn is_known_as(&self, spec: &ModelSpec, name: &str) -> bool {
        let is_others = || self.catalog.models.values().any(|other| other.served_name() == name);
        name == spec.served_name()
            || (self.catalog.resolve(name).is_some_and(|named| named.name == spec.name)
                && !is_others())
    }

    /// A body that is read here must be read alike there: Python's servers take JSON in UTF-16 too.
    fn check_encoding(&self, spec: &ModelSpec) -> Result<(), Reject> {
        let body = &self.body.bytes;
        let is_wide = body.iter().take(4).any(|byte| *byte == 0)
            || [&b"\xef\xbb\xbf"[..], b"\xfe\xff", b"\xff\xfe"].iter().any(|m| body.starts_with(m));
        let is_coded =
            self.head.headers.get_all(header::CONTENT_ENCODING).iter().any(|coding| {
                !body.is_empty() && !coding.as_bytes().eq_ignore_ascii_case(b"identity")
            });
        if !is_wide && !is_coded {
            return Ok(());
        }
        let message = "the body must come as it is: UTF-8 without a byte order mark, and no \
                       `Content-Encoding`";
        let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        Err(Reject::new(status, "body_encoding", message).model(&spec.name))
    }

    /// `model` of a JSON object or a multipart form, where there is one.
    fn named_in_body(&self) -> Result<Option<String>, Reject> {
        let (bytes, headers) = (&self.body.bytes, &self.head.headers);
        let content = headers.get(header::CONTENT_TYPE).map(|value| value.as_bytes());
        let is_form = content.is_some_and(|content| {
            content
                .get(..19)
                .is_some_and(|start| start.eq_ignore_ascii_case(b"multipart/form-data"))
        });
        let asked = if is_form {
            multipart::parse(bytes, headers)
        } else if bytes.trim_ascii_start().first() == Some(&b'{') {
            parse::parse(bytes)
        } else {
            return Ok(None);
        };
        match asked {
            Ok(asked) => Ok(Some(asked.model.into_owned())),
            Err(reject) if reject.code() == "model_missing" => Ok(None),
            Err(reject) => Err(reject),
        }
    }
}

/// Any key that may infer, or administer: which of them the path takes is known later.
fn authorize<'a>(catalog: &'a Catalog, headers: &HeaderMap) -> Result<Option<&'a ApiKey>, Reject> {
    let settings = &catalog.settings;
    auth::authorize(settings, headers, Scope::Inference).or_else(|reject| {
        match auth::authorize(settings, headers, Scope::Admin) {
            Ok(Some(key)) => Ok(Some(key)),
            _ => Err(reject),
        }
    })
}

fn nameless(place: &str) -> Reject {
    let message = format!("{place} names no model; GET /v1/models lists the names");
    Reject::bad_request("model_missing", message).param("model")
}

/// Every `model=` of the query: servers differ in which one they take.
fn in_query(uri: &Uri) -> impl Iterator<Item = String> {
    let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    let plain = |text: &str| path::decoded(&text.replace('+', " "));
    pairs
        .filter(move |(key, _)| plain(key).is_some_and(|key| key == "model"))
        .filter_map(move |(_, value)| plain(value))
        .filter(|name| !name.is_empty())
}

/// So that the relative links of a page work.
fn moved(method: &Method, to: &str, query: Option<&str>) -> Response {
    let status = match *method {
        Method::GET | Method::HEAD => StatusCode::MOVED_PERMANENTLY,
        _ => StatusCode::PERMANENT_REDIRECT,
    };
    let to = query.map_or_else(|| to.to_owned(), |query| format!("{to}?{query}"));
    (status, [(header::LOCATION, to)]).into_response()
}

/// A request that may be sent.
struct Ready {
    job: Box<Job>,
    gateway: Arc<Gateway>,
    spec: Arc<ModelSpec>,
    client: Option<Client>,
    base: String,
}

impl Ready {
    async fn respond(self, wants_page: bool) -> Response {
        let Ready { job, gateway, spec, client, base } = self;
        let answer = match job.run(None).await {
            Ok(answer) => answer,
            Err(reject) if wants_page && reject.code() == "model_not_loaded" => {
                return not_loaded::page(&spec, &gateway.handle.catalog().settings, reject);
            }
            Err(reject) => return reject.into_response(),
        };
        let is_switching = answer.head.status == StatusCode::SWITCHING_PROTOCOLS;
        match client {
            Some(client) if is_switching => websocket::join(answer, client, &gateway.limits),
            _ if is_switching => answer.switched_unasked().into_response(),
            _ => relocated(answer, &base),
        }
    }
}

/// An engine's redirects know nothing of the path that precedes its own here.
fn relocated(answer: Answer, base: &str) -> Response {
    let mut response = answer.into_reply().into_response();
    let headers = response.headers_mut();
    let inside = headers
        .get(header::LOCATION)
        .and_then(|to| to.to_str().ok())
        .filter(|to| to.starts_with('/') && !to.starts_with("//"))
        .and_then(|to| HeaderValue::try_from(format!("{base}{to}")).ok());
    if let Some(inside) = inside {
        headers.insert(header::LOCATION, inside);
    }
    response
}
