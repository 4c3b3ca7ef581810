//! What is measured: a function for each row, which is run once in every round.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use super::load::{self, Held, Moment, Paced};
use super::processes::{self, Server, Wharf};
use super::table::{TARGETS, Table, Target};
use super::wire::ANSWER_BYTES;
use super::wrk::Load;

const KIB: usize = 1024;
const LARGE: usize = 100 * KIB;
const HUGE: usize = 20 * KIB * KIB;
/// Connections of huge bodies: more would only wait for memory.
const HUGE_CONNECTIONS: usize = 4;
const SHORT_EVENTS: u64 = 20;
const TOKENS_PER_S: u64 = 50;
const IDLE_SETTLE: Duration = Duration::from_secs(3);
const IDLE_WINDOW: Duration = Duration::from_secs(10);

pub struct Bench {
    pub work: PathBuf,
    pub binary: PathBuf,
    pub seconds: u64,
    pub streams: usize,
    pub upstream: Server,
    pub nginx: Server,
    pub wharf: Server,
    pub table: Table,
}

/// Of the rows that one load yields.
#[derive(Clone, Copy)]
struct JsonKeys {
    rate: &'static str,
    p50: &'static str,
    /// The mean where nothing queues, else p99.
    tail: &'static str,
    cpu: &'static str,
}

const JSON_1: JsonKeys =
    JsonKeys { rate: "json-1", p50: "json-1-p50", tail: "json-1-mean", cpu: "json-1-cpu" };
const JSON_32: JsonKeys =
    JsonKeys { rate: "json-32", p50: "json-32-p50", tail: "json-32-p99", cpu: "json-32-cpu" };
const JSON_256: JsonKeys =
    JsonKeys { rate: "json-256", p50: "json-256-p50", tail: "json-256-p99", cpu: "json-256-cpu" };

type Run = fn(&mut Bench) -> io::Result<()>;

/// Key, what it is, and how it is measured.
pub const ROWS: [(&str, &str, Run); 11] = [
    ("json-1", "JSON of 1 KB, 1 connection", |bench| bench.json(JSON_1, 1)),
    ("json-32", "JSON of 1 KB, 32 connections", |bench| bench.json(JSON_32, 32)),
    ("json-256", "JSON of 1 KB, 256 connections", |bench| bench.json(JSON_256, 256)),
    ("sse-32", "short streams, 32 at once", Bench::short_streams),
    ("paced", "1,000 streams at 50 tokens/s", Bench::paced),
    ("slow", "many open streams at 1 event/s", Bench::slow),
    ("large-answer", "answers of 100 KB", |bench| {
        bench.bodies("large-answer", "Answers of 100 KB, 32 connections", 32, (0, LARGE))
    }),
    ("large-request", "requests of 100 KB", |bench| {
        bench.bodies(
            "large-request",
            "Requests of 100 KB, 32 connections",
            32,
            (LARGE, ANSWER_BYTES),
        )
    }),
    ("huge-answer", "answers of 20 MB", |bench| {
        bench.bodies("huge-answer", "Answers of 20 MB, 4 connections", HUGE_CONNECTIONS, (0, HUGE))
    }),
    ("huge-request", "requests of 20 MB", |bench| {
        bench.bodies(
            "huge-request",
            "Requests of 20 MB, 4 connections",
            HUGE_CONNECTIONS,
            (HUGE, ANSWER_BYTES),
        )
    }),
    ("start", "start-up with 1 and with 500 models", Bench::start),
];

impl Bench {
    fn time(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    fn of(&self, target: Target) -> &Server {
        match target {
            Target::Direct => &self.upstream,
            Target::Nginx => &self.nginx,
            Target::Wharf => &self.wharf,
        }
    }

    fn new_wharf(&self, models: usize) -> Wharf<'_> {
        let (binary, work) = (&self.binary, &self.work);
        Wharf { binary, work, upstream: self.upstream.address, models }
    }

