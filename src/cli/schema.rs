//! `wharf schema`: what models.yaml may hold, for editors and for people.

use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use crate::config::schema;

#[derive(Debug, Parser)]
#[command(after_help = "Example:\n  wharf schema > wharf.schema.json\n\n\
    Then the first line of models.yaml is\n  \
    # yaml-language-server: $schema=wharf.schema.json\n\n\
    Exit code: 0.")]
pub struct Args {
    /// As JSON Schema (2020-12), or as a page of documentation
    #[arg(long, value_enum, default_value_t = Format::Json)]
    format: Format,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Json,
    Markdown,
}

pub fn run(args: &Args) -> ExitCode {
    let text = match args.format {
        Format::Json => schema::json_schema(),
        Format::Markdown => schema::markdown(),
    };
    print!("{text}");
    ExitCode::SUCCESS
}
