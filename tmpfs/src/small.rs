//! Small files: their names, owners and modes are made without opening them, the rest comes when they are loaded.
//!
//! Opening and closing a file takes longer than writing a page to it, so it is done once: whoever loads a file opens it by its
//! name in its directory, writes its contents, and sets what writing would have changed. (Where contents come at once, one
//! call makes and opens it.) So names must still be what they
//! were made as: nobody else may reach the filesystem between that and the end of loading. Until then a small file
//! is empty.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use stillframe_pgalloc::{AsyncPagesFileLoad, FileBatch, LoadError, PageExtent, PagesOffset};

use crate::build::attributes::times;
use crate::entry::{Attributes, KEPT_FLAGS, Timestamp, Xattr};
use crate::lazy::PendingFile;
use crate::sys::handle::FileHandle;
use crate::xattr::{self, Inode};

/// Files are given to the loader in batches of at most this many (whose directories are open) ...
pub(crate) const BATCH_FILES: usize = 128;
/// ... and of at most this many bytes, but for a file that alone has more.
pub(crate) const BATCH_BYTES: u64 = 1024 * 1024;
/// Size of the smallest folio of several pages, four of 4 KiB; smaller files have pages of the usual size only.
const SMALLEST_LARGE_FOLIO: u64 = 16 * 1024;

/// Whether a file has to be given its size before its contents. Writing the end sets the size too. Where a larger page might be
/// allocated the size comes first: with huge=within_size it decides about that (`shmem_huge_global_enabled`).
pub(crate) fn size_comes_first(size: u64, extents: &[PageExtent]) -> bool {
    let written = extents.last().and_then(PageExtent::file_end).unwrap_or(0);
    size != written || size >= SMALLEST_LARGE_FOLIO
}

/// A small file that is to be loaded.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SmallFile {
    name: Vec<u8>,
    size: u64,
    #[serde(with = "Extent")]
    extents: Vec<PageExtent>,
    mtime: (i64, u32),
    atime: (i64, u32),
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Inode flags to set when its contents are there.
    flags: u32,
}

impl SmallFile {
    /// `attributes` have the host's ids; `flags` are those to set when it is loaded.
    pub(crate) fn new(
        name: &[u8],
        size: u64,
        extents: &[PageExtent],
        attributes: Attributes,
        flags: u32,
    ) -> Self {
        let time = |time: Timestamp| (time.sec, time.nsec);
        let (mtime, atime) = (time(attributes.mtime), time(attributes.atime));
        let xattrs = attributes.xattrs.into_iter().map(|xattr| (xattr.name, xattr.value)).collect();
        Self { name: name.to_vec(), size, extents: extents.to_vec(), mtime, atime, xattrs, flags }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.length).sum()
    }

    fn open(&self, directory: &File) -> io::Result<File> {
        // NONBLOCK: nobody has put a fifo there, and if somebody has, nobody waits for its reader.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let open = |access| rustix::fs::openat(directory, self.name(), flags | access, Mode::empty());
        let file = match open(OFlags::WRONLY) {
            // Loaded before, by a process that has died since: it may be immutable already.
            Err(Errno::PERM) if self.flags != 0 => {
                set_flags(&File::from(open(OFlags::RDONLY)?), 0)?;
                open(OFlags::WRONLY)?
            }
            other => other?,
        };
        let file = File::from(file);
        self.set_size(&file)?;
        Ok(file)
    }

    /// Before its contents, where that matters.
    pub(crate) fn set_size(&self, file: &File) -> io::Result<()> {
        let first = size_comes_first(self.size, &self.extents);
        if first { Ok(rustix::fs::ftruncate(file, self.size)?) } else { Ok(()) }
    }

    pub(crate) fn name(&self) -> &[u8] {
        &self.name
    }

    pub(crate) fn extents(&self) -> &[PageExtent] {
        &self.extents
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn flags(&self) -> u32 {
        self.flags
    }

    /// Of the last access, and of the last modification.
    pub(crate) fn times(&self) -> ((i64, u32), (i64, u32)) {
        (self.atime, self.mtime)
    }

    pub(crate) fn xattrs(&self) -> Vec<Xattr> {
        let xattr = |(name, value): &(Vec<u8>, Vec<u8>)| Xattr { name: name.clone(), value: value.clone() };
        self.xattrs.iter().map(xattr).collect()
    }

    /// Xattrs after the contents, since writing drops `security.capability`; times after both; flags last.
    pub(crate) fn complete(&self, file: &File) -> io::Result<()> {
        xattr::write(&Inode::Open(file), &self.xattrs())?;
        let time = |(sec, nsec): (i64, u32)| Timestamp { sec, nsec };
        rustix::fs::futimens(file, &times(time(self.atime), time(self.mtime)))?;
        if self.flags != 0 {
            set_flags(file, self.flags)?;
        }
        Ok(())
    }
}

