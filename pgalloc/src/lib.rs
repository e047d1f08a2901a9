//! Pages: page ranges, MemoryFiles, the pages file, asynchronous save and load.
//!
//! Knows no filesystem, no container and no image directory; must never learn of them. The names are those of
//! gVisor's `pgalloc` where they mean the same.
//!
//! Saving: an [`AsyncPagesFileSave`] owns the pages file and its writer thread. `write_range` finds a range's pages
//! that aren't zero, gives them their place in the pages file and returns it at once; the writer digests and
//! writes them. Loading: an [`AsyncPagesFileLoad`] reads the pages file chunk by chunk, verifies each chunk and
//! writes it to where it belongs. Both report their first error at the next call and at `finish`.

mod buffer;
mod digest;
mod load;
mod memory_file;
mod meta;
mod page;
mod save;
mod sys;
mod zero;

pub use digest::{CHUNK_SIZE, DigestError, DigestTable, digest_chunks};
pub use load::{
    AsyncPagesFileLoad, BatchLoader, FileBatch, LoadError, LoadOptions, LoadSummary, LoadTarget, OnClosed,
    OnFailed, OnLoaded, VerifiedPages, can_install,
};
pub use memory_file::MemoryFile;
pub use meta::{MetaError, PagesMeta, PrivateMemoryFileMeta};
pub use page::{ExtentError, FileRange, MAX_FILE_SIZE, PAGE_SIZE, PageExtent, PagesOffset, validate_extents};
pub use save::{
    AsyncMemoryFileSave, AsyncPagesFileSave, Moves, PagesFileSummary, SaveCanceller, SaveError, SaveOptions,
    SettledPagesFile,
};

/// Whether the pages file is read or written past the page cache (`O_DIRECT`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direct {
    /// Where its filesystem takes it and gains by it, else through the page cache.
    #[default]
    Auto,
    /// Always; an error where the filesystem refuses it.
    Always,
    /// Never.
    Never,
}
