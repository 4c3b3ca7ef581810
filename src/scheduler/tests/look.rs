//! What a test looks at: memory as the driver shows it, the scheduler's view, the log of actions.

use super::world::{Running, Sim};
use crate::scheduler::action::Action;
use crate::scheduler::event::*;
use crate::scheduler::record::{ModelView, SwapRecord};
use crate::units::*;

impl Sim {
    fn holders(&self, gpu: GpuId) -> Vec<Holder> {
        let holder = |id: InstanceId, bytes, mine: bool| Holder {
            pid: 1000 + u32::try_from(id.0).expect("small ids"),
            bytes,
            label: format!("engine {id}"),
            instance: mine.then_some(id),
        };
        let mut holders: Vec<Holder> = self
            .running
            .iter()
            .filter(|(_, r)| r.gpus.contains(&gpu))
            .map(|(&id, r)| holder(id, r.bytes, true))
            .collect();
        let held = self
            .ghosts
            .iter()
            .filter(|(_, gpus, _, until)| gpus.contains(&gpu) && *until > self.now);
        holders.extend(held.map(|(id, _, bytes, _)| holder(*id, *bytes, false)));
        if let Some(&bytes) = self.strangers.get(&gpu) {
            holders.push(Holder { pid: 4711, bytes, label: "blender".to_owned(), instance: None });
        }
        holders
    }

    pub fn free(&self, gpu: GpuId) -> Bytes {
        let total = self.gpus.iter().find(|g| g.id == gpu).map_or(Bytes::ZERO, |g| g.total);
        total - self.holders(gpu).iter().map(|h| h.bytes).sum()
    }

    pub fn sample(&mut self) {
        if !self.proof {
            return;
        }
        let sample = if self.faults.no_proof {
            Err(NoProof { message: "NVML: Unknown Error".to_owned() })
        } else {
            let gpus = self.gpus.iter().map(|g| GpuMemory {
                gpu: g.id,
                uuid: g.uuid.clone(),
                total: g.total,
                free: self.free(g.id),
                holders: if self.hide_pids { Vec::new() } else { self.holders(g.id) },
            });
            let ram = self.running.iter();
            let ram = ram.filter_map(|(&id, r)| Some((id, *self.host_use.get(&r.model)?)));
            Ok(MemorySample {
                taken_at: self.now,
                gpus: gpus.collect(),
                host: self.host,
                ram: ram.collect(),
            })
        };
        self.send(Event::MemorySeen(sample));
    }

    pub fn model(&self, name: &str) -> ModelView {
        let view = self.scheduler.view(self.now);
        view.models.into_iter().find(|m| m.name.as_str() == name).expect("configured")
    }

    pub fn state(&self, name: &str) -> &'static str {
        self.model(name).residency.as_str()
    }

    pub fn served_by(&self, request: RequestId) -> Option<&str> {
        Some(self.running.get(self.granted.get(&request)?)?.model.as_str())
    }

    pub fn adopt(&mut self, id: InstanceId, model: &str, bytes: Bytes) {
        let gpus = vec![GpuId(0)];
        self.insert(id, model.into(), gpus.clone(), bytes);
        let model = model.into();
        self.send(Event::Adopted { instance: id, model, gpus, footprint: bytes });
    }

    pub fn insert(&mut self, id: InstanceId, model: ModelName, gpus: Vec<GpuId>, bytes: Bytes) {
        let running = Running {
            model,
            gpus,
            bytes,
            awake: bytes,
            in_flight: 0,
            granted: 0,
            last_used: self.now,
            open: false,
            permits: 0,
            every_release: false,
            changed: false,
        };
        self.running.insert(id, running);
    }

    /// Shown by a failing test.
    pub fn print_log(&self) {
        for (at, action) in &self.log {
            let line = format!("{action:?}");
            println!("{:>8} {}", at.0, line.chars().take(300).collect::<String>());
        }
        println!("{:#?}", self.scheduler);
    }

    /// Index in the log of the first action that matches.
    pub fn first(&self, of: impl Fn(&Action) -> bool) -> Option<usize> {
        self.log.iter().position(|(_, action)| of(action))
    }

    /// When each such action came.
    pub fn times(&self, of: impl Fn(&Action) -> bool) -> Vec<Time> {
        self.log.iter().filter(|(_, action)| of(action)).map(|(at, _)| *at).collect()
    }

    pub fn count(&self, of: impl Fn(&Action) -> bool) -> usize {
        self.log.iter().filter(|(_, action)| of(action)).count()
    }

    pub fn starts(&self, model: &str) -> usize {
        self.count(|a| matches!(a, Action::StartInstance { model: m, .. } if m.as_str() == model))
    }

    /// Rows of the ledger that ended.
    pub fn ledger(&self) -> Vec<SwapRecord> {
        let record =
            |action: &Action| if let Action::Record(r) = action { Some(r.clone()) } else { None };
        self.log.iter().filter_map(|(_, a)| record(a)).filter(|r| r.ended.is_some()).collect()
    }
}
