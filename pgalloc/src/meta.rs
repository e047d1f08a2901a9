//! The pages metadata, `pages.meta`.

use crate::digest::DigestTable;
use crate::page::{ExtentError, PageExtent};

/// A private MemoryFile in the pages file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrivateMemoryFileMeta {
    /// The number by which the rest of the image calls it; the caller's to choose.
    pub index: u32,
    /// The file's size in bytes.
    pub size: u64,
    /// Its contents.
    pub extents: Vec<PageExtent>,
}

/// All there is to know of a pages file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PagesMeta {
    /// Length of the pages file in bytes.
    pub pages_length: u64,
    /// The digests of its chunks.
    pub digests: DigestTable,
    /// The private MemoryFiles in it.
    pub private: Vec<PrivateMemoryFileMeta>,
}

/// Why bytes are no pages metadata.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetaError {
    /// A private MemoryFile's extents can't be.
    #[error("private MemoryFile {index}: invalid extents")]
    Extents {
        /// Its index.
        index: u32,
        /// What is wrong with them.
        #[source]
        source: ExtentError,
    },
}

impl PagesMeta {
    /// The bytes of the metadata.
    pub fn encode(&self) -> Vec<u8> {
        todo!()
    }

    /// The metadata in `bytes`.
    ///
    /// # Errors
    ///
    /// `bytes` are no valid metadata.
    pub fn decode(_bytes: &[u8]) -> Result<Self, MetaError> {
        todo!()
    }
}
