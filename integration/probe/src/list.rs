//! `list DIR`: every object below a directory, one line each, with everything a restore has to bring back.
//!
//! A line is words `name=value`, the first one `path=`; values are escaped ([`crate::escape`]). Lines are sorted by
//! the bytes of the path. Nothing is changed by looking: files and directories are opened with O_NOATIME,
//! and the access time that readlink(2) sets is put back. Paths are walked by descriptors, so they may be
//! longer than PATH_MAX. A mount below the directory is listed as `type=mount` and not entered.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Statx, StatxAttributes, StatxFlags, StatxTimestamp, Timespec,
    Timestamps, UTIME_OMIT, open, openat, readlinkat, statx, utimensat,
};
use rustix::io::Errno;

use crate::content;
use crate::escape::{escape, hex};

/// One object of the tree.
struct Object {
    stat: Statx,
    /// The words that aren't in `stat`: link target, extended attributes, digest.
    more: Vec<(String, String)>,
    mount: bool,
}

/// Lists `root` to `out`; `cross` enters other mounts, too.
pub fn list(root: &Path, cross: bool, out: &mut dyn Write) -> io::Result<()> {
    let fd = open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let stat = stat_of(fd.as_fd())?;
    let mut walk = Walk { objects: BTreeMap::new(), mount: stat.stx_mnt_id, cross };
    walk.visit(b".".to_vec(), fd, None)?;

    let mut groups: BTreeMap<(u32, u32, u64), String> = BTreeMap::new();
    for (path, object) in &walk.objects {
        let stat = &object.stat;
        if !is(stat, FileType::Directory) && stat.stx_nlink > 1 {
            groups
                .entry((stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino))
                .or_insert_with(|| escape(path));
        }
    }
    for (path, object) in &walk.objects {
        let stat = &object.stat;
        let group = groups.get(&(stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino));
        write_line(out, path, object, group.map(String::as_str))?;
    }
    out.flush()
}

struct Walk {
    objects: BTreeMap<Vec<u8>, Object>,
    mount: u64,
    cross: bool,
}

