//! The writer thread: digests and writes segments in the order of the pages file.
//!
//! After a failure it goes on taking segments and drops them, so that producers that wait for memory go on and see
//! the failure at their next call; nothing is written any more.

use std::io::IoSlice;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, OnceLock};

use crate::digest::{ChunkDigester, DigestTable};
use crate::save::error::SaveError;
use crate::save::pages_file::PagesFile;
use crate::save::tail::Segment;

/// Most bytes, and most pieces, in a write.
const WRITE: (usize, usize) = (1 << 20, 256);

/// What the writer thread works on.
pub(crate) struct Writer {
    pub(crate) pages_file: PagesFile,
    pub(crate) segments: Receiver<Vec<Segment>>,
    /// The first failure, seen by the producers.
    pub(crate) failure: Arc<OnceLock<SaveError>>,
}

/// Segments that are contiguous in the pages file, to be written at once.
#[derive(Debug, Default)]
struct Write {
    offset: u64,
    length: usize,
    segments: Vec<Segment>,
}

impl Writer {
    /// Writes until the producers' side is closed. Returns the file and the digests of all that was written.
    pub(crate) fn run(mut self) -> (PagesFile, DigestTable) {
        let mut digester = ChunkDigester::default();
        let mut write = Write::default();
        while let Ok(segments) = self.segments.recv() {
            if self.failure.get().is_some() {
                continue;
            }
            for segment in segments {
                digester.update(segment.bytes());
                self.add(&mut write, segment);
            }
        }
        self.submit(&mut write);
        (self.pages_file, digester.finish())
    }

    fn add(&mut self, write: &mut Write, mut segment: Segment) {
        loop {
            let length = segment.length.min(WRITE.0 - write.length);
            write.segments.push(Segment { length, ..segment.clone() });
            write.length += length;
            if write.length == WRITE.0 || write.segments.len() == WRITE.1 {
                self.submit(write);
            }
            segment.start += length;
            segment.length -= length;
            if segment.length == 0 {
                return;
            }
        }
    }

    fn submit(&mut self, write: &mut Write) {
        if self.failure.get().is_none()
            && let Err(error) = self.write(write)
        {
            let _ = self.failure.set(error);
        }
        *write = Write { offset: write.offset + write.length as u64, ..Write::default() };
    }

    fn write(&mut self, write: &Write) -> Result<(), SaveError> {
        self.pages_file.extend_to(write.offset + write.length as u64)?;
        let mut buffers: Vec<_> =
            write.segments.iter().map(|segment| IoSlice::new(segment.bytes())).collect();
        self.pages_file.write(&mut buffers, write.offset)
    }
}
