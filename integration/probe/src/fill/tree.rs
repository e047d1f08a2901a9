//! The tree being made: objects are created by path, their attributes are set in one pass at the end.
//!
//! Children are finished before their directories, since making a child changes the directory's times;
//! and within one object owner comes before mode (chown clears setuid and file capabilities), times last.
//! Paths are resolved by descriptors, one directory after the other, so they may be longer than PATH_MAX.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chmod, chownat, linkat,
    mkdirat, mknodat, open, openat, symlinkat, utimensat,
};
use rustix::io::Errno;

use crate::escape::escape;
use crate::random::Random;

/// One object and what it is to be in the end.
pub struct Made {
    path: Vec<u8>,
    symlink: bool,
    mode: Option<u32>,
    owner: Option<(u32, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    mtime: (i64, i64),
    atime: (i64, i64),
}

impl Made {
    /// Permission bits, with setuid, setgid, sticky.
    pub fn mode(&mut self, mode: u32) -> &mut Self {
        self.mode = Some(mode);
        self
    }

    /// User and group.
    pub fn owner(&mut self, uid: u32, gid: u32) -> &mut Self {
        self.owner = Some((uid, gid));
        self
    }

    /// One extended attribute more.
    pub fn xattr(&mut self, name: &[u8], value: &[u8]) -> &mut Self {
        self.xattrs.push((name.to_vec(), value.to_vec()));
        self
    }

    /// Seconds and nanoseconds of the modification and the access time.
    pub fn times(&mut self, mtime: (i64, i64), atime: (i64, i64)) -> &mut Self {
        self.mtime = mtime;
        self.atime = atime;
        self
    }
}

/// What has been made, and what the kernel refused.
pub struct Report {
    /// Objects in the tree, the root not counted.
    pub objects: usize,
    /// One line each.
    pub left_out: Vec<String>,
}

/// The tree below one directory.
pub struct Tree {
    root: OwnedFd,
    random: Random,
    made: Vec<Made>,
    report: Report,
}

impl Tree {
    /// A tree in `root`, which exists and gets attributes of its own, too.
    pub fn open(root: &Path, seed: u64) -> io::Result<Self> {
        let root = open(root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let report = Report { objects: 0, left_out: Vec::new() };
        let mut tree = Self { root, random: Random::new(seed), made: Vec::new(), report };
        tree.register(b".".to_vec(), false).mode(0o1751).owner(17, 18);
        tree.report.objects = 0;
        Ok(tree)
    }

    /// Bytes that depend on the seed and on the calls made so far.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        self.random.bytes(length)
    }

    /// Adds to the number of objects in the report.
    pub fn count(&mut self, objects: usize) {
        self.report.objects += objects;
    }

