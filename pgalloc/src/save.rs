//! Saving pages to the pages file.
//!
//! ```text
//! producers (callers' threads)                             writer (one thread)
//! map or read a range, find its pages that aren't zero  -> digest, gather to writes of 1 MiB,
//! give them the next offsets, under one lock               many in flight, directly from the memory
//! ```
//!
//! **Memory.** At most 16 gather buffers and 16 read buffers of 1 MiB (32 MiB), 128 KiB of scratch for each thread
//! that saves at the same time, and 40 MiB of source files mapped and not yet written. Who wants more waits.
//!
//! **Still files.** [`AsyncMemoryFileSave::write_range`] takes large ranges straight from their mapping, without a
//! copy, after it has returned. So the source must be *still* from the call until `settle`: neither written nor
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

mod error;
mod pages_file;
mod source;
mod tail;
mod writer;

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};

pub use error::SaveError;

use crate::Direct;
use crate::buffer::{Budget, BufferPool, lock};
use crate::digest::DigestTable;
use crate::memory_file::MemoryFile;
use crate::page::{FileRange, PAGE_SIZE, PageExtent, page_floor};
use crate::sys::mapping::{FileMapping, MappingError};
use crate::zero::data_runs;
use pages_file::PagesFile;
use source::{check_range, next_data, read_error, read_up_to};
use tail::Tail;
pub(crate) use tail::{PageMemory, Segment, Write};
use writer::Writer;

/// Bytes of a buffer, and buffers of each kind.
const BUFFERS: (usize, usize) = (1 << 20, 16);
/// Data up to so many bytes is copied: pread(2) is faster than a mapping there, and writes get larger.
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
    scratch: Mutex<Vec<Vec<u8>>>,
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
            scratch: Mutex::new(Vec::new()),
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
    /// Saves `range` of `source`, which starts at a page and is still until the save is settled (see the module).
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

    fn write(&self, source: &File, range: FileRange, still: bool) -> Result<Vec<PageExtent>, SaveError> {
        self.pages.check()?;
        let mut job = Job { pages: self.pages, source, range, still, extents: Vec::new() };
        // A read tells small files' holes and size as well as two more system calls would.
        let small = range.len() <= SMALL as u64;
        check_range(source, range, still && !small)?;
        if small {
            job.copy(range)?;
        } else {
            let mut position = range.start();
            while let Some(data) = next_data(source, range, position)? {
                job.data(data)?;
                position = data.end();
            }
        }
        let saved = job.extents.iter().map(|extent| extent.length).sum();
        self.pages.data_bytes.fetch_add(saved, Ordering::Relaxed);
        Ok(job.extents)
    }
}

/// One call of `write_range`.
struct Job<'a> {
    pages: &'a AsyncPagesFileSave,
    source: &'a File,
    range: FileRange,
    still: bool,
    extents: Vec<PageExtent>,
}

