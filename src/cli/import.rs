//! `wharf import`: the configuration of another tool → models.yaml.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use crate::config::import::{self, Source};
use crate::config::{self, Report};

/// Exit codes.
const ALL: u8 = 0;
const UNKNOWN: u8 = 1;
const UNREADABLE: u8 = 2;
const IN_PART: u8 = 3;

#[derive(Debug, Parser)]
#[command(after_help = "Reads, and recognises by their content:\n  \
    llama-swap's config.yaml\n  \
    the swapper service's swapper_config.yaml\n  \
    the model pool manager's model_pool_config.json and model_pool_registry.json, together\n  \
    docker-compose.yml with services called …-llm (dynamic model orchestrator)\n\n\
    What has no equivalent is told on stderr: name, place, why, and what to do.\n\n\
    Examples:\n  \
    wharf import config.yaml -o models.yaml\n  \
    wharf import model_pool_config.json model_pool_registry.json > models.yaml\n\n\
    Exit codes: 0 all of it was carried over, 1 no configuration of a known tool,\n\
    2 a file cannot be read or written, 3 written, but something has no equivalent.")]
pub struct Args {
    /// The files of the other tool
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Where to write; stdout by default
    #[arg(long, short)]
    output: Option<PathBuf>,
    /// Overwrite the output
    #[arg(long)]
    force: bool,
}

pub fn run(args: &Args) -> ExitCode {
    let mut sources = Vec::new();
    for path in &args.files {
        match std::fs::read_to_string(path) {
            Ok(text) => sources.push(Source { file: path.display().to_string(), text }),
            Err(error) => {
                eprintln!("wharf: cannot read {}: {error}", path.display());
                return ExitCode::from(UNREADABLE);
            }
        }
    }
    let imported = match import::convert(&sources) {
        Ok(imported) => imported,
        Err(error) => {
            eprintln!("wharf: {error}");
            return ExitCode::from(UNKNOWN);
        }
    };
    eprintln!("recognised: {}", imported.tool);
    match &args.output {
        None => print!("{}", imported.yaml),
        Some(path) => {
            if let Err(error) = write(path, args.force, &imported.yaml) {
                eprintln!("wharf: cannot write {}: {error}", path.display());
                return ExitCode::from(UNREADABLE);
            }
            eprintln!("written: {}", path.display());
        }
    }
    if !imported.notes.is_empty() {
        eprintln!("\nwithout an equivalent:");
        imported.notes.iter().for_each(|note| eprintln!("  {note}"));
    }
    let file = args.output.as_deref().map_or("models.yaml".into(), |p| p.display().to_string());
    let checked = config::parse(&imported.yaml, &file, &|name| std::env::var(name).ok());
    let is_usable = match &checked {
        Ok(loaded) if loaded.warnings.is_empty() => true,
        Ok(loaded) => {
            eprintln!(
                "\n`wharf check` warns:\n{}",
                Report { file: &file, problems: &loaded.warnings }
            );
            true
        }
        Err(errors) => {
            eprintln!("\n`wharf check` says what is left to do:\n{errors}");
            false
        }
    };
    ExitCode::from(if imported.notes.is_empty() && is_usable { ALL } else { IN_PART })
}

/// For its owner only: it may hold keys.
fn write(path: &Path, force: bool, text: &str) -> std::io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).mode(0o600);
    if force {
        options.create(true).truncate(true);
    } else {
        options.create_new(true);
    }
    options.open(path)?.write_all(text.as_bytes())
}
