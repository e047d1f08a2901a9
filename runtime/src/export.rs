//! Exporting: one filesystem of an image as an ordinary tar archive, with the files' contents in it.
//!
//! PAX, as GNU tar writes it with `--format=posix --xattrs --acls --sparse`: times with nanoseconds, ids beyond seven
//! octal digits and long names are records; a file with holes is sparse in GNU's format 1.0 (its map, then its data).
//! Inode flags are `SCHILY.fflags`, which bsdtar restores. What tar has no way to say: sockets, which are
//! left out with a warning as tar does, and with them their further names.
//!
//! Names are those of the tree, `./a/b`, of any bytes, up to [`LONGEST_PATH`]; where they are longer than PATH_MAX, few tars
//! can make them. A longer one is refused before anything is written: an archive has each path in full, so that a deep
//! tree would become as large as its depth squared. Contents are verified against the image's digests before they are written, a window of [`WINDOW`] bytes at a
//! time; besides it, memory holds the decoded tree and one file's map. What fails leaves an archive without an end.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use stillframe_pgalloc::{CHUNK_SIZE, DigestTable, PageExtent};
use stillframe_tmpfs::archive::{self, BLOCK, Member, Records, TRAILER};
use stillframe_tmpfs::encode::push_xattr;
use stillframe_tmpfs::entry::{Attributes, Entry, Kind, PathName, Tree};
use stillframe_tmpfs::pax::format_time;
use stillframe_tmpfs::private::{self, PrivateError};
use stillframe_tmpfs::{ResourceId, private::translate};

use crate::image::{Image, ImageError};
use crate::selector::Selector;

/// Bytes that are read and verified at once: whole chunks.
const WINDOW: u64 = 1 << 20;
/// Directory that GNU tar puts before the name of a sparse member, for tars that don't know such.
const SPARSE_DIRECTORY: &[u8] = b"./GNUSparseFile.0/";
/// Bytes of a name that a header holds.
const NAME_FIELD: usize = 100;
/// Most bytes of a path.
const LONGEST_PATH: usize = 1 << 20;
/// Inode flags (linux/fs.h) and what libarchive calls them.
const FLAGS: [(u32, &str); 3] = [(0x20, "sappnd"), (0x10, "schg"), (0x40, "nodump")];

/// Why a filesystem couldn't be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The image has several filesystems, and an archive holds one.
    #[error("which filesystem? Give one of them by --path: {there}")]
    Several {
        /// Those that were to choose from.
        there: String,
    },
    /// The image has no such filesystem.
    #[error("the image has no filesystem \"{selector}\"; it has: {there}")]
    NoMatch {
        /// What was asked for.
        selector: String,
        /// What there is.
        there: String,
    },
    /// The image holds no filesystem at all.
    #[error("the image holds no filesystem")]
    Empty,
    /// The image can't be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The filesystem was on disk, and its tree doesn't agree with its private file.
    #[error("the filesystem {id}")]
    Private {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: PrivateError,
    },
    /// A path is too long.
    #[error(
        "\"{name}\" lies so deep that its path has {length} bytes; an archive has the path of each file in full, and \
         those of this image can have up to {longest}: restore it instead"
    )]
    TooDeep {
        /// The last component of the path.
        name: PathName,
        /// Bytes of the path.
        length: usize,
        /// Most bytes of one.
        longest: usize,
    },
    /// Binary data is nothing to print.
    #[error("the archive isn't written to a terminal: give -o FILE, or pipe it to tar")]
    Terminal,
    /// The file to write to couldn't be made.
    #[error("make {path}")]
    Make {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The archive couldn't be written.
    #[error("write the archive")]
    Write(#[source] io::Error),
}

/// What is told on the way.
pub trait Progress {
    /// So many bytes of contents are to come.
    fn begin(&mut self, bytes: u64);
    /// So many more have been written.
    fn advance(&mut self, bytes: u64);
    /// A socket, which is left out.
    fn left_out(&mut self, path: &PathName);
}

/// The number of the one filesystem of the image that `selector` selects, or of the only one there is.
pub fn choose(image: &Image, selector: Option<&Selector>) -> Result<usize, ExportError> {
    let filesystems = &image.manifest.filesystems;
    let fits = |index: &usize| {
        let filesystem = &filesystems[*index];
        let mut ids = std::iter::once(&filesystem.resource_id).chain(&filesystem.aliases);
        selector.is_none_or(|selector| ids.any(|id| selector.matches(id)))
    };
    let list = |indices: &[usize]| {
        let ids: Vec<String> =
            indices.iter().map(|index| filesystems[*index].resource_id.to_string()).collect();
        ids.join(" ")
    };
    let all: Vec<usize> = (0..filesystems.len()).collect();
    let chosen: Vec<usize> = all.iter().copied().filter(fits).collect();
    match (chosen.as_slice(), selector) {
        ([one], _) => Ok(*one),
        ([], Some(_)) if all.is_empty() => Err(ExportError::Empty),
        ([], Some(selector)) => {
            Err(ExportError::NoMatch { selector: selector.to_string(), there: list(&all) })
        }
        ([], None) => Err(ExportError::Empty),
        (several, _) => Err(ExportError::Several { there: list(several) }),
    }
}

/// Writes filesystem number `index` of `image` to `out` as an archive.
pub fn export(
    image: &Image,
    index: usize,
    out: &mut impl Write,
    progress: &mut impl Progress,
) -> Result<(), ExportError> {
    let mut tree = image.decode_tree(index)?;
    judge_paths(&tree)?;
    if let Some(private) = image.private_file(index) {
        let id = &image.manifest.filesystems[index].resource_id;
        let failed = |source| ExportError::Private { id: id.clone(), source };
        private::judge(&tree, private).map_err(failed)?;
        tree = translate(tree, private).map_err(failed)?;
    }
    let bytes = tree.entries.iter().flat_map(extents).map(|extent| extent.length);
    progress.begin(bytes.fold(0, u64::saturating_add));
    let pages = Pages::new(image);
    let mut exporter =
        Exporter { tree: &tree, pages, out, progress, block: Vec::new(), records: Records::default() };
    (0..tree.entries.len()).try_for_each(|index| exporter.entry(index))?;
    exporter.out.write_all(&TRAILER).and_then(|()| exporter.out.flush()).map_err(ExportError::Write)
}

fn judge_paths(tree: &Tree) -> Result<(), ExportError> {
    let mut lengths: Vec<usize> = Vec::with_capacity(tree.entries.len());
    for entry in &tree.entries {
        let length = lengths.get(entry.parent).map_or(1, |parent| parent + 1 + entry.name.len());
        if length > LONGEST_PATH {
            let name = PathName(entry.name.clone());
            return Err(ExportError::TooDeep { name, length, longest: LONGEST_PATH });
        }
        lengths.push(length);
    }
    Ok(())
}

fn extents(entry: &Entry) -> &[PageExtent] {
    if let Kind::File { extents, .. } = &entry.kind { extents } else { &[] }
}

struct Exporter<'a, W, P> {
    tree: &'a Tree,
    pages: Pages<'a>,
    out: &'a mut W,
    progress: &'a mut P,
    /// What is written next of a header; kept for its memory.
    block: Vec<u8>,
    records: Records,
}

