//! A gate in front of files whose contents aren't there yet: whoever opens one waits.
//!
//! Two holds on each file, since neither sees everything:
//!
//! - a FAN_OPEN_PERM mark on its inode: open(2), execve(2), O_TRUNC, open by handle, also through other mounts and by
//!   io_uring and overlayfs. Nothing else costs anything, and an open file has no mark;
//! - a write lease on the descriptor that it is loaded through: truncate(2) by path, which fanotify doesn't see.
//!
//! A lease leaves something behind: the inode has a `file_lock_context` for as long as it lives, and each close(2) looks into that
//! (`locks_remove_file`). Measured on Linux 6.18: opening and closing a file takes 4 % more processor time than that of one which
//! never had a lease, with a read of 4 KiB 3 to 5 %; of a mark that is gone nothing is left. There is no other hold on truncate(2):
//! FAN_PRE_ACCESS isn't for tmpfs, a denied write makes it fail instead of wait, and what was cut off can't be told afterwards.
//!
//! They depend on each other: reading an event makes the kernel open the file for us, which the lease holds back
//! too (`create_fd` in fs/notify/fanotify). So [`Gate::next`] returns when the lease of the file in question is released,
//! and what says at once that somebody waits is the lease's signal ([`Gate::watch`]). Hence the rules: events are read one
//! by one, by as many threads as there are to be files that are waited for at the same time; the files are loaded by
//! other threads.
//!
//! Order of opening up: contents and attributes complete -> [`release`] -> every descriptor that could write is closed
//! (execve(2) fails while there is one) -> [`Gate::forget`] -> the waiting are let in.
//!
//! When the last descriptor of the group is closed the kernel lets everybody in. So somebody else has to have one, should
//! this process die. Linux: fs/notify/fanotify, fs/locks.c.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};

use crate::sys::{descriptor, lease};

/// Bytes of `struct fanotify_event_metadata`.
const EVENT: usize = 24;
const FAN_ALLOW: u32 = 1;
const FAN_DENY: u32 = 2;

/// A gate.
#[derive(Debug)]
pub struct Gate {
    group: Fanotify,
}

impl Gate {
    /// A gate that holds nothing yet.
    ///
    /// # Errors
    ///
    /// The kernel has no permission events, or the process lacks CAP_SYS_ADMIN.
    pub fn new() -> io::Result<Self> {
        // Of this class a denial may say EIO.
        let flags = InitFlags::FAN_CLASS_PRE_CONTENT
            | InitFlags::FAN_CLOEXEC
            | InitFlags::FAN_UNLIMITED_QUEUE
            | InitFlags::FAN_UNLIMITED_MARKS;
        let event = EventFFlags::O_RDONLY
            | EventFFlags::O_LARGEFILE
            | EventFFlags::O_CLOEXEC
            | EventFFlags::O_NOATIME;
        Ok(Self { group: Fanotify::init(flags, event)? })
    }

    /// The same gate in another process, which was given its descriptor.
    pub fn from_descriptor(group: OwnedFd) -> Self {
        Self { group: descriptor::as_group(group) }
    }

    /// Holds `file`, the only open descriptor of its inode, open for reading and writing. [`Gate::watch`] must have been called.
    pub fn hold(&self, file: &File) -> io::Result<()> {
        lease::take(file)?;
        self.mark(MarkFlags::FAN_MARK_ADD, file.as_fd(), None)
    }

    /// Holds the inode no more; `path` is open with O_PATH.
    pub fn forget(&self, path: &File) -> io::Result<()> {
        let path = format!("/proc/self/fd/{}", path.as_raw_fd());
        self.mark(MarkFlags::FAN_MARK_REMOVE, rustix::fs::CWD, Some(&path))
    }

    fn mark(&self, operation: MarkFlags, at: BorrowedFd<'_>, path: Option<&str>) -> io::Result<()> {
        Ok(self.group.mark(operation, MaskFlags::FAN_OPEN_PERM, at, path)?)
    }

    /// From here on the calling thread isn't interrupted by the signal of a lease that is to be broken, nor by SIGIO. The
    /// descriptor gives it to that thread instead ([`broken`]); without blocking.
    pub fn watch() -> io::Result<File> {
        Ok(File::from(lease::watch()?))
    }

    /// Waits until somebody opens a file and its lease is released.
    pub fn next(&self) -> io::Result<Waiting<'_>> {
        let mut event = [0; EVENT];
        let length = rustix::io::retry_on_intr(|| rustix::io::read(&self.group, &mut event))?;
        let fd = RawFd::from_ne_bytes(event[16..20].try_into().expect("four bytes"));
        if length != EVENT || fd < 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let file = descriptor::of_event(fd);
        let inode = rustix::fs::fstat(&file)?.st_ino;
        Ok(Waiting { gate: self, file, inode })
    }

    /// Answers who waits for an event that another process has read and not answered any more; it knew it by the descriptor
    /// number `fd`. That there is none is fine.
    pub fn answer_for(&self, fd: RawFd, answer: Answer) {
        let _ = self.respond(fd, answer);
    }

    fn respond(&self, fd: RawFd, answer: Answer) -> io::Result<()> {
        let write = |answer: u32| {
            let mut response = [0; 8];
            response[..4].copy_from_slice(&fd.to_ne_bytes());
            response[4..].copy_from_slice(&answer.to_ne_bytes());
            rustix::io::write(&self.group, &response)
        };
        match answer {
            Answer::Allow => write(FAN_ALLOW)?,
            // Before Linux 6.13 a denial can't say why, and the opener gets EPERM.
            Answer::IoError => write(FAN_DENY | (libc::EIO as u32) << 24).or_else(|_| write(FAN_DENY))?,
        };
        Ok(())
    }
}

impl AsFd for Gate {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.group.as_fd()
    }
}

/// What who waits is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Open it.
    Allow,
    /// EIO.
    IoError,
}

/// Somebody who waits to open a file; waits for ever if it isn't answered.
#[derive(Debug)]
#[must_use]
pub struct Waiting<'a> {
    gate: &'a Gate,
    file: OwnedFd,
    /// Number of the file's inode.
    pub inode: u64,
}

impl Waiting<'_> {
    /// Ends the waiting.
    pub fn answer(self, answer: Answer) -> io::Result<()> {
        self.gate.respond(self.file.as_raw_fd(), answer)
    }
}

/// Releases the lease on the file; who waits to truncate it goes on.
pub fn release(file: &File) -> io::Result<()> {
    lease::release(file)
}

/// Has the calling thread told about the file's lease.
pub fn own(file: &File) -> io::Result<()> {
    lease::own(file)
}

/// Whether nobody waits for the file's lease, and the lease hasn't been lost.
pub fn is_unbroken(file: &File) -> io::Result<bool> {
    lease::is_unbroken(file)
}

/// Descriptors of files that somebody waits for, as signals have told; `None` among them: some were lost, any may be.
pub fn broken(watch: &File) -> io::Result<Vec<Option<RawFd>>> {
    // `struct signalfd_siginfo`: 128 bytes, the number first, the descriptor at 20.
    let mut signals = [0; 128 * 64];
    let length = match rustix::io::retry_on_intr(|| rustix::io::read(watch, &mut signals)) {
        Err(rustix::io::Errno::AGAIN) => 0,
        other => other?,
    };
    let number =
        |signal: &[u8], at: usize| i32::from_ne_bytes(signal[at..at + 4].try_into().expect("four bytes"));
    let told = |signal: &[u8]| (number(signal, 0) != libc::SIGIO).then(|| number(signal, 20));
    Ok(signals[..length].chunks_exact(128).map(told).collect())
}
