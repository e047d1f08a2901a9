//! Saving pages to the pages file.
//!
//! ```text
//! producers (callers' threads, a second one for some)      writer (one thread)
//! plan: cut a range's data into parts                   -> digest, gather to writes of 1 MiB,
//! job: map or read a part, find its zero pages             many in flight, directly from the memory
//! tail: give the rest the next offsets, under one lock
//! ```
//!
//! Where there is more to look at than to write, scattered pages and zeros, a call is slower than the disk alone, and
//! a second thread helps it (`relay`). Small files and plain data never start one.
//!
//! **Memory.** At most 16 gather buffers and 16 read buffers of 1 MiB (32 MiB), 128 KiB of scratch for each thread
//! that saves at the same time, and 40 MiB of source files mapped and not yet written. Who wants more waits. Parts
//! get their memory in order, when they are cut: the first one of a call that isn't appended yet waits for nothing but
//! the writer, and so calls can't wait for each other.
//!
//! **Still files.** [`AsyncMemoryFileSave::write_range`] takes large ranges straight from their mapping, without a
//! copy, after it has returned. So the source must be *still* from the call until `drain` or `settle`: neither written nor
//! truncated. A write makes its chunk's digest one of bytes that were not written (found when it is loaded); a
//! truncation is an error naming the offset if it comes before the pages are mapped, and SIGBUS, which kills the
//! process, if it comes between mapping and writing. Files are still while all who can write to them are frozen; a
//! file that nobody has open or mapped for writing is still while the caller holds a read lease (fcntl(2) F_SETLEASE
//! F_RDLCK) on it. Whoever can't keep a file still uses [`AsyncMemoryFileSave::write_live_range`], which copies.
//!
//! **Failure.** The first failure is final: nothing more is written, each later call and `finish` return it. What the
//! pages file then has is nothing to be kept. Dropped without `finish`, a save ends its thread and leaves the file
//! as it is.
//!
//! Mirrors gVisor's `AsyncPagesFileSave` and `AsyncMemoryFileSave` (pkg/sentry/pgalloc).

mod compact;
mod error;
mod job;
mod pages_file;
mod plan;
mod relay;
mod source;
mod tail;
mod writer;

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

pub use compact::Moves;
pub use error::SaveError;

use crate::Direct;
use crate::buffer::{Budget, BufferPool};
use crate::digest::DigestTable;
use crate::memory_file::MemoryFile;
use crate::page::{FileRange, PageExtent};
use job::Job;
use pages_file::PagesFile;
use tail::Tail;
pub(crate) use tail::Write;
#[cfg(test)]
pub(crate) use tail::{PageMemory, Segment};
use writer::Writer;

/// Bytes of a buffer, and buffers of each kind.
const BUFFERS: (usize, usize) = (1 << 20, 16);
/// Runs of data up to so many bytes are copied: pread(2) is faster than a mapping there, and writes get larger.
const SMALL: usize = 128 << 10;
/// Bytes that are mapped at a time, and in all.
const MAPPED: (u64, u64) = (4 << 20, 40 << 20);

// The writer gathers a write of up to `WRITE.0` bytes before it submits it, and what is in it takes buffers and mapped
// bytes that producers may wait for. More than `SMALL` bytes go by reference, so that a write that is being gathered
// can have no more than so many of either; there must be others, which are being written and come back.
const _: () = {
    let held = writer::WRITE.0 / SMALL + 1;
    assert!(held < BUFFERS.1 && held < (MAPPED.1 / MAPPED.0) as usize);
};

/// How the pages file is written.
#[derive(Clone, Copy, Debug)]
pub struct SaveOptions {
    /// Whether past the page cache.
    pub direct: Direct,
    /// Whether direct writes may go through an io_uring, where the kernel lets. Else there is one at a time.
    pub io_uring: bool,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self { direct: Direct::Auto, io_uring: true }
    }
}

/// What was saved.
#[derive(Clone, Debug)]
pub struct PagesFileSummary {
    /// Length of the pages file in bytes, a multiple of the page size.
    pub length: u64,
    /// The digests of its chunks.
    pub digests: DigestTable,
    /// Bytes that were read, found to be zero and not saved. Holes are not read and don't count.
    pub zero_bytes: u64,
    /// Bytes that were saved, without what fills up last pages.
    pub data_bytes: u64,
}

