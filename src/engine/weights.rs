//! Which files an engine will read its weights from, by its own arguments.
//!
//! Only files that are surely meant: what an argument names, all parts of a split file, the weights
//! in a folder that is the model, the snapshot of a repository in the hub's cache. Nothing is
//! fetched, and what is not there is left out.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use super::command_line::CommandLine;
use crate::config::catalog::{DockerSpec, EngineKind, ModelSpec, RuntimeSpec};

const MODEL: &[&str] = &["--model", "--model-path", "-m"];
const REVISION: &[&str] = &["--revision"];
const DOWNLOAD_DIR: &[&str] = &["--download-dir"];
/// llama.cpp reads it, too.
const MODEL_VARIABLE: &str = "LLAMA_ARG_MODEL";
const KINDS: &[&str] = &["gguf", "safetensors", "bin", "pt", "pth"];
/// A folder with more is no model.
const FILES_MAX: usize = 512;

/// In the order in which an engine reads them, as far as that can be told. It looks at the disk.
/// `volumes`: where Docker keeps those that have a name, if that is a folder of this machine.
pub fn weight_files(spec: &ModelSpec, volumes: Option<&Path>) -> Vec<PathBuf> {
    let line = CommandLine::of(spec);
    let inherited = |name: &str| std::env::var(name).ok();
    let (places, env): (Places<'_>, Env<'_>) = match &spec.runtime {
        RuntimeSpec::Process(process) => {
            let env = |name: &str| process.env.get(name).cloned().or_else(|| inherited(name));
            let cwd = process.cwd.clone().or_else(|| std::env::current_dir().ok());
            (Places::Here { cwd: cwd.unwrap_or_default() }, Box::new(env))
        }
        RuntimeSpec::Docker(docker) => {
            let env = |name: &str| docker.env.get(name).cloned();
            (Places::Container { docker, volumes }, Box::new(env))
        }
        RuntimeSpec::External(_) | RuntimeSpec::Ollama(_) => return Vec::new(),
    };
    let mut found = Vec::new();
    let serves = spec.engine == EngineKind::Vllm;
    let positional = serves.then(|| line.positional("serve")).flatten();
    let variable = env(MODEL_VARIABLE);
    let model = positional.or(line.value(MODEL)).or(variable.as_deref());
    if let Some(model) = model {
        match places.path(model) {
            Some(path) if path.is_dir() => found.extend(weights_in(&path)),
            Some(path) if path.is_file() => found.extend(parts_of(&path)),
            _ => {
                let cache = line.value(DOWNLOAD_DIR).map(str::to_owned);
                let cache = cache.or_else(|| hub_cache(&*env, &places));
                let snapshot = cache
                    .and_then(|cache| snapshot(&places.path(&cache)?, model, line.value(REVISION)));
                found.extend(snapshot.iter().flat_map(|snapshot| weights_in(snapshot)));
            }
        }
    }
    // Projectors, drafts, adapters.
    let others = line.words().flat_map(|word| [word, word.split_once('=').map_or("", |w| w.1)]);
    for path in others.filter(|word| is_weights(Path::new(word))).filter_map(|w| places.path(w)) {
        if path.is_file() {
            found.extend(parts_of(&path));
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    found.retain(|path| seen.insert(path.clone()));
    found.truncate(FILES_MAX);
    found
}

/// An environment, by name.
type Env<'a> = Box<dyn Fn(&str) -> Option<String> + 'a>;

/// What a path of the engine's is on this machine.
enum Places<'a> {
    Here { cwd: PathBuf },
    Container { docker: &'a DockerSpec, volumes: Option<&'a Path> },
}

impl Places<'_> {
    fn path(&self, path: &str) -> Option<PathBuf> {
        let path = Path::new(path);
        match self {
            Places::Here { cwd } => Some(cwd.join(path)),
            Places::Container { docker, volumes } => mounted(docker, *volumes, path),
        }
    }
}

fn mounted(docker: &DockerSpec, volumes: Option<&Path>, path: &Path) -> Option<PathBuf> {
    // A `..` could lead out of the mount.
    if path.components().any(|part| part == Component::ParentDir) {
        return None;
    }
    let binds = docker.volumes.iter().filter_map(|volume| {
        let mut parts = volume.split(':');
        Some((parts.next()?, Path::new(parts.next()?)))
    });
    let (source, target) = binds
        .filter(|(_, target)| path.starts_with(target))
        .max_by_key(|(_, target)| target.components().count())?;
    let source = match source.starts_with('/') {
        true => PathBuf::from(source),
        false => volumes?.join(source).join("_data"),
    };
    Some(source.join(path.strip_prefix(target).ok()?))
}

/// As the hub's client chooses it.
fn hub_cache(env: &dyn Fn(&str) -> Option<String>, places: &Places<'_>) -> Option<String> {
    if let Some(cache) = env("HF_HUB_CACHE") {
        return Some(cache);
    }
    if let Some(home) = env("HF_HOME") {
        return Some(format!("{home}/hub"));
    }
    let home = env("HOME").or_else(|| match places {
        Places::Here { .. } => None,
        Places::Container { .. } => Some("/root".to_owned()),
    })?;
    Some(format!("{home}/.cache/huggingface/hub"))
}

/// `models--org--name/snapshots/COMMIT`, whose entries are links to what was downloaded.
fn snapshot(cache: &Path, repo: &str, revision: Option<&str>) -> Option<PathBuf> {
    if repo.starts_with(['/', '.']) || repo.split('/').count() != 2 {
        return None;
    }
    let folder = cache.join(format!("models--{}", repo.replace('/', "--")));
    let revision = revision.unwrap_or("main");
    let commit = std::fs::read_to_string(folder.join("refs").join(revision));
    let commit = commit.map_or_else(|_| revision.to_owned(), |commit| commit.trim().to_owned());
    Some(folder.join("snapshots").join(commit)).filter(|snapshot| snapshot.is_dir())
}

