//! Copying files while they are in use, so that only what changes meanwhile is left for the freeze.
//!
//! The rules by which a copy counts as the file's contents under the freeze (see ARCHITECTURE.md):
//!
//! - its inode has the same ctime and size as before the copy. ctime is asked for first, then the inode's lock
//!   is waited for (lseek SEEK_DATA), since a write in flight has set ctime before its data; then it is copied;
//! - a file whose ctime was younger than [`SETTLED`] isn't copied: before Linux 6.13 two changes within a tick have
//!   one ctime, and a file that is being written would only be copied in vain;
//! - nobody has stored to it through a mapping: the caller takes out ([`Precopied::forget`]) what is mapped shared
//!   under the freeze and what [`Changes`](crate::changes::Changes) reports.
//!
//! Names are never copied ahead: the walk under the freeze finds them. What goes away during the walk here is
//! left out.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::{Mode, OFlags, SeekFrom, Statx};
use stillframe_pgalloc::{AsyncMemoryFileSave, FileRange, PageExtent};

use crate::changes::Suspects;
use crate::entry::{PathName, Xattr};
use crate::save::SaveTreeError;
use crate::scan::{format, stat};
use crate::walk::{Listed, Met, Walk};
use crate::xattr::{self, Inode};

/// How long a file must not have changed to be copied ahead.
const SETTLED: Duration = Duration::from_millis(100);

/// What was copied ahead of one filesystem.
#[derive(Debug, Default)]
pub struct Precopied {
    files: HashMap<u64, CopiedFile>,
    /// Bytes of the files' data that were copied.
    pub bytes: u64,
}

/// A file as it was copied.
#[derive(Debug)]
pub(crate) struct CopiedFile {
    ctime: (i64, u32),
    size: u64,
    pub(crate) extents: Vec<PageExtent>,
    pub(crate) xattrs: Vec<Xattr>,
}

impl Precopied {
    /// Copies the files of the filesystem at `root`, open for reading, through `memory`.
    pub fn copy(root: &File, memory: &AsyncMemoryFileSave<'_>) -> Result<Self, SaveTreeError> {
        let mut copied = Self::default();
        let mut walk = Walk::new(root);
        while let Some(met) = walk.next() {
            // A directory that has gone, or couldn't be listed for another reason that the freeze will show.
            let Ok(met) = met else { continue };
            if met.listed == Listed::Regular {
                copied.copy_file(&met, memory)?;
            }
        }
        Ok(copied)
    }

    fn copy_file(&mut self, met: &Met<'_>, memory: &AsyncMemoryFileSave<'_>) -> Result<(), SaveTreeError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(file) = rustix::fs::openat(met.parent, met.name, flags, Mode::empty()) else { return Ok(()) };
        let file = Arc::new(File::from(file));
        let Ok(before) = stat(&file) else { return Ok(()) };
        let new = before.stx_nlink > 0 && !self.files.contains_key(&before.stx_ino);
        if format(&before) != libc::S_IFREG || !new || !is_settled(&before) {
            return Ok(());
        }
        let Ok(xattrs) = xattr::read(&Inode::Open(&file)) else { return Ok(()) };
        // Waits for the inode's lock; whether there is data doesn't matter.
        let _ = rustix::fs::seek(&file, SeekFrom::Data(0));
        let mut extents = Vec::new();
        if before.stx_size > 0 {
            let whole = FileRange::new(0, before.stx_size).expect("a file begins at 0");
            extents = memory
                .write_live_range(&file, whole)
                .map_err(|source| SaveTreeError::Pages { path: PathName(met.path.to_vec()), source })?;
        }
        self.bytes += extents.iter().map(|extent| extent.length).sum::<u64>();
        let copy = CopiedFile { ctime: ctime(&before), size: before.stx_size, extents, xattrs };
        self.files.insert(before.stx_ino, copy);
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Takes back what may have changed without a new ctime.
    pub fn forget(&mut self, suspects: &Suspects) {
        match suspects {
            Suspects::All => self.files.clear(),
            Suspects::Inodes(inodes) => self.files.retain(|inode, _| !inodes.contains(inode)),
        }
    }

    /// The copy of a file that is now, under the freeze, as `stat` says, if it is still good.
    pub(crate) fn find(&self, stat: &Statx) -> Option<&CopiedFile> {
        let copy = self.files.get(&stat.stx_ino)?;
        (copy.ctime == ctime(stat) && copy.size == stat.stx_size).then_some(copy)
    }
}

fn ctime(stat: &Statx) -> (i64, u32) {
    (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec)
}

fn is_settled(stat: &Statx) -> bool {
    let (sec, nsec) = ctime(stat);
    let Ok(sec) = u64::try_from(sec) else { return false };
    let changed = SystemTime::UNIX_EPOCH + Duration::new(sec, nsec);
    // A clock that was set back makes files look new until it has caught up: they are read under the freeze.
    changed.elapsed().is_ok_and(|age| age >= SETTLED)
}
