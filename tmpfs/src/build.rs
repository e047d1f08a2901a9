//! Building a decoded tree on a fresh tmpfs: names and attributes at once, file contents by the loader.
//!
//! Precondition: the filesystem is empty and nobody else can reach it yet, so a failure needs no undo
//! but unmounting it. Parents are found by our own descriptors and file handles, never by a path, so
//! nothing in an image can lead elsewhere.
//!
//! Contents come at once ([`build_tree`]) or are left for later ([`build_names`], [`crate::lazy`]).
//!
//! Order: objects are made parents first, by several threads ([`names`]); a file's pages, xattrs and times are set in that
//! order by the loader (writing drops `security.capability` and changes times); directories get their times last
//! of all, and inode flags after that, since an immutable inode takes nothing more.

pub(crate) mod attributes;
mod names;
mod new_files;
mod worker;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::OFlags;
use stillframe_pgalloc::{AsyncPagesFileLoad, LoadError};

use crate::entry::{Attributes, Entry, Kind, PathName, Tree};
use crate::huge::SmallPages;
use crate::id_map::{Ids, OVERFLOW_ID};
use crate::lazy::PendingFile;
use crate::mount::Usage;
use crate::small::{SmallFiles, set_flags};
use crate::sys::handle::FileHandle;
use attributes::{on_host, root_on_host, set_open, some_id, to_host};
use names::Made;

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

/// Where contents come from, and when.
#[derive(Clone, Copy)]
enum Contents<'a> {
    Now(&'a AsyncPagesFileLoad),
    /// Files with at least `large` bytes of data can be loaded one by one, in any order.
    Later {
        large: u64,
    },
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
    let Made { handles, .. } = names::make(root, tree, options, Contents::Now(loader))?;
    Ok(Built { root, tree, options, handles, _small_pages: small_pages })
}

/// Builds `tree` like [`build_tree`], with all attributes, but leaves the contents of its files out. Those that have at least
/// `large` bytes of them have their size and are returned in the order of the tree; then those with fewer.
pub fn build_names(
    root: &File,
    tree: &Tree,
    options: &BuildOptions,
    large: u64,
) -> Result<(Vec<PendingFile>, SmallFiles), BuildError> {
    let Made { handles, pending, small } = names::make(root, tree, options, Contents::Later { large })?;
    Built { root, tree, options, handles, _small_pages: None }.finish()?;
    Ok((pending.into_iter().map(|(_, file)| file).collect(), SmallFiles::new(small)))
}

/// A built tree whose directories still lack their final times.
pub struct Built<'a> {
    root: &'a File,
    tree: &'a Tree,
    options: &'a BuildOptions,
    /// Of directories, and of what has inode flags, by ascending index.
    handles: Vec<(usize, FileHandle)>,
    /// Until the contents are there.
    _small_pages: Option<SmallPages>,
}

impl Built<'_> {
    /// Sets the directories' attributes and all inode flags; call it after the loader has finished.
    pub fn finish(self) -> Result<(), BuildError> {
        for flags in [false, true] {
            for (index, handle) in &self.handles {
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
            set_flags(&file, entry.attributes.flags)?;
        }
        Ok(())
    }
}
