//! A file's contents as they were copied: where its pages are in the pages file, and a digest of each, so that copying it
//! again writes only the pages that differ.
//!
//! The digest is XXH3-64: two different contents of one page that have the same would be taken for unchanged, which happens
//! by accident once in 2^64 comparisons.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use stillframe_pgalloc::{AsyncMemoryFileSave, PAGE_SIZE, PageExtent, PagesOffset, SaveError, digest_chunks};

use crate::lazy::unloaded::{UnloadedError, UnloadedFile};

/// Bytes that are read at once.
const CHUNK: u64 = 1 << 20;
/// A file of up to so many bytes is read without asking where it has data.
const SMALL: u64 = 128 << 10;
/// The page that holds byte `i64::MAX - 1`, where Linux finds no data (see `pgalloc`'s source).
const LAST_PAGE: u64 = i64::MAX as u64 & !(PAGE_SIZE - 1);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// Ascending and merged.
    pub(crate) extents: Vec<PageExtent>,
    /// One for each page of the extents, the last of which may be shorter than a page and counts as filled up with zeros.
    digests: Vec<u64>,
}

/// Why a file couldn't be copied.
#[derive(Debug)]
pub(crate) enum CopyError {
    /// It can't be read.
    Read(io::Error),
    /// It isn't loaded, and what it is to be can't be read.
    Unloaded(UnloadedError),
    /// The pages file can't be written.
    Pages(SaveError),
}

/// What a copy is made of.
#[derive(Clone, Copy)]
pub(crate) enum Original<'a> {
    /// The file, open for reading.
    File(&'a File),
    /// The file as it will be.
    Unloaded(UnloadedFile<'a>),
}

impl Contents {
    fn push(&mut self, file_offset: u64, length: u64, pages_offset: u64, digest: u64) {
        self.digests.push(digest);
        match self.extents.last_mut() {
            // Only the last page of a file isn't whole, so whatever is followed is made of pages.
            Some(last)
                if last.file_offset + last.length == file_offset
                    && last.pages_offset.0 + last.length == pages_offset =>
            {
                last.length += length;
            }
            _ => {
                self.extents.push(PageExtent { file_offset, length, pages_offset: PagesOffset(pages_offset) })
            }
        }
    }

    /// Its pages, in the order of the file: offset in the file, in the pages file, digest.
    fn pages(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        let starts = self.extents.iter().flat_map(|extent| {
            let pages = 0..extent.length.div_ceil(PAGE_SIZE);
            pages
                .map(|page| (extent.file_offset + page * PAGE_SIZE, extent.pages_offset.0 + page * PAGE_SIZE))
        });
        starts
            .zip(&self.digests)
            .map(|((file_offset, pages_offset), digest)| (file_offset, pages_offset, *digest))
    }
}

/// Copies files, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Copier {
    buffer: Vec<u8>,
    /// Ranges of the pages file that nothing refers to any more.
    pub(crate) superseded: Vec<Range<u64>>,
    /// Bytes that were written to the pages file.
    pub(crate) written: u64,
}

impl Copier {
    /// Copies the first `size` bytes of `original`, of which `old` was copied before. What isn't there any more is a hole.
    pub(crate) fn copy(
        &mut self,
        original: Original<'_>,
        size: u64,
        old: &Contents,
        memory: &AsyncMemoryFileSave<'_>,
    ) -> Result<Contents, CopyError> {
        let mut new = Contents::default();
        let mut before = old.pages().peekable();
        let mut position = 0;
        while position < size {
            let run = if size <= SMALL { Some(0..size) } else { original.data(position, size)? };
            let Some(run) = run else { break };
            let mut start = run.start;
            while start < run.end {
                let end = run.end.min(start + CHUNK);
                let there = self.read(original, start, end)?;
                self.take(start, there.min(size), &mut before, &mut new, memory)?;
                start = end;
            }
            position = run.end;
        }
        before.for_each(|(_, pages_offset, _)| self.drop_page(pages_offset));
        Ok(new)
    }

    /// Nothing refers to `contents` any more.
    pub(crate) fn drop_all(&mut self, contents: &Contents) {
        contents.pages().for_each(|(_, pages_offset, _)| self.drop_page(pages_offset));
    }

    fn drop_page(&mut self, at: u64) {
        match self.superseded.last_mut() {
            Some(last) if last.end == at => last.end += PAGE_SIZE,
            _ => self.superseded.push(at..at + PAGE_SIZE),
        }
    }

