//! Everything in models.yaml but the models: addresses, swap, queue, GPUs, what is kept and told.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::access::{self, Allowed};
use super::catalog::{
    Announce, CaptureSettings, GpuProvider, OnExit, Retention, Settings, SwapMode, TlsFiles,
    WaitingSettings, WaitingStyle,
};
use super::decode::{At, Sink, Spot, Table, Unread};
use super::subst::Env;
use super::{launch, values};
use crate::units::Bytes;

/// The settings, and what only the checks need of them.
pub(super) struct ReadSettings {
    pub settings: Settings,
    /// Where keys stand, by path.
    pub spots: BTreeMap<&'static str, Spot>,
    /// What `auth.keys` allow, with the name of the key.
    pub allowed: Vec<Allowed>,
}

impl ReadSettings {
    /// Where `path` was set, or nowhere.
    pub(super) fn spot(&self, path: &'static str) -> Spot {
        let elsewhere = || Spot { path: path.to_owned(), ..Spot::default() };
        self.spots.get(path).cloned().unwrap_or_else(elsewhere)
    }
}

fn set<T>(target: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *target = value;
    }
}

/// Takes the global keys out of the file's top level.
pub(super) fn read(top: &mut Table<'_>, env: Env<'_>, sink: &mut Sink) -> ReadSettings {
    let mut read =
        ReadSettings { settings: Settings::default(), spots: BTreeMap::new(), allowed: Vec::new() };
    listen(top, &mut read, sink);
    if let Some(at) = top.take("swap") {
        swap(&at, &mut read, sink);
    }
    if let Some(at) = top.take("queue") {
        queue(&at, &mut read, sink);
    }
    if let Some(at) = top.take("gpu") {
        gpu(&at, &mut read, sink);
    }
    if let Some(at) = top.take("ram") {
        ram(&at, &mut read, sink);
    }
    ports(top, &mut read, sink);
    if let Some(at) = top.take("auth") {
        access::auth(&at, &mut read, env, sink);
    }
    let settings = &mut read.settings;
    if let Some(store) = top.take("store").and_then(|at| at.string(sink, "a file name")) {
        settings.store = PathBuf::from(store);
    }
    if let Some(at) = top.take("cors") {
        settings.cors = origins(&at, sink);
    }
    if let Some(at) = top.take("hosts") {
        settings.hosts = hosts(&at, sink);
    }
    if let Some(mut table) = top.take("docker").and_then(|at| at.table(sink, "`host`")) {
        settings.docker_host = table.take("host").and_then(|at| docker_host(&at, sink));
        const HINT: Unread = Unread::Hint("this belongs into one model, or into `defaults.docker`");
        table.finish(sink, &[("image", HINT), ("args", HINT), ("volumes", HINT), ("env", HINT)]);
    }
    if let Some(at) = top.take("waiting") {
        let waiting = waiting(&at, settings.waiting, sink);
        set(&mut settings.waiting, waiting);
    }
    kept(top, settings, sink);
    read
}

/// What is kept, what is told to others, and what the file says of its own reading.
fn kept(top: &mut Table<'_>, settings: &mut Settings, sink: &mut Sink) {
    if let Some(at) = top.take("rate_limits") {
        settings.rate_limits = access::limits(&at, sink);
    }
    if let Some(at) = top.take("captures") {
        settings.captures = captures(&at, sink);
    }
    if let Some(at) = top.take("retention") {
        settings.retention = retention(&at, sink);
    }
    if let Some(at) = top.take("announce") {
        settings.announce = announce(&at, sink);
    }
    set(&mut settings.check_interval, top.take("check_interval").and_then(|at| at.duration(sink)));
    if let Some(mut table) = top.take("reload").and_then(|at| at.table(sink, "`watch`")) {
        set(&mut settings.watch, table.take("watch").and_then(|at| at.boolean(sink)));
        table.finish(sink, &[]);
    }
}

fn captures(at: &At<'_>, sink: &mut Sink) -> CaptureSettings {
    let mut captures = CaptureSettings::default();
    if at.node.text().is_some() {
        set(&mut captures.enabled, at.boolean(sink));
        return captures;
    }
    let Some(mut table) = at.table(sink, "`enabled`, `total` and `body`") else { return captures };
    set(&mut captures.enabled, table.take("enabled").and_then(|at| at.boolean(sink)));
    set(&mut captures.total, table.take("total").and_then(|at| at.size(sink)));
    let body = table.take("body");
    set(&mut captures.body, body.as_ref().and_then(|at| at.size(sink)));
    if let Some(at) = body.filter(|_| captures.body > captures.total) {
        let message = format!("one body may be larger than all together ({})", captures.total);
        sink.error(&at.spot, message, "expected at most `total`");
    }
    table.finish(sink, &[]);
    captures
}

