//! The filesystems of a checkpoint that are read while the containers run, before they are frozen.
//!
//! copy -> round, round ... -> frozen: settle -> thawed: verify -> compact -> write. Only filesystems in memory: one on disk is
//! saved as a whole. Where changes can't be watched (no fanotify), or there are too many inodes, nothing is copied ahead,
//! and the freeze is as long as it would be without.
//!
//! **Rounds.** Each reads what changed during the one before, so that they get shorter while less changes than is read. They
//! end when a round isn't at most half of the last one, or few objects are left ([`FEW`]), or what was written is twice the
//! first copy.
//!
//! **Waste.** What was copied and then changed lies in the pages file, and nothing refers to it. Beyond a [`WASTE`]th of the
//! file, pages from its end are moved there, when the containers run again. Pages of filesystems on disk must stay in their
//! order, so what is before them stays, too.

use std::fs::File;
use std::path::Path;

use stillframe_pgalloc::{AsyncPagesFileSave, MemoryFile, SaveError, SettledPagesFile};
use stillframe_tmpfs::entry::Timestamp;
use stillframe_tmpfs::live::Live;

use crate::checkpoint::error::CheckpointCause;
use crate::checkpoint::trees::Compressor;
use crate::checkpoint::{pages_failed, save_failed};
use crate::image::ImageWriter;
use crate::selected::Selected;

/// So few changed objects are left to the freeze.
const FEW: usize = 16;
/// Most rounds after the first copy.
const ROUNDS: u32 = 8;
/// A pages file of which a larger part than one in so many is waste is made smaller.
const WASTE: u64 = 20;

/// One for each selected filesystem; `None` for those that are saved in another way.
#[derive(Debug)]
pub(crate) struct Lives {
    pub(crate) filesystems: Vec<Option<Live>>,
    /// How often what had changed was copied, the first copy included.
    pub(crate) rounds: u32,
    /// Bytes that were copied.
    pub(crate) copied: u64,
}

impl Lives {
    pub(crate) fn none(selected: &[Selected]) -> Self {
        Self { filesystems: selected.iter().map(|_| None).collect(), rounds: 0, copied: 0 }
    }

    /// Copies everything, and then what has changed, until that isn't worth while any more.
    pub(crate) fn copy(
        selected: &[Selected],
        views: &[File],
        pages: &AsyncPagesFileSave,
        pages_path: &Path,
    ) -> Result<Self, CheckpointCause> {
        let memory_file = MemoryFile::main();
        let memory = pages.register_memory_file(&memory_file);
        let memory = memory.map_err(|source| pages_failed(pages_path, source))?;
        let mut lives = Self::none(selected);
        for ((selected, view), live) in selected.iter().zip(views).zip(&mut lives.filesystems) {
            if selected.record.filestore.is_some() {
                continue;
            }
            let unloaded = selected.unloaded()?;
            match Live::begin(view, unloaded) {
                Ok(begun) => *live = Some(begun),
                Err(error) => {
                    tracing::warn!(%error, "changes can't be watched: everything is copied under the freeze");
                }
            }
        }
        let failed =
            |selected: &Selected, source| save_failed(&selected.record.resource_id, pages_path, source);
        for (selected, live) in selected.iter().zip(&mut lives.filesystems) {
            if let Some(begun) = live
                && !begun.copy(&memory).map_err(|source| failed(selected, source))?
            {
                tracing::warn!(id = %selected.record.resource_id, "too many files to be copied ahead of the freeze");
                *live = None;
            }
        }
        if lives.filesystems.iter().any(Option::is_some) {
            lives.rounds = 1;
        }
        let first: u64 = lives.filesystems.iter().flatten().map(Live::written).sum();
        let mut last = usize::MAX;
        while lives.rounds > 0 && lives.rounds <= ROUNDS {
            let mut changed = 0;
            for (selected, live) in selected.iter().zip(&mut lives.filesystems) {
                if let Some(live) = live {
                    changed += live.round(&memory).map_err(|source| failed(selected, source))?;
                }
            }
            tracing::debug!(changed, rounds = lives.rounds, "copied what had changed");
            lives.rounds += u32::from(changed > 0);
            let written: u64 = lives.filesystems.iter().flatten().map(Live::written).sum();
            if changed <= FEW || changed > last / 2 || written > 2 * first {
                break;
            }
            last = changed;
        }
        lives.copied = lives.filesystems.iter().flatten().map(Live::written).sum();
        Ok(lives)
    }

    /// Makes the archives, of which then less is to be made later.
    pub(crate) fn prepare(&mut self, selected: &[Selected]) {
        let mut compressor = match Compressor::new() {
            Ok(compressor) => compressor,
            Err(error) => return tracing::warn!(%error, "archives can't be compressed ahead"),
        };
        for (selected, live) in selected.iter().zip(&mut self.filesystems) {
            if let Some(live) = live {
                live.prepare(&selected.ids, &mut |bytes| compressor.compress(bytes));
            }
        }
    }

    /// After the thaw, which came at or after `thaw`: asks for what the kernel doesn't report, and finds what it missed.
    pub(crate) fn verify(
        &mut self,
        selected: &[Selected],
        image: &ImageWriter,
        thaw: Timestamp,
    ) -> Result<(), CheckpointCause> {
        for (selected, live) in selected.iter().zip(&mut self.filesystems) {
            if let Some(live) = live {
                live.verify(thaw).map_err(|source| {
                    save_failed(&selected.record.resource_id, &image.pages_path(), source)
                })?;
            }
        }
        Ok(())
    }

    /// Ends them.
    pub(crate) fn discard(self) {
        self.filesystems.into_iter().flatten().for_each(Live::discard);
    }

    /// Makes the pages file smaller if too much of it is waste; bytes of waste that are left.
    pub(crate) fn compact(&mut self, pages: &mut SettledPagesFile) -> Result<u64, SaveError> {
        let free: Vec<_> = self.filesystems.iter_mut().flatten().flat_map(Live::superseded).collect();
        let waste: u64 = free.iter().map(|range| range.end - range.start).sum();
        let length = pages.summary().length;
        if waste <= length / WASTE {
            return Ok(waste);
        }
        let movable = self.filesystems.iter().flatten().flat_map(Live::pages).collect();
        let moves = pages.compact(free, movable)?;
        self.filesystems.iter_mut().flatten().for_each(|live| live.relocate(|extents| moves.apply(extents)));
        Ok(waste - (length - pages.summary().length))
    }
}
