//! Mounting a tmpfs for a container, looking into it, and letting it go.
//!
//! A container's tmpfs is mounted by us on the host and handed to runc as a bind mount of its root.
//! The container must not be able to tell: the superblock gets the options of the OCI mount, our mount
//! gets its flags (a bind mount inherits them), `ro` excepted, which runc too applies to its own mount
//! only. What each runc does was found by running it; tests/runc.rs compares.
//!
//! The walker and the restorer never use our mount itself but a detached clone of it: nothing can be
//! mounted over a directory of a clone, a clone needs no path, and it has flags of its own. A clone
//! holds the superblock until its descriptors are closed, also after `unmount`.
//!
//! Built from fsopen(2), fsconfig(2), fsmount(2), move_mount(2), open_tree(2) and mount_setattr(2):
//! Linux 5.14 (for `nosymfollow`). The filesystem is attached as the last step, complete; a failure
//! before it leaves nothing behind. Everything here needs CAP_SYS_ADMIN.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FsWord, Mode, OFlags, StatFs, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};
use rustix::mount::{fsconfig_reconfigure, fsconfig_set_string, fspick};

use crate::IdMap;
use crate::options::{DataOption, MountFlags, TmpfsOptions};
use crate::sys::mount::MountAttr;

/// statfs(2)'s `f_type` of the filesystems that are ours: tmpfs, and ext4 on a filestore.
const MAGICS: [FsWord; 2] = [TMPFS_MAGIC, 0xef53];
const TMPFS_MAGIC: FsWord = 0x0102_1994;

/// A tmpfs to be mounted.
#[derive(Clone, Copy, Debug)]
pub struct TmpfsMount<'a> {
    /// Options of the OCI mount.
    pub options: &'a TmpfsOptions,
    /// The OCI mount's source, as mountinfo shows it; none is the empty string, as with runc.
    pub source: Option<&'a str>,
    /// What the directory below the mountpoint does to the root's mode.
    pub default_mode: DefaultMode,
    /// The container's user ids; without a mapping there is no user namespace.
    pub uid_map: &'a IdMap,
    /// The container's group ids.
    pub gid_map: &'a IdMap,
    /// SELinux label of everything on it (the spec's mountLabel).
    pub label: Option<&'a str>,
}

/// How runc makes the mode of the directory in the rootfs the mode of the tmpfs mounted over it.
///
/// runc creates a directory that is missing (0755) before it mounts, so `Absent` means: absent when
/// the container was created. (runc 1.2.8, 1.3.3 and 1.4.0-rc.3 confused the two.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DefaultMode {
    /// There was no directory: the `mode` option, else 1777.
    #[default]
    Absent,
    /// runc up to 1.1.7: chmod(2) to the directory's mode after mounting, even where there is a `mode`
    /// option. mountinfo shows the option, stat(2) the directory's mode.
    Chmod(u32),
    /// runc from 1.1.8 on: `mode=` of the directory where there is no `mode` option.
    Option(u32),
}

/// Space of a tmpfs; `None` is unlimited, and what is unlimited isn't counted by statfs(2) either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Limit, bytes.
    pub size_bytes: Option<u64>,
    /// In use, bytes; known where there is a limit.
    pub used_bytes: Option<u64>,
    /// Limit, inodes.
    pub inodes: Option<u64>,
    /// In use, inodes; known where there is a limit.
    pub used_inodes: Option<u64>,
}

