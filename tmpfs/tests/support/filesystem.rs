//! A tmpfs to save and to restore, a tree with everything in it, and what of it must come back.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, IFlags, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use stillframe_pgalloc::{
    AsyncPagesFileLoad, AsyncPagesFileSave, DigestTable, LoadOptions, MemoryFile, SaveOptions,
};
use stillframe_tmpfs::build::{BuildError, BuildOptions, build_tree, check_tree};
use stillframe_tmpfs::decode::decode_tree;
use stillframe_tmpfs::entry::Tree;
use stillframe_tmpfs::mount::{DefaultMode, TmpfsMount, mount_tmpfs, open_root, open_view, unmount, usage};
use stillframe_tmpfs::options::TmpfsOptions;
use stillframe_tmpfs::save::{SaveTreeError, TreeSummary, save_tree};
use stillframe_tmpfs::{IdMap, Ids};

/// A mounted tmpfs; gone when it is dropped.
pub struct Tmpfs {
    dir: tempfile::TempDir,
}

impl Tmpfs {
    pub fn new(options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        let mount = TmpfsMount {
            options: &TmpfsOptions::parse(&options).unwrap(),
            source: None,
            default_mode: DefaultMode::Absent,
            uid_map: &IdMap::default(),
            gid_map: &IdMap::default(),
            label: None,
        };
        mount_tmpfs(&mount, dir.path()).unwrap();
        Self { dir }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        unmount(self.dir.path()).unwrap();
    }
}

pub struct Saved {
    pub archive: Vec<u8>,
    pub summary: TreeSummary,
    pub pages: File,
    pub digests: DigestTable,
}

pub fn try_save(filesystem: &Tmpfs, ids: &Ids) -> Result<Saved, SaveTreeError> {
    let pages = tempfile::tempfile().unwrap();
    let save = AsyncPagesFileSave::new(pages.try_clone().unwrap(), SaveOptions::default()).unwrap();
    let memory = MemoryFile::main();
    let memory = save.register_memory_file(&memory).unwrap();
    let view = open_view(filesystem.path()).unwrap();
    let (archive, summary) = save_tree(&view, ids, &memory, Vec::new())?;
    let finished = save.finish().unwrap();
    Ok(Saved { archive, summary, pages, digests: finished.digests })
}

pub fn save(filesystem: &Tmpfs) -> Saved {
    try_save(filesystem, &Ids::default()).unwrap()
}

impl Saved {
    pub fn tree(&self) -> Tree {
        decode_tree(&self.archive, self.digests.pages_length()).unwrap()
    }

    pub fn restore(&self, filesystem: &Tmpfs, options: &BuildOptions) -> Result<(), BuildError> {
        let tree = self.tree();
        check_tree(&tree, options, &usage(filesystem.path()).unwrap())?;
        let pages = self.pages.try_clone().unwrap();
        let loader = AsyncPagesFileLoad::new(pages, self.digests.clone(), LoadOptions::default()).unwrap();
        let root = open_root(filesystem.path()).unwrap();
        let built = build_tree(&root, &tree, options, &loader)?;
        loader.finish().unwrap();
        built.finish()
    }
}

pub const DEVICES: fn() -> BuildOptions = || BuildOptions { ids: Ids::default(), devices: true };

/// Everything of a tree that a restore must bring back, by path; read through a view, so that looking
/// changes nothing.
pub fn describe(filesystem: &Tmpfs) -> BTreeMap<PathBuf, String> {
    let view = open_view(filesystem.path()).unwrap();
    let mut all = BTreeMap::new();
    describe_directory(&view, Path::new("/"), &mut all, &mut BTreeMap::new());
    all
}