fn is_weights(path: &Path) -> bool {
    let kind = path.extension().and_then(|kind| kind.to_str());
    kind.is_some_and(|kind| KINDS.contains(&kind))
}

/// Of one format, where a repository brings several.
fn weights_in(folder: &Path) -> Vec<PathBuf> {
    let mut by_kind: BTreeMap<usize, Vec<PathBuf>> = BTreeMap::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let kind = path.extension().and_then(|kind| kind.to_str());
        let kind = kind.and_then(|kind| [KINDS[1], KINDS[0]].iter().position(|k| *k == kind));
        let kind = kind.or_else(|| is_weights(&path).then_some(KINDS.len()));
        if let Some(kind) = kind.filter(|_| path.is_file()) {
            by_kind.entry(kind).or_default().push(path);
        }
    }
    let mut files = by_kind.into_values().next().unwrap_or_default();
    files.sort();
    files
}

/// `name-00001-of-00003.gguf` and those after it; else the file itself.
fn parts_of(path: &Path) -> Vec<PathBuf> {
    let split = || {
        let name = path.file_name()?.to_str()?;
        let (stem, of) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, first) = stem.rsplit_once('-')?;
        let (first, count): (usize, usize) = (first.parse().ok()?, of.parse().ok()?);
        let digits = of.len();
        let part = |n| path.with_file_name(format!("{stem}-{n:0digits$}-of-{of}.gguf"));
        Some((first..=count.min(FILES_MAX)).map(part).filter(|part| part.is_file()).collect())
    };
    split().unwrap_or_else(|| vec![path.to_owned()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::catalog::ProcessSpec;

    fn touch(folder: &Path, files: &[&str]) {
        for file in files {
            let path = folder.join(file);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            std::fs::write(path, "x").expect("written");
        }
    }

    fn names(spec: &ModelSpec, folder: &Path) -> Vec<String> {
        let name = |path: &PathBuf| {
            path.strip_prefix(folder).expect("below").to_str().expect("utf-8").to_owned()
        };
        weight_files(spec, Some(&folder.join("volumes"))).iter().map(name).collect()
    }

    fn process(engine: EngineKind, cwd: &Path, command: &str) -> ModelSpec {
        let argv = shell_words::split(command).expect("words");
        let process = ProcessSpec { argv, cwd: Some(cwd.to_owned()), ..ProcessSpec::default() };
        ModelSpec { engine, runtime: RuntimeSpec::Process(process), ..ModelSpec::plain("a") }
    }

    fn docker(volumes: &[&str], args: &[&str]) -> ModelSpec {
        let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        let docker =
            DockerSpec { volumes: owned(volumes), args: owned(args), ..DockerSpec::default() };
        let runtime = RuntimeSpec::Docker(docker);
        ModelSpec { engine: EngineKind::Vllm, runtime, ..ModelSpec::plain("a") }
    }

    #[test]
    fn a_command_names_its_files_and_every_part_of_them() {
        let dir = tempfile::tempdir().expect("a folder");
        let here = dir.path();
        touch(here, &["m/a-00001-of-00002.gguf", "m/a-00002-of-00002.gguf", "m/b.gguf", "p.gguf"]);
        let llama = |command: &str| names(&process(EngineKind::Llamacpp, here, command), here);
        assert_eq!(
            llama("llama-server -m m/a-00001-of-00002.gguf --mmproj=p.gguf --port 1"),
            ["m/a-00001-of-00002.gguf", "m/a-00002-of-00002.gguf", "p.gguf"]
        );
        let absolute = format!("sh -c 'exec llama-server --model {}/m/b.gguf'", here.display());
        assert_eq!(llama(&absolute), ["m/b.gguf"]);
        assert!(llama("llama-server -m gone.gguf").is_empty());
        assert!(llama("llama-server --models-dir m").is_empty(), "a choice, not a model");
    }

    #[test]
    fn a_folder_gives_its_weights_in_one_format() {
        let dir = tempfile::tempdir().expect("a folder");
        let here = dir.path();
        touch(here, &["m/x-2.safetensors", "m/x-1.safetensors", "m/old.bin", "m/config.json"]);
        let spec = process(EngineKind::Vllm, here, "vllm serve ./m --port 1");
        assert_eq!(names(&spec, here), ["m/x-1.safetensors", "m/x-2.safetensors"]);
    }

    #[test]
    fn a_container_reads_through_its_mounts() {
        let dir = tempfile::tempdir().expect("a folder");
        let here = dir.path();
        let snapshot = "volumes/hf/_data/hub/models--org--m/snapshots/abc/w.safetensors";
        touch(here, &["bind/x/w.safetensors", snapshot]);
        std::fs::create_dir_all(here.join("volumes/hf/_data/hub/models--org--m/refs"))
            .expect("made");
        std::fs::write(here.join("volumes/hf/_data/hub/models--org--m/refs/main"), "abc\n")
            .expect("written");
        let bind = format!("{}/bind:/models:ro", here.display());
        let spec = docker(&[&bind], &["--model", "/models/x"]);
        assert_eq!(names(&spec, here), ["bind/x/w.safetensors"]);
        let hub = docker(&["hf:/root/.cache/huggingface"], &["--model", "org/m"]);
        assert_eq!(names(&hub, here), [snapshot]);
        let out = docker(&[&bind], &["--model", "/models/../secret/x"]);
        assert!(names(&out, here).is_empty());
        let nowhere = docker(&[], &["--model", "/models/x"]);
        assert!(names(&nowhere, here).is_empty(), "in the image");
    }
}
