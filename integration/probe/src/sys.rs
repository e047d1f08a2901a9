//! A shared mapping of a file's first bytes.

use std::fs::File;
use std::io;

use memmap2::{MmapMut, MmapOptions};

/// A number at the start of a file, in a shared mapping.
#[derive(Debug)]
pub struct Counter(MmapMut);

impl Counter {
    /// Maps it; the file has eight bytes at least.
    pub fn map(file: &File) -> io::Result<Self> {
        // SAFETY: nobody but this process and its copy has the file, which is never made shorter.
        let mapping = unsafe { MmapOptions::new().len(8).map_mut(file) }?;
        Ok(Self(mapping))
    }

    /// What is there.
    pub fn load(&self) -> u64 {
        u64::from_le_bytes(self.0[..8].try_into().expect("eight bytes are mapped"))
    }

    /// Replaces it.
    pub fn store(&mut self, value: u64) {
        self.0[..8].copy_from_slice(&value.to_le_bytes());
    }
}
