//! What the kernel reports of a filesystem: fanotify(7) on its superblock, by file handle.
//!
//! An event comes after what it tells of, and is queued before the system call returns to the process, so that everything
//! that frozen processes have done is in the queue. Events without a name are merged in the queue, and a handle finds
//! the inode wherever it is. The mark slows down writes (FAN_MODIFY), so it lives only while a checkpoint runs.
//!
//! What the kernel doesn't report: stores through mappings and changes of inode flags, and, if a file is opened for
//! writing, which way (see [`crate::live`] for what is done about each). A queue that overflows, or an event without a
//! handle, is a [`Doubt`].

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::thread::Builder;

use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
use rustix::io::Errno;

use crate::lazy::unloaded::Unloaded;
use crate::sys::handle::FileHandle;

/// Bytes of events that are read at once.
const BUFFER: usize = 64 << 10;
/// `struct fanotify_event_metadata`: its length, and where its fields are.
const METADATA: usize = 24;
/// `struct fanotify_event_info_fid` without the handle: type, padding, length, id of the filesystem.
const INFO: usize = 12;

/// Changes in a directory's names.
const NAMES: MaskFlags = MaskFlags::FAN_CREATE.union(MaskFlags::FAN_DELETE).union(MaskFlags::FAN_MOVE);
/// Changes of contents, or the end of a mapping through which there may have been some.
const DATA: MaskFlags = MaskFlags::FAN_MODIFY.union(MaskFlags::FAN_CLOSE_WRITE);

/// Why what is known of a filesystem can't be trusted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Doubt {
    /// Events were lost.
    #[error("the kernel's queue of changes overflowed")]
    Overflow,
    /// An event can't be understood.
    #[error("an event doesn't say what has changed")]
    Nameless,
    /// Events can't be read.
    #[error("changes can't be read")]
    Read(#[source] io::Error),
}

/// What was reported: each inode once.
#[derive(Debug, Default)]
pub(crate) struct Reported {
    /// Directories whose names have changed.
    pub(crate) directories: HashSet<FileHandle>,
    /// Files whose contents have changed, or may have.
    pub(crate) data: HashSet<FileHandle>,
    /// Inodes whose attributes have changed.
    pub(crate) attributes: HashSet<FileHandle>,
    /// Files that were opened, by which a mapping may have come.
    pub(crate) opened: HashSet<FileHandle>,
}

impl Reported {
    pub(crate) fn is_empty(&self) -> bool {
        let Self { directories, data, attributes, opened } = self;
        [directories, data, attributes, opened].iter().all(|set| set.is_empty())
    }
}

/// Watches one filesystem until it is dropped.
///
/// The kernel closes the group only when everybody has been answered who waits to open a file and came while this mark was there
/// (`user_waits` in `fsnotify_destroy_group`): where files are behind a gate, that takes until they are loaded. So it is closed by a
/// thread that nobody waits for.
#[derive(Debug)]
pub(crate) struct Watch {
    /// `None` only when it is dropped.
    group: Option<Fanotify>,
    gated: bool,
    buffer: Vec<u8>,
    /// This process, whose own opens aren't reported.
    me: i32,
}

impl Watch {
    /// Begins to watch the filesystem of `root`; `gated` if somebody may wait to open a file there.
    pub(crate) fn begin(root: &File, gated: bool) -> io::Result<Self> {
        let flags = InitFlags::FAN_CLASS_NOTIF
            | InitFlags::FAN_CLOEXEC
            | InitFlags::FAN_NONBLOCK
            | InitFlags::FAN_UNLIMITED_QUEUE
            | InitFlags::from_bits_retain(libc::FAN_REPORT_FID);
        let group = Fanotify::init(flags, EventFFlags::O_RDONLY)?;
        let mark = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM;
        let mask = NAMES | DATA | MaskFlags::FAN_ATTRIB | MaskFlags::FAN_OPEN | MaskFlags::FAN_ONDIR;
        group.mark(mark, mask, root, Some("."))?;
        let group = Some(group);
        Ok(Self { group, gated, buffer: vec![0; BUFFER], me: std::process::id().cast_signed() })
    }

