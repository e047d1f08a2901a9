//! Filestores: a filesystem on disk, in one sparse host file that only we know of.
//!
//! A filestore is formatted ext4, loop-mounted, and handed to a container as a tmpfs of ours is; its
//! limit is its size. It holds nothing that must outlive a crash, so it has no journal and no barriers. Measured, in
//! the median of four runs: without a journal fsync(2) is 1.7 and creating files 1.5 times as fast, and an
//! empty one takes 4 MiB of the host instead of 70 MiB. Nor does it discard blocks when they are freed, which
//! without a journal the kernel does one by one (removing 10,000 files took more than 13 s instead of 0.3 s): they
//! are given back by [`settle`], before a save.
//!
//! States: created -> formatted or loaded (from an image) -> mounted <-> frozen -> unmounted -> removed. A
//! failure leaves no loop device: it goes with its last user ([`crate::sys::loop_device`]). A frozen filesystem
//! is thawed when its guard is dropped; a process that dies with it leaves it frozen, so whoever finds
//! one thaws it ([`thaw`]).
//!
//! A filestore out of an image is hostile: its superblock is judged by us, then e2fsck judges the rest, before the
//! kernel sees it, and what it holds is compared with the tree ([`crate::private::verify`]).

pub mod reflink;
mod tools;

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Gid, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags};

use crate::entry::{Timestamp, Tree};
use crate::mount::{self, DefaultMode, MountError, TmpfsMount};
use crate::options::{self, DataOption, TmpfsOptions};
use crate::sys::{filesystem, loop_device};

/// Bytes of a block, and of the loop device's: whole pages, so that extents are too.
pub const BLOCK: u64 = 4096;

/// Features that our filesystems have, by name and as the superblock has them: compatible, incompatible,
/// compatible for reading.
const FEATURES: &str = "none,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,ea_inode,\
     sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";
const FEATURE_BITS: [u32; 3] = [0x0038, 0x06c2, 0x046b];