fn retention(at: &At<'_>, sink: &mut Sink) -> Retention {
    let mut retention = Retention::default();
    let Some(mut table) = at.table(sink, "`age` and `rows`") else { return retention };
    set(&mut retention.age, table.take("age").and_then(|at| at.some_duration(sink)));
    set(&mut retention.rows, table.take("rows").and_then(|at| at.int(sink, 1..=100_000_000)));
    table.finish(sink, &[("days", Unread::Hint("did you mean `age`, such as `age: 30d`?"))]);
    retention
}

fn announce(at: &At<'_>, sink: &mut Sink) -> Vec<Announce> {
    const URL: &str = "a URL such as http://127.0.0.1:6121";
    let items = at.list(sink, "a list of URLs such as [\"http://127.0.0.1:6121\"]");
    let one = |item: At<'_>| {
        if !item.is_map() {
            let url = item.parsed(sink, URL, launch::any_url)?;
            return Some(Announce { url, key: None, ca: None });
        }
        let mut table = item.table(sink, "`url`, `key` and `ca`")?;
        let url = table.take("url");
        if url.is_none() {
            sink.error(&item.spot, "this registry has no `url`", "expected `url: …`");
        }
        let url = url.and_then(|at| at.parsed(sink, URL, launch::any_url));
        let key = table.take("key").and_then(|at| at.string(sink, "a text such as ${env.NAME}"));
        let ca = table.take("ca").and_then(|at| at.string(sink, "a PEM file")).map(PathBuf::from);
        table.finish(sink, &[("api_key", Unread::Hint("did you mean `key`?"))]);
        Some(Announce { url: url?, key, ca })
    };
    items.unwrap_or_default().into_iter().filter_map(one).collect()
}

fn listen(top: &mut Table<'_>, read: &mut ReadSettings, sink: &mut Sink) {
    let at = top.take("listen");
    let Some(mut table) = at.and_then(|at| at.table(sink, "`gateway` and `orchestrator`")) else {
        return;
    };
    for (key, path) in [("gateway", "listen.gateway"), ("orchestrator", "listen.orchestrator")] {
        let Some(at) = table.take(key) else { continue };
        let address = at.parsed(sink, "an address such as 127.0.0.1:8080", values::address);
        let target = match key {
            "gateway" => &mut read.settings.gateway,
            _ => &mut read.settings.orchestrator,
        };
        set(target, address);
        read.spots.insert(path, at.spot);
    }
    if let Some(at) = table.take("connections") {
        read.settings.connections = at.int(sink, 1..=1_000_000);
    }
    if let Some(at) = table.take("tls") {
        read.settings.tls = tls(&at, sink);
    }
    table.finish(sink, &[]);
}

fn tls(at: &At<'_>, sink: &mut Sink) -> Option<TlsFiles> {
    let mut table = at.table(sink, "`cert_file` and `key_file`")?;
    let mut file = |key: &'static str, sink: &mut Sink| {
        if table.key_spot(key).is_none() {
            let expected = format!("expected `{key}: …`, a PEM file");
            sink.error(&at.spot, format!("TLS takes `{key}`, too"), expected);
        }
        table.take(key).and_then(|at| at.string(sink, "a PEM file")).map(PathBuf::from)
    };
    let (cert_file, key_file) = (file("cert_file", sink), file("key_file", sink));
    let hints = [
        ("cert", Unread::Hint("did you mean `cert_file`?")),
        ("key", Unread::Hint("did you mean `key_file`?")),
    ];
    table.finish(sink, &hints);
    Some(TlsFiles { cert_file: cert_file?, key_file: key_file? })
}

