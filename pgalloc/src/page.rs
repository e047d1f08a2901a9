//! Pages and ranges of pages: the only place with page arithmetic.
//!
//! A page here is the *image's* page, [`PAGE_SIZE`] bytes on every host. A file's contents are a list of
//! [`PageExtent`]s, ascending in the file; what no extent covers is a hole, which reads as zeros.
//! Invariant: a [`FileRange`] has `start <= end <= i64::MAX`, so that no offset in it overflows `off_t`.
//!
//! Extents that come out of an image are hostile until [`validate_extents`] has passed them.

use std::fmt;

/// The image's page in bytes, whatever the host's page size.
pub const PAGE_SIZE: u64 = 4096;

/// The largest size Linux gives a file (`MAX_LFS_FILESIZE`), in bytes.
pub const MAX_FILE_SIZE: u64 = i64::MAX as u64;

/// `bytes` rounded down to a whole number of pages.
pub(crate) const fn page_floor(bytes: u64) -> u64 {
    bytes & !(PAGE_SIZE - 1)
}

/// `bytes` rounded up to a whole number of pages; `None` if that is no `u64`.
pub(crate) const fn page_ceil(bytes: u64) -> Option<u64> {
    match bytes.checked_add(PAGE_SIZE - 1) {
        Some(sum) => Some(page_floor(sum)),
        None => None,
    }
}

/// A byte offset into the pages file, a multiple of [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PagesOffset(pub u64);

impl fmt::Display for PagesOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A half-open range of bytes in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileRange {
    start: u64,
    end: u64,
}

impl FileRange {
    /// The bytes from `start` up to, not including, `end`.
    ///
    /// # Errors
    ///
    /// `start` lies behind `end`, or `end` behind [`MAX_FILE_SIZE`].
    pub const fn new(start: u64, end: u64) -> Result<Self, ExtentError> {
        if start > end || end > MAX_FILE_SIZE {
            return Err(ExtentError::Range { start, end });
        }
        Ok(Self { start, end })
    }

    /// The first byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The first byte behind the range.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Bytes in the range.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether the range has no bytes.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }
}

impl fmt::Display for FileRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start, self.end)
    }
}

/// Contents of a file that lie in one piece in the pages file.
///
/// `length` is in bytes and not zero. Only a file's last page may be partial; the rest of it is zero in the
/// pages file, where an extent always takes whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageExtent {
    /// Where the contents are in their file: bytes, a multiple of [`PAGE_SIZE`].
    pub file_offset: u64,
    /// How many bytes they are.
    pub length: u64,
    /// Where they are in the pages file.
    pub pages_offset: PagesOffset,
}

impl PageExtent {
    /// The first byte of the file behind the extent, if that is no more than [`MAX_FILE_SIZE`].
    pub const fn file_end(&self) -> Option<u64> {
        match self.file_offset.checked_add(self.length) {
            Some(end) if end <= MAX_FILE_SIZE => Some(end),
            _ => None,
        }
    }

    /// The first byte of the pages file behind the extent's last page, if that is no more than [`MAX_FILE_SIZE`].
    pub const fn pages_end(&self) -> Option<PagesOffset> {
        let Some(length) = page_ceil(self.length) else { return None };
        match self.pages_offset.0.checked_add(length) {
            Some(end) if end <= MAX_FILE_SIZE => Some(PagesOffset(end)),
            _ => None,
        }
    }
}

/// Why extents (or a range) can't be those of a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtentError {
    /// A range ends before it starts, or behind the largest file.
    #[error("[{start:#x}, {end:#x}) is no range of bytes of a file")]
    Range {
        /// The range's start.
        start: u64,
        /// The range's end.
        end: u64,
    },
    /// The file is said to be larger than files get.
    #[error("a file of {size} bytes is larger than Linux files get")]
    FileSize {
        /// That size.
        size: u64,
    },
    /// An extent has no bytes.
    #[error("extent {index} at file offset {file_offset:#x} is empty")]
    Empty {
        /// The extent's place in the list.
        index: usize,
        /// Its file offset.
        file_offset: u64,
    },
    /// An extent doesn't begin at a page, in the file or in the pages file, or ends inside one that isn't the
    /// file's last.
    #[error(
        "extent {index} (file offset {file_offset:#x}, length {length:#x}, pages offset {pages_offset}) is not made of whole pages"
    )]
    Unaligned {
        /// The extent's place in the list.
        index: usize,
        /// Its file offset.
        file_offset: u64,
        /// Its length in bytes.
        length: u64,
        /// Its pages offset.
        pages_offset: PagesOffset,
    },
    /// An extent begins before the one listed before it ends.
    #[error(
        "extent {index} at file offset {file_offset:#x} begins before the extent before it ends at {end:#x}"
    )]
    Order {
        /// The extent's place in the list.
        index: usize,
        /// Its file offset.
        file_offset: u64,
        /// Where the one before it ends in the file.
        end: u64,
    },
    /// An extent reaches behind the end of its file.
    #[error(
        "extent {index} (file offset {file_offset:#x}, length {length:#x}) reaches behind its file's end at {size:#x}"
    )]
    BehindFile {
        /// The extent's place in the list.
        index: usize,
        /// Its file offset.
        file_offset: u64,
        /// Its length in bytes.
        length: u64,
        /// The file's size.
        size: u64,
    },
    /// An extent reaches behind the end of the pages file.
    #[error(
        "extent {index} (pages offset {pages_offset}, length {length:#x}) reaches behind the pages file's end at {pages_length:#x}"
    )]
    BehindPages {
        /// The extent's place in the list.
        index: usize,
        /// Its pages offset.
        pages_offset: PagesOffset,
        /// Its length in bytes.
        length: u64,
        /// The pages file's length.
        pages_length: u64,
    },
}

