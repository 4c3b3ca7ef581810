//! The flags that say what the modelled machine is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{anyhow, bail};

use super::{described, duration, size};
use crate::replay::Arrival;
use crate::replay::sessions::{CODER, PLANNER};
use crate::replay::setup::{Costs, FOR_EVER, Machine, Setup, Size, Terms};
use crate::store::Store;
use crate::units::{Bytes, ModelName};

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "The modelled world")]
pub struct WorldArgs {
    /// One GPU on which so many models fit, all of the same size
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "gpus")]
    pub slots: u32,
    /// GPUs of these sizes instead (24GiB,48GiB); --sizes or --config say what models take
    #[arg(long, value_name = "SIZES", value_delimiter = ',', value_parser = size)]
    pub gpus: Vec<Bytes>,
    /// What models take on each of their GPUs: 8GiB for all, big=20GiB for one, huge=40GiBx2 on
    /// two GPUs
    #[arg(long, value_name = "SIZES", value_delimiter = ',')]
    pub sizes: Vec<String>,
    /// Models, GPUs (gpu.memory) and settings of a configuration, and what its store has learned
    #[arg(long, value_name = "FILE", conflicts_with = "slots")]
    pub config: Option<PathBuf>,
    /// What a start takes
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub load: Duration,
    /// What a stop takes
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    pub unload: Duration,
    /// Models can sleep: what falling asleep takes
    #[arg(long, value_name = "TIME", value_parser = duration, requires = "wake")]
    pub sleep: Option<Duration>,
    /// What waking up takes
    #[arg(long, value_name = "TIME", value_parser = duration, requires = "sleep")]
    pub wake: Option<Duration>,
    /// What a sleeper keeps on each GPU
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size)]
    pub residue: Bytes,
    /// Requests that a model serves at once (with --config: as many as that file says)
    #[arg(long, value_name = "N", default_value_t = 16, conflicts_with = "config", value_parser = clap::value_parser!(u32).range(1..))]
    pub concurrency: u32,
    /// Notice to leave falls due when a request has waited so long; max(30 s, 3 starts) by default
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub max_wait: Option<Duration>,
    /// Cut what still runs on a model so long after it was given notice; 5 min by default
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub drain_timeout: Option<Duration>,
    /// Refuse who has waited so long; nobody is refused by default
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub queue_timeout: Option<Duration>,
}

impl WorldArgs {
    /// The world for these arrivals, and what it is in words. Aliases become the models' names.
    pub fn setup(&self, trace: &str, arrivals: &mut [Arrival]) -> anyhow::Result<(Setup, String)> {
        let models: BTreeSet<ModelName> = arrivals.iter().map(|a| a.model.clone()).collect();
        let setup = match &self.config {
            Some(config) => {
                let setup = self.of_config(config)?;
                for arrival in arrivals {
                    let named = setup.catalog.resolve(arrival.model.as_str());
                    let spec = named.ok_or_else(|| {
                        let (model, config) = (&arrival.model, config.display());
                        anyhow!("{trace} asks for {model}, which is not in {config}")
                    })?;
                    arrival.model = spec.name.clone();
                }
                setup
            }
            None => self.of_trace(&models)?,
        };
        let what = self.described(models.len());
        let text = described(&setup, &what);
        Ok((setup, text))
    }

    pub fn for_sessions(&self) -> anyhow::Result<(Setup, String)> {
        if self.config.is_some() {
            bail!("--sessions has a planner and a coder of its own: leave --config out");
        }
        let models = [PLANNER, CODER].map(ModelName::from).into();
        let setup = self.of_trace(&models)?;
        let text = described(&setup, &self.described(models.len()));
        Ok((setup, text))
    }

    fn of_trace(&self, models: &BTreeSet<ModelName>) -> anyhow::Result<Setup> {
        let machine = if self.gpus.is_empty() {
            if !self.sizes.is_empty() {
                bail!("--sizes needs --gpus: on --slots all models have the same size");
            }
            Machine::Slots(self.slots)
        } else {
            Machine::Gpus { memory: self.gpus.clone(), sizes: self.sizes(models)? }
        };
        Ok(Setup::of_trace(models, &machine, &self.terms())?)
    }

    fn of_config(&self, path: &std::path::Path) -> anyhow::Result<Setup> {
        let catalog = crate::config::load(path)?.catalog;
        let settings = &catalog.settings;
        let memory = if self.gpus.is_empty() { &settings.gpu.memory } else { &self.gpus };
        if memory.is_empty() {
            bail!("{} does not say what GPUs there are (gpu.memory): --gpus does", path.display());
        }
        let known = Store::learned_at(&settings.store)?;
        let known = known
            .into_iter()
            .filter_map(|(name, figures)| {
                let spec = catalog.model(&name)?;
                Some((name, figures.for_spec(spec).learned))
            })
            .collect();
        let models = catalog.models.keys().cloned().collect();
        let sizes = self.sizes(&models)?;
        Ok(Setup::of_catalog(&catalog, &known, memory, &sizes, &self.terms())?)
    }

    fn terms(&self) -> Terms {
        Terms {
            costs: Costs {
                start: self.load,
                stop: self.unload,
                sleep: self.sleep,
                wake: self.wake,
                residue: self.residue,
            },
            concurrency: Some(self.concurrency),
            max_wait: self.max_wait,
            drain_timeout: self.drain_timeout,
            queue_timeout: self.queue_timeout.unwrap_or(FOR_EVER),
        }
    }

    /// `8GiB`, `big=20GiB`, `huge=40GiBx2`
    fn sizes(&self, models: &BTreeSet<ModelName>) -> anyhow::Result<BTreeMap<ModelName, Size>> {
        let (mut sizes, mut of_others) = (BTreeMap::new(), None);
        for text in &self.sizes {
            let wrong = |why: String| anyhow!("--sizes {text}: {why}");
            let (name, rest) = match text.rsplit_once('=') {
                Some((name, rest)) => (Some(ModelName::new(name)), rest),
                None => (None, text.as_str()),
            };
            let (bytes, gpus) = rest.rsplit_once('x').unwrap_or((rest, "1"));
            let bytes = size(bytes).map_err(wrong)?;
            let gpus = gpus.parse().map_err(|_| wrong(format!("{gpus} is no number of GPUs")))?;
            match name {
                Some(name) if !models.contains(&name) => {
                    return Err(wrong(format!("nobody asks for {name}")));
                }
                Some(name) => {
                    sizes.insert(name, Size { bytes, gpus });
                }
                None => of_others = Some(Size { bytes, gpus }),
            }
        }
        if let Some(size) = of_others {
            for model in models {
                sizes.entry(model.clone()).or_insert(size);
            }
        }
        Ok(sizes)
    }

    fn described(&self, models: usize) -> String {
        let place = match (&self.config, self.gpus.is_empty()) {
            (Some(config), _) => format!("models of {}", config.display()),
            (None, false) => format!("{models} models"),
            (None, true) => format!("room for {} of {models} models", self.slots),
        };
        let seconds = |d: Duration| format!("{} s", d.as_secs_f64());
        let sleep = match (self.sleep, self.wake) {
            (Some(sleep), Some(wake)) => {
                format!(", falling asleep {}, waking {}", seconds(sleep), seconds(wake))
            }
            _ => String::new(),
        };
        let (load, unload) = (seconds(self.load), seconds(self.unload));
        if self.config.is_some() {
            return format!(
                "{place}; where nothing was learned: start {load}, stop {unload}{sleep}"
            );
        }
        format!("{place}, start {load}, stop {unload}{sleep}, {} at once", self.concurrency)
    }
}
