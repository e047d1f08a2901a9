//! Saving pages to the pages file.

mod error;

use std::fs::File;
use std::marker::PhantomData;
use std::sync::Arc;

pub use error::SaveError;

use crate::Direct;
use crate::digest::DigestTable;
use crate::memory_file::MemoryFile;
use crate::page::{FileRange, PageExtent};

/// How the pages file is written.
#[derive(Clone, Debug, Default)]
pub struct SaveOptions {
    /// Whether past the page cache.
    pub direct: Direct,
}

/// What was saved.
#[derive(Clone, Debug)]
pub struct PagesFileSummary {
    /// Length of the pages file in bytes, a multiple of the page size.
    pub length: u64,
    /// The digests of its chunks.
    pub digests: DigestTable,
    /// Bytes that were read, found to be zero and not saved. Holes are not read and don't count.
    pub zero_bytes: u64,
    /// Bytes that were saved: whole pages, so this is the length.
    pub data_bytes: u64,
}

/// The save of one pages file: owns the file and its writer thread.
pub struct AsyncPagesFileSave {}

/// The save of a MemoryFile's files to a pages file.
pub struct AsyncMemoryFileSave<'a> {
    pages: PhantomData<&'a AsyncPagesFileSave>,
}

impl AsyncPagesFileSave {
    /// Saves to `pages_file`, which is open for reading and writing and empty.
    ///
    /// # Errors
    ///
    /// The file isn't empty, direct I/O was demanded and is refused, or no thread or memory is to be had.
    pub fn new(_pages_file: File, _options: SaveOptions) -> Result<Self, SaveError> {
        todo!()
    }

    /// Begins to save the files of `memory_file`.
    ///
    /// # Errors
    ///
    /// The save has failed before.
    pub fn register_memory_file(
        &self,
        _memory_file: &MemoryFile,
    ) -> Result<AsyncMemoryFileSave<'_>, SaveError> {
        todo!()
    }

    /// Waits for all writes, sets the pages file's length, makes it durable.
    ///
    /// # Errors
    ///
    /// The first error of the save.
    pub fn finish(self) -> Result<PagesFileSummary, SaveError> {
        todo!()
    }
}

impl AsyncMemoryFileSave<'_> {
    /// Saves `range` of `source`.
    ///
    /// # Errors
    ///
    /// The first error of the save.
    pub fn write_range(&self, _source: &Arc<File>, _range: FileRange) -> Result<Vec<PageExtent>, SaveError> {
        todo!()
    }

    /// Saves `range` of `source`, which may be written to and truncated meanwhile: contents are read once, into
    /// buffers; what lies behind the end of the file when it is read has no extents.
    ///
    /// # Errors
    ///
    /// The first error of the save.
    pub fn write_live_range(
        &self,
        _source: &Arc<File>,
        _range: FileRange,
    ) -> Result<Vec<PageExtent>, SaveError> {
        todo!()
    }
}
