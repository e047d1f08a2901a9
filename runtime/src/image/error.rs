//! Why an image couldn't be written or read.

use std::io;
use std::path::PathBuf;

use stillframe_pgalloc::MetaError;
use stillframe_tmpfs::ResourceId;
use stillframe_tmpfs::decode::TreeError;

use crate::manifest::ManifestError;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The directory to write to has something in it.
    #[error("the image directory {path} is not empty (it holds \"{found}\"): give an empty or a new one")]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// Something in it.
        found: String,
    },
    /// A call on a file or directory failed.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// There is no manifest.
    #[error(
        "{0} is not a checkpoint image: it has no manifest.json (none was taken, or it was never completed)"
    )]
    NoManifest(PathBuf),
    /// The manifest can't be used.
    #[error("the image {path}")]
    Manifest {
        /// The image directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: ManifestError,
    },
    /// A part isn't a regular file.
    #[error("{0} is not a regular file: the image is damaged")]
    NotAFile(PathBuf),
    /// A part has a wrong length.
    #[error("{path} has {found} bytes, not {expected}: the image is truncated or damaged")]
    Length {
        /// The file.
        path: PathBuf,
        /// What the manifest says.
        expected: u64,
        /// What it has.
        found: u64,
    },
    /// A part isn't what was written.
    #[error("{path} is damaged between offsets {start} and {end}: the digest differs")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Start of the chunk, in bytes.
        start: u64,
        /// End of the chunk.
        end: u64,
    },
    /// Compressed archives that aren't.
    #[error("{path} can't be uncompressed between offsets {start} and {end}")]
    Compressed {
        /// The file.
        path: PathBuf,
        /// Start of the archive, in bytes.
        start: u64,
        /// End of the archive.
        end: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An archive isn't what was compressed.
    #[error("{path}: the tree of {id} hasn't {expected} bytes uncompressed, as the manifest says")]
    TreeLength {
        /// The file.
        path: PathBuf,
        /// ResourceID of the filesystem.
        id: ResourceId,
        /// What the manifest says.
        expected: u64,
    },
    /// The manifest and `pages.meta` contradict each other.
    #[error("{path}: the filesystem {id} is in the private MemoryFile {index}, which isn't there")]
    NoPrivateFile {
        /// `pages.meta`.
        path: PathBuf,
        /// ResourceID of the filesystem.
        id: ResourceId,
        /// Number of the MemoryFile.
        index: u32,
    },
    /// A tree can't be used.
    #[error("the filesystem {id} of the image {path}")]
    Tree {
        /// The image directory.
        path: PathBuf,
        /// ResourceID of the filesystem.
        id: ResourceId,
        /// Why.
        #[source]
        source: Box<TreeError>,
    },
    /// `pages.meta` is what was written and yet can't be understood.
    #[error("{path} can't be understood")]
    Meta {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: MetaError,
    },
}
