//! `tmpcopyup`: a tmpfs that starts as a copy of the directory below it.
//!
//! Mirrors runc's `doTmpfsCopyUp` (libcontainer/rootfs_linux.go, mrunalp/fileutils): names, contents,
//! mode, owner, symbolic links and device nodes are copied; times, extended attributes and hard links
//! aren't, and the root of the tmpfs keeps its own owner and mode. It is more faithful in places where
//! runc depends on its umask or fails: directories keep all their mode bits, holes stay holes, and
//! fifos, sockets and character devices are made (runc stops with ENOENT).
//!
//! The source is the image's, so hostile: every step is relative to a descriptor, no link is followed,
//! a file is opened through the descriptor whose type was looked at. It takes two descriptors a level,
//! and stops at [`MAX_DEPTH`].

use std::ffi::CStr;
use std::fs::{File, Permissions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, SeekFrom, Stat, Uid};
use rustix::io::Errno;

/// Directories inside each other that are copied; with two descriptors a level it stays far below the
/// usual limit of 1,024.
pub const MAX_DEPTH: usize = 256;

/// Attempts at a lookup that a concurrent rename disturbs.
const LOOKUPS: usize = 16;

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

fn failed<E: Into<io::Error>>(call: &'static str, path: &Path) -> impl FnOnce(E) -> CopyUpError {
    move |error| CopyUpError::System { call, path: path.to_owned(), source: error.into() }
}

/// Copies what is in the directory `source` into `destination`, the root of a fresh tmpfs that nobody
/// else uses yet. Both are descriptors that can be read. After an error the copy is incomplete.
pub fn copy_up(source: &File, destination: &File) -> Result<(), CopyUpError> {
    let here = Path::new(".");
    let source = open_directory(source.as_fd(), c".").map_err(failed("open", here))?;
    let destination = open_directory(destination.as_fd(), c".").map_err(failed("open", here))?;
    copy_directory(source, destination, here, 1)
}

fn copy_directory(
    source: OwnedFd,
    destination: OwnedFd,
    path: &Path,
    depth: usize,
) -> Result<(), CopyUpError> {
    if depth > MAX_DEPTH {
        return Err(CopyUpError::TooDeep { path: path.to_owned(), limit: MAX_DEPTH });
    }
    let mut entries = Dir::new(source).map_err(failed("open", path))?;
    while let Some(entry) = entries.next() {
        let entry = entry.map_err(failed("getdents64", path))?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let path = path.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
        let source = entries.fd().map_err(failed("open", &path))?;
        copy_entry(source, destination.as_fd(), name, &path, depth)?;
    }
    Ok(())
}

fn copy_entry(
    source: BorrowedFd<'_>,
    destination: BorrowedFd<'_>,
    name: &CStr,
    path: &Path,
    depth: usize,
) -> Result<(), CopyUpError> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::openat(source, name, flags, Mode::empty()).map_err(failed("open", path))?;
    let stat = rustix::fs::fstat(&found).map_err(failed("fstat", path))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            rustix::fs::mkdirat(destination, name, Mode::RWXU).map_err(failed("mkdir", path))?;
            let from = open_directory(found.as_fd(), c".").map_err(failed("open", path))?;
            drop(found);
            let to = open_directory(destination, name).map_err(failed("open", path))?;
            let made = File::from(to);
            set_attributes(&made, &stat, path)?;
            copy_directory(from, made.into(), path, depth + 1)
        }
        FileType::RegularFile => {
            let from = reopen(found.as_fd()).map_err(failed("open", path))?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let to = rustix::fs::openat(destination, name, flags, Mode::RUSR | Mode::WUSR)
                .map_err(failed("create", path))?;
            let to = File::from(to);
            copy_data(&from, &to).map_err(failed("copy", path))?;
            // Last: writing takes the setuid bit away.
            set_attributes(&to, &stat, path)
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(&found, c"", Vec::new()).map_err(failed("readlink", path))?;
            rustix::fs::symlinkat(target.as_c_str(), destination, name).map_err(failed("symlink", path))?;
            set_owner(destination, name, &stat, path)
        }
        kind => {
            rustix::fs::mknodat(destination, name, kind, Mode::RUSR, stat.st_rdev)
                .map_err(failed("mknod", path))?;
            set_owner(destination, name, &stat, path)?;
            // Not a link: made just now, where nobody else is.
            rustix::fs::chmodat(destination, name, permissions(&stat), AtFlags::empty())
                .map_err(failed("chmod", path))
        }
    }
}

/// Copies the data and leaves holes where the source has them.
fn copy_data(from: &File, to: &File) -> io::Result<()> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut at = 0;
    while at < length {
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let hole = rustix::fs::seek(from, SeekFrom::Hole(data))?;
        rustix::fs::seek(from, SeekFrom::Start(data))?;
        rustix::fs::seek(to, SeekFrom::Start(data))?;
        io::copy(&mut from.take(hole.saturating_sub(data)), &mut &*to)?;
        at = hole.max(data + 1);
    }
    Ok(())
}

fn set_attributes(file: &File, stat: &Stat, path: &Path) -> Result<(), CopyUpError> {
    // The owner first: changing it takes the setuid bit away.
    fchown(file, Some(stat.st_uid), Some(stat.st_gid)).map_err(failed("fchown", path))?;
    let mode = Permissions::from_mode(permissions(stat).bits());
    file.set_permissions(mode).map_err(failed("fchmod", path))
}

fn set_owner(directory: BorrowedFd<'_>, name: &CStr, stat: &Stat, path: &Path) -> Result<(), CopyUpError> {
    let owner = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(directory, name, Some(owner.0), Some(owner.1), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(failed("chown", path))
}

fn permissions(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777)
}

fn open_directory(at: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::empty())
}

/// Opens for reading what an O_PATH descriptor stands for.
fn reopen(found: BorrowedFd<'_>) -> Result<File, Errno> {
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map(File::from)
}

/// Opens the directory `path` as a process chrooted into `root` would, following symbolic links inside
/// it; `None` where nothing is there. The descriptor can be read; ENOTDIR where it isn't a directory.
pub fn open_in_root(root: &Path, path: &str) -> io::Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
    let path = if path.is_empty() { "/" } else { path };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..LOOKUPS {
        match rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve) {
            Ok(found) => return Ok(Some(found.into())),
            Err(Errno::NOENT) => return Ok(None),
            // A rename somewhere meanwhile: the kernel can't tell whether `..` stayed inside.
            Err(Errno::AGAIN) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(Errno::AGAIN.into())
}
