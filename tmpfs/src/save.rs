//! Saving a filesystem: its tree into `tree.tar`, its pages into the pages file.
//!
//! Precondition: whoever can write to the filesystem is frozen. Give [`crate::mount::open_view`]'s
//! descriptor as the root, so that no access time changes and no mount of the guest's lies in the way.
//! Pages are written behind the walk by the pages file's own threads: the tree is complete when this
//! returns, the pages are when [`AsyncPagesFileSave::finish`] does.
//!
//! [`AsyncPagesFileSave::finish`]: stillframe_pgalloc::AsyncPagesFileSave::finish

use std::fs::File;
use std::io::{self, Write};
use std::ops::AddAssign;
use std::sync::Arc;

use stillframe_pgalloc::{AsyncMemoryFileSave, FileRange, PageExtent, SaveError};

use crate::encode::TreeWriter;
use crate::entry::{Attributes, Kind, PathName, Xattr};
use crate::first_names::{FirstNames, Named};
use crate::id_map::{IdMap, Ids, OVERFLOW_ID};
use crate::lazy::unloaded::{SaveUnloadedError, Unloaded, UnloadedError};
use crate::private;
use crate::scan::{Content, Object, scan};
use crate::stat::Stat;
use crate::xattr;

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
    /// Something changed of which the kernel had not told.
    #[error(
        "\"/{path}\" changed before the freeze, and the kernel didn't report it, so the image would be wrong: \
         copy nothing ahead of the freeze"
    )]
    Unreported {
        /// Path in the filesystem, or the number of its inode.
        path: PathName,
    },
    /// A file isn't loaded, and couldn't be taken from where it is loaded from.
    #[error("save \"/{path}\", which isn't loaded yet, out of the image that it is loaded from")]
    Unloaded {
        /// Path in the filesystem.
        path: PathName,
        /// Why.
        #[source]
        source: Box<UnloadedError>,
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
    /// There is no thread to be had.
    #[error("start a thread that walks the filesystem")]
    Thread(#[source] io::Error),
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
    save(root, ids, Source::Memory(memory, Contents::Still), None, out)
}

/// The same for a filesystem whose writers may be thawed meanwhile, if then all of it is thrown away: contents are
/// copied, and not read through mappings, of which a truncation would make a trap. `unloaded` has files that may not be loaded
/// yet.
pub fn save_moving_tree<W: Write>(
    root: &File,
    ids: &Ids,
    memory: &AsyncMemoryFileSave<'_>,
    unloaded: Option<&Unloaded>,
    out: W,
) -> Result<(W, TreeSummary), SaveTreeError> {
    save(root, ids, Source::Memory(memory, Contents::Moving), unloaded, out)
}

/// Saves the tree of a filesystem on a filestore, which is frozen; its extents are offsets in the filestore, whose
/// pages are saved as a whole ([`stillframe_pgalloc::MemoryFile::save_to`]).
pub fn save_private_tree<W: Write>(
    root: &File,
    ids: &Ids,
    out: W,
) -> Result<(W, TreeSummary), SaveTreeError> {
    save(root, ids, Source::Private, None, out)
}

/// The archive of a filesystem's tree, without extents.
pub(crate) fn save_listing(root: &File, ids: &Ids) -> Result<Vec<u8>, SaveTreeError> {
    Ok(save(root, ids, Source::LeftOut, None, Vec::new())?.0)
}

/// How files' contents may be read.
#[derive(Clone, Copy)]
enum Contents {
    /// Nothing changes until the pages are settled, so that they needn't be copied.
    Still,
    /// Whoever is frozen may be thawed while they are read, and what was read then is thrown away.
    Moving,
}

/// Where a regular file's contents are.
#[derive(Clone, Copy)]
enum Source<'a> {
    /// In memory: they are saved one by one.
    Memory(&'a AsyncMemoryFileSave<'a>, Contents),
    /// In a filestore: only their places are.
    Private,
    /// Not asked for.
    LeftOut,
}

