//! Images of whole pods: whether a container may be made from one, and what of it isn't the container's.
//!
//! A container that the image doesn't know is refused as long as one that it has hasn't come: it may be that one under another name,
//! or another pod altogether, and would start without what it had. Once all have come, others may (a debugger, for instance); they get
//! what the pod has.

use stillframe_tmpfs::ResourceId;

use crate::manifest::Manifest;
use crate::restore::RestoreError;
use crate::sandbox::PrepareError;
use crate::state::{ContainerRecord, StateDir};

/// Refuses a container whose place in the image isn't clear.
pub(crate) fn judge(
    manifest: &Manifest,
    container: &ContainerRecord,
    dir: &StateDir,
) -> Result<(), PrepareError> {
    let Some(pod) = &manifest.pod else { return Ok(()) };
    let saved = || manifest.containers.iter().map(|container| &container.name);
    let known = container.named && saved().chain(&pod.ended).any(|name| *name == container.name);
    if known || container.sandbox {
        return Ok(());
    }
    let mut missing = Vec::new();
    for name in saved() {
        if !dir.was_restored(name)? {
            missing.push(name.clone());
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(RestoreError::OtherPod { name: container.name.clone(), missing }.into())
}

/// What of a pod's image is other containers' alone.
pub(crate) fn of_others(manifest: &Manifest, name: &str) -> Vec<ResourceId> {
    let filesystems = manifest.filesystems.iter().filter(|_| manifest.pod.is_some());
    let others = filesystems.filter(|filesystem| filesystem.ids().all(|id| id.container != name));
    others.map(|filesystem| filesystem.resource_id.clone()).collect()
}
