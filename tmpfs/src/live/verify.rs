//! After the thaw: what isn't reported is asked for, what was missed is found, and the archive is written.

use std::io::Write;
use std::num::NonZero;
use std::ops::Range;
use std::os::fd::AsFd;
use std::thread::{self, Builder};

use rustix::fs::OFlags;
use rustix::time::{ClockId, clock_gettime};
use stillframe_pgalloc::PageExtent;

use crate::entry::{PathName, Timestamp};
use crate::id_map::Ids;
use crate::live::Live;
use crate::live::model::{Body, Broken, Child, Node, Visit};
use crate::save::{SaveTreeError, Saver, TreeSummary};
use crate::scan::Content;
use crate::stat::Stat;

/// Most threads that look at inodes at the same time.
const WORKERS: usize = 4;

/// What was found by looking once more.
#[derive(Default)]
struct Looked {
    /// Inodes of which something has changed that isn't reported.
    changed: Vec<(u64, Stat)>,
    /// An inode that was changed before the thaw, and wasn't read.
    missed: Option<u64>,
}

/// A time by the clock of the kernel's filesystems that no change after this call is before.
pub fn coarse_now() -> Timestamp {
    let now = clock_gettime(ClockId::RealtimeCoarse);
    Timestamp { sec: now.tv_sec, nsec: now.tv_nsec as u32 }
}

/// Why a tree can't be written, before its path is known.
pub(super) enum Trouble {
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
        self.count_names()?;
        let is_directory = |(inode, node): (&u64, &Node)| match node.body {
            Body::Directory(_) => self.names.contains_key(inode).then_some(*inode),
            _ => None,
        };
        let directories: Vec<u64> = self.model.nodes.iter().filter_map(is_directory).collect();
        // In a pause of somebody else's this is most of what there is to do.
        let workers = thread::available_parallelism().map_or(1, NonZero::get).min(WORKERS);
        let share = directories.len().div_ceil(workers).max(1);
        let this = &*self;
        let looked: Vec<Looked> = thread::scope(|scope| {
            let workers: Vec<_> = directories
                .chunks(share)
                .map(|share| {
                    let look = move || {
                        share.iter().fold(Looked::default(), |looked, inode| this.look(*inode, thaw, looked))
                    };
                    Builder::new()
                        .name("verify".into())
                        .spawn_scoped(scope, look)
                        .map_err(SaveTreeError::Thread)
                })
                .collect();
            workers
                .into_iter()
                .map(|worker| Ok(worker?.join().expect("looking doesn't panic")))
                .collect::<Result<_, _>>()
        })?;
        for Looked { changed, missed } in looked {
            if let Some(inode) = missed {
                return Err(self.unreported(inode));
            }
            for (inode, stat) in changed {
                self.model.nodes.entry(inode).and_modify(|node| node.stat = stat);
                self.alter(inode);
            }
        }
        Ok(())
    }

    /// Looks at a directory and at what is in it that isn't one.
    fn look(&self, directory: u64, thaw: Timestamp, mut looked: Looked) -> Looked {
        let nodes = &self.model.nodes;
        let Some(Node { body: Body::Directory(children), .. }) = nodes.get(&directory) else { return looked };
        let open = |inode: u64| nodes[&inode].handle.open(self.root.as_fd(), OFlags::PATH | OFlags::NOFOLLOW);
        let opened = open(directory).ok();
        let mut compare = |inode: u64, now: Option<Stat>| {
            // What is gone now was as it was read; names say whether it was still there.
            let (Some(node), Some(now)) = (nodes.get(&inode), now) else { return };
            let unloaded = self.unloaded.as_ref().filter(|unloaded| unloaded.knows(&node.handle));
            // What its loading does to its attributes doesn't count, and is put back.
            if unloaded.is_some_and(|unloaded| !unloaded.is_loaded(&node.handle).unwrap_or(false)) {
                return;
            }
            match compare(&node.stat, &now, thaw) {
                Now::Same(stat) if stat == node.stat => {}
                Now::Same(stat) => looked.changed.push((inode, stat)),
                Now::Changed => {}
                // It was loaded in between.
                Now::Missed if unloaded.is_some() => {}
                Now::Missed => looked.missed = Some(inode),
            }
        };
        compare(directory, opened.as_ref().and_then(|dir| Stat::of(dir).ok()));
        for Child { inode, name } in children {
            match nodes.get(inode) {
                None | Some(Node { body: Body::Directory(_), .. }) => continue,
                Some(_) => {}
            }
            // By its name, which takes a third of the time that it takes by its handle; if it has it still.
            let by_name = opened.as_ref().and_then(|dir| Stat::at(dir, name).ok());
            let now = by_name.filter(|now| now.inode == *inode);
            compare(*inode, now.or_else(|| Stat::of(&open(*inode).ok()?).ok()));
        }
        looked
    }

    fn count_names(&mut self) -> Result<(), SaveTreeError> {
        // With the archive they were counted, and it is gone if they have changed since.
        if self.pieces.is_none() {
            let names = self.model.count_names();
            self.names = names.map_err(|Broken(inode)| self.unreported(inode))?;
        }
        Ok(())
    }

    pub(super) fn unreported(&self, inode: u64) -> SaveTreeError {
        SaveTreeError::Unreported { path: PathName(self.model.path(inode)) }
    }

    /// Writes the tree as one archive, with ids as `ids` has them.
    pub fn write<W: Write>(&self, ids: &Ids, out: W) -> Result<(W, TreeSummary), SaveTreeError> {
        let mut saver = Saver::of_saved(ids, out);
        let written = self.model.walk(|visit| self.append(visit, &mut saver));
        written.map_err(|trouble| self.because(trouble))?;
        saver.finish()
    }

    /// Appends what a name stands for.
    pub(super) fn append<W: Write>(
        &self,
        Visit { name, depth, inode }: Visit<'_>,
        saver: &mut Saver<'_, W>,
    ) -> Result<(), Trouble> {
        let node = &self.model.nodes[&inode];
        let is_directory = matches!(node.body, Body::Directory(_));
        if self.gone.contains(&inode) || !is_directory && self.names.get(&inode) != Some(&node.stat.links) {
            return Err(Trouble::Inode(inode));
        }
        let content = match &node.body {
            Body::Directory(_) => Content::Directory,
            Body::File(contents) => Content::Saved(contents.extents.clone()),
            Body::Symlink(target) => Content::Symlink(target.clone()),
            Body::Other => Content::Node,
        };
        saver.save(name, depth, &node.stat, content, node.xattrs.clone()).map_err(Trouble::Save)
    }

    pub(super) fn because(&self, trouble: Trouble) -> SaveTreeError {
        match trouble {
            Trouble::Inode(inode) => self.unreported(inode),
            Trouble::Save(error) => error,
        }
    }

    /// Ranges of the pages file that nothing refers to any more, in no order. Forgets what has no name.
    pub fn superseded(&mut self) -> Vec<Range<u64>> {
        let (names, copier) = (&self.names, &mut self.copier);
        // Else all of them have names.
        if self.model.nodes.len() > names.len() {
            self.model.nodes.retain(|inode, node| {
                let named = names.contains_key(inode);
                if let Body::File(contents) = &node.body
                    && !named
                {
                    copier.drop_all(contents);
                }
                named
            });
        }
        std::mem::take(&mut copier.superseded)
    }

    /// Ranges of the pages file that the files' pages take, in no order.
    pub fn pages(&self) -> Vec<Range<u64>> {
        self.model.pages().collect()
    }

    /// Replaces each file's extents by what `relocate` makes of them.
    pub fn relocate(&mut self, relocate: impl Fn(&[PageExtent]) -> Vec<PageExtent>) {
        self.pieces = None;
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
    // Only what isn't reported is taken from now: whoever is in the midst of a change may have made it and not yet set the
    // ctime, as truncate(2) does with the size.
    let atime = if now.atime < thaw { now.atime } else { read.atime };
    Now::Same(Stat { atime, flags: now.flags, ctime: now.ctime, ..*read })
}

