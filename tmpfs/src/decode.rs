//! Reading a filesystem's part of `tree.tar`. The archive is untrusted: everything is checked here,
//! before anything is built.
//!
//! What holds of a decoded [`Tree`]: it has a root directory and it comes first; each name is a single
//! component that exists once in its parent; parents are directories that came before; hard links
//! point to an earlier entry that is no directory; extents are page-aligned, ascending and inside the
//! file and the pages file. Memory is proportional to the archive. An error names the entry and its
//! offset in the archive.

use std::collections::HashMap;
use std::io::Read;

use stillframe_pgalloc::{ExtentError, validate_extents};
use tar::{Archive, EntryType, Header};

use crate::entry::{Attributes, Entry, KEPT_FLAGS, Kind, PathName, Tree, Xattr};
use crate::pax;
use crate::record::FileRecord;

/// Longest name of a directory entry (NAME_MAX).
const NAME_MAX: usize = 255;
/// Longest target of a symbolic link (PATH_MAX without its NUL).
const TARGET_MAX: usize = 4095;
/// An archive ends with two zero blocks.
const TRAILER: u64 = 1024;
const BLOCK: u64 = 512;

/// Why an archive isn't a tree.
#[derive(Debug, thiserror::Error)]
#[error("tree.tar: entry \"{entry}\" at offset {offset} of the archive: {fault}")]
pub struct TreeError {
    /// Name of the entry as the archive has it; empty where there is none yet.
    pub entry: PathName,
    /// Offset of its header in the archive, in bytes.
    pub offset: u64,
    /// What is wrong.
    #[source]
    pub fault: TreeFault,
}

/// What can be wrong with an entry.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum TreeFault {
    #[error("the tar header can't be read: {0}")]
    Tar(#[source] std::io::Error),
    #[error("the archive doesn't end with its trailer here: it is truncated or has bytes behind its end")]
    Trailer,
    #[error("the extended header isn't well-formed")]
    Pax,
    #[error("an entry of type {0:?}, which no image has")]
    Type(EntryType),
    #[error("the field {0} is out of range or not a number")]
    Field(&'static str),
    #[error(
        "a name must be relative and have no empty, \".\" or \"..\" component, no NUL, and at most 255 bytes in each"
    )]
    Name,
    #[error("the parent directory did not come before it")]
    Parent,
    #[error("the name exists already")]
    Duplicate,
    #[error("the first entry must be the root directory \"./\"")]
    Root,
    #[error("a symbolic link's target must have 1 to 4095 bytes and no NUL")]
    Target,
    #[error("a hard link to \"{0}\", which is no earlier file")]
    Link(PathName),
    #[error("the body isn't a file record")]
    Record,
    #[error("inode flags {0:#x}, of which some are never kept for this type of file")]
    Flags(u32),
    #[error("the xattr name \"{0}\" is empty, too long or given twice")]
    Xattr(PathName),
    #[error(transparent)]
    Extents(#[from] ExtentError),
}

/// Decodes one archive whose extents refer to a pages file of `pages_length` bytes.
pub fn decode_tree(archive: &[u8], pages_length: u64) -> Result<Tree, TreeError> {
    let mut decoder =
        Decoder { pages_length, tree: Tree::default(), names: HashMap::new(), path: Vec::new() };
    let mut reader = Archive::new(archive);
    let mut extended: Option<Vec<u8>> = None;
    let mut end = 0;
    let fail = |entry: &[u8], offset, fault| TreeError { entry: PathName(entry.to_vec()), offset, fault };
    let entries = reader.entries().map_err(|e| fail(b"", 0, TreeFault::Tar(e)))?;
    for entry in entries.raw(true) {
        let mut entry = entry.map_err(|e| fail(b"", end, TreeFault::Tar(e)))?;
        let offset = entry.raw_header_position();
        let mut body = Vec::new();
        let name = entry.header().path_bytes().into_owned();
        entry.read_to_end(&mut body).map_err(|e| fail(&name, offset, TreeFault::Tar(e)))?;
        // Both are at most the archive's length, or the body could not have been read.
        end = entry.raw_file_position() + (body.len() as u64).next_multiple_of(BLOCK);
        if body.len() as u64 != entry.size() {
            return Err(fail(&name, offset, TreeFault::Trailer));
        }
        let header = entry.header();
        if header.entry_type() == EntryType::XHeader {
            if extended.replace(body).is_some() {
                return Err(fail(&name, offset, TreeFault::Pax));
            }
            continue;
        }
        let records = extended.take().unwrap_or_default();
        let records = pax::parse(&records).ok_or_else(|| fail(&name, offset, TreeFault::Pax))?;
        let name = records.iter().find(|(key, _)| *key == b"path").map_or(name, |(_, value)| value.to_vec());
        decoder.add(header, &name, &records, &body).map_err(|fault| fail(&name, offset, fault))?;
    }
    let rest = usize::try_from(end).ok().and_then(|end| archive.get(end..)).unwrap_or_default();
    if extended.is_some() || rest.len() as u64 != TRAILER || rest.iter().any(|b| *b != 0) {
        return Err(fail(b"", end, TreeFault::Trailer));
    }
    if decoder.tree.entries.is_empty() {
        return Err(fail(b"", 0, TreeFault::Root));
    }
    Ok(decoder.tree)
}

