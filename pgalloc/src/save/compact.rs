//! Making a settled pages file smaller: pages at its end are moved to where nothing is needed any more.
//!
//! ```text
//! before: A A x x B x C C D      x: nothing refers to it
//! after:  A A C D B C
//! ```
//!
//! Only what is moved is read and written, so the work is that of the waste, not of the file. Chunks that were written to, and
//! the one that is the last now, are digested anew from the file. The order of pages changes at the end only.

use std::collections::{BTreeSet, VecDeque};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use crate::buffer::{BufferPool, PageBuffer};
use crate::digest::{CHUNK_SIZE, DigestTable};
use crate::page::{PAGE_SIZE, PageExtent, PagesOffset};
use crate::save::error::SaveError;
use crate::save::pages_file::PagesFile;
use crate::save::plan::take_buffer;
use crate::save::tail::push_extent;

/// Bytes that are moved at once.
const PART: u64 = 1 << 20;

/// Where pages were moved from and to.
#[derive(Debug, Default)]
pub struct Moves {
    /// Ascending by where they were: from there, so many bytes, to there.
    moves: Vec<(Range<u64>, u64)>,
}

impl Moves {
    /// Extents that refer to the pages where they are now.
    pub fn apply(&self, extents: &[PageExtent]) -> Vec<PageExtent> {
        let mut moved = Vec::with_capacity(extents.len());
        for extent in extents {
            let (mut done, start) = (0, extent.pages_offset.0);
            let end = start + extent.length;
            let first = self.moves.partition_point(|(from, _)| from.end <= start);
            let mut put = |from: u64, to: u64, length: u64| {
                let file_offset = extent.file_offset + (from - start);
                push_extent(&mut moved, PageExtent { file_offset, length, pages_offset: PagesOffset(to) });
            };
            for (from, to) in self.moves[first..].iter().take_while(|(from, _)| from.start < end) {
                let at = from.start.max(start);
                if at > start + done {
                    put(start + done, start + done, at - start - done);
                }
                let until = from.end.min(end);
                put(at, to + (at - from.start), until - at);
                done = until - start;
            }
            if start + done < end {
                put(start + done, start + done, end - start - done);
            }
        }
        moved
    }
}

/// Merges ranges that touch or overlap, ascending.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// What is to be moved, and the length that is left of a file of `length` bytes.
fn plan(free: Vec<Range<u64>>, movable: Vec<Range<u64>>, length: u64) -> (Moves, u64) {
    let mut holes = VecDeque::from(merged(free));
    let mut blocks = merged(movable);
    let mut moves = Vec::new();
    let mut end = length;
    loop {
        // What is free at the end is cut off.
        if let Some(last) = holes.pop_back_if(|last| last.end == end) {
            end = last.start;
            continue;
        }
        let (Some(hole), Some(block)) = (holes.front_mut(), blocks.last_mut()) else { break };
        // Something that can't be moved is behind it.
        if block.end != end || hole.start >= block.start {
            break;
        }
        let size = (hole.end - hole.start).min(block.end - block.start);
        moves.push((block.end - size..block.end, hole.start));
        hole.start += size;
        block.end -= size;
        end = block.end;
        if hole.is_empty() {
            holes.pop_front();
        }
        if block.is_empty() {
            blocks.pop();
        }
    }
    moves.reverse();
    (Moves { moves }, end)
}

/// Moves the pages in `movable`, at the file's end, to `free`; the new length.
pub(crate) fn compact(
    pages_file: &mut PagesFile,
    digests: &mut DigestTable,
    free: Vec<Range<u64>>,
    movable: Vec<Range<u64>>,
) -> Result<Moves, SaveError> {
    let (moves, length) = plan(free, movable, digests.pages_length());
    let mut buffer = take_buffer(&BufferPool::new(PART as usize, 1))?;
    let mut touched = BTreeSet::new();
    for (from, to) in &moves.moves {
        let mut done = 0;
        while done < from.end - from.start {
            let part = PART.min(from.end - from.start - done);
            read(pages_file, &mut buffer, from.start + done, part)?;
            pages_file.write(&mut [IoSlice::new(&buffer[..part as usize])], to + done)?;
            touched.extend((to + done) / CHUNK_SIZE..(to + done + part).div_ceil(CHUNK_SIZE));
            done += part;
        }
    }
    touched.extend(length.checked_sub(1).map(|last| last / CHUNK_SIZE));
    let mut values = digests.digests().to_vec();
    values.truncate(length.div_ceil(CHUNK_SIZE) as usize);
    for chunk in touched {
        let start = chunk * CHUNK_SIZE;
        let size = CHUNK_SIZE.min(length - start);
        read(pages_file, &mut buffer, start, size)?;
        values[chunk as usize] = xxh3_64(&buffer[..size as usize]);
    }
    *digests = DigestTable::new(length, values).expect("as many as there are chunks");
    Ok(moves)
}