fn swap(at: &At<'_>, read: &mut ReadSettings, sink: &mut Sink) {
    let Some(mut table) = at.table(sink, "`mode`, `max_wait` and other keys") else { return };
    let swap = &mut read.settings.swap;
    if let Some(at) = table.take("mode") {
        set(&mut swap.mode, at.choice(sink, &MODES));
        read.spots.insert("swap.mode", at.spot);
    }
    if let Some(at) = table.take("max_concurrent_models") {
        set(&mut swap.max_concurrent_models, at.int(sink, 0..=100_000));
        read.spots.insert("swap.max_concurrent_models", at.spot);
    }
    if let Some(at) = table.take("max_wait") {
        swap.max_wait = if at.node.text() == Some("auto") {
            None
        } else {
            at.parsed(sink, "`auto` or a duration such as 30s", values::duration)
        };
        read.spots.insert("swap.max_wait", at.spot);
    }
    set(&mut swap.min_residency, table.take("min_residency").and_then(|at| at.duration(sink)));
    set(&mut swap.drain_timeout, table.take("drain_timeout").and_then(|at| at.duration(sink)));
    let above_zero = |at: At<'_>, sink: &mut Sink| at.some_duration(sink);
    set(&mut swap.vram_timeout, table.take("vram_timeout").and_then(|at| above_zero(at, sink)));
    set(&mut swap.start_timeout, table.take("start_timeout").and_then(|at| above_zero(at, sink)));
    if let Some(at) = table.take("shutdown_timeout") {
        set(&mut swap.shutdown_timeout, at.some_duration(sink));
        read.spots.insert("swap.shutdown_timeout", at.spot);
    }
    let on_exit = [("keep", OnExit::Keep), ("stop", OnExit::Stop)];
    set(&mut swap.on_exit, table.take("on_exit").and_then(|at| at.choice(sink, &on_exit)));
    set(&mut swap.read_ahead, table.take("read_ahead").and_then(|at| read_ahead(&at, sink)));
    table.finish(
        sink,
        &[("policy", Unread::Hint("there is one policy; `max_wait` and `priority` shape it"))],
    );
}

/// `true`: as much as memory allows.
pub(super) fn read_ahead(at: &At<'_>, sink: &mut Sink) -> Option<Bytes> {
    match at.node.text() {
        Some("true") => Some(Bytes::MAX),
        Some("false") => Some(Bytes::ZERO),
        _ => at.parsed(sink, "`true`, `false` or a size such as 64GiB", values::size),
    }
}

pub(super) const MODES: [(&str, SwapMode); 2] =
    [("multi-active", SwapMode::MultiActive), ("single-active", SwapMode::SingleActive)];

fn queue(at: &At<'_>, read: &mut ReadSettings, sink: &mut Sink) {
    let Some(mut table) = at.table(sink, "`limit`, `timeout` and other keys") else { return };
    let queue = &mut read.settings.queue;
    set(&mut queue.limit, table.take("limit").and_then(|at| at.int(sink, 1..=1_000_000)));
    if let Some(at) = table.take("per_model") {
        set(&mut queue.per_model, at.int(sink, 1..=1_000_000));
        read.spots.insert("queue.per_model", at.spot);
    }
    if let Some(at) = table.take("timeout") {
        set(&mut queue.timeout, at.some_duration(sink));
        read.spots.insert("queue.timeout", at.spot);
    }
    if let Some(at) = table.take("body_limit") {
        set(&mut queue.body_limit, at.size(sink));
        read.spots.insert("queue.body_limit", at.spot);
    }
    set(&mut queue.total_bodies, table.take("total_bodies").and_then(|at| at.size(sink)));
    table.finish(sink, &[]);
}

fn gpu(at: &At<'_>, read: &mut ReadSettings, sink: &mut Sink) {
    let Some(mut table) = at.table(sink, "`provider`, `reserve` and `memory`") else { return };
    let gpu = &mut read.settings.gpu;
    let providers = [
        ("auto", GpuProvider::Auto),
        ("nvml", GpuProvider::Nvml),
        ("none", GpuProvider::None),
        ("simulated", GpuProvider::Simulated),
    ];
    set(&mut gpu.provider, table.take("provider").and_then(|at| at.choice(sink, &providers)));
    read.spots.insert("gpu", at.spot.clone());
    set(&mut gpu.reserve, table.take("reserve").and_then(|at| at.size(sink)));
    if let Some(at) = table.take("memory") {
        gpu.memory = sizes(&at, "a size per GPU such as [24GiB, 24GiB] or `2 x 24GiB`", sink);
        read.spots.insert("gpu.memory", at.spot);
    }
    set(&mut gpu.release_lag, table.take("release_lag").and_then(|at| at.duration(sink)));
    if let Some(at) = table.take("foreign") {
        gpu.foreign = sizes(&at, "a size per GPU such as [0, 3GiB]", sink);
        read.spots.insert("gpu.foreign", at.spot);
    }
    for key in ["release_lag", "foreign"] {
        if let Some(spot) = table.key_spot(key).filter(|_| gpu.provider != GpuProvider::Simulated) {
            sink.error(
                &spot,
                format!("`{key}` describes a simulated GPU only"),
                "remove it, or set `provider: simulated`",
            );
        }
    }
    table.finish(sink, &[]);
}

