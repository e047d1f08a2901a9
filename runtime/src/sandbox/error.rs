//! How preparing, recording and removing a container fail.

use std::io;

use stillframe_tmpfs::ResourceId;
use stillframe_tmpfs::copy_up::CopyUpError;
use stillframe_tmpfs::filestore::FilestoreError;
use stillframe_tmpfs::mount::MountError;

use crate::config::ConfigError;
use crate::freezer::FreezeError;
use crate::image_source::ImageSourceError;
use crate::lazy::LazyError;
use crate::plan::PlanError;
use crate::restore::RestoreError;
use crate::spec::{
    IMAGE_DIR_ANNOTATION, LOAD_ANNOTATION, ON_RESTART_ANNOTATION, PRECOPY_ANNOTATION, SpecError,
};
use crate::state::{STATE_ROOT, StateError};

/// Why a container couldn't be prepared. Nothing is left of the attempt.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The image to restore from can't be had.
    #[error(transparent)]
    Source(ImageSourceError),
    /// The directory for pages isn't absolute.
    #[error("annotation {IMAGE_DIR_ANNOTATION} is \"{0}\": give an absolute path")]
    ImageDir(String),
    /// What the annotation for copying ahead says isn't known, or can't be done.
    #[error(
        "annotation {PRECOPY_ANNOTATION} is \"{0}\": give \"on\" or \"off\"; \
         \"on\" needs {IMAGE_DIR_ANNOTATION} as well, the directory that is copied to"
    )]
    Precopy(String),
    /// When to load isn't said right.
    #[error("annotation {LOAD_ANNOTATION} is \"{0}\": give eager or lazy")]
    Load(String),
    /// What a container gets that is made again isn't said right.
    #[error("annotation {ON_RESTART_ANNOTATION} is \"{0}\": give keep, image or empty")]
    OnRestart(String),
    /// What loads a volume that is to be restored again couldn't be ended.
    #[error(transparent)]
    EndLoad(#[from] LazyError),
    /// Files can't be loaded before the container's hooks run.
    #[error("have the restored files loaded before the container's hooks look at them")]
    Hook(#[source] LazyError),
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
    /// A volume couldn't be looked at.
    #[error("list the volume {id}")]
    List {
        /// Its ResourceID.
        id: ResourceId,
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
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A filesystem on disk couldn't be made.
    #[error("make {id} on disk")]
    Filestore {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: Box<FilestoreError>,
    },
    /// A shared filesystem has another medium than a mount asks for.
    #[error(
        "mount {destination}: the filesystem {id} that it shares is there already, on another medium; \
         give all containers of the pod the same hints"
    )]
    Medium {
        /// ResourceID of the filesystem.
        id: ResourceId,
        /// Destination of the mount.
        destination: String,
    },
    /// The record of a filesystem that was just made or seen is gone.
    #[error("the record of the filesystem {name} is gone: something else removes files in {STATE_ROOT}")]
    Vanished {
        /// Name of its directory.
        name: String,
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
    /// Restored files couldn't be loaded.
    #[error("load the restored files")]
    Load(#[source] LazyError),
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

/// Why it can't be said what of a container is loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadStatusError {
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// What loads.
    #[error(transparent)]
    Load(#[from] LazyError),
    /// The container wasn't prepared.
    #[error("container {0} was not prepared")]
    Unknown(String),
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
    /// What loads its files couldn't be ended.
    #[error(transparent)]
    Load(#[from] LazyError),
}
