//! A loader thread: reads windows of the pages file, verifies their chunks, writes them to their files.
//!
//! The pages file is read (pread(2)), never mapped: where it can't be read a mapping would raise SIGBUS. A window is
//! whole chunks, up to [`WINDOW`] bytes, verified before anything of it is written anywhere; the last one is kept, so
//! the small files of a chunk are read and verified once.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapMut;

use crate::digest::{CHUNK_SIZE, DigestTable};
use crate::load::batch::FileBatch;
use crate::load::error::LoadError;
use crate::load::queue::{Part, Queue, Work};
use crate::load::{AsyncPagesFileLoad, BeforeRead, OnFull};
use crate::page::{MAX_FILE_SIZE, PageExtent, PagesOffset, validate_extents};
use crate::sys::install::Installer;

/// Most bytes that are read at once: whole chunks.
const WINDOW: u64 = 1 << 20;

/// What the loader threads share.
pub(crate) struct Shared {
    pub(crate) pages_file: File,
    pub(crate) digests: DigestTable,
    pub(crate) before_read: Option<BeforeRead>,
    pub(crate) on_full: Option<OnFull>,
    pub(crate) queue: Queue,
    pub(crate) bytes: AtomicU64,
    pub(crate) files: AtomicU64,
}

/// What an extent is loaded to.
#[derive(Clone, Copy)]
struct To<'a> {
    file: &'a File,
    /// Whether it is not to be written to.
    quiet: bool,
}

impl Shared {
    /// Judges a file's extents as far as its size doesn't matter.
    pub(crate) fn validate(&self, extents: &[PageExtent]) -> Result<(), LoadError> {
        // A partial page can be any file's last, here.
        let size = extents.last().and_then(PageExtent::file_end).unwrap_or(MAX_FILE_SIZE);
        Ok(validate_extents(extents, size, self.digests.pages_length())?)
    }

    /// Has `bytes` written, again while room is made for them. What was written before there was none is written once more.
    fn with_room(&self, bytes: u64, mut write: impl FnMut() -> io::Result<()>) -> io::Result<()> {
        let mut again = 0;
        loop {
            match (write(), &self.on_full) {
                (Err(error), Some(on_full)) if is_full(&error) && on_full(bytes, again) => again += 1,
                (written, _) => return written,
            }
        }
    }

    pub(crate) fn validate_batch(&self, files: &dyn FileBatch) -> Result<(), LoadError> {
        (0..files.len()).try_for_each(|index| self.validate(files.extents(index)))
    }
}

/// Loads files of a load on the calling thread, which then needn't give them to another.
pub struct BatchLoader<'a> {
    loader: Loader,
    load: PhantomData<&'a AsyncPagesFileLoad>,
}

impl BatchLoader<'_> {
    pub(crate) fn new(shared: Arc<Shared>) -> Result<Self, LoadError> {
        Ok(Self { loader: Loader::new(shared)?, load: PhantomData })
    }

    /// Loads files; a failure is the load's.
    ///
    /// # Errors
    ///
    /// Extents that can't be; or the first error of the load.
    pub fn load(&mut self, files: &mut dyn FileBatch) -> Result<(), LoadError> {
        let Self { loader, .. } = self;
        loader.shared.validate_batch(files)?;
        let failure = match loader.load_files(files) {
            Ok(true) => return Ok(()),
            Ok(false) => None,
            Err(error) => Some(error),
        };
        loader.shared.queue.stop(failure);
        Err(loader.shared.queue.failure().expect("nothing else stops a load that is in use"))
    }
}

/// One thread's part of it.
pub(crate) struct Loader {
    shared: Arc<Shared>,
    buffer: MmapMut,
    /// Made for the first file that is not to be written to.
    installer: Option<Installer>,
    /// Where in the pages file the verified bytes in the buffer are, and how many.
    window: (u64, usize),
}

impl Loader {
    pub(crate) fn new(shared: Arc<Shared>) -> Result<Self, LoadError> {
        let length = WINDOW as usize;
        let buffer = MmapMut::map_anon(length)
            .map_err(|source| LoadError::Buffer { length, source: Arc::new(source) })?;
        Ok(Self { shared, buffer, installer: None, window: (0, 0) })
    }

    /// Loads until there is no more, or something failed.
    pub(crate) fn run(mut self) {
        let guard = StopOnPanic(self.shared.clone());
        while let Some(work) = self.shared.queue.take() {
            let loaded = match work {
                Work::Parts(parts) => self.load(parts.into()),
                Work::Files(mut files) => self.load_files(&mut *files).map(drop),
            };
            if let Err(error) = loaded {
                self.shared.queue.stop(Some(error));
            }
        }
        drop(guard);
    }

    /// Opens, loads and closes one file after the other; false if the load was stopped before all of them were there.
    fn load_files(&mut self, files: &mut dyn FileBatch) -> Result<bool, LoadError> {
        let opened = |source| LoadError::Open { source: Arc::new(source) };
        let finished = |source| LoadError::OnLoaded { source: Arc::new(source) };
        for index in 0..files.len() {
            let file = files.open(index).map_err(opened)?;
            for number in 0..files.extents(index).len() {
                let extent = files.extents(index)[number];
                let next = || {
                    let rest = files.extents(index)[number + 1..].iter();
                    rest.chain((index + 1..files.len()).flat_map(|next| files.extents(next))).copied()
                };
                if !self.load_extent(To { file: &file, quiet: false }, extent, next)? {
                    return Ok(false);
                }
            }
            files.loaded(index, &file).map_err(finished)?;
            self.shared.files.fetch_add(1, Ordering::Relaxed);
        }
        Ok(true)
    }

