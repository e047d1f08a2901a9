//! How loading fails. The first failure of an [`AsyncPagesFileLoad`](crate::AsyncPagesFileLoad) is final: it is what
//! every later call on it returns, so the errors can be cloned.

use std::io;
use std::sync::Arc;

use crate::digest::DigestError;
use crate::page::{ExtentError, PagesOffset};

/// Why pages were not loaded.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LoadError {
    /// The pages file isn't as long as it was when it was saved.
    #[error("the pages file has {actual} bytes, but was saved with {expected}")]
    Length {
        /// Its length when it was saved.
        expected: u64,
        /// Its length now.
        actual: u64,
    },
    /// The pages file can't be examined.
    #[error("can't examine the pages file")]
    Examine {
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// A thread can't be started.
    #[error("can't start a loader thread")]
    Thread {
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
    /// Extents that can't be those of a file.
    #[error("a file's extents are invalid")]
    Extent(#[from] ExtentError),
    /// The pages file's contents are not those that were saved.
    #[error("the pages file is damaged at offset {offset}")]
    Digest {
        /// The damaged chunk's offset in the pages file.
        offset: PagesOffset,
        /// What is wrong with it.
        #[source]
        source: DigestError,
    },
    /// The pages file can't be read.
    #[error("can't read the pages file at offset {offset}")]
    Read {
        /// Offset in the pages file.
        offset: PagesOffset,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// A file of a batch can't be opened, or given its size.
    #[error("can't open a file to load")]
    Open {
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// A file can't be written.
    #[error("can't write pages {pages_offset} to offset {offset:#x} of their file")]
    Write {
        /// Offset in the file.
        offset: u64,
        /// Where the contents are in the pages file.
        pages_offset: PagesOffset,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// A private MemoryFile can't be given its size.
    #[error("can't set the MemoryFile's size to {size}")]
    Resize {
        /// The size.
        size: u64,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// What was to be done with a loaded file failed.
    #[error("can't finish a loaded file")]
    OnLoaded {
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// A loader thread panicked, in what was to be done with a loaded file.
    #[error("a loader thread panicked")]
    Panicked,
    /// The main MemoryFile can't be loaded as a whole, only range by range.
    #[error("the main MemoryFile is loaded range by range, not as a whole")]
    MainMemoryFile,
}

impl LoadError {
    /// What was read from `start` on isn't what was saved.
    pub(crate) fn damaged(start: u64, source: DigestError) -> Self {
        let offset = match source {
            DigestError::Mismatch { offset, .. } => offset,
            DigestError::Count { .. } | DigestError::NoChunk { .. } => start,
        };
        Self::Digest { offset: PagesOffset(offset), source }
    }
}
