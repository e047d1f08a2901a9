//! The keeper: has the descriptors on which the gate depends, answers who waits at it, and sees to it that there is a loader.
//!
//! States: closing the gate -> (`ready` on its standard output) -> doing what a loader's messages ask for -> end with the loader.
//! A loader that ends without success is followed by another, which has the same descriptors by the same numbers; the
//! gate stays closed meanwhile. After [`MAX_DEATHS`] in a row without progress (what it writes exceeds the container's memory limit,
//! and it may not lower its own oom_score_adj) the files that are missing give EIO.
//!
//! It reads no byte of the image and writes none: what can kill the loader shouldn't reach it. And it stays in the cgroup that it was
//! started in, so that what it has the kernel read of the image is charged there.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::FdFlags;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use stillframe_tmpfs::lazy::PendingFile;
use stillframe_tmpfs::lazy::gate::{self, Gate};
use stillframe_tmpfs::mount::open_root;

use super::channel::{self, Message};
use super::doors::{Door, Doors};
use super::files::{self, FAILED, LoadPhase, Processes, Progress};
use super::{ARGUMENT, LazyError, at, control, loader};
use crate::process;

/// What it says when nobody can read what isn't there.
pub(super) const READY: &str = "ready";
/// Bytes that the kernel is asked for at once: of more it may read only the beginning (`force_page_cache_ra`), no less than the usual
/// read-ahead.
const ADVICE: u64 = 128 * 1024;
/// Loaders that may die in a row without having loaded a file.
const MAX_DEATHS: u32 = 5;
/// Descriptors that keeper and loader need for other things than files behind the gate: what is being loaded otherwise, and the like.
const OTHER_DESCRIPTORS: u64 = 500;

pub(super) fn run(directory: &Path) -> Result<(), LazyError> {
    let failed = at("keep the gate of", directory);
    // A signal that says that a lease is to be broken comes here before there is a loader.
    let _signals = Gate::watch().map_err(&failed)?;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let limit = Rlimit { current: maximum.or(current), maximum };
    setrlimit(Resource::Nofile, limit).map_err(|error| failed(error.into()))?;
    // In the container's memory cgroup it would be killed instead of who wants the memory. Not allowed: it can be.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let list = files::list(directory)?.large;
    let room = limit.current.unwrap_or(u64::MAX).saturating_sub(OTHER_DESCRIPTORS);
    let (gate, held) = close(directory, &list, room)?;
    let doors = gate.map(|gate| {
        let closed = held.iter().map(|file| if file.is_some() { Door::Closed } else { Door::Open }).collect();
        Doors::new(gate, list.iter().map(|file| file.inode), closed)
    });
    if let Some(doors) = &doors {
        doors.attend().map_err(&failed)?;
    }
    drop(list);
    let pages = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3).map_err(|error| failed(error.into()))?;
    let listener = control::listen(directory)?;
    let lock = files::lock_progress(directory)?;
    let record = Processes {
        keeper: process::identify(std::process::id().cast_signed()).map_err(&failed)?,
        loader: None,
        group: doors.as_ref().map(|doors| doors.gate().as_fd().as_raw_fd()),
        pages: pages.as_raw_fd(),
        listener: listener.as_raw_fd(),
        channel: -1,
        lock: lock.as_raw_fd(),
        files: Vec::new(),
    };
    let group = doors.iter().map(|doors| doors.gate().as_fd());
    let inherited = group.chain([pages.as_fd(), listener.as_fd(), lock.as_fd()]);
    for descriptor in inherited.chain(held.iter().flatten().map(AsFd::as_fd)) {
        rustix::io::fcntl_setfd(descriptor, FdFlags::empty()).map_err(|error| failed(error.into()))?;
    }
    let mut keeper = Keeper { directory, record, held, doors, pages: File::from(pages) };
    let mut deaths = 0;
    let mut loader = Some(keeper.start_loader()?);
    println!("{READY}");
    while let Some((child, channel)) = loader.take() {
        let progress = keeper.serve(&channel);
        if end(child).map_err(&failed)? {
            return Ok(());
        }
        deaths = if progress { 1 } else { deaths + 1 };
        if deaths <= MAX_DEATHS {
            loader = Some(keeper.start_loader()?);
        }
    }
    // Nobody answers there any more.
    drop(listener);
    keeper.give_up().map_err(&failed)?;
    rustix::fs::flock(&*lock, rustix::fs::FlockOperation::Unlock).map_err(|error| failed(error.into()))?;
    // Who opens one of them is still to be told.
    loop {
        std::thread::park();
    }
}

/// Whether the loader has ended because it has nothing more to do.
fn end(mut loader: Child) -> io::Result<bool> {
    Ok(loader.wait()?.success())
}