/// Why a filestore couldn't be made, used or read.
#[derive(Debug, thiserror::Error)]
pub enum FilestoreError {
    /// A call failed.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// What on.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// An option means nothing on disk.
    #[error("option {option:?} can't be used with a filesystem on disk; remove it, or use medium=memory")]
    Option {
        /// Its key.
        option: String,
    },
    /// The size is too large.
    #[error("size {0:?} is more than a file can have")]
    Size(String),
    /// A program of e2fsprogs can't be run.
    #[error("run {program} (is the package e2fsprogs installed?)")]
    NoTool {
        /// The program.
        program: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program of e2fsprogs failed.
    #[error("{program} {path} failed with status {status}: {output}")]
    Tool {
        /// The program.
        program: &'static str,
        /// The filestore.
        path: PathBuf,
        /// Its exit status.
        status: String,
        /// What it said.
        output: String,
    },
    /// A loaded filestore isn't one that we have made.
    #[error("the saved filestore is no filesystem of Stillframe's: {0}")]
    Foreign(&'static str),
    /// The kernel didn't take it.
    #[error("the kernel made no filesystem of {path}: {log}")]
    Kernel {
        /// The filestore.
        path: PathBuf,
        /// The kernel's messages, or that there are none.
        log: String,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// It couldn't be mounted.
    #[error(transparent)]
    Mount(#[from] MountError),
}

fn failed<E: Into<io::Error>>(operation: &'static str, path: &Path) -> impl FnOnce(E) -> FilestoreError {
    move |error| FilestoreError::File { operation, path: path.to_owned(), source: error.into() }
}

/// The bytes that the options mean, in whole blocks: `size=`, `nr_blocks=`, else half of the memory, as a tmpfs;
/// 0, a tmpfs's "unlimited", is the size of the filesystem that holds `directory`.
pub fn size(options: &TmpfsOptions, directory: &Path) -> Result<u64, FilestoreError> {
    let memory = || {
        let pages = nix::unistd::sysconf(nix::unistd::SysconfVar::_PHYS_PAGES).ok().flatten().unwrap_or(0);
        pages.unsigned_abs().saturating_mul(rustix::param::page_size() as u64)
    };
    // The last of the two is what counts, as with a tmpfs.
    let given = options.data.iter().rev().find(|option| option.key == "size" || option.key == "nr_blocks");
    let size = match given {
        None => memory() / 2,
        Some(DataOption { key, value }) => {
            let text = value.as_deref().unwrap_or_default();
            let unit = if key == "size" { 1 } else { BLOCK };
            let size = options::bytes(text, memory()).and_then(|number| number.checked_mul(unit));
            size.ok_or_else(|| FilestoreError::Size(text.to_owned()))?
        }
    };
    let size = match size {
        0 => {
            let space = rustix::fs::statvfs(directory).map_err(failed("statvfs", directory))?;
            space.f_blocks.saturating_mul(space.f_frsize)
        }
        size => size,
    };
    let whole = size.checked_next_multiple_of(BLOCK).filter(|size| *size <= i64::MAX as u64);
    whole.ok_or_else(|| FilestoreError::Size(size.to_string()))
}

/// Makes the empty sparse file `path`, which nobody else can read, with all its blocks still to be allocated.
pub fn create(path: &Path, size: u64) -> Result<(), FilestoreError> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path).map_err(failed("make", path))?;
    file.set_len(size).map_err(failed("give a size to", path))
}

/// Puts an empty file in the place of `path`, for a saved filestore to be loaded into; the old file may be in use.
pub fn replace(path: &Path) -> Result<File, FilestoreError> {
    fs::remove_file(path).map_err(failed("remove", path))?;
    create(path, 0)?;
    OpenOptions::new().read(true).write(true).open(path).map_err(failed("open", path))
}

/// Makes an empty filesystem in the file, with `nr_inodes=` inodes if that is among the options.
pub fn format(path: &Path, options: &TmpfsOptions) -> Result<(), FilestoreError> {
    let size = fs::metadata(path).map_err(failed("stat", path))?.len();
    let inodes = options.nr_inodes.as_deref().and_then(|text| options::bytes(text, 0));
    let inodes = match inodes.filter(|inodes| *inodes > 0) {
        // Eleven are its own.
        Some(inodes) => vec!["-N".to_owned(), inodes.saturating_add(11).to_string()],
        // As mke2fs.conf has it: small filesystems have small files.
        None => vec!["-i".to_owned(), if size < 512 << 20 { "4096" } else { "16384" }.to_owned()],
    };
    let fixed = ["-F", "-q", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0", "-O", FEATURES];
    let mut arguments: Vec<String> = fixed.map(String::from).to_vec();
    arguments.extend(inodes);
    arguments.extend(["-E".to_owned(), "lazy_itable_init=0,root_owner=0:0".to_owned()]);
    tools::run("mkfs.ext4", &arguments, path, &["0"])
}

/// Judges a filestore that was loaded from an image, mends what a copy of a mounted filesystem has (counts, files
/// without a name), and makes it `size` bytes large, which must not be less than it has.
pub fn adopt(path: &Path, size: u64) -> Result<(), FilestoreError> {
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed("open", path))?;
    let has = file.metadata().map_err(failed("stat", path))?.len();
    let mut superblock = [0; 1024];
    file.read_exact_at(&mut superblock, 1024).map_err(|_| FilestoreError::Foreign("it has no superblock"))?;
    judge(&superblock, has).map_err(FilestoreError::Foreign)?;
    tools::run("e2fsck", &["-f", "-p"].map(String::from), path, &["0", "1"])?;
    if size > has {
        file.set_len(size).map_err(failed("give a size to", path))?;
        tools::run("resize2fs", &["-f"].map(String::from), path, &["0"])?;
    }
    Ok(())
}

/// Whether the superblock (ext4_super_block of fs/ext4/ext4.h) is of a filesystem as [`format`] makes them.
fn judge(superblock: &[u8; 1024], size: u64) -> Result<(), &'static str> {
    let u16_at = |at: usize| u16::from_le_bytes([superblock[at], superblock[at + 1]]);
    let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
    if u16_at(0x38) != 0xef53 {
        return Err("it has no superblock");
    }
    if u32_at(0x18) != 2 || u16_at(0x58) != 256 {
        return Err("its blocks or inodes have another size");
    }
    for (at, known) in [0x5c, 0x60, 0x64].into_iter().zip(FEATURE_BITS) {
        if u32_at(at) & !known != 0 {
            return Err("it has features that ours never have");
        }
    }
    let blocks = u64::from(u32_at(0x150)) << 32 | u64::from(u32_at(0x04));
    if blocks.checked_mul(BLOCK).is_none_or(|bytes| bytes > size) {
        return Err("it is larger than its file");
    }
    Ok(())
}

/// What a filestore's root directory is.
#[derive(Clone, Copy, Debug)]
pub enum Root<'a> {
    /// New: it gets mode and owner as a tmpfs's would.
    New,
    /// As it was saved; this is its tree, for what e2fsck has changed.
    Saved(&'a Tree),
}

/// Mounts the filestore `path` on the directory `target`: private, never read-only. The request's source
/// is not used.
pub fn mount(
    path: &Path,
    request: &TmpfsMount<'_>,
    root: Root<'_>,
    target: &Path,
) -> Result<(), FilestoreError> {
    let options = kernel_options(request)?;
    let owner = owner(request)?;
    let target_fd = mount::open_directory(target)?;
    let backing = OpenOptions::new().read(true).write(true).open(path).map_err(failed("open", path))?;
    let (device, _held) = loop_device::attach(backing.as_fd(), BLOCK as u32)
        .map_err(failed("attach a loop device (is the module loop loaded?) to", path))?;
    let context = rustix::mount::fsopen("ext4", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(failed("open the kernel's ext4 for", path))?;
    let kernel = |context: &OwnedFd, errno: Errno| FilestoreError::Kernel {
        path: path.to_owned(),
        log: mount::messages(context.as_fd()),
        source: errno.into(),
    };
    let source = DataOption { key: "source".to_owned(), value: Some(device) };
    for option in std::iter::once(&source).chain(&options) {
        mount::configure(&context, option).map_err(|errno| kernel(&context, errno))?;
    }
    rustix::mount::fsconfig_create(&context).map_err(|errno| kernel(&context, errno))?;
    let flags = mount::attributes(request.options.flags);
    let mounted = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)
        .map_err(failed("fsmount", path))?;
    let directory = mount::reopen(mounted.as_fd(), target)?;
    let done = match root {
        Root::New => set_up_root(&directory, request, owner),
        Root::Saved(tree) => mend_root(&directory, tree),
    };
    done.map_err(failed("set up the root directory of", path))?;
    Ok(mount::attach(mounted.as_fd(), target_fd.as_fd(), target)?)
}

/// What is told to the kernel besides the device.
fn kernel_options(request: &TmpfsMount<'_>) -> Result<Vec<DataOption>, FilestoreError> {
    let flag = |key: &str| DataOption { key: key.to_owned(), value: None };
    let value = |key: &str, value: &str| DataOption { key: key.to_owned(), value: Some(value.to_owned()) };
    let mut all = vec![
        flag("noinit_itable"),
        flag("nobarrier"),
        flag("noauto_da_alloc"),
        // Over whatever a hostile superblock says.
        value("errors", "remount-ro"),
    ];
    for option in &request.options.data {
        match option.key.as_str() {
            "size" | "nr_blocks" | "nr_inodes" => {}
            // They say how memory is used.
            "huge" | "mpol" | "noswap" | "inode32" | "inode64" => {}
            "sync" | "dirsync" | "lazytime" | "mand" | "context" | "fscontext" | "defcontext"
            | "rootcontext" => {
                all.push(option.clone());
            }
            other => return Err(FilestoreError::Option { option: other.to_owned() }),
        }
    }
    all.extend(request.label.filter(|label| !label.is_empty()).map(|label| value("context", label)));
    Ok(all)
}

fn owner(request: &TmpfsMount<'_>) -> Result<(u32, u32), MountError> {
    let TmpfsMount { options, uid_map, gid_map, .. } = request;
    let (uid, gid) = (options.uid.unwrap_or(0), options.gid.unwrap_or(0));
    let uid = uid_map.to_host(uid).ok_or(MountError::Unmapped { key: "uid", id: uid })?;
    let gid = gid_map.to_host(gid).ok_or(MountError::Unmapped { key: "gid", id: gid })?;
    Ok((uid, gid))
}

const LOST_AND_FOUND: &str = "lost+found";

fn set_up_root(root: &File, request: &TmpfsMount<'_>, (uid, gid): (u32, u32)) -> io::Result<()> {
    rustix::fs::unlinkat(root, LOST_AND_FOUND, AtFlags::REMOVEDIR)?;
    let given = request.options.mode;
    let mode = match request.default_mode {
        DefaultMode::Absent => given.unwrap_or(0o1777),
        DefaultMode::Option(below) => given.unwrap_or(below),
        DefaultMode::Chmod(below) => below,
    };
    rustix::fs::fchown(root, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    root.set_permissions(Permissions::from_mode(mode & 0o7777))
}

/// e2fsck makes the directory lost+found where there is none.
fn mend_root(root: &File, tree: &Tree) -> io::Result<()> {
    if tree.root_entry(LOST_AND_FOUND.as_bytes()).is_none() {
        match rustix::fs::unlinkat(root, LOST_AND_FOUND, AtFlags::REMOVEDIR) {
            // What it found there, the comparison with the tree will tell.
            Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    let Some(saved) = tree.entries.first().map(|entry| &entry.attributes) else { return Ok(()) };
    let time = |t: Timestamp| Timespec { tv_sec: t.sec, tv_nsec: t.nsec.into() };
    let times = Timestamps { last_access: time(saved.atime), last_modification: time(saved.mtime) };
    Ok(rustix::fs::futimens(root, &times)?)
}

/// Whether e2fsck would take away what the tree has: it wants lost+found to be a directory.
pub fn survives_e2fsck(tree: &Tree) -> bool {
    tree.root_entry(LOST_AND_FOUND.as_bytes()).is_none_or(|entry| entry.kind == crate::entry::Kind::Directory)
}

/// Writes back what the filesystem at `mountpoint` has in memory and gives its free blocks back to the host,
/// so that a freeze after it is short and a save holds no deleted files.
pub fn settle(mountpoint: &Path) -> Result<(), FilestoreError> {
    let root = mount::open_root(mountpoint)?;
    rustix::fs::syncfs(&root).map_err(failed("sync", mountpoint))?;
    // Only a matter of space.
    if let Err(error) = filesystem::trim(&root) {
        tracing::warn!(path = %mountpoint.display(), %error, "free blocks couldn't be given back");
    }
    Ok(())
}

/// A frozen filesystem: its file is consistent and still. Thawed when this is dropped.
#[derive(Debug)]
pub struct Frozen {
    root: File,
    mountpoint: PathBuf,
}

/// Freezes the filesystem at `mountpoint`. Whoever writes to it sleeps and can't be killed until it is thawed.
pub fn freeze(mountpoint: &Path) -> Result<Frozen, FilestoreError> {
    let root = mount::open_root(mountpoint)?;
    rustix::fs::syncfs(&root).map_err(failed("sync", mountpoint))?;
    filesystem::freeze(&root).map_err(failed("freeze", mountpoint))?;
    Ok(Frozen { root, mountpoint: mountpoint.to_owned() })
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Err(error) = filesystem::thaw(&self.root) {
            tracing::error!(path = %self.mountpoint.display(), %error, "the filesystem couldn't be thawed");
        }
    }
}

/// Thaws the filesystem at `mountpoint` if a process that died has left it frozen.
pub fn thaw(mountpoint: &Path) -> Result<(), FilestoreError> {
    let root = mount::open_root(mountpoint)?;
    match filesystem::thaw(&root) {
        Err(error) if error.raw_os_error() != Some(libc::EINVAL) => Err(failed("thaw", mountpoint)(error)),
        _ => Ok(()),
    }
}
