//! One call of `write_range` or `write_live_range`.
//!
//! Each part is *got* (mapped or read, and its zero pages found), which several threads may do at once, and then
//! *appended*, in the order of the parts.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::buffer::{PageBuffer, Permit};
use crate::page::{FileRange, PAGE_SIZE, PageExtent};
use crate::save::error::SaveError;
use crate::save::plan::{Part, Plan, subrange, take_buffer};
use crate::save::relay::Relay;
use crate::save::source::{check_range, read_up_to};
use crate::save::tail::PageMemory;
use crate::save::{AsyncPagesFileSave, SMALL};
use crate::sys::mapping::{FileMapping, MappingError};
use crate::zero::{data_runs, is_zero};

/// So many parts that were slow to get, for what there is to write of them, and a second thread helps.
const ALONE: u32 = 2;

/// See the module.
pub(crate) struct Job<'a> {
    pages: &'a AsyncPagesFileSave,
    source: &'a File,
    range: FileRange,
    still: bool,
    /// Whether the kernel doesn't populate mappings of the source.
    unmappable: AtomicBool,
}

/// A part that is to be appended.
pub(crate) enum Got {
    Pages(Pages),
    /// It can't be mapped and is to be read, when it is its turn.
    Unmapped(FileRange),
}

/// Memory, and what is to be saved of it.
#[derive(Default)]
pub(crate) struct Pages {
    /// `None` where there are no pieces.
    memory: Option<PageMemory>,
    /// Each with its offset in the file. One that ends inside a page has zeros behind it.
    pieces: Vec<(u64, Range<usize>)>,
}

impl Got {
    /// Whether the part was all data without a hole, which is got faster than it is written.
    fn is_plain(&self) -> bool {
        matches!(self, Self::Pages(Pages { pieces, .. }) if pieces.len() == 1)
    }
}

impl<'a> Job<'a> {
    pub(crate) fn new(
        pages: &'a AsyncPagesFileSave,
        source: &'a File,
        range: FileRange,
        still: bool,
    ) -> Self {
        Self { pages, source, range, still, unmappable: AtomicBool::new(false) }
    }

    /// Saves the range.
    pub(crate) fn save(&self) -> Result<Vec<PageExtent>, SaveError> {
        // A read tells small files' holes and size as well as two more system calls would.
        let small = self.range.len() <= SMALL as u64;
        check_range(self.source, self.range, self.still && !small)?;
        let mut extents = Vec::new();
        if small {
            self.copy(self.range, &mut extents)?;
            return Ok(extents);
        }
        let mut plan = Plan::new(self.source, self.range);
        let mut slow = 0;
        while slow < ALONE {
            let Some(part) = self.next(&mut plan)? else { return Ok(extents) };
            let got = self.get(part)?;
            slow += u32::from(!got.is_plain());
            self.append(got, &mut extents)?;
        }
        Relay::new(self, plan, extents).run()
    }

    /// Cuts the next part; the only step that waits for buffers or the budget.
    pub(crate) fn next(&self, plan: &mut Plan<'_>) -> Result<Option<Part>, SaveError> {
        self.pages.check()?;
        plan.next(self.pages, self.still && !self.unmappable.load(Ordering::Relaxed))
    }

    /// Gets a part into memory and finds what is to be saved of it.
    pub(crate) fn get(&self, part: Part) -> Result<Got, SaveError> {
        match part {
            Part::Read(runs, buffer) => self.read(&runs, buffer).map(Got::Pages),
            Part::Map(part, permit) => self.map(part, permit),
        }
    }

    /// Maps whole pages, but for zeros at their start.
    fn map(&self, part: FileRange, permit: Permit) -> Result<Got, SaveError> {
        let start = part.start() + self.skip_zeros(part)?;
        if start == part.end() {
            return Ok(Got::Pages(Pages::default()));
        }
        let part = subrange(start, part.end());
        match FileMapping::new(self.source, part.start(), part.len() as usize) {
            Ok(mapping) => {
                let memory = PageMemory::Mapped(Arc::new((mapping, permit)));
                let mut pieces = Vec::new();
                self.find(memory.bytes(), part.start(), 0, &mut pieces);
                Ok(Got::Pages(Pages { memory: Some(memory), pieces }))
            }
            Err(MappingError::Map(source)) => {
                Err(SaveError::Map { offset: part.start(), length: part.len(), source: Arc::new(source) })
            }
            Err(MappingError::Page(offset, source)) => {
                check_range(self.source, self.range, true)?;
                // A hole, for which there is no room; else reading it says what is wrong.
                tracing::debug!(offset = part.start() + offset as u64, %source, "a page isn't mapped but read");
                Ok(Got::Unmapped(part))
            }
            Err(MappingError::Unsupported) => {
                self.unmappable.store(true, Ordering::Relaxed);
                Ok(Got::Unmapped(part))
            }
        }
    }

    /// Bytes of zeros that `part` begins with, all of it or a multiple of [`SMALL`].
    ///
    /// Zeros are read faster than they are mapped, by two threads twice as fast: mapping and unmapping take turns, and
    /// interrupt the other CPUs. One page tells whether to try.
    fn skip_zeros(&self, part: FileRange) -> Result<u64, SaveError> {
        let mut scratch = self.scratch()?;
        let mut zero = |start, end| {
            let read = self.fill(&mut scratch, subrange(start, end))?;
            Ok(is_zero(&scratch[..read]))
        };
        let mut start = part.start();
        if zero(start, start + PAGE_SIZE)? {
            while start < part.end() {
                let end = part.end().min(start + SMALL as u64);
                if !zero(start, end)? {
                    break;
                }
                start = end;
            }
        }
        let zeros = start - part.start();
        self.pages.zero_bytes.fetch_add(zeros, Ordering::Relaxed);
        Ok(zeros)
    }

