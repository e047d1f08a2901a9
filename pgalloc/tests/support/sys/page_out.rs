//! Having pages of a tmpfs file swapped out, madvise(2) MADV_PAGEOUT.

use std::fs::File;
use std::ptr::NonNull;

use nix::sys::mman::{MmapAdvise, madvise};

/// Swaps out what the kernel will of the file's `pages`, which are there. Only mapped pages are, so they are touched.
pub fn page_out(file: &File, pages: impl Iterator<Item = u64>) {
    // SAFETY: the file is the test's own and keeps its size while it is mapped here.
    let map = unsafe { memmap2::Mmap::map(file) }.unwrap();
    let touched: u64 = pages.map(|page| u64::from(map[page as usize * 4096])).sum();
    std::hint::black_box(touched);
    let address = NonNull::new(map.as_ptr().cast_mut().cast()).expect("a mapping isn't at 0");
    // SAFETY: the range is that of the mapping; paging out keeps its contents.
    unsafe { madvise(address, map.len(), MmapAdvise::MADV_PAGEOUT) }.unwrap();
}
