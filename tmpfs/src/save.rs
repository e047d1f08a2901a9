//! Saving a filesystem: its tree into `tree.tar`, its pages into the pages file.
//!
//! Precondition: whoever can write to the filesystem is frozen. Give [`crate::mount::open_view`]'s
//! descriptor as the root, so that no access time changes and no mount of the guest's lies in the way.
//! Pages are written behind the walk by the pages file's own threads: the tree is complete when this
//! returns, the pages are when [`AsyncPagesFileSave::finish`] does.
//!
//! [`AsyncPagesFileSave::finish`]: stillframe_pgalloc::AsyncPagesFileSave::finish

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, Statx};
use stillframe_pgalloc::{AsyncMemoryFileSave, FileRange, PageExtent, SaveError};

use crate::encode::TreeWriter;
use crate::entry::{Attributes, Kind, PathName, Timestamp, Xattr};
use crate::id_map::{IdMap, Ids};
use crate::private;
use crate::walk::{Met, Walk};
use crate::xattr::{self, Inode};

/// What was saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TreeSummary {
    /// Regular files, hard links counted once.
    pub files: u64,
    /// Names of every kind, the root not counted.
    pub entries: u64,
    /// Sum of the sizes of the regular files, in bytes.
    pub logical_bytes: u64,
    /// Bytes of pages that hold data.
    pub data_bytes: u64,
}

/// Why a filesystem couldn't be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveTreeError {
    /// A call on an object failed.
    #[error("{operation} \"/{path}\"")]
    Object {
        /// What was tried.
        operation: &'static str,
        /// Path in the filesystem.
        path: PathName,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// An owner has no id in the container's user namespace.
    #[error("\"/{path}\" belongs to id {id} of the host, which the container's user namespace doesn't map")]
    Unmapped {
        /// Path in the filesystem.
        path: PathName,
        /// The host's id.
        id: u32,
    },
    /// Something wrote to the filesystem meanwhile.
    #[error(
        "\"/{path}\" changed while it was saved: a process outside the container writes to this filesystem"
    )]
    Changed {
        /// Path in the filesystem.
        path: PathName,
    },
    /// The pages of a file couldn't be saved.
    #[error("save the pages of \"/{path}\"")]
    Pages {
        /// Path in the filesystem.
        path: PathName,
        /// Why.
        #[source]
        source: SaveError,
    },
    /// `tree.tar` couldn't be written.
    #[error("write tree.tar")]
    Tree(#[source] io::Error),
}

/// Saves the filesystem whose root is `root` (open for reading), with ids as `ids` has them, its
/// regular files' pages through `memory` and its tree as one archive to `out`.
pub fn save_tree<W: Write>(
    root: &File,
    ids: &Ids,
    memory: &AsyncMemoryFileSave<'_>,
    out: W,
) -> Result<(W, TreeSummary), SaveTreeError> {
    save(root, ids, Contents::Memory(memory), out)
}

/// Saves the tree of a filesystem on a filestore, which is frozen; its extents are offsets in the filestore, whose
/// pages are saved as a whole ([`stillframe_pgalloc::MemoryFile::save_to`]).
pub fn save_private_tree<W: Write>(
    root: &File,
    ids: &Ids,
    out: W,
) -> Result<(W, TreeSummary), SaveTreeError> {
    save(root, ids, Contents::Private, out)
}

/// The archive of a filesystem's tree, without extents.
pub(crate) fn save_listing(root: &File, ids: &Ids) -> Result<Vec<u8>, SaveTreeError> {
    Ok(save(root, ids, Contents::LeftOut, Vec::new())?.0)
}

/// Where a regular file's contents are.
#[derive(Clone, Copy)]
enum Contents<'a> {
    /// In memory: they are saved one by one.
    Memory(&'a AsyncMemoryFileSave<'a>),
    /// In a filestore: only their places are.
    Private,
    /// Not asked for.
    LeftOut,
}

fn save<W: Write>(
    root: &File,
    ids: &Ids,
    contents: Contents<'_>,
    out: W,
) -> Result<(W, TreeSummary), SaveTreeError> {
    let mut writer = TreeWriter::new(out);
    let mut summary = TreeSummary::default();
    let mut first_names: HashMap<u64, Vec<u8>> = HashMap::new();
    let mut walk = Walk::new(root);
    loop {
        let met = match walk.next() {
            None => break,
            Some(Ok(met)) => met,
            Some(Err(source)) => {
                let path = PathName(walk.path().to_vec());
                return Err(SaveTreeError::Object { operation: "walk to", path, source });
            }
        };
        summary.entries += u64::from(!met.path.is_empty());
        if met.dir.is_none() && met.stat.stx_nlink > 1 {
            if let Some(first) = first_names.get(&met.stat.stx_ino) {
                let link = Kind::HardLink { target: 0 };
                writer.append(met.path, &link, &Attributes::default(), first).map_err(SaveTreeError::Tree)?;
                continue;
            }
            first_names.insert(met.stat.stx_ino, met.path.to_vec());
        }
        let (kind, xattrs) = Object { met: &met, contents }.read()?;
        if let Kind::File { size, extents } = &kind {
            summary.files += 1;
            summary.logical_bytes = summary.logical_bytes.saturating_add(*size);
            summary.data_bytes += extents.iter().map(|extent| extent.length).sum::<u64>();
        }
        let mut attributes = attributes(&met.stat);
        attributes.xattrs = xattrs;
        to_container(&mut attributes, ids)
            .map_err(|id| SaveTreeError::Unmapped { path: PathName(met.path.to_vec()), id })?;
        writer.append(met.path, &kind, &attributes, b"").map_err(SaveTreeError::Tree)?;
    }
    Ok((writer.finish().map_err(SaveTreeError::Tree)?, summary))
}

