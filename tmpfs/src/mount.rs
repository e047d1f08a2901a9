//! Mounting a tmpfs for a container, looking into it, and letting it go.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::IdMap;
use crate::options::TmpfsOptions;

/// A tmpfs to be mounted.
#[derive(Clone, Copy, Debug)]
pub struct TmpfsMount<'a> {
    /// Options of the OCI mount.
    pub options: &'a TmpfsOptions,
    /// The OCI mount's source, as mountinfo shows it.
    pub source: Option<&'a str>,
    /// What the directory below the mountpoint does to the root's mode.
    pub default_mode: DefaultMode,
    /// The container's user ids.
    pub uid_map: &'a IdMap,
    /// The container's group ids.
    pub gid_map: &'a IdMap,
    /// SELinux label of everything on it (the spec's mountLabel).
    pub label: Option<&'a str>,
}

/// How runc makes the mode of the directory in the rootfs the mode of the tmpfs mounted over it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DefaultMode {
    /// There was no directory: the `mode` option, else 1777.
    #[default]
    Absent,
    /// chmod(2) to the directory's mode after mounting, also where there is a `mode` option (old runc).
    Chmod(u32),
    /// `mode=` of the directory where there is no `mode` option (new runc).
    Option(u32),
}

/// Space of a tmpfs; `None` is unlimited, and what is unlimited isn't counted either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Limit, bytes.
    pub size_bytes: Option<u64>,
    /// In use, bytes; known where there is a limit.
    pub used_bytes: Option<u64>,
    /// Limit, inodes.
    pub inodes: Option<u64>,
    /// In use, inodes; known where there is a limit.
    pub used_inodes: Option<u64>,
}

/// Why a tmpfs couldn't be mounted, opened or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel refused an option; `log` is what it says itself.
    #[error("the kernel refused tmpfs option {option:?}: {log}")]
    Refused {
        /// `key=value`.
        option: String,
        /// The kernel's message, or empty.
        log: String,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// An id of the options isn't mapped into the user namespace.
    #[error("tmpfs option {key}={id} is not mapped into the container's user namespace")]
    Unmapped {
        /// `uid` or `gid`.
        key: &'static str,
        /// The container's id.
        id: u32,
    },
    /// It isn't the root of a mounted tmpfs.
    #[error("{path} is not the root of a mounted tmpfs")]
    NotTmpfs {
        /// What was looked at.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{call} {path}")]
    System {
        /// The call.
        call: &'static str,
        /// What on.
        path: PathBuf,
        /// The errno.
        #[source]
        source: io::Error,
    },
}

/// Mounts a fresh tmpfs on the directory `target`: private, never read-only.
pub fn mount_tmpfs(_request: &TmpfsMount<'_>, _target: &Path) -> Result<(), MountError> {
    todo!()
}

/// Makes `dir` a private mountpoint (a bind mount of itself), so that what is mounted below it stays
/// in this mount namespace. Does nothing where it is one already.
pub fn make_private_mountpoint(_dir: &Path) -> Result<(), MountError> {
    todo!()
}

/// The root directory of the tmpfs at `mountpoint` through a read-only, noatime mount of its own.
pub fn open_view(_mountpoint: &Path) -> Result<File, MountError> {
    todo!()
}

/// The root directory of the tmpfs at `mountpoint` through a writable mount of its own.
pub fn open_root(_mountpoint: &Path) -> Result<File, MountError> {
    todo!()
}

/// Detaches what is mounted at `target`; nothing mounted or no such path is fine.
pub fn unmount(_target: &Path) -> Result<(), MountError> {
    todo!()
}

/// Limits and use of the tmpfs at `mountpoint`.
pub fn usage(_mountpoint: &Path) -> Result<Usage, MountError> {
    todo!()
}
