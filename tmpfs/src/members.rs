//! The members of an archive, one after the other: a header, the extended header before it, and a body.
//!
//! An archive is read piece by piece into one buffer, which grows only with a member that is larger: memory that is used again
//! costs nothing, and fresh memory costs more than what is read into it.

use std::io;

use tar::{EntryType, Header};

use crate::archive::{BLOCK, TRAILER};
use crate::decode::{ReadTreeError, TreeError, TreeFault};
use crate::entry::PathName;

/// Where an archive comes from.
pub trait ArchiveSource {
    /// Appends to `bytes` what comes next; nothing, where it ends.
    ///
    /// # Errors
    ///
    /// It can't be read.
    fn read_more(&mut self, bytes: &mut Vec<u8>) -> io::Result<()>;
}

/// An archive in memory.
impl ArchiveSource for &[u8] {
    fn read_more(&mut self, bytes: &mut Vec<u8>) -> io::Result<()> {
        const PIECE: usize = 64 * 1024;
        let (piece, rest) = self.split_at(self.len().min(PIECE));
        bytes.extend_from_slice(piece);
        *self = rest;
        Ok(())
    }
}

/// See the module.
pub(crate) struct Members<S> {
    source: S,
    buffer: Vec<u8>,
    /// Where in the buffer the next header is, and where that is in the archive.
    at: usize,
    offset: u64,
    /// Body of the extended header of the next member.
    extended: Vec<u8>,
}

/// A member, whose header has the right checksum.
pub(crate) struct Member<'a> {
    pub(crate) header: &'a Header,
    /// Body of its extended header; empty if it has none.
    pub(crate) extended: &'a [u8],
    pub(crate) body: &'a [u8],
    /// Of the header, in the archive.
    pub(crate) offset: u64,
}

impl<S: ArchiveSource> Members<S> {
    pub(crate) fn new(source: S) -> Self {
        Self { source, buffer: Vec::new(), at: 0, offset: 0, extended: Vec::new() }
    }

    /// The next member; `None` where the archive ends as it has to.
    pub(crate) fn next(&mut self) -> Result<Option<Member<'_>>, ReadTreeError> {
        let mut has_extended = false;
        let (size, length) = loop {
            if !self.has(BLOCK)? || self.buffer[self.at..self.at + BLOCK] == TRAILER[..BLOCK] {
                return self.end(has_extended).map(|()| None);
            }
            let header = Header::from_byte_slice(&self.buffer[self.at..self.at + BLOCK]);
            let size = self.judge(header)?;
            let is_extended = header.entry_type() == EntryType::XHeader;
            // Also what fills its last block.
            let length = size.and_then(|size| size.checked_next_multiple_of(BLOCK)?.checked_add(BLOCK));
            let (Some(size), Some(length)) = (size, length) else {
                return Err(self.fail(TreeFault::Truncated));
            };
            if !self.has(length)? {
                return Err(self.fail(TreeFault::Truncated));
            }
            if is_extended && has_extended {
                return Err(self.fail(TreeFault::Pax));
            }
            if !is_extended {
                break (size, length);
            }
            self.extended.clear();
            self.extended.extend_from_slice(&self.buffer[self.at + BLOCK..self.at + BLOCK + size]);
            has_extended = true;
            self.skip(length);
        };
        let (at, offset) = (self.at, self.offset);
        self.skip(length);
        Ok(Some(Member {
            header: Header::from_byte_slice(&self.buffer[at..at + BLOCK]),
            extended: if has_extended { &self.extended } else { &[] },
            body: &self.buffer[at + BLOCK..at + BLOCK + size],
            offset,
        }))
    }

    /// Compares a header's checksum; gives the size of its body, if that is a number.
    fn judge(&self, header: &Header) -> Result<Option<usize>, ReadTreeError> {
        let bytes = header.as_bytes();
        let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        // The checksum's own field counts as spaces.
        let found = sum(&bytes[..148]) + 8 * u32::from(b' ') + sum(&bytes[156..]);
        if header.cksum().ok() != Some(found) {
            return Err(self.fail(TreeFault::Checksum));
        }
        Ok(header.entry_size().ok().and_then(|size| usize::try_from(size).ok()))
    }

    /// Nothing but the trailer may follow.
    fn end(&mut self, has_extended: bool) -> Result<(), ReadTreeError> {
        let is_whole = self.has(TRAILER.len())? && !self.has(TRAILER.len() + 1)?;
        if has_extended || !is_whole || self.buffer[self.at..] != TRAILER {
            let (entry, offset) = (PathName(Vec::new()), self.offset);
            return Err(TreeError { entry, offset, fault: TreeFault::Trailer }.into());
        }
        Ok(())
    }

    /// Whether so many bytes follow; then they are in the buffer.
    fn has(&mut self, length: usize) -> io::Result<bool> {
        while self.buffer.len() - self.at < length {
            self.buffer.drain(..self.at);
            self.at = 0;
            let before = self.buffer.len();
            self.source.read_more(&mut self.buffer)?;
            if self.buffer.len() == before {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn skip(&mut self, length: usize) {
        self.at += length;
        self.offset += length as u64;
    }

    /// What is wrong with the member whose header is next.
    fn fail(&self, fault: TreeFault) -> ReadTreeError {
        let header = Header::from_byte_slice(&self.buffer[self.at..self.at + BLOCK]);
        let entry = PathName(header.path_bytes().into_owned());
        TreeError { entry, offset: self.offset, fault }.into()
    }
}