/// The save of one pages file: owns the file and its writer thread. See the module for memory, stillness, failure.
#[derive(Debug)]
pub struct AsyncPagesFileSave {
    tail: Tail,
    read_buffers: Arc<BufferPool>,
    /// Buffers of [`SMALL`] bytes, without a limit: each thread has one at a time, and gives it back.
    scratch: Arc<BufferPool>,
    mapped: Arc<Budget>,
    failure: Arc<OnceLock<SaveError>>,
    zero_bytes: AtomicU64,
    data_bytes: AtomicU64,
    /// `None` once it is joined.
    writer: Option<JoinHandle<(PagesFile, DigestTable)>>,
}

/// The save of one MemoryFile's files; can be used by several threads at once.
#[derive(Clone, Copy, Debug)]
pub struct AsyncMemoryFileSave<'a> {
    pages: &'a AsyncPagesFileSave,
}

impl AsyncPagesFileSave {
    /// Saves to `pages_file`, which is open for reading and writing and empty.
    ///
    /// With direct I/O its open file description gets the flag `O_DIRECT`: don't share it.
    ///
    /// # Errors
    ///
    /// The file isn't empty, direct I/O was demanded and is refused, or there is no thread to be had.
    pub fn new(pages_file: File, options: SaveOptions) -> Result<Self, SaveError> {
        let pages_file = PagesFile::new(pages_file, options.direct)?;
        let (sender, segments) = channel();
        let failure = Arc::new(OnceLock::new());
        let writer_failure = failure.clone();
        let writer = thread::Builder::new()
            .name("pages-save".into())
            .spawn(move || Writer::new(pages_file, segments, writer_failure, options.io_uring).run())
            .map_err(|source| SaveError::Thread { source: Arc::new(source) })?;
        Ok(Self {
            tail: Tail::new(BufferPool::new(BUFFERS.0, BUFFERS.1), sender),
            read_buffers: BufferPool::new(BUFFERS.0, BUFFERS.1),
            scratch: BufferPool::new(SMALL, usize::MAX),
            mapped: Budget::new(MAPPED.1),
            failure,
            zero_bytes: AtomicU64::new(0),
            data_bytes: AtomicU64::new(0),
            writer: Some(writer),
        })
    }

    /// Begins to save the files of `memory_file`.
    ///
    /// # Errors
    ///
    /// The save has failed before.
    pub fn register_memory_file(
        &self,
        memory_file: &MemoryFile,
    ) -> Result<AsyncMemoryFileSave<'_>, SaveError> {
        self.check()?;
        tracing::debug!(?memory_file, "saving the pages of a MemoryFile");
        Ok(AsyncMemoryFileSave { pages: self })
    }

    /// What ends this save from another thread.
    pub fn canceller(&self) -> SaveCanceller {
        SaveCanceller { failure: self.failure.clone() }
    }

    /// Waits until nothing refers to the sources that were given so far: from then on they may change. More can be saved.
    ///
    /// # Errors
    ///
    /// The first error of the save.
    pub fn drain(&self) -> Result<(), SaveError> {
        self.tail.drain();
        self.check()
    }

    /// Waits for all writes. From then on the sources may change: what is left to do needs none of them.
    ///
    /// # Errors
    ///
    /// The first error of the save.
    pub fn settle(mut self) -> Result<SettledPagesFile, SaveError> {
        let length = self.tail.close();
        let (pages_file, digests) = self.join().expect("the writer is joined once, and doesn't panic");
        self.check()?;
        assert_eq!(digests.pages_length(), length, "the writer has taken all that was appended");
        let (zero_bytes, data_bytes) =
            (self.zero_bytes.load(Ordering::Relaxed), self.data_bytes.load(Ordering::Relaxed));
        let summary = PagesFileSummary { length, digests, zero_bytes, data_bytes };
        Ok(SettledPagesFile { pages_file, summary })
    }

    /// [Settles](Self::settle) the save, sets the pages file's length, makes it durable (fsync(2)).
    ///
    /// # Errors
    ///
    /// The first error of the save.
    pub fn finish(self) -> Result<PagesFileSummary, SaveError> {
        self.settle()?.finish()
    }

    fn join(&mut self) -> Option<(PagesFile, DigestTable)> {
        self.writer.take()?.join().ok()
    }

    fn check(&self) -> Result<(), SaveError> {
        self.failure.get().map_or(Ok(()), |failure| Err(failure.clone()))
    }
}