fn save<W: Write>(
    root: &File,
    ids: &Ids,
    source: Source<'_>,
    unloaded: Option<&Unloaded>,
    out: W,
) -> Result<(W, TreeSummary), SaveTreeError> {
    std::thread::scope(|scope| {
        let mut saver = Saver::new(ids, source, out);
        for batch in scan(scope, root, unloaded)? {
            for (name, Object { depth, stat, content, xattrs, .. }) in batch?.objects() {
                saver.save(name, depth, &stat, content, xattrs)?;
            }
        }
        saver.finish()
    })
}

/// Writes a tree's objects to an archive, in the order of a walk.
pub(crate) struct Saver<'a, W> {
    ids: &'a Ids,
    source: Source<'a>,
    writer: TreeWriter<W>,
    summary: TreeSummary,
    first_names: FirstNames,
    position: Position,
}

/// Where a walk is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Position {
    /// The last object's path.
    path: Vec<u8>,
    /// The directories that it is in, and itself if it is one, from the root on: the length of its path, its number.
    directories: Vec<(usize, usize)>,
    /// The number of the next object, the root's being 0.
    next: usize,
}

impl<'a, W: Write> Saver<'a, W> {
    /// One for objects whose contents are saved already.
    pub(crate) fn of_saved(ids: &'a Ids, out: W) -> Self {
        Self::new(ids, Source::LeftOut, out)
    }

    fn new(ids: &'a Ids, source: Source<'a>, out: W) -> Self {
        Self {
            ids,
            source,
            writer: TreeWriter::new(out),
            summary: TreeSummary::default(),
            first_names: FirstNames::default(),
            position: Position::default(),
        }
    }

    /// One that goes on from there, and hasn't met any first name.
    pub(crate) fn resume(ids: &'a Ids, out: W, position: Position) -> Self {
        Self { position, ..Self::of_saved(ids, out) }
    }

    /// Where it is.
    pub(crate) fn position(&self) -> Position {
        self.position.clone()
    }

    /// Where it writes to, and what was written since this was taken.
    pub(crate) fn written(&mut self) -> (&mut W, &mut TreeSummary) {
        (self.writer.out(), &mut self.summary)
    }

    pub(crate) fn finish(self) -> Result<(W, TreeSummary), SaveTreeError> {
        Ok((self.writer.finish().map_err(SaveTreeError::Tree)?, self.summary))
    }

    /// The next object, which is in `depth` directories.
    pub(crate) fn save(
        &mut self,
        name: &[u8],
        depth: usize,
        stat: &Stat,
        content: Content<'_>,
        xattrs: Vec<Xattr>,
    ) -> Result<(), SaveTreeError> {
        self.summary.entries += u64::from(depth > 0);
        let Position { path, directories, next } = &mut self.position;
        let index = *next;
        *next += 1;
        directories.truncate(depth);
        let &(length, parent) = directories.last().unwrap_or(&(0, 0));
        path.truncate(length);
        if length > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        if matches!(content, Content::Directory) {
            directories.push((path.len(), index));
        }
        let path = path.as_slice();
        if stat.links > 1 && !matches!(content, Content::Directory) {
            match self.first_names.meet(stat.inode, stat.links, index, path) {
                Named::First => {}
                Named::Again { index, path: first } => {
                    let link = Kind::HardLink { target: index };
                    let appended = self.writer.append(path, parent, &link, &Attributes::default(), &first);
                    return appended.map_err(SaveTreeError::Tree);
                }
            }
        }
        let (major, minor) = stat.device;
        let kind = match content {
            Content::Directory => Kind::Directory,
            Content::File(file) => {
                let extents = save_pages(self.source, path, &file, stat.size)?;
                self.summary.count(stat.size, extents)
            }
            Content::Unloaded(file) => {
                let path = || PathName(path.to_vec());
                let checked = file.check(stat.size).map_err(SaveUnloadedError::from);
                let extents = match (self.source, checked) {
                    (Source::Memory(memory, _), Ok(())) => file.save(memory),
                    (_, checked) => checked.map(|()| Vec::new()),
                };
                let extents = extents.map_err(|error| match error {
                    SaveUnloadedError::Unloaded(source) => {
                        SaveTreeError::Unloaded { path: path(), source: Box::new(source) }
                    }
                    SaveUnloadedError::Pages(source) => SaveTreeError::Pages { path: path(), source },
                })?;
                self.summary.count(stat.size, extents)
            }
            Content::Saved(extents) => self.summary.count(stat.size, extents),
            Content::Symlink(target) => Kind::Symlink { target },
            Content::Node => match stat.format() {
                libc::S_IFIFO => Kind::Fifo,
                libc::S_IFSOCK => Kind::Socket,
                libc::S_IFCHR => Kind::CharDevice { major, minor },
                libc::S_IFBLK => Kind::BlockDevice { major, minor },
                other => unreachable!("the kernel has no inode format {other:o}"),
            },
        };
        let mut attributes = Attributes { xattrs, ..stat.attributes() };
        // A volume's root was made by somebody outside, whom the container sees as nobody.
        let unmapped = path.is_empty().then_some(OVERFLOW_ID);
        to_container(&mut attributes, self.ids, unmapped)
            .map_err(|id| SaveTreeError::Unmapped { path: PathName(path.to_vec()), id })?;
        self.writer.append(path, parent, &kind, &attributes, b"").map_err(SaveTreeError::Tree)
    }
}

