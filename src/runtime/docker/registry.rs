//! Image references, and the credentials that `docker login` stored for their registries.

use std::collections::BTreeMap;
use std::path::PathBuf;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bollard::auth::DockerCredentials;
use serde::Deserialize;

const DOCKER_HUB: &str = "docker.io";
/// The key under which `docker login` keeps Docker Hub's credentials.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// `ghcr.io/org/image:tag`, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    pub registry: String,
    /// Without tag and digest.
    pub name: String,
    /// A tag, or a digest (`sha256:…`), as the pull API wants it.
    pub tag: String,
}

impl Reference {
    /// Errors say what is wrong with the name.
    pub fn parse(image: &str) -> Result<Reference, String> {
        let (name, tag) = match image.split_once('@') {
            Some((name, digest)) => (strip_tag(name).0, Some(digest)),
            None => strip_tag(image),
        };
        let tag = tag.unwrap_or("latest");
        let is_word = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if tag.is_empty() || !tag.chars().all(|c| is_word(c) || c == ':') {
            return Err(format!("`{tag}` is no tag"));
        }
        let (registry, path) = match name.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => {
                (first, rest)
            }
            _ => (DOCKER_HUB, name),
        };
        let is_part = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part.chars().all(|c| is_word(c) && !c.is_ascii_uppercase())
        };
        let is_host = registry.starts_with(|c: char| c.is_ascii_alphanumeric())
            && registry.chars().all(|c| is_word(c) || c == ':');
        if !is_host || !path.split('/').all(is_part) {
            return Err("a name has only lower-case letters, digits and . _ - between its /".into());
        }
        let (registry, name, tag) = (registry.to_owned(), name.to_owned(), tag.to_owned());
        Ok(Reference { registry, name, tag })
    }
}

/// A colon after the last slash begins a tag; before it, a port.
fn strip_tag(name: &str) -> (&str, Option<&str>) {
    match name.rsplit_once(':') {
        Some((head, tag)) if !tag.contains('/') => (head, Some(tag)),
        _ => (name, None),
    }
}

#[derive(Default, Deserialize)]
struct ConfigFile {
    #[serde(default)]
    auths: BTreeMap<String, Auth>,
}

#[derive(Default, Deserialize)]
struct Auth {
    #[serde(default)]
    auth: String,
    identitytoken: Option<String>,
}

/// What `docker login REGISTRY` stored for this user, if it is stored in the file itself
/// (credential helpers are programs, which Wharf does not run).
pub fn credentials(registry: &str) -> Option<DockerCredentials> {
    let dir = std::env::var_os("DOCKER_CONFIG")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker")))?;
    credentials_in(&std::fs::read_to_string(dir.join("config.json")).ok()?, registry)
}

fn credentials_in(config: &str, registry: &str) -> Option<DockerCredentials> {
    let config: ConfigFile = serde_json::from_str(config).ok()?;
    let key = if registry == DOCKER_HUB { DOCKER_HUB_KEY } else { registry };
    let auth = config.auths.get(key).or_else(|| config.auths.get(&format!("https://{key}")))?;
    let decoded = String::from_utf8(BASE64_STANDARD.decode(&auth.auth).ok()?).ok()?;
    let (username, password) = decoded.split_once(':')?;
    Some(DockerCredentials {
        username: Some(username.to_owned()),
        password: Some(password.trim_end_matches('\0').to_owned()),
        identitytoken: auth.identitytoken.clone(),
        serveraddress: Some(key.to_owned()),
        ..DockerCredentials::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_taken_apart() {
        let parse = |image: &str| {
            Reference::parse(image).map(|r| format!("{} {} {}", r.registry, r.name, r.tag))
        };
        assert_eq!(
            parse("vllm/vllm-openai:v0.31.0").as_deref(),
            Ok("docker.io vllm/vllm-openai v0.31.0")
        );
        assert_eq!(
            parse("localhost:5000/x").as_deref(),
            Ok("localhost:5000 localhost:5000/x latest")
        );
        assert_eq!(
            parse("ghcr.io/a/b:1@sha256:ab").as_deref(),
            Ok("ghcr.io ghcr.io/a/b sha256:ab")
        );
        assert!(parse("Bad Name:1").is_err());
        assert!(parse("x:").is_err());
        assert!(parse("").is_err());
        assert!(parse("../etc").is_err());
    }

    #[test]
    fn stored_logins_are_found() {
        let config = r#"{"auths":{"https://index.docker.io/v1/":{"auth":"bWU6czpjcmV0"}}}"#;
        let found = credentials_in(config, "docker.io").expect("a login");
        assert_eq!(found.username.as_deref(), Some("me"));
        assert_eq!(found.password.as_deref(), Some("s:cret"));
        assert!(credentials_in(config, "ghcr.io").is_none());
    }
}
