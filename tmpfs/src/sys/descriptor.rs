//! Descriptors that come as numbers: from the kernel in an event, from the process that executed this program.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::fanotify::Fanotify;

/// Takes a descriptor that the kernel has just made for an event which was read.
pub(crate) fn of_event(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel made it for the reader of the event, who alone knows the number and gives it to us once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The fanotify group that `fd` is.
pub(crate) fn as_group(fd: OwnedFd) -> Fanotify {
    // SAFETY: the wrapper only makes calls on the descriptor, which fail if it is another kind of file.
    unsafe { Fanotify::from_owned_fd(fd) }
}

/// Takes descriptor `fd`, which the program was executed with, and has it closed when another one is executed.
pub(crate) fn inherit(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: only looked at, for the time of the call; where nothing is open the call says so.
    let there = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(there, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and by the contract of the callers each number is asked for once and stands for nothing else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
