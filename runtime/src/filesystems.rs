//! Making and removing the filesystems of a container.
//!
//! Each filesystem goes `record written -> (file made, formatted) -> mounted -> (file contents replaced by an image's)`,
//! and back in reverse: whatever was made, the record tells, also of what a crash has left half-made. A shared one is
//! made by the first mount that needs it and removed with the last container that has it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use stillframe_tmpfs::copy_up::{copy_up, open_in_root};
use stillframe_tmpfs::filestore::{self, FilestoreError, Root};
use stillframe_tmpfs::mount::{DefaultMode, TmpfsMount, mount_again, mount_tmpfs, open_root, unmount};
use stillframe_tmpfs::mountpoint::make_mountpoint;
use stillframe_tmpfs::{Ids, ResourceId};

use crate::filestores::{self, Filestores};
use crate::hints::{Medium, Share};
use crate::lazy;
use crate::oci_runtime;
use crate::plan::{Below, Mountpoint, PlannedMount, Volume};
use crate::restore::{DiskTarget, Target};
use crate::sandbox::{PrepareError, PrepareRequest, RemoveError};
use crate::spec::Spec;
use crate::state::{ContainerRecord, FilesystemRecord, FilesystemUser, Locked, STATE_ROOT, pod_filesystem};

/// Makes the filesystems of one container.
pub(crate) struct Maker<'a> {
    pub(crate) locked: &'a Locked,
    pub(crate) filestores: &'a Filestores,
    pub(crate) request: &'a PrepareRequest,
    pub(crate) spec: &'a Spec,
    pub(crate) plan: &'a [PlannedMount],
    pub(crate) record: &'a mut ContainerRecord,
    /// Each once.
    pub(crate) targets: Vec<Target>,
    /// For each planned mount, the number of its target.
    pub(crate) of_mounts: Vec<usize>,
}

