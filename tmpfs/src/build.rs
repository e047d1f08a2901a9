//! Building a decoded tree on a fresh tmpfs: names and attributes at once, file contents by the loader.
//!
//! Precondition: the filesystem is empty and nobody else can reach it yet, so a failure needs no undo
//! but unmounting it. Parents are found by our own descriptors and file handles, never by a path, so
//! nothing in an image can lead elsewhere.
//!
//! Contents come at once ([`build_tree`]) or are left for later ([`build_names`], [`crate::lazy`]).
//!
//! Order: objects are made parents first; a file's pages, xattrs and times are set in that order by
//! the loader (writing drops `security.capability` and changes times); directories get their times last
//! of all, and inode flags after that, since an immutable inode takes nothing more.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use stillframe_pgalloc::{AsyncPagesFileLoad, LoadError, LoadTarget, PageExtent};

use crate::entry::{Attributes, Entry, KEPT_FLAGS, Kind, PathName, Timestamp, Tree};
use crate::huge::SmallPages;
pub use crate::huge::takes_huge_pages;
use crate::id_map::{IdMap, Ids, OVERFLOW_ID};
use crate::lazy::PendingFile;
use crate::mount::Usage;
use crate::sys::handle::FileHandle;
use crate::walk::OPEN_DIRECTORIES;
use crate::xattr::{self, Inode};

/// Files are given to the loader in batches of at most this many (each is an open descriptor) ...
const BATCH_FILES: usize = 128;
/// ... and of at most this many bytes.
const BATCH_BYTES: u64 = 1024 * 1024;
/// Size of the smallest folio of several pages, four of 4 KiB; smaller files have pages of the usual size only.
const SMALLEST_LARGE_FOLIO: u64 = 16 * 1024;

/// What the target allows.
#[derive(Clone, Debug, Default)]
pub struct BuildOptions {
    /// Mapping of the container's ids.
    pub ids: Ids,
    /// Whether the container could have made device nodes itself (CAP_MKNOD, no user namespace). The
    /// character device 0/0, a whiteout, is always allowed.
    pub devices: bool,
}

/// Why a tree couldn't be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The tree needs more memory than the filesystem has.
    #[error(
        "the saved tree holds {needed} bytes of pages, but the new filesystem's size= allows {limit} bytes; \
         give it a larger size="
    )]
    Size {
        /// Bytes of pages in the tree.
        needed: u64,
        /// Bytes that the filesystem may hold.
        limit: u64,
    },
    /// The tree has more objects than the filesystem may have.
    #[error(
        "the saved tree has {needed} inodes, but the new filesystem's nr_inodes= allows {limit}; \
         give it a larger nr_inodes="
    )]
    Inodes {
        /// Inodes that the tree takes.
        needed: u64,
        /// Inodes that the filesystem has left.
        limit: u64,
    },
    /// A device node that the container couldn't have made itself.
    #[error(
        "\"{path}\" is the device node {major}:{minor}, and the container has no CAP_MKNOD to make such; \
         give it the capability, or remove the node before saving"
    )]
    Device {
        /// Path in the filesystem.
        path: PathName,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// An owner isn't mapped in the container's user namespace.
    #[error("\"{path}\" belongs to the container's id {id}, which its user namespace doesn't map")]
    Unmapped {
        /// Path in the filesystem.
        path: PathName,
        /// The container's id.
        id: u32,
    },
    /// A call on an object failed.
    #[error("{operation} \"{path}\"")]
    Object {
        /// What was tried.
        operation: &'static str,
        /// Path in the filesystem.
        path: PathName,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Contents couldn't be loaded.
    #[error("load the pages of \"{path}\" and those before it")]
    Load {
        /// Path of a file of the batch.
        path: PathName,
        /// Why.
        #[source]
        source: LoadError,
    },
}

/// Judges whether `tree` fits a filesystem of which `usage` is known, before anything is touched.
pub fn check_tree(tree: &Tree, options: &BuildOptions, usage: &Usage) -> Result<(), BuildError> {
    let needed = tree.page_bytes(rustix::param::page_size() as u64);
    if let Some(limit) = usage.size_bytes.filter(|limit| needed > *limit) {
        return Err(BuildError::Size { needed, limit });
    }
    let needed = tree.inodes();
    // The root of the filesystem is one of its inodes, and is there already.
    let left = usage.inodes.map(|inodes| inodes.saturating_sub(usage.used_inodes.unwrap_or(1)));
    if let Some(limit) = left.filter(|limit| needed > *limit) {
        return Err(BuildError::Inodes { needed, limit });
    }
    for (index, entry) in tree.entries.iter().enumerate() {
        let (Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor }) = entry.kind else {
            continue;
        };
        let whiteout = matches!(entry.kind, Kind::CharDevice { major: 0, minor: 0 });
        if !options.devices && !whiteout {
            return Err(BuildError::Device { path: tree.path(index), major, minor });
        }
    }
    for (index, entry) in tree.entries.iter().enumerate() {
        let unmapped = |id| BuildError::Unmapped { path: tree.path(index), id };
        // Without its xattrs it is cheap to copy.
        let Attributes { mode, uid, gid, mtime, atime, flags, .. } = entry.attributes;
        let mut owner = Attributes { mode, uid, gid, mtime, atime, flags, xattrs: Vec::new() };
        if index == 0 {
            // The root's may belong to nobody, which need not be mapped.
            let ids = &options.ids;
            for (id, map) in [(&mut owner.uid, &ids.uid), (&mut owner.gid, &ids.gid)] {
                *id = if *id == OVERFLOW_ID { some_id(map) } else { *id };
            }
        }
        to_host(&mut owner, &options.ids).map_err(unmapped)?;
        if !entry.attributes.xattrs.is_empty() {
            to_host(&mut entry.attributes.clone(), &options.ids).map_err(unmapped)?;
        }
    }
    Ok(())
}