/// Reads whole pages to the start of `buffer`.
fn read(file: &PagesFile, buffer: &mut PageBuffer, offset: u64, length: u64) -> Result<(), SaveError> {
    debug_assert!(length.is_multiple_of(PAGE_SIZE));
    let failed =
        |source: io::Error| SaveError::ReadBack { offset: PagesOffset(offset), source: Arc::new(source) };
    file.file().read_exact_at(&mut buffer[..length as usize], offset).map_err(failed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranges(pages: &[usize]) -> Vec<Range<u64>> {
        pages.iter().map(|page| *page as u64 * PAGE_SIZE..(*page as u64 + 1) * PAGE_SIZE).collect()
    }

    #[test]
    fn pages_at_the_end_fill_what_is_free() {
        // As in the module's picture.
        let (moves, length) = plan(ranges(&[2, 3, 5]), ranges(&[0, 1, 4, 6, 7, 8]), 9 * PAGE_SIZE);
        let (pages, at) = (|from: u64, to: u64| from * PAGE_SIZE..to * PAGE_SIZE, |page| page * PAGE_SIZE);
        assert_eq!(moves.moves, [(pages(6, 7), at(5)), (pages(7, 9), at(2))]);
        assert_eq!(length, 6 * PAGE_SIZE);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// 0: free, 1: movable, 2: neither. What isn't free is found by the moved extents, and the digests are right.
        #[test]
        fn what_is_needed_is_still_there(kinds in prop::collection::vec(prop_oneof![Just(0u8), Just(0), Just(1), Just(1), Just(1), Just(2)], 0..200)) {
            let file = tempfile::tempfile_in("/dev/shm").unwrap();
            let bytes: Vec<u8> = (0..kinds.len()).flat_map(|page| vec![page as u8 + 1; PAGE_SIZE as usize]).collect();
            let mut pages_file = PagesFile::new(file.try_clone().unwrap(), crate::Direct::Never).unwrap();
            file.write_all_at(&bytes, 0).unwrap();
            let digests = crate::digest_chunks(&bytes, CHUNK_SIZE as usize);
            let mut digests = DigestTable::new(bytes.len() as u64, digests).unwrap();
            let of = |kind| kinds.iter().enumerate().filter(|(_, there)| **there == kind).map(|(page, _)| page).collect::<Vec<_>>();
            let moves = compact(&mut pages_file, &mut digests, ranges(&of(0)), ranges(&of(1))).unwrap();
            let length = digests.pages_length();
            let kept = kinds.len() - of(0).len();
            if of(2).is_empty() {
                prop_assert_eq!(length, kept as u64 * PAGE_SIZE);
            }
            let mut now = vec![0; length as usize];
            file.read_exact_at(&mut now, 0).unwrap();
            prop_assert_eq!(digests.verify(0, &now), Ok(()));
            let extents: Vec<PageExtent> = of(1).iter().map(|page| PageExtent {
                file_offset: *page as u64 * PAGE_SIZE, length: PAGE_SIZE, pages_offset: PagesOffset(*page as u64 * PAGE_SIZE),
            }).collect();
            let mut found = 0;
            for extent in moves.apply(&extents) {
                for page in 0..extent.length / PAGE_SIZE {
                    let at = (extent.pages_offset.0 + page * PAGE_SIZE) as usize;
                    prop_assert_eq!(now[at], (extent.file_offset / PAGE_SIZE + page) as u8 + 1);
                    found += 1;
                }
            }
            prop_assert_eq!(found, of(1).len());
            for page in of(2) {
                prop_assert_eq!(now[page * PAGE_SIZE as usize], page as u8 + 1, "what isn't to be moved stays");
            }
        }
    }
}
