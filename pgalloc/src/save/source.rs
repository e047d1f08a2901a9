//! Reading what is to be saved: which parts of a file have data, and getting at them.
//!
//! Holes are found by lseek(2) SEEK_DATA and SEEK_HOLE and never touched: a touch of a hole through a mapping would
//! make the kernel allocate a page for it (`shmem_fault`), at the expense of the container that is being saved.
//! Both move the descriptor's file offset, of which pread(2) and mmap(2) know nothing.
//!
//! The page that holds byte `i64::MAX - 1` is one that Linux doesn't find (`mapping_seek_hole_data` compares with the
//! page's end, which is no `loff_t`; seen on 6.18): there it is read without asking.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::page::{FileRange, MAX_FILE_SIZE, PAGE_SIZE, page_ceil, page_floor};
use crate::save::error::SaveError;

/// The runs of data in a range, ascending, in whole pages, clipped to the range.
///
/// SEEK_HOLE looks at every page up to the hole that it finds. So a file that has as many blocks as its size takes, in pages of the usual
/// size, is taken for one run without asking. If some of those blocks are behind its end (fallocate(2)
/// FALLOC_FL_KEEP_SIZE), it has holes that are read like data; they are zeros, which aren't saved.
///
/// As long as runs are single pages, as in a file of scattered ones, the end of a run isn't asked for: one lseek(2)
/// says where the next run is, and so that it isn't the next page. mincore(2) on a mapping is no better: it takes as
/// long where one page in ten is there and longer where fewer are, and it can't tell swapped pages from holes.
#[derive(Debug)]
pub(crate) struct DataRuns<'a> {
    file: &'a File,
    range: FileRange,
    position: u64,
    /// The start of the next run, if it is known.
    start: Option<Start>,
    /// Whether the last run was a single page.
    single: bool,
    /// Whether there is one run, which is the range.
    whole: bool,
}

/// Where a run begins.
#[derive(Clone, Copy, Debug)]
struct Start {
    page: u64,
    /// In that page, at its start but for filesystems with smaller blocks.
    data: u64,
}

impl<'a> DataRuns<'a> {
    pub(crate) fn new(file: &'a File, range: FileRange) -> Self {
        let whole = file.metadata().is_ok_and(|metadata| {
            metadata.blksize() == PAGE_SIZE
                && page_ceil(metadata.len()).is_some_and(|size| metadata.blocks() == size / 512)
                && range.end() <= metadata.len()
        });
        Self { file, range, position: range.start(), start: None, single: false, whole }
    }

    /// The next run; `None` when there are no more.
    pub(crate) fn next(&mut self) -> Result<Option<FileRange>, SaveError> {
        if self.whole {
            let left = self.position < self.range.end();
            self.position = self.range.end();
            return Ok(left.then_some(self.range));
        }
        loop {
            let known = self.start.take();
            let Some(start) =
                known.map_or_else(|| self.seek_start(self.position), |start| Ok(Some(start)))?
            else {
                return Ok(None);
            };
            let page_end = (start.page + PAGE_SIZE).min(self.range.end());
            let end = if self.single {
                match self.seek_start(page_end)? {
                    Some(next) if next.page == page_end => self.seek_end(next)?,
                    next => {
                        self.start = next;
                        page_end
                    }
                }
            } else {
                self.seek_end(start)?
            };
            self.position = end;
            self.single = end <= page_end;
            // Else punched between the two: there may be data behind.
            if end > start.page {
                return Ok(Some(FileRange::new(start.page, end).expect("lies in a valid range")));
            }
        }
    }

    /// The first data at or behind `from`.
    fn seek_start(&self, from: u64) -> Result<Option<Start>, SaveError> {
        if from >= self.range.end() {
            return Ok(None);
        }
        let data = seek(self.file, from, Whence::SeekData)?.unwrap_or(from.max(page_floor(MAX_FILE_SIZE)));
        let start = Start { page: page_floor(data).max(from), data: data.max(from) };
        Ok((start.page < self.range.end()).then_some(start))
    }

    /// Where the run that begins at `start` ends.
    fn seek_end(&self, start: Start) -> Result<u64, SaveError> {
        if start.page == page_floor(MAX_FILE_SIZE) {
            return Ok(self.range.end());
        }
        let hole = seek(self.file, start.data, Whence::SeekHole)?.unwrap_or(self.range.end());
        Ok(page_ceil(hole).unwrap_or(u64::MAX).clamp(start.page, self.range.end()))
    }
}

