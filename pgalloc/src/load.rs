//! Loading pages from the pages file.
//!
//! ```text
//! callers                              loader threads
//! cut files into parts of 4 MiB,    -> read up to 1 MiB, verify each chunk of 64 KiB, write to the files;
//! add them to a bounded queue          after a file's last byte: its on_loaded
//! ```
//!
//! **Bounds.** The queue holds 32 batches of up to 4 MiB and 128 parts, so at most 4,096 files are open for it, and
//! what is being loaded; each thread has one buffer of 1 MiB. Who wants more waits. Small files needn't be open to be
//! enqueued: a loader opens those of a [`FileBatch`] one after the other, which saves the handing over of a descriptor. And
//! a thread that makes files can load them itself ([`BatchLoader`]), with a buffer of 1 MiB more.
//!
//! **Trust.** The extents may come out of an image: they are checked against the pages file before anything is
//! enqueued (against the file's size the caller has checked them, [`validate_extents`](crate::validate_extents)).
//! Nothing is written to a file that hasn't passed its digest. Several extents may have the same pages: what that
//! may grow to is bounded by the filesystem that takes it.
//!
//! **Failure.** The first failure is final: what is queued is dropped, with its `on_loaded`s, and each later call and
//! `finish` return it; but for a file with an `on_failed`, which gets its own, and the load goes on. A file is complete
//! if and only if its `on_loaded` has run. Dropped without `finish`, a load ends its threads and drops what is queued.
//!
//! Mirrors gVisor's `AsyncPagesFileLoad` (pkg/sentry/pgalloc).

mod batch;
mod error;
mod loader;
mod queue;
mod verified;

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

pub use batch::FileBatch;
pub use error::LoadError;
pub use loader::BatchLoader;
pub use verified::VerifiedPages;

use crate::digest::DigestTable;
use crate::page::{PageExtent, PagesOffset};
use crate::sys::install::Installer;
use loader::{Loader, Shared};
use queue::{BATCH, Callbacks, Part, Queue, Target};

/// How the pages file is loaded.
#[derive(Clone)]
pub struct LoadOptions {
    /// Loader threads; at least one is started.
    pub threads: usize,
    /// Called before so many bytes of the pages file are read, with their offset and number: somebody else may read them
    /// into the page cache.
    pub before_read: Option<BeforeRead>,
    /// Called where a file's filesystem has no room for so many more bytes, with how often they have been tried again: whether to do so.
    pub on_full: Option<OnFull>,
}

/// See [`LoadOptions::before_read`].
pub type BeforeRead = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// See [`LoadOptions::on_full`].
pub type OnFull = Arc<dyn Fn(u64, u32) -> bool + Send + Sync>;

impl Default for LoadOptions {
    fn default() -> Self {
        Self { threads: 2, before_read: None, on_full: None }
    }
}

impl fmt::Debug for LoadOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadOptions").field("threads", &self.threads).finish_non_exhaustive()
    }
}

/// What was loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadSummary {
    /// Bytes written to files.
    pub bytes: u64,
    /// Files that got all of their contents, and their `on_loaded`.
    pub files: u64,
}

/// What to do when a file is loaded.
pub type OnLoaded = Box<dyn FnOnce(&File) -> io::Result<()> + Send>;

/// What to do when a file can't be loaded.
pub type OnFailed = Box<dyn FnOnce(LoadError) + Send>;

/// What to do when the load has let go of a file.
pub type OnClosed = Box<dyn FnOnce() + Send>;

/// A file to load.
pub struct LoadTarget {
    /// The file, open for writing, without contents.
    pub file: Arc<File>,
    /// Its contents, as `write_range` returned them.
    pub extents: Vec<PageExtent>,
    /// Whether it gets its pages without being written to: its times stay as they are, and its pages are of the usual size. Only
    /// on tmpfs, and only if [`can_install`].
    pub quiet: bool,
    /// Runs on a loader thread once the last byte has been written; dropped without being run when loading fails.
    /// Must not enqueue files: it would wait for itself.
    pub on_loaded: Option<OnLoaded>,
    /// Runs instead when the file can't be loaded, also because `on_loaded` failed. The other files are loaded
    /// nevertheless.
    pub on_failed: Option<OnFailed>,
    /// Runs after these, or when the file was dropped from the queue, as soon as the load holds no descriptor of it.
    pub on_closed: Option<OnClosed>,
}

impl LoadTarget {
    /// A file of which nothing more is to be done.
    pub fn new(file: Arc<File>, extents: Vec<PageExtent>) -> Self {
        Self { file, extents, quiet: false, on_loaded: None, on_failed: None, on_closed: None }
    }
}

impl fmt::Debug for LoadTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadTarget")
            .field("file", &self.file)
            .field("extents", &self.extents)
            .finish_non_exhaustive()
    }
}

/// Whether the kernel can give a file pages without writing to it ([`LoadTarget::quiet`]).
pub fn can_install() -> bool {
    Installer::new().is_ok()
}