    fn json(&mut self, keys: JsonKeys, connections: usize) -> io::Result<()> {
        let load = Load::new(&self.work, keys.rate, connections, (0, ANSWER_BYTES))?;
        let plural = if connections == 1 { "connection" } else { "connections" };
        let name = format!("JSON 1 KB, {connections} {plural}");
        for target in TARGETS {
            let pid = self.of(target).worker;
            let before = processes::busy(pid)?;
            let measured = load.run(self.of(target).address, self.time())?;
            let each = (processes::busy(pid)? - before) / measured.requests;
            let mut note = |key, unit, what: &str, value| {
                self.table.note((key, unit), &format!("{name}{what}"), target, value);
            };
            note(keys.rate, "requests/s", "", measured.per_second);
            note(keys.p50, "µs", ": latency p50", measured.p50);
            if connections == 1 {
                note(keys.tail, "µs", ": latency mean", measured.mean);
            } else {
                note(keys.tail, "µs", ": latency p99", measured.p99);
            }
            note(keys.cpu, "µs", ": CPU time per request", each);
        }
        Ok(())
    }

    fn bodies(
        &mut self,
        key: &'static str,
        name: &str,
        connections: usize,
        sizes: (usize, usize),
    ) -> io::Result<()> {
        let load = Load::new(&self.work, key, connections, sizes)?;
        let bytes = sizes.0.max(sizes.1);
        for target in TARGETS {
            let measured = load.run(self.of(target).address, self.time())?;
            let (value, unit) = if bytes < HUGE {
                (measured.per_second, "requests/s")
            } else {
                (measured.per_second * bytes as f64 / 1e6, "MB/s")
            };
            self.table.note((key, unit), name, target, value);
        }
        Ok(())
    }

    fn short_streams(&mut self) -> io::Result<()> {
        let name = format!("Streams of {SHORT_EVENTS} events, 32 at once");
        for target in TARGETS {
            let address = self.of(target).streams;
            let rate = load::short_streams(address, (32, 2), SHORT_EVENTS, self.time())?;
            self.table.note(("sse-32", "streams/s"), &name, target, rate);
        }
        Ok(())
    }

    fn paced(&mut self) -> io::Result<()> {
        let paced = Paced {
            streams: 1000,
            every: 1_000_000_000 / TOKENS_PER_S,
            listen: self.time().max(Duration::from_secs(4)),
        };
        let name = "1,000 streams at 50 tokens/s";
        for target in TARGETS {
            let pid = self.of(target).worker;
            let mut busy = Vec::new();
            let look = |_: Moment| busy.push(processes::busy(pid));
            let held = load::hold(self.of(target).streams, paced, look)?;
            let busy = busy.into_iter().collect::<io::Result<Vec<f64>>>()?;
            let each = (busy[1] - busy[0]) / held.delays.len().max(1) as f64;
            let what = format!("{name}: CPU time per event");
            self.table.note(("paced-cpu", "µs"), &what, target, each);
            self.delays(("paced-p50", "paced-p99"), name, target, &held);
            let rate = held.delays.len() as f64 / paced.listen.as_secs_f64();
            self.table.note(("paced-rate", "events/s"), &format!("{name}: received"), target, rate);
            self.all_open(name, target, held.open, paced.streams);
        }
        Ok(())
    }

    fn delays(
        &mut self,
        (p50, p99): (&'static str, &'static str),
        name: &str,
        target: Target,
        held: &Held,
    ) {
        let at = |per_mille: usize| {
            let place = (held.delays.len() * per_mille / 1000).min(held.delays.len().max(1) - 1);
            held.delays.get(place).map_or(f64::NAN, |&ns| f64::from(ns) / 1000.0)
        };
        self.table.note((p50, "µs"), &format!("{name}: delay per event p50"), target, at(500));
        self.table.note((p99, "µs"), &format!("{name}: delay per event p99"), target, at(990));
    }

