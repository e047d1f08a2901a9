//! Reading objects of a filesystem into the model, while it is in use or under the freeze.
//!
//! While it is in use, an object that has gone, or is something else now, is left out: that is reported, and its directory
//! is listed again. Under the freeze it means that somebody changes the filesystem who isn't frozen.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;
use stillframe_pgalloc::AsyncMemoryFileSave;

use crate::entry::{PathName, Xattr};
use crate::lazy::unloaded::UnloadedError;
use crate::live::contents::{Contents, CopyError, Original};
use crate::live::model::{Body, Child, Model, Node};
use crate::live::{DRAIN, Live, MOST, TRIES};
use crate::save::SaveTreeError;
use crate::stat::Stat;
use crate::sys::handle::FileHandle;
use crate::sys::lease::may_be_open_for_writing;
use crate::walk::{Listed, Walk};
use crate::xattr::{self, Inode};

/// A regular file that is to be read.
pub(super) enum Opened {
    /// Open for reading.
    File(File),
    /// With O_PATH: it may not be loaded, and opening it would be to wait for it.
    Path(File),
}

impl Live {
    /// Reads everything; what was read before only saves writing.
    pub(super) fn read_all(&mut self, memory: &AsyncMemoryFileSave<'_>) -> Result<(), SaveTreeError> {
        let mut old = std::mem::take(&mut self.model);
        self.pieces = None;
        self.suspects.clear();
        self.gone.clear();
        let root = self.root.try_clone().map_err(|source| self.failed("open", 0, source))?;
        let mut walk = Walk::new(&root);
        let mut directories: Vec<u64> = Vec::new();
        let mut count = 0;
        loop {
            let met = match walk.next() {
                None => break,
                Some(Ok(met)) => met,
                Some(Err(error)) if !self.frozen && has_vanished(&error) => continue,
                Some(Err(source)) => {
                    let path = PathName(walk.path().to_vec());
                    return Err(SaveTreeError::Object { operation: "walk to", path, source });
                }
            };
            count += 1;
            if count % DRAIN == 0 {
                self.drain();
                if self.model.nodes.len() > MOST && !self.frozen {
                    return Ok(());
                }
            }
            directories.truncate(met.depth);
            let read = match met.dir {
                Some(dir) => self.read_directory(dir).map(Some),
                None => {
                    let regular = met.listed == Listed::Regular;
                    self.read_named(met.parent, met.name, regular, &mut old, memory)
                }
            };
            let Some(inode) = read.map_err(|error| error.at(met.path))? else { continue };
            if met.depth == 0 {
                self.model.root = inode;
            }
            if let Some(Node { body: Body::Directory(names), .. }) =
                directories.last().and_then(|parent| self.model.nodes.get_mut(parent))
            {
                names.push(Child { inode, name: met.name.into() });
            }
            if met.dir.is_some() {
                directories.push(inode);
            }
        }
        for node in old.nodes.values() {
            if let Body::File(contents) = &node.body {
                self.copier.drop_all(contents);
            }
        }
        Ok(())
    }

    /// Lists a directory that is known, and reads what is new in it, and in directories that are new.
    pub(super) fn list(&mut self, inode: u64, memory: &AsyncMemoryFileSave<'_>) -> Result<(), SaveTreeError> {
        self.pieces = None;
        let mut to_list = vec![inode];
        while let Some(inode) = to_list.pop() {
            let handle = self.model.nodes[&inode].handle;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            let opened = handle.open(self.root.as_fd(), flags);
            // One that was removed can be opened still, but not listed.
            let (dir, listed) = match opened.and_then(|dir| names(&dir).map(|listed| (dir, listed))) {
                Ok(listed) => listed,
                Err(error) if has_vanished(&error) => {
                    self.gone.insert(inode);
                    continue;
                }
                Err(source) => return Err(self.failed("list", inode, source)),
            };
            let mut children = Vec::with_capacity(listed.len());
            for (child, kind, name) in listed.into_iter().rev() {
                if self.model.nodes.get(&child).is_some_and(|node| node.body.is(kind)) {
                    children.push(Child { inode: child, name });
                    continue;
                }
                let read = if kind == FileType::Directory {
                    match rustix::fs::openat(&dir, &*name, flags | OFlags::CLOEXEC, Mode::empty()) {
                        Ok(below) => self.read_directory(&File::from(below)).map(Some),
                        Err(errno) => self.vanished("open", errno.into()).map(|()| None),
                    }
                } else {
                    let regular = kind == FileType::RegularFile;
                    self.read_named(&dir, &name, regular, &mut Model::default(), memory)
                };
                let Some(child) = read.map_err(|error| error.at(&self.model.path(inode)))? else { continue };
                if kind == FileType::Directory {
                    to_list.push(child);
                }
                children.push(Child { inode: child, name });
            }
            let stat = Stat::of(&dir).map_err(|source| self.failed("stat", inode, source))?;
            let xattrs = xattr::read(&Inode::Open(&dir));
            let xattrs = xattrs.map_err(|source| self.failed("read the xattrs of", inode, source))?;
            let handle = self.model.nodes[&inode].handle;
            self.model.insert(Node { handle, stat, xattrs, body: Body::Directory(children), piece: 0 });
        }
        Ok(())
    }

