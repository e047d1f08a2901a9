//! MemoryFiles: where the pages of filesystems live.

use std::fs::File;
use std::sync::Arc;

use crate::load::{AsyncPagesFileLoad, LoadError};
use crate::meta::PrivateMemoryFileMeta;
use crate::save::{AsyncPagesFileSave, SaveError};

/// A MemoryFile, main or private.
#[derive(Clone, Debug)]
pub struct MemoryFile {
    /// The host file of a private MemoryFile.
    private: Option<Arc<File>>,
}

impl MemoryFile {
    /// The host's shared memory, whose files are given range by range.
    pub fn main() -> Self {
        Self { private: None }
    }

    /// A host file that holds all of one disk-backed filesystem.
    pub fn private(file: File) -> Self {
        Self { private: Some(Arc::new(file)) }
    }

    /// Saves a private MemoryFile verbatim.
    ///
    /// # Errors
    ///
    /// This is the main one; or the first error of the save.
    pub fn save_to(&self, _pages: &AsyncPagesFileSave) -> Result<PrivateMemoryFileMeta, SaveError> {
        let _ = &self.private;
        todo!()
    }

    /// Enqueues a private MemoryFile's contents to be loaded verbatim.
    ///
    /// # Errors
    ///
    /// This is the main one; or the first error of the load.
    pub fn load_from(
        &self,
        _pages: &AsyncPagesFileLoad,
        _meta: &PrivateMemoryFileMeta,
    ) -> Result<(), LoadError> {
        todo!()
    }
}