/// lseek(2) for data or a hole; `None` where there is none at or behind `offset`.
fn seek(file: &File, offset: u64, whence: Whence) -> Result<Option<u64>, SaveError> {
    match lseek(file, offset as i64, whence) {
        Ok(found) => Ok(Some(found as u64)),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(read_error(offset, errno.into())),
    }
}

/// Reads from `offset` until `buffer` is full or the file ends; returns the bytes read.
pub(crate) fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> Result<usize, SaveError> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(read_error(offset + filled as u64, error)),
        }
    }
    Ok(filled)
}

/// An error of reading the source at `offset`.
pub(crate) fn read_error(offset: u64, source: io::Error) -> SaveError {
    SaveError::Read { offset, source: Arc::new(source) }
}

/// Checks that `range` starts at a page and, if `whole`, that the file has all of it.
pub(crate) fn check_range(file: &File, range: FileRange, whole: bool) -> Result<(), SaveError> {
    if !range.start().is_multiple_of(PAGE_SIZE) {
        return Err(SaveError::Unaligned { range });
    }
    if whole {
        let size = file.metadata().map_err(|source| SaveError::Examine { source: Arc::new(source) })?.len();
        if size < range.end() {
            return Err(SaveError::Truncated { range, offset: size });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn runs(file: &File, range: FileRange) -> Vec<(u64, u64)> {
        let mut runs = DataRuns::new(file, range);
        std::iter::from_fn(|| runs.next().unwrap()).map(|run| (run.start(), run.end())).collect()
    }

    /// Page by page, by two lseek(2) each.
    fn plain(file: &File, range: FileRange) -> Vec<(u64, u64)> {
        let (mut runs, mut position) = (Vec::new(), range.start());
        while let Some(data) =
            seek(file, position, Whence::SeekData).unwrap().filter(|&data| data < range.end())
        {
            position = seek(file, data, Whence::SeekHole).unwrap().unwrap().min(range.end());
            runs.push((data, position));
        }
        runs
    }

    #[test]
    fn data_is_found_between_holes() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(1 << 40).unwrap();
        file.write_all_at(&[1; 100], 5 * 4096 + 7).unwrap();
        file.write_all_at(&[1; 8192], (1 << 40) - 8192).unwrap();
        let range = |start, end| FileRange::new(start, end).unwrap();
        let (first, last) = ((5 * 4096, 6 * 4096), (1 << 40) - 8192);
        assert_eq!(runs(&file, range(0, 1 << 40)), [first, (last, 1 << 40)]);
        assert_eq!(runs(&file, range(4096, (1 << 40) - 5000)), [first, (last, (1 << 40) - 5000)]);
        assert_eq!(runs(&file, range(5 * 4096, last)), [first]);
        assert_eq!(runs(&file, range(0, 4096)), []);
        assert_eq!(runs(&file, range(0, 0)), []);
    }

    #[test]
    fn a_file_without_holes_is_one_run_and_one_with_blocks_behind_its_end_has_no_less_than_its_data() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.write_all_at(&[1; 20 * 4096 + 7], 0).unwrap();
        let range = |start, end| FileRange::new(start, end).unwrap();
        assert_eq!(runs(&file, range(0, 20 * 4096 + 7)), [(0, 20 * 4096 + 7)]);
        assert_eq!(runs(&file, range(4096, 8192)), [(4096, 8192)]);
        assert_eq!(runs(&file, range(4096, 4096)), []);
        file.set_len(30 * 4096).unwrap();
        assert_eq!(runs(&file, range(0, 30 * 4096)), [(0, 21 * 4096)]);
        let behind = nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(&file, behind, 30 * 4096, 9 * 4096).unwrap();
        assert_eq!(runs(&file, range(0, 30 * 4096)), [(0, 30 * 4096)]);
    }

    proptest! {
        #[test]
        fn runs_are_those_found_by_two_seeks_each(
            // Pages of data and of hole, by turns, mostly single ones.
            lengths in prop::collection::vec((prop_oneof![3 => Just(1u64), 1 => 2u64..5], 1u64..4), 0..40),
            cut in 0..3 * PAGE_SIZE,
            first in 0u64..3,
        ) {
            let file = tempfile::tempfile_in("/dev/shm").unwrap();
            let mut end = first * PAGE_SIZE;
            for (data, hole) in lengths {
                file.write_all_at(&vec![1; (data * PAGE_SIZE) as usize], end).unwrap();
                end += (data + hole) * PAGE_SIZE;
            }
            file.set_len(end).unwrap();
            let range = FileRange::new(PAGE_SIZE.min(end), end.saturating_sub(cut).max(PAGE_SIZE.min(end))).unwrap();
            prop_assert_eq!(runs(&file, range), plain(&file, range));
        }
    }
}
