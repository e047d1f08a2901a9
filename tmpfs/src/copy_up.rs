//! `tmpcopyup`: a tmpfs that starts as a copy of the directory below it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Why a directory couldn't be copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyUpError {
    /// More directories inside each other than are followed.
    #[error("directory {path} is nested more than {limit} deep; tmpcopyup cannot copy it")]
    TooDeep {
        /// Below the copied directory.
        path: PathBuf,
        /// The most levels.
        limit: usize,
    },
    /// A system call failed.
    #[error("tmpcopyup: {call} {path}")]
    System {
        /// The call.
        call: &'static str,
        /// Below the copied directory.
        path: PathBuf,
        /// The errno.
        #[source]
        source: io::Error,
    },
}

/// Copies what is in the directory `source` into `destination`, the root of a fresh tmpfs.
pub fn copy_up(_source: &File, _destination: &File) -> Result<(), CopyUpError> {
    todo!()
}

/// Opens `path` as a process chrooted into `root` would; `None` where nothing is there.
pub fn open_in_root(_root: &Path, _path: &str) -> io::Result<Option<File>> {
    todo!()
}