/// Builds `tree` on the empty filesystem whose root is `root` (open for reading, on a writable mount),
/// its contents through `loader`. Returns when all names exist; contents come until
/// [`AsyncPagesFileLoad::finish`], and [`Built::finish`] completes the attributes after that.
pub fn build_tree<'a>(
    root: &'a File,
    tree: &'a Tree,
    options: &'a BuildOptions,
    loader: &AsyncPagesFileLoad,
) -> Result<Built<'a>, BuildError> {
    let failed =
        |source| BuildError::Object { operation: "ask for the pages of", path: tree.path(0), source };
    let small_pages = SmallPages::if_needed(root, tree).map_err(failed)?;
    let mut builder = Builder::new(root, tree, options, Some(loader));
    builder.build()?;
    Ok(Built { root, tree, options, handles: builder.handles, _small_pages: small_pages })
}

/// Builds `tree` like [`build_tree`], with all attributes, but leaves the contents of its files out: those that have some
/// are returned in the order of the tree, sparse.
pub fn build_names(root: &File, tree: &Tree, options: &BuildOptions) -> Result<Vec<PendingFile>, BuildError> {
    let mut builder = Builder::new(root, tree, options, None);
    builder.build()?;
    let pending = std::mem::take(&mut builder.pending);
    Built { root, tree, options, handles: builder.handles, _small_pages: None }.finish()?;
    Ok(pending)
}

/// A built tree whose directories still lack their final times.
pub struct Built<'a> {
    root: &'a File,
    tree: &'a Tree,
    options: &'a BuildOptions,
    handles: Handles,
    /// Until the contents are there.
    _small_pages: Option<SmallPages>,
}

/// The file handles of directories, and of what has inode flags, by ascending index.
#[derive(Default)]
struct Handles(Vec<(usize, FileHandle)>);

impl Handles {
    fn push(&mut self, index: usize, file: &File) -> io::Result<()> {
        debug_assert!(self.0.last().is_none_or(|(last, _)| *last < index), "entries are made in their order");
        self.0.push((index, FileHandle::of(file.as_fd())?));
        Ok(())
    }

