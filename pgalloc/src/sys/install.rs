//! Giving a file on tmpfs pages without writing to it: userfaultfd(2), UFFDIO_COPY into a shared mapping.
//!
//! write(2), and a store through a mapping, change a file's times (`file_update_time`); this doesn't, nor does it drop
//! privileges, and it refuses what lies behind the file's end (EFAULT), where write(2) would make the file longer. Pages are of
//! the usual size (`shmem_mfill_atomic_pte`). A page that is there already stays as it is.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use memmap2::{MmapOptions, MmapRaw};

/// Of linux/userfaultfd.h.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFDIO_COPY_MODE_DONTWAKE: u64 = 1;
/// What it works with: the image's page is the host's.
const PAGE: usize = crate::page::PAGE_SIZE as usize;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

/// Installs pages; each thread needs its own.
#[derive(Debug)]
pub(crate) struct Installer {
    uffd: OwnedFd,
}

impl Installer {
    /// Fails where the kernel can't, or the host's pages aren't those of images.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        if page != PAGE as i64 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let flags = libc::O_CLOEXEC | UFFD_USER_MODE_ONLY;
        // SAFETY: takes flags, and makes a descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call returned a new descriptor that nothing else owns.
        let uffd = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
        let mut api = Api { api: UFFD_API, features: 0, ioctls: 0 };
        // SAFETY: the request reads and writes a `struct uffdio_api`, which `api` is.
        let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut api) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(Self { uffd }) }
    }

    /// Gives `file`, open for reading and writing, the pages of `bytes` from `offset` on, a multiple of the page size. A last part
    /// of a page is filled up with zeros. `file` is on tmpfs.
    pub(crate) fn install(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (whole, rest) = bytes.split_at(bytes.len() / PAGE * PAGE);
        let length = bytes.len().next_multiple_of(PAGE);
        let mapping = MmapOptions::new().offset(offset).len(length).map_raw(file)?;
        let mut range = Register {
            start: mapping.as_ptr() as u64,
            length: length as u64,
            mode: UFFDIO_REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: the request reads and writes a `struct uffdio_register`, which `range` is. Nothing ever touches the
        // mapping, so nobody waits for a page of it.
        let result = unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut range) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        self.copy(&mapping, 0, whole)?;
        if !rest.is_empty() {
            let mut last = [0; PAGE];
            last[..rest.len()].copy_from_slice(rest);
            self.copy(&mapping, whole.len(), &last)?;
        }
        Ok(())
    }

    /// Copies whole pages to `at` in the mapping.
    fn copy(&self, mapping: &MmapRaw, at: usize, pages: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < pages.len() {
            let mut copy = Copy {
                to: mapping.as_ptr() as u64 + (at + done) as u64,
                from: pages[done..].as_ptr() as u64,
                length: (pages.len() - done) as u64,
                mode: UFFDIO_COPY_MODE_DONTWAKE,
                copied: 0,
            };
            // SAFETY: the request reads and writes a `struct uffdio_copy`, which `copy` is; `from` is `length` readable
            // bytes, and `to` lies in the mapping, which is registered and nobody has a reference into.
            let result = unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_COPY, &raw mut copy) };
            let error = io::Error::last_os_error();
            match (result, error.raw_os_error()) {
                (0, _) => return Ok(()),
                (_, Some(libc::EEXIST)) => done += PAGE,
                (_, Some(libc::EAGAIN)) if copy.copied >= 0 => done += copy.copied as usize,
                // A part was copied before the page that can't be: the next call says why.
                _ => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    fn file(size: u64) -> File {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn pages_come_without_a_trace() {
        let installer = Installer::new().unwrap();
        let file = file(3 * 4096 + 10);
        file.write_all_at(b"there", 4096).unwrap();
        let before = file.metadata().unwrap();
        let bytes: Vec<u8> = (0..3 * 4096 + 10).map(|index| (index % 251) as u8 + 1).collect();
        installer.install(&file, 0, &bytes).unwrap();
        let after = file.metadata().unwrap();
        assert_eq!((after.mtime_nsec(), after.ctime_nsec()), (before.mtime_nsec(), before.ctime_nsec()));
        assert_eq!(after.blocks(), 4 * 8);
        let mut read = vec![0; bytes.len()];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read[..4096] == bytes[..4096] && read[8192..] == bytes[8192..]);
        assert_eq!(&read[4096..4102], b"there\0", "a page that is there stays");
        // Nothing of the buffer's is behind the end.
        file.set_len(4 * 4096).unwrap();
        let mut tail = [1; 100];
        file.read_exact_at(&mut tail, 3 * 4096 + 10).unwrap();
        assert_eq!(tail, [0; 100]);
    }

    #[test]
    fn nothing_is_made_longer() {
        let installer = Installer::new().unwrap();
        let file = file(4096);
        let error = installer.install(&file, 0, &[1; 3 * 4096]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{error}");
        assert_eq!(file.metadata().unwrap().len(), 4096);
    }
}
