//! Files that have their names, sizes and attributes already, and get their contents later. (Small ones have neither sizes nor times
//! yet, and are loaded all together before anybody gets at them: [`SmallFiles`].)
//!
//! ```text
//! build_names -> PendingFile -> (gate closed) -> Loading::begin -> contents -> Loading::complete -> (gate opened)
//! ```
//!
//! A pending file is found by its handle: whatever happens to its name, it is the same inode. Its contents are sparse, so
//! nobody may read them: either nobody can reach the filesystem yet, or a [`gate::Gate`] holds the file.
//!
//! Loading writes to the file, which changes its mtime and drops `security.capability`. Both are put back as they were just
//! before, since the container may have changed them while the file was pending. What the container sets by
//! utimensat(2) between that and the first write is lost.

pub mod gate;
mod room;
pub mod unloaded;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, OFlags, Timespec, Timestamps};
use serde::{Deserialize, Serialize};
use stillframe_pgalloc::{AsyncPagesFileLoad, FileBatch, LoadError, LoadTarget, PageExtent, PagesOffset};

use crate::entry::{Attributes, Xattr};
pub use crate::huge::{HugePages, SmallPages};
pub use crate::small::SmallFiles;
use crate::small::{BATCH_BYTES, BATCH_FILES, SmallFile, set_flags};
use crate::sys::descriptor;
use crate::sys::handle::FileHandle;
use crate::xattr::{self, Inode};
pub use room::Room;

const CAPABILITY: &[u8] = b"security.capability";

/// A file without its contents.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PendingFile {
    handle: FileHandle,
    /// Number of its inode.
    pub inode: u64,
    /// Number of the directory that has its first name, to tell which files are together.
    pub directory: u64,
    /// Size in bytes.
    pub size: u64,
    /// Offset in the file, length, offset in the pages file, of each range of data.
    extents: Vec<(u64, u64, u64)>,
    mtime: (i64, u32),
    capability: Option<Vec<u8>>,
    /// Inode flags to set when its contents are there.
    flags: u32,
    /// What else a small file gets when it is loaded, besides its size.
    #[serde(skip)]
    small: Option<Small>,
}

/// See [`PendingFile::small`].
#[derive(Clone, Debug)]
struct Small {
    atime: (i64, u32),
    xattrs: Vec<Xattr>,
}

impl PendingFile {
    pub(crate) fn new(
        file: &File,
        directory: usize,
        size: u64,
        extents: &[PageExtent],
        attributes: &Attributes,
    ) -> io::Result<Self> {
        Ok(Self {
            handle: FileHandle::of(file.as_fd())?,
            inode: rustix::fs::fstat(file)?.st_ino,
            directory: directory as u64,
            size,
            extents: extents.iter().map(|e| (e.file_offset, e.length, e.pages_offset.0)).collect(),
            mtime: (attributes.mtime.sec, attributes.mtime.nsec),
            capability: attributes
                .xattrs
                .iter()
                .find(|xattr| xattr.name == CAPABILITY)
                .map(|xattr| xattr.value.clone()),
            flags: attributes.flags,
            small: None,
        })
    }

    /// A small one, which is in the directory that is open as `on`.
    pub(crate) fn small(file: &SmallFile, on: &File, directory: u64) -> io::Result<Self> {
        let xattrs = file.xattrs();
        let capability = xattrs.iter().find(|xattr| xattr.name == CAPABILITY);
        Ok(Self {
            handle: FileHandle::of_name(on.as_fd(), file.name())?,
            inode: rustix::fs::statat(on, file.name(), AtFlags::SYMLINK_NOFOLLOW)?.st_ino,
            directory,
            size: file.size(),
            extents: file.extents().iter().map(|e| (e.file_offset, e.length, e.pages_offset.0)).collect(),
            mtime: file.times().1,
            capability: capability.map(|xattr| xattr.value.clone()),
            flags: file.flags(),
            small: Some(Small { atime: file.times().0, xattrs }),
        })
    }

    /// Where its contents are.
    pub fn extents(&self) -> Vec<PageExtent> {
        let extent = |&(file_offset, length, offset): &(u64, u64, u64)| PageExtent {
            file_offset,
            length,
            pages_offset: PagesOffset(offset),
        };
        self.extents.iter().map(extent).collect()
    }

    /// Bytes of its contents.
    pub fn bytes(&self) -> u64 {
        self.extents.iter().map(|(_, length, _)| length).sum()
    }

    /// Whether it can be opened before it is loaded: not if it has inode flags, which can be set only afterwards.
    pub fn may_be_gated(&self) -> bool {
        self.flags == 0
    }

    /// Opens it for reading and writing; `on` is open on a writable mount of its filesystem.
    pub fn open(&self, on: &File) -> io::Result<File> {
        self.handle.open(on.as_fd(), OFlags::RDWR)
    }

