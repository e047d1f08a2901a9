//! The freeze of a checkpoint: all cgroups together, for a limited time, and never for longer than this process lives.
//!
//! ```text
//! thawed -> marked -> freezing -> frozen -> thawed -> unmarked
//!                         |          |
//!                         +----------+-> expired: thawed at the limit, by a thread of its own
//! ```
//!
//! Before anything is frozen, a [`FreezeMarker`] in the sandbox's state says what is about to be; it goes when everything
//! is thawed. If this process dies in between, whoever takes the sandbox's lock next finds the marker and thaws
//! (`StateDir::lock`): that the lock was free proves that its owner is dead.
//!
//! The limit is kept by a thread that thaws whatever is being done, since a copy can't be relied upon to look at a clock.
//! Who copies under a limit must not need the files to be still (no mappings), is told to stop by the pages file's save being
//! cancelled, and learns from [`Freeze::thaw`] that what it has is no image: only a freeze that is thawed there, by its
//! owner, was whole.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{getpriority_process, setpriority_process};
use stillframe_pgalloc::SaveCanceller;

use crate::checkpoint::error::CheckpointCause;
use crate::checkpoint::phase::milliseconds;
use crate::freezer::{Cgroup, FREEZE_TIMEOUT, FreezeError, Frozen};
use crate::state::{FreezeMarker, Locked};

/// The nice value of what goes before everything else.
const HIGHEST: i32 = -20;

/// This thread goes before others while it lives: those that are woken first by a thaw would else keep it from waking the rest
/// (measured: 0.6 s with 200 of them).
#[derive(Debug)]
struct Priority {
    /// What it was, if it is known and could be changed.
    before: Option<i32>,
}

impl Priority {
    fn raise() -> Self {
        let before = getpriority_process(None).ok();
        let raised = before.filter(|_| setpriority_process(None, HIGHEST).is_ok());
        Self { before: raised }
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        if let Some(before) = self.before
            && let Err(error) = setpriority_process(None, before)
        {
            tracing::warn!(%error, "a thread keeps its high priority");
        }
    }
}

/// The cgroups of one checkpoint, frozen. Thawed when it is dropped.
#[derive(Debug)]
pub(crate) struct Freeze<'a> {
    state: &'a Locked,
    begun: Instant,
    limit: Option<Duration>,
    shared: Arc<Shared>,
    watch: Option<JoinHandle<()>>,
    /// Dropped when everything is thawed.
    _priority: Priority,
}

#[derive(Debug)]
struct Shared {
    cgroups: Mutex<Cgroups>,
    ended: Condvar,
}

#[derive(Debug)]
struct Cgroups {
    frozen: Vec<Frozen>,
    /// Whether the limit still counts.
    limited: bool,
    /// How long the pause was when the limit ended it.
    expired: Option<Duration>,
    /// Whether something couldn't be thawed, so that the marker must stay.
    stuck: bool,
}

