//! The pages metadata, `pages.meta`: what is needed to read a pages file.
//!
//! Little-endian, the same on every host. All numbers are unsigned; `[]` is a list with nothing between its members.
//!
//! ```text
//! header   magic "SFPAGES\0", version u32 (1), chunk size u32 (65536), pages length u64, digests u64,
//!          private MemoryFiles u32, reserved u32 (0)                                              40 bytes
//! digests  [u64]                       XXH3-64 of each chunk of the pages file
//! private  [index u32, reserved u32 (0), size u64, extents u64,
//!           [file offset u64, length u64, pages offset u64]]
//! ```
//!
//! Decoding takes hostile bytes: every number is checked against what is there before it is believed, so that no more
//! memory is taken than the input has bytes, and what it returns is consistent with itself. Whether the bytes are
//! those that were written, the image's manifest knows.

use crate::digest::{CHUNK_SIZE, DigestError, DigestTable};
use crate::page::{ExtentError, PAGE_SIZE, PageExtent, PagesOffset, validate_extents};

const MAGIC: &[u8; 8] = b"SFPAGES\0";
const VERSION: u32 = 1;
const HEADER_LENGTH: usize = 40;
const PRIVATE_LENGTH: usize = 24;
const EXTENT_LENGTH: usize = 24;

/// A private MemoryFile in the pages file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrivateMemoryFileMeta {
    /// The number by which the rest of the image calls it; the caller's to choose, each once.
    pub index: u32,
    /// The file's size in bytes.
    pub size: u64,
    /// Its contents, ascending in the file and in the pages file.
    pub extents: Vec<PageExtent>,
}

/// All there is to know of a pages file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PagesMeta {
    /// Length of the pages file in bytes, a multiple of the page size; that of `digests`.
    pub pages_length: u64,
    /// The digests of its chunks.
    pub digests: DigestTable,
    /// The private MemoryFiles in it.
    pub private: Vec<PrivateMemoryFileMeta>,
}

/// Why bytes are no pages metadata.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetaError {
    /// They don't begin as pages metadata do.
    #[error("no pages metadata: they begin with {found:02x?}")]
    Magic {
        /// The first bytes.
        found: [u8; 8],
    },
    /// Of a version that this program doesn't know.
    #[error("pages metadata of version {version}; this program reads version {VERSION}")]
    Version {
        /// Their version.
        version: u32,
    },
    /// The digests are of chunks of another size.
    #[error("digests of chunks of {size} bytes; version {VERSION} has {CHUNK_SIZE}")]
    ChunkSize {
        /// The chunk size.
        size: u32,
    },
    /// The bytes end too early.
    #[error(
        "pages metadata are truncated: {what} at offset {offset} needs {needed} bytes, but {available} are left"
    )]
    Truncated {
        /// What was to be read.
        what: &'static str,
        /// Where.
        offset: usize,
        /// Its bytes; `u64::MAX` if they are more.
        needed: u64,
        /// The bytes there are.
        available: usize,
    },
    /// There is something behind the end.
    #[error("{length} bytes too many at the end of the pages metadata")]
    Trailing {
        /// Their number.
        length: usize,
    },
    /// A field that must be zero isn't.
    #[error("reserved field at offset {offset} is {value}, not 0")]
    Reserved {
        /// Where it is.
        offset: usize,
        /// What is in it.
        value: u32,
    },
    /// The pages file's length is no number of pages.
    #[error("a pages file of {length} bytes isn't made of whole pages")]
    PagesLength {
        /// The length.
        length: u64,
    },
    /// The digests aren't those of the pages file.
    #[error("invalid digest table")]
    Digests(#[from] DigestError),
    /// Two private MemoryFiles have the same index.
    #[error("two private MemoryFiles have the index {index}")]
    Duplicate {
        /// The index.
        index: u32,
    },
    /// A private MemoryFile's extents can't be.
    #[error("private MemoryFile {index}: invalid extents")]
    Extents {
        /// Its index.
        index: u32,
        /// What is wrong with them.
        #[source]
        source: ExtentError,
    },
    /// A private MemoryFile's extents overlap, or don't ascend, in the pages file.
    #[error(
        "private MemoryFile {index}: the extent at pages offset {pages_offset} begins before {end}, where the one before it ends"
    )]
    PagesOrder {
        /// Its index.
        index: u32,
        /// The extent's pages offset.
        pages_offset: PagesOffset,
        /// Where the one before it ends in the pages file.
        end: PagesOffset,
    },
}

