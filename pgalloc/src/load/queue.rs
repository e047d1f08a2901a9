//! The queue between those who want files loaded and the loader threads.
//!
//! Bounded: at most [`BATCHES`] batches, each up to [`BATCH`] bytes and parts, so that neither descriptors nor
//! memory pile up. Small files are added to the last batch as long as no loader has taken it; that is how they get
//! read together. Urgent batches are taken first and not counted.
//!
//! States: open; closed (no more comes, loaders end when it is empty); failed or stopped (what is queued has been
//! dropped, loaders end at once, nobody waits any more).

use std::collections::VecDeque;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use crate::buffer::{lock, wait};
use crate::load::batch::FileBatch;
use crate::load::error::LoadError;
use crate::load::{OnClosed, OnFailed, OnLoaded};
use crate::page::PageExtent;

/// Most batches that wait.
pub(crate) const BATCHES: usize = 32;
/// Most bytes and most parts in a batch.
pub(crate) const BATCH: (u64, usize) = (4 << 20, 128);

/// What is to be done with a file; each at most once.
#[derive(Default)]
pub(crate) struct Callbacks {
    pub(crate) on_loaded: Option<OnLoaded>,
    pub(crate) on_failed: Option<OnFailed>,
    pub(crate) on_closed: Option<OnClosed>,
}

/// A file that is being loaded.
pub(crate) struct Target {
    pub(crate) file: Arc<File>,
    /// Whether it is not to be written to.
    pub(crate) quiet: bool,
    /// Parts not yet written.
    parts: AtomicUsize,
    /// Set with the first part that fails: the others aren't loaded.
    failed: AtomicBool,
    on_loaded: Mutex<Option<OnLoaded>>,
    on_failed: Mutex<Option<OnFailed>>,
    /// Dropped last, so after the file.
    _on_closed: RunOnDrop,
}

struct RunOnDrop(Mutex<Option<OnClosed>>);

impl Drop for RunOnDrop {
    fn drop(&mut self) {
        if let Some(on_closed) = lock(&self.0).take() {
            on_closed();
        }
    }
}

impl Target {
    pub(crate) fn new(file: Arc<File>, quiet: bool, parts: usize, callbacks: Callbacks) -> Arc<Self> {
        Arc::new(Self {
            file,
            quiet,
            parts: AtomicUsize::new(parts),
            failed: AtomicBool::new(false),
            on_loaded: Mutex::new(callbacks.on_loaded),
            on_failed: Mutex::new(callbacks.on_failed),
            _on_closed: RunOnDrop(Mutex::new(callbacks.on_closed)),
        })
    }

    /// Counts a part as done. If it was the last of a file that hasn't failed, returns true and what is to be done now.
    pub(crate) fn part_done(&self) -> (bool, Option<OnLoaded>) {
        // Release and acquire: who does the rest sees the writes of all parts.
        let last = self.parts.fetch_sub(1, Ordering::AcqRel) == 1 && !self.has_failed();
        (last, if last { lock(&self.on_loaded).take() } else { None })
    }

    /// Whether a part of it couldn't be loaded.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Takes note that it can't be loaded; gives the error back if that is the load's own.
    pub(crate) fn fail(&self, error: LoadError) -> Result<(), LoadError> {
        let on_failed = {
            let mut on_failed = lock(&self.on_failed);
            if on_failed.is_none() && !self.has_failed() {
                return Err(error);
            }
            self.failed.store(true, Ordering::Release);
            on_failed.take()
        };
        if let Some(on_failed) = on_failed {
            on_failed(error);
        }
        Ok(())
    }
}

/// A piece of a file to load, of up to a batch's bytes.
pub(crate) struct Part {
    pub(crate) target: Arc<Target>,
    /// `None`: a file without contents.
    pub(crate) extent: Option<PageExtent>,
}

impl Part {
    fn length(&self) -> u64 {
        self.extent.map_or(0, |extent| extent.length)
    }
}

/// What one loader takes together.
pub(crate) enum Work {
    Parts(Vec<Part>),
    /// Files that aren't open yet.
    Files(Box<dyn FileBatch>),
}

/// Parts, up to a batch's bytes and number, or files that came together.
enum Queued {
    Parts(Batch),
    Files(Box<dyn FileBatch>),
}

#[derive(Default)]
struct Batch {
    bytes: u64,
    parts: Vec<Part>,
}

impl Batch {
    fn has_room(&self, part: &Part) -> bool {
        self.parts.len() < BATCH.1 && self.bytes + part.length() <= BATCH.0
    }

    fn push(&mut self, part: Part) {
        self.bytes += part.length();
        self.parts.push(part);
    }
}

#[derive(Default)]
struct State {
    batches: VecDeque<Queued>,
    urgent: VecDeque<Queued>,
    closed: bool,
    stopped: bool,
    failure: Option<LoadError>,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    /// A batch was added, or the state changed.
    filled: Condvar,
    /// A batch was taken, or the state changed.
    drained: Condvar,
}