    /// Opens it without being able to read or write it, so that nobody notices.
    pub fn open_path(&self, on: &File) -> io::Result<File> {
        self.handle.open(on.as_fd(), OFlags::PATH)
    }
}

/// What loading a file changes of it and has to be put back.
#[derive(Debug)]
pub struct Loading {
    mtime: (i64, i64),
    capability: Option<Xattr>,
    flags: u32,
}

impl Loading {
    /// Just before the first byte is written to `file`.
    pub fn begin(pending: &PendingFile, file: &File) -> io::Result<Self> {
        let stat = rustix::fs::fstat(file)?;
        let mut begun = Self::again(pending);
        begun.mtime = (stat.st_mtime, stat.st_mtime_nsec as i64);
        if begun.capability.is_some() {
            let xattrs = xattr::read(&Inode::Open(file))?;
            begun.capability = xattrs.into_iter().find(|xattr| xattr.name == CAPABILITY);
        }
        Ok(begun)
    }

    /// What its time of last modification was.
    pub fn mtime(&self) -> (i64, u32) {
        (self.mtime.0, self.mtime.1 as u32)
    }

    /// The same, but with this time of last modification, if one is known.
    pub fn with_mtime(self, mtime: Option<(i64, u32)>) -> Self {
        let mtime = mtime.map_or(self.mtime, |(seconds, nanoseconds)| (seconds, nanoseconds.into()));
        Self { mtime, ..self }
    }

    /// After a loader has died that may have written to it: as it was saved.
    pub fn again(pending: &PendingFile) -> Self {
        let capability = pending.capability.clone().map(|value| Xattr { name: CAPABILITY.to_vec(), value });
        Self { mtime: (pending.mtime.0, pending.mtime.1.into()), capability, flags: pending.flags }
    }

    /// When the last byte is written.
    pub fn complete(self, file: &File) -> io::Result<()> {
        xattr::write(&Inode::Open(file), self.capability.as_slice())?;
        let (tv_sec, tv_nsec) = self.mtime;
        let last_access = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
        let last_modification = Timespec { tv_sec, tv_nsec };
        rustix::fs::futimens(file, &Timestamps { last_access, last_modification })?;
        if self.flags != 0 {
            set_flags(file, self.flags)?;
        }
        Ok(())
    }
}

/// Has `files` loaded which nobody can reach yet; `on` is open on a writable mount of their filesystem. Those that wait for their
/// turn have no descriptor, but for the few large ones in the loader's queue.
///
/// # Errors
///
/// One can't be opened, or the load has failed.
pub fn load_ungated<'a>(
    files: impl Iterator<Item = &'a PendingFile>,
    on: &File,
    loader: &AsyncPagesFileLoad,
) -> Result<(), LoadError> {
    let failed = |source| LoadError::Open { source: Arc::new(source) };
    let on = Arc::new(on.try_clone().map_err(failed)?);
    let mut batch = Ungated { on: on.clone(), files: Vec::new(), bytes: 0 };
    for pending in files {
        if pending.bytes() >= BATCH_BYTES {
            // Several threads can load it.
            let begun = Loading::again(pending);
            loader.load_ranges_into(vec![LoadTarget {
                on_loaded: Some(Box::new(move |file| begun.complete(file))),
                ..LoadTarget::new(Arc::new(pending.open(&on).map_err(failed)?), pending.extents())
            }])?;
            continue;
        }
        batch.bytes += pending.bytes();
        batch.files.push((pending.clone(), pending.extents()));
        if batch.bytes >= BATCH_BYTES || batch.files.len() >= BATCH_FILES {
            let next = Ungated { on: on.clone(), files: Vec::new(), bytes: 0 };
            loader.load_batch(Box::new(std::mem::replace(&mut batch, next)))?;
        }
    }
    if batch.is_empty() { Ok(()) } else { loader.load_batch(Box::new(batch)) }
}

/// Files of a batch with their contents' places.
struct Ungated {
    on: Arc<File>,
    files: Vec<(PendingFile, Vec<PageExtent>)>,
    bytes: u64,
}

impl FileBatch for Ungated {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn extents(&self, index: usize) -> &[PageExtent] {
        &self.files[index].1
    }

    fn open(&mut self, index: usize) -> io::Result<File> {
        self.files[index].0.open(&self.on)
    }

    fn loaded(&mut self, index: usize, file: &File) -> io::Result<()> {
        // Nobody has it yet: it is as it was saved.
        Loading::again(&self.files[index].0).complete(file)
    }
}

/// Takes descriptor `fd`, which this program was executed with. Each number may be asked for once.
pub fn inherit(fd: RawFd) -> io::Result<OwnedFd> {
    descriptor::inherit(fd)
}
