//! Files that are being saved before they are loaded: their contents are taken from the image that they are loaded from, and
//! nobody opens them, since that would be to wait for them.
//!
//! Names and attributes come from the filesystem, where they may have been changed already. Who loads is asked for each
//! file ([`Load::standing`]), always *after* its attributes were looked at: a file only ever becomes loaded, so one that is unloaded
//! then was so all the while, and nobody has written to it. That it is loaded afterwards changes nothing of its contents; what
//! is done to it from then on is seen like any other change, so a filesystem that is in use must be watched from before the
//! first file is asked for.
//!
//! What its loading is doing to a file's attributes meanwhile isn't saved ([`Standing::Changing`]).

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use stillframe_pgalloc::{AsyncMemoryFileSave, LoadError, PageExtent, PagesOffset, SaveError, VerifiedPages};

use super::{CAPABILITY, PendingFile};
use crate::entry::{Timestamp, Xattr};
use crate::stat::Stat;
use crate::sys::handle::FileHandle;

/// Bytes that are read at once.
const PIECE: u64 = 1 << 20;

/// Where a file stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is complete, and can be opened.
    Loaded,
    /// Nothing of it was touched, or nothing that can be seen.
    Unloaded,
    /// It is being written to, or was: its attributes may be those of that writing, and this is its time of last modification,
    /// if it isn't the saved one.
    Changing(Option<(i64, u32)>),
}

/// Who loads the files.
pub trait Load: fmt::Debug + Send + Sync {
    /// Where file `index` of those that were given to [`Unloaded::new`] stands now.
    fn standing(&self, index: usize) -> io::Result<Standing>;

    /// Whether `process` is one of those that load: what it writes is what the files are to be.
    fn is_loader(&self, process: i32) -> bool;
}

/// Why an unloaded file can't be saved.
#[derive(Debug, thiserror::Error)]
pub enum UnloadedError {
    /// What it is to be can't be read.
    #[error("read {path}")]
    Pages {
        /// The pages file.
        path: PathBuf,
        /// Why.
        #[source]
        source: LoadError,
    },
    /// Its size has changed, which only a broken lease lets happen.
    #[error("it was truncated before it was loaded")]
    Truncated,
    /// It can't be told whether it is loaded.
    #[error("ask how far loading has come")]
    Ask(#[source] io::Error),
}

/// The files of a filesystem that may not be loaded yet; see the module.
#[derive(Debug)]
pub struct Unloaded {
    files: Vec<PendingFile>,
    by_handle: HashMap<FileHandle, usize>,
    pages: Mutex<VerifiedPages>,
    pages_path: PathBuf,
    load: Box<dyn Load>,
}

/// A file that isn't loaded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UnloadedFile<'a> {
    all: &'a Unloaded,
    file: &'a PendingFile,
}

impl Unloaded {
    /// `files` are loaded from `pages`, which is, or was, at `pages_path`.
    pub fn new(
        files: Vec<PendingFile>,
        pages: VerifiedPages,
        pages_path: PathBuf,
        load: Box<dyn Load>,
    ) -> Self {
        let by_handle = files.iter().enumerate().map(|(index, file)| (file.handle, index)).collect();
        Self { files, by_handle, pages: Mutex::new(pages), pages_path, load }
    }

    /// Whether the inode ever was one of them.
    pub(crate) fn knows(&self, handle: &FileHandle) -> bool {
        self.by_handle.contains_key(handle)
    }

    /// Whether the inode, one of them, is loaded now.
    pub(crate) fn is_loaded(&self, handle: &FileHandle) -> io::Result<bool> {
        let index = self.by_handle.get(handle);
        index.map_or(Ok(true), |index| Ok(self.load.standing(*index)? == Standing::Loaded))
    }

    pub(crate) fn is_loader(&self, process: i32) -> bool {
        self.load.is_loader(process)
    }

