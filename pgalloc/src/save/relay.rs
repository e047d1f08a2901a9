//! Two threads that save one range: each takes the next part of the plan, gets it, and appends it when it is its turn.
//!
//! So parts are in the order of the file in the pages file, as with one thread. The plan's lock is held while a part is
//! cut and waits for its memory; the line's while a part waits for its turn and is appended. Nobody takes the former
//! while it holds the latter, so that a part whose turn it is never waits for one behind it.
//!
//! The first failure, in the order of the parts, ends the plan and is what comes of it.

use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;

use crate::buffer::{lock, wait};
use crate::page::PageExtent;
use crate::save::error::SaveError;
use crate::save::job::Job;
use crate::save::plan::{Part, Plan};

/// See the module.
pub(crate) struct Relay<'a> {
    job: &'a Job<'a>,
    plan: Mutex<Numbered<'a>>,
    line: Mutex<Line>,
    moved: Condvar,
}

/// A plan, and how many parts have been cut.
struct Numbered<'a> {
    plan: Plan<'a>,
    cut: u64,
}

/// What has been appended.
struct Line {
    /// The number of the part whose turn it is.
    turn: u64,
    extents: Vec<PageExtent>,
    failure: Option<SaveError>,
    /// A thread has panicked, and its turn never ends.
    abandoned: bool,
}

impl<'a> Relay<'a> {
    /// Goes on with `plan`; `extents` are those of the parts before.
    pub(crate) fn new(job: &'a Job<'a>, plan: Plan<'a>, extents: Vec<PageExtent>) -> Self {
        Self {
            job,
            plan: Mutex::new(Numbered { plan, cut: 0 }),
            line: Mutex::new(Line { turn: 0, extents, failure: None, abandoned: false }),
            moved: Condvar::new(),
        }
    }

    /// Saves all parts, with a second thread if there is one to be had.
    pub(crate) fn run(self) -> Result<Vec<PageExtent>, SaveError> {
        thread::scope(|scope| {
            let helper = thread::Builder::new().name("pages-scan".into());
            if let Err(error) = helper.spawn_scoped(scope, || self.work()) {
                tracing::debug!(%error, "no second thread: a range is saved by one");
            }
            self.work();
        });
        let line = self.line.into_inner().unwrap_or_else(PoisonError::into_inner);
        line.failure.map_or(Ok(line.extents), Err)
    }

    fn work(&self) {
        let _abandon = Abandon(self);
        while let Some((number, part)) = self.next() {
            let got = part.and_then(|part| self.job.get(part));
            let mut line = lock(&self.line);
            while line.turn != number && !line.is_over() {
                line = wait(&self.moved, line);
            }
            if line.is_over() {
                return;
            }
            if let Err(error) = got.and_then(|got| self.job.append(got, &mut line.extents)) {
                line.failure = Some(error);
            }
            line.turn += 1;
            drop(line);
            self.moved.notify_all();
        }
    }

    /// The next part and its number.
    fn next(&self) -> Option<(u64, Result<Part, SaveError>)> {
        let mut numbered = lock(&self.plan);
        if lock(&self.line).is_over() {
            return None;
        }
        let part = self.job.next(&mut numbered.plan).transpose()?;
        let number = numbered.cut;
        numbered.cut += 1;
        Some((number, part))
    }
}

impl Line {
    fn is_over(&self) -> bool {
        self.failure.is_some() || self.abandoned
    }
}

/// Lets the other thread go when this one panics.
struct Abandon<'r, 'a>(&'r Relay<'a>);

impl Drop for Abandon<'_, '_> {
    fn drop(&mut self) {
        if thread::panicking() {
            lock(&self.0.line).abandoned = true;
            self.0.moved.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use crate::page::{FileRange, PAGE_SIZE};
    use crate::save::{AsyncPagesFileSave, SaveOptions};

    const SIZE: u64 = 64 << 20;

    /// What comes of a relay over the parts of `planned`, the bytes of which are got from `source`.
    fn run(planned: &File, source: &File) -> Result<Vec<PageExtent>, SaveError> {
        let pages_file = tempfile::tempfile_in("/dev/shm").unwrap();
        let pages = AsyncPagesFileSave::new(pages_file, SaveOptions::default()).unwrap();
        let range = FileRange::new(0, SIZE).unwrap();
        let job = Job::new(&pages, source, range, true);
        let result = Relay::new(&job, Plan::new(planned, range), Vec::new()).run();
        pages.finish().unwrap();
        result
    }

    /// A file of [`SIZE`] with one page in `apart`.
    fn file(apart: u64, byte: u8) -> File {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(SIZE).unwrap();
        for offset in (0..SIZE).step_by((apart * PAGE_SIZE) as usize) {
            file.write_all_at(&[byte; PAGE_SIZE as usize], offset).unwrap();
        }
        file
    }

    #[test]
    fn the_first_failure_in_the_order_of_the_file_is_the_one_returned() {
        for (apart, byte) in [(3, 1), (1, 0), (1, 1)] {
            let planned = file(apart, byte);
            let extents = run(&planned, &planned).unwrap();
            assert_eq!(extents.is_empty(), byte == 0);
            let source = planned.try_clone().unwrap();
            let planned = file(apart, byte);
            for missing in [5000, 20 << 20, SIZE - 1] {
                source.set_len(SIZE - missing).unwrap();
                // The first page with data that isn't all there.
                let page = (SIZE - missing) / PAGE_SIZE;
                let expected = (page.next_multiple_of(apart) * PAGE_SIZE).max(SIZE - missing);
                for _ in 0..5 {
                    let error = run(&planned, &source).unwrap_err();
                    assert!(
                        matches!(error, SaveError::Truncated { offset, .. } if offset == expected),
                        "one page in {apart}, {missing} bytes missing, expected {expected:#x}: {error}"
                    );
                }
                source.set_len(SIZE).unwrap();
            }
        }
    }
}