impl<W: Write, P: Progress> Exporter<'_, W, P> {
    fn entry(&mut self, index: usize) -> Result<(), ExportError> {
        let entry = &self.tree.entries[index];
        // An inode is told of at its first name; a link's own attributes mean nothing to tar.
        let inode =
            if let Kind::HardLink { target } = entry.kind { &self.tree.entries[target] } else { entry };
        if inode.kind == Kind::Socket {
            self.progress.left_out(&self.tree.path(index));
            return Ok(());
        }
        let name = self.name(index);
        let attributes = &inode.attributes;
        self.records.clear();
        self.block.clear();
        let mut member = Member {
            kind: b'0',
            name: &name,
            linkname: &[],
            mode: attributes.mode,
            uid: attributes.uid,
            gid: attributes.gid,
            size: 0,
            mtime: attributes.mtime,
            device: (0, 0),
        };
        let link;
        match &entry.kind {
            Kind::File { size, extents } => return self.file(&name, attributes, *size, extents),
            Kind::Directory => member.kind = b'5',
            Kind::Symlink { target } => (member.kind, member.linkname) = (b'2', target),
            Kind::CharDevice { major, minor } => (member.kind, member.device) = (b'3', (*major, *minor)),
            Kind::BlockDevice { major, minor } => (member.kind, member.device) = (b'4', (*major, *minor)),
            Kind::Fifo => member.kind = b'6',
            Kind::HardLink { target } => {
                link = self.name(*target);
                (member.kind, member.linkname) = (b'1', &link);
            }
            Kind::Socket => unreachable!("left out above"),
        }
        if member.kind != b'1' {
            push_attributes(&mut self.records, attributes);
        }
        archive::append_headers(&mut self.block, &member, &mut self.records);
        self.out.write_all(&self.block).map_err(ExportError::Write)
    }

    /// The name of an entry in the archive.
    fn name(&self, index: usize) -> Vec<u8> {
        let mut name = self.tree.path(index).0;
        name.insert(0, b'.');
        if self.tree.entries[index].kind == Kind::Directory && index != 0 {
            name.push(b'/');
        }
        name
    }

    fn file(
        &mut self,
        name: &[u8],
        attributes: &Attributes,
        size: u64,
        extents: &[PageExtent],
    ) -> Result<(), ExportError> {
        let data: u64 = extents.iter().map(|extent| extent.length).sum();
        let mut member = Member {
            kind: b'0',
            name,
            linkname: &[],
            mode: attributes.mode,
            uid: attributes.uid,
            gid: attributes.gid,
            size,
            mtime: attributes.mtime,
            device: (0, 0),
        };
        let mut map = Vec::new();
        let short;
        // Extents don't overlap: if they are as long as the file, they cover it.
        if data != size {
            map = sparse_map(size, extents);
            member.size = map.len() as u64 + data;
            short = sparse_name(name);
            member.name = &short;
            self.records.push(&[b"GNU.sparse.major"], b"1");
            self.records.push(&[b"GNU.sparse.minor"], b"0");
            self.records.push(&[b"GNU.sparse.name"], name);
            self.records.push(&[b"GNU.sparse.realsize"], size.to_string().as_bytes());
        }
        push_attributes(&mut self.records, attributes);
        archive::append_headers(&mut self.block, &member, &mut self.records);
        self.block.extend_from_slice(&map);
        self.out.write_all(&self.block).map_err(ExportError::Write)?;
        for extent in extents {
            self.data(extent)?;
        }
        self.block.clear();
        archive::pad(&mut self.block, data);
        self.out.write_all(&self.block).map_err(ExportError::Write)
    }

    fn data(&mut self, extent: &PageExtent) -> Result<(), ExportError> {
        let (mut at, end) = (extent.pages_offset.0, extent.pages_offset.0 + extent.length);
        while at < end {
            let bytes = self.pages.at(at, end)?;
            self.out.write_all(bytes).map_err(ExportError::Write)?;
            at += bytes.len() as u64;
            self.progress.advance(bytes.len() as u64);
        }
        Ok(())
    }
}