    fn of_directory(&self, index: usize) -> FileHandle {
        let at = self.0.binary_search_by_key(&index, |(index, _)| *index);
        self.0[at.expect("a parent is a directory that was made before")].1
    }
}

impl Built<'_> {
    /// Sets the directories' attributes and all inode flags; call it after the loader has finished.
    pub fn finish(self) -> Result<(), BuildError> {
        for flags in [false, true] {
            for (index, handle) in &self.handles.0 {
                let entry = &self.tree.entries[*index];
                self.finish_one(entry, handle, flags).map_err(|source| BuildError::Object {
                    operation: "set the attributes of",
                    path: self.tree.path(*index),
                    source,
                })?;
            }
        }
        Ok(())
    }

    fn finish_one(&self, entry: &Entry, handle: &FileHandle, flags: bool) -> io::Result<()> {
        let directory = entry.kind == Kind::Directory;
        if !flags && directory {
            let file = handle.open(self.root.as_fd(), OFlags::DIRECTORY)?;
            let attributes = if entry.name.is_empty() {
                root_on_host(&entry.attributes, &self.options.ids, &file)?
            } else {
                on_host(&entry.attributes, &self.options.ids)
            };
            set_open(&file, &attributes)?;
        } else if flags && entry.attributes.flags != 0 {
            let file = handle.open(self.root.as_fd(), OFlags::NONBLOCK)?;
            // Other flags are the filesystem's own: ext4 would convert a file that loses its extents flag.
            let own = rustix::fs::ioctl_getflags(&file)?.bits() & !KEPT_FLAGS;
            let flags = rustix::fs::IFlags::from_bits_retain(own | entry.attributes.flags);
            rustix::fs::ioctl_setflags(&file, flags)?;
        }
        Ok(())
    }
}

struct Builder<'a> {
    root: &'a File,
    tree: &'a Tree,
    options: &'a BuildOptions,
    /// None: contents are left for later.
    loader: Option<&'a AsyncPagesFileLoad>,
    handles: Handles,
    /// Directories that are open, innermost last.
    open: Vec<(usize, File)>,
    batch: Vec<LoadTarget>,
    batch_bytes: u64,
    pending: Vec<PendingFile>,
}

impl<'a> Builder<'a> {
    fn new(
        root: &'a File,
        tree: &'a Tree,
        options: &'a BuildOptions,
        loader: Option<&'a AsyncPagesFileLoad>,
    ) -> Self {
        Self {
            root,
            tree,
            options,
            loader,
            handles: Handles::default(),
            open: Vec::new(),
            batch: Vec::new(),
            batch_bytes: 0,
            pending: Vec::new(),
        }
    }

    fn build(&mut self) -> Result<(), BuildError> {
        for index in 0..self.tree.entries.len() {
            self.make(index)?;
        }
        self.flush(self.tree.entries.len().saturating_sub(1))
    }

    fn make(&mut self, index: usize) -> Result<(), BuildError> {
        let entry = &self.tree.entries[index];
        self.make_entry(index, entry).map_err(|source| BuildError::Object {
            operation: "make",
            path: self.tree.path(index),
            source,
        })?;
        if self.batch.len() >= BATCH_FILES || self.batch_bytes >= BATCH_BYTES {
            self.flush(index)?;
        }
        Ok(())
    }

    fn flush(&mut self, last: usize) -> Result<(), BuildError> {
        self.batch_bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        let Some(loader) = self.loader.filter(|_| !batch.is_empty()) else { return Ok(()) };
        let path = || self.tree.path(last);
        loader.load_ranges_into(batch).map_err(|source| BuildError::Load { path: path(), source })
    }