    /// Adds what happened since the last call to `reported`; whether anything did. What is written to files of `unloaded` by those
    /// who load them doesn't count.
    pub(crate) fn drain(
        &mut self,
        reported: &mut Reported,
        unloaded: Option<&Unloaded>,
    ) -> Result<bool, Doubt> {
        let group = self.group.as_ref().expect("it is there until it is dropped");
        let mut any = false;
        loop {
            let read = match rustix::io::read(group, &mut self.buffer[..]) {
                Ok(read) => read,
                Err(Errno::AGAIN) => return Ok(any),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(Doubt::Read(errno.into())),
            };
            let mut events = &self.buffer[..read];
            while !events.is_empty() {
                let length = number(events, 0).map_or(0, u32::from_ne_bytes) as usize;
                let event = events.get(..length).filter(|event| event.len() >= METADATA);
                any |= take(event.ok_or(Doubt::Nameless)?, self.me, unloaded, reported)?;
                events = &events[length..];
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(group) = self.group.take()
            && self.gated
        {
            // Without a thread it is waited for.
            let _ = Builder::new().name("unwatch".into()).spawn(move || drop(group));
        }
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// Takes one event; whether it counts.
fn take(event: &[u8], me: i32, unloaded: Option<&Unloaded>, reported: &mut Reported) -> Result<bool, Doubt> {
    let metadata = number(event, 6).map(u16::from_ne_bytes);
    let mask = number(event, 8).map(u64::from_ne_bytes);
    let pid = number(event, 20).map(i32::from_ne_bytes);
    let (Some(metadata), Some(mask), Some(pid)) = (metadata, mask, pid) else { return Err(Doubt::Nameless) };
    let mut mask = MaskFlags::from_bits_retain(mask);
    if mask.intersects(MaskFlags::FAN_Q_OVERFLOW) {
        return Err(Doubt::Overflow);
    }
    // Opening a directory changes nothing of it, nor does what is done here.
    let only_opened = !mask.intersects(NAMES | DATA | MaskFlags::FAN_ATTRIB);
    if only_opened && (pid == me || mask.intersects(MaskFlags::FAN_ONDIR)) {
        return Ok(false);
    }
    let info = event.get(usize::from(metadata)..).unwrap_or_default();
    let is_handle = info.first() == Some(&libc::FAN_EVENT_INFO_TYPE_FID);
    let handle = info.get(INFO..).filter(|_| is_handle).and_then(FileHandle::from_kernel);
    let handle = handle.ok_or(Doubt::Nameless)?;
    if let Some(unloaded) = unloaded
        && mask.intersects(DATA | MaskFlags::FAN_OPEN)
        && unloaded.knows(&handle)
        && unloaded.is_loader(pid)
    {
        mask.remove(DATA | MaskFlags::FAN_OPEN);
    }
    for (of, into) in [
        (NAMES, &mut reported.directories),
        (DATA, &mut reported.data),
        (MaskFlags::FAN_ATTRIB, &mut reported.attributes),
        (MaskFlags::FAN_OPEN, &mut reported.opened),
    ] {
        if mask.intersects(of) {
            into.insert(handle);
        }
    }
    Ok(!mask.is_empty())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;
    use std::process::Command;

    use super::*;

    #[test]
    fn what_others_do_is_reported_by_handle() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["written", "opened", "mode"] {
            fs::write(path(name), "x").unwrap();
        }
        let handle = |name: &str| FileHandle::of(File::open(path(name)).unwrap().as_fd()).unwrap();
        let [root, written, opened, mode] = [".", "written", "opened", "mode"].map(handle);
        let mut watch = Watch::begin(&File::open(dir.path()).unwrap(), false).unwrap();
        let mut own = Reported::default();
        File::open(path("mode")).unwrap();
        watch.drain(&mut own, None).unwrap();
        assert!(!own.opened.contains(&mode), "this process's own");

        let script = "printf y >> written; read x < opened; chmod 0600 mode; mkdir made; rmdir made";
        assert!(Command::new("sh").current_dir(dir.path()).args(["-c", script]).status().unwrap().success());
        let mut reported = Reported::default();
        assert!(watch.drain(&mut reported, None).unwrap());
        let Reported { directories, data, attributes, opened: open } = &reported;
        // Other tests change other files of this filesystem.
        assert!(directories.contains(&root));
        assert!(data.contains(&written) && !data.contains(&opened) && !data.contains(&mode));
        assert!(attributes.contains(&mode) && !attributes.contains(&opened));
        assert!(open.contains(&opened) && open.contains(&written) && !open.contains(&mode));
    }

    #[test]
    fn what_is_no_event_is_a_doubt() {
        let mut reported = Reported::default();
        let event = |mask: u64, rest: &[u8]| {
            let mut event = vec![0; METADATA];
            event[6] = METADATA as u8;
            event[8..16].copy_from_slice(&mask.to_ne_bytes());
            event.extend_from_slice(rest);
            event
        };
        let overflow = event(libc::FAN_Q_OVERFLOW, &[]);
        assert!(matches!(take(&overflow, 1, None, &mut reported), Err(Doubt::Overflow)));
        for rest in
            [&[][..], &[1; 12], &[1, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 200, 0, 0, 0, 1, 0, 0, 0], &[9; 30]]
        {
            let nameless = event(libc::FAN_MODIFY, rest);
            assert!(matches!(take(&nameless, 1, None, &mut reported), Err(Doubt::Nameless)), "{rest:?}");
        }
    }
}