struct Decoder {
    pages_length: u64,
    tree: Tree,
    /// (parent, name) of each entry to its index.
    names: HashMap<(usize, Vec<u8>), usize>,
    /// The directories from the root to the last entry's parent, as (name, index): the next entry's
    /// parent is nearly always among them.
    path: Vec<(Vec<u8>, usize)>,
}

impl Decoder {
    fn add(
        &mut self,
        header: &Header,
        name: &[u8],
        records: &[(&[u8], &[u8])],
        body: &[u8],
    ) -> Result<(), TreeFault> {
        let find = |key: &str| records.iter().find(|(k, _)| *k == key.as_bytes()).map(|(_, value)| *value);
        let index = self.tree.entries.len();
        let components = components(name)?;
        let (parent, name) = match components.split_last() {
            None if index == 0 => (0, Vec::new()),
            None => return Err(TreeFault::Duplicate),
            Some(_) if index == 0 => return Err(TreeFault::Root),
            Some((last, parents)) => (self.directory(parents).ok_or(TreeFault::Parent)?, last.to_vec()),
        };

        let linkname = || {
            find("linkpath")
                .map_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned(), <[u8]>::to_vec)
        };
        let mut attributes = decode_attributes(header, &find)?;
        let kind = match header.entry_type() {
            EntryType::Directory => Kind::Directory,
            EntryType::Regular => match find(pax::TYPE) {
                None => decode_file(body, self.pages_length, &mut attributes)?,
                Some(socket) if socket == pax::SOCKET.as_bytes() => Kind::Socket,
                Some(_) => return Err(TreeFault::Field(pax::TYPE)),
            },
            EntryType::Symlink => {
                let target = linkname();
                if target.is_empty() || target.len() > TARGET_MAX || target.contains(&0) {
                    return Err(TreeFault::Target);
                }
                Kind::Symlink { target }
            }
            EntryType::Fifo => Kind::Fifo,
            kind @ (EntryType::Char | EntryType::Block) => {
                let major = header.device_major().ok().flatten().filter(|n| *n < 1 << 12);
                let minor = header.device_minor().ok().flatten().filter(|n| *n < 1 << 20);
                let major = major.ok_or(TreeFault::Field("devmajor"))?;
                let minor = minor.ok_or(TreeFault::Field("devminor"))?;
                if kind == EntryType::Char {
                    Kind::CharDevice { major, minor }
                } else {
                    Kind::BlockDevice { major, minor }
                }
            }
            EntryType::Link => Kind::HardLink { target: self.link_target(&linkname())? },
            other => return Err(TreeFault::Type(other)),
        };
        if index == 0 && kind != Kind::Directory {
            return Err(TreeFault::Root);
        }
        if !matches!(kind, Kind::HardLink { .. }) {
            attributes.xattrs = decode_xattrs(records)?;
        } else {
            attributes = Attributes::default();
        }
        // Opening a device node to set flags would open the device; tmpfs keeps none on such anyway.
        let may_have = if matches!(kind, Kind::File { .. } | Kind::Directory) { KEPT_FLAGS } else { 0 };
        if attributes.flags & !may_have != 0 {
            return Err(TreeFault::Flags(attributes.flags));
        }
        if index != 0 && self.names.insert((parent, name.clone()), index).is_some() {
            return Err(TreeFault::Duplicate);
        }
        self.tree.entries.push(Entry { parent, name, kind, attributes });
        Ok(())
    }

    /// The directory at a path of components, if there is one.
    fn directory(&mut self, components: &[&[u8]]) -> Option<usize> {
        let same = self.path.iter().zip(components).take_while(|((name, _), part)| name == *part).count();
        self.path.truncate(same);
        for part in &components[same..] {
            let parent = self.path.last().map_or(0, |(_, index)| *index);
            let index = *self.names.get(&(parent, part.to_vec()))?;
            if self.tree.entries[index].kind != Kind::Directory {
                return None;
            }
            self.path.push((part.to_vec(), index));
        }
        Some(self.path.last().map_or(0, |(_, index)| *index))
    }

    fn link_target(&self, path: &[u8]) -> Result<usize, TreeFault> {
        let bad = || TreeFault::Link(PathName(path.to_vec()));
        let mut at = 0;
        let parts = components(path).map_err(|_| bad())?;
        for part in &parts {
            at = *self.names.get(&(at, part.to_vec())).ok_or_else(bad)?;
        }
        match self.tree.entries[at].kind {
            Kind::Directory => Err(bad()),
            Kind::HardLink { target } => Ok(target),
            _ => Ok(at),
        }
    }
}