impl Job<'_> {
    /// Saves data, which no hole interrupts.
    fn data(&mut self, data: FileRange) -> Result<(), SaveError> {
        let mut start = data.start();
        // Behind the end of a file its last page may have what a mapping has put there, so it is read, not mapped.
        let whole = page_floor(data.end());
        while whole - start > SMALL as u64 {
            self.pages.check()?;
            // Cut at multiples, so that huge pages are mapped as such.
            let size = if self.still { MAPPED.0 } else { BUFFERS.0 as u64 };
            let end = whole.min((start + 1).next_multiple_of(size));
            let part = subrange(start, end);
            if self.still {
                self.map(part)?
            } else {
                self.read(part)?
            }
            start = end;
        }
        while start < data.end() {
            let end = data.end().min(start + SMALL as u64);
            self.copy(subrange(start, end))?;
            start = end;
        }
        Ok(())
    }

    /// Saves up to [`SMALL`] bytes by copying those that aren't zero.
    fn copy(&mut self, part: FileRange) -> Result<(), SaveError> {
        let mut scratch = lock(&self.pages.scratch).pop().unwrap_or_else(|| vec![0; SMALL]);
        let read = self.fill(&mut scratch, part)?;
        self.append_copies(part.start(), &scratch[..read])?;
        lock(&self.pages.scratch).push(scratch);
        Ok(())
    }

    /// Saves whole pages, up to a buffer, from a buffer.
    fn read(&mut self, part: FileRange) -> Result<(), SaveError> {
        let buffers = &self.pages.read_buffers;
        let mut buffer = buffers
            .take()
            .map_err(|source| SaveError::Buffer { length: buffers.length(), source: Arc::new(source) })?;
        let read = self.fill(&mut buffer, part)?;
        self.append(part.start(), PageMemory::Buffered(Arc::new(buffer)), read)
    }

    /// Saves whole pages from their mapping.
    fn map(&mut self, part: FileRange) -> Result<(), SaveError> {
        let permit = self.pages.mapped.take(part.len());
        match FileMapping::new(self.source, part.start(), part.len() as usize) {
            Ok(mapping) => {
                let memory = PageMemory::Mapped(Arc::new((mapping, permit)));
                self.append(part.start(), memory, part.len() as usize)
            }
            Err(MappingError::Map(source)) => {
                Err(SaveError::Map { offset: part.start(), length: part.len(), source: Arc::new(source) })
            }
            Err(MappingError::Page(offset, source)) => {
                let offset = part.start() + offset as u64;
                check_range(self.source, self.range, true)?;
                Err(read_error(offset, source))
            }
            Err(MappingError::Unsupported) => {
                drop(permit);
                let mut start = part.start();
                while start < part.end() {
                    let end = part.end().min(start + BUFFERS.0 as u64);
                    self.read(subrange(start, end))?;
                    start = end;
                }
                Ok(())
            }
        }
    }

    /// Reads `part`; returns the bytes there are, in whole pages unless the part ends inside one.
    fn fill(&self, buffer: &mut [u8], part: FileRange) -> Result<usize, SaveError> {
        let buffer = &mut buffer[..part.len() as usize];
        let read = read_up_to(self.source, buffer, part.start())?;
        if read < buffer.len() {
            if self.still {
                return Err(SaveError::Truncated { range: self.range, offset: part.start() + read as u64 });
            }
            // Where a live file ended is not where it will end: only the range decides which page is the last.
            let end = read.next_multiple_of(PAGE_SIZE as usize).min(buffer.len());
            buffer[read..end].fill(0);
            return Ok(end);
        }
        Ok(read)
    }

    fn append_copies(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SaveError> {
        // Found before the tail is locked.
        let runs: Vec<_> = data_runs(bytes).collect();
        let data = runs.iter().map(|run| run.len()).sum::<usize>();
        self.pages.zero_bytes.fetch_add((bytes.len() - data) as u64, Ordering::Relaxed);
        let pieces = runs.into_iter().map(|run| (offset + run.start as u64, &bytes[run]));
        self.pages.tail.append_copies(pieces, &mut self.extents)
    }

    /// Appends the first `length` bytes of `memory` by reference, or copies them if only few aren't zero.
    fn append(&mut self, offset: u64, memory: PageMemory, length: usize) -> Result<(), SaveError> {
        let runs: Vec<_> = data_runs(&memory.bytes()[..length]).collect();
        let data = runs.iter().map(|run| run.len()).sum::<usize>();
        if data <= SMALL {
            return self.append_copies(offset, &memory.bytes()[..length]);
        }
        self.pages.zero_bytes.fetch_add((length - data) as u64, Ordering::Relaxed);
        let pieces = runs.into_iter().map(|run| {
            let segment = Segment { memory: memory.clone(), start: run.start, length: run.len() };
            (offset + run.start as u64, segment)
        });
        self.pages.tail.append_segments(pieces.collect(), &mut self.extents);
        Ok(())
    }
}

/// A part of a valid range.
fn subrange(start: u64, end: u64) -> FileRange {
    FileRange::new(start, end).expect("a part of a valid range is one")
}
