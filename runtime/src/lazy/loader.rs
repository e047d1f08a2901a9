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

mod at_gate;
mod away;
mod feed;
mod main_thread;
mod priority;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use stillframe_tmpfs::lazy::gate::{self, Gate};
use stillframe_tmpfs::lazy::{PendingFile, Room, SmallFiles, inherit};
use stillframe_tmpfs::mount::open_root;

use super::doors::Doors;
use super::files::{self, FAILED, Header, LOADED, LOADING, Progress};
use super::schedule::Schedule;
use super::{LazyError, LoadPhase, at};
use crate::cli::chain;
use away::Away;
use main_thread::Main;
use priority::Priority;

/// Third argument of the process.
pub(super) const ARGUMENT: &str = "loader";
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
    /// Whether a container has told that it has a process.
    joined: bool,
    /// Who is to be told once the small files are loaded, or with `true` once all are.
    asked: Vec<(UnixStream, bool)>,
    /// Why the small files can't be loaded.
    failed: Option<String>,
    stopping: bool,
    /// Files that somebody waits for.
    wanted: HashSet<usize>,
    priority: Priority,
    /// Whether main is to be told when a file is settled.
    awaited: bool,
    /// Files whose interrupted loading is begun again.
    interrupted: Vec<bool>,
}

struct Loader {
    directory: PathBuf,
    root: File,
    large: Vec<PendingFile>,
    quiet: bool,
    huge: Option<String>,
    room: Arc<Room>,
    pages_path: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
    keeper: Mutex<Keeper>,
    progress: Progress,
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
    let progress = Progress::open(directory)?.ok_or_else(gone)?;
    let (list, small) = (files::list(directory)?, files::small(directory)?);
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
    let room = room(&root, list.size, &list.large, &small).map_err(&failed)?;
    let schedule = Schedule::new(list.large.iter().map(|file| file.directory).collect(), |index| {
        !matches!(stages[index], Stage::Pending(_))
    });
    let channel = UnixStream::from(take(record.channel)?);
    let (wake, woken) = UnixStream::pair().map_err(&failed)?;
    let mut header = progress.header().map_err(&failed)?;
    count(&mut header, &list.large, &small, &states);
    let loader = Arc::new(Loader {
        directory: directory.to_owned(),
        root,
        large: list.large,
        quiet: list.quiet,
        huge: list.huge,
        room: Arc::new(room),
        pages_path: list.pages_path,
        state: Mutex::new(State {
            stages,
            schedule,
            header,
            ahead: 0,
            joined: false,
            asked: Vec::new(),
            failed: None,
            stopping: false,
            wanted: HashSet::new(),
            priority: Priority::default(),
            awaited: false,
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
        away: Away::default(),
    };
    main.run().map_err(&failed)
}

/// The filesystem's room for all of its files.
fn room(root: &File, size: Option<u64>, large: &[PendingFile], small: &SmallFiles) -> io::Result<Room> {
    let bytes = large.iter().map(PendingFile::bytes).sum::<u64>() + small.bytes();
    // The last page of a file needn't be full.
    let pages = bytes + (large.len() + small.len()) as u64 * rustix::param::page_size() as u64;
    Ok(Room::new(root.try_clone()?, size, pages))
}

/// What is loaded: a predecessor that has died may not have counted all of it.
fn count(header: &mut Header, large: &[PendingFile], small: &SmallFiles, states: &[u8]) {
    let loaded = || large.iter().zip(states).filter(|(_, state)| **state == LOADED).map(|(file, _)| file);
    header.loaded_files = loaded().count() as u64;
    header.loaded_bytes = loaded().map(PendingFile::bytes).sum();
    if header.phase().is_some_and(|phase| phase >= LoadPhase::Large) {
        header.loaded_files += small.len() as u64;
        header.loaded_bytes += small.bytes();
    }
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