    /// Lets go of each part when it is done: who waits for a file needn't wait for the rest of its batch.
    fn load(&mut self, mut parts: VecDeque<Part>) -> Result<(), LoadError> {
        while let Some(part) = parts.pop_front() {
            match self.load_part(&part, &parts) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                // It isn't counted as done: the file won't be complete.
                Err(error) => part.target.fail(error)?,
            }
        }
        Ok(())
    }

    /// Loads a part; false if the load was stopped before all of it was there.
    fn load_part(&mut self, part: &Part, next: &VecDeque<Part>) -> Result<bool, LoadError> {
        let to = To { file: &part.target.file, quiet: part.target.quiet };
        let next = || next.iter().filter_map(|part| part.extent);
        if let Some(extent) = part.extent.filter(|_| !part.target.has_failed())
            && !self.load_extent(to, extent, next)?
        {
            return Ok(false);
        }
        let (last, on_loaded) = part.target.part_done();
        if let Some(on_loaded) = on_loaded {
            on_loaded(&part.target.file)
                .map_err(|source| LoadError::OnLoaded { source: Arc::new(source) })?;
        }
        self.shared.files.fetch_add(last.into(), Ordering::Relaxed);
        Ok(true)
    }

    /// Loads an extent, which `next` follow; false if the load was stopped before all of it was there.
    fn load_extent<N: Iterator<Item = PageExtent>>(
        &mut self,
        to: To<'_>,
        extent: PageExtent,
        next: impl Fn() -> N,
    ) -> Result<bool, LoadError> {
        let PageExtent { mut file_offset, length, pages_offset: PagesOffset(mut offset) } = extent;
        let end = offset + length;
        while offset < end {
            if !self.has(offset) {
                if self.shared.queue.is_stopped() {
                    return Ok(false);
                }
                let wanted = wanted(end, next());
                let ahead = self.read(offset, wanted);
                // What is damaged may be the next file's.
                if wanted > end && matches!(ahead, Err(LoadError::Digest { .. } | LoadError::Read { .. })) {
                    self.read(offset, end)?;
                } else {
                    ahead?;
                }
            }
            let (start, length) = self.window;
            let bytes = &self.buffer[(offset - start) as usize..length.min((end - start) as usize)];
            let installer = &mut self.installer;
            self.shared.with_room(bytes.len() as u64, || to.write(installer, bytes, file_offset)).map_err(
                |source| LoadError::Write {
                    offset: file_offset,
                    pages_offset: PagesOffset(offset),
                    source: Arc::new(source),
                },
            )?;
            offset += bytes.len() as u64;
            file_offset += bytes.len() as u64;
            self.shared.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        Ok(true)
    }

    fn has(&self, offset: u64) -> bool {
        let (start, length) = self.window;
        offset >= start && offset - start < length as u64
    }

    /// Reads and verifies the chunks from that of `offset` to that which ends at or behind `wanted`, or fewer.
    fn read(&mut self, offset: u64, wanted: u64) -> Result<(), LoadError> {
        let start = offset / CHUNK_SIZE * CHUNK_SIZE;
        let end =
            wanted.next_multiple_of(CHUNK_SIZE).min(start + WINDOW).min(self.shared.digests.pages_length());
        // Not valid while it is read: an error must leave nothing unverified behind.
        self.window = (0, 0);
        if let Some(before_read) = &self.shared.before_read {
            before_read(start, end - start);
        }
        let bytes = &mut self.buffer[..(end - start) as usize];
        self.shared
            .pages_file
            .read_exact_at(bytes, start)
            .map_err(|source| LoadError::Read { offset: PagesOffset(start), source: Arc::new(source) })?;
        self.shared.digests.verify(start, bytes).map_err(|source| LoadError::damaged(start, source))?;
        self.window = (start, bytes.len());
        Ok(())
    }
}

impl To<'_> {
    fn write(self, made: &mut Option<Installer>, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.quiet {
            installer(made)?.install(self.file, offset, bytes)
        } else {
            self.file.write_all_at(bytes, offset)
        }
    }
}

fn installer(made: &mut Option<Installer>) -> io::Result<&Installer> {
    match made {
        Some(installer) => Ok(installer),
        None => Ok(made.insert(Installer::new()?)),
    }
}

/// ENOMEM is what userfaultfd(2) says where tmpfs has no room (`shmem_mfill_atomic_pte`).
fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::ENOMEM))
}

/// How far to read: to `end`, and on to what follows it in the same or the next chunk.
fn wanted(end: u64, next: impl Iterator<Item = PageExtent>) -> u64 {
    let mut wanted = end;
    for extent in next {
        let start = extent.pages_offset.0;
        if start + CHUNK_SIZE < wanted || start > wanted.next_multiple_of(CHUNK_SIZE) {
            break;
        }
        wanted = wanted.max(start + extent.length);
    }
    wanted
}

/// Ends the load when a loader thread panics, so that nobody waits for it for ever.
struct StopOnPanic(Arc<Shared>);

impl Drop for StopOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.queue.stop(Some(LoadError::Panicked));
        }
    }
}
