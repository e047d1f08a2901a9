//! Which containers a checkpoint is of: one, or all that run in its pod.
//!
//! A pod is saved as what its containers have together. Those that have ended have nothing any more, but their names are kept: in a
//! pod that is made again they are run again. Each container needs a name of its own, since by it its filesystems find it again;
//! the pod's own container (CRI's sandbox) has none, and nothing of its own either.

use crate::checkpoint::CheckpointRequest;
use crate::checkpoint::error::CheckpointCause;
use crate::freezer::Cgroup;
use crate::manifest::{SavedContainer, SavedPod};
use crate::process;
use crate::selected::{Selected, others};
use crate::state::{ContainerRecord, InitRecord, StateDir};

/// One of the containers.
pub(crate) struct Member {
    pub(crate) record: ContainerRecord,
    init: InitRecord,
    cgroup: Cgroup,
}

/// See the module's documentation.
pub(crate) struct Scope {
    pub(crate) members: Vec<Member>,
    /// If it is of a pod.
    pod: Option<SavedPod>,
}

impl Scope {
    /// Finds the containers; all of them run.
    pub(crate) fn of(dir: &StateDir, request: &CheckpointRequest) -> Result<Self, CheckpointCause> {
        let id = &request.container_id;
        let unknown = || CheckpointCause::Unknown { id: id.clone(), sandbox: dir.path().to_owned() };
        let asked = dir.container(id)?.ok_or_else(unknown)?;
        if !request.pod {
            let init = running(&asked).ok_or_else(|| CheckpointCause::NotRunning(id.clone()))?;
            return Ok(Self { members: vec![Member::new(asked, init)?], pod: None });
        }
        let mut members: Vec<Member> = Vec::new();
        for id in dir.containers()? {
            // One without a process is starting, which takes the lock that is held here, or has ended.
            let Some(record) = dir.container(&id)? else { continue };
            let Some(init) = running(&record) else { continue };
            if members.iter().any(|member| record.named && member.record.name == record.name) {
                return Err(CheckpointCause::NameTwice(record.name));
            }
            members.push(Member::new(record, init)?);
        }
        if members.is_empty() {
            return Err(CheckpointCause::NotRunning(id.clone()));
        }
        let runs = |name: &String| members.iter().any(|member| &member.record.name == name);
        let ended = dir.container_names()?.into_iter().filter(|name| !runs(name)).collect();
        Ok(Self { members, pod: Some(SavedPod { ended }) })
    }

    /// The containers' records.
    pub(crate) fn records(&self) -> Vec<&ContainerRecord> {
        self.members.iter().map(|member| &member.record).collect()
    }

    /// The containers' cgroups.
    pub(crate) fn cgroups(&self) -> impl Iterator<Item = &Cgroup> {
        self.members.iter().map(|member| &member.cgroup)
    }

    /// Those of the other containers that have one of the filesystems.
    pub(crate) fn others(
        &self,
        dir: &StateDir,
        selected: &[Selected],
    ) -> Result<Vec<Cgroup>, CheckpointCause> {
        others(dir, &self.records(), selected)
    }

    /// Whether all of the containers are frozen.
    pub(crate) fn is_frozen(&self) -> Result<bool, CheckpointCause> {
        for cgroup in self.cgroups() {
            // One that is gone, with its container, is as good as frozen.
            if !cgroup.is_gone() && !cgroup.is_frozen()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What the manifest says of them.
    pub(crate) fn describe(
        &self,
        selected: &[Selected],
    ) -> Result<(Vec<SavedContainer>, Option<SavedPod>), CheckpointCause> {
        let mut saved = Vec::new();
        for Member { record: ContainerRecord { name, named, .. }, .. } in &self.members {
            if self.pod.is_none() || *named {
                saved.push(SavedContainer { name: name.clone(), named: *named });
            } else if selected.iter().any(|selected| &selected.record.resource_id.container == name) {
                return Err(CheckpointCause::Unnamed(name.clone()));
            }
        }
        Ok((saved, self.pod.clone()))
    }

    /// Kills them; nothing of them runs any more once they are thawed.
    pub(crate) fn kill(&self) -> Result<(), CheckpointCause> {
        let mut failed = None;
        for Member { init, .. } in &self.members {
            if let Err(source) = process::kill(init) {
                failed = Some(CheckpointCause::Kill { pid: init.pid, source });
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

impl Member {
    fn new(record: ContainerRecord, mut init: InitRecord) -> Result<Self, CheckpointCause> {
        let cgroup = init.cgroup.take().ok_or_else(|| CheckpointCause::NoCgroup(record.id.clone()))?;
        Ok(Self { record, init, cgroup })
    }
}

fn running(record: &ContainerRecord) -> Option<InitRecord> {
    record.init.clone().filter(process::is_alive)
}