/// Has a file's pages saved; the engine finds holes and zero pages by itself.
fn save_pages(
    source: Source<'_>,
    path: &[u8],
    file: &Arc<File>,
    size: u64,
) -> Result<Vec<PageExtent>, SaveTreeError> {
    if size == 0 {
        return Ok(Vec::new());
    }
    let path = || PathName(path.to_vec());
    let (memory, contents) = match source {
        Source::Memory(memory, contents) => (memory, contents),
        Source::Private => {
            let operation = "find the blocks of";
            let failed = |source| SaveTreeError::Object { operation, path: path(), source };
            return private::extents(file, size).map_err(failed);
        }
        Source::LeftOut => return Ok(Vec::new()),
    };
    let whole = FileRange::new(0, size).expect("a file begins at 0");
    let saved = match contents {
        Contents::Still => memory.write_range(file, whole),
        Contents::Moving => memory.write_live_range(file, whole),
    };
    saved.map_err(|source| match source {
        SaveError::Truncated { .. } => SaveTreeError::Changed { path: path() },
        source => SaveTreeError::Pages { path: path(), source },
    })
}

fn bytes(extents: &[PageExtent]) -> u64 {
    extents.iter().map(|extent| extent.length).sum()
}

impl AddAssign for TreeSummary {
    fn add_assign(&mut self, other: Self) {
        self.files += other.files;
        self.entries += other.entries;
        self.logical_bytes = self.logical_bytes.saturating_add(other.logical_bytes);
        self.data_bytes += other.data_bytes;
    }
}

impl TreeSummary {
    /// Counts a regular file.
    fn count(&mut self, size: u64, extents: Vec<PageExtent>) -> Kind {
        self.files += 1;
        self.logical_bytes = self.logical_bytes.saturating_add(size);
        self.data_bytes += bytes(&extents);
        Kind::File { size, extents }
    }
}

/// Translates the ids from the host's to the container's. An owner that isn't mapped is `unmapped`, if that is given; `Err` is any
/// other id that isn't mapped.
fn to_container(attributes: &mut Attributes, ids: &Ids, unmapped: Option<u32>) -> Result<(), u32> {
    attributes.uid = ids.uid.to_container(attributes.uid).or(unmapped).ok_or(attributes.uid)?;
    attributes.gid = ids.gid.to_container(attributes.gid).or(unmapped).ok_or(attributes.gid)?;
    attributes.xattrs.iter_mut().try_for_each(|xattr| xattr::translate(xattr, ids, IdMap::to_container))
}