fn ram(at: &At<'_>, read: &mut ReadSettings, sink: &mut Sink) {
    let Some(mut table) = at.table(sink, "`total` and `reserve`") else { return };
    let ram = &mut read.settings.ram;
    if let Some(at) = table.take("total") {
        ram.total = at.size(sink);
        read.spots.insert("ram.total", at.spot);
    }
    set(&mut ram.reserve, table.take("reserve").and_then(|at| at.size(sink)));
    table.finish(sink, &[("memory", Unread::Hint("did you mean `total`?"))]);
}

fn sizes(at: &At<'_>, what: &str, sink: &mut Sink) -> Vec<Bytes> {
    if at.is_list() {
        let items = at.list(sink, what).unwrap_or_default();
        return items.iter().filter_map(|item| item.size(sink)).collect();
    }
    at.parsed(sink, what, values::sizes).unwrap_or_default()
}

fn ports(top: &mut Table<'_>, read: &mut ReadSettings, sink: &mut Sink) {
    let what = "a range of ports such as 18051-18999";
    if let Some(at) = top.take("engine_ports") {
        set(&mut read.settings.engine_ports, at.parsed(sink, what, values::port_range));
        read.spots.insert("engine_ports", at.spot);
    }
    if let Some(at) = top.take("ports") {
        read.settings.front_doors = at.parsed(sink, what, values::port_range);
        read.spots.insert("ports", at.spot);
    }
}

fn origins(at: &At<'_>, sink: &mut Sink) -> Vec<String> {
    let what = "an origin such as https://chat.example";
    let items = at.list(sink, "a list of origins such as [\"https://chat.example\"]");
    let origin = |text: &str| {
        let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
        match host {
            _ if text == "*" => Ok(text.to_owned()),
            Some(host) if !host.is_empty() && !host.contains(['/', ' ', '*']) => {
                Ok(text.to_owned())
            }
            Some(host) if host.ends_with('/') => {
                Err(format!("leave out the slash: `{}`", text.trim_end_matches('/')))
            }
            Some(_) => Err("expected scheme and host only, such as https://chat.example".into()),
            None => Err(format!("an origin has a scheme: did you mean `https://{text}`?")),
        }
    };
    items.unwrap_or_default().iter().filter_map(|item| item.parsed(sink, what, origin)).collect()
}

fn hosts(at: &At<'_>, sink: &mut Sink) -> Vec<String> {
    let host = |text: &str| match text.split_once("://") {
        Some((_, host)) => Err(format!("leave out the scheme: `{host}`")),
        None if text.is_empty() || text.contains(['/', ' ']) => Err(String::new()),
        None => Ok(text.to_ascii_lowercase()),
    };
    let items = at.list(sink, "a list of host names such as [wharf.lan]").unwrap_or_default();
    items.iter().filter_map(|at| at.parsed(sink, "a host name such as wharf.lan", host)).collect()
}

fn docker_host(at: &At<'_>, sink: &mut Sink) -> Option<String> {
    at.parsed(sink, "a Docker address such as unix:///var/run/docker.sock", |text| {
        match text.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') => Ok(text.to_owned()),
            Some(("tcp" | "http", host)) if host.contains(':') => Ok(text.to_owned()),
            Some(("tcp" | "http", host)) => Err(format!("add the port: `tcp://{host}:2375`")),
            Some(("ssh", _)) => {
                Err("ssh is not supported; forward the socket and use unix:// or tcp://".into())
            }
            None if text.starts_with('/') => Err(format!("did you mean `unix://{text}`?")),
            _ => Err(String::new()),
        }
    })
}

pub(super) fn waiting(
    at: &At<'_>,
    base: WaitingSettings,
    sink: &mut Sink,
) -> Option<WaitingSettings> {
    let styles = [
        ("comment", WaitingStyle::Comment),
        ("chunk", WaitingStyle::Chunk),
        ("reasoning", WaitingStyle::Reasoning),
        ("off", WaitingStyle::Off),
    ];
    if !at.is_map() {
        return at.choice(sink, &styles).map(|style| WaitingSettings { style, ..base });
    }
    let mut table = at.table(sink, "`style` and `after`")?;
    let mut waiting = base;
    set(&mut waiting.style, table.take("style").and_then(|at| at.choice(sink, &styles)));
    set(&mut waiting.after, table.take("after").and_then(|at| at.duration(sink)));
    table.finish(sink, &[]);
    Some(waiting)
}
