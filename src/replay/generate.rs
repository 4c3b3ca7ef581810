//! Made-up traffic in the shape of a recorded one: a public trace of a production service
//! (alibaba/clusterdata, cluster-trace-v2026-GenAI), 11 554 requests for 75 models in nine days.
//!
//! What makes that trace hard for a scheduler, and what stands for it here:
//!
//! - *Who asks*: people work in sessions on one model, several at a time. That is why three
//!   arrivals in four name another model than the one before, yet the same model is as likely two
//!   or three arrivals later as it is at once, and fades only over dozens.
//! - *Popularity*: Zipf–Mandelbrot over the models, shifted from day to day.
//! - *Bursts*: the office day (three peaks, a lunch break, empty nights), a factor for each hour,
//!   and the sessions themselves.
//! - *Service*: log-normal for each model; in a session the requests are alike.
//!
//! The constants were fitted to that trace by eye and moment, and hold its policies' order. Only
//! the seed decides what comes out; the same seed gives the same trace.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::f64::consts::TAU;
use std::fmt::Write as _;
use std::time::Duration;

use super::Arrival;
use crate::units::{ModelName, Time};

const MODELS: usize = 75;

/// A model's weight by its rank: `(rank + SHIFT)^-EXPONENT`.
const SHIFT: f64 = 2.3;
const EXPONENT: f64 = 2.0;
/// Standard deviation of the logarithm of each model's factor of the day.
const DAY_DRIFT: f64 = 0.3;

const HOUR: f64 = 3600.0;
const SESSIONS_PER_DAY: f64 = 530.0;
/// Relative load of the hours, from the first hour of the trace on.
const DAY_CURVE: [f64; 24] = [
    115.0, 155.0, 23.0, 45.0, 190.0, 195.0, 210.0, 220.0, 55.0, 50.0, 45.0, 22.0, //
    10.0, 8.0, 4.0, 3.0, 2.0, 1.0, 0.3, 0.3, 0.3, 0.5, 2.0, 25.0,
];
/// Standard deviation of the logarithm of each hour's own factor.
const HOUR_NOISE: f64 = 0.45;

/// Requests of a session, log-normal, and the seconds between them.
const SESSION_MEDIAN: f64 = 1.3;
const SESSION_SPREAD: f64 = 1.1;
const SESSION_MAX: usize = 100;
const GAP_MEDIAN: f64 = 80.0;
const GAP_SPREAD: f64 = 1.25;

/// Logarithm of a model's median seconds of service; some of the popular ones take far longer.
const SERVICE: f64 = 2.97;
const SLOW: [(usize, f64); 3] = [(2, 3.65), (5, 4.05), (8, 3.65)];
/// Ranks of the popular ones, which are all alike, and what the others differ by.
const ALIKE: usize = 11;
const SPREAD_ALIKE: f64 = 0.06;
const SPREAD_OTHERS: f64 = 0.25;
/// Within a model: from session to session, and from request to request.
const SPREAD_SESSION: f64 = 0.2;
const SPREAD_REQUEST: f64 = 0.28;

/// The first `arrivals` requests of a trace, in the order of their arrival.
pub fn generate(seed: u64, arrivals: usize) -> Vec<Arrival> {
    let mut random = Random(seed);
    let models: Vec<Model> = (1..=MODELS).map(|rank| Model::new(rank, &mut random)).collect();
    let mut hours = Hours::new(&models, &mut random);
    let (mut out, mut pending) = (Vec::with_capacity(arrivals), BinaryHeap::new());
    while out.len() < arrivals {
        let began = hours.next_session(&models, &mut random);
        // Nothing that comes later lies before it.
        while out.len() < arrivals
            && pending.peek().is_some_and(|Reverse(next): &Reverse<Pending>| next.at_ms <= began.0)
            && let Some(Reverse(next)) = pending.pop()
        {
            out.push(Arrival {
                at: Time(next.at_ms),
                model: models[next.model].name.clone(),
                service: Duration::from_millis(next.service_ms),
            });
        }
        let model = hours.pick(&mut random);
        session(began, model, &models[model], &mut random, |one| pending.push(Reverse(one)));
    }
    out
}

/// As `wharf replay` reads it: `arrival_s,model,service_s`.
pub fn to_csv(trace: &[Arrival]) -> String {
    let mut csv = String::from("arrival_s,model,service_s\n");
    for Arrival { at, model, service } in trace {
        let name = model.as_str();
        let name = if name.contains([',', '"']) || name.trim() != name {
            format!("\"{}\"", name.replace('"', "\"\""))
        } else {
            name.to_owned()
        };
        // Writing to a string does not fail.
        let _ =
            writeln!(csv, "{},{name},{}", seconds(u128::from(at.0)), seconds(service.as_millis()));
    }
    csv
}