    fn make_entry(&mut self, index: usize, entry: &Entry) -> io::Result<()> {
        if index == 0 {
            let root =
                rustix::fs::openat(self.root, ".", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
            return self.opened_directory(0, File::from(root));
        }
        let attributes = on_host(&entry.attributes, &self.options.ids);
        let parent = self.directory(entry.parent)?;
        let name = entry.name.as_slice();
        match &entry.kind {
            Kind::Directory => {
                match rustix::fs::mkdirat(parent, name, Mode::RWXU) {
                    // Only on a volume that somebody has made directories on: names are unique in a tree.
                    Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = rustix::fs::openat(parent, name, flags, Mode::empty())?;
                return self.opened_directory(index, File::from(made));
            }
            Kind::File { size, extents } => {
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                // The umask may take bits away, and `set_open` gives them back.
                let mode = Mode::from_raw_mode(attributes.mode & 0o777) | Mode::RUSR | Mode::WUSR;
                let file = File::from(rustix::fs::openat(parent, name, flags, mode)?);
                // Writing the end sets the size too. Where a larger page might be allocated the size comes first:
                // with huge=within_size it decides about that (`shmem_huge_global_enabled`).
                let written = extents.last().and_then(PageExtent::file_end).unwrap_or(0);
                let later = self.loader.is_none() && !extents.is_empty();
                if *size != written || *size >= SMALLEST_LARGE_FOLIO || later {
                    rustix::fs::ftruncate(&file, *size)?;
                }
                if later {
                    // Its flags come with its contents.
                    self.pending.push(PendingFile::new(&file, entry.parent, *size, extents, &attributes)?);
                    return set_open(&file, &attributes);
                }
                if attributes.flags != 0 {
                    self.handles.push(index, &file)?;
                }
                if extents.is_empty() {
                    return set_open(&file, &attributes);
                }
                self.batch_bytes += extents.iter().map(|extent| extent.length).sum::<u64>();
                self.batch.push(LoadTarget {
                    on_loaded: Some(Box::new(move |file| set_open(file, &attributes))),
                    ..LoadTarget::new(Arc::new(file), extents.clone())
                });
                return Ok(());
            }
            Kind::HardLink { target } => {
                let (parent, target) = (parent.try_clone()?, *target);
                return self.link(&parent, name, target);
            }
            Kind::Symlink { target } => rustix::fs::symlinkat(target.as_slice(), parent, name)?,
            Kind::Fifo => mknod(parent, name, FileType::Fifo, 0, 0)?,
            Kind::Socket => mknod(parent, name, FileType::Socket, 0, 0)?,
            Kind::CharDevice { major, minor } => {
                mknod(parent, name, FileType::CharacterDevice, *major, *minor)?
            }
            Kind::BlockDevice { major, minor } => mknod(parent, name, FileType::BlockDevice, *major, *minor)?,
        }
        let node = xattr::open_path(parent, name)?;
        set_node(parent, entry, &node, &attributes)
    }

    fn opened_directory(&mut self, index: usize, dir: File) -> io::Result<()> {
        self.handles.push(index, &dir)?;
        if self.open.len() >= OPEN_DIRECTORIES {
            self.open.remove(0);
        }
        self.open.push((index, dir));
        Ok(())
    }

    /// The directory with that index, opened again if it was closed.
    fn directory(&mut self, index: usize) -> io::Result<&File> {
        match self.open.iter().rposition(|(open, _)| *open == index) {
            Some(at) => self.open.truncate(at + 1),
            None => {
                let dir = self.handles.of_directory(index).open(self.root.as_fd(), OFlags::DIRECTORY)?;
                self.open.clear();
                self.open.push((index, dir));
            }
        }
        Ok(&self.open.last().expect("found or pushed").1)
    }

    /// Links `name` in `parent` to the first name of `target`.
    fn link(&mut self, parent: &File, name: &[u8], target: usize) -> io::Result<()> {
        let first = &self.tree.entries[target];
        let (old_parent, old_name) = (first.parent, first.name.as_slice());
        let old = self.handles.of_directory(old_parent).open(self.root.as_fd(), OFlags::DIRECTORY)?;
        Ok(rustix::fs::linkat(&old, old_name, parent, name, AtFlags::empty())?)
    }
}

fn mknod(parent: &File, name: &[u8], kind: FileType, major: u32, minor: u32) -> io::Result<()> {
    let mode = Mode::RUSR | Mode::WUSR;
    Ok(rustix::fs::mknodat(parent, name, kind, mode, rustix::fs::makedev(major, minor))?)
}

/// Owner, mode, xattrs and times of an open file or directory, in the order in which none undoes
/// another: chown drops setuid and capabilities; an ACL must not be narrowed by a later chmod.
fn set_open(file: &File, attributes: &Attributes) -> io::Result<()> {
    // One call that asks costs less than two that change nothing.
    let now = rustix::fs::fstat(file)?;
    let chown = (now.st_uid, now.st_gid) != (attributes.uid, attributes.gid);
    if chown {
        let (uid, gid) = owner(attributes);
        rustix::fs::fchown(file, Some(uid), Some(gid))?;
    }
    if chown || now.st_mode & 0o7777 != attributes.mode {
        rustix::fs::fchmod(file, Mode::from_raw_mode(attributes.mode))?;
    }
    xattr::write(&Inode::Open(file), &attributes.xattrs)?;
    Ok(rustix::fs::futimens(file, &times(attributes))?)
}

/// The same for what can't be opened.
fn set_node(parent: &File, entry: &Entry, node: &File, attributes: &Attributes) -> io::Result<()> {
    let (uid, gid) = owner(attributes);
    let name = entry.name.as_slice();
    rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if !matches!(entry.kind, Kind::Symlink { .. }) {
        rustix::fs::chmodat(parent, name, Mode::from_raw_mode(attributes.mode), AtFlags::empty())?;
    }
    xattr::write(&Inode::PathOnly(node), &attributes.xattrs)?;
    Ok(rustix::fs::utimensat(parent, name, &times(attributes), AtFlags::SYMLINK_NOFOLLOW)?)
}

fn owner(attributes: &Attributes) -> (Uid, Gid) {
    (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid))
}

fn times(attributes: &Attributes) -> Timestamps {
    let time = |t: Timestamp| Timespec { tv_sec: t.sec, tv_nsec: t.nsec.into() };
    Timestamps { last_access: time(attributes.atime), last_modification: time(attributes.mtime) }
}

/// The attributes with the host's ids. [`check_tree`] has found all of them mapped.
fn on_host(attributes: &Attributes, ids: &Ids) -> Attributes {
    let mut attributes = attributes.clone();
    to_host(&mut attributes, ids).unwrap_or_else(|id| panic!("id {id} was not checked before building"));
    attributes
}

/// The same of the root. Where it belongs to nobody and somebody outside has made the new one, too, its owner stays.
fn root_on_host(attributes: &Attributes, ids: &Ids, root: &File) -> io::Result<Attributes> {
    let there = rustix::fs::fstat(root)?;
    let mut inside = attributes.clone();
    let kept = |id: &mut u32, map: &IdMap, there: u32| {
        let outside = map.to_container(there).is_none() || map.to_host(*id).is_none();
        let kept = (*id == OVERFLOW_ID && outside).then_some(there);
        *id = if kept.is_some() { some_id(map) } else { *id };
        kept
    };
    let uid = kept(&mut inside.uid, &ids.uid, there.st_uid);
    let gid = kept(&mut inside.gid, &ids.gid, there.st_gid);
    let outside = on_host(&inside, ids);
    Ok(Attributes { uid: uid.unwrap_or(outside.uid), gid: gid.unwrap_or(outside.gid), ..outside })
}

/// Any id that is mapped.
fn some_id(map: &IdMap) -> u32 {
    map.0.first().map_or(0, |mapping| mapping.container)
}

fn to_host(attributes: &mut Attributes, ids: &Ids) -> Result<(), u32> {
    attributes.uid = ids.uid.to_host(attributes.uid).ok_or(attributes.uid)?;
    attributes.gid = ids.gid.to_host(attributes.gid).ok_or(attributes.gid)?;
    attributes.xattrs.iter_mut().try_for_each(|xattr| xattr::translate(xattr, ids, IdMap::to_host))
}
