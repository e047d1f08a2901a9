//! Huge pages while a tmpfs is filled.
//!
//! With `huge=always` or `within_size` each write gets a huge page where its place has none, and that counts whole against
//! `size=`. What lies behind a file's end is taken back when room is short (`shmem_unused_huge_shrink`), but not what
//! lies inside a hole: scattered data can take up to 512 times its size, and then the kernel refuses even a small page.
//! So a tree that might not fit with huge pages, though it does without, is filled in without: the superblock gets
//! `huge=never` until the contents are there. What is allocated later is as huge as it always was.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fsconfig_set_string, fspick};

use crate::entry::Tree;

const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;
/// A size that any huge page lies within.
const LARGE: u64 = 1 << 32;

/// Whether `tree` fits with the huge pages that the tmpfs would give it; `None` if it gives none.
fn fits_with_huge_pages(root: &File, tree: &Tree) -> io::Result<Option<bool>> {
    let space = rustix::fs::fstatfs(root)?;
    if space.f_type != TMPFS_MAGIC {
        return Ok(None);
    }
    let page_size = rustix::param::page_size() as u64;
    let Some(huge_page) = huge_page(root).filter(|huge| *huge > page_size) else { return Ok(None) };
    let limit = space.f_blocks.saturating_mul(page_size);
    Ok(Some(limit == 0 || tree.huge_page_bytes(page_size, huge_page) <= limit))
}

/// Whether the tmpfs whose root is `root` would give the files of `tree` huge pages, and has room for them.
pub fn takes_huge_pages(root: &File, tree: &Tree) -> bool {
    fits_with_huge_pages(root, tree).is_ok_and(|fits| fits == Some(true))
}

/// A tmpfs that allocates no huge pages; as before when this is dropped.
#[derive(Debug)]
pub(crate) struct SmallPages {
    root: File,
    huge: String,
}

impl SmallPages {
    /// Makes it so for the tmpfs whose root is `root`, if `tree` needs it; does nothing to another filesystem.
    pub(crate) fn if_needed(root: &File, tree: &Tree) -> io::Result<Option<Self>> {
        if fits_with_huge_pages(root, tree)? != Some(false) {
            return Ok(None);
        }
        // Without the option it is the whole machine's setting, which is stronger.
        let Some(huge) = option(root)? else { return Ok(None) };
        tracing::debug!(huge, "the tree might not fit with huge pages: it gets small ones");
        set(root, "never")?;
        Ok(Some(Self { root: root.try_clone()?, huge }))
    }
}

impl Drop for SmallPages {
    fn drop(&mut self) {
        if let Err(error) = set(&self.root, &self.huge) {
            tracing::warn!(huge = self.huge, %error, "a tmpfs couldn't be given its option huge= back");
        }
    }
}

/// Bytes of the pages that the kernel would give a file now: it tells by `st_blksize` (shmem_getattr).
fn huge_page(root: &File) -> Option<u64> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::openat(root, ".", flags, Mode::RUSR).ok()?;
    rustix::fs::ftruncate(&file, LARGE).ok()?;
    u64::try_from(rustix::fs::fstat(&file).ok()?.st_blksize).ok()
}

/// The superblock's option `huge=`, as mountinfo shows it of any mount of it.
fn option(root: &File) -> io::Result<Option<String>> {
    let device = rustix::fs::fstat(root)?.st_dev;
    let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let mounts = std::fs::read("/proc/self/mountinfo")?;
    let mounts = String::from_utf8_lossy(&mounts);
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some(device.as_str()));
    let options = line.and_then(|line| line.rsplit(' ').next()).unwrap_or_default();
    Ok(options.split(',').find_map(|option| option.strip_prefix("huge=")).map(str::to_owned))
}

fn set(root: &File, huge: &str) -> io::Result<()> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let context = fspick(root, "", flags)?;
    fsconfig_set_string(context.as_fd(), "huge", huge)?;
    Ok(fsconfig_reconfigure(context.as_fd())?)
}
