//! After the thaw: what isn't reported is asked for, what was missed is found, and the archive is written.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::AsFd;

use rustix::fs::OFlags;
use rustix::time::{ClockId, clock_gettime};
use stillframe_pgalloc::PageExtent;

use crate::entry::{PathName, Timestamp};
use crate::id_map::Ids;
use crate::live::Live;
use crate::live::model::{Body, Broken, Visit};
use crate::save::{SaveTreeError, Saver, TreeSummary};
use crate::scan::Content;
use crate::stat::Stat;

/// A time by the clock of the kernel's filesystems that no change after this call is before.
pub fn coarse_now() -> Timestamp {
    let now = clock_gettime(ClockId::RealtimeCoarse);
    Timestamp { sec: now.tv_sec, nsec: now.tv_nsec as u32 }
}

/// Why a tree can't be written, before its path is known.
enum Trouble {
    Inode(u64),
    Save(SaveTreeError),
}

impl From<Broken> for Trouble {
    fn from(Broken(inode): Broken) -> Self {
        Self::Inode(inode)
    }
}

impl Live {
    /// After the thaw, which came at or after `thaw`, [`coarse_now`] under the freeze: asks for what isn't reported.
    ///
    /// # Errors
    ///
    /// Something was changed before the thaw, and neither reported nor read.
    pub fn verify(&mut self, thaw: Timestamp) -> Result<(), SaveTreeError> {
        // From here on it would only be in the way.
        self.watch = None;
        let mut missed = None;
        for (inode, node) in &mut self.model.nodes {
            let opened: std::io::Result<File> =
                node.handle.open(self.root.as_fd(), OFlags::PATH | OFlags::NOFOLLOW);
            // What is gone now was as it was read; names say whether it was still there.
            let Ok(now) = opened.and_then(|file| Stat::of(&file)) else { continue };
            match compare(&node.stat, &now, thaw) {
                Now::Same(stat) => node.stat = stat,
                Now::Changed => {}
                Now::Missed => missed = Some(*inode),
            }
        }
        match missed {
            // An inode without a name may be anything.
            Some(inode) if self.model.count_names().is_ok_and(|names| names.contains_key(&inode)) => {
                Err(self.unreported(inode))
            }
            _ => Ok(()),
        }
    }

    fn unreported(&self, inode: u64) -> SaveTreeError {
        SaveTreeError::Unreported { path: PathName(self.model.path(inode)) }
    }

    /// Writes the tree as one archive, with ids as `ids` has them.
    pub fn write<W: Write>(&self, ids: &Ids, out: W) -> Result<(W, TreeSummary), SaveTreeError> {
        let names = self.model.count_names().map_err(|Broken(inode)| self.unreported(inode))?;
        let mut saver = Saver::of_saved(ids, out);
        let written = self.model.walk(|Visit { name, depth, inode }| {
            let node = &self.model.nodes[&inode];
            let is_directory = matches!(node.body, Body::Directory(_));
            if self.gone.contains(&inode) || !is_directory && names[&inode] != node.stat.links {
                return Err(Trouble::Inode(inode));
            }
            let content = match &node.body {
                Body::Directory(_) => Content::Directory,
                Body::File(contents) => Content::Saved(contents.extents.clone()),
                Body::Symlink(target) => Content::Symlink(target.clone()),
                Body::Other => Content::Node,
            };
            saver.save(name, depth, &node.stat, content, node.xattrs.clone()).map_err(Trouble::Save)
        });
        match written {
            Ok(()) => saver.finish(),
            Err(Trouble::Inode(inode)) => Err(self.unreported(inode)),
            Err(Trouble::Save(error)) => Err(error),
        }
    }

    /// Ranges of the pages file that nothing refers to any more, in no order. Forgets what has no name.
    pub fn superseded(&mut self) -> Vec<Range<u64>> {
        let names = self.model.count_names().unwrap_or_default();
        let copier = &mut self.copier;
        self.model.nodes.retain(|inode, node| {
            let named = names.contains_key(inode);
            if let Body::File(contents) = &node.body
                && !named
            {
                copier.drop_all(contents);
            }
            named
        });
        std::mem::take(&mut copier.superseded)
    }

    /// Ranges of the pages file that the files' pages take, in no order.
    pub fn pages(&self) -> Vec<Range<u64>> {
        self.model.pages().collect()
    }

    /// Replaces each file's extents by what `relocate` makes of them.
    pub fn relocate(&mut self, relocate: impl Fn(&[PageExtent]) -> Vec<PageExtent>) {
        for node in self.model.nodes.values_mut() {
            if let Body::File(contents) = &mut node.body {
                contents.extents = relocate(&contents.extents);
            }
        }
    }
}

/// What is now, compared with what was read.
#[derive(Debug, PartialEq, Eq)]
enum Now {
    /// As it was at the thaw.
    Same(Stat),
    /// It has changed since, or may have.
    Changed,
    /// It had changed before, and wasn't read.
    Missed,
}

fn compare(read: &Stat, now: &Stat, thaw: Timestamp) -> Now {
    if now.ctime >= thaw && now.ctime != read.ctime {
        return Now::Changed;
    }
    // The inode is as it was at the thaw, but for its access time.
    let kept =
        |stat: &Stat| (stat.mode, stat.uid, stat.gid, stat.mtime, stat.size * u64::from(is_file(stat)));
    if now.ctime != read.ctime && kept(now) != kept(read) {
        return Now::Missed;
    }
    let atime = if now.atime < thaw { now.atime } else { read.atime };
    Now::Same(Stat { atime, ..*now })
}

fn is_file(stat: &Stat) -> bool {
    stat.format() == libc::S_IFREG
}