impl PagesMeta {
    /// The bytes of the metadata.
    pub fn encode(&self) -> Vec<u8> {
        let extents: usize = self.private.iter().map(|file| file.extents.len()).sum();
        let length = HEADER_LENGTH
            + self.digests.digests().len() * 8
            + self.private.len() * PRIVATE_LENGTH
            + extents * EXTENT_LENGTH;
        let mut bytes = Vec::with_capacity(length);
        let count = u32::try_from(self.private.len()).expect("each MemoryFile has a u32 of its own");
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(CHUNK_SIZE as u32).to_le_bytes());
        bytes.extend_from_slice(&self.pages_length.to_le_bytes());
        bytes.extend_from_slice(&(self.digests.digests().len() as u64).to_le_bytes());
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(&0u32.to_le_bytes());
        bytes.extend(self.digests.digests().iter().flat_map(|digest| digest.to_le_bytes()));
        for file in &self.private {
            bytes.extend_from_slice(&file.index.to_le_bytes());
            bytes.extend_from_slice(&0u32.to_le_bytes());
            bytes.extend_from_slice(&file.size.to_le_bytes());
            bytes.extend_from_slice(&(file.extents.len() as u64).to_le_bytes());
            for extent in &file.extents {
                for number in [extent.file_offset, extent.length, extent.pages_offset.0] {
                    bytes.extend_from_slice(&number.to_le_bytes());
                }
            }
        }
        bytes
    }

    /// The metadata in `bytes`.
    ///
    /// # Errors
    ///
    /// `bytes` are no valid metadata; see [`MetaError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, MetaError> {
        let mut reader = Reader { bytes, offset: 0 };
        let found = reader.array("magic")?;
        if &found != MAGIC {
            return Err(MetaError::Magic { found });
        }
        let version = reader.u32("version")?;
        if version != VERSION {
            return Err(MetaError::Version { version });
        }
        let size = reader.u32("chunk size")?;
        if u64::from(size) != CHUNK_SIZE {
            return Err(MetaError::ChunkSize { size });
        }
        let pages_length = reader.u64("pages length")?;
        if !pages_length.is_multiple_of(PAGE_SIZE) {
            return Err(MetaError::PagesLength { length: pages_length });
        }
        let digest_count = reader.u64("number of digests")?;
        let private_count = reader.u32("number of MemoryFiles")?;
        reader.zero()?;
        let digests = reader.list("digests", digest_count, |[digest]| digest)?;
        let digests = DigestTable::new(pages_length, digests)?;
        reader.has("MemoryFiles", private_count.into(), PRIVATE_LENGTH)?;
        let mut private = Vec::with_capacity(private_count as usize);
        for _ in 0..private_count {
            private.push(reader.private(pages_length)?);
        }
        if reader.offset < bytes.len() {
            return Err(MetaError::Trailing { length: bytes.len() - reader.offset });
        }
        let mut indexes: Vec<u32> = private.iter().map(|file| file.index).collect();
        indexes.sort_unstable();
        if let Some(pair) = indexes.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(MetaError::Duplicate { index: pair[0] });
        }
        Ok(Self { pages_length, digests, private })
    }
}

