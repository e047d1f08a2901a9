//! Reading a part of an image, which is verified: no byte is handed out before its chunk has been compared with its digest.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use stillframe_pgalloc::CHUNK_SIZE;
use stillframe_tmpfs::decode::ArchiveSource;

use super::{ImageError, at, open_sized};
use crate::manifest::Part;

/// Bytes that are read at once: whole chunks, which are still in the processor's cache when they are digested, and used.
const WINDOW: u64 = 4 * CHUNK_SIZE;

/// A range of a part, read from its start to its end.
#[derive(Debug)]
pub(super) struct Verified<'a> {
    pub(super) file: &'a File,
    pub(super) path: &'a Path,
    pub(super) part: &'a Part,
    /// What hasn't been read of it; inside the part.
    pub(super) range: Range<u64>,
}

impl Verified<'_> {
    /// Appends what comes next to `bytes`, up to a window; nothing at the end.
    fn read(&mut self, bytes: &mut Vec<u8>) -> Result<(), ImageError> {
        let Range { start, end } = self.range;
        if start >= end {
            return Ok(());
        }
        let first = start / CHUNK_SIZE * CHUNK_SIZE;
        let last = (first + WINDOW).min(end.next_multiple_of(CHUNK_SIZE)).min(self.part.length);
        let before = bytes.len();
        bytes.resize(before + (last - first) as usize, 0);
        let window = &mut bytes[before..];
        self.file.read_exact_at(window, first).map_err(at("read", self.path))?;
        if let Some(start) = self.part.first_damage(first, window) {
            let end = (start + CHUNK_SIZE).min(self.part.length);
            return Err(ImageError::Damaged { path: self.path.to_owned(), start, end });
        }
        let taken = last.min(end);
        bytes.truncate(before + (taken - first) as usize);
        bytes.drain(before..before + (start - first) as usize);
        self.range.start = taken;
        Ok(())
    }
}

impl ArchiveSource for Verified<'_> {
    fn read_more(&mut self, bytes: &mut Vec<u8>) -> io::Result<()> {
        self.read(bytes).map_err(io::Error::other)
    }
}

/// What is left of a range, byte by byte.
#[derive(Debug)]
pub(super) struct Stream<'a> {
    from: Verified<'a>,
    window: Vec<u8>,
    at: usize,
}

impl<'a> Stream<'a> {
    pub(super) fn new(from: Verified<'a>) -> Self {
        Self { from, window: Vec::new(), at: 0 }
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let found = self.fill_buf()?.read(buffer)?;
        self.consume(found);
        Ok(found)
    }
}

impl BufRead for Stream<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.window.len() {
            self.window.clear();
            self.at = 0;
            self.from.read_more(&mut self.window)?;
        }
        Ok(&self.window[self.at..])
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
}

/// An archive that is compressed, read piece by piece.
pub(super) struct Decompressed<R>(pub(super) R);

impl<R: Read> ArchiveSource for Decompressed<R> {
    fn read_more(&mut self, bytes: &mut Vec<u8>) -> io::Result<()> {
        (&mut self.0).take(WINDOW).read_to_end(bytes).map(drop)
    }
}

/// Reads a part whole.
pub(super) fn read(path: &Path, part: &Part) -> Result<Vec<u8>, ImageError> {
    let file = open_sized(path, part.length)?;
    let mut source = Verified { file: &file, path, part, range: 0..part.length };
    let mut bytes = Vec::new();
    while source.range.start < part.length {
        source.read(&mut bytes)?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More than two windows, and not a whole number of chunks.
    const LENGTH: usize = 5 * WINDOW as usize / 2 + 1234;

    fn written(bytes: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("part");
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    fn bytes(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at / 251) as u8 ^ at as u8).collect()
    }

    #[test]
    fn parts_of_any_length_are_read_whole() {
        for length in [0, 1, CHUNK_SIZE as usize, WINDOW as usize, WINDOW as usize + 1, LENGTH] {
            let bytes = bytes(length);
            let (_dir, path) = written(&bytes);
            assert!(read(&path, &Part::of(&bytes)).unwrap() == bytes, "{length}");
        }
    }

    #[test]
    fn ranges_are_read_from_where_they_begin_to_where_they_end() {
        let bytes = bytes(LENGTH);
        let (_dir, path) = written(&bytes);
        let (file, part) = (File::open(&path).unwrap(), Part::of(&bytes));
        let chunk = CHUNK_SIZE as usize;
        for range in [0..1, 1..chunk, chunk..2 * chunk, 512..LENGTH, chunk + 1..LENGTH - 1, LENGTH..LENGTH] {
            let wide = range.start as u64..range.end as u64;
            let verified = || Verified { file: &file, path: &path, part: &part, range: wide.clone() };
            let (mut source, mut found) = (verified(), b"before".to_vec());
            loop {
                let before = found.len();
                source.read_more(&mut found).unwrap();
                if found.len() == before {
                    break;
                }
            }
            assert!(found == [b"before", &bytes[range.clone()]].concat(), "{range:?}");
            let mut streamed = Vec::new();
            Stream::new(verified()).read_to_end(&mut streamed).unwrap();
            assert!(streamed == bytes[range.clone()], "{range:?}");
        }
    }

    #[test]
    fn a_flipped_bit_is_found_where_it_is() {
        let bytes = vec![7; LENGTH];
        let part = Part::of(&bytes);
        for at in [0, WINDOW as usize - 1, WINDOW as usize, LENGTH - 1] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            let (_dir, path) = written(&damaged);
            let Err(ImageError::Damaged { start, end, .. }) = read(&path, &part) else { panic!("{at}") };
            assert!(start.is_multiple_of(CHUNK_SIZE) && start <= at as u64 && (at as u64) < end, "{at}");
            assert_eq!(end, (start + CHUNK_SIZE).min(LENGTH as u64));
        }
    }
}
