//! Leases (fcntl(2), F_SETLEASE) and the signal that tells of a lease being broken.
//!
//! A write lease on the only open file description of a file holds back whoever wants to open or truncate(2) it
//! (`__break_lease` in fs/locks.c), until it is released or /proc/sys/fs/lease-break-time seconds are over. It belongs to the open
//! file description: it lasts until the last descriptor of that is closed, in whatever process. The signal goes to
//! one thread, the owner.
//!
//! A read lease is refused while anybody has the file open for writing.

use std::ffi::c_int;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The signal: a real-time one, so that each is queued and none lost.
fn signal() -> c_int {
    libc::SIGRTMIN() + 1
}

fn fcntl(file: &File, command: c_int, argument: c_int) -> io::Result<c_int> {
    // SAFETY: each command used here takes an int, and no memory of ours.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

// Of linux/fcntl.h.
const F_SETSIG: c_int = 10;
const F_SETOWN_EX: c_int = 15;
const F_OWNER_TID: c_int = 0;
const F_GETLEASE: c_int = 1025;

/// `struct f_owner_ex`.
#[repr(C)]
struct Owner {
    kind: c_int,
    pid: libc::pid_t,
}

/// Takes a write lease; the calling thread is told when it is to be broken.
pub(crate) fn take(file: &File) -> io::Result<()> {
    fcntl(file, F_SETSIG, signal())?;
    fcntl(file, libc::F_SETLEASE, libc::F_WRLCK)?;
    own(file)
}

/// Makes the calling thread the one that is told: other threads may not have blocked the signal.
pub(crate) fn own(file: &File) -> io::Result<()> {
    let owner = Owner { kind: F_OWNER_TID, pid: rustix::thread::gettid().as_raw_nonzero().get() };
    // SAFETY: the command reads a `struct f_owner_ex`, which the argument points to and which lives through the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), F_SETOWN_EX, &raw const owner) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Releases it, if it is held.
pub(crate) fn release(file: &File) -> io::Result<()> {
    match fcntl(file, libc::F_SETLEASE, libc::F_UNLCK) {
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(()),
        other => other.map(drop),
    }
}

/// Whether it is held and nobody waits for its end.
pub(crate) fn is_unbroken(file: &File) -> io::Result<bool> {
    Ok(fcntl(file, F_GETLEASE, 0)? == libc::F_WRLCK)
}

/// Blocks the signal, which would else end the process, in this thread, also beyond execve(2). The descriptor gives the
/// calling thread its signals instead, as signalfd(2) does.
pub(crate) fn watch() -> io::Result<OwnedFd> {
    // SAFETY: a sigset_t is plain memory, for which zero bytes are valid.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is ours and writable.
    unsafe { libc::sigemptyset(&raw mut set) };
    for signal in [signal(), libc::SIGIO] {
        // SAFETY: the set is ours and initialised, and the numbers are valid signals.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: the set is ours and initialised; the old mask isn't asked for.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    // SAFETY: the set is ours and initialised; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether anybody has the file open for writing, by a descriptor anywhere or by a mapping: then the kernel refuses a read
/// lease (`inode_is_open_for_write`). So it is asked for one, which is given up at once. Where there are no leases, it may
/// be open.
///
/// `file` is open for reading only. An open(2) for writing in between waits for the lease to be given up, or fails with
/// EWOULDBLOCK if it is O_NONBLOCK.
pub(crate) fn may_be_open_for_writing(file: &File) -> bool {
    // By default it would be SIGIO, which kills; SIGURG is ignored.
    fcntl(file, F_SETSIG, libc::SIGURG).is_err()
        || fcntl(file, libc::F_SETLEASE, libc::F_RDLCK).is_err()
        || fcntl(file, libc::F_SETLEASE, libc::F_UNLCK).is_err()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_is_found_however_it_has_the_file() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, [1; 4096]).unwrap();
        let reader = File::open(&path).unwrap();
        assert!(!may_be_open_for_writing(&reader), "it is only read");
        let writer = File::options().read(true).write(true).open(&path).unwrap();
        assert!(may_be_open_for_writing(&reader));
        let (sender, _receiver) = std::os::unix::net::UnixStream::pair().unwrap();
        let bytes = [std::io::IoSlice::new(b"x")];
        let descriptors = [writer.as_raw_fd()];
        let rights = [nix::sys::socket::ControlMessage::ScmRights(&descriptors)];
        let flags = nix::sys::socket::MsgFlags::empty();
        nix::sys::socket::sendmsg::<()>(sender.as_raw_fd(), &bytes, &rights, flags, None).unwrap();
        drop(writer);
        assert!(may_be_open_for_writing(&reader), "a descriptor on its way to somebody");
        drop((sender, _receiver));
        assert!(!may_be_open_for_writing(&reader));
    }
}