/// Takes numbers off the front of bytes, which may end anywhere.
struct Reader<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl Reader<'_> {
    /// Checks that `count` members of `length` bytes are left; returns their bytes.
    fn has(&self, what: &'static str, count: u64, length: usize) -> Result<usize, MetaError> {
        let available = self.bytes.len() - self.offset;
        let needed = count.saturating_mul(length as u64);
        match usize::try_from(needed) {
            Ok(needed) if needed <= available => Ok(needed),
            _ => Err(MetaError::Truncated { what, offset: self.offset, needed, available }),
        }
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], MetaError> {
        self.has(what, 1, N)?;
        let array = self.bytes[self.offset..][..N].try_into().expect("a slice of N bytes");
        self.offset += N;
        Ok(array)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, MetaError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, MetaError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn zero(&mut self) -> Result<(), MetaError> {
        let offset = self.offset;
        match self.u32("reserved field")? {
            0 => Ok(()),
            value => Err(MetaError::Reserved { offset, value }),
        }
    }

    /// A list of `count` members of `N` numbers each.
    fn list<const N: usize, T>(
        &mut self,
        what: &'static str,
        count: u64,
        member: impl Fn([u64; N]) -> T,
    ) -> Result<Vec<T>, MetaError> {
        let length = self.has(what, count, N * 8)?;
        let bytes = &self.bytes[self.offset..][..length];
        self.offset += length;
        let (numbers, _) = bytes.as_chunks::<8>();
        let (members, _) = numbers.as_chunks::<N>();
        Ok(members.iter().map(|numbers| member(numbers.map(u64::from_le_bytes))).collect())
    }

    fn private(&mut self, pages_length: u64) -> Result<PrivateMemoryFileMeta, MetaError> {
        let index = self.u32("MemoryFile's index")?;
        self.zero()?;
        let size = self.u64("MemoryFile's size")?;
        let count = self.u64("number of extents")?;
        let extents = self.list("extents", count, |[file_offset, length, pages_offset]| PageExtent {
            file_offset,
            length,
            pages_offset: PagesOffset(pages_offset),
        })?;
        validate_extents(&extents, size, pages_length)
            .map_err(|source| MetaError::Extents { index, source })?;
        for pair in extents.windows(2) {
            let (end, pages_offset) = (pair[0].pages_end().expect("validated"), pair[1].pages_offset);
            if pages_offset < end {
                return Err(MetaError::PagesOrder { index, pages_offset, end });
            }
        }
        Ok(PrivateMemoryFileMeta { index, size, extents })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extent(file_offset: u64, length: u64, pages_offset: u64) -> PageExtent {
        PageExtent { file_offset, length, pages_offset: PagesOffset(pages_offset) }
    }

    fn sample() -> PagesMeta {
        let pages_length = 2 * CHUNK_SIZE + 4096;
        let extents = vec![extent(0, 8192, 0), extent(1 << 40, 4096, 8192), extent(1 << 50, 10, 16384)];
        PagesMeta {
            pages_length,
            digests: DigestTable::new(pages_length, vec![1, u64::MAX, 3]).unwrap(),
            private: vec![
                PrivateMemoryFileMeta { index: 7, size: (1 << 50) + 10, extents },
                PrivateMemoryFileMeta { index: 0, size: 0, extents: vec![] },
            ],
        }
    }

    #[test]
    fn bytes_of_the_format() {
        let bytes = sample().encode();
        assert_eq!(bytes.len(), 40 + 3 * 8 + 2 * 24 + 3 * 24);
        assert_eq!(bytes[..16], *b"SFPAGES\0\x01\0\0\0\0\0\x01\0");
        assert_eq!(bytes[16..24], [0, 16, 2, 0, 0, 0, 0, 0]);
        assert_eq!(PagesMeta::decode(&bytes).unwrap(), sample());
        assert_eq!(PagesMeta::decode(&PagesMeta::default().encode()).unwrap(), PagesMeta::default());
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = sample().encode();
        for length in 0..bytes.len() {
            let error = PagesMeta::decode(&bytes[..length]).unwrap_err();
            assert!(matches!(error, MetaError::Truncated { .. }), "{length}: {error}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(PagesMeta::decode(&longer), Err(MetaError::Trailing { length: 1 }));
    }

    #[test]
    fn hostile_fields() {
        type Check = fn(&MetaError) -> bool;
        let huge = &u64::MAX.to_le_bytes();
        let cases: &[(usize, &[u8], Check)] = &[
            (0, b"x", |e| matches!(e, MetaError::Magic { .. })),
            (8, &[2], |e| matches!(e, MetaError::Version { version: 2 })),
            (12, &[1], |e| matches!(e, MetaError::ChunkSize { .. })),
            (16, &[1], |e| matches!(e, MetaError::PagesLength { .. })),
            (16, &[0, 0, 16], |e| matches!(e, MetaError::Digests(_))),
            (24, huge, |e| matches!(e, MetaError::Truncated { needed: u64::MAX, .. })),
            (24, &[2], |e| matches!(e, MetaError::Digests(_))),
            (32, &[0xff; 4], |e| matches!(e, MetaError::Truncated { .. })),
            (36, &[1], |e| matches!(e, MetaError::Reserved { offset: 36, value: 1 })),
            (64, &[0], |e| matches!(e, MetaError::Duplicate { index: 0 })),
            (68, &[9], |e| matches!(e, MetaError::Reserved { offset: 68, .. })),
            (72, huge, |e| {
                matches!(e, MetaError::Extents { index: 7, source: ExtentError::FileSize { .. } })
            }),
            (80, huge, |e| matches!(e, MetaError::Truncated { needed: u64::MAX, .. })),
            (80, &[0x55; 8], |e| matches!(e, MetaError::Truncated { needed: u64::MAX, .. })),
            (88, &[1], |e| matches!(e, MetaError::Extents { source: ExtentError::Unaligned { .. }, .. })),
            (96, huge, |e| matches!(e, MetaError::Extents { source: ExtentError::BehindFile { .. }, .. })),
            (104, &[0, 16], |e| matches!(e, MetaError::PagesOrder { .. })),
        ];
        for (offset, change, check) in cases {
            let mut bytes = sample().encode();
            bytes[*offset..*offset + change.len()].copy_from_slice(change);
            let error = PagesMeta::decode(&bytes).expect_err(&format!("offset {offset}"));
            assert!(check(&error), "offset {offset}: {error:?}");
        }
    }

    proptest! {
        #[test]
        fn changed_bytes_give_an_error_or_valid_metadata(changes in prop::collection::vec((0usize..184, any::<u8>()), 1..6)) {
            let mut bytes = sample().encode();
            for (offset, byte) in changes {
                bytes[offset] = byte;
            }
            if let Ok(meta) = PagesMeta::decode(&bytes) {
                prop_assert_eq!(meta.encode(), bytes);
            }
        }
    }
}
