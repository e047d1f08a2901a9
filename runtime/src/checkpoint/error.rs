//! Why a checkpoint failed, and in which phase.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::PathBuf;

use stillframe_pgalloc::SaveError;
use stillframe_tmpfs::ResourceId;
use stillframe_tmpfs::filestore::FilestoreError;
use stillframe_tmpfs::mount::MountError;
use stillframe_tmpfs::save::SaveTreeError;

use crate::checkpoint::phase::Phase;
use crate::freezer::FreezeError;
use crate::image::ImageError;
use crate::lazy::LazyError;
use crate::spec::NAME_ANNOTATION;
use crate::state::StateError;

/// A checkpoint failed. Nothing is frozen any more that the checkpoint froze, and of the image nothing is left, unless the
/// cause says otherwise.
#[derive(Debug)]
pub struct CheckpointError {
    /// What was being done.
    pub phase: Phase,
    /// Why it failed.
    pub cause: Box<CheckpointCause>,
}

impl fmt::Display for CheckpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.phase {
            // Nothing was done yet, so there is nothing to be told from.
            Phase::Prepare => self.cause.fmt(f),
            phase => write!(f, "in phase {phase}: {}", self.cause),
        }
    }
}

impl Error for CheckpointError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.source()
    }
}

/// Why a checkpoint failed, whatever the phase.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointCause {
    /// The container isn't one of ours.
    #[error("container {id} is unknown in {sandbox}")]
    Unknown {
        /// Its id.
        id: String,
        /// The sandbox's state directory.
        sandbox: PathBuf,
    },
    /// The container doesn't run.
    #[error("container {0} has no running process: only a running or paused container can be checkpointed")]
    NotRunning(String),
    /// The container can't be frozen.
    #[error(
        "container {0} has no cgroup of its own, so it can't be frozen: give it one (linux.cgroupsPath), or pause it"
    )]
    NoCgroup(String),
    /// A container of a pod has no name by which it would be found again.
    #[error(
        "container {0} of the pod has a filesystem of its own and no name by which it could be found again: give it one \
         (annotation {NAME_ANNOTATION})"
    )]
    Unnamed(String),
    /// Two containers of a pod have one name.
    #[error(
        "two containers of the pod are called \"{0}\": give each a name of its own (annotation {NAME_ANNOTATION})"
    )]
    NameTwice(String),
    /// A selection matches nothing.
    #[error("no filesystem of the container is \"{selector}\"; there are: {there}")]
    NoMatch {
        /// The selection.
        selector: String,
        /// What there is.
        there: String,
    },
    /// Two filesystems have one ResourceID.
    #[error(
        "two filesystems are called {0}: the container mounts a tmpfs twice at one path; \
         save the others by --path, or mount it once"
    )]
    Duplicate(ResourceId),
    /// The sandbox's state couldn't be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The container couldn't be frozen.
    #[error("freeze the container")]
    Freeze(#[from] FreezeError),
    /// The image would be written to what it is to hold.
    #[error(
        "the image directory {path} is on {id}, which is to be saved: give one that isn't in the container"
    )]
    OnItself {
        /// The image directory.
        path: PathBuf,
        /// ResourceID of the filesystem.
        id: ResourceId,
    },
    /// The file of a filesystem on disk couldn't be used.
    #[error("save the filesystem {id} on disk")]
    Filestore {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: Box<FilestoreError>,
    },
    /// A filesystem couldn't be looked into.
    #[error("open the filesystem {id}")]
    Open {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: MountError,
    },
    /// A filesystem isn't loaded yet, and what it is loaded from can't be found.
    #[error("find what the files of {id} are loaded from that aren't loaded yet")]
    Unloaded {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: LazyError,
    },
    /// A filesystem couldn't be saved.
    #[error("save the filesystem {id}")]
    Save {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: SaveTreeError,
    },
    /// The pages file couldn't be written.
    #[error("write {path}")]
    Pages {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: SaveError,
    },
    /// The image is complete, but the container couldn't be killed.
    #[error("the image is complete, but the container's init process {pid} couldn't be killed")]
    Kill {
        /// Its process id.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The image couldn't be written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The containers would have been frozen for longer than was allowed.
    #[error(
        "gave up: the containers were frozen for {paused_ms:.1} ms, and the limit is {limit_ms} ms; they run on. \
         Give a higher --pause-limit, or try when they write less"
    )]
    PauseLimit {
        /// How long they were frozen until they were thawed, in milliseconds.
        paused_ms: f64,
        /// How long they might have been.
        limit_ms: u64,
    },
    /// There is no thread to be had.
    #[error("start a thread that watches the limit of the pause")]
    Thread(#[source] io::Error),
}
