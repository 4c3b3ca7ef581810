//! The labels by which a container is known to be ours, and by which installation's.

use std::collections::HashMap;

use crate::runtime::Identity;
use crate::units::{GpuId, InstanceId, ModelName};

pub const INSTALLATION: &str = "wharf.installation";
/// What a container is for that is no engine.
const PURPOSE: &str = "wharf.purpose";
const FETCH: &str = "fetch";
/// Which run of Wharf sent the errand.
const RUN: &str = "wharf.run";
pub const INSTANCE: &str = "wharf.instance";
const MODEL: &str = "wharf.model";
const SPEC: &str = "wharf.spec";
const GPUS: &str = "wharf.gpus";
const PORT: &str = "wharf.port";
const CONTAINER_PORT: &str = "wharf.container_port";

pub type Labels = HashMap<String, String>;

pub fn write(identity: &Identity, container_port: u16, labels: &mut Labels) {
    let gpus: Vec<String> = identity.gpus.iter().map(GpuId::to_string).collect();
    for (key, value) in [
        (INSTALLATION, identity.installation.clone()),
        (INSTANCE, identity.instance.0.to_string()),
        (MODEL, identity.model.to_string()),
        (SPEC, identity.spec_hash.clone()),
        (GPUS, gpus.join(",")),
        (PORT, identity.port.to_string()),
        (CONTAINER_PORT, container_port.to_string()),
    ] {
        labels.insert(key.to_owned(), value);
    }
}

/// Labels of a container that fetches weights. `None`: it is found by no installation.
pub fn write_errand(installation: Option<&str>, run: &str, model: &ModelName, labels: &mut Labels) {
    labels.insert(RUN.to_owned(), run.to_owned());
    labels.insert(PURPOSE.to_owned(), FETCH.to_owned());
    labels.insert(MODEL.to_owned(), model.to_string());
    labels.extend(installation.map(|name| (INSTALLATION.to_owned(), name.to_owned())));
}

pub fn is_errand(labels: &Labels) -> bool {
    labels.get(PURPOSE).is_some_and(|purpose| purpose == FETCH)
}

/// An errand of the run of Wharf that asks.
pub fn is_of_run(labels: &Labels, run: &str) -> bool {
    labels.get(RUN).is_some_and(|of| of == run)
}

/// Which instance it is, or was meant to be.
pub fn instance(labels: &Labels) -> Option<InstanceId> {
    labels.get(INSTANCE)?.parse().ok().map(InstanceId)
}

/// The identity and the container port; `None`: not (wholly) labelled by us.
pub fn read(labels: &Labels) -> Option<(Identity, u16)> {
    let label = |key: &str| labels.get(key).map(String::as_str);
    let gpus = label(GPUS)?;
    let gpus: Option<Vec<GpuId>> = gpus
        .split(',')
        .filter(|gpu| !gpu.is_empty())
        .map(|gpu| gpu.parse().ok().map(GpuId))
        .collect();
    let identity = Identity {
        installation: label(INSTALLATION)?.to_owned(),
        instance: InstanceId(label(INSTANCE)?.parse().ok()?),
        model: ModelName::new(label(MODEL)?),
        spec_hash: label(SPEC)?.to_owned(),
        gpus: gpus?,
        port: label(PORT)?.parse().ok()?,
    };
    Some((identity, label(CONTAINER_PORT)?.parse().ok()?))
}

/// Does the container carry the labels of exactly this instance?
pub fn belong_to(labels: Option<&Labels>, identity: &Identity) -> bool {
    labels.and_then(read).is_some_and(|(found, _)| {
        found.installation == identity.installation && found.instance == identity.instance
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_survives_its_labels() {
        let identity = Identity {
            installation: "a1b2".to_owned(),
            instance: InstanceId(7),
            model: ModelName::new("org/model:7b"),
            spec_hash: "feed".to_owned(),
            gpus: vec![GpuId(0), GpuId(3)],
            port: 18051,
        };
        let mut labels = Labels::new();
        write(&identity, 8000, &mut labels);
        assert_eq!(read(&labels), Some((identity.clone(), 8000)));
        assert!(belong_to(Some(&labels), &identity));
        labels.remove(INSTANCE);
        assert_eq!(read(&labels), None);
    }
}
