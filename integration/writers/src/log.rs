//! What the writers did, in memory that they share with whoever looks at images: a clock, and of each writer its last steps.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::{ALL, sys};

/// Steps of each writer that are remembered.
const REMEMBERED: u64 = 1 << 16;
/// Numbers kept of each: which step, when it began, when it ended.
const FIELDS: u64 = 3;

/// See the module.
#[derive(Debug)]
pub struct Log {
    map: memmap2::MmapMut,
}

impl Log {
    /// Opens the log, and makes it if it isn't there. All that have it open have the same one.
    ///
    /// # Errors
    ///
    /// The file can't be opened, made longer or mapped.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        file.set_len(8 * (1 + ALL.len() as u64 * REMEMBERED * FIELDS))?;
        Ok(Self { map: sys::map_shared(&file)? })
    }

    fn tick(&self) -> u64 {
        sys::atomics(&self.map)[0].fetch_add(1, SeqCst) + 1
    }

    fn entry(&self, writer: usize, step: u64) -> &[AtomicU64] {
        let at = 1 + (writer as u64 * REMEMBERED + step % REMEMBERED) * FIELDS;
        &sys::atomics(&self.map)[at as usize..(at + FIELDS) as usize]
    }

    /// A step of a writer, by its number in [`ALL`]: notes when it begins and when it ends.
    pub fn note(&self, writer: usize, step: u64, work: impl FnOnce()) {
        let entry = self.entry(writer, step);
        let begun = self.tick();
        entry[2].store(0, SeqCst);
        entry[1].store(begun, SeqCst);
        entry[0].store(step, SeqCst);
        work();
        entry[2].store(self.tick(), SeqCst);
    }

    /// When a step began and ended, by a clock that all writers share, 0 if it hasn't; `None` if it isn't remembered any more.
    pub fn times(&self, writer: usize, step: u64) -> Option<(u64, u64)> {
        let entry = self.entry(writer, step);
        match entry[0].load(SeqCst) {
            there if there == step => Some((entry[1].load(SeqCst), entry[2].load(SeqCst))),
            there if there < step => Some((0, 0)),
            _ => None,
        }
    }
}
