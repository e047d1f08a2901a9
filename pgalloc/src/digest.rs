//! Digests of the pages file: XXH3-64 of each chunk of [`CHUNK_SIZE`] bytes, in a [`DigestTable`].
//!
//! They find rot and truncation, not an adversary. A chunk is the unit that is read and verified when pages are
//! loaded; the last one may be short. The hash's seed is 0, its value a number, stored little-endian.
//!
//! Invariant: a table has exactly as many digests as its pages file has chunks.

use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

/// Bytes of the pages file under one digest.
pub const CHUNK_SIZE: u64 = 64 * 1024;

/// XXH3-64 of each `chunk_size` bytes of `bytes`, the last of which may be shorter.
///
/// # Panics
///
/// When `chunk_size` is zero.
pub fn digest_chunks(bytes: &[u8], chunk_size: usize) -> Vec<u64> {
    bytes.chunks(chunk_size).map(xxh3_64).collect()
}

/// The length of a pages file and the digest of each of its chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DigestTable {
    pages_length: u64,
    digests: Vec<u64>,
}

/// Why bytes are not those that were saved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// The number of digests isn't that of the chunks.
    #[error("a pages file of {pages_length} bytes has {expected} chunks, but there are {actual} digests")]
    Count {
        /// The pages file's length in bytes.
        pages_length: u64,
        /// Its chunks.
        expected: u64,
        /// The digests there are.
        actual: u64,
    },
    /// There is no chunk of that length at that offset.
    #[error("no chunk of {length} bytes at offset {offset:#x} in a pages file of {pages_length} bytes")]
    NoChunk {
        /// Where a chunk was said to be.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// The pages file's length in bytes.
        pages_length: u64,
    },
    /// A chunk's bytes have changed.
    #[error(
        "the chunk at offset {offset:#x} has changed: digest {actual:#018x}, saved with {expected:#018x}"
    )]
    Mismatch {
        /// The chunk's offset in the pages file.
        offset: u64,
        /// Its digest when it was saved.
        expected: u64,
        /// The digest of what is there now.
        actual: u64,
    },
}

impl DigestTable {
    /// The table of a pages file of `pages_length` bytes.
    ///
    /// # Errors
    ///
    /// `digests` are not one a chunk.
    pub fn new(pages_length: u64, digests: Vec<u64>) -> Result<Self, DigestError> {
        let expected = pages_length.div_ceil(CHUNK_SIZE);
        if digests.len() as u64 != expected {
            return Err(DigestError::Count { pages_length, expected, actual: digests.len() as u64 });
        }
        Ok(Self { pages_length, digests })
    }

    /// Length of the pages file in bytes.
    pub fn pages_length(&self) -> u64 {
        self.pages_length
    }

    /// The digests, in the order of the chunks.
    pub fn digests(&self) -> &[u64] {
        &self.digests
    }

    /// Checks `bytes`, the whole chunks of the pages file from `offset` on.
    ///
    /// # Errors
    ///
    /// The first chunk that has changed; or `bytes` don't begin and end where chunks do.
    pub fn verify(&self, offset: u64, bytes: &[u8]) -> Result<(), DigestError> {
        let (pages_length, length) = (self.pages_length, bytes.len() as u64);
        let whole = offset.is_multiple_of(CHUNK_SIZE)
            && offset.checked_add(length).is_some_and(|end| {
                end == pages_length || (end < pages_length && end.is_multiple_of(CHUNK_SIZE))
            });
        if !whole {
            return Err(DigestError::NoChunk { offset, length, pages_length });
        }
        let first = (offset / CHUNK_SIZE) as usize;
        for (index, chunk) in bytes.chunks(CHUNK_SIZE as usize).enumerate() {
            let (expected, actual) = (self.digests[first + index], xxh3_64(chunk));
            if expected != actual {
                let offset = offset + index as u64 * CHUNK_SIZE;
                return Err(DigestError::Mismatch { offset, expected, actual });
            }
        }
        Ok(())
    }
}