impl Maker<'_> {
    /// Makes the filesystem of planned mount `number`, or finds it; mounts come in order.
    pub(crate) fn obtain(&mut self, number: usize) -> Result<&Target, PrepareError> {
        let planned = &self.plan[number];
        let alias = ResourceId::new(self.record.name.clone(), &planned.destination);
        let user = FilesystemUser { container: self.record.id.clone(), alias: alias.clone() };
        // The same volume at a second place of this container.
        if let Some(volume) = &planned.volume
            && let Some(first) =
                self.plan[..number].iter().position(|other| other.volume.as_ref() == Some(volume))
        {
            let target = self.of_mounts[first];
            let name = self.targets[target].name.clone();
            self.add_user(&name, planned, user)?;
            self.targets[target].aliases.push(alias);
            self.of_mounts.push(target);
            return Ok(&self.targets[target]);
        }
        let pod = planned.volume.as_ref().filter(|volume| volume.share == Share::Pod);
        let (name, id, there) = match pod {
            Some(Volume { name, .. }) => {
                let there = self.locked.dir().filesystem(&pod_filesystem(name))?.is_some();
                (self.locked.make_pod_filesystem(name)?, ResourceId::new("", name), there)
            }
            None => (self.locked.make_filesystem(&self.record.id, number)?, alias.clone(), false),
        };
        let filestore =
            (planned.medium == Medium::Disk).then(|| self.filestores.path(self.locked.dir(), &name));
        let mountpoint = self.locked.dir().mountpoint(&name);
        if there {
            self.add_user(&name, planned, user)?;
        } else {
            let record = FilesystemRecord {
                resource_id: id.clone(),
                options: planned.superblock.clone(),
                users: vec![user],
                filestore: filestore.clone(),
                existing: planned.existing.clone(),
                translated: planned.translated,
                restoring: false,
                restored: false,
            };
            self.locked.put_filesystem(&name, &record)?;
            let mode = if pod.is_some() { DefaultMode::Absent } else { self.default_mode(planned)? };
            self.make(planned, &id, filestore.as_deref(), mode, &mountpoint)?;
        }
        let fresh =
            if planned.existing.is_some() { self.is_unused(&name, &id, &mountpoint)? } else { !there };
        let disk = filestore.map(|path| DiskTarget {
            path,
            options: planned.superblock.clone(),
            label: self.spec.mount_label().map(str::to_owned),
        });
        self.record.filesystems.push(name.clone());
        let aliases = if id == alias { Vec::new() } else { vec![alias] };
        let named = self.record.named;
        let ids = if planned.translated { Ids::default() } else { self.record.ids.clone() };
        // Its own is nobody else's.
        let alone = pod.is_none() || self.is_alone(&name)?;
        self.targets.push(Target { name, id, aliases, named, mountpoint, fresh, alone, disk, ids });
        self.of_mounts.push(self.targets.len() - 1);
        Ok(&self.targets[self.targets.len() - 1])
    }

    /// Whether a volume that somebody else has made may be restored: it wasn't yet, and holds nothing. It may have
    /// outlived the container that filled it; and others may have it already, such as the pod's own container, which
    /// has `/dev/shm`, without having put anything there.
    fn is_unused(&self, name: &str, id: &ResourceId, mountpoint: &Path) -> Result<bool, PrepareError> {
        let restored = self.locked.dir().filesystem(name)?.is_some_and(|record| record.restored);
        Ok(!restored && holds_only_directories(id, mountpoint)?)
    }

    /// Removes what is on volumes that the image has, so that they can be restored again, where no other container has them.
    pub(crate) fn roll_back(&mut self, pairs: &[(usize, usize)]) -> Result<(), PrepareError> {
        for (_, number) in pairs {
            let Target { name, id, mountpoint, fresh: false, alone: true, disk: None, .. } =
                &self.targets[*number]
            else {
                continue;
            };
            self.locked.end_load(name)?;
            clear(id, mountpoint);
            self.targets[*number].fresh = holds_only_directories(id, mountpoint)?;
        }
        Ok(())
    }

    /// Whether no other container has the filesystem.
    fn is_alone(&self, name: &str) -> Result<bool, PrepareError> {
        let record = self.locked.dir().filesystem(name)?;
        Ok(record.is_some_and(|record| record.users.iter().all(|user| user.container == self.record.id)))
    }

    /// Records one more mount of a filesystem that is there.
    fn add_user(&self, name: &str, planned: &PlannedMount, user: FilesystemUser) -> Result<(), PrepareError> {
        let missing = || PrepareError::Vanished { name: name.to_owned() };
        let mut record = self.locked.dir().filesystem(name)?.ok_or_else(missing)?;
        if record.filestore.is_some() != (planned.medium == Medium::Disk) {
            return Err(PrepareError::Medium {
                id: record.resource_id,
                destination: planned.destination.clone(),
            });
        }
        record.users.push(user);
        Ok(self.locked.put_filesystem(name, &record)?)
    }

    fn make(
        &self,
        planned: &PlannedMount,
        id: &ResourceId,
        filestore: Option<&Path>,
        default_mode: DefaultMode,
        mountpoint: &Path,
    ) -> Result<(), PrepareError> {
        let mount = TmpfsMount {
            options: &planned.superblock,
            source: planned.source.as_deref(),
            default_mode,
            uid_map: &self.spec.ids().uid,
            gid_map: &self.spec.ids().gid,
            label: self.spec.mount_label(),
        };
        if let Some(existing) = &planned.existing {
            return mount_again(existing, mountpoint)
                .map_err(|source| PrepareError::Mount { id: id.clone(), source });
        }
        let Some(path) = filestore else {
            return mount_tmpfs(&mount, mountpoint)
                .map_err(|source| PrepareError::Mount { id: id.clone(), source });
        };
        self.filestores.make_room(path)?;
        let make = || -> Result<(), FilestoreError> {
            let directory = path.parent().unwrap_or(path);
            filestore::create(path, filestore::size(&planned.superblock, directory)?)?;
            filestore::format(path, &planned.superblock)?;
            filestore::mount(path, &mount, Root::New, mountpoint)
        };
        make().map_err(|source| PrepareError::Filestore { id: id.clone(), source: Box::new(source) })
    }

    /// What the directory that a mount covers does to its mode, where the OCI mount is a tmpfs.
    fn default_mode(&self, planned: &PlannedMount) -> Result<DefaultMode, PrepareError> {
        if !planned.is_tmpfs {
            return Ok(DefaultMode::Absent);
        }
        let below = |source| PrepareError::Below { destination: planned.destination.clone(), source };
        let mode = match &planned.below {
            Below::Nothing => None,
            Below::Directory { root, path } => match open_in_root(root, path).map_err(below)? {
                Some(dir) => Some(dir.metadata().map_err(below)?.mode()),
                None => None,
            },
            Below::Planned(number) => Some(self.mountpoint(*number).metadata().map_err(below)?.mode()),
        };
        Ok(oci_runtime::default_mode(
            Path::new(STATE_ROOT),
            &self.request.runtime,
            mode.map(|mode| mode & 0o7777),
        ))
    }

    fn mountpoint(&self, number: usize) -> &PathBuf {
        &self.targets[self.of_mounts[number]].mountpoint
    }

    /// Records for each of these targets that it is being restored, or no more.
    pub(crate) fn mark_restoring(&self, targets: &[usize], restoring: bool) -> Result<(), PrepareError> {
        for target in targets {
            let name = &self.targets[*target].name;
            let missing = || PrepareError::Vanished { name: name.clone() };
            let mut record = self.locked.dir().filesystem(name)?.ok_or_else(missing)?;
            record.restoring = restoring;
            record.restored = !restoring;
            self.locked.put_filesystem(name, &record)?;
        }
        Ok(())
    }

    /// Copies the directory that planned mount `number` covers into its filesystem.
    pub(crate) fn copy_up(&self, number: usize) -> Result<(), PrepareError> {
        let planned = &self.plan[number];
        let below = |source| PrepareError::Below { destination: planned.destination.clone(), source };
        let source = match &planned.below {
            Below::Nothing => None,
            Below::Directory { root, path } => open_in_root(root, path).map_err(below)?,
            Below::Planned(number) => open_in_root(self.mountpoint(*number), "/").map_err(below)?,
        };
        let Some(source) = source else { return Ok(()) };
        let Target { id, mountpoint, .. } = &self.targets[self.of_mounts[number]];
        let root = open_root(mountpoint).map_err(|source| PrepareError::Mount { id: id.clone(), source })?;
        copy_up(&source, &root).map_err(|source| PrepareError::CopyUp { id: id.clone(), source })
    }

    /// Makes the mountpoints on the filesystem of planned mount `number`: if the container sees it read-only, runc
    /// couldn't make them any more.
    pub(crate) fn make_mountpoints(&self, number: usize, ids: &Ids) -> Result<(), PrepareError> {
        let planned = &self.plan[number];
        let target = &self.targets[self.of_mounts[number]];
        let root = || ids.uid.to_host(0).zip(ids.gid.to_host(0)).unwrap_or_default();
        for Mountpoint { path, directory } in planned.mountpoints.iter().filter(|on| !on.path.is_empty()) {
            let filesystem = open_root(&target.mountpoint)
                .map_err(|source| PrepareError::Mount { id: target.id.clone(), source })?;
            make_mountpoint(&filesystem, path, *directory, root()).map_err(|source| {
                PrepareError::Mountpoint { id: target.id.clone(), path: path.clone(), source }
            })?;
        }
        Ok(())
    }
}