/// Checks that `extents` can be the contents of a file of `file_size` bytes, with a pages file of `pages_length`.
///
/// Each is not empty, made of whole pages (but for the file's last), inside the file and inside the pages file;
/// in the file they ascend and don't overlap. Their order in the pages file is free: a file whose changed pages
/// were saved again has some of its extents later. Takes no memory; sizes up to [`MAX_FILE_SIZE`].
///
/// # Errors
///
/// The first rule broken, and by which extent.
pub fn validate_extents(
    extents: &[PageExtent],
    file_size: u64,
    pages_length: u64,
) -> Result<(), ExtentError> {
    if file_size > MAX_FILE_SIZE {
        return Err(ExtentError::FileSize { size: file_size });
    }
    let mut end = 0;
    for (index, extent) in extents.iter().enumerate() {
        let PageExtent { file_offset, length, pages_offset } = *extent;
        if length == 0 {
            return Err(ExtentError::Empty { index, file_offset });
        }
        if file_offset < end {
            return Err(ExtentError::Order { index, file_offset, end });
        }
        end = match extent.file_end() {
            Some(end) if end <= file_size => end,
            _ => return Err(ExtentError::BehindFile { index, file_offset, length, size: file_size }),
        };
        if !file_offset.is_multiple_of(PAGE_SIZE)
            || !pages_offset.0.is_multiple_of(PAGE_SIZE)
            || (!length.is_multiple_of(PAGE_SIZE) && end != file_size)
        {
            return Err(ExtentError::Unaligned { index, file_offset, length, pages_offset });
        }
        if extent.pages_end().is_none_or(|end| end.0 > pages_length) {
            return Err(ExtentError::BehindPages { index, pages_offset, length, pages_length });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(file_offset: u64, length: u64, pages_offset: u64) -> PageExtent {
        PageExtent { file_offset, length, pages_offset: PagesOffset(pages_offset) }
    }

    #[test]
    fn ranges_end_behind_their_start() {
        assert_eq!(FileRange::new(3, 8).unwrap().len(), 5);
        assert!(FileRange::new(8, 8).unwrap().is_empty());
        assert!(FileRange::new(9, 8).is_err());
        assert!(FileRange::new(0, MAX_FILE_SIZE).is_ok());
        assert!(FileRange::new(0, MAX_FILE_SIZE + 1).is_err());
    }

    #[test]
    fn extents_of_a_file() {
        type Check = fn(&ExtentError) -> bool;
        let huge_page = MAX_FILE_SIZE & !(PAGE_SIZE - 1);
        let good: &[(&[PageExtent], u64, u64)] = &[
            (&[], 0, 0),
            (&[extent(0, 4096, 0)], 4096, 4096),
            (&[extent(0, 1, 0)], 1, 4096),
            (&[extent(0, 4096, 8192), extent(4096, 4096, 0)], 8192, 12288),
            (&[extent(huge_page, 4095, 0)], MAX_FILE_SIZE, 4096),
        ];
        for (extents, size, pages) in good {
            assert_eq!(validate_extents(extents, *size, *pages), Ok(()), "{extents:?}");
        }
        let bad: &[(&[PageExtent], u64, u64, Check)] = &[
            (&[], MAX_FILE_SIZE + 1, 0, |e| matches!(e, ExtentError::FileSize { .. })),
            (&[extent(0, 0, 0)], 4096, 4096, |e| matches!(e, ExtentError::Empty { index: 0, .. })),
            (&[extent(1, 4096, 0)], 8192, 4096, |e| matches!(e, ExtentError::Unaligned { .. })),
            (&[extent(0, 4096, 1)], 8192, 8192, |e| matches!(e, ExtentError::Unaligned { .. })),
            (&[extent(0, 4095, 0)], 8192, 4096, |e| matches!(e, ExtentError::Unaligned { .. })),
            (&[extent(0, 8192, 0), extent(4096, 4096, 8192)], 8192, 12288, |e| {
                matches!(e, ExtentError::Order { index: 1, end: 8192, .. })
            }),
            (&[extent(4096, 4096, 0), extent(0, 4096, 4096)], 8192, 8192, |e| {
                matches!(e, ExtentError::Order { index: 1, .. })
            }),
            (&[extent(0, 8192, 0)], 4096, 8192, |e| matches!(e, ExtentError::BehindFile { .. })),
            (&[extent(4096, u64::MAX - 10, 0)], MAX_FILE_SIZE, 8192, |e| {
                matches!(e, ExtentError::BehindFile { .. })
            }),
            (&[extent(0, 1, 0)], 1, 4095, |e| matches!(e, ExtentError::BehindPages { .. })),
            (&[extent(0, 4096, u64::MAX - 4095)], 4096, u64::MAX, |e| {
                matches!(e, ExtentError::BehindPages { .. })
            }),
        ];
        for (extents, size, pages, check) in bad {
            let error = validate_extents(extents, *size, *pages).expect_err(&format!("{extents:?}"));
            assert!(check(&error), "{extents:?}: {error}");
        }
    }
}
