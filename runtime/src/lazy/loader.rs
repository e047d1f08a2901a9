//! The loader: loads the files of one filesystem.
//!
//! ```text
//! feeder         small files once the container has joined -> large ones as scheduled -> done
//! page loaders   read, verify, write; a file that is complete is settled
//! main           the leases' signals (somebody waits: load that one now), requests, the container's end
//! ```
//!
//! A large file goes `pending -> loading -> loaded`, or `failed`: then who opens it gets EIO and the rest is loaded. It
//! is settled in the order that [`gate`] asks for: its lease is released and its descriptor here closed, then the keeper does the
//! rest. If the keeper is dead, the loader does that itself.
//!
//! Killed at any moment: the next loader loads again what isn't noted as loaded. Nobody was let in to it.
//!
//! Lock order: `keeper`, then `state`.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use stillframe_pgalloc::{AsyncPagesFileLoad, DigestTable, LoadError, LoadOptions, LoadTarget};
use stillframe_tmpfs::lazy::gate::{self, Gate};
use stillframe_tmpfs::lazy::{Loading, PendingFile, inherit};
use stillframe_tmpfs::mount::open_root;

use super::channel::{self, Message};
use super::control::{self, Reply, Request};
use super::doors::{Door, Doors};
use super::files::{self, FAILED, Header, LOADED, LOADING, Progress};
use super::schedule::Schedule;
use super::{LazyError, LoadPhase, at, memory};
use crate::cli::chain;
use crate::process;
use crate::state::InitRecord;

/// Third argument of the process.
pub(super) const ARGUMENT: &str = "loader";
/// Bytes of large files that are on their way without anybody waiting for them: what a wanted one has to wait for.
const AHEAD: u64 = 16 << 20;
/// Bytes of the pages file that are read ahead of the page loaders, into the page cache.
const READ_AHEAD: u64 = 8 << 20;
/// Small files that are given to the page loaders at once.
const BATCH: usize = 128;

/// Where a large file stands.
enum Stage {
    /// With the descriptor to load it through.
    Pending(File),
    Loading,
    Loaded,
    Failed,
    /// It isn't behind the gate: it is loaded with the small ones.
    Open,
}

struct State {
    stages: Vec<Stage>,
    schedule: Schedule,
    header: Header,
    /// Bytes that are being loaded.
    ahead: u64,
    /// What is to be told once the small files are loaded, or with `true` once all are.
    joined: Option<(Option<UnixStream>, bool)>,
    stopping: bool,
    /// Files whose interrupted loading is begun again.
    interrupted: Vec<bool>,
}

struct Loader {
    directory: PathBuf,
    root: File,
    large: Vec<PendingFile>,
    quiet: bool,
    pages_path: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
    keeper: Mutex<Keeper>,
    progress: Progress<'static>,
    errors: AtomicU64,
    /// Written to when main has to look.
    wake: Mutex<UnixStream>,
}

/// Who answers at the gate.
enum Keeper {
    /// The keeper; and the gate's descriptor, should it die.
    Alive(UnixStream, Option<OwnedFd>),
    /// This process.
    Dead(Option<Arc<Doors>>),
}