fn seconds(ms: u128) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}

struct Model {
    name: ModelName,
    weight: f64,
    /// Logarithm of its median seconds of service.
    service: f64,
}

impl Model {
    fn new(rank: usize, random: &mut Random) -> Model {
        let typical = SLOW.iter().find(|(slow, _)| *slow == rank).map_or(SERVICE, |(_, ln)| *ln);
        let spread = if rank <= ALIKE { SPREAD_ALIKE } else { SPREAD_OTHERS };
        Model {
            name: ModelName::new(format!("model-{rank:02}")),
            weight: (rank as f64 + SHIFT).powf(-EXPONENT),
            service: typical + spread * random.normal(),
        }
    }
}

/// One request to come. Ordered by time, then as drawn.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Pending {
    at_ms: u64,
    drawn: u64,
    model: usize,
    service_ms: u64,
}

fn session(
    began: Time,
    model: usize,
    of: &Model,
    random: &mut Random,
    mut push: impl FnMut(Pending),
) {
    let alike = of.service + SPREAD_SESSION * random.normal();
    let drawn = random.0;
    let requests = random.log_normal(SESSION_MEDIAN, SESSION_SPREAD).round();
    let mut at = began.0 as f64;
    for _ in 0..(requests as usize).clamp(1, SESSION_MAX) {
        let service = (alike + SPREAD_REQUEST * random.normal()).exp();
        push(Pending { at_ms: at as u64, drawn, model, service_ms: (service * 1000.0) as u64 });
        at += 1000.0 * random.log_normal(GAP_MEDIAN, GAP_SPREAD);
    }
}

/// When sessions begin: a Poisson process whose rate changes with the hour; and for which model,
/// which changes with the day.
struct Hours {
    /// Seconds since the trace began.
    now: f64,
    hour: usize,
    /// Sessions per second in this hour.
    rate: f64,
    /// Running sums of the models' weights of this day.
    weights: Vec<f64>,
}

impl Hours {
    fn new(models: &[Model], random: &mut Random) -> Hours {
        let mut hours = Hours { now: 0.0, hour: 0, rate: 0.0, weights: Vec::new() };
        hours.enter(0, models, random);
        hours
    }

    fn enter(&mut self, hour: usize, models: &[Model], random: &mut Random) {
        self.hour = hour;
        let share = DAY_CURVE[hour % 24] / DAY_CURVE.iter().sum::<f64>();
        self.rate = SESSIONS_PER_DAY * share * random.log_normal(1.0, HOUR_NOISE) / HOUR;
        if hour.is_multiple_of(24) {
            let mut sum = 0.0;
            let drifted = models.iter().map(|model| {
                sum += model.weight * random.log_normal(1.0, DAY_DRIFT);
                sum
            });
            self.weights = drifted.collect();
        }
    }

    fn next_session(&mut self, models: &[Model], random: &mut Random) -> Time {
        let mut left = random.exponential();
        loop {
            let end = (self.hour + 1) as f64 * HOUR;
            let expected = self.rate * (end - self.now);
            if left <= expected {
                self.now += left / self.rate;
                return Time((self.now * 1000.0) as u64);
            }
            left -= expected;
            self.now = end;
            self.enter(self.hour + 1, models, random);
        }
    }

    fn pick(&self, random: &mut Random) -> usize {
        let all = self.weights.last().copied().unwrap_or_default();
        let at = random.unit() * all;
        self.weights.partition_point(|sum| *sum < at).min(MODELS - 1)
    }
}

