//! Small files that are made, loaded and closed one after the other by the thread that makes names: each is opened once.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{Gid, Mode, OFlags, Uid};
use stillframe_pgalloc::{BatchLoader, FileBatch, LoadError, PageExtent};

use super::BuildError;
use super::names::{Names, failed};
use crate::entry::Attributes;
use crate::small::{BATCH_BYTES, BATCH_FILES, SmallFile};
use crate::sys::handle::FileHandle;

/// How what is made comes out.
#[derive(Clone, Copy)]
pub(super) struct Making {
    /// Whether modes come out as they are asked for.
    pub(super) exact: bool,
    /// The owner of what is made.
    pub(super) me: (u32, u32),
}

/// What has to be done about owner and mode of a file that was made with that mode.
pub(super) struct Amend {
    pub(super) owner: Option<(Uid, Gid)>,
    pub(super) mode: Option<Mode>,
}

impl Making {
    /// `plain`: its directory has no say in it.
    pub(super) fn amend(&self, plain: bool, attributes: &Attributes) -> Amend {
        let mode = Mode::from_raw_mode(attributes.mode);
        let sure = plain && self.exact;
        let chown = !sure || (attributes.uid, attributes.gid) != self.me;
        // chown(2) takes setuid and setgid away.
        let chmod = !sure || chown && mode.intersects(Mode::SUID | Mode::SGID);
        let owner = || (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
        Amend { owner: chown.then(owner), mode: chmod.then_some(mode) }
    }
}

/// See the module. They are in one directory.
#[derive(Default)]
pub(super) struct NewFiles {
    files: Vec<(NewFile, SmallFile)>,
    bytes: u64,
}

/// How a file is made.
pub(super) struct NewFile {
    index: usize,
    mode: Mode,
    amend: Amend,
    flagged: bool,
}

impl NewFile {
    /// Entry `index` of the tree.
    pub(super) fn new(index: usize, attributes: &Attributes, amend: Amend) -> Self {
        let (mode, flagged) = (Mode::from_raw_mode(attributes.mode), attributes.flags != 0);
        Self { index, mode, amend, flagged }
    }
}

impl NewFiles {
    /// Adds a file; true if there are enough of them.
    pub(super) fn push(&mut self, new: NewFile, file: SmallFile) -> bool {
        self.bytes += file.bytes();
        self.files.push((new, file));
        self.files.len() >= BATCH_FILES || self.bytes >= BATCH_BYTES
    }

    /// Makes and loads them in `directory`; gives the handles of those that get inode flags at the end.
    pub(super) fn load(
        &mut self,
        names: &Names<'_>,
        directory: &File,
        loader: &mut BatchLoader<'_>,
    ) -> Result<Vec<(usize, FileHandle)>, BuildError> {
        let Some(last) = self.files.last() else { return Ok(Vec::new()) };
        let last = last.0.index;
        let files = std::mem::take(self).files;
        let mut batch = Batch { names, directory, files, at: last, handles: Vec::new() };
        match loader.load(&mut batch) {
            Ok(()) => Ok(batch.handles),
            Err(LoadError::Open { source }) => {
                Err(failed(names.tree, "make", batch.at)(io::Error::new(source.kind(), source)))
            }
            Err(source) => Err(BuildError::Load { path: names.tree.path(last), source }),
        }
    }
}

struct Batch<'a> {
    names: &'a Names<'a>,
    directory: &'a File,
    files: Vec<(NewFile, SmallFile)>,
    /// The entry that is being made.
    at: usize,
    handles: Vec<(usize, FileHandle)>,
}

impl FileBatch for Batch<'_> {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn extents(&self, index: usize) -> &[PageExtent] {
        self.files[index].1.extents()
    }

    fn open(&mut self, index: usize) -> io::Result<File> {
        let (NewFile { index, mode, amend, .. }, file) = &self.files[index];
        self.at = *index;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = File::from(rustix::fs::openat(self.directory, file.name(), flags, *mode)?);
        if let Some((uid, gid)) = amend.owner {
            rustix::fs::fchown(&made, Some(uid), Some(gid))?;
        }
        if let Some(mode) = amend.mode {
            rustix::fs::fchmod(&made, mode)?;
        }
        file.set_size(&made)?;
        Ok(made)
    }

    fn loaded(&mut self, index: usize, file: &File) -> io::Result<()> {
        let (new, small) = &self.files[index];
        small.complete(file)?;
        if new.flagged {
            self.handles.push((new.index, FileHandle::of(file.as_fd())?));
        }
        self.names.has_made(new.index);
        Ok(())
    }
}
