//! A sandbox: the containers that share a shim, and their filesystems.
//!
//! A container's life here: `prepare` before `runc create` -> `set_init_pid` after it -> any number of
//! `checkpoint` -> `remove` after `runc delete`. Each takes the sandbox's lock. All state is in the
//! state directory, so any process may make any of these calls; `remove` also cleans up after a
//! `prepare` that died half-way. Blocking.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use stillframe_tmpfs::build::BuildOptions;
use stillframe_tmpfs::copy_up::{CopyUpError, copy_up, open_in_root};
use stillframe_tmpfs::mount::{MountError, TmpfsMount, mount_tmpfs, open_root, unmount};
use stillframe_tmpfs::mountpoint::make_mountpoint;
use stillframe_tmpfs::{Ids, ResourceId};

pub use crate::checkpoint::{CheckpointError, CheckpointRequest, CheckpointResult};
use crate::freezer::FreezeError;
use crate::image::Image;
use crate::oci_runtime;
use crate::plan::{Below, Mountpoint, PlanError, PlannedMount, plan};
use crate::process;
pub use crate::restore::{RestoreError, RestoreResult};
use crate::restore::{Target, match_filesystems, restore};
use crate::spec::{Spec, SpecError};
pub use crate::state::StateError;
use crate::state::{ContainerRecord, FilesystemRecord, Locked, STATE_ROOT, StateDir};

/// What `prepare` is asked to do.
#[derive(Clone, Debug)]
pub struct PrepareRequest {
    /// The container's id.
    pub container_id: String,
    /// The OCI bundle; its config.json is rewritten, by rename.
    pub bundle: PathBuf,
    /// Where the container's root filesystem is mounted.
    pub rootfs: PathBuf,
    /// The low-level runtime's command, `runc` by default: what a mount looks like depends on its version.
    pub runtime: PathBuf,
    /// Image directory to restore the container's filesystems from. It isn't needed any more when
    /// `prepare` returns.
    pub restore_from: Option<PathBuf>,
}

/// What `prepare` did.
#[derive(Clone, Debug, Default)]
pub struct Prepared {
    /// The filesystems that were mounted, in the order of the spec.
    pub filesystems: Vec<ResourceId>,
    /// What was restored, where that was asked for.
    pub restored: Option<RestoreResult>,
}