pub fn describe_directory(
    dir: &File,
    at: &Path,
    all: &mut BTreeMap<PathBuf, String>,
    links: &mut BTreeMap<u64, PathBuf>,
) {
    let mut names: Vec<Vec<u8>> = rustix::fs::Dir::read_from(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_bytes().to_vec())
        .filter(|name| name != b"..")
        .collect();
    names.sort();
    for name in names {
        let path = if name == b"." { at.to_owned() } else { at.join(OsStr::from_bytes(&name)) };
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        let file = File::from(rustix::fs::openat(dir, name.as_slice(), flags, Mode::empty()).unwrap());
        let stat =
            rustix::fs::statx(&file, "", AtFlags::EMPTY_PATH, rustix::fs::StatxFlags::BASIC_STATS).unwrap();
        let proc = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let mut xattrs = vec![0; 65536];
        let length = rustix::fs::listxattr(&proc, &mut xattrs).unwrap();
        let mut names: Vec<&[u8]> =
            xattrs[..length].split(|b| *b == 0).filter(|name| !name.is_empty()).collect();
        names.sort_unstable();
        let value = |name: &[u8]| {
            let mut value = vec![0; 65536];
            let length = rustix::fs::getxattr(&proc, name, &mut value)
                .unwrap_or_else(|e| panic!("{path:?} {}: {e}", name.escape_ascii()));
            value[..length].to_vec()
        };
        let xattrs: Vec<_> =
            names.iter().map(|name| (name.escape_ascii().to_string(), value(name))).collect();
        let kind = u32::from(stat.stx_mode) & libc::S_IFMT;
        let content = match kind {
            libc::S_IFREG => digest(&File::open(&proc).unwrap()),
            libc::S_IFLNK => {
                rustix::fs::readlinkat(&file, "", Vec::new()).unwrap().to_string_lossy().into_owned()
            }
            libc::S_IFCHR | libc::S_IFBLK => format!("{}:{}", stat.stx_rdev_major, stat.stx_rdev_minor),
            _ => String::new(),
        };
        // A directory's size counts its entries on tmpfs, so it is compared too.
        let first = links.entry(stat.stx_ino).or_insert_with(|| path.clone()).clone();
        let text = format!(
            "{:o} {}:{} nlink {} size {} m {}.{:09} a {}.{:09} attr {:x} {xattrs:?} {content} first {first:?}",
            stat.stx_mode,
            stat.stx_uid,
            stat.stx_gid,
            stat.stx_nlink,
            stat.stx_size,
            stat.stx_mtime.tv_sec,
            stat.stx_mtime.tv_nsec,
            stat.stx_atime.tv_sec,
            stat.stx_atime.tv_nsec,
            stat.stx_attributes.bits() & 0x70,
        );
        all.insert(path.clone(), text);
        if kind == libc::S_IFDIR && name != b"." {
            let inner = rustix::fs::openat(dir, name.as_slice(), OFlags::DIRECTORY, Mode::empty()).unwrap();
            describe_directory(&File::from(inner), &path, all, links);
        }
    }
}

/// The data of a file with its place; holes and zeros are the same.
pub fn digest(mut file: &File) -> String {
    let size = file.metadata().unwrap().len();
    let mut text = String::new();
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(file.as_fd(), rustix::fs::SeekFrom::Data(at)) {
        let end = rustix::fs::seek(file.as_fd(), rustix::fs::SeekFrom::Hole(start)).unwrap().min(size);
        file.seek(SeekFrom::Start(start)).unwrap();
        let mut data = Vec::new();
        file.take(end - start).read_to_end(&mut data).unwrap();
        for (page, bytes) in data.chunks(4096).enumerate().filter(|(_, bytes)| bytes.iter().any(|b| *b != 0))
        {
            let sum = bytes.iter().fold(0u64, |sum, b| sum.wrapping_mul(31).wrapping_add(u64::from(*b)));
            text += &format!("{}:{sum:x} ", start + page as u64 * 4096);
        }
        at = end;
        if at >= size {
            break;
        }
    }
    text
}

pub fn set_times(path: &Path, mtime: (i64, i64), atime: (i64, i64)) {
    let time = |(tv_sec, tv_nsec)| Timespec { tv_sec, tv_nsec };
    let times = Timestamps { last_access: time(atime), last_modification: time(mtime) };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// Sets both times of what may have gone.
pub fn set_times_if_there(path: &Path, (tv_sec, tv_nsec): (i64, i64)) {
    let time = Timespec { tv_sec, tv_nsec };
    let times = Timestamps { last_access: time, last_modification: time };
    let _ = rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW);
}

pub fn noise(length: usize, seed: u8) -> Vec<u8> {
    let mut state = u64::from(seed) + 0x9e37_79b9;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        })
        .collect()
}

/// One of everything that a tmpfs can hold.
pub fn fill(root: &Path) {
    fill_up_to(root, i64::MAX as u64);
}

/// The largest file that ext4 can hold.
pub const EXT4_LARGEST: u64 = ((1 << 32) - 1) * 4096;