pub(super) fn run(directory: &Path) -> Result<(), LazyError> {
    let failed = at("load the files of", directory);
    let signals = Gate::watch().map_err(&failed)?;
    let gone = || LazyError::Gone { directory: directory.to_owned() };
    let record = files::processes(directory)?.ok_or_else(gone)?;
    // For as long as the process lives; the path is a literal for whoever reads its progress.
    let directory: &'static Path = Box::leak(directory.to_owned().into_boxed_path());
    let progress = Progress::open(directory)?.ok_or_else(gone)?;
    let list = files::list(directory)?;
    let meta = files::meta(directory)?;
    let states = progress.states().map_err(&failed)?;
    let take = |fd: RawFd| inherit(fd).map_err(&failed);
    let listener = UnixListener::from(take(record.listener)?);
    let pages = File::from(take(record.pages)?);
    let lock = take(record.lock)?;
    let group = record.group.map(take).transpose()?;
    let (mut stages, mut by_descriptor, mut unsettled) = (Vec::new(), HashMap::new(), Vec::new());
    for (index, (descriptor, state)) in record.files.iter().zip(&states).enumerate() {
        let file = descriptor.map(take).transpose()?.map(File::from);
        stages.push(match (*state, file) {
            (LOADED, file) => {
                // This loader's predecessor has died just then.
                if let Some(file) = file {
                    let _ = gate::release(&file);
                    unsettled.push(index);
                }
                Stage::Loaded
            }
            (FAILED, _) => Stage::Failed,
            (_, Some(file)) => {
                gate::own(&file).map_err(&failed)?;
                by_descriptor.insert(descriptor.expect("it was inherited"), index);
                Stage::Pending(file)
            }
            (_, None) => Stage::Open,
        });
    }
    let mountpoint = directory.join("mnt");
    let root = open_root(&mountpoint).map_err(|error| at("open", &mountpoint)(io::Error::other(error)))?;
    let schedule = Schedule::new(list.large.iter().map(|file| file.directory).collect(), |index| {
        !matches!(stages[index], Stage::Pending(_))
    });
    let channel = UnixStream::from(take(record.channel)?);
    let (wake, woken) = UnixStream::pair().map_err(&failed)?;
    let mut header = progress.header().map_err(&failed)?;
    count(&mut header, &list, &states);
    let loader = Arc::new(Loader {
        directory: directory.to_owned(),
        root,
        large: list.large,
        quiet: list.quiet,
        pages_path: list.pages_path,
        state: Mutex::new(State {
            stages,
            schedule,
            header,
            ahead: 0,
            joined: None,
            stopping: false,
            interrupted: states.iter().map(|state| *state == LOADING).collect(),
        }),
        changed: Condvar::new(),
        keeper: Mutex::new(Keeper::Alive(channel.try_clone().map_err(&failed)?, group)),
        progress,
        errors: AtomicU64::new(header.failed_files),
        wake: Mutex::new(wake),
    });
    unsettled.into_iter().for_each(|index| loader.settle_at_gate(index, true));
    let begun = loader.load_pages(pages.try_clone().map_err(&failed)?, &meta.digests);
    let large = Arc::new(begun.map_err(|error| LazyError::Told(chain(&error)))?);
    let feeder = {
        let (loader, large) = (loader.clone(), large.clone());
        let small = list.small;
        move || loader.feed(small, &pages, &meta.digests, &large)
    };
    thread::Builder::new().name("feeder".into()).spawn(feeder).map_err(&failed)?;
    let mut main = Main {
        loader: &loader,
        large: &large,
        by_descriptor,
        signals,
        listener,
        woken,
        lock,
        channel: Some(channel),
        init: None,
    };
    main.run().map_err(&failed)
}

/// What is loaded: a predecessor that has died may not have counted all of it.
fn count(header: &mut Header, list: &files::PendingList, states: &[u8]) {
    let small: &[PendingFile] =
        if header.phase().is_some_and(|phase| phase >= LoadPhase::Large) { &list.small } else { &[] };
    let large = list.large.iter().zip(states).filter(|(_, state)| **state == LOADED).map(|(file, _)| file);
    let loaded: Vec<u64> = small.iter().chain(large).map(PendingFile::bytes).collect();
    header.loaded_files = loaded.len() as u64;
    header.loaded_bytes = loaded.iter().sum();
    header.failed_files = states.iter().filter(|state| **state == FAILED).count() as u64;
    header.waiting_files = 0;
}

impl Loader {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_main(&self) {
        let mut wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
        // Only a full buffer: then it is awake.
        let _ = wake.write(&[0]);
    }

    /// Loads from the pages file, which the keeper reads ahead.
    fn load_pages(
        self: &Arc<Self>,
        pages: File,
        digests: &DigestTable,
    ) -> Result<AsyncPagesFileLoad, LoadError> {
        let loader = Arc::downgrade(self);
        let ahead = Mutex::new(0..0);
        let before_read = move |offset: u64, length: u64| {
            let mut ahead = ahead.lock().unwrap_or_else(PoisonError::into_inner);
            if ahead.contains(&offset) && offset + length <= ahead.end {
                return;
            }
            *ahead = offset..offset + length.max(READ_AHEAD);
            let Some(loader) = loader.upgrade() else { return };
            let keeper = loader.keeper.lock().unwrap_or_else(PoisonError::into_inner);
            if let Keeper::Alive(channel, _) = &*keeper {
                // If it is dead that is found out when a file is settled.
                let _ = channel::call(channel, Message::ReadAhead { offset, length: ahead.end - offset });
            }
        };
        let options = LoadOptions { before_read: Some(Arc::new(before_read)), ..LoadOptions::default() };
        AsyncPagesFileLoad::new(pages, digests.clone(), options)
    }

