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
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::page::{FileRange, MAX_FILE_SIZE, PAGE_SIZE, page_ceil, page_floor};
use crate::save::error::SaveError;

/// The next data in `range` of `file` at or behind `from`, in whole pages, clipped to the range.
pub(crate) fn next_data(file: &File, range: FileRange, from: u64) -> Result<Option<FileRange>, SaveError> {
    if from >= range.end() {
        return Ok(None);
    }
    let Some(data) = seek(file, from, Whence::SeekData)? else {
        let last = from.max(page_floor(MAX_FILE_SIZE));
        return Ok(
            (last < range.end()).then(|| FileRange::new(last, range.end()).expect("a part of a valid range"))
        );
    };
    // A filesystem with small blocks may have data begin or end inside a page.
    let start = page_floor(data).max(from);
    if start >= range.end() {
        return Ok(None);
    }
    let hole = seek(file, data.max(from), Whence::SeekHole)?.unwrap_or(range.end());
    let end = page_ceil(hole).unwrap_or(u64::MAX).clamp(start, range.end());
    if end == start {
        // Truncated between the two, or punched.
        return Ok(None);
    }
    let data = FileRange::new(start, end).expect("lies in a valid range");
    Ok(Some(data))
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

    #[test]
    fn data_is_found_between_holes() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(1 << 40).unwrap();
        file.write_all_at(&[1; 100], 5 * 4096 + 7).unwrap();
        file.write_all_at(&[1; 8192], (1 << 40) - 8192).unwrap();
        let whole = FileRange::new(0, 1 << 40).unwrap();
        let first = next_data(&file, whole, 0).unwrap().unwrap();
        assert_eq!((first.start(), first.end()), (5 * 4096, 6 * 4096));
        let second = next_data(&file, whole, first.end()).unwrap().unwrap();
        assert_eq!((second.start(), second.end()), ((1 << 40) - 8192, 1 << 40));
        assert_eq!(next_data(&file, whole, second.end()).unwrap(), None);
        let part = FileRange::new(4096, (1 << 40) - 5000).unwrap();
        let clipped = next_data(&file, part, first.end()).unwrap().unwrap();
        assert_eq!((clipped.start(), clipped.end()), ((1 << 40) - 8192, (1 << 40) - 5000));
        assert_eq!(next_data(&file, FileRange::new(0, 4096).unwrap(), 0).unwrap(), None);
    }
}
