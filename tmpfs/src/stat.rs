//! What the kernel says of an inode: statx(2), without what nobody here asks for, since a live checkpoint keeps one of each
//! inode.

use std::fs::File;
use std::io;

use rustix::fs::{AtFlags, Statx, StatxFlags, StatxTimestamp};

use crate::entry::{Attributes, KEPT_FLAGS, Timestamp};

/// An inode's attributes, with the host's ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) inode: u64,
    pub(crate) size: u64,
    pub(crate) mtime: Timestamp,
    pub(crate) atime: Timestamp,
    pub(crate) ctime: Timestamp,
    /// With the format.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) links: u32,
    /// [`KEPT_FLAGS`] only.
    pub(crate) flags: u32,
    /// Major and minor number of what a device node stands for.
    pub(crate) device: (u32, u32),
}

impl Stat {
    /// Of what `file` has open, possibly with O_PATH.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        Ok(Self::from(&rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?))
    }

    /// Of what has the name `name` in the directory `dir`.
    pub(crate) fn at(dir: &File, name: &[u8]) -> io::Result<Self> {
        Ok(Self::from(&rustix::fs::statx(dir, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)?))
    }

    /// The bits of the mode that say what it is.
    pub(crate) fn format(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    /// What an image keeps of it, but for xattrs.
    pub(crate) fn attributes(&self) -> Attributes {
        Attributes {
            mode: self.mode & 0o7777,
            uid: self.uid,
            gid: self.gid,
            mtime: self.mtime,
            atime: self.atime,
            flags: self.flags,
            xattrs: Vec::new(),
        }
    }
}

impl From<&Statx> for Stat {
    fn from(stat: &Statx) -> Self {
        let time = |t: &StatxTimestamp| Timestamp { sec: t.tv_sec, nsec: t.tv_nsec };
        Self {
            inode: stat.stx_ino,
            size: stat.stx_size,
            mtime: time(&stat.stx_mtime),
            atime: time(&stat.stx_atime),
            ctime: time(&stat.stx_ctime),
            mode: stat.stx_mode.into(),
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            links: stat.stx_nlink,
            // The STATX_ATTR_* of these flags have the FS_*_FL bits' values (linux/stat.h).
            flags: (stat.stx_attributes.bits() & u64::from(KEPT_FLAGS)) as u32,
            device: (stat.stx_rdev_major, stat.stx_rdev_minor),
        }
    }
}