    /// Has the keeper settle a file; does it itself where there is none any more.
    fn settle_at_gate(&self, index: usize, loaded: bool) {
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        if let Keeper::Alive(channel, group) = &mut *keeper {
            let message = Message::Settle { index: index as u64, loaded };
            if channel::call(channel, message).is_ok() {
                return;
            }
            let group = group.take();
            *keeper = Keeper::Dead(group.map(|group| self.open_doors(group)));
        }
        let Keeper::Dead(Some(doors)) = &*keeper else { return };
        if loaded {
            // Without a name and without an opener it is gone, and the mark with it.
            let _ = self.large[index].open_path(&self.root).and_then(|path| doors.gate().forget(&path));
        }
        doors.settle(index, if loaded { Door::Open } else { Door::Broken });
    }

    /// Takes the keeper's place at the gate, unless that is done.
    fn replace_keeper(&self) {
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        if let Keeper::Alive(_, group) = &mut *keeper {
            let group = group.take();
            *keeper = Keeper::Dead(group.map(|group| self.open_doors(group)));
        }
    }

    fn open_doors(&self, group: OwnedFd) -> Arc<Doors> {
        let state = self.lock();
        let door = |stage: &Stage| match stage {
            Stage::Pending(_) | Stage::Loading => Door::Closed,
            Stage::Loaded | Stage::Open => Door::Open,
            Stage::Failed => Door::Broken,
        };
        let closed = state.stages.iter().map(door).collect();
        drop(state);
        let inodes = self.large.iter().map(|file| file.inode);
        let doors = Doors::new(Gate::from_descriptor(group), inodes, closed);
        doors.answer_for_the_dead();
        if let Err(error) = doors.attend() {
            self.put_error(0, &format!("nobody can be let in any more: {error}"));
        }
        doors
    }

    /// The feeder's work.
    fn feed(
        self: &Arc<Self>,
        small: Vec<PendingFile>,
        pages: &File,
        digests: &DigestTable,
        large: &AsyncPagesFileLoad,
    ) {
        let mut state = self.lock();
        let begun = state.header.phase().is_some_and(|phase| phase >= LoadPhase::Large);
        while state.joined.is_none() && !state.stopping {
            state = self.wait(state);
        }
        if state.stopping {
            return;
        }
        if !begun {
            state.header.phase = LoadPhase::Small as u64;
            let open: Vec<usize> =
                (0..state.stages.len()).filter(|index| matches!(state.stages[*index], Stage::Open)).collect();
            drop(state);
            let files = small.iter().chain(open.iter().map(|index| &self.large[*index]));
            let loaded = pages
                .try_clone()
                .map_err(|error| error.to_string())
                .and_then(|pages| self.load_small(files, pages, digests));
            state = self.lock();
            if let Err(error) = loaded {
                if let Some((Some(mut stream), _)) = state.joined.take() {
                    let _ = control::send(&mut stream, &Reply::Failed { error });
                }
                return;
            }
            let files = || small.iter().chain(open.iter().map(|index| &self.large[*index]));
            state.header.loaded_files += files().count() as u64;
            state.header.loaded_bytes += files().map(PendingFile::bytes).sum::<u64>();
            for index in open {
                state.stages[index] = Stage::Loaded;
                self.note(index, LOADED);
            }
            state.header.phase = LoadPhase::Large as u64;
            self.put_header(&state);
        }
        self.reply(&mut state, false);
        loop {
            while state.ahead >= AHEAD && !state.stopping {
                state = self.wait(state);
            }
            if state.stopping {
                return;
            }
            let Some(index) = state.schedule.pop() else { break };
            drop(state);
            self.load(index, large, false);
            state = self.lock();
        }
        while state.stages.iter().any(|stage| matches!(stage, Stage::Pending(_) | Stage::Loading)) {
            if state.stopping {
                return;
            }
            state = self.wait(state);
        }
        state.header.phase = LoadPhase::Done as u64;
        self.put_header(&state);
        self.reply(&mut state, true);
        drop(state);
        self.wake_main();
    }