impl Cgroups {
    fn thaw(&mut self) {
        self.limited = false;
        for frozen in self.frozen.drain(..) {
            if let Err(error) = frozen.thaw() {
                tracing::error!(error = crate::cli::chain(&error), "a cgroup couldn't be thawed");
                self.stuck = true;
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Cgroups> {
        self.cgroups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> Freeze<'a> {
    /// Freezes `cgroups`, but those that are frozen already. `filesystems` are the names of those that will be frozen
    /// besides. At the end of `limit` they are thawed and `canceller` is used.
    pub(crate) fn new(
        state: &'a Locked,
        cgroups: &[&Cgroup],
        filesystems: Vec<String>,
        limit: Option<Duration>,
        canceller: SaveCanceller,
    ) -> Result<Self, CheckpointCause> {
        let mut ours = Vec::new();
        for cgroup in cgroups {
            match cgroup.is_frozen() {
                Ok(true) => {}
                Ok(false) => ours.push(*cgroup),
                // Its container has ended meanwhile: nothing runs in it that could write.
                Err(_) if cgroup.is_gone() => {}
                Err(error) => return Err(error.into()),
            }
        }
        // What is frozen by somebody else isn't frozen for longer by this.
        let limit = limit.filter(|_| !ours.is_empty());
        let marker = FreezeMarker { cgroups: ours.iter().copied().cloned().collect(), filesystems };
        state.put_freeze(&marker)?;
        let begun = Instant::now();
        let cgroups = Cgroups { frozen: Vec::new(), limited: limit.is_some(), expired: None, stuck: false };
        let shared = Arc::new(Shared { cgroups: Mutex::new(cgroups), ended: Condvar::new() });
        let mut freeze = Self { state, begun, limit, shared, watch: None, _priority: Priority::raise() };
        if let Some(limit) = limit {
            let shared = freeze.shared.clone();
            let watch = Builder::new().name("pause-limit".into());
            let watch = watch.spawn(move || expire(&shared, begun, limit, &canceller));
            freeze.watch = Some(watch.map_err(CheckpointCause::Thread)?);
        }
        for cgroup in ours {
            let timeout = limit.map_or(FREEZE_TIMEOUT, |limit| limit.saturating_sub(begun.elapsed()));
            match cgroup.freeze(timeout.min(FREEZE_TIMEOUT)) {
                Ok(frozen) => freeze.keep(frozen)?,
                Err(_) if cgroup.is_gone() => {}
                Err(FreezeError::Timeout { .. }) if limit.is_some_and(|limit| begun.elapsed() >= limit) => {
                    return Err(freeze.gave_up(begun.elapsed()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(freeze)
    }

    fn keep(&self, frozen: Frozen) -> Result<(), CheckpointCause> {
        let mut cgroups = self.shared.lock();
        match cgroups.expired {
            Some(paused) => Err(self.gave_up(paused)),
            None => {
                cgroups.frozen.push(frozen);
                Ok(())
            }
        }
    }

    fn gave_up(&self, paused: Duration) -> CheckpointCause {
        let limit_ms = self.limit.unwrap_or_default().as_millis().try_into().unwrap_or(u64::MAX);
        CheckpointCause::PauseLimit { paused_ms: milliseconds(paused), limit_ms }
    }

    /// The error instead of `cause`, if the limit has ended the freeze: what failed then failed because of that.
    pub(crate) fn because(&self, cause: CheckpointCause) -> CheckpointCause {
        match self.shared.lock().expired {
            Some(paused) => self.gave_up(paused),
            None => cause,
        }
    }

    /// Everything is read: the limit ends nothing any more. An error if it has.
    pub(crate) fn lift_limit(&self) -> Result<(), CheckpointCause> {
        let mut cgroups = self.shared.lock();
        if let Some(paused) = cgroups.expired {
            return Err(self.gave_up(paused));
        }
        cgroups.limited = false;
        self.shared.ended.notify_all();
        Ok(())
    }

    /// Thaws; how long the pause was. An error if the limit has ended it before.
    pub(crate) fn thaw(self) -> Result<Duration, CheckpointCause> {
        self.lift_limit()?;
        self.shared.lock().thaw();
        Ok(self.begun.elapsed())
    }
}

/// The thread that watches the limit.
fn expire(shared: &Shared, begun: Instant, limit: Duration, canceller: &SaveCanceller) {
    let mut cgroups = shared.lock();
    while cgroups.limited {
        let left = limit.saturating_sub(begun.elapsed());
        if left.is_zero() {
            cgroups.thaw();
            cgroups.expired = Some(begun.elapsed());
            canceller.cancel();
            return;
        }
        cgroups = shared.ended.wait_timeout(cgroups, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}

impl Drop for Freeze<'_> {
    fn drop(&mut self) {
        self.shared.lock().thaw();
        self.shared.ended.notify_all();
        if let Some(watch) = self.watch.take() {
            // It only ends by itself.
            let _ = watch.join();
        }
        if !self.shared.lock().stuck
            && let Err(error) = self.state.remove_freeze()
        {
            tracing::error!(%error, "the mark of a freeze that is over couldn't be removed");
        }
    }
}
