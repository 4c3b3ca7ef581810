//! One change after the other: build, check, bind, keep, apply. What fails before "keep" has
//! changed nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::doors::FrontDoors;
use super::listeners::{Bound, Listeners};
use super::source::Misfits;
use super::watch::{Watch, watch};
use super::{ASKS_MAX, Ask, Built, Changed, InForce, Rejected, Reloads, Source, What};
use crate::config::catalog::Catalog;
use crate::config::diff::{changes, keep_what_needs_a_restart};
use crate::config::{Overlay, PATCHES_MAX, Problem, REGISTERED_MAX, Report};
use crate::gateway::Gateway;
use crate::orchestrator::Handle;
use crate::scheduler::event::EnsureKind;
use crate::store::Registration;
use crate::units::ModelName;

/// Whether the store holds what is not in force.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Models that became warm-up models wait this long for room before their ask is forgotten.
const WARMUP_WITHIN: Duration = Duration::from_secs(24 * 3600);

struct Owner {
    source: Source,
    /// The file as it was when it was last accepted: patches and registrations go over this one,
    /// so that a file that somebody is editing takes no part.
    text: String,
    /// What the store held when it was last looked at.
    kept: Overlay,
    handle: Handle,
    listeners: Listeners,
    doors: FrontDoors,
    watch: Option<Watch>,
    asks: mpsc::Sender<Ask>,
    now: Arc<ArcSwap<InForce>>,
}

/// What has to be in the store before a change is in force.
enum Keep {
    Nothing,
    Patches(BTreeMap<String, Value>),
    Registered(Registration),
    /// With the patches that are left.
    Unregistered(ModelName, BTreeMap<String, Value>),
}

/// Starts the owner: it opens the front doors and serves what is `bound`, and ends when `stop` is cancelled and everything
/// that was served has ended.
pub async fn start(
    source: Source,
    built: Built,
    handle: Handle,
    gateway: Arc<Gateway>,
    (listeners, bound): (Listeners, Bound),
    stop: CancellationToken,
) -> JoinHandle<()> {
    let (asks, inbox) = mpsc::channel(ASKS_MAX);
    let in_force = in_force(&source, &built);
    let now = Arc::new(ArcSwap::from_pointee(in_force));
    handle.set_reloads(Reloads { to: asks.clone(), now: Arc::clone(&now) });
    let doors = FrontDoors::new(gateway, handle.clone());
    let (text, kept) = (built.text, built.overlay);
    let watch = None;
    let mut owner = Owner { source, text, kept, handle, listeners, doors, watch, asks, now };
    let catalog = owner.handle.catalog();
    owner.doors.follow(&catalog, &mut owner.listeners).await;
    owner.follow_file(&catalog);
    // Last: whoever is answered finds everything there.
    owner.listeners.follow(&catalog.settings, bound);
    tokio::spawn(owner.run(inbox, stop))
}