/// Digests a pages file as it is written, piece by piece, from its start.
#[derive(Default)]
pub(crate) struct ChunkDigester {
    digests: Vec<u64>,
    /// The bytes of a chunk that came in pieces; empty between chunks.
    partial: Xxh3Default,
    partial_length: usize,
}

impl ChunkDigester {
    /// Takes the next bytes of the file.
    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        const CHUNK: usize = CHUNK_SIZE as usize;
        while !bytes.is_empty() {
            if self.partial_length == 0 && bytes.len() >= CHUNK {
                let (chunk, rest) = bytes.split_at(CHUNK);
                self.digests.push(xxh3_64(chunk));
                bytes = rest;
                continue;
            }
            let (piece, rest) = bytes.split_at(bytes.len().min(CHUNK - self.partial_length));
            self.partial.update(piece);
            self.partial_length += piece.len();
            if self.partial_length == CHUNK {
                self.close_chunk();
            }
            bytes = rest;
        }
    }

    fn close_chunk(&mut self) {
        self.digests.push(self.partial.digest());
        self.partial.reset();
        self.partial_length = 0;
    }

    /// The table of all bytes taken.
    pub(crate) fn finish(mut self) -> DigestTable {
        let pages_length = self.digests.len() as u64 * CHUNK_SIZE + self.partial_length as u64;
        if self.partial_length > 0 {
            self.close_chunk();
        }
        DigestTable { pages_length, digests: self.digests }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_value() {
        // From the reference implementation (xxhsum -H3 of an empty file).
        assert_eq!(digest_chunks(b"", 16), Vec::<u64>::new());
        assert_eq!(xxh3_64(b""), 0x2d06_8005_38d3_94c2);
    }

    #[test]
    fn a_table_has_one_digest_a_chunk() {
        assert!(DigestTable::new(0, vec![]).is_ok());
        assert!(DigestTable::new(CHUNK_SIZE, vec![1]).is_ok());
        assert!(DigestTable::new(CHUNK_SIZE + 1, vec![1]).is_err());
        assert!(DigestTable::new(u64::MAX, vec![]).is_err());
    }

    #[test]
    fn verify_names_the_changed_chunk() {
        let mut bytes = vec![7; 3 * CHUNK_SIZE as usize - 5];
        let table = DigestTable::new(bytes.len() as u64, digest_chunks(&bytes, CHUNK_SIZE as usize)).unwrap();
        assert_eq!(table.verify(0, &bytes), Ok(()));
        assert_eq!(table.verify(CHUNK_SIZE, &bytes[CHUNK_SIZE as usize..]), Ok(()));
        bytes[2 * CHUNK_SIZE as usize] ^= 1;
        assert!(matches!(
            table.verify(CHUNK_SIZE, &bytes[CHUNK_SIZE as usize..]),
            Err(DigestError::Mismatch { offset, .. }) if offset == 2 * CHUNK_SIZE
        ));
        assert!(matches!(table.verify(1, &bytes[..8]), Err(DigestError::NoChunk { .. })));
        assert!(matches!(table.verify(0, &bytes[..8]), Err(DigestError::NoChunk { .. })));
        assert!(matches!(table.verify(3 * CHUNK_SIZE, &[0]), Err(DigestError::NoChunk { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn pieces_digest_as_the_whole(pieces in prop::collection::vec(0usize..200_000, 0..8)) {
            let bytes: Vec<u8> = (0..pieces.iter().sum::<usize>()).map(|n| (n * 31 % 249) as u8).collect();
            let mut digester = ChunkDigester::default();
            let mut rest = &bytes[..];
            for piece in pieces {
                let (head, tail) = rest.split_at(piece);
                digester.update(head);
                rest = tail;
            }
            let whole = digest_chunks(&bytes, CHUNK_SIZE as usize);
            prop_assert_eq!(digester.finish(), DigestTable::new(bytes.len() as u64, whole).unwrap());
        }
    }
}
