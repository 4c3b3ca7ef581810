//! The stand-in engine, `wharf engine`: a real process that speaks the OpenAI API and can be told
//! how long it loads, how much (simulated) memory it takes, how fast it answers and how it fails.
//!
//! It serves demos and fault tests; it replaces no real engine in a claim.

mod adapters;
mod comfy;
mod engine;
pub mod ledger;
mod load;
mod messages;
mod ollama;
mod options;
mod reply;
mod routes;
mod server;
mod sleep;
mod socket;
mod workers;

use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};

use self::engine::{Engine, say};
pub use self::options::Options;
use self::options::{Shutdown, Style};
use self::server::Server;
use self::workers::Workers;

/// Runs until it is told to end, fails, or crashes as it was told to.
pub async fn run(mut options: Options) -> io::Result<ExitCode> {
    options.take_key_from_env();
    if options.load.worker {
        workers::work().await?;
        return Ok(ExitCode::SUCCESS);
    }
    // Before anything else: as the first process of a container it would be deaf to both.
    let mut signals = Signals::listen()?;
    let mut workers = Workers::start(options.load.children)?;
    // Written to, or it would take none.
    let bytes = usize::try_from(options.load.host_ram.0).unwrap_or(0);
    let host_ram = std::hint::black_box(vec![1_u8; bytes]);
    let engine = Arc::new(Engine::new(options, workers.memory_owner()));
    let code = live(&engine, &mut workers, &mut signals).await;
    workers.end().await;
    drop(host_ram);
    Ok(code)
}

async fn live(engine: &Arc<Engine>, workers: &mut Workers, signals: &mut Signals) -> ExitCode {
    let options = &engine.options;
    if options.style == Style::Ollama {
        return live_as_ollama(engine, signals).await;
    }
    let mut server = None;
    if options.style == Style::Llamacpp {
        // Unlike the others it answers while it loads: 503.
        match open(engine).await {
            Ok(opened) => server = Some(opened),
            Err(code) => return code,
        }
    }
    tokio::select! {
        loaded = load::load(engine) => {
            if loaded.is_err() {
                return ExitCode::FAILURE;
            }
        }
        () = signals.told_to_end(options.shutdown()) => return ExitCode::SUCCESS,
    }
    let server = match server {
        Some(server) => server,
        None => match open(engine).await {
            Ok(server) => server,
            Err(code) => return code,
        },
    };
    engine.ready.send_replace(true);
    announce(options);
    let crash = async {
        match options.faults.crash_after_load {
            Some(delay) => tokio::time::sleep(delay).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = crash => routes::crash(engine, "crash after load, as asked for"),
        () = signals.told_to_end(options.shutdown()) => {}
    }
    shut_down(engine, server, workers).await;
    tokio::time::sleep(options.end.release_lag).await;
    ExitCode::SUCCESS
}

async fn live_as_ollama(engine: &Arc<Engine>, signals: &mut Signals) -> ExitCode {
    let server = match ollama::open(engine).await {
        Ok(server) => server,
        Err(error) => {
            say(&format!("Error: listen tcp {}: {error}", engine.options.port));
            return ExitCode::FAILURE;
        }
    };
    announce(&engine.options);
    signals.told_to_end(engine.options.shutdown()).await;
    server.close();
    ExitCode::SUCCESS
}

async fn open(engine: &Arc<Engine>) -> Result<Server, ExitCode> {
    let addr = SocketAddr::new(engine.options.host, engine.options.port);
    Server::open(addr, routes::router(Arc::clone(engine))).await.map_err(|error| {
        say(&format!(
            "ERROR: [Errno 98] error while attempting to bind on address {addr}: {error}"
        ));
        ExitCode::FAILURE
    })
}

fn announce(options: &Options) {
    let (host, port) = (options.host, options.port);
    say(&match options.style {
        Style::Vllm => "INFO:     Application startup complete.".to_owned(),
        Style::Llamacpp => format!("main: server is listening on http://{host}:{port}"),
        Style::Plain | Style::Ollama => format!("ready on http://{host}:{port}"),
        Style::Http => format!("To see the GUI go to: http://{host}:{port}"),
    });
}

async fn shut_down(engine: &Engine, server: Server, workers: &mut Workers) {
    server.close();
    match engine.options.shutdown() {
        // `Refuse` never gets here.
        Shutdown::Fast | Shutdown::Refuse => {}
        Shutdown::Drain(limit) => {
            let _ = tokio::time::timeout(limit, server.closed()).await;
        }
        Shutdown::Fixed(wait) => tokio::time::sleep(wait).await,
        Shutdown::StuckOnStream => {
            // vLLM's workers die at once, so that nothing comes on the streams any more, but its
            // server waits for whoever still listens to them.
            engine.frozen.send_replace(true);
            workers.end().await;
            engine.all_replied().await;
        }
        Shutdown::Llama(limit) => {
            let _ = tokio::time::timeout(limit, engine.all_replied()).await;
        }
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn told_to_end(&mut self, shutdown: Shutdown) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => {}
                _ = self.interrupt.recv() => {}
            }
            if shutdown != Shutdown::Refuse {
                return;
            }
            say("signal ignored, as asked for");
        }
    }
}