    /// Appends what is to be saved of a part: by reference, or as a copy if it is little.
    pub(crate) fn append(&self, got: Got, extents: &mut Vec<PageExtent>) -> Result<(), SaveError> {
        let Pages { memory, pieces } = match got {
            Got::Pages(pages) => pages,
            Got::Unmapped(part) => {
                let mut start = part.start();
                while start < part.end() {
                    let end = part.end().min(start + SMALL as u64);
                    self.copy(subrange(start, end), extents)?;
                    start = end;
                }
                return Ok(());
            }
        };
        let Some(memory) = memory else { return Ok(()) };
        let data = pieces.iter().map(|(_, piece)| piece.len()).sum::<usize>();
        if data > SMALL {
            self.pages.tail.append_pages(&memory, &pieces, extents);
            return Ok(());
        }
        let bytes = memory.bytes();
        let pieces = pieces.into_iter().map(|(offset, piece)| (offset, &bytes[piece]));
        self.pages.tail.append_copies(pieces, extents)
    }

    /// Saves up to [`SMALL`] bytes.
    fn copy(&self, part: FileRange, extents: &mut Vec<PageExtent>) -> Result<(), SaveError> {
        let pages = self.read(&[part], self.scratch()?)?;
        self.append(Got::Pages(pages), extents)
    }

    fn scratch(&self) -> Result<PageBuffer, SaveError> {
        take_buffer(&self.pages.scratch)
    }

    /// Reads runs one behind the other.
    fn read(&self, runs: &[FileRange], mut buffer: PageBuffer) -> Result<Pages, SaveError> {
        let (mut pieces, mut position) = (Vec::with_capacity(runs.len()), 0);
        for &run in runs {
            let read = self.fill(&mut buffer[position..], run)?;
            // While it is in the CPU's caches. Pages of zeros at the end of a run are written over by the next.
            self.find(&buffer[position..position + read], run.start(), position, &mut pieces);
            position = pieces.last().map_or(0, |(_, piece)| piece.end).next_multiple_of(PAGE_SIZE as usize);
        }
        let memory = Some(PageMemory::Buffered(Arc::new(buffer)));
        Ok(Pages { memory, pieces })
    }

    /// Reads `run` to the start of `buffer`; returns the bytes there are, in whole pages unless the run ends inside one.
    /// What is left of the last page is zeros.
    fn fill(&self, buffer: &mut [u8], run: FileRange) -> Result<usize, SaveError> {
        let length = run.len() as usize;
        let read = read_up_to(self.source, &mut buffer[..length], run.start())?;
        if read < length && self.still {
            return Err(SaveError::Truncated { range: self.range, offset: run.start() + read as u64 });
        }
        let whole = read.next_multiple_of(PAGE_SIZE as usize);
        buffer[read..whole].fill(0);
        // Where a live file ended is not where it will end: only the range decides which page is the last.
        Ok(whole.min(length))
    }

    /// Adds the pieces of `bytes` that aren't zero; `bytes` are at `offset` in the file, at `position` in their memory.
    fn find(&self, bytes: &[u8], offset: u64, position: usize, pieces: &mut Vec<(u64, Range<usize>)>) {
        let mut zeros = bytes.len();
        for run in data_runs(bytes) {
            zeros -= run.len();
            pieces.push((offset + run.start as u64, position + run.start..position + run.end));
        }
        if zeros > 0 {
            self.pages.zero_bytes.fetch_add(zeros as u64, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::save::SaveOptions;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_source_that_cannot_be_mapped_is_read() {
        const SIZE: u64 = 10 << 20;
        let source = tempfile::tempfile_in("/dev/shm").unwrap();
        let data: Vec<u8> = (0..SIZE).map(|index| if index % 30_000 < 100 { 1 } else { 0 }).collect();
        source.write_all_at(&data, 0).unwrap();
        let range = FileRange::new(0, SIZE).unwrap();
        let pages_file = tempfile::tempfile_in("/dev/shm").unwrap();
        let pages = AsyncPagesFileSave::new(pages_file, SaveOptions::default()).unwrap();
        let mut saved: Vec<Vec<(u64, u64)>> = Vec::new();
        let mut add = |extents: Vec<PageExtent>| {
            saved.push(extents.iter().map(|extent| (extent.file_offset, extent.length)).collect());
        };
        let mapped = Job::new(&pages, &source, range, true);
        add(mapped.save().unwrap());
        // As when the first part is refused, and as for those that follow.
        let refused = Job::new(&pages, &source, range, true);
        let mut extents = Vec::new();
        refused.append(Got::Unmapped(range), &mut extents).unwrap();
        add(extents);
        refused.unmappable.store(true, Ordering::Relaxed);
        add(refused.save().unwrap());
        assert!(!saved[0].is_empty());
        assert!(saved.iter().all(|extents| *extents == saved[0]));
        let data = saved[0].iter().map(|(_, length)| length).sum::<u64>();
        assert_eq!(pages.finish().unwrap().zero_bytes, 3 * (SIZE - data));
    }
}
