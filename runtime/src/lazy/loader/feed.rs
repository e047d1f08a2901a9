//! What a loader loads, in which order, and what is done with a file that is complete.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use stillframe_pgalloc::{AsyncPagesFileLoad, DigestTable, LoadError, LoadOptions, LoadTarget};
use stillframe_tmpfs::lazy::{Loading, PendingFile, SmallFiles, SmallPages, gate, load_ungated};

use super::{Keeper, Loader, Stage, State};
use crate::cli::chain;
use crate::lazy::LoadPhase;
use crate::lazy::channel::{self, Message};
use crate::lazy::control::{self, Reply};
use crate::lazy::files::{FAILED, LOADED, LOADING};

/// Bytes of large files that are on their way without anybody waiting for them: what a wanted one has to wait for.
const AHEAD: u64 = 16 << 20;
/// Bytes of the pages file that are read ahead of the page loaders, into the page cache.
const READ_AHEAD: u64 = 8 << 20;

impl Loader {
    /// Loads from the pages file, which the keeper reads ahead.
    pub(super) fn load_pages(
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
        let room = self.room.clone();
        let options = LoadOptions {
            before_read: Some(Arc::new(before_read)),
            on_full: Some(Arc::new(move |bytes, again| room.make(bytes, again))),
            ..LoadOptions::default()
        };
        AsyncPagesFileLoad::new(pages, digests.clone(), options)
    }

    /// The feeder's work.
    pub(super) fn feed(
        self: &Arc<Self>,
        small: SmallFiles,
        pages: &File,
        digests: &DigestTable,
        large: &AsyncPagesFileLoad,
    ) {
        let mut state = self.lock();
        let begun = state.header.phase().is_some_and(|phase| phase >= LoadPhase::Large);
        while !state.joined && !state.stopping {
            state = self.wait(state);
        }
        if state.stopping {
            return;
        }
        if !begun {
            state.header.phase = LoadPhase::Small as u64;
            self.put_header(&state);
            let open: Vec<usize> =
                (0..state.stages.len()).filter(|index| matches!(state.stages[*index], Stage::Open)).collect();
            drop(state);
            let count = (small.len() as u64, small.bytes());
            let files = || open.iter().map(|index| &self.large[*index]);
            let loaded = pages
                .try_clone()
                .map_err(|error| error.to_string())
                .and_then(|pages| self.load_small(small, files(), pages, digests));
            state = self.lock();
            if let Err(error) = loaded {
                state.failed = Some(error);
                self.reply(&mut state);
                return;
            }
            state.header.loaded_files += count.0 + open.len() as u64;
            state.header.loaded_bytes += count.1 + files().map(PendingFile::bytes).sum::<u64>();
            for index in open {
                state.stages[index] = Stage::Loaded;
                self.note(index, LOADED);
            }
            state.header.phase = LoadPhase::Large as u64;
            self.put_header(&state);
        }
        state.priority.begin_background();
        self.reply(&mut state);
        self.prioritise(&mut state);
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
        // It stays larger if that can't be changed: nothing is lost by it.
        let _ = self.room.restore();
        state.header.phase = LoadPhase::Done as u64;
        self.put_header(&state);
        self.reply(&mut state);
        drop(state);
        self.wake_main();
    }

    /// Answers those who can be told something now.
    pub(super) fn reply(&self, state: &mut State) {
        let phase = state.header.phase();
        let (small, all) =
            (matches!(phase, Some(LoadPhase::Large | LoadPhase::Done)), phase == Some(LoadPhase::Done));
        let failed = state.failed.clone();
        let told = |(_, wanted): &mut (UnixStream, bool)| failed.is_some() || all || small && !*wanted;
        for (mut stream, wanted) in state.asked.extract_if(.., told) {
            let reply = if let Some(error) = failed.clone() {
                Reply::Failed { error }
            } else if wanted && state.header.failed_files > 0 {
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

    /// Loads the small files, and those of the large ones that aren't behind the gate.
    fn load_small<'a>(
        self: &Arc<Self>,
        small: SmallFiles,
        open: impl Iterator<Item = &'a PendingFile>,
        pages: File,
        digests: &DigestTable,
    ) -> Result<(), String> {
        let load = self.load_pages(pages, digests).map_err(|error| chain(&error))?;
        let huge = self.huge.clone();
        let small_pages = huge.map(|huge| SmallPages::instead_of(&self.root, huge)).transpose();
        let _until_loaded = small_pages.map_err(|error| format!("ask for small pages: {error}"))?;
        let enqueued = small.load(&self.root, &load).and_then(|()| load_ungated(open, &self.root, &load));
        // The load's own error is the cause.
        let loaded = load.finish().map(drop).and(enqueued);
        loaded.map_err(|error| format!("load {}: {}", self.pages_path.display(), chain(&error)))
    }

    /// Begins to load a large file, which nobody else does.
    pub(super) fn load(self: &Arc<Self>, index: usize, pages: &AsyncPagesFileLoad, urgent: bool) {
        let pending = &self.large[index];
        let mut state = self.lock();
        let stage = &mut state.stages[index];
        let Stage::Pending(file) = std::mem::replace(stage, Stage::Loading) else {
            unreachable!("only what is pending is scheduled")
        };
        state.ahead += pending.bytes();
        let interrupted = state.interrupted[index];
        if urgent {
            self.want(index, &mut state);
        }
        drop(state);
        let settle = Settle { loader: self.clone(), index, loaded: Arc::new(AtomicBool::new(false)) };
        let begun = match (self.quiet, interrupted) {
            (true, _) => Ok(None),
            (false, true) => {
                let mtime = self.progress.mtime(index).ok().flatten();
                Ok(Some(Loading::again(pending).with_mtime(mtime)))
            }
            // Also for who saves it meanwhile.
            (false, false) => Loading::begin(pending, &file)
                .and_then(|begun| self.progress.put_mtime(index, begun.mtime()).map(|()| Some(begun))),
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
}

impl Loader {
    /// Somebody waits for a file that isn't settled yet.
    pub(super) fn want(&self, index: usize, state: &mut State) {
        if state.wanted.insert(index) {
            state.header.waiting_files += 1;
            self.prioritise(state);
            self.put_header(state);
        }
    }
}

/// What is left to do when the load has let go of a large file.
struct Settle {
    loader: Arc<Loader>,
    index: usize,
    loaded: Arc<AtomicBool>,
}

impl Settle {
    fn run(self) {
        let Self { loader, index, loaded } = self;
        let loaded = loaded.load(Ordering::Acquire);
        loader.settle_at_gate(index, loaded);
        let bytes = loader.large[index].bytes();
        let mut state = loader.lock();
        state.ahead -= bytes;
        state.header.waiting_files -= u64::from(state.wanted.remove(&index));
        loader.prioritise(&mut state);
        if loaded {
            state.stages[index] = Stage::Loaded;
            state.header.loaded_files += 1;
            state.header.loaded_bytes += bytes;
        } else {
            state.stages[index] = Stage::Failed;
            state.header.failed_files += 1;
            loader.note(index, FAILED);
        }
        loader.put_header(&state);
        let awaited = state.awaited;
        drop(state);
        loader.changed.notify_all();
        if awaited {
            loader.wake_main();
        }
    }
}
