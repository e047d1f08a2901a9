//! MemoryFiles: where the pages of filesystems live.
//!
//! The *main* one is the host's shared memory. A tmpfs's pages lie there among all other memory, so it can't be saved
//! as a whole: exactly the ranges that a filesystem's regular files own are saved, and loaded into fresh pages.
//! A *private* one is a host file that holds all of one disk-backed filesystem; it is saved and loaded verbatim, page
//! by page at its own offsets, and only its caller knows what is in it.

use std::fs::File;
use std::sync::Arc;

use crate::load::{AsyncPagesFileLoad, LoadError, LoadTarget};
use crate::meta::PrivateMemoryFileMeta;
use crate::page::{FileRange, validate_extents};
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

    /// Saves a private MemoryFile verbatim: its size and its data; its holes and zero pages become holes.
    ///
    /// It must be still until the save is finished, as for
    /// [`write_range`](crate::AsyncMemoryFileSave::write_range). The index of what is returned is 0: the caller
    /// numbers its MemoryFiles.
    ///
    /// # Errors
    ///
    /// This is the main one; or the first error of the save.
    pub fn save_to(&self, pages: &AsyncPagesFileSave) -> Result<PrivateMemoryFileMeta, SaveError> {
        let file = self.private.as_ref().ok_or(SaveError::MainMemoryFile)?;
        let size = file.metadata().map_err(|source| SaveError::Examine { source: Arc::new(source) })?.len();
        let range = FileRange::new(0, size).expect("no file is larger than files get");
        let extents = pages.register_memory_file(self)?.write_range(file, range)?;
        Ok(PrivateMemoryFileMeta { index: 0, size, extents })
    }

    /// Empties a private MemoryFile, gives it its size and enqueues its contents to be loaded at their own offsets.
    ///
    /// They are loaded when `finish` of `pages` has returned.
    ///
    /// # Errors
    ///
    /// This is the main one, or `meta` is invalid (nothing has been changed then), the file can't be resized; or the
    /// first error of the load.
    pub fn load_from(
        &self,
        pages: &AsyncPagesFileLoad,
        meta: &PrivateMemoryFileMeta,
    ) -> Result<(), LoadError> {
        let file = self.private.as_ref().ok_or(LoadError::MainMemoryFile)?;
        let size = meta.size;
        validate_extents(&meta.extents, size, pages.pages_length())?;
        file.set_len(0)
            .and_then(|()| file.set_len(size))
            .map_err(|source| LoadError::Resize { size, source: Arc::new(source) })?;
        let extents = meta.extents.clone();
        pages.load_ranges_into(vec![LoadTarget::new(file.clone(), extents)])
    }
}
