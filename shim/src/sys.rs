//! What no safe wrapper offers: kill(2) with any signal number, and tokio's registration of a descriptor.
//!
//! nix and rustix know the named signals only, containerd passes on whatever number a user gave
//! (`ctr task kill -s 34` is SIGRTMIN).

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Has tokio watch `fd`, which must be non-blocking.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the AsyncFd owns the descriptor, which stays open and the same until it is dropped.
    let registered = unsafe { AsyncFd::register(fd) };
    Ok(registered?)
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
