//! Threads that serve connections, one for each core. A connection stays on its thread with all
//! that belongs to it (its requests, their upstream connections, their timers): no lock is shared
//! and nobody has to be woken on another core while bytes pass through.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::upstream;

/// Cheap to clone. The threads end with the last clone, and cut what they still serve.
#[derive(Clone, Debug)]
pub struct Threads(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    threads: Vec<Thread>,
    _end: DropGuard,
}

#[derive(Debug)]
struct Thread {
    runtime: Handle,
    serving: Arc<AtomicUsize>,
}

impl Threads {
    /// One for each core.
    ///
    /// # Errors
    /// The system gives no more threads or descriptors.
    pub fn start() -> io::Result<Threads> {
        let end = CancellationToken::new();
        let threads = (1..=upstream::lanes())
            .map(|lane| {
                let runtime = Builder::new_current_thread().enable_all().build()?;
                let (handle, end) = (runtime.handle().clone(), end.clone());
                let thread = std::thread::Builder::new().name(format!("serve-{lane}"));
                thread.spawn(move || {
                    upstream::set_lane(lane);
                    runtime.block_on(end.cancelled());
                    // Name lookups that still run must not hold up the end.
                    runtime.shutdown_background();
                })?;
                Ok(Thread { runtime: handle, serving: Arc::default() })
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Threads(Arc::new(Inner { threads, _end: end.drop_guard() })))
    }

    /// On the thread with the fewest connections.
    pub fn spawn(&self, connection: impl Future<Output = ()> + Send + 'static) {
        let threads = self.0.threads.iter();
        let least = threads.min_by_key(|thread| thread.serving.load(Ordering::Relaxed));
        let Some(thread) = least else { return };
        thread.serving.fetch_add(1, Ordering::Relaxed);
        let served = Served(Arc::clone(&thread.serving));
        thread.runtime.spawn(async move {
            let _served = served;
            connection.await;
        });
    }
}

struct Served(Arc<AtomicUsize>);

impl Drop for Served {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
