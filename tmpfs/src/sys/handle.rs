//! File handles: name_to_handle_at(2) and open_by_handle_at(2).
//!
//! A handle names an inode for as long as it lives, whatever happens to its name, and costs no
//! descriptor: that is how trees deeper than the descriptor limit are walked and built.

use std::ffi::{CStr, CString, c_int};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};

use serde::{Deserialize, Serialize};

/// Longest handle that is kept. tmpfs needs 12 bytes (inode number and generation).
const MAX_BYTES: usize = 32;

/// Names an inode of a filesystem; meaningful with any descriptor on the same superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(C)]
pub(crate) struct FileHandle {
    bytes: u32,
    kind: c_int,
    handle: [u8; MAX_BYTES],
}

impl FileHandle {
    /// The handle of what `fd` has open.
    pub(crate) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Self::at(fd, c"", libc::AT_EMPTY_PATH)
    }

    /// The handle of what is called `name` in a directory; a symbolic link isn't followed.
    pub(crate) fn of_name(directory: BorrowedFd<'_>, name: &[u8]) -> io::Result<Self> {
        Self::at(directory, &CString::new(name)?, 0)
    }

    fn at(fd: BorrowedFd<'_>, path: &CStr, flags: c_int) -> io::Result<Self> {
        let mut handle = Self { bytes: MAX_BYTES as u32, kind: 0, handle: [0; MAX_BYTES] };
        let mut mount_id: c_int = 0;
        // SAFETY: `FileHandle` begins with the two fields of `struct file_handle` and is followed by
        // the MAX_BYTES bytes that `bytes` promises; the path is a C string, and all pointers
        // live through the call.
        let result = unsafe {
            libc::name_to_handle_at(
                fd.as_raw_fd(),
                path.as_ptr(),
                (&raw mut handle).cast::<libc::file_handle>(),
                &raw mut mount_id,
                flags,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(handle)
    }

    /// The handle in a `struct file_handle` that the kernel wrote; `None` if it is longer than any that is kept, or none.
    pub(crate) fn from_kernel(bytes: &[u8]) -> Option<Self> {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (kind, rest) = rest.split_first_chunk::<4>()?;
        let bytes = u32::from_ne_bytes(*length);
        let mut handle = [0; MAX_BYTES];
        let contents = rest.get(..bytes as usize).filter(|contents| !contents.is_empty())?;
        handle.get_mut(..contents.len())?.copy_from_slice(contents);
        Some(Self { bytes, kind: c_int::from_ne_bytes(*kind), handle })
    }

    /// Opens the inode; `on` is any descriptor (not O_PATH) on the mount to open it through.
    pub(crate) fn open(&self, on: BorrowedFd<'_>, flags: rustix::fs::OFlags) -> io::Result<File> {
        let mut handle = *self;
        // It may have been read from a file.
        if handle.bytes as usize > MAX_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let flags = (flags | rustix::fs::OFlags::CLOEXEC).bits() as c_int;
        // SAFETY: as in `of`; `bytes` promises at most the MAX_BYTES that follow, and what they mean the kernel judges.
        let fd = unsafe {
            libc::open_by_handle_at(on.as_raw_fd(), (&raw mut handle).cast::<libc::file_handle>(), flags)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call returned a new descriptor that nothing else owns.
        Ok(unsafe { File::from_raw_fd(fd) })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;

    use rustix::fs::OFlags;

    use super::*;

    #[test]
    fn a_handle_outlives_its_name() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("old");
        std::fs::write(&path, b"here").unwrap();
        let handle = FileHandle::of(File::open(&path).unwrap().as_fd()).unwrap();
        std::fs::rename(&path, dir.path().join("new")).unwrap();
        let on = File::open(dir.path()).unwrap();
        let mut text = String::new();
        handle.open(on.as_fd(), OFlags::RDONLY).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "here");
        std::fs::remove_file(dir.path().join("new")).unwrap();
        let gone = handle.open(on.as_fd(), OFlags::RDONLY).unwrap_err();
        assert_eq!(gone.raw_os_error(), Some(libc::ESTALE));
    }
}
