//! How far the models are that shall be loaded before anybody asks: warm-up models, and those
//! whose keep window is open.

use crate::config::catalog::Catalog;
use crate::scheduler::record::{ModelView, ResidencyView};
use crate::units::ModelName;

use super::view::View;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preload {
    /// Ready.
    pub done: Vec<ModelName>,
    pub loading: Vec<ModelName>,
    /// For room, or for somebody to want them again.
    pub waiting: Vec<ModelName>,
    pub failed: Vec<ModelName>,
}

impl Preload {
    pub fn total(&self) -> usize {
        self.done.len() + self.loading.len() + self.waiting.len() + self.failed.len()
    }

    fn is_over(&self) -> bool {
        self.loading.is_empty() && self.waiting.is_empty()
    }
}

impl View {
    pub fn preload(&self, catalog: &Catalog) -> Preload {
        let mut preload = Preload::default();
        let wanted = |model: &&ModelView| {
            model.kept || catalog.model(&model.name).is_some_and(|spec| spec.warmup)
        };
        for model in self.scheduler.models.iter().filter(wanted) {
            let state = match model.residency {
                ResidencyView::Ready | ResidencyView::Draining => &mut preload.done,
                ResidencyView::Starting { .. } | ResidencyView::Waking => &mut preload.loading,
                ResidencyView::Failed { .. } => &mut preload.failed,
                ResidencyView::Stopped
                | ResidencyView::Stopping
                | ResidencyView::FallingAsleep
                | ResidencyView::Sleeping { .. }
                | ResidencyView::Lost => &mut preload.waiting,
            };
            state.push(model.name.clone());
        }
        preload
    }
}

/// Says in the log how the preload at the start goes on, until it is over once.
#[derive(Debug, Default)]
pub(super) struct PreloadLog {
    told: Preload,
    is_over: bool,
}

impl PreloadLog {
    pub fn look(&mut self, now: Preload) {
        if self.is_over || now == self.told {
            return;
        }
        self.is_over = now.is_over();
        tracing::info!("{}", text(&now));
        self.told = now;
    }
}

/// `preload: 1 of 3 ready; loading llava; waiting for room: coder`
fn text(preload: &Preload) -> String {
    let mut text = format!("preload: {} of {} ready", preload.done.len(), preload.total());
    let parts = [
        ("loading", &preload.loading),
        ("waiting for room:", &preload.waiting),
        ("failed, tried again later:", &preload.failed),
    ];
    for (what, models) in parts.into_iter().filter(|(_, models)| !models.is_empty()) {
        let names: Vec<&str> = models.iter().map(ModelName::as_str).collect();
        text.push_str(&format!("; {what} {}", names.join(", ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_names_who_loads_waits_and_failed() {
        let names = |names: &[&str]| names.iter().map(|name| ModelName::new(*name)).collect();
        let preload = Preload {
            done: names(&["a"]),
            loading: names(&["llava"]),
            waiting: names(&["b", "c"]),
            failed: names(&[]),
        };
        assert_eq!(text(&preload), "preload: 1 of 4 ready; loading llava; waiting for room: b, c");
        assert!(!preload.is_over());
    }
}