/// Why a tmpfs couldn't be mounted, opened or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel refused an option; `log` is what it says itself.
    #[error("the kernel refused tmpfs option {option:?}: {log}")]
    Refused {
        /// `key=value`.
        option: String,
        /// The kernel's messages, or that there are none.
        log: String,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// The kernel refused the options together.
    #[error("the kernel made no tmpfs with options {options:?}: {log}")]
    Create {
        /// All of them, comma-separated.
        options: String,
        /// The kernel's messages, or that there are none.
        log: String,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// An id of the options isn't mapped into the user namespace.
    #[error("tmpfs option {key}={id} is not mapped into the container's user namespace")]
    Unmapped {
        /// `uid` or `gid`.
        key: &'static str,
        /// The container's id.
        id: u32,
    },
    /// An option that the kernel gives to no tmpfs of a user namespace.
    #[error("tmpfs option {option:?} is not allowed in a user namespace")]
    Privileged {
        /// Its key.
        option: String,
    },
    /// It isn't a whole mounted filesystem of a kind that is ours.
    #[error("{path} is {what}, not the root of a mounted tmpfs or filestore")]
    NotOurs {
        /// What was looked at.
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
    /// A system call failed.
    #[error("{call} {path}")]
    System {
        /// The call.
        call: &'static str,
        /// What on.
        path: PathBuf,
        /// The errno.
        #[source]
        source: io::Error,
    },
}

pub(crate) fn failed<E: Into<io::Error>>(call: &'static str, path: &Path) -> impl FnOnce(E) -> MountError {
    move |error| MountError::System { call, path: path.to_owned(), source: error.into() }
}

/// Mounts a fresh tmpfs on the directory `target`: private, never read-only.
///
/// If the mount that holds `target` is a shared one, its peers and slaves in other mount namespaces
/// get a copy that outlives `unmount` (removing the directory `target` ends it):
/// [`make_private_mountpoint`] above it avoids that.
pub fn mount_tmpfs(request: &TmpfsMount<'_>, target: &Path) -> Result<(), MountError> {
    let options = superblock_options(request)?;
    let target_fd = open_directory(target)?;
    let context =
        rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen", target))?;
    for option in &options {
        configure(&context, option).map_err(|errno| MountError::Refused {
            option: text(option),
            log: messages(context.as_fd()),
            source: errno.into(),
        })?;
    }
    rustix::mount::fsconfig_create(&context).map_err(|errno| MountError::Create {
        options: options.iter().map(text).collect::<Vec<_>>().join(","),
        log: messages(context.as_fd()),
        source: errno.into(),
    })?;
    let mount =
        rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes(request.options.flags))
            .map_err(failed("fsmount", target))?;
    if let DefaultMode::Chmod(mode) = request.default_mode {
        let root = reopen(mount.as_fd(), target)?;
        root.set_permissions(Permissions::from_mode(mode & 0o7777)).map_err(failed("fchmod", target))?;
    }
    attach(mount.as_fd(), target_fd.as_fd(), target)
}

/// Makes `dir` a mountpoint (a bind mount of itself, with what is mounted below), and private, so that
/// what is mounted below it from now on stays in this mount namespace. Idempotent.
pub fn make_private_mountpoint(dir: &Path) -> Result<(), MountError> {
    let fd = open_directory(dir)?;
    if is_mount_root(fd.as_fd(), dir)? {
        return MountAttr::private(MountAttrFlags::empty())
            .apply(fd.as_fd())
            .map_err(failed("mount_setattr", dir));
    }
    let clone = clone_tree(fd.as_fd(), OpenTreeFlags::AT_RECURSIVE, dir)?;
    attach(clone.as_fd(), fd.as_fd(), dir)
}

/// Puts a detached mount on a directory, then makes it private: a mount below a shared one becomes
/// shared by being put there.
pub(crate) fn attach(
    mount: BorrowedFd<'_>,
    target_fd: BorrowedFd<'_>,
    target: &Path,
) -> Result<(), MountError> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, "", target_fd, "", flags).map_err(failed("move_mount", target))?;
    MountAttr::private(MountAttrFlags::empty()).apply(mount).map_err(failed("mount_setattr", target))
}

/// What fsconfig(2) is told, in order.
fn superblock_options(request: &TmpfsMount<'_>) -> Result<Vec<DataOption>, MountError> {
    let &TmpfsMount { options, source, default_mode, uid_map, gid_map, label } = request;
    let option = |key: &str, value: String| DataOption { key: key.into(), value: Some(value) };
    let mut all = vec![option("source", source.unwrap_or_default().into())];
    if !uid_map.0.is_empty() {
        // shmem_parse_one and shmem_fill_super refuse these to a mounter without CAP_SYS_ADMIN.
        if let Some(privileged) = options.data.iter().find(|o| o.key == "noswap" || o.key.contains("quota")) {
            return Err(MountError::Privileged { option: privileged.key.clone() });
        }
    }
    all.extend(options.data.iter().cloned());
    let mode = match default_mode {
        DefaultMode::Option(mode) => options.mode.or(Some(mode & 0o7777)),
        DefaultMode::Absent | DefaultMode::Chmod(_) => options.mode,
    };
    all.extend(mode.map(|mode| option("mode", format!("{mode:o}"))));
    for (key, id, map) in [("uid", options.uid, uid_map), ("gid", options.gid, gid_map)] {
        // In a user namespace the default owner is its root, whom the host knows by another number.
        let id = if map.0.is_empty() { id } else { Some(id.unwrap_or(0)) };
        if let Some(id) = id {
            let host = map.to_host(id).ok_or(MountError::Unmapped { key, id })?;
            all.push(option(key, host.to_string()));
        }
    }
    all.extend(label.filter(|label| !label.is_empty()).map(|label| option("context", label.into())));
    Ok(all)
}

