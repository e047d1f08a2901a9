//! One of the threads that make names: what it does for each.
//!
//! A small file whose contents come at once is loaded by the thread that makes it ([`NewFiles`]), unless there are so many in its
//! directory that others would have nothing to do. Else it gets its name, owner and mode without being opened
//! ([`crate::small`]). Its mode comes out as it is asked for, so that nothing more is to be done, unless a default ACL or the
//! setgid bit of its directory has a say: the thread has a umask of its own, which takes no bits away.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use stillframe_pgalloc::{BatchLoader, FileBatch, LoadTarget, PageExtent};

use super::attributes::{on_host, set_node, set_open, set_times};
use super::names::{Made, Names, Task, failed};
use super::new_files::{Amend, Making, NewFile, NewFiles};
use super::{BuildError, Contents};
use crate::entry::{Attributes, Entry, Kind};
use crate::lazy::PendingFile;
use crate::small::{Batch, SmallFile, size_comes_first};
use crate::sys::handle::FileHandle;
use crate::xattr;

/// Files with fewer bytes of data are loaded by name where contents come at once.
const SMALL: u64 = 64 * 1024;
/// In a directory with more names, files are made by one thread and loaded by others.
const CROWDED: usize = 4_096;

/// See the module.
pub(super) struct Worker<'a> {
    names: &'a Names<'a>,
    making: Making,
    /// Small files that are to be given to the loader.
    batch: Batch,
    /// Small files that are to be made, where contents come at once.
    new: NewFiles,
    loader: Option<BatchLoader<'a>>,
    made: Made,
}

/// What is to be given to the loader now.
enum Ready {
    Nothing,
    Batch(Batch),
    Large(LoadTarget),
}

/// An open directory.
struct Directory<'d> {
    file: &'d File,
    handle: FileHandle,
    /// Whether what is made in it gets nothing from it but its place.
    plain: bool,
    /// Whether small files in it are loaded by other threads.
    crowded: bool,
}

impl<'a> Worker<'a> {
    /// Of the calling thread, which is used for nothing else.
    pub(super) fn new(names: &'a Names<'a>) -> Result<Self, BuildError> {
        // Its own umask, where it may have one.
        let exact = unshare(CloneFlags::CLONE_FS).is_ok();
        if exact {
            nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        }
        let me = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let loader = match names.contents {
            Contents::Now(load) => Some(load.batch_loader()),
            Contents::Later { .. } => None,
        };
        let loader = loader.transpose();
        let loader = loader.map_err(|source| BuildError::Load { path: names.tree.path(0), source })?;
        let on = names.root.try_clone().map_err(failed(names.tree, "open", 0))?;
        let (making, batch) = (Making { exact, me }, Batch::new(Arc::new(on)));
        Ok(Self { names, making, batch, new: NewFiles::default(), loader, made: Made::default() })
    }

    pub(super) fn finish(mut self) -> Result<Made, BuildError> {
        let batch = self.batch.take();
        if !batch.is_empty() {
            self.load(Ready::Batch(batch), self.names.tree.entries.len() - 1)?;
        }
        Ok(self.made)
    }

    /// Makes what is in a directory; gives the directories in it, and what is left of it if that has to wait.
    pub(super) fn make_directory(&mut self, task: Task) -> Result<(Vec<Task>, Option<Task>), BuildError> {
        let Names { root, tree, directories, .. } = self.names;
        let (index, handle) = (directories.indices[task.number], directories.handle(task.number));
        let open = failed(tree, "open", index);
        let file = handle.open(root.as_fd(), OFlags::DIRECTORY).map_err(&open)?;
        let plain = task.plain.map_or_else(|| is_plain(&file), Ok).map_err(&open)?;
        let children = directories.children(task.number);
        let directory = Directory { file: &file, handle, plain, crowded: children.len() > CROWDED };
        let (mut below, mut small, mut rest) = (Vec::new(), Vec::new(), None);
        for (done, index) in children.iter().copied().enumerate().skip(task.done) {
            if self.names.has_failed() {
                break;
            }
            let entry = &tree.entries[index];
            if self.is_loaded_here(&directory, entry) {
                self.push_new(&directory, index)?;
                continue;
            }
            // Names are made in their order.
            self.load_new(&file)?;
            if let Kind::HardLink { target } = entry.kind
                && !self.names.is_made(target)
            {
                rest = Some(Task { done, plain: Some(plain), waits_for: Some(target), ..task });
                break;
            }
            let made = if entry.kind == Kind::Directory {
                self.make_subdirectory(&directory, index).map(|task| {
                    below.push(task);
                    Ready::Nothing
                })
            } else {
                self.make_entry(&directory, index, &mut small)
            };
            let ready = made.map_err(failed(tree, "make", index))?;
            self.names.has_made(index);
            self.load(ready, index)?;
        }
        self.load_new(&file)?;
        if !small.is_empty() {
            self.made.small.push((handle, small));
        }
        Ok((below, rest))
    }

