//! The writer thread: digests and writes segments in the order of the pages file.
//!
//! Direct writes go through an io_uring, [`DEPTH`] of them in flight. Buffered ones are done one after the other: they
//! are copies into the page cache under the file's inode lock, of which a second one would only wait. So are direct
//! ones where io_uring is refused. What comes back from the ring not fully written, or refused as direct I/O, is
//! finished in the same way.
//!
//! After a failure it goes on taking segments and drops them, so that producers that wait for memory go on and see
//! the failure at their next call; nothing is written any more.

use std::io::{self, IoSlice};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, OnceLock};

use crate::digest::{ChunkDigester, DigestTable};
use crate::save::error::SaveError;
use crate::save::pages_file::{PagesFile, write_error};
use crate::save::tail::{Order, Segment, Write};
use crate::sys::ring::WriteRing;

/// Most bytes, and most pieces, in a write.
pub(crate) const WRITE: (usize, usize) = (1 << 20, 256);
/// Writes in flight.
const DEPTH: u32 = 16;

/// What the writer thread works on.
pub(crate) struct Writer {
    pages_file: PagesFile,
    orders: Receiver<Order>,
    /// The first failure, seen by the producers.
    failure: Arc<OnceLock<SaveError>>,
    ring: Option<WriteRing>,
    digester: ChunkDigester,
    /// What is gathered for the next write.
    write: Write,
}

impl Writer {
    pub(crate) fn new(
        pages_file: PagesFile,
        orders: Receiver<Order>,
        failure: Arc<OnceLock<SaveError>>,
        io_uring: bool,
    ) -> Self {
        let ring = (io_uring && pages_file.is_direct()).then(|| WriteRing::new(DEPTH)).and_then(|ring| {
            ring.inspect_err(|error| tracing::debug!(%error, "no io_uring: one write at a time")).ok()
        });
        Self {
            pages_file,
            orders,
            failure,
            ring,
            digester: ChunkDigester::default(),
            write: Write::default(),
        }
    }

    /// Writes until the producers' side is closed. Returns the file and the digests of all that was written.
    pub(crate) fn run(mut self) -> (PagesFile, DigestTable) {
        while let Some(order) = self.next() {
            match order {
                Order::Write(_) if self.failure.get().is_some() => {}
                Order::Write(segments) => {
                    for segment in segments {
                        self.digester.update(segment.bytes());
                        self.add(segment);
                    }
                }
                Order::Drain(done) => {
                    self.drain();
                    // Whoever asked may have given up.
                    let _ = done.send(());
                }
            }
        }
        self.drain();
        (self.pages_file, self.digester.finish())
    }

    /// Writes what is gathered and waits for all writes.
    fn drain(&mut self) {
        self.submit();
        while self.complete() {}
    }

    /// The next order; `None` when there are no more. Takes completions while there is nothing else to do, so that
    /// producers get their memory back.
    fn next(&mut self) -> Option<Order> {
        loop {
            match self.orders.try_recv() {
                Ok(order) => return Some(order),
                Err(TryRecvError::Disconnected) => return None,
                Err(TryRecvError::Empty) => {
                    if !self.complete() {
                        return self.orders.recv().ok();
                    }
                }
            }
        }
    }

    /// Adds a segment to the next write; submits it when it is full.
    fn add(&mut self, mut segment: Segment) {
        loop {
            let length = segment.length.min(WRITE.0 - self.write.length);
            self.write.segments.push(Segment { length, ..segment.clone() });
            self.write.length += length;
            if self.write.length == WRITE.0 || self.write.segments.len() == WRITE.1 {
                self.submit();
            }
            segment.start += length;
            segment.length -= length;
            if segment.length == 0 {
                return;
            }
        }
    }

    /// Writes what is gathered, or begins to.
    fn submit(&mut self) {
        let next = Write { offset: self.write.offset + self.write.length as u64, ..Write::default() };
        let write = std::mem::replace(&mut self.write, next);
        if write.length == 0 {
            return;
        }
        while self.ring.as_ref().is_some_and(WriteRing::is_full) {
            self.complete();
        }
        if self.failure.get().is_some() {
            return;
        }
        if let Err(error) = self.pages_file.extend_to(write.offset + write.length as u64) {
            return self.fail(error);
        }
        match &mut self.ring {
            Some(ring) if self.pages_file.is_direct() => {
                if let Err(source) = ring.submit(self.pages_file.file(), write) {
                    self.fail(SaveError::Ring { source: Arc::new(source) });
                }
            }
            _ => self.write_rest(&write, 0),
        }
    }

    /// Waits for a write that is in flight; false if there is none.
    fn complete(&mut self) -> bool {
        let Some(ring) = self.ring.as_mut().filter(|ring| ring.in_flight() > 0) else { return false };
        match ring.wait() {
            Ok(None) => false,
            Ok(Some((write, result))) => {
                match result {
                    Ok(written) if written == write.length => {}
                    Ok(written) => self.write_rest(&write, written),
                    Err(error) if needs_retry(&error) => self.write_rest(&write, 0),
                    Err(error) => self.fail(write_error(write.offset, error)),
                }
                true
            }
            Err(source) => {
                self.fail(SaveError::Ring { source: Arc::new(source) });
                // It waits for its writes, or leaks them.
                self.ring = None;
                false
            }
        }
    }

    /// Writes `write`, but for the first `written` bytes, and waits for it.
    fn write_rest(&mut self, write: &Write, written: usize) {
        if self.failure.get().is_some() {
            return;
        }
        let mut buffers: Vec<_> =
            write.segments.iter().map(|segment| IoSlice::new(segment.bytes())).collect();
        let mut rest = &mut buffers[..];
        IoSlice::advance_slices(&mut rest, written);
        if let Err(error) = self.pages_file.write(rest, write.offset + written as u64) {
            self.fail(error);
        }
    }

    /// Records the first failure.
    fn fail(&self, error: SaveError) {
        tracing::debug!(%error, "saving pages failed");
        let _ = self.failure.set(error);
    }
}

/// Whether an error may be one of direct I/O or of the moment, so that writing once more, waiting, decides.
fn needs_retry(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EAGAIN | libc::EINTR))
}