impl Owner {
    async fn run(mut self, mut inbox: mpsc::Receiver<Ask>, stop: CancellationToken) {
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let ask = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                ask = inbox.recv() => ask,
                _ = look.tick() => {
                    self.follow_store().await;
                    self.listeners.certificates.look();
                    continue;
                }
            };
            let Some(Ask { what, reply }) = ask else { break };
            let changed = self.change(what).await;
            if changed.is_ok() {
                self.kept = self.overlay();
            }
            if let Some(reply) = reply {
                // Whoever left meanwhile finds it done.
                let _ = reply.send(changed);
            }
        }
        drop((self.watch, inbox));
        self.listeners.ended().await;
    }

    async fn change(&mut self, what: What) -> Result<Changed, Rejected> {
        match what {
            What::Reload { why } => {
                let changed = self.reload().await;
                match &changed {
                    Ok(changed) => {
                        warn_of(&self.source, changed);
                        tracing::info!("configuration reloaded ({why}): {}", changed.changes);
                    }
                    Err(errors) => {
                        tracing::error!("{errors}\nthe running configuration stays in force");
                    }
                }
                changed
            }
            What::Patch(wanted) => {
                let mut overlay = self.overlay();
                let asked: Vec<String> = wanted.keys().map(|path| Overlay::patch(path)).collect();
                for (path, value) in wanted {
                    match value {
                        Value::Null => drop(overlay.patches.remove(&path)),
                        value => drop(overlay.patches.insert(path, value)),
                    }
                }
                if overlay.patches.len() > PATCHES_MAX {
                    return Err(Rejected::Full(format!(
                        "more than {PATCHES_MAX} keys are patched"
                    )));
                }
                let keep = Keep::Patches(overlay.patches.clone());
                let changed = self.overlaid(overlay, &asked, keep).await?;
                tracing::info!("configuration patched: {}", changed.changes);
                Ok(changed)
            }
            What::Register(registration) => self.register(registration).await,
            What::Unregister(model) => self.unregister(model).await,
        }
    }

    /// The store says what was acknowledged: more than is in force if its file was away.
    fn overlay(&self) -> Overlay {
        Overlay::of(self.handle.store())
    }

    /// A file that could not be read at the start is back, or a commit came late.
    async fn follow_store(&mut self) {
        let kept = self.overlay();
        if kept == self.kept {
            return;
        }
        self.kept = kept.clone();
        let changed = match self.source.build(self.text.clone(), kept, Misfits::LeaveOut) {
            Ok(built) => self.apply(built, Keep::Nothing).await,
            Err(why) => Err(why),
        };
        match changed {
            Ok(changed) => {
                warn_of(&self.source, &changed);
                tracing::info!("what the store holds is in force again: {}", changed.changes);
            }
            Err(why) => tracing::error!("{why}\nwhat the store holds is not all in force"),
        }
    }

    async fn reload(&mut self) -> Result<Changed, Rejected> {
        let text = self.source.read()?;
        let built = self.source.build(text, self.overlay(), Misfits::LeaveOut)?;
        self.apply(built, Keep::Nothing).await
    }

    async fn register(&mut self, registration: Registration) -> Result<Changed, Rejected> {
        let mut overlay = self.overlay();
        let name = ModelName::new(&registration.model_id);
        if self.handle.catalog().model(&name).is_some_and(|spec| !spec.registered) {
            return Err(Rejected::InFile(name));
        }
        let before = overlay.registered.len();
        overlay.registered.retain(|known| known.model_id != registration.model_id);
        let replaced = overlay.registered.len() < before;
        if overlay.registered.len() >= REGISTERED_MAX {
            return Err(Rejected::Full(format!("{REGISTERED_MAX} models are registered already")));
        }
        overlay.registered.push(registration.clone());
        let asked = [Overlay::model(&registration.model_id)];
        let changed = self.overlaid(overlay, &asked, Keep::Registered(registration)).await?;
        tracing::info!("model {name} registered: {}", changed.changes);
        Ok(Changed { replaced, ..changed })
    }

    async fn unregister(&mut self, model: ModelName) -> Result<Changed, Rejected> {
        let mut overlay = self.overlay();
        let before = overlay.registered.len();
        overlay.registered.retain(|known| known.model_id != model.as_str());
        if overlay.registered.len() == before {
            return Err(match self.handle.catalog().model(&model) {
                Some(_) => Rejected::InFile(model),
                None => Rejected::NotRegistered(model),
            });
        }
        // Unless the file has a model of that name, its patches have lost their meaning.
        if self.handle.catalog().model(&model).is_none_or(|spec| spec.registered) {
            let prefix = format!("models.{model}.");
            overlay.patches.retain(|path, _| !path.starts_with(&prefix));
        }
        let keep = Keep::Unregistered(model.clone(), overlay.patches.clone());
        let built = self.source.build(self.text.clone(), overlay, Misfits::LeaveOut)?;
        let changed = self.apply(built, keep).await?;
        tracing::info!("model {model} is no longer registered: {}", changed.changes);
        Ok(changed)
    }

    /// A new overlay over the file as it was accepted last. What is asked for must fit; what was
    /// left out before stays so until the next reload.
    async fn overlaid(
        &mut self,
        overlay: Overlay,
        asked: &[String],
        keep: Keep,
    ) -> Result<Changed, Rejected> {
        let mut left_out = self.now.load().left_out.clone();
        left_out.retain(|left| !asked.contains(&left.what) && overlay.has(&left.what));
        let fitting = overlay.without(&left_out);
        let mut built = self.source.build(self.text.clone(), fitting, Misfits::Refuse)?;
        built.overlay = overlay;
        built.loaded.left_out = left_out;
        self.apply(built, keep).await
    }

    async fn apply(&mut self, mut built: Built, keep: Keep) -> Result<Changed, Rejected> {
        let running = self.handle.catalog();
        let settings = &mut built.loaded.catalog.settings;
        let needs_restart = keep_what_needs_a_restart(settings, &running.settings);
        if !needs_restart.is_empty() {
            tracing::warn!("{} need a restart; the rest is reloaded", needs_restart.join(", "));
        }
        let unfit = |error: anyhow::Error| Rejected::Unfit(format!("{error:#}"));
        crate::app::refuse_open_control(settings.orchestrator, &built.loaded.catalog)
            .map_err(unfit)?;
        let settings = &built.loaded.catalog.settings;
        let certificates = self.listeners.certificates.prepare(settings.tls.as_ref());
        let certificates = certificates.map_err(Rejected::Unfit)?;
        let bound = self.listeners.prepare(settings).await;
        let bound = bound.map_err(|error| Rejected::Taken(format!("{error:#}")))?;
        self.keep(keep).await?;
        let in_force = in_force(&self.source, &built);
        let catalog = Arc::new(built.loaded.catalog);
        let changes = changes(&running, &catalog);
        self.handle.reload(Arc::clone(&catalog)).await;
        let mut warnings = built.loaded.warnings;
        if let Some(warning) = &certificates.warning {
            warnings.push(Problem::warning("listen.tls", warning.clone()));
        }
        self.listeners.certificates.follow(certificates);
        self.listeners.follow(&catalog.settings, bound);
        self.doors.follow(&catalog, &mut self.listeners).await;
        self.warm_up(&running, &catalog);
        self.text = built.text;
        self.follow_file(&catalog);
        let left_out = in_force.left_out.clone();
        self.now.store(Arc::new(in_force));
        Ok(Changed { changes, needs_restart, warnings, left_out, replaced: false })
    }

    async fn keep(&self, keep: Keep) -> Result<(), Rejected> {
        let store = self.handle.store();
        match keep {
            Keep::Nothing => {}
            Keep::Patches(patches) => store.put_patches(patches).await?,
            Keep::Registered(registration) => store.put_registered(registration).await?,
            Keep::Unregistered(model, patches) => {
                store.delete_registered(model.as_str(), patches).await?;
            }
        }
        Ok(())
    }

    /// Models that were not to be warmed up before.
    fn warm_up(&self, before: &Catalog, now: &Catalog) {
        let was = |name| before.model(name).is_some_and(|spec| spec.warmup);
        for spec in now.models.values().filter(|spec| spec.warmup && !was(&spec.name)) {
            let kind = EnsureKind::Warmup;
            drop(self.handle.ensure_detached(spec.name.clone(), kind, WARMUP_WITHIN));
        }
    }

    fn follow_file(&mut self, catalog: &Catalog) {
        if !catalog.settings.watch {
            self.watch = None;
        } else if self.watch.is_none() {
            match watch(&self.source.path, self.asks.clone()) {
                Ok(watch) => {
                    self.watch = Some(watch);
                    // It may have changed between being read and being watched.
                    if self.source.read().is_ok_and(|text| text != self.text) {
                        let what = What::Reload { why: "the file changed" };
                        // Full of other changes: any of them that reloads does the same.
                        let _ = self.asks.try_send(Ask { what, reply: None });
                    }
                }
                Err(why) => tracing::warn!("{why}; reload with SIGHUP or POST /config/reload"),
            }
        }
    }
}

fn in_force(source: &Source, built: &Built) -> InForce {
    let loaded = &built.loaded;
    InForce {
        file: source.path.clone(),
        overlay: built.overlay.clone(),
        left_out: loaded.left_out.clone(),
        overrides: loaded.overrides.clone(),
        flags: built.flags.clone(),
        in_file: loaded.in_file.clone(),
        defaults: loaded.defaults.clone(),
    }
}

/// What `wharf check` would say beside errors.
fn warn_of(source: &Source, changed: &Changed) {
    if !changed.warnings.is_empty() {
        let file = source.path.display().to_string();
        tracing::warn!("{}", Report { file: &file, problems: &changed.warnings });
    }
}