impl Queue {
    /// Adds a part; waits while the queue is full, unless it is urgent.
    pub(crate) fn push(&self, part: Part, urgent: bool) -> Result<(), LoadError> {
        let mut state = lock(&self.state);
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let full = state.batches.len() >= BATCHES;
            let batches = if urgent { &mut state.urgent } else { &mut state.batches };
            if let Some(Queued::Parts(last)) = batches.back_mut()
                && last.has_room(&part)
            {
                last.push(part);
                return Ok(());
            }
            if urgent || !full {
                let mut batch = Batch::default();
                batch.push(part);
                batches.push_back(Queued::Parts(batch));
                self.filled.notify_one();
                return Ok(());
            }
            state = wait(&self.drained, state);
        }
    }

    /// Adds files that one loader is to open and load; waits while the queue is full.
    pub(crate) fn push_files(&self, files: Box<dyn FileBatch>) -> Result<(), LoadError> {
        let mut state = lock(&self.state);
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if state.batches.len() < BATCHES {
                state.batches.push_back(Queued::Files(files));
                self.filled.notify_one();
                return Ok(());
            }
            state = wait(&self.drained, state);
        }
    }

    /// The next batch; waits for one. `None` when there will be no more.
    pub(crate) fn take(&self) -> Option<Work> {
        let mut state = lock(&self.state);
        loop {
            if state.stopped {
                return None;
            }
            let next = match state.urgent.pop_front() {
                None => state.batches.pop_front().inspect(|_| self.drained.notify_one()),
                urgent => urgent,
            };
            match next {
                Some(Queued::Parts(batch)) => return Some(Work::Parts(batch.parts)),
                Some(Queued::Files(files)) => return Some(Work::Files(files)),
                None => {}
            }
            if state.closed {
                return None;
            }
            state = wait(&self.filled, state);
        }
    }

    /// Whether loaders are to end at once.
    pub(crate) fn is_stopped(&self) -> bool {
        lock(&self.state).stopped
    }

    /// No more will be added.
    pub(crate) fn close(&self) {
        lock(&self.state).closed = true;
        self.filled.notify_all();
    }

    /// Drops what is queued and ends the loaders; with a failure if there was one, of which the first counts.
    pub(crate) fn stop(&self, failure: Option<LoadError>) {
        let mut state = lock(&self.state);
        state.stopped = true;
        if state.failure.is_none() {
            state.failure = failure;
        }
        let dropped = (std::mem::take(&mut state.batches), std::mem::take(&mut state.urgent));
        drop(state);
        self.filled.notify_all();
        self.drained.notify_all();
        // Behind the lock: this drops closures of the caller's.
        drop(dropped);
    }

    /// The first failure.
    pub(crate) fn failure(&self) -> Option<LoadError> {
        lock(&self.state).failure.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PagesOffset;

    fn part(length: u64) -> Part {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let extent =
            (length > 0).then_some(PageExtent { file_offset: 0, length, pages_offset: PagesOffset(0) });
        Part { target: Target::new(file, false, 1, Callbacks::default()), extent }
    }

    #[test]
    fn small_parts_share_a_batch_and_urgent_ones_go_first() {
        let queue = Queue::default();
        for length in [4096, 0, 4096, BATCH.0, 4096] {
            queue.push(part(length), false).unwrap();
        }
        queue.push(part(1), true).unwrap();
        queue.close();
        let lengths = || match queue.take() {
            Some(Work::Parts(parts)) => Some(parts.iter().map(Part::length).collect::<Vec<_>>()),
            Some(Work::Files(_)) => unreachable!("none were added"),
            None => None,
        };
        assert_eq!(lengths(), Some(vec![1]));
        assert_eq!(lengths(), Some(vec![4096, 0, 4096]));
        assert_eq!(lengths(), Some(vec![BATCH.0]));
        assert_eq!(lengths(), Some(vec![4096]));
        assert_eq!(lengths(), None);
    }

    #[test]
    fn a_failure_wakes_who_waits_for_room_and_the_first_one_counts() {
        let queue = Arc::new(Queue::default());
        for _ in 0..BATCHES {
            queue.push(part(BATCH.0), false).unwrap();
        }
        let waiter = std::thread::spawn({
            let queue = queue.clone();
            move || queue.push(part(BATCH.0), false)
        });
        let queued = part(1);
        let target = Arc::downgrade(&queued.target);
        queue.push(queued, true).unwrap();
        queue.stop(Some(LoadError::Panicked));
        assert!(target.upgrade().is_none(), "what was queued is dropped at once");
        queue.stop(Some(LoadError::MainMemoryFile));
        assert!(matches!(waiter.join().unwrap(), Err(LoadError::Panicked)));
        assert!(queue.take().is_none());
        assert!(matches!(queue.failure(), Some(LoadError::Panicked)));
    }
}