/// SplitMix64.
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Above 0 and below 1.
    pub(super) fn unit(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    /// Mean 1.
    fn exponential(&mut self) -> f64 {
        -self.unit().ln()
    }

    fn normal(&mut self) -> f64 {
        (2.0 * self.exponential()).sqrt() * (TAU * self.unit()).cos()
    }

    pub(super) fn log_normal(&mut self, median: f64, spread: f64) -> f64 {
        median * (spread * self.normal()).exp()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const SEEDS: std::ops::Range<u64> = 0..12;

    fn by_model(trace: &[Arrival]) -> BTreeMap<&str, Vec<&Arrival>> {
        let mut models = BTreeMap::<&str, Vec<&Arrival>>::new();
        for arrival in trace {
            models.entry(arrival.model.as_str()).or_default().push(arrival);
        }
        models
    }

    /// Share of arrivals that name the model named `back` arrivals before.
    fn same(trace: &[Arrival], back: usize) -> f64 {
        let pairs = trace.iter().zip(&trace[back..]);
        pairs.filter(|(a, b)| a.model == b.model).count() as f64 / (trace.len() - back) as f64
    }

    fn within(what: &str, seed: u64, range: std::ops::RangeInclusive<f64>, value: f64) {
        assert!(range.contains(&value), "{what} of seed {seed}: {value:.3}, not in {range:?}");
    }

    // In brackets: the recorded trace.
    #[test]
    fn a_trace_has_the_shape_of_the_recorded_one() {
        for seed in SEEDS {
            let trace = generate(seed, 6000);
            assert_eq!(trace.len(), 6000);
            assert!(trace.is_sorted_by_key(|arrival| arrival.at));
            let models = by_model(&trace);
            within("models [69]", seed, 60.0..=75.0, models.len() as f64);
            let top = models.values().map(Vec::len).max().unwrap_or(0);
            within("top share [0.27]", seed, 0.16..=0.36, top as f64 / 6000.0);
            within("switches [0.77]", seed, 0.70..=0.80, 1.0 - same(&trace, 1));
            // Sessions overlap: the next arrival but two is as often of the same model; much
            // later ones are not.
            within(
                "same, 3 back ÷ 1 back [0.96]",
                seed,
                0.80..=1.05,
                same(&trace, 3) / same(&trace, 1),
            );
            within("same, 50 back [0.13]", seed, 0.10..=0.19, same(&trace, 50));
        }
    }

    #[test]
    fn arrivals_come_in_bursts() {
        for seed in SEEDS {
            let trace = generate(seed, 6000);
            let buckets = trace[5999].at.0 / 600_000 + 1;
            let mut counts = vec![0.0; buckets as usize];
            trace.iter().for_each(|arrival| counts[(arrival.at.0 / 600_000) as usize] += 1.0);
            let mean = 6000.0 / buckets as f64;
            let variance = |back: usize| {
                let pairs = counts.iter().zip(&counts[back..]);
                pairs.map(|(a, b)| (a - mean) * (b - mean)).sum::<f64>() / buckets as f64
            };
            within("dispersion in 10 min [23.8]", seed, 14.0..=40.0, variance(0) / mean);
            within("its autocorrelation [0.88]", seed, 0.80..=0.95, variance(1) / variance(0));
            let gaps: Vec<u64> = trace.windows(2).map(|w| w[1].at.0 - w[0].at.0).collect();
            let mean = gaps.iter().sum::<u64>() as f64 / gaps.len() as f64;
            let squares: f64 = gaps.iter().map(|gap| (*gap as f64 - mean).powi(2)).sum();
            let variation = (squares / gaps.len() as f64).sqrt() / mean;
            within("variation of gaps [11.9]", seed, 6.0..=16.0, variation);
        }
    }

    #[test]
    fn services_are_those_of_their_models() {
        for seed in SEEDS {
            let trace = generate(seed, 6000);
            let mean = |of: &[&Arrival]| {
                of.iter().map(|a| a.service.as_secs_f64()).sum::<f64>() / of.len() as f64
            };
            within(
                "seconds of all [25.2]",
                seed,
                21.0..=31.0,
                mean(&trace.iter().collect::<Vec<_>>()),
            );
            let models = by_model(&trace);
            within("of the first [19.0]", seed, 16.0..=25.0, mean(&models["model-01"]));
            within("of the second [42.6]", seed, 35.0..=49.0, mean(&models["model-02"]));
            within("of the fifth [60.8]", seed, 50.0..=75.0, mean(&models["model-05"]));
        }
    }

    #[test]
    fn only_the_seed_decides() {
        assert_eq!(generate(7, 500), generate(7, 500));
        assert_ne!(generate(7, 500), generate(8, 500));
        assert_eq!(generate(7, 500)[..100], generate(7, 100));
        assert!(generate(7, 0).is_empty());
    }

    #[test]
    fn csv_has_seconds_and_quotes_names_that_need_it() {
        let one = |at, model: &str, service| Arrival {
            at: Time(at),
            model: model.into(),
            service: Duration::from_millis(service),
        };
        let csv = to_csv(&[one(0, "a", 1500), one(61_007, "b, \"c\"", 20)]);
        assert_eq!(
            csv,
            "arrival_s,model,service_s\n0.000,a,1.500\n61.007,\"b, \"\"c\"\"\",0.020\n"
        );
    }
}