fn attributes(stat: &Statx) -> Attributes {
    let time = |t: &rustix::fs::StatxTimestamp| Timestamp { sec: t.tv_sec, nsec: t.tv_nsec };
    Attributes {
        mode: u32::from(stat.stx_mode) & 0o7777,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        mtime: time(&stat.stx_mtime),
        atime: time(&stat.stx_atime),
        // The STATX_ATTR_* of these flags have the FS_*_FL bits' values (linux/stat.h).
        flags: (stat.stx_attributes.bits() & u64::from(crate::entry::KEPT_FLAGS)) as u32,
        xattrs: Vec::new(),
    }
}

/// Translates the ids from the host's to the container's; `Err` is one that isn't mapped.
fn to_container(attributes: &mut Attributes, ids: &Ids) -> Result<(), u32> {
    attributes.uid = ids.uid.to_container(attributes.uid).ok_or(attributes.uid)?;
    attributes.gid = ids.gid.to_container(attributes.gid).ok_or(attributes.gid)?;
    attributes.xattrs.iter_mut().try_for_each(|xattr| xattr::translate(xattr, ids, IdMap::to_container))
}

/// One object on the walk, with what it takes to read it.
struct Object<'a> {
    met: &'a Met<'a>,
    contents: Contents<'a>,
}

impl Object<'_> {
    fn fail(&self, operation: &'static str) -> impl Fn(io::Error) -> SaveTreeError {
        let path = PathName(self.met.path.to_vec());
        move |source| SaveTreeError::Object { operation, path: path.clone(), source }
    }

    fn read(&self) -> Result<(Kind, Vec<Xattr>), SaveTreeError> {
        let stat = &self.met.stat;
        let read_xattrs = |inode: &Inode<'_>| xattr::read(inode).map_err(self.fail("read the xattrs of"));
        if let Some(dir) = self.met.dir {
            return Ok((Kind::Directory, read_xattrs(&Inode::Open(dir))?));
        }
        let format = u32::from(stat.stx_mode) & libc::S_IFMT;
        if format == libc::S_IFREG {
            let file = Arc::new(self.open_file()?);
            let xattrs = read_xattrs(&Inode::Open(&file))?;
            let extents = self.save_pages(&file, stat.stx_size)?;
            return Ok((Kind::File { size: stat.stx_size, extents }, xattrs));
        }
        let file = xattr::open_path(self.met.parent, &self.met.name).map_err(self.fail("open"))?;
        let xattrs = read_xattrs(&Inode::PathOnly(&file))?;
        let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
        let kind = match format {
            libc::S_IFLNK => {
                let target = rustix::fs::readlinkat(&file, "", Vec::new());
                let target = target.map_err(|e| self.fail("read the target of")(e.into()))?.into_bytes();
                Kind::Symlink { target }
            }
            libc::S_IFIFO => Kind::Fifo,
            libc::S_IFSOCK => Kind::Socket,
            libc::S_IFCHR => Kind::CharDevice { major, minor },
            libc::S_IFBLK => Kind::BlockDevice { major, minor },
            other => unreachable!("the kernel has no inode format {other:o}"),
        };
        Ok((kind, xattrs))
    }

    fn open_file(&self) -> Result<File, SaveTreeError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(self.met.parent, self.met.name.as_slice(), flags, Mode::empty());
        let file = File::from(opened.map_err(|e| self.fail("open")(e.into()))?);
        let now = rustix::fs::fstat(&file).map_err(|e| self.fail("stat")(e.into()))?;
        if now.st_ino != self.met.stat.stx_ino || now.st_size.unsigned_abs() != self.met.stat.stx_size {
            return Err(SaveTreeError::Changed { path: PathName(self.met.path.to_vec()) });
        }
        Ok(file)
    }

    /// The engine finds holes and zero pages by itself.
    fn save_pages(&self, file: &Arc<File>, size: u64) -> Result<Vec<PageExtent>, SaveTreeError> {
        if size == 0 {
            return Ok(Vec::new());
        }
        let memory = match self.contents {
            Contents::Memory(memory) => memory,
            Contents::Private => {
                return private::extents(file, size).map_err(self.fail("find the blocks of"));
            }
            Contents::LeftOut => return Ok(Vec::new()),
        };
        let whole = FileRange::new(0, size).expect("a file begins at 0");
        memory
            .write_range(file, whole)
            .map_err(|source| SaveTreeError::Pages { path: PathName(self.met.path.to_vec()), source })
    }
}