    /// Answers who has told that the container has joined, if that is to be done now.
    fn reply(&self, state: &mut State, all: bool) {
        if let Some((stream, wanted)) = &mut state.joined
            && *wanted == all
            && let Some(mut stream) = stream.take()
        {
            let failed = all && state.header.failed_files > 0;
            let reply = if failed {
                let errors = self.progress.read().map(|status| status.errors).unwrap_or_default();
                let first = errors.into_iter().next().unwrap_or_else(|| "no reason is known".to_owned());
                let files = state.header.failed_files;
                Reply::Failed { error: format!("{files} files can't be loaded, the first because: {first}") }
            } else {
                Reply::Done
            };
            // Who has asked may be gone.
            let _ = control::send(&mut stream, &reply);
        }
    }

    fn load_small<'a>(
        self: &Arc<Self>,
        files: impl Iterator<Item = &'a PendingFile>,
        pages: File,
        digests: &DigestTable,
    ) -> Result<(), String> {
        let load = self.load_pages(pages, digests).map_err(|error| chain(&error))?;
        let mut batch = Vec::with_capacity(BATCH);
        let mut enqueued = Ok(());
        for pending in files {
            let opened = pending.open(&self.root);
            let file = opened.map_err(|error| format!("open a restored file: {error}"))?;
            // Nobody has it yet: it is as it was saved.
            let begun = Loading::again(pending);
            batch.push(LoadTarget {
                on_loaded: Some(Box::new(move |file| begun.complete(file))),
                ..LoadTarget::new(Arc::new(file), pending.extents())
            });
            if batch.len() == BATCH {
                enqueued = load.load_ranges_into(std::mem::take(&mut batch));
                if enqueued.is_err() {
                    break;
                }
            }
        }
        let enqueued = enqueued.and_then(|()| load.load_ranges_into(batch));
        // The load's own error is the cause.
        let loaded = load.finish().map(drop).and(enqueued);
        loaded.map_err(|error| format!("load {}: {}", self.pages_path.display(), chain(&error)))
    }

    /// Begins to load a large file, which nobody else does.
    fn load(self: &Arc<Self>, index: usize, pages: &AsyncPagesFileLoad, urgent: bool) {
        let pending = &self.large[index];
        let mut state = self.lock();
        let stage = &mut state.stages[index];
        let Stage::Pending(file) = std::mem::replace(stage, Stage::Loading) else {
            unreachable!("only what is pending is scheduled")
        };
        state.ahead += pending.bytes();
        let interrupted = state.interrupted[index];
        if urgent {
            state.header.waiting_files += 1;
            self.put_header(&state);
        }
        drop(state);
        let settle = Settle { loader: self.clone(), index, urgent, loaded: Arc::new(AtomicBool::new(false)) };
        let begun = match (self.quiet, interrupted) {
            (true, _) => Ok(None),
            (false, true) => Ok(Some(Loading::again(pending))),
            (false, false) => Loading::begin(pending, &file).map(Some),
        };
        let begun = match begun {
            Ok(begun) => begun,
            Err(error) => {
                self.put_error(index, &error.to_string());
                drop(file);
                settle.run();
                return;
            }
        };
        self.note(index, LOADING);
        let (loaded, completing, failing) = (settle.loaded.clone(), self.clone(), self.clone());
        let size = pending.size;
        let target = LoadTarget {
            on_loaded: Some(Box::new(move |file| {
                // Its lease may have been broken after all: /proc/sys/fs/lease-break-time.
                if file.metadata()?.len() != size {
                    return Err(io::Error::other("it was truncated while it was loaded"));
                }
                begun.map_or(Ok(()), |begun| begun.complete(file))?;
                // Before the lease is released: once it is truncated it must not be loaded again.
                completing.note(index, LOADED);
                loaded.store(true, Ordering::Release);
                gate::release(file)
            })),
            on_failed: Some(Box::new(move |error: LoadError| {
                failing
                    .put_error(index, &format!("load {}: {}", failing.pages_path.display(), chain(&error)));
            })),
            on_closed: Some(Box::new(move || settle.run())),
            quiet: self.quiet,
            ..LoadTarget::new(Arc::new(file), pending.extents())
        };
        // If the load has ended, the target is dropped and so fails.
        let _ =
            if urgent { pages.load_ranges_next(vec![target]) } else { pages.load_ranges_into(vec![target]) };
    }

    fn put_error(&self, index: usize, error: &str) {
        let inode = self.large[index].inode;
        let number = self.errors.fetch_add(1, Ordering::Relaxed) + 1;
        files::put_error(&self.directory, number, &format!("inode {inode}: {error}"));
    }

    fn note(&self, index: usize, stage: u8) {
        // Only a disk that is full could say no, and the state isn't on one.
        let _ = self.progress.put_state(index, stage);
    }

    fn put_header(&self, state: &State) {
        let _ = self.progress.put_header(&state.header);
    }
}

