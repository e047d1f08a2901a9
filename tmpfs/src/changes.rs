//! Files that may have changed without their change time telling.
//!
//! Every change by a system call gives a file a new ctime; stores through a MAP_SHARED mapping don't. A
//! writable mapping keeps its open file description alive, and when that goes, fanotify reports
//! FAN_CLOSE_WRITE: so who watches for it knows every file that was mapped for writing and isn't any more. What
//! is still mapped has to be looked for in /proc (the caller knows the processes). Marks without FAN_MODIFY
//! cost a running container nothing measurable.
//!
//! Events come with a descriptor each, opened for reading and closed here, so watching causes none. If the
//! kernel can't tell (queue overflow, an event that can't be opened), everything is suspect.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};

/// Watches one filesystem from its making on.
#[derive(Debug)]
pub struct Changes {
    group: Fanotify,
}

/// Inodes that may have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Suspects {
    /// These.
    Inodes(HashSet<u64>),
    /// Any.
    All,
}

impl Changes {
    /// Begins to watch the filesystem of `root`.
    pub fn watch(root: &File) -> io::Result<Self> {
        let flags = InitFlags::FAN_CLASS_NOTIF
            | InitFlags::FAN_CLOEXEC
            | InitFlags::FAN_NONBLOCK
            | InitFlags::FAN_UNLIMITED_QUEUE;
        let event = EventFFlags::O_RDONLY
            | EventFFlags::O_LARGEFILE
            | EventFFlags::O_CLOEXEC
            | EventFFlags::O_NOATIME;
        let group = Fanotify::init(flags, event)?;
        let mark = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM;
        group.mark(mark, MaskFlags::FAN_CLOSE_WRITE, root, Some("."))?;
        Ok(Self { group })
    }

    /// What happened since the last call. When the writers are frozen, nothing more comes after it.
    pub fn take(&self) -> Suspects {
        let mut inodes = HashSet::new();
        loop {
            let events = match self.group.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN) => return Suspects::Inodes(inodes),
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    tracing::debug!(%error, "changes can't be told apart: everything is suspect");
                    return Suspects::All;
                }
            };
            for event in events {
                let inode = event.fd().map(|fd| rustix::fs::fstat(fd.as_fd()));
                match inode {
                    Some(Ok(stat)) => inodes.insert(stat.st_ino),
                    _ => return Suspects::All,
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn the_end_of_a_writable_description_is_reported_though_the_change_time_stays() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let (mapped, read) = (dir.path().join("mapped"), dir.path().join("read"));
        std::fs::write(&mapped, [0; 4096]).unwrap();
        std::fs::write(&read, "x").unwrap();
        let changes = Changes::watch(&File::open(dir.path()).unwrap()).unwrap();
        let before = std::fs::metadata(&mapped).unwrap();
        // What a mapping holds is the open file description, so one that is held stands for it.
        let held = File::options().write(true).open(&mapped).unwrap();
        drop(File::open(&read).unwrap());
        assert_eq!(changes.take(), Suspects::Inodes(HashSet::new()), "neither reading nor holding it open");
        drop(held);
        assert_eq!(changes.take(), Suspects::Inodes(HashSet::from([before.ino()])));
        let after = std::fs::metadata(&mapped).unwrap();
        assert_eq!((after.ctime(), after.ctime_nsec()), (before.ctime(), before.ctime_nsec()));
        assert_eq!(changes.take(), Suspects::Inodes(HashSet::new()), "each once");
    }
}
