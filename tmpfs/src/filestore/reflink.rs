//! Reflinks of filestores (ioctl_ficlone(2)): where the host's filesystem has them (xfs, btrfs), a file becomes a copy that
//! shares the blocks of the other until one of the two is written.
//!
//! A clone has no name (O_TMPFILE), so that nobody sees it, and nothing of it is left when its last descriptor is closed,
//! however that comes about. Cloning writes back what the page cache has of the file: [`prepare`] does that before.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::BLOCK;

/// Writes back the file, if it can be cloned, so that cloning it soon after is fast.
pub fn prepare(path: &Path) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let probe = || {
        let file = unnamed(directory)?;
        file.write_all_at(&[1; BLOCK as usize], 0)?;
        clone_of(&file, directory)
    };
    match probe() {
        Ok(_) => File::open(path)?.sync_data(),
        Err(_) => Ok(()),
    }
}

/// A clone of the file, which is still meanwhile; `None` where the host's filesystem can't, or has no room for it.
pub fn clone(path: &Path) -> Option<File> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let clone = File::open(path).and_then(|file| clone_of(&file, directory));
    clone
        .inspect_err(|error| tracing::debug!(path = %path.display(), %error, "the file can't be cloned"))
        .ok()
}

fn clone_of(file: &File, directory: &Path) -> io::Result<File> {
    let clone = unnamed(directory)?;
    rustix::fs::ioctl_ficlone(&clone, file)?;
    Ok(clone)
}

fn unnamed(directory: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(directory)
}
