//! `wharf serve`: the gateway and the orchestrator.

use std::fs;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use clap::builder::FalseyValueParser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::catalog::{ApiKey, Catalog, Scope, TlsFiles};
use crate::config::{Loaded, Overlay, Report};
use crate::reload::{Flag, Misfits, Source};
use crate::store::Store;
use crate::{app, config};

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  wharf serve --config models.yaml\n\n\
    SIGHUP reloads the file (only changed models are touched); SIGTERM drains and stops,\n    a second one hurries.\n\
    Exit codes: 0 stopped as asked, 1 the configuration or the start failed.")]
pub struct ServeArgs {
    /// The configuration; models.yaml by default.
    #[arg(long, short, env = "WHARF_CONFIG")]
    pub config: Option<PathBuf>,
    /// Address of the inference API, instead of `listen.gateway`.
    #[arg(long, env = "WHARF_GATEWAY")]
    pub gateway: Option<SocketAddr>,
    /// Address of the control API, instead of `listen.orchestrator`.
    #[arg(long, env = "WHARF_ORCHESTRATOR")]
    pub orchestrator: Option<SocketAddr>,
    /// Serve HTTPS with the certificate in this PEM file, instead of `listen.tls.cert_file`.
    #[arg(long, env = "WHARF_TLS_CERT_FILE", value_name = "FILE", requires = "tls_key_file")]
    pub tls_cert_file: Option<PathBuf>,
    /// Its private key, instead of `listen.tls.key_file`.
    #[arg(long, env = "WHARF_TLS_KEY_FILE", value_name = "FILE", requires = "tls_cert_file")]
    pub tls_key_file: Option<PathBuf>,
    /// Path of the store, instead of `store`.
    #[arg(long, env = "WHARF_STORE")]
    pub store: Option<PathBuf>,
    /// Accept the key in this file, with every scope; made at first start if it is not there.
    #[arg(long, env = "WHARF_KEY_FILE")]
    pub key_file: Option<PathBuf>,
    /// Make the key file readable by its group, too (where Prometheus reads it, say).
    #[arg(long, env = "WHARF_KEY_FOR_GROUP", value_parser = FalseyValueParser::new())]
    pub key_for_group: bool,
    /// A further name under which clients may reach Wharf, beside `hosts`; repeatable.
    #[arg(long = "host", env = "WHARF_HOSTS", value_delimiter = ',', value_name = "NAME")]
    pub hosts: Vec<String>,
}

impl ServeArgs {
    /// Lays the flags over the configuration; answers with those that were given.
    fn apply(&self, catalog: &mut Catalog) -> anyhow::Result<Vec<Flag>> {
        let settings = &mut catalog.settings;
        let mut given = Vec::new();
        let mut note = |flag, key| given.push(Flag { flag, key });
        if let Some(gateway) = self.gateway {
            settings.gateway = gateway;
            note("--gateway (WHARF_GATEWAY)", "listen.gateway");
        }
        if let Some(orchestrator) = self.orchestrator {
            settings.orchestrator = orchestrator;
            note("--orchestrator (WHARF_ORCHESTRATOR)", "listen.orchestrator");
        }
        if let (Some(cert), Some(key)) = (&self.tls_cert_file, &self.tls_key_file) {
            settings.tls = Some(TlsFiles { cert_file: cert.clone(), key_file: key.clone() });
            note("--tls-cert-file (WHARF_TLS_CERT_FILE)", "listen.tls.cert_file");
            note("--tls-key-file (WHARF_TLS_KEY_FILE)", "listen.tls.key_file");
        }
        if let Some(store) = &self.store {
            settings.store.clone_from(store);
            note("--store (WHARF_STORE)", "store");
        }
        if !self.hosts.is_empty() {
            settings.hosts.extend(self.hosts.iter().cloned());
            note("--host (WHARF_HOSTS)", "hosts");
        }
        if let Some(path) = &self.key_file {
            settings.auth.keys.push(ApiKey {
                name: "key-file".to_owned(),
                key: read_or_make_key(path, self.key_for_group)?.into(),
                models: vec!["*".to_owned()],
                scopes: vec![Scope::Inference, Scope::Read, Scope::Admin],
                ..ApiKey::default()
            });
            note("--key-file (WHARF_KEY_FILE)", "auth.keys");
        }
        Ok(given)
    }
}

pub async fn run(args: ServeArgs) -> anyhow::Result<()> {
    allow_many_connections();
    let path = config::path(args.config.clone());
    let source = Source { path, flags: Arc::new(move |catalog| args.apply(catalog)) };
    // The file alone says where the store is; the store says what lies over the file.
    let text = source.read()?;
    let alone = source.build(text, Overlay::default(), Misfits::Refuse)?;
    let settings = &alone.loaded.catalog.settings;
    let store = Store::open(&settings.store, settings.retention);
    let built = source.build(alone.text, Overlay::of(&store), Misfits::LeaveOut)?;
    warn_of(&source.path, &built.loaded);
    tracing::info!(
        config = %source.path.display(),
        models = built.loaded.catalog.models.len(),
        "wharf {}",
        env!("CARGO_PKG_VERSION")
    );
    app::run(source, built, store).await
}

/// Each request in flight holds two descriptors; the usual soft limit of 1024 is soon reached.
fn allow_many_connections() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
}

/// What `wharf check` would say beside errors.
fn warn_of(path: &Path, loaded: &Loaded) {
    if !loaded.warnings.is_empty() {
        let file = path.display().to_string();
        tracing::warn!("{}", Report { file: &file, problems: &loaded.warnings });
    }
}

fn read_or_make_key(path: &Path, for_group: bool) -> anyhow::Result<String> {
    if let Ok(key) = fs::read_to_string(path)
        && !key.trim().is_empty()
    {
        return Ok(key.trim().to_owned());
    }
    let mut random = [0_u8; 24];
    fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random))?;
    let key: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    fs::OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(if for_group { 0o640 } else { 0o600 })
        .open(path)
        .and_then(|mut file| file.write_all(key.as_bytes()))
        .with_context(|| format!("failed to write the key file {}", path.display()))?;
    tracing::info!(path = %path.display(), "made an API key");
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_new_key_is_for_its_owner_alone_unless_its_group_needs_it() {
        let dir = tempfile::tempdir().unwrap();
        for (name, for_group, mode) in [("alone", false, 0o600), ("group", true, 0o640)] {
            let path = dir.path().join(name);
            let key = read_or_make_key(&path, for_group).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, mode);
            assert_eq!(read_or_make_key(&path, for_group).unwrap(), key, "made once");
        }
    }
}
