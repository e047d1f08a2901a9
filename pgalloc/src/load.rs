//! Loading pages from the pages file.

mod error;

use std::fs::File;
use std::io;
use std::sync::Arc;

pub use error::LoadError;

use crate::digest::DigestTable;
use crate::page::PageExtent;

/// How the pages file is loaded.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Loader threads, at least one.
    pub threads: usize,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { threads: 2 }
    }
}

/// What was loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadSummary {
    /// Bytes written to files.
    pub bytes: u64,
    /// Files that got all of their contents.
    pub files: u64,
}

/// What to do when a file is loaded.
pub type OnLoaded = Box<dyn FnOnce(&File) -> io::Result<()> + Send>;

/// A file to load.
pub struct LoadTarget {
    /// The file, open for writing, of its final size, without contents.
    pub file: Arc<File>,
    /// Its contents.
    pub extents: Vec<PageExtent>,
    /// Runs on a loader thread once the last byte has been written; dropped without being run when loading fails.
    pub on_loaded: Option<OnLoaded>,
}

/// The load of one pages file: owns the file and its loader threads.
pub struct AsyncPagesFileLoad {}

impl AsyncPagesFileLoad {
    /// Loads from `pages_file`, which must be as long as `digests` say.
    ///
    /// # Errors
    ///
    /// It isn't; or no thread or memory is to be had.
    pub fn new(_pages_file: File, _digests: DigestTable, _options: LoadOptions) -> Result<Self, LoadError> {
        todo!()
    }

    /// Enqueues files to load, behind those enqueued before; waits while the queue is full.
    ///
    /// # Errors
    ///
    /// The first error of the load.
    pub fn load_ranges_into(&self, _targets: Vec<LoadTarget>) -> Result<(), LoadError> {
        todo!()
    }

    /// Enqueues files to load before all others that are not yet being loaded; doesn't wait.
    ///
    /// # Errors
    ///
    /// The first error of the load.
    pub fn load_ranges_next(&self, _targets: Vec<LoadTarget>) -> Result<(), LoadError> {
        todo!()
    }

    /// Waits until everything is loaded.
    ///
    /// # Errors
    ///
    /// The first error of the load.
    pub fn finish(self) -> Result<LoadSummary, LoadError> {
        todo!()
    }
}
