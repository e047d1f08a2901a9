//! A shared writable mapping of a file, for the writers of the live checkpoint test.

use std::fs::File;

use memmap2::MmapMut;

/// Maps the whole of `file`, shared and writable.
pub fn map_shared(file: &File) -> std::io::Result<MmapMut> {
    // SAFETY: only this process truncates the files of the test, and it never truncates one that it maps.
    unsafe { MmapMut::map_mut(file) }
}
