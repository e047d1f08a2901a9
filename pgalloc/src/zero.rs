//! Finding pages that are all zero, at the speed of memory.
//!
//! The check must cost nothing next to the write that it saves: it stops at the first 64 bytes that aren't zero, so
//! on data it looks at little, and on zeros it is a plain OR over words that the compiler makes vectors of.

use std::ops::Range;

use crate::page::PAGE_SIZE;

/// Words that are looked at before each decision to go on: a cache line.
const LANES: usize = 8;

/// Whether all of `bytes` are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (lines, rest) = bytes.as_chunks::<{ LANES * 8 }>();
    // The first line alone, since most pages with data have some there; then eight at a time.
    if let Some(first) = lines.first()
        && !line_is_zero(first)
    {
        return false;
    }
    let (blocks, lines) = lines.as_chunks::<8>();
    blocks.iter().all(|block| block.iter().fold(true, |zero, line| zero & line_is_zero(line)))
        && lines.iter().all(line_is_zero)
        && rest.iter().all(|&byte| byte == 0)
}

fn line_is_zero(line: &[u8; LANES * 8]) -> bool {
    line.as_chunks::<8>().0.iter().fold(0, |or, word| or | u64::from_ne_bytes(*word)) == 0
}

/// The runs of pages in `bytes` that aren't all zero, ascending, none touching the next.
pub(crate) fn data_runs(bytes: &[u8]) -> DataRuns<'_> {
    DataRuns { bytes, position: 0 }
}

/// Iterator of [`data_runs`]: byte ranges made of whole pages (but for the last page of `bytes`).
pub(crate) struct DataRuns<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl DataRuns<'_> {
    /// Advances over pages that are zero, or that aren't.
    fn skip_while(&mut self, zero: bool) {
        while self.position < self.bytes.len() {
            let end = (self.position + PAGE_SIZE as usize).min(self.bytes.len());
            if is_zero(&self.bytes[self.position..end]) != zero {
                break;
            }
            self.position = end;
        }
    }
}

impl Iterator for DataRuns<'_> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        self.skip_while(true);
        let start = self.position;
        // The page here isn't zero: the loop above said so.
        self.position = (start + PAGE_SIZE as usize).min(self.bytes.len());
        self.skip_while(false);
        (start < self.position).then_some(start..self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: usize = PAGE_SIZE as usize;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let mut page = vec![0; PAGE + 13];
        assert!(is_zero(&page));
        for position in 0..page.len() {
            page[position] = 0x10;
            assert!(!is_zero(&page), "byte {position}");
            page[position] = 0;
        }
        assert!(is_zero(&[]));
    }

    proptest! {
        #[test]
        fn runs_are_the_pages_with_data(pages in prop::collection::vec(any::<bool>(), 0..40), tail in 0..PAGE) {
            let mut bytes = vec![0; pages.len() * PAGE + tail];
            for (index, _) in pages.iter().enumerate().filter(|(_, data)| **data) {
                bytes[index * PAGE + (index * 911) % PAGE] = 1;
            }
            let runs: Vec<_> = data_runs(&bytes).collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
            let found: Vec<usize> = runs.into_iter().flat_map(|run| run.step_by(PAGE)).collect();
            let expected: Vec<usize> = (0..pages.len()).filter(|&index| pages[index]).map(|index| index * PAGE).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
