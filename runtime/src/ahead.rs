//! Copying the filesystems' files while the containers run, before they are frozen.
//!
//! copy (containers running) -> freeze -> settle (take back what may have changed) -> the save under the freeze. Only
//! for filesystems in memory: one on disk is saved as a whole. Where changes can't be watched (no fanotify), nothing is
//! copied ahead, and the freeze is as long as it would be without.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

use stillframe_pgalloc::AsyncMemoryFileSave;
use stillframe_tmpfs::changes::{Changes, Suspects};
use stillframe_tmpfs::precopy::Precopied;
use stillframe_tmpfs::save::SaveTreeError;

/// One filesystem of which files were copied ahead.
#[derive(Debug)]
pub(crate) struct Ahead {
    device: u64,
    changes: Changes,
    copied: Precopied,
}

impl Ahead {
    /// Copies the files of the filesystem behind `view` through `memory`.
    pub(crate) fn copy(view: &File, memory: &AsyncMemoryFileSave<'_>) -> Result<Option<Self>, SaveTreeError> {
        // Watching begins before the first file is looked at.
        let begun = Changes::watch(view).and_then(|changes| Ok((changes, view.metadata()?.dev())));
        let (changes, device) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                tracing::warn!(%error, "changes can't be watched: everything is copied under the freeze");
                return Ok(None);
            }
        };
        Ok(Some(Self { device, changes, copied: Precopied::copy(view, memory)? }))
    }

    /// Under the freeze: takes back what `processes`, all that can write to the filesystem, may have changed.
    pub(crate) fn settle(&mut self, processes: &[i32]) {
        self.copied.forget(&self.changes.take());
        match mapped_shared(processes, self.device) {
            Ok(inodes) => self.copied.forget(&Suspects::Inodes(inodes)),
            Err(error) => {
                tracing::warn!(%error, "mappings can't be told: everything is copied under the freeze");
                self.copied.forget(&Suspects::All);
            }
        }
    }

    /// What was copied.
    pub(crate) fn copied(&self) -> &Precopied {
        &self.copied
    }
}

/// Inodes on a device that processes have mapped shared, for writing or not: one that isn't may have been.
fn mapped_shared(processes: &[i32], device: u64) -> io::Result<HashSet<u64>> {
    let wanted = (rustix::fs::major(device), rustix::fs::minor(device));
    let mut inodes = HashSet::new();
    for pid in processes {
        let maps = match fs::read(format!("/proc/{pid}/maps")) {
            Ok(maps) => maps,
            // Gone, with its mappings.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => continue,
            Err(error) => return Err(error),
        };
        inodes.extend(
            maps.split(|b| *b == b'\n')
                .filter_map(shared)
                .filter_map(|(at, inode)| (at == wanted).then_some(inode)),
        );
    }
    Ok(inodes)
}

/// Device and inode of a line of /proc/PID/maps, if it is of a shared mapping.
fn shared(line: &[u8]) -> Option<((u32, u32), u64)> {
    // The path, which comes last, may be any bytes.
    let mut fields = line.split(|b| *b == b' ').filter(|field| !field.is_empty());
    let (_, permissions, _, device, inode) =
        (fields.next()?, fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    if permissions.get(3) != Some(&b's') {
        return None;
    }
    let (major, minor) = std::str::from_utf8(device).ok()?.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    Some(((number(major)?, number(minor)?), std::str::from_utf8(inode).ok()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_mappings_are_told_from_private_ones() {
        for (line, want) in [
            (
                &b"7f00-7f01 rw-s 00000000 00:2a 17                 /x y\xff (deleted)"[..],
                Some(((0, 0x2a), 17)),
            ),
            (b"7f00-7f01 r--s 00001000 103:05 9 /x", Some(((0x103, 5), 9))),
            (b"7f00-7f01 rw-p 00000000 00:2a 17 /x", None),
            (b"7f00-7f01 rw-p 00000000 00:00 0", None),
            (b"", None),
            (b"garbage", None),
        ] {
            assert_eq!(shared(line), want, "{}", line.escape_ascii());
        }
    }
}