    /// Reads an inode that is known again: its attributes, and its contents if `data`.
    pub(super) fn read_again(
        &mut self,
        inode: u64,
        data: bool,
        memory: &AsyncMemoryFileSave<'_>,
    ) -> Result<(), SaveTreeError> {
        let is_file = matches!(self.model.nodes[&inode].body, Body::File(_));
        if data && is_file {
            if let Some(file) = self.open(inode)? {
                self.read_file_again(inode, file, memory)?;
            }
            return Ok(());
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        let file = match self.model.nodes[&inode].handle.open(self.root.as_fd(), flags) {
            Ok(file) => file,
            Err(error) if has_vanished(&error) => {
                self.gone.insert(inode);
                return Ok(());
            }
            Err(source) => return Err(self.failed("open", inode, source)),
        };
        let (mut stat, mut xattrs) =
            attributes(&file, true).map_err(|(what, source)| self.failed(what, inode, source))?;
        if let Some(unloaded) = &self.unloaded {
            let handle = self.model.nodes[&inode].handle;
            let found = unloaded.find_handle(&handle, &mut stat, &mut xattrs);
            found.map_err(|source| {
                ReadError::Unloaded(UnloadedError::Ask(source)).at(&self.model.path(inode))
            })?;
        }
        let node = self.model.nodes.get_mut(&inode).expect("looked at above");
        (node.stat, node.xattrs) = (stat, xattrs);
        self.alter(inode);
        Ok(())
    }

    pub(super) fn read_file_again(
        &mut self,
        inode: u64,
        file: Opened,
        memory: &AsyncMemoryFileSave<'_>,
    ) -> Result<(), SaveTreeError> {
        let node = self.model.nodes.get_mut(&inode).expect("a file that is known is read again");
        let Body::File(contents) = &mut node.body else { return Ok(()) };
        let old = std::mem::take(contents);
        let read = self.read_file(file, &old, memory);
        let (stat, xattrs, contents) = read.map_err(|error| error.at(&self.model.path(inode)))?;
        let node = self.model.nodes.get_mut(&inode).expect("it is there");
        (node.stat, node.xattrs, node.body) = (stat, xattrs, Body::File(contents));
        self.alter(inode);
        Ok(())
    }

    /// Opens a file that is known for reading; `None` if it is gone.
    pub(super) fn open(&mut self, inode: u64) -> Result<Option<Opened>, SaveTreeError> {
        let Some(Node { handle, body: Body::File(_), .. }) = self.model.nodes.get(&inode) else {
            return Ok(None);
        };
        let is_loaded = match &self.unloaded {
            Some(unloaded) => unloaded.is_loaded(handle).map_err(|source| {
                ReadError::Unloaded(UnloadedError::Ask(source)).at(&self.model.path(inode))
            })?,
            None => true,
        };
        let flags = if is_loaded { READ } else { OFlags::PATH };
        match handle.open(self.root.as_fd(), flags | OFlags::NOFOLLOW) {
            Ok(file) if is_loaded => Ok(Some(Opened::File(file))),
            Ok(path) => Ok(Some(Opened::Path(path))),
            Err(error) if has_vanished(&error) => {
                self.gone.insert(inode);
                Ok(None)
            }
            Err(source) => Err(self.failed("open", inode, source)),
        }
    }

    fn read_directory(&mut self, dir: &File) -> Result<u64, ReadError> {
        let handle =
            FileHandle::of(dir.as_fd()).map_err(|source| ReadError::Call("find the handle of", source))?;
        let (stat, xattrs) = attributes(dir, false)?;
        self.model.insert(Node { handle, stat, xattrs, body: Body::Directory(Vec::new()), piece: 0 });
        Ok(stat.inode)
    }

    /// Reads an object that isn't a directory by its name; `None` if it isn't there any more. `old` is what may be known of
    /// it, for its contents' sake; `regular` is what its directory's listing said.
    fn read_named(
        &mut self,
        parent: &File,
        name: &[u8],
        regular: bool,
        old: &mut Model,
        memory: &AsyncMemoryFileSave<'_>,
    ) -> Result<Option<u64>, ReadError> {
        let kind = if regular && self.unloaded.is_none() { READ } else { OFlags::PATH };
        let flags = kind | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(parent, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(errno) => return self.vanished("open", errno.into()).map(|()| None),
        };
        let (mut stat, mut xattrs) = attributes(&file, kind == OFlags::PATH)?;
        // Since it was listed something else has got its name, which is reported.
        let is_regular = stat.format() == libc::S_IFREG;
        if regular != is_regular || stat.format() == libc::S_IFDIR {
            return self.vanished("open", Errno::ISDIR.into()).map(|()| None);
        }
        // A further name of what is known: if it has changed, that is reported.
        if self.model.nodes.contains_key(&stat.inode) {
            return Ok(Some(stat.inode));
        }
        let handle =
            FileHandle::of(file.as_fd()).map_err(|source| ReadError::Call("find the handle of", source))?;
        let body = match stat.format() {
            libc::S_IFREG => {
                let known = old.nodes.swap_remove(&stat.inode).and_then(|node| match node.body {
                    Body::File(contents) => Some(contents),
                    _ => None,
                });
                let unloaded = self.unloaded.as_ref();
                let file = if unloaded.is_some_and(|unloaded| unloaded.knows(&handle)) {
                    Opened::Path(file)
                } else if unloaded.is_some() {
                    match handle.open(self.root.as_fd(), READ | OFlags::NOFOLLOW) {
                        Ok(file) => Opened::File(file),
                        Err(error) => return self.vanished("open", error).map(|()| None),
                    }
                } else {
                    Opened::File(file)
                };
                let read = self.read_file(file, &known.unwrap_or_default(), memory)?;
                (stat, xattrs) = (read.0, read.1);
                Body::File(read.2)
            }
            libc::S_IFLNK => match rustix::fs::readlinkat(&file, "", Vec::new()) {
                Ok(target) => Body::Symlink(target.into_bytes()),
                Err(errno) => return self.vanished("read the target of", errno.into()).map(|()| None),
            },
            _ => Body::Other,
        };
        self.model.insert(Node { handle, stat, xattrs, body, piece: 0 });
        Ok(Some(stat.inode))
    }

    /// Reads a regular file, of which `old` was copied before.
    fn read_file(
        &mut self,
        file: Opened,
        old: &Contents,
        memory: &AsyncMemoryFileSave<'_>,
    ) -> Result<(Stat, Vec<Xattr>, Contents), ReadError> {
        let file = match file {
            Opened::File(file) => file,
            Opened::Path(path) => match self.read_unloaded(&path, old, memory)? {
                Some(read) => return Ok(read),
                None => {
                    let handle = FileHandle::of(path.as_fd());
                    let opened = handle.and_then(|handle| handle.open(self.root.as_fd(), READ));
                    opened.map_err(|source| ReadError::Call("open", source))?
                }
            },
        };
        let file = &file;
        // Asked before it is read: who opens it from here on is reported.
        let suspect = !self.frozen && may_be_open_for_writing(file);
        let mut contents = None;
        for _ in 0..TRIES {
            let (stat, xattrs) = attributes(file, false)?;
            let original = Original::File(file);
            let copied = self.copier.copy(original, stat.size, contents.as_ref().unwrap_or(old), memory)?;
            let now = Stat::of(file).map_err(|source| ReadError::Call("stat", source))?;
            // While it is in use that tells nothing: what happens after this is reported.
            if !self.frozen || (now.ctime, now.size) == (stat.ctime, stat.size) {
                if self.frozen {
                    self.settled.insert(stat.inode);
                } else if suspect {
                    self.suspects.insert(stat.inode);
                }
                return Ok((stat, xattrs, copied));
            }
            contents = Some(copied);
        }
        Err(ReadError::Changed)
    }

    /// Reads a file out of what it is loaded from; `None` if it is loaded.
    fn read_unloaded(
        &mut self,
        path: &File,
        old: &Contents,
        memory: &AsyncMemoryFileSave<'_>,
    ) -> Result<Option<(Stat, Vec<Xattr>, Contents)>, ReadError> {
        let Some(unloaded) = self.unloaded.clone() else { return Ok(None) };
        let (mut stat, mut xattrs) = attributes(path, true)?;
        let found = unloaded.find(path, &mut stat, &mut xattrs);
        let found = found.map_err(|source| ReadError::Unloaded(UnloadedError::Ask(source)))?;
        let Some(file) = found else { return Ok(None) };
        file.check(stat.size).map_err(ReadError::Unloaded)?;
        let copied = self.copier.copy(Original::Unloaded(file), stat.size, old, memory)?;
        if self.frozen {
            self.settled.insert(stat.inode);
        }
        Ok(Some((stat, xattrs, copied)))
    }

    /// What a name that can't be used means: something has changed, which is reported, if anybody can change anything.
    fn vanished(&self, operation: &'static str, error: io::Error) -> Result<(), ReadError> {
        match has_vanished(&error) {
            true if self.frozen => Err(ReadError::Changed),
            true => Ok(()),
            false => Err(ReadError::Call(operation, error)),
        }
    }

    fn failed(&self, operation: &'static str, inode: u64, source: io::Error) -> SaveTreeError {
        ReadError::Call(operation, source).at(&self.model.path(inode))
    }
}

/// Why an object couldn't be read, before it is known which.
enum ReadError {
    Call(&'static str, io::Error),
    Unloaded(UnloadedError),
    Pages(stillframe_pgalloc::SaveError),
    Changed,
}

impl ReadError {
    fn at(self, path: &[u8]) -> SaveTreeError {
        let path = PathName(path.to_vec());
        match self {
            Self::Call(operation, source) => SaveTreeError::Object { operation, path, source },
            Self::Unloaded(source) => SaveTreeError::Unloaded { path, source: Box::new(source) },
            Self::Pages(source) => SaveTreeError::Pages { path, source },
            Self::Changed => SaveTreeError::Changed { path },
        }
    }
}

impl From<(&'static str, io::Error)> for ReadError {
    fn from((operation, source): (&'static str, io::Error)) -> Self {
        Self::Call(operation, source)
    }
}

impl From<CopyError> for ReadError {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Read(source) => Self::Call("read", source),
            CopyError::Unloaded(source) => Self::Unloaded(source),
            CopyError::Pages(source) => Self::Pages(source),
        }
    }
}

/// How files are opened to be read.
const READ: OFlags = OFlags::RDONLY.union(OFlags::NONBLOCK);

/// What a call fails with on a name or an inode that was there and is gone, or is something else now.
fn has_vanished(error: &io::Error) -> bool {
    let gone = [Errno::NOENT, Errno::STALE, Errno::NOTDIR, Errno::ISDIR, Errno::LOOP, Errno::NXIO];
    error.raw_os_error().is_some_and(|errno| gone.contains(&Errno::from_raw_os_error(errno)))
}

/// Attributes and xattrs of what `file` has open, with O_PATH or not.
fn attributes(file: &File, path_only: bool) -> Result<(Stat, Vec<Xattr>), (&'static str, io::Error)> {
    let stat = Stat::of(file).map_err(|source| ("stat", source))?;
    let inode = if path_only { Inode::PathOnly(file) } else { Inode::Open(file) };
    Ok((stat, xattr::read(&inode).map_err(|source| ("read the xattrs of", source))?))
}

/// What a directory says of a name: inode number, type, and the name.
type Listing = (u64, FileType, Box<[u8]>);

/// The names of a directory, in the order in which tmpfs lists them: the newest first.
fn names(dir: &File) -> io::Result<Vec<Listing>> {
    let mut buffer = Vec::with_capacity(64 << 10);
    let mut listing = RawDir::new(dir, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(entry) = listing.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push((entry.ino(), entry.file_type(), name.into()));
        }
    }
    Ok(names)
}
