//! What no safe wrapper offers: kill(2) with any signal number, tokio's registration of a descriptor, mount_setattr(2), and a child
//! in a user namespace of its own.
//!
//! nix and rustix know the named signals only, containerd passes on whatever number a user gave
//! (`ctr task kill -s 34` is SIGRTMIN).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use tokio::io::unix::AsyncFd;

/// Has tokio watch `fd`, which must be non-blocking.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the AsyncFd owns the descriptor, which stays open and the same until it is dropped.
    let registered = unsafe { AsyncFd::register(fd) };
    Ok(registered?)
}

/// Has `command` run in a new user namespace, which has no mappings yet.
pub fn in_a_user_namespace(command: &mut Command) {
    let unshare = || Ok(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER)?);
    // SAFETY: between fork and exec it makes one system call, and allocates nothing.
    unsafe { command.pre_exec(unshare) };
}

/// Has the mount that `mount` is the root of, which is attached nowhere yet, translate ids as a user namespace does.
pub fn translate_ids(mount: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: namespace.as_raw_fd().unsigned_abs().into(),
    };
    // SAFETY: the path is an empty C string, `attributes` is a `struct mount_attr` of the size given, both live through the call,
    // and the kernel only reads them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(&attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sends `signal` to `pid`, a single process. Errors are kill(2)'s own: ESRCH, EINVAL, EPERM.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    if pid <= 0 {
        // 0 and negative numbers name process groups, which nobody here means.
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: kill(2) reads no memory of ours; `pid` is checked to name one process.
    let result = unsafe { libc::kill(pid, signal) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
