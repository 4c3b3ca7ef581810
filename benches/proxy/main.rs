//! What Wharf costs on the way to an engine, next to nginx and to no proxy at all: `make bench`.
//!
//! One upstream that answers at once, nginx and `wharf serve` before it, all on loopback. Every
//! round measures every row, and every row each target, one right after the other, so that what
//! else the machine does meets all alike. The medians of the rounds are held against each other.

mod clock;
mod load;
mod machine;
mod pacer;
mod plot;
mod processes;
mod report;
mod rows;
mod table;
mod upstream;
mod wire;
mod wrk;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::{fs, io};

use clap::{Args, Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use rows::{Bench, ROWS, parse_address};
use table::Table;

/// Direct, nginx and Wharf side by side
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Run,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Only the upstream, until it is killed
    Upstream { address: SocketAddr },
    /// Send so many requests, one after the other over one connection
    Drive {
        #[arg(value_parser = parse_address)]
        target: SocketAddr,
        requests: u64,
    },
    /// Only Wharf's configuration for an upstream, for runs by hand
    Models { upstream: SocketAddr },
}

#[derive(Debug, Args)]
struct Run {
    /// Rows to measure, by key; all by default
    #[arg(long, value_delimiter = ' ')]
    rows: Vec<String>,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Of each measurement
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Of the row with many slow ones
    #[arg(long, default_value_t = 8000)]
    streams: usize,
    /// Where the results go: benchmark.md, benchmark.json, benchmark.svg
    #[arg(long, default_value = ".cache/bench")]
    out: PathBuf,
    /// Wharf, instead of the one built with this benchmark
    #[arg(long, default_value = env!("CARGO_BIN_EXE_wharf"))]
    wharf: PathBuf,
    /// Cargo says this when it is asked for benchmarks, and not when it runs tests.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let ran = match cli.command {
        Some(Command::Upstream { address }) => allow_many().and_then(|()| upstream::serve(address)),
        Some(Command::Drive { target, requests }) => drive(target, requests),
        Some(Command::Models { upstream }) => {
            println!("{}", processes::models_yaml(upstream, 1));
            Ok(())
        }
        // Cargo runs benchmarks as tests, too: that it was built is enough.
        None if !cli.run.bench => Ok(()),
        None => run(&cli.run),
    };
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Each stream is a descriptor here, and one in the upstream.
fn allow_many() -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

fn drive(target: SocketAddr, requests: u64) -> io::Result<()> {
    let usual = wire::Wanted::Json { bytes: wire::ANSWER_BYTES };
    let request = wire::request(&target.to_string(), &wire::body(usual, 0));
    let mut sequence = load::Sequence::connect(target)?;
    for number in 0..requests {
        let status = sequence.ask(&request)?;
        if status != 200 {
            return Err(io::Error::other(format!("request {number} was answered {status}")));
        }
    }
    Ok(())
}

fn run(options: &Run) -> io::Result<()> {
    let known = |key: &str| key == "idle" || ROWS.iter().any(|(name, ..)| *name == key);
    if let Some(unknown) = options.rows.iter().find(|key| !known(key)) {
        let all: Vec<&str> = ROWS.iter().map(|(name, ..)| *name).chain(["idle"]).collect();
        return Err(io::Error::other(format!("no row {unknown}; there are: {}", all.join(" "))));
    }
    let wanted = |key: &str| options.rows.is_empty() || options.rows.iter().any(|row| row == key);
    allow_many()?;
    let work = tempfile::tempdir()?;
    let mut bench = start(options, work.path().to_owned())?;
    bench.warm_up()?;
    if wanted("idle") {
        eprintln!("idle …");
        bench.idle(options.rounds)?;
    }
    for round in 1..=options.rounds {
        for (key, what, measure) in ROWS.iter().filter(|(key, ..)| wanted(key)) {
            eprintln!("round {round} of {}: {key} ({what}) …", options.rounds);
            measure(&mut bench)?;
        }
    }
    let machine = machine::describe(&options.wharf);
    let Bench { table, .. } = bench;
    report::write(options, &machine, &table)
}

fn start(options: &Run, work: PathBuf) -> io::Result<Bench> {
    // nginx's worker is another user where we are root, and needs the way to its folders.
    fs::set_permissions(&work, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let upstream = processes::upstream(&work)?;
    let nginx = processes::nginx(&work, upstream.address)?;
    let binary = options.wharf.canonicalize()?;
    let new =
        processes::Wharf { binary: &binary, work: &work, upstream: upstream.address, models: 1 };
    let wharf = new.start()?;
    Ok(Bench {
        seconds: options.seconds,
        streams: options.streams,
        table: Table::default(),
        upstream,
        nginx,
        wharf,
        binary,
        work,
    })
}
