//! The records of a sandbox's state: JSON, each in a file of its own.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use stillframe_tmpfs::options::TmpfsOptions;
use stillframe_tmpfs::{Ids, ResourceId};

use crate::freezer::Cgroup;

/// A container that has been prepared.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Its id.
    pub id: String,
    /// Its name in ResourceIDs.
    pub name: String,
    /// Whether an annotation gave the name; else it is the id.
    pub named: bool,
    /// Whether it is the pod's own container (CRI's sandbox), which runs nothing of the application's.
    #[serde(default)]
    pub sandbox: bool,
    /// Its user namespace's mappings.
    pub ids: Ids,
    /// Where the pages of its checkpoints are to be kept, if not in the image.
    #[serde(default)]
    pub pages_dir: Option<PathBuf>,
    /// Whether files are copied to there before a pause.
    #[serde(default)]
    pub precopy: bool,
    /// Whether everything that is restored is loaded before its program runs.
    #[serde(default)]
    pub load_all: bool,
    /// Its init process, once runc has created it.
    pub init: Option<InitRecord>,
    /// Names of its filesystems' directories, in the order of the spec.
    pub filesystems: Vec<String>,
}

/// A container's init process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InitRecord {
    /// Its process id on the host.
    pub pid: i32,
    /// When it started, in clock ticks since boot (field 22 of /proc/PID/stat): a pid may come again.
    pub start_time: u64,
    /// The cgroup by which the container is frozen.
    pub cgroup: Option<Cgroup>,
}

/// A filesystem. Written before anything of it is made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FilesystemRecord {
    /// Its ResourceID.
    pub resource_id: ResourceId,
    /// The options it was mounted with.
    pub options: TmpfsOptions,
    /// The mounts that have it. It is removed with the last container among them.
    #[serde(default)]
    pub users: Vec<FilesystemUser>,
    /// The file that holds it, if it is on disk.
    #[serde(default)]
    pub filestore: Option<PathBuf>,
    /// Where somebody else has mounted it, if it is a volume that was taken as it is.
    #[serde(default)]
    pub existing: Option<PathBuf>,
    /// Whether its mounts translate ids: then those on it are the container's own.
    #[serde(default)]
    pub translated: bool,
    /// Whether it is being restored. If that isn't completed, what is on it is half of an image.
    #[serde(default)]
    pub restoring: bool,
    /// Whether it was restored once.
    #[serde(default)]
    pub restored: bool,
}

impl FilesystemRecord {
    /// The mappings between the ids on it and those of a container whose user namespace has `ids`.
    pub fn ids_of(&self, ids: &Ids) -> Ids {
        if self.translated { Ids::default() } else { ids.clone() }
    }

    /// All its ResourceIDs, each once, the canonical one first.
    pub fn ids(&self) -> Vec<&ResourceId> {
        let mut ids = vec![&self.resource_id];
        for FilesystemUser { alias, .. } in &self.users {
            if !ids.contains(&alias) {
                ids.push(alias);
            }
        }
        ids
    }
}

/// One mount of a filesystem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesystemUser {
    /// Id of the container.
    pub container: String,
    /// The filesystem's ResourceID by this mount.
    pub alias: ResourceId,
}

/// What a checkpoint has frozen: written before it does, removed when all is thawed. Whoever holds the lock and didn't
/// write it knows that its writer is dead.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct FreezeMarker {
    /// The cgroups that it froze, or was about to; what was frozen before isn't among them.
    pub cgroups: Vec<Cgroup>,
    /// Names of the filesystems on disk that it froze, or was about to.
    pub filesystems: Vec<String>,
}
