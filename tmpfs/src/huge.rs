//! Huge pages while a tmpfs is filled.
//!
//! With `huge=always` or `within_size` each write gets a huge page where its place has none, and that counts whole against
//! `size=`. What lies inside a hole is never taken back: scattered data can take up to 512 times its size, and then the kernel
//! refuses even a small page. What lies behind a file's end (with `always`) is, when room is short
//! (`shmem_unused_huge_shrink`), but at a cost, and it can fail: measured on Linux 6.18, 20,000 files of 4 KiB in 1 GiB take 47 s
//! instead of 0.5 s, and on a busy machine the kernel refuses a page in one of ten times that two threads write so, because
//! what it would split is in use. So a tree that fits with huge pages only if some are taken back, or doesn't at all,
//! is filled in with fewer or none: the superblock gets another `huge=` until the contents are there. What is allocated later is as
//! huge as it always was.

use std::fs::File;
use std::io;

use rustix::fs::{Mode, OFlags};

use crate::entry::Tree;
use crate::mount::{reconfigure, tmpfs_usage};

/// A size that any huge page lies within.
const LARGE: u64 = 1 << 32;
const HUGE: &str = "huge";
const ALWAYS: &str = "always";
const WITHIN_SIZE: &str = "within_size";
const NEVER: &str = "never";

/// What huge pages a tmpfs gives, and what room it has for them.
struct Space {
    huge_page: u64,
    /// `None`: as much as there is memory.
    limit: Option<u64>,
}

impl Space {
    /// `None` where there are no huge pages.
    fn of(root: &File) -> io::Result<Option<Self>> {
        let Some(usage) = tmpfs_usage(root)? else { return Ok(None) };
        let page_size = rustix::param::page_size() as u64;
        let huge_page = huge_page(root).filter(|huge| *huge > page_size);
        Ok(huge_page.map(|huge_page| Self { huge_page, limit: usage.size_bytes }))
    }

    /// Whether there is room for all of `tree`, if files with at least `from` bytes of data get huge pages.
    fn holds(&self, tree: &Tree, from: u64, tails: bool) -> bool {
        let page_size = rustix::param::page_size() as u64;
        self.limit.is_none_or(|limit| tree.huge_page_bytes(page_size, self.huge_page, from, tails) <= limit)
    }
}

/// The huge pages that a filesystem gives files by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugePages {
    /// The superblock's option `huge=`, if that is why.
    pub option: Option<String>,
    /// Whether there is room for them, without taking any back.
    pub fit: bool,
}

impl HugePages {
    /// Of the filesystem whose root is `root`, for those files of `tree` that have at least `from` bytes of data. None where it can't be
    /// told: then files are as huge as the kernel makes them.
    pub fn of(root: &File, tree: &Tree, from: u64) -> Self {
        let Ok(Some(space)) = Space::of(root) else { return Self::default() };
        let option = option(root).ok().flatten();
        let fit = space.holds(tree, from, option.as_deref() != Some(WITHIN_SIZE));
        Self { option: option.filter(|option| option == ALWAYS || option == WITHIN_SIZE), fit }
    }
}

/// A tmpfs that allocates fewer huge pages or none; as before when this is dropped.
#[derive(Debug)]
pub struct SmallPages {
    root: File,
    huge: String,
}

impl SmallPages {
    /// Makes it so for the tmpfs whose root is `root`, if `tree` needs it; does nothing to another filesystem.
    pub(crate) fn if_needed(root: &File, tree: &Tree) -> io::Result<Option<Self>> {
        let Some(space) = Space::of(root)? else { return Ok(None) };
        if space.holds(tree, 0, true) {
            return Ok(None);
        }
        // Without the option it is the whole machine's setting, which is stronger.
        let Some(huge) = option(root)? else { return Ok(None) };
        let instead = match space.holds(tree, 0, false) {
            true if huge == WITHIN_SIZE => return Ok(None),
            true => WITHIN_SIZE,
            false => NEVER,
        };
        tracing::debug!(huge, instead, "the tree might not fit with huge pages: it gets fewer of them");
        Self::set(root, huge, instead).map(Some)
    }

    /// No huge pages for now, where `root` has the option `huge`.
    ///
    /// # Errors
    ///
    /// The mount can't be changed.
    pub fn instead_of(root: &File, huge: String) -> io::Result<Self> {
        Self::set(root, huge, NEVER)
    }

    fn set(root: &File, huge: String, instead: &str) -> io::Result<Self> {
        reconfigure(root, HUGE, instead)?;
        Ok(Self { root: root.try_clone()?, huge })
    }
}

impl Drop for SmallPages {
    fn drop(&mut self) {
        if let Err(error) = reconfigure(&self.root, HUGE, &self.huge) {
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