fn is_file(stat: &Stat) -> bool {
    stat.format() == libc::S_IFREG
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(sec: i64) -> Timestamp {
        Timestamp { sec, nsec: 0 }
    }

    #[test]
    fn a_change_that_is_being_made_after_the_thaw_is_not_in_the_image() {
        let read = Stat {
            inode: 7,
            size: 5000,
            mtime: time(10),
            atime: time(9),
            ctime: time(10),
            mode: libc::S_IFREG | 0o644,
            uid: 1,
            gid: 2,
            links: 1,
            flags: 0,
            device: (0, 0),
        };
        let thaw = time(20);
        // Its ctime is set last.
        let halfway =
            Stat { size: 1, mtime: time(21), mode: libc::S_IFREG, uid: 3, gid: 4, links: 2, ..read };
        assert_eq!(compare(&read, &halfway, thaw), Now::Same(read));
        let changed = Stat { ctime: time(21), ..halfway };
        assert_eq!(compare(&read, &changed, thaw), Now::Changed);
        let missed = Stat { ctime: time(19), ..halfway };
        assert_eq!(compare(&read, &missed, thaw), Now::Missed);
        // Nobody reports these.
        let unreported = Stat { atime: time(11), flags: 0x10, ctime: time(12), ..read };
        assert_eq!(compare(&read, &unreported, thaw), Now::Same(unreported));
        let looked = Stat { atime: time(22), ..read };
        assert_eq!(compare(&read, &looked, thaw), Now::Same(read));
    }
}