/// Why a container couldn't be prepared. Nothing is left of the attempt.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// There is a container of that id.
    #[error("container {0} exists already")]
    Exists(String),
    /// The spec.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The spec has a mount that can't be planned.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The directory that a mount covers couldn't be looked at.
    #[error("look at the directory below the mount {destination}")]
    Below {
        /// Destination of the mount.
        destination: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A filesystem couldn't be mounted.
    #[error("mount {id}")]
    Mount {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: MountError,
    },
    /// A mountpoint on a filesystem couldn't be made.
    #[error("make the mountpoint {path} on {id}")]
    Mountpoint {
        /// ResourceID of the filesystem.
        id: ResourceId,
        /// Path on it.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The directory below couldn't be copied up.
    #[error("copy up into {id}")]
    CopyUp {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: CopyUpError,
    },
    /// The image couldn't be restored.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

/// Why a container couldn't be recorded.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The container wasn't prepared.
    #[error("container {0} was not prepared")]
    Unknown(String),
    /// The process or its cgroup couldn't be looked at.
    #[error("look at the container's init process {pid}")]
    Process {
        /// Its process id.
        pid: i32,
        /// Why.
        #[source]
        source: FreezeError,
    },
}

/// Why a container's filesystems couldn't be removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// A filesystem couldn't be unmounted.
    #[error(transparent)]
    Unmount(#[from] MountError),
}

/// One sandbox, by its state directory.
#[derive(Clone, Debug)]
pub struct Sandbox {
    dir: StateDir,
}

impl Sandbox {
    /// The sandbox `sandbox_id` of a containerd namespace. Nothing is made.
    pub fn new(namespace: &str, sandbox_id: &str) -> Result<Self, StateError> {
        Ok(Self { dir: StateDir::new(Path::new(STATE_ROOT), namespace, sandbox_id)? })
    }

    /// Finds the sandbox that holds a container.
    pub fn of_container(namespace: &str, container_id: &str) -> Result<Option<Self>, StateError> {
        for sandbox in StateDir::sandboxes(Path::new(STATE_ROOT), namespace)? {
            let dir = StateDir::new(Path::new(STATE_ROOT), namespace, &sandbox)?;
            if dir.container(container_id)?.is_some() {
                return Ok(Some(Self { dir }));
            }
        }
        Ok(None)
    }

    /// Before `runc create`: mounts each tmpfs of the bundle's spec, restores them if asked to, and
    /// rewrites the spec so that runc gets bind mounts. Undoes everything on error.
    pub fn prepare(&self, request: &PrepareRequest) -> Result<Prepared, PrepareError> {
        let id = &request.container_id;
        let mut spec = Spec::read(&request.bundle)?;
        let plan = plan(&spec, &request.rootfs)?;
        // An image is judged before anything is mounted.
        let image = match &request.restore_from {
            Some(path) => Some((path.as_path(), Image::open(path).map_err(RestoreError::from)?)),
            None => None,
        };
        let locked = self.dir.create()?;
        if self.dir.container(id)?.is_some() {
            return Err(PrepareError::Exists(id.clone()));
        }
        let name = spec.container_name();
        let mut record = ContainerRecord {
            id: id.clone(),
            name: name.unwrap_or(id).to_owned(),
            named: name.is_some(),
            ids: spec.ids().clone(),
            init: None,
            filesystems: Vec::new(),
        };
        // First of all, so that `remove` finds whatever a crash leaves.
        locked.put_container(&record)?;
        let prepared = self.fill(&locked, request, &mut spec, &plan, image, &mut record);
        if prepared.is_err()
            && let Err(error) = self.remove_locked(&locked, id)
        {
            tracing::warn!(container = %id, %error, "what was prepared couldn't be removed again");
        }
        prepared
    }

    fn fill(
        &self,
        locked: &Locked,
        request: &PrepareRequest,
        spec: &mut Spec,
        plan: &[PlannedMount],
        image: Option<(&Path, Image)>,
        record: &mut ContainerRecord,
    ) -> Result<Prepared, PrepareError> {
        let mut targets = Vec::new();
        for (number, planned) in plan.iter().enumerate() {
            let name = locked.make_filesystem(&record.id, number)?;
            let id = ResourceId::new(record.name.clone(), &planned.destination);
            let mountpoint = self.dir.mountpoint(&name);
            self.mount(spec, planned, &targets, request, &id, &mountpoint)?;
            locked.put_filesystem(
                &name,
                &FilesystemRecord { resource_id: id.clone(), options: planned.options.clone() },
            )?;
            spec.replace_with_bind(planned.index, &mountpoint, planned.options.bind_options());
            record.filesystems.push(name);
            targets.push(Target { id, named: record.named, mountpoint });
        }
        let pairs = image.as_ref().map(|(_, image)| match_filesystems(&image.manifest, &targets));
        let pairs = pairs.unwrap_or_default();
        for (number, planned) in plan.iter().enumerate() {
            // What is restored replaces what would be copied up.
            if planned.options.copy_up && pairs.iter().all(|(_, target)| *target != number) {
                self.copy_up(planned, &targets, number)?;
            }
        }
        let restored = match image {
            None => None,
            Some((path, image)) => {
                let options = BuildOptions { ids: record.ids.clone(), devices: spec.may_make_devices() };
                Some(restore(path, image, &targets, &pairs, &options)?)
            }
        };
        for (planned, target) in plan.iter().zip(&targets).filter(|(planned, _)| planned.options.flags.ro) {
            self.make_mountpoints(planned, target, &record.ids)?;
        }
        locked.put_container(record)?;
        spec.write()?;
        Ok(Prepared { filesystems: targets.into_iter().map(|target| target.id).collect(), restored })
    }

    fn mount(
        &self,
        spec: &Spec,
        planned: &PlannedMount,
        targets: &[Target],
        request: &PrepareRequest,
        id: &ResourceId,
        mountpoint: &Path,
    ) -> Result<(), PrepareError> {
        let below = |source| PrepareError::Below { destination: planned.destination.clone(), source };
        let mode = match &planned.below {
            Below::Nothing => None,
            Below::Directory { root, path } => match open_in_root(root, path).map_err(below)? {
                Some(dir) => Some(dir.metadata().map_err(below)?.mode()),
                None => None,
            },
            Below::Planned(number) => Some(targets[*number].mountpoint.metadata().map_err(below)?.mode()),
        };
        let default_mode = oci_runtime::default_mode(&request.runtime, mode.map(|mode| mode & 0o7777));
        let mount = TmpfsMount {
            options: &planned.options,
            source: planned.source.as_deref(),
            default_mode,
            uid_map: &spec.ids().uid,
            gid_map: &spec.ids().gid,
            label: spec.mount_label(),
        };
        mount_tmpfs(&mount, mountpoint).map_err(|source| PrepareError::Mount { id: id.clone(), source })
    }

    fn copy_up(&self, planned: &PlannedMount, targets: &[Target], number: usize) -> Result<(), PrepareError> {
        let below = |source| PrepareError::Below { destination: planned.destination.clone(), source };
        let source = match &planned.below {
            Below::Nothing => None,
            Below::Directory { root, path } => open_in_root(root, path).map_err(below)?,
            Below::Planned(number) => open_in_root(&targets[*number].mountpoint, "/").map_err(below)?,
        };
        let Some(source) = source else { return Ok(()) };
        let Target { id, mountpoint, .. } = &targets[number];
        let root = open_root(mountpoint).map_err(|source| PrepareError::Mount { id: id.clone(), source })?;
        copy_up(&source, &root).map_err(|source| PrepareError::CopyUp { id: id.clone(), source })
    }

    /// On a filesystem that the container sees read-only, runc couldn't make them any more.
    fn make_mountpoints(
        &self,
        planned: &PlannedMount,
        target: &Target,
        ids: &Ids,
    ) -> Result<(), PrepareError> {
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

    /// After `runc create`: records the init process, by which the container is frozen.
    pub fn set_init_pid(&self, container_id: &str, pid: i32) -> Result<(), InitError> {
        let unknown = || InitError::Unknown(container_id.to_owned());
        let locked = self.dir.lock()?.ok_or_else(unknown)?;
        let mut record = self.dir.container(container_id)?.ok_or_else(unknown)?;
        record.init = Some(process::describe(pid).map_err(|source| InitError::Process { pid, source })?);
        Ok(locked.put_container(&record)?)
    }

    /// Saves the container's filesystems. Freezes the container if it isn't frozen (paused) yet, and
    /// thaws only what it froze.
    pub fn checkpoint(&self, request: &CheckpointRequest) -> Result<CheckpointResult, CheckpointError> {
        let unknown = || CheckpointError::Unknown {
            id: request.container_id.clone(),
            sandbox: self.dir.path().to_owned(),
        };
        let locked = self.dir.lock()?.ok_or_else(unknown)?;
        crate::checkpoint::checkpoint(&locked, request)
    }

    /// After `runc delete`, or when the shim has died: unmounts the container's filesystems and removes
    /// its state, and the sandbox's directory with the last container. Idempotent: what is gone is fine.
    pub fn remove(&self, container_id: &str) -> Result<(), RemoveError> {
        match self.dir.lock()? {
            Some(locked) => self.remove_locked(&locked, container_id),
            None => Ok(()),
        }
    }

    fn remove_locked(&self, locked: &Locked, container_id: &str) -> Result<(), RemoveError> {
        for name in self.dir.filesystems_of(container_id)? {
            unmount(&self.dir.mountpoint(&name))?;
            locked.remove_filesystem(&name)?;
        }
        Ok(locked.remove_container(container_id)?)
    }

    /// The record of a container.
    pub fn container(&self, container_id: &str) -> Result<Option<ContainerRecord>, StateError> {
        self.dir.container(container_id)
    }
}