/// Closes the gate on each file, as far as there is one, and room for descriptors: on the largest first.
fn close(
    directory: &Path,
    list: &[PendingFile],
    room: u64,
) -> Result<(Option<Gate>, Vec<Option<File>>), LazyError> {
    let mut held: Vec<Option<File>> = list.iter().map(|_| None).collect();
    let gate = match Gate::new() {
        Ok(gate) => gate,
        Err(error) => {
            files::put_error(directory, 0, &format!("no file can be loaded behind the start: {error}"));
            return Ok((None, held));
        }
    };
    let mountpoint = directory.join("mnt");
    let root = open_root(&mountpoint).map_err(|error| at("open", &mountpoint)(io::Error::other(error)))?;
    let mut order: Vec<usize> = (0..list.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(list[*index].bytes()));
    for index in order.into_iter().take(usize::try_from(room).unwrap_or(usize::MAX)) {
        let file = list[index].open(&root).map_err(at("open a restored file below", &mountpoint))?;
        // Refused if somebody has it open: then it is loaded like a small one.
        if gate.hold(&file).is_ok() {
            held[index] = Some(file);
        }
    }
    Ok((Some(gate), held))
}

struct Keeper<'a> {
    directory: &'a Path,
    record: Processes,
    held: Vec<Option<File>>,
    doors: Option<Arc<Doors>>,
    pages: File,
}

impl Keeper<'_> {
    fn start_loader(&mut self) -> Result<(Child, UnixStream), LazyError> {
        let failed = at("start the loader of", self.directory);
        let (mine, theirs) = UnixStream::pair().map_err(&failed)?;
        rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).map_err(|error| failed(error.into()))?;
        self.record.channel = theirs.as_raw_fd();
        self.record.files = self.held.iter().map(|file| file.as_ref().map(AsRawFd::as_raw_fd)).collect();
        files::put_processes(self.directory, &self.record)?;
        let child = Command::new("/proc/self/exe")
            .arg(ARGUMENT)
            .arg(self.directory)
            .arg(loader::ARGUMENT)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(&failed)?;
        let loader = process::identify(child.id().cast_signed()).map_err(&failed)?;
        self.record.loader = Some(loader);
        files::put_processes(self.directory, &self.record)?;
        Ok((child, mine))
    }

    /// Does what the loader asks for, until it is gone. Whether it has loaded anything.
    fn serve(&mut self, channel: &UnixStream) -> bool {
        let before = self.loaded();
        while let Ok(message) = channel::receive(channel) {
            match message {
                Message::Settle { index, loaded } => {
                    let index = usize::try_from(index).unwrap_or(usize::MAX);
                    if let Err(error) = self.settle(index, loaded) {
                        files::put_error(self.directory, 0, &format!("take a file off the gate: {error}"));
                    }
                }
                Message::ReadAhead { offset, length } => self.read_ahead(offset, length),
                Message::Stop => {
                    // Who waits for an event of one of these can read that now.
                    for file in self.held.iter().flatten() {
                        let _ = gate::release(file);
                    }
                    if let Some(doors) = &self.doors {
                        doors.stop();
                    }
                }
            }
            if channel::done(channel).is_err() {
                break;
            }
        }
        self.loaded() > before
    }

    /// Where the advice isn't taken, the loader reads as well.
    fn read_ahead(&self, offset: u64, length: u64) {
        let end = offset.saturating_add(length);
        let pieces = (offset..end).step_by(ADVICE as usize);
        for (from, to) in pieces.map(|from| (from, end.min(from + ADVICE))) {
            let length = NonZeroU64::new(to - from);
            let _ = rustix::fs::fadvise(&self.pages, from, length, rustix::fs::Advice::WillNeed);
        }
    }

    /// The last descriptor of the file is closed before anybody is let in: execve(2) fails while one could write.
    fn settle(&mut self, index: usize, loaded: bool) -> io::Result<()> {
        let Some(file) = self.held.get_mut(index).and_then(Option::take) else { return Ok(()) };
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let path = File::from(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?);
        drop(file);
        if let Some(doors) = &self.doors {
            // The mark stays on what can't be loaded.
            let forgotten = if loaded { doors.gate().forget(&path) } else { Ok(()) };
            doors.settle(index, if loaded { Door::Open } else { Door::Broken });
            forgotten?;
        }
        Ok(())
    }

    /// Says of all that isn't loaded that it can't be.
    fn give_up(&mut self) -> io::Result<()> {
        let what = "the process that loads the files has died again and again: is the container's memory limit too small?";
        files::put_error(self.directory, 0, what);
        let Some(progress) = Progress::open(self.directory).map_err(io::Error::other)? else { return Ok(()) };
        for index in 0..self.held.len() {
            if self.held[index].is_some() {
                progress.put_state(index, FAILED)?;
                self.settle(index, false)?;
            }
        }
        let mut header = progress.header()?;
        header.phase = LoadPhase::Done as u64;
        header.waiting_files = 0;
        header.failed_files = header.files - header.loaded_files.min(header.files);
        progress.put_header(&header)
    }

    fn loaded(&self) -> u64 {
        let progress = Progress::open(self.directory).ok().flatten();
        progress.and_then(|progress| progress.header().ok()).map_or(0, |header| header.loaded_files)
    }
}
