//! Reading a filesystem's part of `tree.tar`. The archive is untrusted: everything is checked here,
//! before anything is built.
//!
//! What holds of a decoded [`Tree`]: it has a root directory and it comes first; each name is a single
//! component that exists once in its parent; parents are directories that came before; hard links
//! point to an earlier entry that is no directory; extents are page-aligned, ascending and inside the
//! file and the pages file. Memory is proportional to the archive, which isn't kept itself. An error names the entry and its
//! offset in the archive.

use std::borrow::Cow;
use std::hash::{BuildHasher, RandomState};
use std::io;

use hashbrown::{HashTable, hash_table};
use stillframe_pgalloc::{ExtentError, validate_extents};
use tar::{EntryType, Header};

use crate::acl::{self, AclError};
use crate::archive::BLOCK;
use crate::entry::{Attributes, Entry, KEPT_FLAGS, Kind, PathName, Tree, Xattr};
use crate::member_name::{self, MemberName};
pub use crate::members::ArchiveSource;
use crate::members::{Member, Members};
use crate::pax;
use crate::record::FileRecord;

/// Longest name of a directory entry (NAME_MAX).
const NAME_MAX: usize = 255;
/// Room is made for so many entries at most before they are there.
const EXPECTED_MAX: u64 = 1 << 20;
/// Longest target of a symbolic link (PATH_MAX without its NUL).
const TARGET_MAX: usize = 4095;

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
    #[error("the tar header's checksum is wrong: the header is damaged")]
    Checksum,
    #[error("its body reaches behind the end of the archive")]
    Truncated,
    #[error("the archive doesn't end with its trailer here: it is truncated or has bytes behind its end")]
    Trailer,
    #[error("the extended header isn't well-formed")]
    Pax,
    #[error("an entry of type {0:?}, which no image has")]
    Type(EntryType),
    #[error("the field {0} is out of range or not a number")]
    Field(&'static str),
    #[error(
        "a name must be \"./\" and a path, or \"@\", a number, \"/\" and a component; components aren't empty, \".\" or \"..\", \
         and have no NUL and at most 255 bytes"
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
    #[error("the POSIX ACL {key}: {source}")]
    Acl {
        key: PathName,
        #[source]
        source: AclError,
    },
    #[error(transparent)]
    Extents(#[from] ExtentError),
}

/// Why an archive couldn't be read as a tree.
#[derive(Debug, thiserror::Error)]
pub enum ReadTreeError {
    /// It couldn't be read.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// It isn't a tree.
    #[error(transparent)]
    Tree(#[from] TreeError),
}

/// Decodes one archive in memory whose extents refer to a pages file of `pages_length` bytes.
///
/// # Errors
///
/// It isn't a tree.
pub fn decode_tree(archive: &[u8], pages_length: u64) -> Result<Tree, TreeError> {
    read_tree(archive, archive.len() as u64, pages_length).map_err(|error| match error {
        ReadTreeError::Tree(error) => error,
        ReadTreeError::Read(_) => unreachable!("memory can always be read"),
    })
}

/// Decodes one archive, of about `length` bytes, whose extents refer to a pages file of `pages_length` bytes.
///
/// # Errors
///
/// It can't be read, or isn't a tree.
pub fn read_tree(archive: impl ArchiveSource, length: u64, pages_length: u64) -> Result<Tree, ReadTreeError> {
    // Most are files, of two blocks.
    let entries = (length / (2 * BLOCK as u64)).min(EXPECTED_MAX) as usize;
    let mut decoder = Decoder {
        pages_length,
        tree: Tree { entries: Vec::with_capacity(entries) },
        names: HashTable::with_capacity(entries),
        hasher: RandomState::new(),
        path: Vec::new(),
    };
    let mut members = Members::new(archive);
    while let Some(Member { header, extended, body, offset }) = members.next()? {
        let name = header.path_bytes();
        let fail = |entry: &[u8], fault| TreeError { entry: PathName(entry.to_vec()), offset, fault };
        let records = pax::parse(extended).ok_or_else(|| fail(&name, TreeFault::Pax))?;
        let path = records.iter().find(|(key, _)| *key == b"path").map_or(&*name, |(_, value)| *value);
        decoder.add(header, path, &records, body).map_err(|fault| fail(path, fault))?;
    }
    if decoder.tree.entries.is_empty() {
        return Err(TreeError { entry: PathName(Vec::new()), offset: 0, fault: TreeFault::Root }.into());
    }
    Ok(decoder.tree)
}

struct Decoder {
    pages_length: u64,
    tree: Tree,
    /// Indices of the entries, found by parent and name, which are in the tree.
    names: HashTable<usize>,
    /// Names are whatever an image says, so the hash has a secret.
    hasher: RandomState,
    /// The directories from the root to the last entry's parent, by index: the next entry's
    /// parent is nearly always among them.
    path: Vec<usize>,
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
        let (parent, name) = self.place(name)?;

        let linkname = || match find("linkpath") {
            Some(path) => Cow::Borrowed(path),
            None => header.link_name_bytes().unwrap_or_default(),
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
                let target = linkname().into_owned();
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
        let Self { names, hasher, tree, .. } = self;
        let hash = |index: &usize| {
            let entry = &tree.entries[*index];
            hasher.hash_one((entry.parent, entry.name.as_slice()))
        };
        if index != 0 {
            let is_it = |index: &usize| is_child(&tree.entries[*index], parent, name);
            match names.entry(hasher.hash_one((parent, name)), is_it, hash) {
                hash_table::Entry::Occupied(_) => return Err(TreeFault::Duplicate),
                hash_table::Entry::Vacant(vacant) => vacant.insert(index),
            };
        }
        tree.entries.push(Entry { parent, name: name.to_vec(), kind, attributes });
        Ok(())
    }

    /// The entry of that name in a directory.
    fn child(&self, parent: usize, name: &[u8]) -> Option<usize> {
        let is_it = |index: &usize| is_child(&self.tree.entries[*index], parent, name);
        self.names.find(self.hasher.hash_one((parent, name)), is_it).copied()
    }

    /// The parent of the next entry and its name in it; the root's are 0 and empty.
    fn place<'n>(&mut self, name: &'n [u8]) -> Result<(usize, &'n [u8]), TreeFault> {
        let first = self.tree.entries.is_empty();
        Ok(match member_name::parse(name).ok_or(TreeFault::Name)? {
            MemberName::Path(path) => {
                let path = relative(path)?;
                if first != path.is_empty() {
                    return Err(if first { TreeFault::Root } else { TreeFault::Duplicate });
                }
                let slash = path.iter().rposition(|b| *b == b'/');
                let name = &path[slash.map_or(0, |slash| slash + 1)..];
                if slash == Some(0) || !first && !is_component(name) {
                    return Err(TreeFault::Name);
                }
                (self.directory(&path[..slash.unwrap_or(0)])?, name)
            }
            MemberName::Indexed(..) if first => return Err(TreeFault::Root),
            MemberName::Indexed(parent, name) => {
                let directory = self.tree.entries.get(parent).filter(|entry| entry.kind == Kind::Directory);
                directory.ok_or(TreeFault::Parent)?;
                (parent, name.filter(|name| is_component(name)).ok_or(TreeFault::Name)?)
            }
        })
    }

    /// The directory at a path.
    fn directory(&mut self, path: &[u8]) -> Result<usize, TreeFault> {
        let mut parts = split(path).peekable();
        let mut same = 0;
        while let (Some(part), Some(index)) = (parts.peek(), self.path.get(same)) {
            if self.tree.entries[*index].name != *part {
                break;
            }
            parts.next();
            same += 1;
        }
        self.path.truncate(same);
        if parts.clone().any(|part| !is_component(part)) {
            return Err(TreeFault::Name);
        }
        for part in parts {
            let parent = self.path.last().copied().unwrap_or(0);
            let index = self.child(parent, part).ok_or(TreeFault::Parent)?;
            if self.tree.entries[index].kind != Kind::Directory {
                return Err(TreeFault::Parent);
            }
            self.path.push(index);
        }
        Ok(self.path.last().copied().unwrap_or(0))
    }

    fn link_target(&self, name: &[u8]) -> Result<usize, TreeFault> {
        let bad = || TreeFault::Link(PathName(name.to_vec()));
        let at = match member_name::parse(name) {
            Some(MemberName::Indexed(index, None)) => index,
            Some(MemberName::Path(path)) => {
                let mut at = 0;
                for part in split(relative(path).map_err(|_| bad())?) {
                    at = self.child(at, part).ok_or_else(bad)?;
                }
                at
            }
            _ => return Err(bad()),
        };
        match self.tree.entries.get(at).ok_or_else(bad)?.kind {
            Kind::Directory => Err(bad()),
            Kind::HardLink { target } => Ok(target),
            _ => Ok(at),
        }
    }
}

fn is_child(entry: &Entry, parent: usize, name: &[u8]) -> bool {
    entry.parent == parent && entry.name == name
}

/// The path of an archive's name, without `./` before and `/` behind it; empty for the root.
fn relative(name: &[u8]) -> Result<&[u8], TreeFault> {
    let path = name.strip_prefix(b"./").ok_or(TreeFault::Name)?;
    Ok(path.strip_suffix(b"/").filter(|path| !path.is_empty()).unwrap_or(path))
}

/// The components of a path; none of an empty one.
fn split(path: &[u8]) -> impl Iterator<Item = &[u8]> + Clone {
    path.split(|b| *b == b'/').filter(move |_| !path.is_empty())
}

fn is_component(name: &[u8]) -> bool {
    !name.is_empty()
        && !name.contains(&b'/')
        && name != b"."
        && name != b".."
        && name.len() <= NAME_MAX
        && !name.contains(&0)
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
    let mut xattrs: Vec<Xattr> = Vec::new();
    for (key, value) in records {
        if let Some(name) = key.strip_prefix(pax::XATTR.as_bytes()) {
            xattrs.push(Xattr { name: pax::xattr_name(name), value: value.to_vec() });
        } else if let Some(name) = acl::xattr_name(key) {
            let value = acl::from_text(value)
                .map_err(|source| TreeFault::Acl { key: PathName(key.to_vec()), source })?;
            xattrs.push(Xattr { name: name.to_vec(), value });
        }
    }
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
