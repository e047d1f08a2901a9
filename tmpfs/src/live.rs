//! Saving a filesystem while it is in use: nearly everything is read while its processes run, and under the freeze only what
//! has changed since.
//!
//! ```text
//! begin (watch) -> copy (all of it) -> round, round ... (what changed) | frozen: settle (what changed) | thawed: verify -> write
//!                                          (-> prepare the archive)
//! ```
//!
//! From `copy` on the whole tree is in memory ([`model`]): names, attributes, xattrs, and where each file's pages are in the
//! pages file. What changes after it was read is reported ([`watch`]) and read again, so that what `settle` leaves is the
//! filesystem at the instant of the freeze. The rules, measured on Linux 6.18:
//!
//! - Watching begins before anything is read. Events come after what they tell of, and before the system call returns:
//!   under the freeze they are complete.
//! - **Mappings.** Stores through a mapping are reported by nothing. A writable mapping needs a file that is open for writing,
//!   and that can be asked for ([`lease`]), wherever the descriptor is. So a file is a *suspect* if it was open for writing
//!   when it was copied, or was opened since (FAN_OPEN); and a suspect that is open for writing under the freeze is
//!   compared with its copy. One that isn't any more was closed, which is reported (FAN_CLOSE_WRITE), and copied again.
//!   That goes for a file that a loop device writes to, too: the device has it open for writing.
//! - **Inode flags and access times** aren't reported either. They are asked for once more after the thaw (`verify`): what has
//!   the same ctime, or one from before the thaw, is now as it was under the freeze. Not seen are changes of flags on
//!   an inode that is changed once more between the thaw and `verify`, or within the kernel's tick before the thaw (4 ms at 250 Hz);
//!   then the image has the older flags; and one that is in the midst of being made when it is asked for may be in the image. The
//!   same goes for the access time.
//! - `verify` also finds what changed before the thaw without having been read: an error, since the image would be wrong.
//!   It can't find stores through mappings.
//! - Lost events, or any that can't be understood, are a [`Doubt`]: then everything is read again, under the freeze.
//!
//! Directories are listed again as a whole: tmpfs's order of names can't be told from events.
//!
//! [`lease`]: crate::sys::lease

mod contents;
mod model;
mod pieces;
mod read;
mod verify;
mod watch;

pub use pieces::Compressed;
pub use verify::coarse_now;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread::Builder;

use stillframe_pgalloc::AsyncMemoryFileSave;

use crate::lazy::unloaded::Unloaded;
use crate::live::contents::Copier;
use crate::live::model::Model;
use crate::live::pieces::Pieces;
use crate::live::read::Opened;
use crate::live::watch::{Doubt, Reported, Watch};
use crate::save::SaveTreeError;
use crate::sys::lease::may_be_open_for_writing;

/// A file that changes while it is copied under the freeze is copied so often.
const TRIES: u32 = 10;
/// Objects after which the first copy takes what was reported meanwhile, so that the kernel's queue stays short.
const DRAIN: usize = 1024;
/// Most inodes that are kept in memory, which takes some 2 GB.
const MOST: usize = 4_000_000;

/// A filesystem that is being saved while it is in use; see the module.
#[derive(Debug)]
pub struct Live {
    /// A view of the filesystem, through which nothing changes.
    root: File,
    /// `None` once everything is read.
    watch: Option<Watch>,
    reported: Reported,
    model: Model,
    copier: Copier,
    suspects: HashSet<u64>,
    /// Inodes that were changed under the freeze or just before, and are no more.
    gone: HashSet<u64>,
    /// How many names each inode has that has any; once `verify` has counted them.
    names: HashMap<u64, u32>,
    /// The archive, as far as it was made before the freeze.
    pieces: Option<Pieces>,
    frozen: bool,
    /// Files whose contents were read under the freeze.
    settled: HashSet<u64>,
    doubt: Option<Doubt>,
    /// Files that may not be loaded yet.
    unloaded: Option<Arc<Unloaded>>,
}

impl Live {
    /// Begins to watch the filesystem of `root`, a descriptor of [`crate::mount::open_view`]'s. `unloaded` has files that may not
    /// be loaded yet: they are taken from where they are loaded from.
    ///
    /// # Errors
    ///
    /// The kernel can't: no fanotify, or none that reports handles (Linux 5.9).
    pub fn begin(root: &File, unloaded: Option<Unloaded>) -> io::Result<Self> {
        let root = root.try_clone()?;
        let watch = Some(Watch::begin(&root, unloaded.is_some())?);
        Ok(Self {
            root,
            watch,
            reported: Reported::default(),
            model: Model::default(),
            copier: Copier::default(),
            suspects: HashSet::new(),
            gone: HashSet::new(),
            names: HashMap::new(),
            pieces: None,
            frozen: false,
            settled: HashSet::new(),
            doubt: None,
            unloaded: unloaded.map(Arc::new),
        })
    }

    /// Reads everything for the first time. False if that is more than is kept in memory: then it is to be saved in
    /// another way.
    pub fn copy(&mut self, memory: &AsyncMemoryFileSave<'_>) -> Result<bool, SaveTreeError> {
        self.read_all(memory)?;
        Ok(self.model.nodes.len() <= MOST)
    }