    /// Reads from `start`, a page's, to `end`, and fills up with zeros to the end of a page. Where the file ends now.
    fn read(&mut self, original: Original<'_>, start: u64, end: u64) -> Result<u64, CopyError> {
        self.buffer.resize(CHUNK as usize, 0);
        let length = (end - start) as usize;
        let file = match original {
            Original::File(file) => file,
            Original::Unloaded(file) => {
                file.read(start, &mut self.buffer[..length]).map_err(CopyError::Unloaded)?;
                self.buffer[length..length.next_multiple_of(PAGE_SIZE as usize)].fill(0);
                return Ok(end);
            }
        };
        let mut filled = 0;
        while filled < length {
            match file.read_at(&mut self.buffer[filled..length], start + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(CopyError::Read(error)),
            }
        }
        self.buffer[filled..filled.next_multiple_of(PAGE_SIZE as usize)].fill(0);
        Ok(start + filled as u64)
    }

    /// Takes what is in the buffer, the file's bytes from `start` to `end`.
    fn take(
        &mut self,
        start: u64,
        end: u64,
        before: &mut std::iter::Peekable<impl Iterator<Item = (u64, u64, u64)>>,
        new: &mut Contents,
        memory: &AsyncMemoryFileSave<'_>,
    ) -> Result<(), CopyError> {
        let page_size = PAGE_SIZE as usize;
        let length = end.saturating_sub(start) as usize;
        let digests = digest_chunks(&self.buffer[..length.next_multiple_of(page_size)], page_size);
        // Of each page that isn't zero: its number here, and where it is saved already.
        let mut pages: Vec<(usize, Option<u64>)> = Vec::with_capacity(digests.len());
        let mut changed: Vec<(u64, Range<usize>)> = Vec::new();
        for (number, digest) in digests.iter().enumerate() {
            let offset = start + (number * page_size) as u64;
            let bytes = number * page_size..length.min((number + 1) * page_size);
            while let Some((_, pages_offset, _)) = before.next_if(|(at, ..)| *at < offset) {
                self.drop_page(pages_offset);
            }
            let saved = before.next_if(|(at, ..)| *at == offset);
            let zero = is_zero(&self.buffer[bytes.clone()]);
            match saved {
                Some((_, pages_offset, saved)) if saved == *digest && !zero => {
                    pages.push((number, Some(pages_offset)));
                    continue;
                }
                Some((_, pages_offset, _)) => self.drop_page(pages_offset),
                None => {}
            }
            if zero {
                continue;
            }
            pages.push((number, None));
            match changed.last_mut() {
                Some((_, last)) if last.end == bytes.start => last.end = bytes.end,
                _ => changed.push((offset, bytes)),
            }
        }
        let mut next = 0;
        if !changed.is_empty() {
            let pieces: Vec<_> =
                changed.iter().map(|(offset, bytes)| (*offset, &self.buffer[bytes.clone()])).collect();
            let written = memory.write_pages(&pieces).map_err(CopyError::Pages)?;
            next = written[0].pages_offset.0;
            self.written += pieces.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
        }
        for (number, saved) in pages {
            let offset = start + (number * page_size) as u64;
            let pages_offset = saved.unwrap_or_else(|| {
                next += PAGE_SIZE;
                next - PAGE_SIZE
            });
            new.push(offset, PAGE_SIZE.min(end - offset), pages_offset, digests[number]);
        }
        Ok(())
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(64).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

impl Original<'_> {
    /// The first run of data at or behind `position`, in whole pages but for the file's last.
    fn data(&self, position: u64, size: u64) -> Result<Option<Range<u64>>, CopyError> {
        match self {
            Self::File(file) => data(file, position, size),
            Self::Unloaded(file) => Ok(file.data(position).map(|(start, end)| start..end)),
        }
    }
}

fn data(file: &File, position: u64, size: u64) -> Result<Option<Range<u64>>, CopyError> {
    let seek = |from| match rustix::fs::seek(file, from) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NXIO) => Ok(None),
        Err(errno) => Err(CopyError::Read(errno.into())),
    };
    let start = match seek(SeekFrom::Data(position))? {
        Some(start) => start & !(PAGE_SIZE - 1),
        None if size > LAST_PAGE => return Ok(Some(LAST_PAGE.max(position)..size)),
        None => return Ok(None),
    };
    let end = seek(SeekFrom::Hole(start.max(position)))?.unwrap_or(size);
    let end = end.checked_next_multiple_of(PAGE_SIZE).unwrap_or(size).min(size);
    // Else punched in between: nothing there.
    Ok((start < size)
        .then(|| start.max(position)..end.max((start + 1).next_multiple_of(PAGE_SIZE)).min(size)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use stillframe_pgalloc::{AsyncPagesFileSave, MemoryFile, SaveOptions};

    use super::*;

    /// What the extents say the file holds.
    fn rebuild(contents: &Contents, size: u64, pages: &File) -> Vec<u8> {
        let mut bytes = vec![0; size as usize];
        let mut last = 0;
        for extent in &contents.extents {
            assert!(extent.file_offset >= last && extent.length > 0);
            assert!(extent.length.is_multiple_of(PAGE_SIZE) || extent.file_offset + extent.length == size);
            last = extent.file_offset + extent.length;
            let at = extent.file_offset as usize..last as usize;
            pages.read_exact_at(&mut bytes[at], extent.pages_offset.0).unwrap();
            let rest = (extent.length.next_multiple_of(PAGE_SIZE) - extent.length) as usize;
            let mut padding = vec![0; rest];
            pages.read_exact_at(&mut padding, extent.pages_offset.0 + extent.length).unwrap();
            assert!(padding.iter().all(|byte| *byte == 0), "what fills up the last page is zero");
        }
        bytes
    }

    #[derive(Clone, Debug)]
    enum Change {
        Write(u64, Vec<u8>),
        Zero(u64, u64),
        Resize(u64),
    }

    fn change() -> impl Strategy<Value = Change> {
        let at = 0..300_000u64;
        prop_oneof![
            (at.clone(), any::<u8>(), 1..9000usize)
                .prop_map(|(at, byte, length)| Change::Write(at, vec![byte; length])),
            (at.clone(), 1..20_000u64).prop_map(|(at, length)| Change::Zero(at, length)),
            at.prop_map(Change::Resize),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// Each copy is the file as it is, and what the last one left is known: pages are either its own or superseded.
        #[test]
        fn a_file_that_changes_is_copied_again_right(rounds in prop::collection::vec(prop::collection::vec(change(), 0..6), 1..5)) {
            let file = tempfile::tempfile_in("/dev/shm").unwrap();
            let pages_file = tempfile::tempfile_in("/dev/shm").unwrap();
            let pages = AsyncPagesFileSave::new(pages_file.try_clone().unwrap(), SaveOptions::default()).unwrap();
            let main = MemoryFile::main();
            let memory = pages.register_memory_file(&main).unwrap();
            let mut copier = Copier::default();
            let mut contents = Contents::default();
            for changes in rounds {
                for change in changes {
                    match change {
                        Change::Write(at, bytes) => file.write_all_at(&bytes, at).unwrap(),
                        Change::Zero(at, length) => file.write_all_at(&vec![0; length as usize], at).unwrap(),
                        Change::Resize(size) => file.set_len(size).unwrap(),
                    }
                }
                let size = file.metadata().unwrap().len();
                contents = copier.copy(Original::File(&file), size, &contents, &memory).unwrap();
            }
            let length = pages.finish().unwrap().length;
            let size = file.metadata().unwrap().len();
            let mut want = vec![0; size as usize];
            file.read_exact_at(&mut want, 0).unwrap();
            prop_assert_eq!(rebuild(&contents, size, &pages_file), want);
            let mut used = vec![0; (length / PAGE_SIZE) as usize];
            for (_, pages_offset, _) in contents.pages() {
                used[(pages_offset / PAGE_SIZE) as usize] += 1;
            }
            for range in &copier.superseded {
                (range.start / PAGE_SIZE..range.end / PAGE_SIZE).for_each(|page| used[page as usize] += 1);
            }
            prop_assert!(used.iter().all(|uses| *uses == 1), "{used:?}");
        }
    }

    #[test]
    fn only_the_pages_that_differ_are_written_again() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.write_all_at(&vec![1; 4 << 20], 0).unwrap();
        let pages_file = tempfile::tempfile_in("/dev/shm").unwrap();
        let pages = AsyncPagesFileSave::new(pages_file, SaveOptions::default()).unwrap();
        let main = MemoryFile::main();
        let memory = pages.register_memory_file(&main).unwrap();
        let mut copier = Copier::default();
        let first = copier.copy(Original::File(&file), 4 << 20, &Contents::default(), &memory).unwrap();
        assert_eq!((first.extents.len(), copier.written), (1, 4 << 20));
        file.write_all_at(&[2], 2 << 20).unwrap();
        let second = copier.copy(Original::File(&file), 4 << 20, &first, &memory).unwrap();
        assert_eq!((second.extents.len(), copier.written), (3, (4 << 20) + PAGE_SIZE));
        assert_eq!(copier.superseded.first(), Some(&(2 << 20..(2 << 20) + PAGE_SIZE)));
        assert_eq!(copier.superseded.len(), 1);
    }
}