/// The same where files can have `largest` bytes.
pub fn fill_up_to(root: &Path, largest: u64) {
    let at = |name: &[u8]| root.join(OsStr::from_bytes(name));
    for (name, length) in [("empty", 0), ("one", 1), ("page", 4096), ("page+1", 4097), ("large", 3_000_001)] {
        fs::write(root.join(name), noise(length, length as u8)).unwrap();
    }
    let holes = OpenOptions::new().write(true).create_new(true).open(root.join("holes")).unwrap();
    holes.set_len(largest).unwrap();
    for offset in [0, 1 << 20, (1 << 40) + 5, largest - 10] {
        holes.write_all_at(b"data", offset).unwrap();
    }
    fs::write(root.join("zeros"), vec![0; 100_000]).unwrap();
    let mut zero_page = noise(5 * 4096, 9);
    zero_page[8192..12288].fill(0);
    fs::write(root.join("zero page"), zero_page).unwrap();
    for name in [&b"caf\xe9"[..], b"new\nline", b" lead", b"-rf", b"\x01\x7f\xff", &[b'n'; 255], b"a=b%c"] {
        fs::write(at(name), name).unwrap();
    }
    symlink("/nonexistent/dangling", root.join("link")).unwrap();
    symlink(OsStr::from_bytes(&[b't'; 4095]), root.join("long link")).unwrap();
    let mknod = |name: &str, kind, major, minor| {
        let device = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(CWD, root.join(name), kind, Mode::RUSR, device).unwrap();
    };
    mknod("fifo", FileType::Fifo, 0, 0);
    mknod("socket", FileType::Socket, 0, 0);
    mknod("whiteout", FileType::CharacterDevice, 0, 0);
    mknod("null", FileType::CharacterDevice, 1, 3);
    mknod("disk", FileType::BlockDevice, 4095, 1_048_575);
    fs::create_dir_all(root.join("dir/sub/empty")).unwrap();
    for (from, to) in
        [("large", "dir/hard"), ("large", "dir/sub/hard"), ("link", "dir/hardlink"), ("fifo", "dir/f")]
    {
        rustix::fs::linkat(CWD, root.join(from), CWD, root.join(to), AtFlags::empty()).unwrap();
    }
    for (index, name) in ["one", "dir", "fifo", "null"].iter().enumerate() {
        let id = [1, 65_534, 4_000_000_000, 2_097_152][index];
        let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id + 1));
        rustix::fs::chownat(CWD, root.join(name), Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
    for (name, mode) in [("page", 0), ("one", 0o6755), ("dir", 0o3770), ("dir/sub", 0o1777), ("fifo", 0o624)]
    {
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    // cap_net_raw=ep, version 2, as setcap(8) writes it.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // user::rw-,user:1:r--,group::r--,mask::r--,other::---
    let entry = |tag: u8, perm: u8, id: u32| [&[tag, 0, perm, 0][..], &id.to_le_bytes()].concat();
    let none = u32::MAX;
    let acl = [entry(1, 6, none), entry(2, 4, 1), entry(4, 4, none), entry(16, 4, none), entry(32, 0, none)]
        .concat();
    let acl = [&[2, 0, 0, 0][..], &acl].concat();
    for (name, xattr, value) in [
        ("page+1", "user.plain", &b"value"[..]),
        ("page+1", "user.empty", b""),
        ("page+1", "user.bin\u{e9}=%ary", b"\0\n=\xff\n"),
        ("page+1", "trusted.x", b"t"),
        ("large", "security.capability", &capability),
        ("page", "system.posix_acl_access", &acl),
        ("dir", "system.posix_acl_default", &acl),
        ("dir", "user.big", &[b'v'; 30_000]),
        ("link", "trusted.onlink", b"l"),
        ("null", "trusted.ondevice", b"d"),
    ] {
        rustix::fs::lsetxattr(root.join(name), xattr, value, XattrFlags::empty()).unwrap();
    }
    for (name, mtime, atime) in [
        ("one", (1, 1), (2, 999_999_999)),
        ("page", (-1, 1), (-1_000_000, 0)),
        ("link", (1_700_000_000, 123_456_789), (1_600_000_000, 987_654_321)),
        ("fifo", (0, 0), (0, 0)),
        ("dir/sub/empty", (5_000_000_000, 5), (6_000_000_000, 6)),
        ("dir/sub", (10, 11), (12, 13)),
        ("dir", (20, 21), (-22, 23)),
        ("large", (33, 44), (55, 66)),
        ("holes", (77, 88), (99, 11)),
    ] {
        set_times(&root.join(name), mtime, atime);
    }
    for (name, flags) in
        [("one", IFlags::IMMUTABLE), ("zero page", IFlags::APPEND), ("dir/sub", IFlags::NODUMP)]
    {
        let file = File::open(root.join(name)).unwrap();
        let own = rustix::fs::ioctl_getflags(&file).unwrap();
        rustix::fs::ioctl_setflags(&file, own | flags).unwrap();
    }
    fs::set_permissions(root, fs::Permissions::from_mode(0o1741)).unwrap();
    std::os::unix::fs::chown(root, Some(7), Some(8)).unwrap();
    set_times(root, (111, 222), (333, 444));
}
