//! Read-only shared mappings of files that are being saved, mmap(2) with every page present.
//!
//! A touch of a page that the file has no longer (truncated), or that can't be read, is SIGBUS. So pages are made
//! present by madvise(2) MADV_POPULATE_READ, which answers EFAULT instead; only a page that goes away after that
//! still raises SIGBUS. The caller of [`FileMapping::new`] keeps that from happening.

use std::fs::File;
use std::io;

use memmap2::{Advice, Mmap, MmapOptions};

/// A range of a file in memory.
#[derive(Debug)]
pub(crate) struct FileMapping {
    map: Mmap,
}

/// Why a range can't be mapped with all its pages.
#[derive(Debug)]
pub(crate) enum MappingError {
    /// mmap(2) failed.
    Map(io::Error),
    /// The page at that offset in the mapping can't be read.
    Page(usize, io::Error),
    /// The kernel can't populate mappings: it is older than 5.14.
    Unsupported,
}

impl FileMapping {
    /// Maps `length` bytes of `file` at `offset`.
    ///
    /// The file's contents are neither changed nor truncated as long as the mapping lives. A change makes what is
    /// read here a mixture, a truncation raises SIGBUS.
    pub(crate) fn new(file: &File, offset: u64, length: usize) -> Result<Self, MappingError> {
        let mut options = MmapOptions::new();
        options.offset(offset).len(length);
        // SAFETY: nobody changes or truncates the file while it is mapped; callers of `write_range` keep that, who
        // hold the file's writers frozen.
        let map = unsafe { options.map(file) }.map_err(MappingError::Map)?;
        let mapping = Self { map };
        match mapping.map.advise(Advice::PopulateRead) {
            Ok(()) => Ok(mapping),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Err(MappingError::Unsupported),
            Err(error) => Err(mapping.locate(error)),
        }
    }

    /// Finds the first page that can't be populated, by halving what is left.
    fn locate(&self, error: io::Error) -> MappingError {
        const PAGE: usize = crate::page::PAGE_SIZE as usize;
        let (mut start, mut pages, mut cause) = (0, self.map.len().div_ceil(PAGE), error);
        while pages > 1 {
            let half = pages / 2;
            match self.map.advise_range(Advice::PopulateRead, start, half * PAGE) {
                Ok(()) => {
                    start += half * PAGE;
                    pages -= half;
                }
                Err(error) => {
                    pages = half;
                    cause = error;
                }
            }
        }
        MappingError::Page(start, cause)
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_behind_the_end_is_an_error_with_its_offset() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        for present in [0u64, 1, 7, 8, 15] {
            file.set_len(present * 4096).unwrap();
            let error = FileMapping::new(&file, 0, 16 * 4096).unwrap_err();
            assert!(
                matches!(error, MappingError::Page(offset, ref cause)
                    if offset as u64 == present * 4096 && cause.raw_os_error() == Some(libc::EFAULT)),
                "{present}: {error:?}"
            );
        }
        file.set_len(16 * 4096).unwrap();
        assert_eq!(FileMapping::new(&file, 0, 16 * 4096).unwrap().bytes(), [0; 16 * 4096]);
    }
}
