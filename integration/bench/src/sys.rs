//! A shared writable mapping, which no safe crate makes.

use std::fs::File;

use memmap2::MmapMut;

/// Maps all of `file`.
pub fn map(file: &File) -> std::io::Result<MmapMut> {
    // SAFETY: nobody truncates the benchmark's file while its one writer runs.
    unsafe { MmapMut::map_mut(file) }
}