    /// Whether a small file is loaded by this thread, which then makes it.
    fn is_loaded_here(&self, directory: &Directory<'_>, entry: &Entry) -> bool {
        let Kind::File { size, extents } = &entry.kind else { return false };
        let here = self.loader.is_some() && !directory.crowded && !extents.is_empty();
        here && self.is_small(*size, extents, &entry.attributes)
    }

    fn push_new(&mut self, directory: &Directory<'_>, index: usize) -> Result<(), BuildError> {
        let entry = &self.names.tree.entries[index];
        let Kind::File { size, extents } = &entry.kind else { unreachable!("asked before") };
        let attributes = on_host(&entry.attributes, &self.names.options.ids);
        let amend = self.making.amend(directory.plain, &attributes);
        let new = NewFile::new(index, &attributes, amend);
        let file = SmallFile::new(&entry.name, *size, extents, attributes, 0);
        if self.new.push(new, file) { self.load_new(directory.file) } else { Ok(()) }
    }

    fn load_new(&mut self, directory: &File) -> Result<(), BuildError> {
        let Some(loader) = &mut self.loader else { return Ok(()) };
        self.made.handles.extend(self.new.load(self.names, directory, loader)?);
        Ok(())
    }

    fn load(&self, ready: Ready, index: usize) -> Result<(), BuildError> {
        let Contents::Now(loader) = self.names.contents else { return Ok(()) };
        let loaded = match ready {
            Ready::Nothing => Ok(()),
            Ready::Batch(batch) => loader.load_batch(Box::new(batch)),
            Ready::Large(target) => loader.load_ranges_into(vec![target]),
        };
        loaded.map_err(|source| BuildError::Load { path: self.names.tree.path(index), source })
    }

    fn make_subdirectory(&self, directory: &Directory<'_>, index: usize) -> io::Result<Task> {
        let Names { tree, directories, .. } = self.names;
        let name = tree.entries[index].name.as_slice();
        let plain = match rustix::fs::mkdirat(directory.file, name, Mode::RWXU) {
            Ok(()) => Some(directory.plain),
            // Only on a volume that somebody has made directories on: names are unique in a tree.
            Err(Errno::EXIST) => None,
            Err(error) => return Err(error.into()),
        };
        let number = directories.number(index);
        directories.found(number, FileHandle::of_name(directory.file.as_fd(), name)?);
        Ok(Task { number, done: 0, plain, waits_for: None })
    }

    fn make_entry(
        &mut self,
        directory: &Directory<'_>,
        index: usize,
        small: &mut Vec<SmallFile>,
    ) -> io::Result<Ready> {
        let entry = &self.names.tree.entries[index];
        let attributes = on_host(&entry.attributes, &self.names.options.ids);
        let (dir, name) = (directory.file, entry.name.as_slice());
        match &entry.kind {
            Kind::Directory => unreachable!("it has a function of its own"),
            Kind::File { size, extents } => {
                if !self.is_small(*size, extents, &attributes) {
                    return self.make_large(dir, index, (*size, extents), attributes);
                }
                self.make_small(directory, name, &attributes)?;
                let later = matches!(self.names.contents, Contents::Later { .. }) && !extents.is_empty();
                // Who has contents to come can't have flags before; and links are made before flags are set.
                if attributes.flags != 0 && !later {
                    self.made.handles.push((index, FileHandle::of_name(dir.as_fd(), name)?));
                }
                if extents.is_empty() {
                    set_times(dir, name, &attributes)?;
                    return Ok(Ready::Nothing);
                }
                let flags = if later { attributes.flags } else { 0 };
                let file = SmallFile::new(name, *size, extents, attributes, flags);
                if later {
                    small.push(file);
                    return Ok(Ready::Nothing);
                }
                return Ok(self.batch.push(directory.handle, file).map_or(Ready::Nothing, Ready::Batch));
            }
            Kind::HardLink { target } => {
                self.link(dir, entry, *target)?;
                return Ok(Ready::Nothing);
            }
            Kind::Symlink { target } => rustix::fs::symlinkat(target.as_slice(), dir, name)?,
            Kind::Fifo => mknod(dir, name, FileType::Fifo, 0, 0)?,
            Kind::Socket => mknod(dir, name, FileType::Socket, 0, 0)?,
            Kind::CharDevice { major, minor } => mknod(dir, name, FileType::CharacterDevice, *major, *minor)?,
            Kind::BlockDevice { major, minor } => mknod(dir, name, FileType::BlockDevice, *major, *minor)?,
        }
        let node = xattr::open_path(dir, name)?;
        set_node(dir, entry, &node, &attributes)?;
        Ok(Ready::Nothing)
    }

