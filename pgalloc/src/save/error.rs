//! How saving fails. The first failure of an [`AsyncPagesFileSave`](crate::AsyncPagesFileSave) is final: it is what
//! every later call on it returns, so the errors can be cloned.

use std::io;
use std::sync::Arc;

use crate::page::{FileRange, PagesOffset};

/// Why pages were not saved.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SaveError {
    /// The pages file had contents before anything was saved.
    #[error("the pages file already has {length} bytes: give an empty one")]
    NotEmpty {
        /// Its length in bytes.
        length: u64,
    },
    /// The pages file, or a source, can't be examined.
    #[error("can't examine a file to be saved or written")]
    Examine {
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// `Direct::Always` was asked for where the pages file's filesystem doesn't do it.
    #[error("the pages file's filesystem refuses direct I/O: save with direct I/O `auto` or `never`")]
    Direct {
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// A thread can't be started.
    #[error("can't start the pages file's writer thread")]
    Thread {
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// The range to save doesn't start at a page.
    #[error("range {range} doesn't start at a page")]
    Unaligned {
        /// The range.
        range: FileRange,
    },
    /// The file is shorter than the range to save; it has shrunk, or never was that long.
    #[error(
        "the file ends at or before offset {offset:#x}, inside the range {range} to save: was it truncated meanwhile?"
    )]
    Truncated {
        /// The range.
        range: FileRange,
        /// An offset in the file that isn't there.
        offset: u64,
    },
    /// Contents of the file can't be read.
    #[error("can't read the file to save at offset {offset:#x}")]
    Read {
        /// Offset in the file.
        offset: u64,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// The file can't be mapped.
    #[error("can't map {length} bytes of the file to save at offset {offset:#x}")]
    Map {
        /// Offset in the file.
        offset: u64,
        /// Bytes of the mapping.
        length: u64,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// No memory for buffers.
    #[error("can't allocate a buffer of {length} bytes")]
    Buffer {
        /// Its length.
        length: usize,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// The pages file can't grow.
    #[error("can't extend the pages file to {length} bytes")]
    Extend {
        /// The length it was to get.
        length: u64,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// The pages file can't be written.
    #[error("can't write the pages file at offset {offset}")]
    Write {
        /// Offset in the pages file.
        offset: PagesOffset,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// What was written can't be read to be moved.
    #[error("can't read the pages file at offset {offset}, to make it smaller")]
    ReadBack {
        /// Offset in the pages file.
        offset: PagesOffset,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// The pages file's writes can't be waited for.
    #[error("can't wait for the pages file's writes")]
    Ring {
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// The pages file can't be made durable.
    #[error("can't sync the pages file of {length} bytes")]
    Sync {
        /// Its length.
        length: u64,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// The main MemoryFile can't be saved as a whole, only range by range.
    #[error("the main MemoryFile is saved range by range, not as a whole")]
    MainMemoryFile,
    /// It was told to end.
    #[error("the save was cancelled")]
    Cancelled,
}

impl SaveError {
    /// Whether the pages file is at fault, and not the file whose pages were to be saved when that was found out.
    pub fn is_of_pages_file(&self) -> bool {
        match self {
            Self::NotEmpty { .. }
            | Self::Direct { .. }
            | Self::Extend { .. }
            | Self::Write { .. }
            | Self::ReadBack { .. }
            | Self::Ring { .. }
            | Self::Sync { .. } => true,
            Self::Examine { .. }
            | Self::Thread { .. }
            | Self::Unaligned { .. }
            | Self::Truncated { .. }
            | Self::Read { .. }
            | Self::Map { .. }
            | Self::Buffer { .. }
            | Self::MainMemoryFile
            | Self::Cancelled => false,
        }
    }
}
