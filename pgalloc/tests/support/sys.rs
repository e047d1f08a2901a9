//! Stores through a shared mapping, as applications make them.

use std::fs::File;

/// Maps the page of `file` at `offset` and copies `bytes` into it at `position`, which may be behind the file's end.
pub fn store(file: &File, offset: u64, position: usize, bytes: &[u8]) {
    let mut options = memmap2::MmapOptions::new();
    options.offset(offset).len(4096);
    // SAFETY: the file is the test's own and keeps its size while it is mapped here.
    let mut map = unsafe { options.map_mut(file) }.unwrap();
    map[position..position + bytes.len()].copy_from_slice(bytes);
}