/// Sets inode flags. Others are the filesystem's own: ext4 would convert a file that loses its extents flag.
pub(crate) fn set_flags(file: &File, flags: u32) -> io::Result<()> {
    let own = rustix::fs::ioctl_getflags(file)?.bits() & !KEPT_FLAGS;
    Ok(rustix::fs::ioctl_setflags(file, rustix::fs::IFlags::from_bits_retain(own | flags))?)
}

/// A page extent as three numbers: offset in the file, length, offset in the pages file.
struct Extent;

impl Extent {
    fn serialize<S: serde::Serializer>(extents: &[PageExtent], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(extents.iter().map(|e| (e.file_offset, e.length, e.pages_offset.0)))
    }

    fn deserialize<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<PageExtent>, D::Error> {
        let numbers = Vec::<(u64, u64, u64)>::deserialize(from)?;
        let extent = |(file_offset, length, offset)| PageExtent {
            file_offset,
            length,
            pages_offset: PagesOffset(offset),
        };
        Ok(numbers.into_iter().map(extent).collect())
    }
}

/// Small files of a filesystem that are to be loaded.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SmallFiles {
    directories: Vec<(FileHandle, Vec<SmallFile>)>,
}

impl SmallFiles {
    pub(crate) fn new(directories: Vec<(FileHandle, Vec<SmallFile>)>) -> Self {
        Self { directories }
    }

    fn files(&self) -> impl Iterator<Item = &SmallFile> {
        self.directories.iter().flat_map(|(_, files)| files)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.directories.iter().map(|(_, files)| files.len()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.directories.is_empty()
    }

    /// Bytes of their contents.
    pub fn bytes(&self) -> u64 {
        self.files().map(SmallFile::bytes).sum()
    }

    /// Each with what it is to be, found by its name; `on` is open on a mount of their filesystem.
    ///
    /// # Errors
    ///
    /// One isn't where it was made.
    pub fn pending(&self, on: &File) -> io::Result<Vec<PendingFile>> {
        let mut all = Vec::with_capacity(self.len());
        for (handle, files) in &self.directories {
            let directory = handle.open(on.as_fd(), OFlags::DIRECTORY)?;
            let number = rustix::fs::fstat(&directory)?.st_ino;
            for file in files {
                all.push(PendingFile::small(file, &directory, number)?);
            }
        }
        Ok(all)
    }

    /// Has all of them loaded; `on` is open on a writable mount of their filesystem.
    ///
    /// # Errors
    ///
    /// A directory can't be opened, or the load has failed.
    pub fn load(self, on: &File, loader: &AsyncPagesFileLoad) -> Result<(), LoadError> {
        let on = on.try_clone().map_err(|source| LoadError::Open { source: Arc::new(source) })?;
        let mut batch = Batch::new(Arc::new(on));
        for (directory, files) in self.directories {
            for file in files {
                if let Some(full) = batch.push(directory, file) {
                    loader.load_batch(Box::new(full))?;
                }
            }
        }
        if batch.is_empty() { Ok(()) } else { loader.load_batch(Box::new(batch)) }
    }
}

/// Small files that one loader thread loads. Many of them may wait, so none has a descriptor: a directory is opened when it is
/// the turn of the first file in it.
pub(crate) struct Batch {
    on: Arc<File>,
    files: Vec<(FileHandle, SmallFile)>,
    bytes: u64,
    directory: Option<(FileHandle, File)>,
}

impl Batch {
    /// `on` is open on a writable mount of their filesystem.
    pub(crate) fn new(on: Arc<File>) -> Self {
        Self { on, files: Vec::new(), bytes: 0, directory: None }
    }

    /// Adds a file; gives the batch away if it is full.
    pub(crate) fn push(&mut self, directory: FileHandle, file: SmallFile) -> Option<Self> {
        self.bytes += file.bytes();
        self.files.push((directory, file));
        let full = self.files.len() >= BATCH_FILES || self.bytes >= BATCH_BYTES;
        full.then(|| self.take())
    }

    /// What is in it.
    pub(crate) fn take(&mut self) -> Self {
        let empty = Self::new(self.on.clone());
        std::mem::replace(self, empty)
    }
}

impl FileBatch for Batch {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn extents(&self, index: usize) -> &[PageExtent] {
        &self.files[index].1.extents
    }

    fn open(&mut self, index: usize) -> io::Result<File> {
        let (handle, file) = &self.files[index];
        let is_open = self.directory.as_ref().is_some_and(|(open, _)| open == handle);
        let opened = if is_open {
            Ok(())
        } else {
            let opened = handle.open(self.on.as_fd(), OFlags::DIRECTORY);
            opened.map(|opened| self.directory = Some((*handle, opened)))
        };
        let directory = self.directory.as_ref();
        let opened = opened.and_then(|()| file.open(&directory.expect("it was opened just now").1));
        opened.map_err(|error| {
            io::Error::new(error.kind(), format!("\"{}\": {error}", file.name.escape_ascii()))
        })
    }

    fn loaded(&mut self, index: usize, file: &File) -> io::Result<()> {
        self.files[index].1.complete(file)
    }
}