/// What is left to do when the load has let go of a large file.
struct Settle {
    loader: Arc<Loader>,
    index: usize,
    urgent: bool,
    loaded: Arc<AtomicBool>,
}

impl Settle {
    fn run(self) {
        let Self { loader, index, urgent, loaded } = self;
        let loaded = loaded.load(Ordering::Acquire);
        loader.settle_at_gate(index, loaded);
        let bytes = loader.large[index].bytes();
        let mut state = loader.lock();
        state.ahead -= bytes;
        state.header.waiting_files -= u64::from(urgent);
        if loaded {
            state.stages[index] = Stage::Loaded;
            state.header.loaded_files += 1;
            state.header.loaded_bytes += bytes;
        } else {
            state.stages[index] = Stage::Failed;
            state.header.failed_files += 1;
        }
        if !loaded {
            loader.note(index, FAILED);
        }
        loader.put_header(&state);
        drop(state);
        loader.changed.notify_all();
    }
}

/// The main thread, which alone gets the leases' signals.
struct Main<'a> {
    loader: &'a Arc<Loader>,
    large: &'a AsyncPagesFileLoad,
    by_descriptor: HashMap<RawFd, usize>,
    signals: File,
    listener: UnixListener,
    woken: UnixStream,
    /// Of `load.progress`.
    lock: OwnedFd,
    /// The keeper's, while that lives.
    channel: Option<UnixStream>,
    /// The container's init process, in whose cgroup this process is.
    init: Option<OwnedFd>,
}