/// Whether nothing but directories is on a volume: kubelet makes those of sub-paths before any container is there.
fn holds_only_directories(id: &ResourceId, mountpoint: &Path) -> Result<bool, PrepareError> {
    let fail = |source| PrepareError::List { id: id.clone(), source };
    let mut directories = vec![mountpoint.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            if !entry.file_type().map_err(fail)?.is_dir() {
                return Ok(false);
            }
            directories.push(entry.path());
        }
    }
    Ok(true)
}

/// Removes the filesystems of a container that nobody else has, and forgets it as a user of the others. A volume that somebody else has
/// made stays known, and goes on being loaded, as long as the sandbox has another container: the pod goes on, and the next
/// container may want it (an init container's successor, or a container that is made again).
pub(crate) fn remove_of(locked: &Locked, container: &str) -> Result<(), RemoveError> {
    let dir = locked.dir();
    for name in dir.filesystems_of(container)? {
        // What a record that can't be read named is swept later.
        let record = dir.filesystem(&name).unwrap_or_else(|error| {
            tracing::warn!(%name, %error, "a filesystem is removed without its record");
            None
        });
        remove(locked, &name, record.as_ref())?;
    }
    let last = dir.containers()?.iter().all(|other| other == container);
    for name in dir.pod_filesystems()? {
        // Without a record nothing was made of it.
        let Some(mut record) = dir.filesystem(&name)? else {
            remove(locked, &name, None)?;
            continue;
        };
        let half = record.existing.is_some() && record.restoring;
        if half {
            // It outlives us, and whoever finds something on it takes it for whole.
            clear(&record.resource_id, &dir.mountpoint(&name));
            record.restoring = false;
        }
        let before = record.users.len();
        record.users.retain(|user| user.container != container);
        // What couldn't be loaded isn't handed on.
        let broken = || {
            lazy::status(&dir.filesystem_dir(&name))
                .is_ok_and(|status| status.is_some_and(|status| status.failed_files > 0))
        };
        if record.users.is_empty() && (last || half || record.existing.is_none() || broken()) {
            remove(locked, &name, Some(&record))?;
        } else if record.users.len() < before {
            locked.put_filesystem(&name, &record)?;
        }
    }
    Ok(())
}

/// Removes what is on a volume, as far as possible, but for directories: kubelet may have bind-mounted some.
fn clear(id: &ResourceId, mountpoint: &Path) {
    let mut directories = vec![mountpoint.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                directories.push(path);
            } else if let Err(error) = fs::remove_file(&path) {
                tracing::error!(%id, path = %path.display(), %error, "what was restored can't be removed");
            }
        }
    }
}

fn remove(locked: &Locked, name: &str, record: Option<&FilesystemRecord>) -> Result<(), RemoveError> {
    let mountpoint = locked.dir().mountpoint(name);
    let filestore = record.and_then(|record| record.filestore.as_deref());
    let complete = locked.end_load(name)?;
    if !complete && let Some(record) = record.filter(|record| record.existing.is_some()) {
        // It outlives us, and nobody would load the rest.
        clear(&record.resource_id, &mountpoint);
    }
    // A frozen filesystem would outlive its last mount. One that isn't mounted can't be thawed.
    if filestore.is_some()
        && let Err(error) = filestore::thaw(&mountpoint)
    {
        tracing::debug!(name, %error, "not thawed");
    }
    unmount(&mountpoint)?;
    if let Some(path) = filestore {
        filestores::remove(path)?;
    }
    Ok(locked.remove_filesystem(name)?)
}
