//! Cutting a range into [`Part`]s, in the order of the file. A part is what one thread gets at a time.
//!
//! Long runs of data are mapped, if the file is still. Shorter ones, and all of a live file, are gathered to parts that
//! fill a buffer, each run read by a pread(2) of its own, behind the one before: the buffer is written as it is. Holes
//! are in no part and never read: where one page in ten is there, reading whole windows takes up to twice as long.
//!
//! A part comes with its memory, which [`Plan::next`] may wait for. So whoever cuts parts for several threads, under a
//! lock, gives the memory there is to the parts that are appended first.

use std::fs::File;
use std::sync::Arc;

use crate::buffer::{BufferPool, PageBuffer, Permit};
use crate::page::{FileRange, page_ceil, page_floor};
use crate::save::error::SaveError;
use crate::save::source::DataRuns;
use crate::save::{AsyncPagesFileSave, BUFFERS, MAPPED, SMALL};

/// Data to be got at once.
pub(crate) enum Part {
    /// Whole pages to be mapped, with what they take out of the budget.
    Map(FileRange, Permit),
    /// Runs to be read one behind the other, with a buffer for them. Only the last may end inside a page.
    Read(Vec<FileRange>, PageBuffer),
}

/// The parts of a range that are still to be cut.
pub(crate) struct Plan<'a> {
    runs: DataRuns<'a>,
    /// What is left of the run that the last part ended in.
    rest: Option<FileRange>,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(source: &'a File, range: FileRange) -> Self {
        Self { runs: DataRuns::new(source, range), rest: None }
    }

    /// The next part, of mapped pages only if `map`; `None` when there are no more.
    pub(crate) fn next(&mut self, pages: &AsyncPagesFileSave, map: bool) -> Result<Option<Part>, SaveError> {
        let (mut read, mut length) = (Vec::new(), 0);
        while length < BUFFERS.0 as u64 {
            let Some(run) = self.rest.take().map_or_else(|| self.runs.next(), |run| Ok(Some(run)))? else {
                break;
            };
            let start = run.start();
            // Behind the end of a file its last page may have what a mapping has put there, so it is read, not mapped.
            let whole = page_floor(run.end());
            let long = map && whole - start > SMALL as u64;
            if long && !read.is_empty() {
                self.rest = Some(run);
                break;
            }
            let end = if long {
                // Cut at multiples, so that huge pages are mapped as such.
                whole.min((start + 1).next_multiple_of(MAPPED.0))
            } else {
                run.end().min(start + BUFFERS.0 as u64 - length)
            };
            self.rest = (end < run.end()).then(|| subrange(end, run.end()));
            let part = subrange(start, end);
            if long {
                return Ok(Some(Part::Map(part, pages.mapped.take(part.len()))));
            }
            length += page_ceil(part.len()).expect("a buffer's length at most");
            read.push(part);
        }
        if read.is_empty() {
            return Ok(None);
        }
        let buffers = if length <= SMALL as u64 { &pages.scratch } else { &pages.read_buffers };
        Ok(Some(Part::Read(read, take_buffer(buffers)?)))
    }
}

/// Waits for a buffer.
pub(crate) fn take_buffer(buffers: &Arc<BufferPool>) -> Result<PageBuffer, SaveError> {
    buffers.take().map_err(|source| SaveError::Buffer { length: buffers.length(), source: Arc::new(source) })
}

/// A part of a valid range.
pub(crate) fn subrange(start: u64, end: u64) -> FileRange {
    FileRange::new(start, end).expect("a part of a valid range is one")
}