    fn all_open(&mut self, name: &str, target: Target, open: usize, wanted: usize) {
        if open < wanted {
            let target = target.name();
            self.table.remark(format!("{name}: {target} had {open} of {wanted} streams open"));
        }
    }

    /// Of proxies that have served nothing else: what they had needed before would hide it.
    fn slow(&mut self) -> io::Result<()> {
        let paced = Paced { streams: self.streams, every: 1_000_000_000, listen: self.time() };
        let name = format!("{} streams at 1 event/s", super::table::figure(self.streams as f64));
        for target in TARGETS {
            let own = match target {
                Target::Direct => None,
                Target::Nginx => Some(processes::nginx(&self.work, self.upstream.address)?),
                Target::Wharf => Some(self.new_wharf(1).start()?),
            };
            let address = own.as_ref().unwrap_or(&self.upstream).streams;
            let before = own.as_ref().map(|own| processes::resident(own.worker)).transpose()?;
            let mut full = None;
            let held = load::hold(address, paced, |moment| {
                if moment == Moment::Full {
                    full = own.as_ref().map(|own| processes::resident(own.worker));
                }
            })?;
            if let (Some(before), Some(full)) = (before, full.transpose()?) {
                let each = (full - before) / held.open.max(1) as f64;
                let name = format!("{name}: memory of each");
                self.table.note(("slow-memory", "KiB"), &name, target, each);
            }
            self.delays(("slow-p50", "slow-p99"), &name, target, &held);
            self.all_open(&name, target, held.open, paced.streams);
        }
        Ok(())
    }

    fn start(&mut self) -> io::Result<()> {
        for (models, ready, answer) in
            [(1, "start-1", "start-1-answer"), (500, "start-500", "start-500-answer")]
        {
            let (healthy, answered) = self.new_wharf(models).start_up()?;
            let name = format!("Start with {models} model{}", if models == 1 { "" } else { "s" });
            let ms = |time: Duration| time.as_secs_f64() * 1000.0;
            self.table.note((ready, "ms"), &format!("{name}: ready"), Target::Wharf, ms(healthy));
            let name = format!("{name}: first answer");
            self.table.note((answer, "ms"), &name, Target::Wharf, ms(answered));
        }
        Ok(())
    }

    /// Fresh proxies, side by side, `windows` times a while in which nobody asks.
    pub fn idle(&mut self, windows: usize) -> io::Result<()> {
        let nginx = processes::nginx(&self.work, self.upstream.address)?;
        let wharf = self.new_wharf(1).start()?;
        thread::sleep(IDLE_SETTLE);
        let both = [(Target::Nginx, nginx.worker), (Target::Wharf, wharf.worker)];
        for _ in 0..windows {
            let before = both.map(|(_, pid)| processes::cpu_time(pid));
            thread::sleep(IDLE_WINDOW);
            for ((target, pid), before) in both.into_iter().zip(before) {
                let used = (processes::cpu_time(pid)?.saturating_sub(before?)) as f64;
                let share = 100.0 * used / IDLE_WINDOW.as_nanos() as f64;
                self.table.note(("idle-cpu", "% of a core"), "Idle: CPU", target, share);
                let mib = processes::resident(pid)? / 1024.0;
                self.table.note(("idle-rss", "MiB"), "Idle: RSS", target, mib);
            }
        }
        Ok(())
    }

    /// Caches and pools as they are in use; a short while each.
    pub fn warm_up(&self) -> io::Result<()> {
        let load = Load::new(&self.work, "warm-up", 32, (0, ANSWER_BYTES))?;
        for target in TARGETS {
            load.run(self.of(target).address, Duration::from_secs(1))?;
        }
        Ok(())
    }
}

/// Where to, for those who only want to know what is served.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let text = text.trim_start_matches("http://");
    text.split('/').next().unwrap_or(text).parse().map_err(|_| format!("no address: {text}"))
}