    /// Reads what has changed since the last call; how many objects those were.
    pub fn round(&mut self, memory: &AsyncMemoryFileSave<'_>) -> Result<usize, SaveTreeError> {
        if self.doubt.is_some() || !self.drain() {
            return Ok(0);
        }
        let changed = self.reread(memory)?;
        self.check_suspects(memory)?;
        Ok(changed)
    }

    /// Reads what has changed since the last round, while everybody who can write to the filesystem is frozen.
    pub fn settle(&mut self, memory: &AsyncMemoryFileSave<'_>) -> Result<(), SaveTreeError> {
        self.frozen = true;
        loop {
            let changed = self.drain();
            if let Some(doubt) = self.doubt.take() {
                tracing::warn!(%doubt, "everything is read again under the freeze");
                return self.read_all(memory);
            }
            if !changed && self.suspects.is_empty() {
                return Ok(());
            }
            self.reread(memory)?;
            self.check_suspects(memory)?;
        }
    }

    /// Ends it; what takes long to be freed is freed by a thread of its own.
    pub fn discard(self) {
        let memory = (self.model, self.pieces, self.names);
        // Where there is no thread to be had, it is freed at once.
        let _ = Builder::new().name("discard".into()).spawn(move || drop(memory));
    }

    /// Bytes that were written to the pages file so far.
    pub fn written(&self) -> u64 {
        self.copier.written
    }

    /// Takes what was reported; whether anything was.
    fn drain(&mut self) -> bool {
        let watch = self.watch.as_mut().expect("nothing is read after the thaw");
        match watch.drain(&mut self.reported, self.unloaded.as_deref()) {
            Ok(any) => any || !self.reported.is_empty(),
            Err(doubt) => {
                self.doubt = Some(doubt);
                false
            }
        }
    }

    /// Reads again what was reported: directories first, so that what has a name is known. How many objects.
    fn reread(&mut self, memory: &AsyncMemoryFileSave<'_>) -> Result<usize, SaveTreeError> {
        let Reported { directories, data, attributes, opened } = std::mem::take(&mut self.reported);
        let changed = directories.len() + data.len() + attributes.difference(&data).count();
        for handle in &directories {
            if let Some(inode) = self.model.handles.get(handle).copied() {
                self.list(inode, memory)?;
            }
        }
        // A handle that isn't known is of something that has no name, or was read with its directory just now.
        for handle in attributes.difference(&data) {
            if let Some(inode) = self.model.handles.get(handle).copied() {
                self.read_again(inode, false, memory)?;
            }
        }
        for handle in &data {
            if let Some(inode) = self.model.handles.get(handle).copied() {
                self.read_again(inode, true, memory)?;
            }
        }
        self.suspects.extend(opened.iter().filter_map(|handle| self.model.handles.get(handle)));
        Ok(changed)
    }

    /// Compares the suspects that are open for writing with their copies; the others are none any more.
    fn check_suspects(&mut self, memory: &AsyncMemoryFileSave<'_>) -> Result<(), SaveTreeError> {
        for inode in std::mem::take(&mut self.suspects) {
            if self.settled.contains(&inode) {
                continue;
            }
            // While it is in use, reading it makes it a suspect again.
            let Some(Opened::File(file)) = self.open(inode)? else { continue };
            if may_be_open_for_writing(&file) {
                self.read_file_again(inode, Opened::File(file), memory)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use stillframe_pgalloc::{AsyncPagesFileSave, MemoryFile, PAGE_SIZE, SaveOptions};

    use super::*;
    use crate::decode::decode_tree;
    use crate::id_map::Ids;

    #[test]
    fn in_doubt_everything_is_read_again_and_what_differs_is_written() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("dir")).unwrap();
        std::fs::write(path("dir/large"), vec![1; 1 << 20]).unwrap();
        std::fs::write(path("gone"), vec![2; 1000]).unwrap();
        let pages = tempfile::tempfile().unwrap();
        let save = AsyncPagesFileSave::new(pages, SaveOptions::default()).unwrap();
        let main = MemoryFile::main();
        let memory = save.register_memory_file(&main).unwrap();
        let mut live = Live::begin(&File::open(dir.path()).unwrap(), None).unwrap();
        assert!(live.copy(&memory).unwrap());
        let copied = live.written();

        std::fs::rename(path("dir/large"), path("moved")).unwrap();
        let moved = File::options().write(true).open(path("moved")).unwrap();
        moved.write_all_at(&[3], 500_000).unwrap();
        drop(moved);
        std::fs::remove_file(path("gone")).unwrap();
        std::fs::write(path("new"), vec![4; 5000]).unwrap();
        // All of it is lost.
        live.drain();
        live.reported = Reported::default();
        live.doubt = Some(Doubt::Overflow);
        assert_eq!(live.round(&memory).unwrap(), 0, "nothing is done until the freeze");
        live.settle(&memory).unwrap();
        assert_eq!(live.written() - copied, PAGE_SIZE + 5000);
        live.verify(coarse_now()).unwrap();
        assert_eq!(live.superseded().iter().map(|range| range.end - range.start).sum::<u64>(), 2 * PAGE_SIZE);

        let (archive, _) = live.write(&Ids::default(), Vec::new()).unwrap();
        let tree = decode_tree(&archive, save.finish().unwrap().length).unwrap();
        let paths: Vec<String> = (1..tree.entries.len()).map(|index| tree.path(index).to_string()).collect();
        assert_eq!(paths, ["/dir", "/moved", "/new"]);
    }
}