pub(crate) fn configure(context: &OwnedFd, option: &DataOption) -> Result<(), Errno> {
    match &option.value {
        Some(value) => rustix::mount::fsconfig_set_string(context, option.key.as_str(), value.as_str()),
        None => rustix::mount::fsconfig_set_flag(context, option.key.as_str()),
    }
}

pub(crate) fn text(option: &DataOption) -> String {
    match &option.value {
        Some(value) => format!("{}={value}", option.key),
        None => option.key.clone(),
    }
}

/// The messages that the kernel left in a filesystem context, each "e tmpfs: Bad value for 'size'".
pub(crate) fn messages(context: BorrowedFd<'_>) -> String {
    let mut all = Vec::new();
    let mut buffer = [0; 1024];
    // One message a read; the kernel keeps eight at most, then it is ENODATA.
    while let Ok(length @ 1..) = rustix::io::read(context, &mut buffer) {
        all.push(String::from_utf8_lossy(&buffer[..length]).trim().to_owned());
    }
    if all.is_empty() { "it gave no reason".into() } else { all.join("; ") }
}

/// The attributes of our mount, as mount(2) would derive them from the same flags; never read-only.
pub(crate) fn attributes(flags: MountFlags) -> MountAttrFlags {
    let mut attributes = MountAttrFlags::empty();
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOSUID, flags.nosuid);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, flags.nodev);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, flags.noexec);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NODIRATIME, flags.nodiratime);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW, flags.nosymfollow);
    attributes.set(MountAttrFlags::MOUNT_ATTR_STRICTATIME, flags.strictatime);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOATIME, flags.noatime && !flags.strictatime);
    attributes
}

/// The root directory of the filesystem at `mountpoint` through a mount of its own that is read-only,
/// changes no access time, follows no symbolic link and that nothing can be mounted into. `openat` and
/// `open_by_handle_at` relative to it stay on that mount.
pub fn open_view(mountpoint: &Path) -> Result<File, MountError> {
    open_clone(mountpoint, MountAttr::private(CLONE | MountAttrFlags::MOUNT_ATTR_RDONLY))
}

/// The root directory of the filesystem at `mountpoint` through a mount of its own that is writable, changes
/// no access time and follows no symbolic link. Device nodes can be made, not opened: `nodev` forbids
/// only that.
pub fn open_root(mountpoint: &Path) -> Result<File, MountError> {
    // The clone of a read-only mount (a volume taken as it is) would be read-only.
    let attributes = MountAttr::private(CLONE).without(MountAttrFlags::MOUNT_ATTR_RDONLY);
    open_clone(mountpoint, attributes)
}

/// The flags of every clone: whatever a container put there, it can't act on us.
const CLONE: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOATIME
    .union(MountAttrFlags::MOUNT_ATTR_NOSUID)
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC)
    .union(MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW);

fn open_clone(mountpoint: &Path, attributes: MountAttr) -> Result<File, MountError> {
    let fd = open_filesystem(mountpoint)?;
    let clone = clone_tree(fd.as_fd(), OpenTreeFlags::empty(), mountpoint)?;
    attributes.apply(clone.as_fd()).map_err(failed("mount_setattr", mountpoint))?;
    reopen(clone.as_fd(), mountpoint)
}

/// Whether a tmpfs is mounted at `path`, shown from its root on.
pub fn is_whole_tmpfs(path: &Path) -> bool {
    let is_tmpfs = |fd: &OwnedFd| rustix::fs::fstatfs(fd).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC);
    open_filesystem(path).is_ok_and(|fd| is_tmpfs(&fd))
}

/// Mounts the filesystem that is mounted at `source` on the directory `target` as well: private, without
/// what is mounted below it. It lives as long as either.
pub fn mount_again(source: &Path, target: &Path) -> Result<(), MountError> {
    let fd = open_filesystem(source)?;
    let clone = clone_tree(fd.as_fd(), OpenTreeFlags::empty(), source)?;
    let target_fd = open_directory(target)?;
    attach(clone.as_fd(), target_fd.as_fd(), target)
}