    /// Whether all that a file needs can be done by its name, but for what its loader does.
    fn is_small(&self, size: u64, extents: &[PageExtent], attributes: &Attributes) -> bool {
        if extents.is_empty() {
            return size == 0 && attributes.xattrs.is_empty();
        }
        let bytes = extents.iter().map(|extent| extent.length).sum::<u64>();
        match self.names.contents {
            Contents::Now(_) => bytes < SMALL,
            // Flags can be set only when it is loaded, and it can't be behind a gate.
            Contents::Later { large } => bytes < large || attributes.flags != 0,
        }
    }

    fn make_small(&self, directory: &Directory<'_>, name: &[u8], attributes: &Attributes) -> io::Result<()> {
        let dir = directory.file;
        let mode = Mode::from_raw_mode(attributes.mode);
        rustix::fs::mknodat(dir, name, FileType::RegularFile, mode, 0)?;
        let Amend { owner, mode } = self.making.amend(directory.plain, attributes);
        if let Some((uid, gid)) = owner {
            rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if let Some(mode) = mode {
            rustix::fs::chmodat(dir, name, mode, AtFlags::empty())?;
        }
        Ok(())
    }

    fn make_large(
        &mut self,
        dir: &File,
        index: usize,
        (size, extents): (u64, &[PageExtent]),
        attributes: Attributes,
    ) -> io::Result<Ready> {
        let entry = &self.names.tree.entries[index];
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // A default ACL may take bits away, and `set_open` gives them back.
        let mode = Mode::from_raw_mode(attributes.mode & 0o777) | Mode::RUSR | Mode::WUSR;
        let file = File::from(rustix::fs::openat(dir, entry.name.as_slice(), flags, mode)?);
        let later = matches!(self.names.contents, Contents::Later { .. }) && !extents.is_empty();
        if later || size_comes_first(size, extents) {
            rustix::fs::ftruncate(&file, size)?;
        }
        if later {
            let pending = PendingFile::new(&file, entry.parent, size, extents, &attributes)?;
            self.made.pending.push((index, pending));
            set_open(&file, &attributes)?;
            return Ok(Ready::Nothing);
        }
        if attributes.flags != 0 {
            self.made.handles.push((index, FileHandle::of(file.as_fd())?));
        }
        if extents.is_empty() {
            set_open(&file, &attributes)?;
            return Ok(Ready::Nothing);
        }
        Ok(Ready::Large(LoadTarget {
            on_loaded: Some(Box::new(move |file| set_open(file, &attributes))),
            ..LoadTarget::new(Arc::new(file), extents.to_vec())
        }))
    }

    /// Links to the first name of `target`, which is made.
    fn link(&self, dir: &File, entry: &Entry, target: usize) -> io::Result<()> {
        let Names { root, tree, directories, .. } = self.names;
        let first = &tree.entries[target];
        let elsewhere = if first.parent == entry.parent {
            None
        } else {
            let handle = directories.handle(directories.number(first.parent));
            Some(handle.open(root.as_fd(), OFlags::DIRECTORY)?)
        };
        let (old, new) = (first.name.as_slice(), entry.name.as_slice());
        Ok(rustix::fs::linkat(elsewhere.as_ref().unwrap_or(dir), old, dir, new, AtFlags::empty())?)
    }
}

/// Whether a directory that somebody else has made hands neither its group nor an ACL down.
fn is_plain(directory: &File) -> io::Result<bool> {
    if Mode::from_raw_mode(rustix::fs::fstat(directory)?.st_mode).contains(Mode::SGID) {
        return Ok(false);
    }
    match rustix::fs::fgetxattr(directory, "system.posix_acl_default", &mut [0; 1]) {
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(true),
        Ok(_) | Err(Errno::RANGE) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn mknod(parent: &File, name: &[u8], kind: FileType, major: u32, minor: u32) -> io::Result<()> {
    let mode = Mode::RUSR | Mode::WUSR;
    Ok(rustix::fs::mknodat(parent, name, kind, mode, rustix::fs::makedev(major, minor))?)
}
