//! Models and settings with ordinary values, to be changed by each test.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::config::catalog::*;
use crate::units::*;

pub fn spec(name: &str, gib: u64) -> ModelSpec {
    ModelSpec {
        engine: EngineKind::Llamacpp,
        vram: Vram::Declared(Bytes::gib(gib)),
        stop: StopSpec { signal: "SIGTERM".to_owned(), grace: Duration::from_secs(5) },
        ..ModelSpec::plain(name)
    }
}

pub fn catalog(models: Vec<ModelSpec>) -> Catalog {
    let usual = Settings::default();
    Catalog {
        models: models.into_iter().map(|m| (m.name.clone(), Arc::new(m))).collect(),
        aliases: BTreeMap::new(),
        settings: Settings {
            swap: SwapSettings { on_exit: OnExit::Stop, ..usual.swap },
            gpu: GpuSettings { provider: GpuProvider::Simulated, ..usual.gpu },
            ..usual
        },
        ..Catalog::default()
    }
}
