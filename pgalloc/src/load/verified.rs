//! Reading a pages file here and there, each byte verified before it is given away.
//!
//! One window of whole chunks is kept, so that reading on where the last read ended reads and verifies nothing twice.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::digest::{CHUNK_SIZE, DigestTable};
use crate::load::error::LoadError;
use crate::page::PagesOffset;

/// Bytes of the window, but for what begins and ends within a chunk.
const WINDOW: u64 = 1 << 20;

/// See the module.
#[derive(Debug)]
pub struct VerifiedPages {
    pages_file: File,
    digests: DigestTable,
    /// Where the window begins; it is the bytes of the buffer.
    start: u64,
    buffer: Vec<u8>,
}

impl VerifiedPages {
    /// Reads `pages_file`, which must be as long as `digests` say.
    ///
    /// # Errors
    ///
    /// It isn't.
    pub fn new(pages_file: File, digests: DigestTable) -> Result<Self, LoadError> {
        let metadata =
            pages_file.metadata().map_err(|source| LoadError::Examine { source: Arc::new(source) })?;
        let (expected, actual) = (digests.pages_length(), metadata.len());
        if expected != actual {
            return Err(LoadError::Length { expected, actual });
        }
        Ok(Self { pages_file, digests, start: 0, buffer: Vec::new() })
    }

    /// Length of the pages file in bytes.
    pub fn length(&self) -> u64 {
        self.digests.pages_length()
    }

    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    ///
    /// The pages file can't be read, ends before, or isn't what was saved; then what is in `bytes` is worth nothing.
    pub fn read(&mut self, offset: PagesOffset, bytes: &mut [u8]) -> Result<(), LoadError> {
        let (mut offset, mut filled) = (offset.0, 0);
        while filled < bytes.len() {
            if !(self.start..self.start + self.buffer.len() as u64).contains(&offset) {
                self.fill(offset, offset.saturating_add((bytes.len() - filled) as u64))?;
            }
            let from = &self.buffer[(offset - self.start) as usize..];
            let length = from.len().min(bytes.len() - filled);
            bytes[filled..filled + length].copy_from_slice(&from[..length]);
            (offset, filled) = (offset + length as u64, filled + length);
        }
        Ok(())
    }

    /// Makes the window one that begins with the chunk of `offset` and, if there is so much room, ends at or behind `wanted`.
    fn fill(&mut self, offset: u64, wanted: u64) -> Result<(), LoadError> {
        let length = self.length();
        let start = offset / CHUNK_SIZE * CHUNK_SIZE;
        let wanted = wanted.min(start + WINDOW).min(length);
        let end = wanted.next_multiple_of(CHUNK_SIZE).min(length);
        if offset >= end {
            let source = Arc::new(std::io::ErrorKind::UnexpectedEof.into());
            return Err(LoadError::Read { offset: PagesOffset(offset), source });
        }
        // Not to be used while it is read: an error must leave nothing unverified behind.
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize((end - start) as usize, 0);
        self.pages_file
            .read_exact_at(&mut buffer, start)
            .map_err(|source| LoadError::Read { offset: PagesOffset(start), source: Arc::new(source) })?;
        self.digests.verify(start, &buffer).map_err(|source| LoadError::damaged(start, source))?;
        (self.start, self.buffer) = (start, buffer);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::digest_chunks;

    fn pages(bytes: &[u8]) -> (File, DigestTable) {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.write_all_at(bytes, 0).unwrap();
        let digests = digest_chunks(bytes, CHUNK_SIZE as usize);
        (file, DigestTable::new(bytes.len() as u64, digests).unwrap())
    }

    #[test]
    fn what_is_read_is_verified_wherever_it_begins() {
        let bytes: Vec<u8> = (0..3_000_000u32 / 4096 * 4096).map(|n| (n / 7) as u8).collect();
        let (file, digests) = pages(&bytes);
        let mut verified = VerifiedPages::new(file.try_clone().unwrap(), digests.clone()).unwrap();
        for (offset, length) in
            [(0, 10), (65_536, 65_536), (4096, 2_500_000), (bytes.len() - 4096, 4096), (8192, 1)]
        {
            let mut read = vec![0; length];
            verified.read(PagesOffset(offset as u64), &mut read).unwrap();
            assert!(read == bytes[offset..offset + length], "{offset} {length}");
        }
        let mut beyond = [0; 4097];
        let error = verified.read(PagesOffset(bytes.len() as u64 - 4096), &mut beyond).unwrap_err();
        assert!(matches!(error, LoadError::Read { offset: PagesOffset(at), .. } if at == bytes.len() as u64));

        file.write_all_at(&[!bytes[1_000_000]], 1_000_000).unwrap();
        let mut verified = VerifiedPages::new(file, digests).unwrap();
        let mut read = [0; 4096];
        let chunk = 1_000_000 / CHUNK_SIZE * CHUNK_SIZE;
        // Another byte of the same chunk isn't given away either, and it isn't the second time.
        for _ in 0..2 {
            let error = verified.read(PagesOffset(chunk), &mut read).unwrap_err();
            assert!(
                matches!(error, LoadError::Digest { offset: PagesOffset(at), .. } if at == chunk),
                "{error}"
            );
        }
        verified.read(PagesOffset(chunk - CHUNK_SIZE), &mut read).unwrap();
    }

    #[test]
    fn a_pages_file_of_another_length_is_refused() {
        let (file, digests) = pages(&[1; 8192]);
        file.set_len(4096).unwrap();
        let error = VerifiedPages::new(file, digests).unwrap_err();
        assert!(matches!(error, LoadError::Length { expected: 8192, actual: 4096 }));
    }
}
