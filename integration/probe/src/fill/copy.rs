//! `--copy SRC`: a real tree as it is, with modes, owners, times, symbolic and hard links.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, chmodat, chownat, fstat,
    linkat, mkdirat, mknodat, openat, readlinkat, statat, symlinkat, utimensat,
};

use super::tree::open_dir;

/// Copies what is in `source` into `target`; gives the number of objects.
///
/// The target is on one filesystem and was empty. Sparse files become dense, and extended attributes
/// are left behind: the small tree has all that.
pub fn copy_tree(source: &Path, target: &OwnedFd) -> io::Result<usize> {
    let source = open_dir(source)?;
    let mut copy = Copy { root: target.as_fd(), seen: BTreeMap::new(), objects: 0 };
    copy.directory(source.as_fd(), target.as_fd(), b"")?;
    Ok(copy.objects)
}

struct Copy<'a> {
    root: BorrowedFd<'a>,
    /// (device, inode) of sources with several names, and the first copy's path.
    seen: BTreeMap<(u64, u64), Vec<u8>>,
    objects: usize,
}

impl Copy<'_> {
    fn directory(&mut self, source: BorrowedFd<'_>, target: BorrowedFd<'_>, path: &[u8]) -> io::Result<()> {
        let mut names: Vec<CString> = Vec::new();
        for entry in Dir::read_from(source)? {
            let name = entry?.file_name().to_owned();
            if name.as_bytes() != b"." && name.as_bytes() != b".." {
                names.push(name);
            }
        }
        names.sort();
        for name in &names {
            let path =
                if path.is_empty() { name.as_bytes().to_vec() } else { [path, name.as_bytes()].join(&b'/') };
            self.object(source, target, name, path)?;
        }
        Ok(())
    }

    fn object(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        name: &CStr,
        path: Vec<u8>,
    ) -> io::Result<()> {
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        self.objects += 1;
        if kind != FileType::Directory && stat.st_nlink > 1 {
            if let Some(first) = self.seen.get(&(stat.st_dev, stat.st_ino)) {
                return Ok(linkat(self.root, first.as_slice(), to, name, AtFlags::empty())?);
            }
            self.seen.insert((stat.st_dev, stat.st_ino), path.clone());
        }
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        match kind {
            FileType::Directory => {
                mkdirat(to, name, Mode::from_raw_mode(0o700))?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let source = openat(from, name, flags, Mode::empty())?;
                let target = openat(to, name, flags, Mode::empty())?;
                self.directory(source.as_fd(), target.as_fd(), &path)?;
            }
            FileType::RegularFile => {
                let mut source =
                    File::from(openat(from, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?);
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let mut target = File::from(openat(to, name, flags, Mode::from_raw_mode(0o600))?);
                io::copy(&mut source, &mut target)?;
                debug_assert_eq!(fstat(&target)?.st_size, stat.st_size);
            }
            FileType::Symlink => symlinkat(&readlinkat(from, name, Vec::new())?, to, name)?,
            kind => mknodat(to, name, kind, mode, stat.st_rdev)?,
        }
        let (uid, gid) = (Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)));
        chownat(to, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        if kind != FileType::Symlink {
            chmodat(to, name, mode, AtFlags::empty())?;
        }
        Ok(utimensat(to, name, &times_of(&stat), AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

#[expect(clippy::unnecessary_cast, reason = "the types of the fields differ between architectures")]
fn times_of(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime as i64, tv_nsec: stat.st_atime_nsec as i64 },
        last_modification: Timespec { tv_sec: stat.st_mtime as i64, tv_nsec: stat.st_mtime_nsec as i64 },
    }
}