/// The components of an archive's name: `./` has none, `./a/b` and `./a/b/` have two.
fn components(name: &[u8]) -> Result<Vec<&[u8]>, TreeFault> {
    let name = name.strip_prefix(b"./").ok_or(TreeFault::Name)?;
    let name = name.strip_suffix(b"/").unwrap_or(name);
    if name.is_empty() {
        return Ok(Vec::new());
    }
    let bad = |part: &&[u8]| {
        part.is_empty() || *part == b"." || *part == b".." || part.len() > NAME_MAX || part.contains(&0)
    };
    let parts: Vec<&[u8]> = name.split(|b| *b == b'/').collect();
    if parts.iter().any(bad) { Err(TreeFault::Name) } else { Ok(parts) }
}

fn decode_attributes<'a>(
    header: &Header,
    find: &impl Fn(&str) -> Option<&'a [u8]>,
) -> Result<Attributes, TreeFault> {
    let id = |key: &'static str, field: std::io::Result<u64>| {
        let id = match find(key) {
            Some(text) => pax::decimal(text),
            None => field.ok().and_then(|id| u32::try_from(id).ok()),
        };
        id.ok_or(TreeFault::Field(key))
    };
    let time = |key: &'static str| match find(key) {
        Some(text) => pax::parse_time(text).ok_or(TreeFault::Field(key)).map(Some),
        None => Ok(None),
    };
    let mode = header.mode().map_err(|_| TreeFault::Field("mode"))?;
    if mode & !0o7777 != 0 {
        return Err(TreeFault::Field("mode"));
    }
    let flags = match find(pax::FLAGS) {
        Some(text) => pax::decimal(text).ok_or(TreeFault::Field(pax::FLAGS))?,
        None => 0,
    };
    Ok(Attributes {
        mode,
        uid: id("uid", header.uid())?,
        gid: id("gid", header.gid())?,
        mtime: time("mtime")?.unwrap_or_default(),
        atime: time("atime")?.unwrap_or_default(),
        flags,
        xattrs: Vec::new(),
    })
}

fn decode_file(body: &[u8], pages_length: u64, attributes: &mut Attributes) -> Result<Kind, TreeFault> {
    let record = FileRecord::decode(body).ok_or(TreeFault::Record)?;
    if record.size > i64::MAX as u64 {
        return Err(TreeFault::Field("size"));
    }
    validate_extents(&record.extents, record.size, pages_length)?;
    attributes.mtime = record.mtime;
    attributes.atime = record.atime;
    attributes.flags = record.flags;
    Ok(Kind::File { size: record.size, extents: record.extents })
}

fn decode_xattrs(records: &[(&[u8], &[u8])]) -> Result<Vec<Xattr>, TreeFault> {
    let mut xattrs: Vec<Xattr> = records
        .iter()
        .filter_map(|(key, value)| {
            let name = key.strip_prefix(pax::XATTR.as_bytes())?;
            Some(Xattr { name: pax::xattr_name(name), value: value.to_vec() })
        })
        .collect();
    xattrs.sort();
    let bad = |name: &[u8]| name.is_empty() || name.len() > NAME_MAX || name.contains(&0);
    for (index, xattr) in xattrs.iter().enumerate() {
        if bad(&xattr.name) || xattrs[..index].last().is_some_and(|before| before.name == xattr.name) {
            return Err(TreeFault::Xattr(PathName(xattr.name.clone())));
        }
    }
    Ok(xattrs)
}

#[cfg(test)]
#[path = "decode_tests.rs"]
mod tests;