impl Walk {
    /// `parent` is the directory and the name in it, which the root doesn't have.
    fn visit(
        &mut self,
        path: Vec<u8>,
        fd: OwnedFd,
        parent: Option<(BorrowedFd<'_>, &CStr)>,
    ) -> io::Result<()> {
        let context = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", escape(&path)));
        let stat = stat_of(fd.as_fd()).map_err(context)?;
        if stat.stx_mnt_id != self.mount && !self.cross {
            self.objects.insert(path, Object { stat, more: Vec::new(), mount: true });
            return Ok(());
        }
        let mut more = Vec::new();
        match file_type(&stat) {
            FileType::Symlink => {
                let (dir, name) = parent.expect("the root was opened as a directory");
                let target = readlinkat(dir, name, Vec::new())?;
                more.push(("target".to_owned(), escape(target.as_bytes())));
                put_back_atime(dir, name, &stat).map_err(context)?;
            }
            FileType::RegularFile => {
                let (dir, name) = parent.expect("the root was opened as a directory");
                let file = open_quietly(dir, name, OFlags::NOFOLLOW).map_err(context)?;
                more.push(("sha256".to_owned(), content::digest(file.as_fd()).map_err(context)?));
            }
            FileType::Directory => self.descend(&path, fd.as_fd()).map_err(context)?,
            _ => {}
        }
        for (name, value) in xattrs(fd.as_fd()).map_err(context)? {
            more.push((format!("xattr.{}", escape(&name)), hex(&value)));
        }
        self.objects.insert(path, Object { stat, more, mount: false });
        Ok(())
    }

    fn descend(&mut self, path: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
        let dir = open_quietly(fd, c".", OFlags::DIRECTORY)?;
        let mut names: Vec<CString> = Vec::new();
        for entry in Dir::read_from(&dir)? {
            let name = entry?.file_name().to_owned();
            if name.as_bytes() != b"." && name.as_bytes() != b".." {
                names.push(name);
            }
        }
        for name in names {
            let child =
                openat(&dir, &name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
            let path = [path, name.as_bytes()].join(&b'/');
            self.visit(path, child, Some((dir.as_fd(), &name)))?;
        }
        Ok(())
    }
}

/// Opens for reading without touching the access time; only where that isn't ours to ask for, with.
fn open_quietly(dir: BorrowedFd<'_>, name: &CStr, flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    match openat(dir, name, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => Ok(openat(dir, name, flags, Mode::empty())?),
        other => Ok(other?),
    }
}

/// readlink(2) sets the access time, and there is no O_NOATIME for it.
fn put_back_atime(dir: BorrowedFd<'_>, name: &CStr, stat: &Statx) -> io::Result<()> {
    let StatxTimestamp { tv_sec, tv_nsec, .. } = stat.stx_atime;
    let times = Timestamps {
        last_access: Timespec { tv_sec, tv_nsec: tv_nsec.into() },
        last_modification: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
    };
    match utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW) {
        // Read-only: then readlink didn't set it either.
        Ok(()) | Err(Errno::ROFS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn stat_of(fd: BorrowedFd<'_>) -> io::Result<Statx> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    Ok(statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, mask)?)
}

/// Names and values; through /proc, since the xattr calls refuse an O_PATH descriptor.
fn xattrs(fd: BorrowedFd<'_>) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let mut names = vec![0u8; 65536];
    let got = match rustix::fs::listxattr(&path, &mut names) {
        Ok(got) => got,
        Err(Errno::NOTSUP) => 0,
        Err(error) => return Err(error.into()),
    };
    let mut all = BTreeMap::new();
    for name in names[..got].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0u8; 65536];
        let length = rustix::fs::getxattr(&path, name, &mut value)?;
        value.truncate(length);
        all.insert(name.to_vec(), value);
    }
    Ok(all)
}

fn file_type(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

fn is(stat: &Statx, kind: FileType) -> bool {
    file_type(stat) == kind
}

fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "file",
        FileType::Directory => "dir",
        FileType::Symlink => "symlink",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "char",
        FileType::BlockDevice => "block",
        FileType::Unknown => "unknown",
    }
}

fn flag_names(attributes: StatxAttributes) -> String {
    let known = [
        (StatxAttributes::APPEND, "append"),
        (StatxAttributes::IMMUTABLE, "immutable"),
        (StatxAttributes::NODUMP, "nodump"),
    ];
    let set: Vec<_> =
        known.iter().filter(|(flag, _)| attributes.contains(*flag)).map(|(_, name)| *name).collect();
    set.join(",")
}

fn time(stamp: StatxTimestamp) -> String {
    format!("{}.{:09}", stamp.tv_sec, stamp.tv_nsec)
}

fn write_line(out: &mut dyn Write, path: &[u8], object: &Object, group: Option<&str>) -> io::Result<()> {
    let stat = &object.stat;
    write!(out, "path={}", escape(path))?;
    if object.mount {
        return writeln!(out, " type=mount");
    }
    write!(
        out,
        " type={} mode={:04o} uid={} gid={} nlink={} size={} mtime={} atime={} flags={}",
        kind_name(file_type(stat)),
        stat.stx_mode & 0o7777,
        stat.stx_uid,
        stat.stx_gid,
        stat.stx_nlink,
        stat.stx_size,
        time(stat.stx_mtime),
        time(stat.stx_atime),
        flag_names(stat.stx_attributes),
    )?;
    if is(stat, FileType::CharacterDevice) || is(stat, FileType::BlockDevice) {
        write!(out, " rdev={}:{}", stat.stx_rdev_major, stat.stx_rdev_minor)?;
    }
    for (name, value) in &object.more {
        write!(out, " {name}={value}")?;
    }
    if let Some(group) = group {
        write!(out, " linked-with={group}")?;
    }
    writeln!(out)
}
