//! From a launch spec to a command that can be run: program, arguments, environment.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

use crate::config::catalog::{ProcessSpec, RuntimeSpec};
use crate::runtime::{Identity, LaunchSpec};
use crate::scheduler::event::{Fault, FaultKind};
use crate::units::{GpuId, InstanceId, ModelName};

pub const INSTALLATION: &str = "WHARF_INSTALLATION";
pub const INSTANCE: &str = "WHARF_INSTANCE";
const MODEL: &str = "WHARF_MODEL";
const SPEC: &str = "WHARF_SPEC";
const GPUS: &str = "WHARF_GPUS";
const PORT: &str = "WHARF_PORT";
/// Not `WHARF_LOG`: that sets the log filter of Wharf itself, which an engine may be too.
pub const LOG_FILE: &str = "WHARF_LOG_FILE";

/// A command with everything replaced and looked up. No `Debug`: its environment holds secrets.
pub struct Command {
    /// Absolute.
    pub program: PathBuf,
    pub arg0: String,
    pub args: Vec<String>,
    /// Set over what Wharf's own environment holds.
    pub env: BTreeMap<String, String>,
    pub cwd: Option<PathBuf>,
}

pub fn resolve(spec: &LaunchSpec, log: &Path) -> Result<Command, Fault> {
    let RuntimeSpec::Process(process) = &spec.model.runtime else {
        return Err(Fault::new(FaultKind::Internal, "not a process model"));
    };
    let model = &spec.model.name;
    if let Some(cwd) = &process.cwd
        && !cwd.is_dir()
    {
        let message = format!("model {model}: cwd {} is not a folder", cwd.display());
        return Err(Fault::new(FaultKind::BadSpec, message));
    }
    let fill = |text: &String| {
        text.replace("${PORT}", &spec.port.to_string())
            .replace("${MODEL}", spec.model.served_name())
    };
    let mut argv = process.argv.iter().map(fill);
    let Some(arg0) = argv.next() else {
        return Err(Fault::new(FaultKind::BadSpec, format!("model {model}: the command is empty")));
    };
    let args = argv.chain(spec.args.iter().map(fill)).collect();

    let mut env = BTreeMap::new();
    // Python's setproctitle (vLLM uses it) would overwrite the environment that /proc shows, by
    // which we know our own.
    env.insert("SPT_NOENV".to_owned(), "1".to_owned());
    env.extend(spec.env.clone());
    env.extend(spec.api_key.env());
    env.extend(process.env.iter().map(|(key, value)| (key.clone(), fill(value))));
    env.extend(identity_env(&spec.identity, log));

    let program = find_program(&arg0, process, env.get("PATH").map(String::as_str))
        .map_err(|why| Fault::new(FaultKind::CommandMissing, format!("model {model}: {why}")))?;
    Ok(Command { program, arg0, args, env, cwd: process.cwd.clone() })
}

fn find_program(arg0: &str, process: &ProcessSpec, path: Option<&str>) -> Result<PathBuf, String> {
    if arg0.contains('/') {
        let base = process.cwd.clone().or_else(|| std::env::current_dir().ok());
        let program = base.unwrap_or_default().join(arg0);
        return match () {
            () if !program.exists() => Err(format!("command {} does not exist", program.display())),
            () if !is_executable(&program) => Err(format!(
                "command {} is not executable: chmod +x, or name the interpreter",
                program.display()
            )),
            () => Ok(program),
        };
    }
    let path = path.map(|path| OsStr::new(path).to_owned()).or_else(|| std::env::var_os("PATH"));
    std::env::split_paths(&path.unwrap_or_default())
        .map(|dir| dir.join(arg0))
        .find(|program| is_executable(program))
        .ok_or_else(|| format!("command {arg0} is not on PATH: install it or give its full path"))
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && access(path, AccessFlags::X_OK).is_ok()
}

fn identity_env(identity: &Identity, log: &Path) -> [(String, String); 7] {
    let gpus: Vec<String> = identity.gpus.iter().map(GpuId::to_string).collect();
    [
        (INSTALLATION, identity.installation.clone()),
        (INSTANCE, identity.instance.to_string()),
        (MODEL, identity.model.to_string()),
        (SPEC, identity.spec_hash.clone()),
        (GPUS, gpus.join(",")),
        (PORT, identity.port.to_string()),
        (LOG_FILE, log.display().to_string()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
}

/// The way back: who a process is, by its environment.
pub fn identity_of(env: &BTreeMap<String, String>) -> Option<Identity> {
    let gpus = env.get(GPUS)?;
    Some(Identity {
        installation: env.get(INSTALLATION)?.clone(),
        instance: parse_instance(env.get(INSTANCE)?)?,
        model: ModelName::new(env.get(MODEL)?),
        spec_hash: env.get(SPEC)?.clone(),
        gpus: gpus
            .split(',')
            .filter(|gpu| !gpu.is_empty())
            .map(|gpu| gpu.parse().ok().map(GpuId))
            .collect::<Option<_>>()?,
        port: env.get(PORT)?.parse().ok()?,
    })
}

fn parse_instance(text: &str) -> Option<InstanceId> {
    text.strip_prefix('i')?.parse().ok().map(InstanceId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_survives_the_way_through_the_environment() {
        for gpus in [vec![], vec![GpuId(3)], vec![GpuId(0), GpuId(1)]] {
            let identity = Identity {
                installation: "inst".into(),
                instance: InstanceId(12),
                model: ModelName::new("qwen2.5-coder:7b"),
                spec_hash: "abc".into(),
                gpus,
                port: 18051,
            };
            let env = identity_env(&identity, Path::new("/var/log/x")).into_iter().collect();
            assert_eq!(identity_of(&env), Some(identity));
        }
    }

    #[test]
    fn a_program_is_looked_up_as_the_engine_would_be_found() {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::write(dir.path().join("data"), "").expect("a file");
        let here = ProcessSpec { cwd: Some(dir.path().to_owned()), ..ProcessSpec::default() };
        let path = dir.path().to_str().expect("utf-8");
        assert!(find_program("sh", &here, None).is_ok_and(|program| program.is_absolute()));
        assert!(find_program("sh", &here, Some(path)).is_err_and(|why| why.contains("PATH")));
        assert!(find_program("data", &here, Some(path)).is_err(), "not executable");
        assert!(find_program("./data", &here, None).is_err_and(|why| why.contains("chmod")));
        assert!(find_program("./none", &here, None).is_err_and(|why| why.contains("exist")));
    }
}