/// Ends a save: it fails as soon as it looks, with [`SaveError::Cancelled`] unless something failed before.
#[derive(Clone, Debug)]
pub struct SaveCanceller {
    failure: Arc<OnceLock<SaveError>>,
}

impl SaveCanceller {
    /// Ends it. Ended already, it stays as it is.
    pub fn cancel(&self) {
        let _ = self.failure.set(SaveError::Cancelled);
    }
}

/// A pages file that holds everything, but isn't durable yet.
#[derive(Debug)]
pub struct SettledPagesFile {
    pages_file: PagesFile,
    summary: PagesFileSummary,
}

impl SettledPagesFile {
    /// What was saved.
    pub fn summary(&self) -> &PagesFileSummary {
        &self.summary
    }

    /// Makes the file smaller: moves pages from its end, among those in `movable`, to the ranges in `free`, which nothing
    /// refers to. Ranges are of whole pages and don't overlap; what is in neither stays where it is.
    ///
    /// # Errors
    ///
    /// The pages file can't be read or written; then it is worth nothing.
    pub fn compact(&mut self, free: Vec<Range<u64>>, movable: Vec<Range<u64>>) -> Result<Moves, SaveError> {
        let moves = compact::compact(&mut self.pages_file, &mut self.summary.digests, free, movable)?;
        self.summary.length = self.summary.digests.pages_length();
        Ok(moves)
    }

    /// Sets the pages file's length and makes it durable (fsync(2)).
    ///
    /// # Errors
    ///
    /// That fails.
    pub fn finish(self) -> Result<PagesFileSummary, SaveError> {
        self.pages_file.finish(self.summary.length)?;
        Ok(self.summary)
    }
}

impl Drop for AsyncPagesFileSave {
    fn drop(&mut self) {
        self.tail.close();
        self.join();
    }
}

impl AsyncMemoryFileSave<'_> {
    /// Saves `range` of `source`, which starts at a page and is still until the save is drained or settled (see the
    /// module).
    ///
    /// Returns, before they are written, where its pages that aren't zero will be in the pages file: ascending and
    /// merged where contiguous; none for holes and for pages of zeros. If the range ends inside a page, that page
    /// counts as the file's last. Moves the file offset of `source`.
    ///
    /// # Errors
    ///
    /// The source is shorter than the range or can't be read; or the first error of the save, which may be that of
    /// another range.
    pub fn write_range(&self, source: &Arc<File>, range: FileRange) -> Result<Vec<PageExtent>, SaveError> {
        self.write(source, range, true)
    }

    /// Saves `range` of `source`, which may be written to and truncated meanwhile.
    ///
    /// As [`write_range`](Self::write_range), but contents are read once, into buffers, and pages that aren't there
    /// when they are read, because the file got shorter, have no extents. What changes later must be saved again;
    /// and if the file's size has changed, so that the range doesn't end where the file does, all of it.
    ///
    /// # Errors
    ///
    /// The source can't be read; or the first error of the save, which may be that of another range.
    pub fn write_live_range(
        &self,
        source: &Arc<File>,
        range: FileRange,
    ) -> Result<Vec<PageExtent>, SaveError> {
        self.write(source, range, false)
    }

    /// Saves pages that the caller has read, as they are, pages of zeros as well: `pieces` with their offsets in the file,
    /// each in whole pages unless it ends where the file does.
    ///
    /// Returns where they will be: one behind the other, the first at the start of the first extent. They are copied.
    ///
    /// # Errors
    ///
    /// The first error of the save.
    pub fn write_pages(&self, pieces: &[(u64, &[u8])]) -> Result<Vec<PageExtent>, SaveError> {
        self.pages.check()?;
        let mut extents = Vec::new();
        self.pages.tail.append_copies(pieces.iter().copied(), &mut extents)?;
        let saved = pieces.iter().map(|(_, piece)| piece.len() as u64).sum();
        self.pages.data_bytes.fetch_add(saved, Ordering::Relaxed);
        Ok(extents)
    }

    fn write(&self, source: &File, range: FileRange, still: bool) -> Result<Vec<PageExtent>, SaveError> {
        self.pages.check()?;
        let extents = Job::new(self.pages, source, range, still).save()?;
        let saved = extents.iter().map(|extent| extent.length).sum();
        self.pages.data_bytes.fetch_add(saved, Ordering::Relaxed);
        Ok(extents)
    }
}