    /// The parent's descriptor and the last name of `path`.
    pub fn parent(&self, path: &[u8]) -> io::Result<(OwnedFd, CString)> {
        let mut names: Vec<&[u8]> = path.split(|&byte| byte == b'/').collect();
        let last = names.pop().expect("split gives one item at least");
        let mut dir = self.root.try_clone()?;
        for name in names {
            dir = openat(&dir, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        }
        Ok((dir, CString::new(last).expect("names have no NUL")))
    }

    /// A directory; gives its descriptor.
    pub fn dir(&mut self, path: &[u8]) -> io::Result<OwnedFd> {
        let (dir, name) = self.parent(path)?;
        mkdirat(&dir, &name, Mode::from_raw_mode(0o755)).map_err(|e| at(path, e))?;
        self.register(path.to_vec(), false);
        Ok(openat(&dir, &name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// A regular file, open for writing.
    pub fn file(&mut self, path: &[u8]) -> io::Result<File> {
        let (dir, name) = self.parent(path)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = openat(&dir, &name, flags, Mode::from_raw_mode(0o644)).map_err(|e| at(path, e))?;
        self.register(path.to_vec(), false);
        Ok(File::from(fd))
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &[u8], target: &[u8]) -> io::Result<()> {
        let (dir, name) = self.parent(path)?;
        symlinkat(target, &dir, &name).map_err(|e| at(path, e))?;
        self.register(path.to_vec(), true);
        Ok(())
    }

    /// A fifo, a socket or a device node, which the kernel may refuse.
    pub fn node(&mut self, path: &[u8], kind: FileType, device: (u32, u32)) -> io::Result<()> {
        let (dir, name) = self.parent(path)?;
        let mode = Mode::from_raw_mode(0o640);
        match mknodat(&dir, &name, kind, mode, rustix::fs::makedev(device.0, device.1)) {
            Ok(()) => {
                self.register(path.to_vec(), false);
                Ok(())
            }
            Err(Errno::PERM) => {
                self.report.left_out.push(format!("{}: mknod: EPERM", escape(path)));
                Ok(())
            }
            Err(error) => Err(at(path, error)),
        }
    }

    /// One more name for an object; of the symbolic link itself if it is one.
    pub fn link(&mut self, old: &[u8], new: &[u8]) -> io::Result<()> {
        let (old_dir, old_name) = self.parent(old)?;
        let (new_dir, new_name) = self.parent(new)?;
        linkat(&old_dir, &old_name, &new_dir, &new_name, AtFlags::empty()).map_err(|e| at(new, e))?;
        self.report.objects += 1;
        Ok(())
    }

    /// Takes up an object that was made by other means, so that it gets attributes, too.
    pub fn adopt(&mut self, path: &[u8]) -> &mut Made {
        self.register(path.to_vec(), false)
    }

    /// The attributes of the object made last.
    pub fn last(&mut self) -> &mut Made {
        self.made.last_mut().expect("the root is always there")
    }

    /// Sets all attributes, and ends.
    pub fn finish(mut self) -> io::Result<Report> {
        for made in std::mem::take(&mut self.made).iter().rev() {
            self.finish_one(made).map_err(|error| {
                io::Error::new(error.kind(), format!("attributes of {}: {error}", escape(&made.path)))
            })?;
        }
        Ok(self.report)
    }

    fn finish_one(&mut self, made: &Made) -> io::Result<()> {
        let (dir, name) = self.parent(&made.path)?;
        if let Some((uid, gid)) = made.owner {
            let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            match chownat(&dir, &name, uid, gid, AtFlags::SYMLINK_NOFOLLOW) {
                // In a user namespace that doesn't have this id.
                Err(Errno::INVAL) => {
                    self.report.left_out.push(format!("{}: chown: EINVAL", escape(&made.path)))
                }
                other => other?,
            }
        }
        // Neither chmod nor setxattr takes a descriptor of O_PATH, so both go through its name in /proc.
        let object = openat(&dir, &name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let path = format!("/proc/self/fd/{}", object.as_raw_fd());
        if let (Some(mode), false) = (made.mode, made.symlink) {
            chmod(&path, Mode::from_raw_mode(mode))?;
        }
        for (key, value) in &made.xattrs {
            match rustix::fs::setxattr(&path, key.as_slice(), value, XattrFlags::empty()) {
                Err(error @ (Errno::PERM | Errno::NOTSUP)) => {
                    self.report.left_out.push(format!("{}: {}: {error}", escape(&made.path), escape(key)));
                }
                other => other?,
            }
        }
        let stamp = |(tv_sec, tv_nsec)| Timespec { tv_sec, tv_nsec };
        let times = Timestamps { last_access: stamp(made.atime), last_modification: stamp(made.mtime) };
        Ok(utimensat(dir.as_fd(), &name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    fn register(&mut self, path: Vec<u8>, symlink: bool) -> &mut Made {
        self.report.objects += 1;
        let mut stamp =
            || (1_000_000_000 + (self.random.next() % 900_000_000) as i64, self.random.below(1_000_000_000));
        let (mtime, atime) = (stamp(), stamp());
        self.made.push(Made { path, symlink, mode: None, owner: None, xattrs: Vec::new(), mtime, atime });
        self.last()
    }
}

fn at(path: &[u8], error: Errno) -> io::Error {
    let error = io::Error::from(error);
    io::Error::new(error.kind(), format!("{}: {error}", escape(path)))
}

/// Opens `dir` for the `*at` calls.
pub fn open_dir(dir: &Path) -> io::Result<OwnedFd> {
    Ok(openat(CWD, dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}