/// Detaches what is mounted at `target` (the topmost mount); nothing mounted or no such path is fine.
/// The filesystem lives on in a container that has it, and as long as descriptors of it are open.
pub fn unmount(target: &Path) -> Result<(), MountError> {
    match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => Ok(()),
        Err(errno) => Err(failed("umount2", target)(errno)),
    }
}

/// Changes an option of the superblock of the filesystem that has `root`, open on any mount of it.
pub(crate) fn reconfigure(root: &File, option: &str, value: &str) -> io::Result<()> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let context = fspick(root, "", flags)?;
    fsconfig_set_string(context.as_fd(), option, value)?;
    Ok(fsconfig_reconfigure(context.as_fd())?)
}

/// Limits and use of the filesystem at `mountpoint`.
pub fn usage(mountpoint: &Path) -> Result<Usage, MountError> {
    let fd = open_filesystem(mountpoint)?;
    let space = rustix::fs::fstatfs(&fd).map_err(failed("fstatfs", mountpoint))?;
    Ok(Usage::of(&space))
}

/// Limits and use of the filesystem that has `root`, if it is a tmpfs.
pub(crate) fn tmpfs_usage(root: &File) -> io::Result<Option<Usage>> {
    let space = rustix::fs::fstatfs(root)?;
    Ok((space.f_type == TMPFS_MAGIC).then(|| Usage::of(&space)))
}

impl Usage {
    fn of(space: &StatFs) -> Self {
        let block = u64::try_from(space.f_bsize).unwrap_or_default();
        let limited = |limit: u64, free: u64| (limit != 0).then(|| (limit, limit.saturating_sub(free)));
        let blocks = limited(space.f_blocks, space.f_bfree);
        let inodes = limited(space.f_files, space.f_ffree);
        Self {
            size_bytes: blocks.map(|(limit, _)| limit.saturating_mul(block)),
            used_bytes: blocks.map(|(_, used)| used.saturating_mul(block)),
            inodes: inodes.map(|(limit, _)| limit),
            used_inodes: inodes.map(|(_, used)| used),
        }
    }
}

/// An O_PATH descriptor of `path`, which must be the root of a whole filesystem.
fn open_filesystem(path: &Path) -> Result<OwnedFd, MountError> {
    let not = |what| MountError::NotOurs { path: path.to_owned(), what };
    let fd = open_directory(path)?;
    if !MAGICS.contains(&rustix::fs::fstatfs(&fd).map_err(failed("fstatfs", path))?.f_type) {
        return Err(not("on another filesystem"));
    }
    if !is_mount_root(fd.as_fd(), path)? {
        return Err(not("a directory inside a mount"));
    }
    if !shows_whole_filesystem(fd.as_fd(), path)? {
        return Err(not("a bind mount of a subdirectory"));
    }
    Ok(fd)
}

pub(crate) fn open_directory(path: &Path) -> Result<OwnedFd, MountError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(failed("open", path))
}

/// A descriptor that can be read, and used for open_by_handle_at(2), of what an O_PATH one stands for.
pub(crate) fn reopen(fd: BorrowedFd<'_>, path: &Path) -> Result<File, MountError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(fd, ".", flags, Mode::empty()).map(File::from).map_err(failed("open", path))
}

fn clone_tree(fd: BorrowedFd<'_>, flags: OpenTreeFlags, path: &Path) -> Result<OwnedFd, MountError> {
    let flags = flags
        | OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    rustix::mount::open_tree(fd, "", flags).map_err(failed("open_tree", path))
}

fn is_mount_root(fd: BorrowedFd<'_>, path: &Path) -> Result<bool, MountError> {
    let stat =
        rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::empty()).map_err(failed("statx", path))?;
    Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Whether the mount begins at the root of its superblock. statmount(2) would tell, but only from Linux
/// 6.8 on; mountinfo's fourth field is what everybody has.
fn shows_whole_filesystem(fd: BorrowedFd<'_>, path: &Path) -> Result<bool, MountError> {
    let stat =
        rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).map_err(failed("statx", path))?;
    let id = stat.stx_mnt_id.to_string();
    let mounts =
        std::fs::read("/proc/self/mountinfo").map_err(failed("read /proc/self/mountinfo for", path))?;
    Ok(mounts.split(|byte| *byte == b'\n').any(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        fields.next() == Some(id.as_bytes()) && fields.nth(2) == Some(b"/")
    }))
}
