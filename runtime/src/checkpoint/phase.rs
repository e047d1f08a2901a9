//! The phases of a checkpoint, by one set of names in logs, errors and results.
//!
//! ```text
//! prepare -> copy (containers running) -> freeze -> settle (what changed) -> thaw -> commit
//! ```
//!
//! Without a copy ahead of the freeze *copy* takes no time. Where the containers are to die, *thaw* comes after *commit*.

use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

/// What a checkpoint is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// What is to be saved is looked up; nothing is touched.
    Prepare,
    /// Files are copied while the containers run.
    Copy,
    /// The containers are being frozen.
    Freeze,
    /// What has changed since it was copied is saved.
    Settle,
    /// The containers are being thawed.
    Thaw,
    /// The image is made durable and complete.
    Commit,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prepare => "prepare",
            Self::Copy => "copy",
            Self::Freeze => "freeze",
            Self::Settle => "settle",
            Self::Thaw => "thaw",
            Self::Commit => "commit",
        })
    }
}

/// How long a phase took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PhaseTime {
    /// Which.
    pub phase: Phase,
    /// Milliseconds.
    pub ms: f64,
}

/// Where a checkpoint is, and how long it was where.
#[derive(Debug)]
pub(crate) struct Progress {
    container: String,
    phase: Phase,
    since: Instant,
    begun: Instant,
    done: Vec<PhaseTime>,
}

impl Progress {
    pub(crate) fn new(container: &str) -> Self {
        let now = Instant::now();
        Self {
            container: container.to_owned(),
            phase: Phase::Prepare,
            since: now,
            begun: now,
            done: Vec::new(),
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    /// Goes on to `phase`.
    pub(crate) fn enter(&mut self, phase: Phase) {
        self.leave();
        self.phase = phase;
        tracing::debug!(container = self.container, %phase, "checkpoint");
    }

    fn leave(&mut self) {
        let now = Instant::now();
        self.done.push(PhaseTime { phase: self.phase, ms: milliseconds(now - self.since) });
        self.since = now;
    }

    /// Whether it took so long already.
    pub(crate) fn is_late(&self, limit: Duration) -> bool {
        self.begun.elapsed() >= limit
    }

    /// How long each phase took, in their order, and all of them, in milliseconds.
    pub(crate) fn finish(mut self) -> (Vec<PhaseTime>, f64) {
        self.leave();
        (self.done, milliseconds(self.begun.elapsed()))
    }
}

pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