/// The records that every inode has.
fn push_attributes(records: &mut Records, attributes: &Attributes) {
    records.push(&[b"mtime"], format_time(attributes.mtime).as_bytes());
    records.push(&[b"atime"], format_time(attributes.atime).as_bytes());
    if attributes.flags != 0 {
        let flags = FLAGS.iter().filter(|(flag, _)| attributes.flags & flag != 0).map(|(_, name)| *name);
        records.push(&[b"SCHILY.fflags"], flags.collect::<Vec<_>>().join(",").as_bytes());
    }
    attributes.xattrs.iter().for_each(|xattr| push_xattr(records, xattr));
}

/// A sparse member's name for a tar that doesn't know such: short enough to need no record.
fn sparse_name(name: &[u8]) -> Vec<u8> {
    let base = name.rsplit(|b| *b == b'/').next().unwrap_or(name);
    [SPARSE_DIRECTORY, &base[..base.len().min(NAME_FIELD - SPARSE_DIRECTORY.len())]].concat()
}

/// Number of pieces, then offset and length of each, a line a number, filled up to whole blocks. A hole at the end
/// is a last piece without bytes.
fn sparse_map(size: u64, extents: &[PageExtent]) -> Vec<u8> {
    let mut pieces: Vec<(u64, u64)> = Vec::new();
    for extent in extents {
        match pieces.last_mut() {
            Some((offset, length)) if *offset + *length == extent.file_offset => *length += extent.length,
            _ => pieces.push((extent.file_offset, extent.length)),
        }
    }
    if pieces.last().is_none_or(|(offset, length)| offset + length < size) {
        pieces.push((size, 0));
    }
    let mut map = format!("{}\n", pieces.len()).into_bytes();
    for (offset, length) in pieces {
        writeln!(map, "{offset}\n{length}").expect("a Vec takes everything");
    }
    map.resize(map.len().next_multiple_of(BLOCK), 0);
    map
}

/// Reads the pages file, a verified window at a time.
struct Pages<'a> {
    file: &'a File,
    digests: &'a DigestTable,
    path: PathBuf,
    window: Vec<u8>,
    /// Where in the pages file the window is.
    start: u64,
}

impl<'a> Pages<'a> {
    fn new(image: &'a Image) -> Self {
        let path = image.pages_path().to_owned();
        Self { file: &image.pages, digests: &image.meta.digests, path, window: Vec::new(), start: 0 }
    }

    /// Bytes from `offset` on: up to `end`, at least one.
    fn at(&mut self, offset: u64, end: u64) -> Result<&[u8], ExportError> {
        let held = self.start..self.start + self.window.len() as u64;
        if !held.contains(&offset) {
            self.read(offset)?;
        }
        let from = (offset - self.start) as usize;
        let to = self.window.len().min((end - self.start) as usize);
        Ok(&self.window[from..to])
    }

    fn read(&mut self, offset: u64) -> Result<(), ExportError> {
        let start = offset / CHUNK_SIZE * CHUNK_SIZE;
        let end = (start + WINDOW).min(self.digests.pages_length());
        self.start = start;
        self.window.resize((end - start) as usize, 0);
        if let Err(source) = self.file.read_exact_at(&mut self.window, start) {
            self.window.clear();
            return Err(ImageError::File { operation: "read", path: self.path.clone(), source }.into());
        }
        // Chunk by chunk, for the error to name the one that is damaged.
        let chunks = (start..end).step_by(CHUNK_SIZE as usize).zip(self.window.chunks(CHUNK_SIZE as usize));
        for (start, chunk) in chunks {
            if self.digests.verify(start, chunk).is_err() {
                let end = start + chunk.len() as u64;
                return Err(ImageError::Damaged { path: self.path.clone(), start, end }.into());
            }
        }
        Ok(())
    }
}