/// The load of one pages file: owns the file and its loader threads. See the module for bounds, trust, failure.
pub struct AsyncPagesFileLoad {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl AsyncPagesFileLoad {
    /// Loads from `pages_file`, which must be as long as `digests` say.
    ///
    /// # Errors
    ///
    /// It isn't; or no thread or memory is to be had.
    pub fn new(pages_file: File, digests: DigestTable, options: LoadOptions) -> Result<Self, LoadError> {
        let metadata =
            pages_file.metadata().map_err(|source| LoadError::Examine { source: Arc::new(source) })?;
        let (expected, actual) = (digests.pages_length(), metadata.len());
        if expected != actual {
            return Err(LoadError::Length { expected, actual });
        }
        // Twice the read-ahead; none where somebody else reads ahead. Only advice: where it isn't taken, loading is slower.
        let advice = match options.before_read {
            None => PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL,
            Some(_) => PosixFadviseAdvice::POSIX_FADV_RANDOM,
        };
        let _ = posix_fadvise(&pages_file, 0, 0, advice);
        let (bytes, files) = (AtomicU64::new(0), AtomicU64::new(0));
        let shared = Arc::new(Shared {
            pages_file,
            digests,
            before_read: options.before_read,
            on_full: options.on_full,
            queue: Queue::default(),
            bytes,
            files,
        });
        let mut load = Self { shared, threads: Vec::new() };
        for _ in 0..options.threads.max(1) {
            let loader = Loader::new(load.shared.clone())?;
            let thread = thread::Builder::new()
                .name("pages-load".into())
                .spawn(move || loader.run())
                .map_err(|source| LoadError::Thread { source: Arc::new(source) })?;
            load.threads.push(thread);
        }
        Ok(load)
    }

    /// Enqueues files to load, behind those enqueued before; waits while the queue is full.
    ///
    /// # Errors
    ///
    /// Extents that can't be; or the first error of the load. None of these files may be taken for loaded then whose
    /// `on_loaded` hasn't run.
    pub fn load_ranges_into(&self, targets: Vec<LoadTarget>) -> Result<(), LoadError> {
        self.enqueue(targets, false)
    }

    /// Enqueues files that one loader thread opens, loads and closes one after the other; waits while the queue is full.
    ///
    /// # Errors
    ///
    /// As [`load_ranges_into`](Self::load_ranges_into).
    pub fn load_batch(&self, batch: Box<dyn FileBatch>) -> Result<(), LoadError> {
        self.shared.validate_batch(&*batch)?;
        self.shared.queue.push_files(batch)
    }

    /// What loads files of this load on the calling thread.
    ///
    /// # Errors
    ///
    /// There is no memory for its buffer.
    pub fn batch_loader(&self) -> Result<BatchLoader<'_>, LoadError> {
        BatchLoader::new(self.shared.clone())
    }

    /// Enqueues files to be loaded before all others that aren't being loaded yet; doesn't wait.
    ///
    /// # Errors
    ///
    /// As [`load_ranges_into`](Self::load_ranges_into).
    pub fn load_ranges_next(&self, targets: Vec<LoadTarget>) -> Result<(), LoadError> {
        self.enqueue(targets, true)
    }

    /// Waits until everything is loaded.
    ///
    /// # Errors
    ///
    /// The first error of the load.
    pub fn finish(mut self) -> Result<LoadSummary, LoadError> {
        self.shared.queue.close();
        self.join();
        match self.shared.queue.failure() {
            Some(failure) => Err(failure),
            None => Ok(LoadSummary {
                bytes: self.shared.bytes.load(Ordering::Relaxed),
                files: self.shared.files.load(Ordering::Relaxed),
            }),
        }
    }

    /// Length of the pages file in bytes.
    pub(crate) fn pages_length(&self) -> u64 {
        self.shared.digests.pages_length()
    }

    fn enqueue(&self, targets: Vec<LoadTarget>, urgent: bool) -> Result<(), LoadError> {
        for LoadTarget { extents, .. } in &targets {
            self.shared.validate(extents)?;
        }
        for LoadTarget { file, extents, quiet, on_loaded, on_failed, on_closed } in targets {
            let count: usize = extents.iter().map(|extent| parts(*extent).count()).sum();
            let target =
                Target::new(file, quiet, count.max(1), Callbacks { on_loaded, on_failed, on_closed });
            if count == 0 {
                self.shared.queue.push(Part { target, extent: None }, urgent)?;
                continue;
            }
            for extent in extents.into_iter().flat_map(parts) {
                self.shared.queue.push(Part { target: target.clone(), extent: Some(extent) }, urgent)?;
            }
        }
        Ok(())
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // A panic has been recorded as the failure.
            let _ = thread.join();
        }
    }
}

impl Drop for AsyncPagesFileLoad {
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            self.shared.queue.stop(None);
            self.join();
        }
    }
}

/// Cuts a valid extent at multiples of a batch's bytes in the pages file, so that no chunk is in two parts of it.
fn parts(extent: PageExtent) -> impl Iterator<Item = PageExtent> {
    let PageExtent { file_offset, length, pages_offset: PagesOffset(start) } = extent;
    let end = start + length;
    let first = start / BATCH.0;
    (first..end.div_ceil(BATCH.0)).map(move |index| {
        let from = start.max(index * BATCH.0);
        let to = end.min((index + 1) * BATCH.0);
        PageExtent {
            file_offset: file_offset + (from - start),
            length: to - from,
            pages_offset: PagesOffset(from),
        }
    })
}
