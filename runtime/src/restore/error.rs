//! How restoring fails.

use std::path::PathBuf;

use stillframe_pgalloc::LoadError;
use stillframe_tmpfs::ResourceId;
use stillframe_tmpfs::build::BuildError;
use stillframe_tmpfs::filestore::FilestoreError;
use stillframe_tmpfs::mount::MountError;
use stillframe_tmpfs::private::PrivateError;

use crate::image::ImageError;
use crate::lazy::LazyError;

/// Why an image couldn't be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A container that isn't one of the pod's that was saved.
    #[error(
        "the image is of a pod that has no container \"{name}\", and of those that it has {} isn't here yet: give the pod's \
         containers the names that they had, or the pod its own image",
        missing.join(", ")
    )]
    OtherPod {
        /// The container's name.
        name: String,
        /// Names of the pod's containers that haven't been made.
        missing: Vec<String>,
    },
    /// The image can't be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A tree and its private MemoryFile contradict each other.
    #[error("the filesystem {id} of the image {image}")]
    Private {
        /// Its ResourceID in the image.
        id: ResourceId,
        /// The image directory.
        image: PathBuf,
        /// How.
        #[source]
        source: PrivateError,
    },
    /// The new filesystem couldn't be looked into.
    #[error("open the new filesystem {id}")]
    Open {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: MountError,
    },
    /// A tree doesn't fit, or couldn't be built.
    #[error("restore the filesystem {id}")]
    Build {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: BuildError,
    },
    /// A filestore couldn't be replaced by the saved one.
    #[error("restore the filesystem {id} on disk")]
    Filestore {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: Box<FilestoreError>,
    },
    /// Loading behind the start couldn't begin.
    #[error("load the contents of {id}")]
    Behind {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: LazyError,
    },
    /// The pages couldn't be loaded.
    #[error("load {path}")]
    Load {
        /// The pages file.
        path: PathBuf,
        /// Why.
        #[source]
        source: LoadError,
    },
}