impl Main<'_> {
    fn run(&mut self) -> io::Result<()> {
        // Who came before the signals did.
        self.look_at_leases()?;
        if let Ok(Some(init)) = files::joined(&self.loader.directory) {
            self.join(&init, None, false);
        }
        loop {
            let mut fds = vec![
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.woken.as_fd(), PollFlags::POLLIN),
            ];
            // Its answers are for who has sent a message; here it only matters whether it lives.
            let keeper =
                self.channel.as_ref().map(|channel| PollFd::new(channel.as_fd(), PollFlags::empty()));
            let keeper_at = keeper.map(|keeper| {
                fds.push(keeper);
                fds.len() - 1
            });
            let init_at = self.init.as_ref().map(|init| {
                fds.push(PollFd::new(init.as_fd(), PollFlags::POLLIN));
                fds.len() - 1
            });
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other?,
            };
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
            if ready[0] {
                self.wanted()?;
            }
            if ready[1] && self.serve()? {
                return Ok(());
            }
            if ready[2] {
                let _ = self.woken.read(&mut [0; 16])?;
                let state = self.loader.lock();
                if state.header.phase() == Some(LoadPhase::Done) {
                    if state.header.failed_files == 0 {
                        return Ok(());
                    }
                    // Those who open what failed are still to be told; but nobody has to wait for more.
                    rustix::fs::flock(&self.lock, rustix::fs::FlockOperation::Unlock)?;
                }
            }
            if keeper_at.is_some_and(|at| ready[at]) {
                self.channel = None;
                self.loader.replace_keeper();
            }
            if init_at.is_some_and(|at| ready[at]) {
                // Its cgroup couldn't be removed with this process in it.
                self.init = None;
                self.leave();
            }
        }
    }

    /// Loads the files whose leases somebody wants broken.
    fn wanted(&mut self) -> io::Result<()> {
        for descriptor in gate::broken(&self.signals)? {
            match descriptor {
                Some(descriptor) => {
                    if let Some(index) = self.by_descriptor.get(&descriptor) {
                        self.load_next(*index);
                    }
                }
                None => self.look_at_leases()?,
            }
        }
        Ok(())
    }

    fn look_at_leases(&mut self) -> io::Result<()> {
        let mut wanted = Vec::new();
        for (index, stage) in self.loader.lock().stages.iter().enumerate() {
            if let Stage::Pending(file) = stage
                && !gate::is_unbroken(file)?
            {
                wanted.push(index);
            }
        }
        wanted.into_iter().for_each(|index| self.load_next(index));
        Ok(())
    }

    fn load_next(&self, index: usize) {
        // Its descriptor's number may stand for another one by now: then one is loaded early.
        let take = self.loader.lock().schedule.take(index);
        if take {
            self.loader.load(index, self.large, true);
        }
    }

    /// Answers a request; true if this process is to end.
    fn serve(&mut self) -> io::Result<bool> {
        let (mut stream, _) = self.listener.accept()?;
        match control::receive(&stream) {
            Ok(Some(Request::Join { init, all })) => {
                if let Err(error) = files::put_joined(&self.loader.directory, &init) {
                    let _ = control::send(&mut stream, &Reply::Failed { error: chain(&error) });
                    return Ok(false);
                }
                self.join(&init, Some(stream), all);
                Ok(false)
            }
            Ok(Some(Request::Leave)) => {
                self.init = None;
                self.leave();
                let _ = control::send(&mut stream, &Reply::Done);
                Ok(false)
            }
            Ok(Some(Request::Stop)) => {
                self.stop();
                let _ = control::send(&mut stream, &Reply::Done);
                Ok(true)
            }
            // Nobody else has access to the socket.
            Ok(None) | Err(_) => Ok(false),
        }
    }

    fn join(&mut self, init: &InitRecord, stream: Option<UnixStream>, all: bool) {
        // Opened before the cgroup is joined: what has ended since is noticed.
        if let Ok(Some(pidfd)) = process::open(init) {
            self.init = Some(pidfd);
            let joined = memory::procs_of(init.pid)
                .and_then(|procs| procs.map_or(Ok(()), |procs| memory::join(&procs, std::process::id())));
            if let Err(error) = joined {
                let what = format!("the memory isn't charged to the container: join its cgroup: {error}");
                files::put_error(&self.loader.directory, 0, &what);
            }
        }
        self.loader.lock().joined = Some((stream, all));
        self.loader.changed.notify_all();
    }

    /// Goes back to the cgroup that the keeper is in.
    fn leave(&self) {
        let keeper = files::processes(&self.loader.directory).ok().flatten().map(|record| record.keeper.pid);
        let home = keeper.and_then(|pid| memory::procs_of(pid).ok().flatten());
        if let Some(home) = home {
            let _ = memory::join(&home, std::process::id());
        }
    }

    /// Lets nobody in any more; returns when all who wait have been told.
    fn stop(&self) {
        let mut state = self.loader.lock();
        state.stopping = true;
        self.loader.changed.notify_all();
        // What is being loaded holds its lease, and so whoever reads an event of it.
        while state.stages.iter().any(|stage| matches!(stage, Stage::Loading)) {
            state = self.loader.wait(state);
        }
        for stage in &state.stages {
            if let Stage::Pending(file) = stage {
                let _ = gate::release(file);
            }
        }
        drop(state);
        match &*self.loader.keeper.lock().unwrap_or_else(PoisonError::into_inner) {
            Keeper::Alive(channel, _) => {
                // If it is dead, they wait until this process ends, as the container has.
                let _ = channel::call(channel, Message::Stop);
            }
            Keeper::Dead(doors) => doors.iter().for_each(|doors| doors.stop()),
        }
    }
}