    /// The file that `path`, a descriptor with O_PATH of a regular file, has open, with its attributes; `None` if it is loaded.
    pub(crate) fn find<'a>(
        &'a self,
        path: &File,
        stat: &mut Stat,
        xattrs: &mut Vec<Xattr>,
    ) -> io::Result<Option<UnloadedFile<'a>>> {
        let handle = FileHandle::of(path.as_fd())?;
        self.find_handle(&handle, stat, xattrs)
    }

    /// The same by its handle.
    pub(crate) fn find_handle<'a>(
        &'a self,
        handle: &FileHandle,
        stat: &mut Stat,
        xattrs: &mut Vec<Xattr>,
    ) -> io::Result<Option<UnloadedFile<'a>>> {
        let Some(index) = self.by_handle.get(handle).copied() else { return Ok(None) };
        let file = &self.files[index];
        match self.load.standing(index)? {
            Standing::Loaded => return Ok(None),
            Standing::Unloaded => {}
            Standing::Changing(mtime) => {
                let (sec, nsec) = mtime.unwrap_or(file.mtime);
                stat.mtime = Timestamp { sec, nsec };
                stat.flags = file.flags;
                if let Some(value) = &file.capability
                    && !xattrs.iter().any(|xattr| xattr.name == CAPABILITY)
                {
                    xattrs.push(Xattr { name: CAPABILITY.to_vec(), value: value.clone() });
                    xattrs.sort();
                }
                // It has only a name, an owner and a mode, and nobody else has it yet.
                if let Some(small) = &file.small {
                    stat.size = file.size;
                    stat.atime = Timestamp { sec: small.atime.0, nsec: small.atime.1 };
                    xattrs.clone_from(&small.xattrs);
                }
            }
        }
        Ok(Some(UnloadedFile { all: self, file }))
    }
}

impl UnloadedFile<'_> {
    /// It has the size that it was made with.
    pub(crate) fn check(&self, size: u64) -> Result<(), UnloadedError> {
        if size == self.file.size { Ok(()) } else { Err(UnloadedError::Truncated) }
    }

    /// The first range of data at or behind `position`, as far as the file's extents are apart.
    pub(crate) fn data(&self, position: u64) -> Option<(u64, u64)> {
        let extents = &self.file.extents;
        let next = extents.partition_point(|(offset, length, _)| offset + length <= position);
        extents.get(next).map(|(offset, length, _)| ((*offset).max(position), offset + length))
    }

    /// Fills `bytes` from `position` on, holes with zeros.
    pub(crate) fn read(&self, position: u64, bytes: &mut [u8]) -> Result<(), UnloadedError> {
        bytes.fill(0);
        let end = position + bytes.len() as u64;
        let mut at = position;
        let mut pages = self.all.pages.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((start, data_end)) = self.data(at).filter(|(start, _)| *start < end) {
            let data_end = data_end.min(end);
            let extents = &self.file.extents;
            let extent = extents.partition_point(|(offset, length, _)| offset + length <= start);
            let (offset, _, pages_offset) = extents[extent];
            let into = &mut bytes[(start - position) as usize..(data_end - position) as usize];
            pages
                .read(PagesOffset(pages_offset + (start - offset)), into)
                .map_err(|source| UnloadedError::Pages { path: self.all.pages_path.clone(), source })?;
            at = data_end;
        }
        Ok(())
    }

    /// Has all of it saved.
    pub(crate) fn save(
        &self,
        memory: &AsyncMemoryFileSave<'_>,
    ) -> Result<Vec<PageExtent>, SaveUnloadedError> {
        let mut saved: Vec<PageExtent> = Vec::new();
        let (mut position, mut buffer) = (0, Vec::new());
        while let Some((start, end)) = self.data(position) {
            let end = end.min((start + 1).next_multiple_of(PIECE));
            buffer.resize((end - start) as usize, 0);
            self.read(start, &mut buffer)?;
            let written = memory.write_pages(&[(start, &buffer[..])])?;
            for extent in written {
                match saved.last_mut() {
                    Some(last)
                        if last.file_offset + last.length == extent.file_offset
                            && last.pages_offset.0 + last.length == extent.pages_offset.0 =>
                    {
                        last.length += extent.length;
                    }
                    _ => saved.push(extent),
                }
            }
            position = end;
        }
        Ok(saved)
    }
}

/// Why an unloaded file's pages weren't saved.
#[derive(Debug)]
pub(crate) enum SaveUnloadedError {
    Unloaded(UnloadedError),
    Pages(SaveError),
}

impl From<UnloadedError> for SaveUnloadedError {
    fn from(error: UnloadedError) -> Self {
        Self::Unloaded(error)
    }
}

impl From<SaveError> for SaveUnloadedError {
    fn from(error: SaveError) -> Self {
        Self::Pages(error)
    }
}
