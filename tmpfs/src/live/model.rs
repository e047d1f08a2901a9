//! A filesystem's tree in memory: inodes by number, directories as lists of names in the order in which they were made.
//!
//! While processes run, parts of it are out of date or contradict each other; whatever changes is reported and read again,
//! so that it is right when nothing runs any more. Inodes that lose their last name stay, with nobody referring to
//! them.
//!
//! Memory: about 300 bytes an inode and 50 a name with its bytes.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::slice;

use indexmap::IndexMap;
use rustix::fs::FileType;
use stillframe_pgalloc::PAGE_SIZE;

use crate::entry::Xattr;
use crate::live::contents::Contents;
use crate::stat::Stat;
use crate::sys::handle::FileHandle;

/// One inode.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) handle: FileHandle,
    pub(crate) stat: Stat,
    pub(crate) xattrs: Vec<Xattr>,
    pub(crate) body: Body,
    /// The number of a piece of the archive that it is in, once it is in one.
    pub(crate) piece: u32,
}

/// What is in an inode.
#[derive(Debug)]
pub(crate) enum Body {
    Directory(Vec<Child>),
    File(Contents),
    /// The target.
    Symlink(Vec<u8>),
    /// A fifo, socket or device.
    Other,
}

/// One name in a directory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Child {
    pub(crate) inode: u64,
    pub(crate) name: Box<[u8]>,
}

impl Body {
    /// Whether it is what a directory's listing calls `kind`.
    pub(crate) fn is(&self, kind: FileType) -> bool {
        match self {
            Self::Directory(_) => kind == FileType::Directory,
            Self::File(_) => kind == FileType::RegularFile,
            Self::Symlink(_) => kind == FileType::Symlink,
            Self::Other => !matches!(kind, FileType::Directory | FileType::RegularFile | FileType::Symlink),
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Model {
    /// In the order in which they were read, since that is how they are gone through.
    pub(crate) nodes: IndexMap<u64, Node>,
    pub(crate) handles: HashMap<FileHandle, u64>,
    pub(crate) root: u64,
}

/// A name met on the way through the tree, a directory's before those in it.
pub(crate) struct Visit<'a> {
    pub(crate) name: &'a [u8],
    /// Number of directories that it is in.
    pub(crate) depth: usize,
    pub(crate) inode: u64,
}

/// The tree isn't one, at this inode.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Broken(pub(crate) u64);

impl Model {
    pub(crate) fn insert(&mut self, node: Node) -> Option<Node> {
        self.handles.insert(node.handle, node.stat.inode);
        self.nodes.insert(node.stat.inode, node)
    }

    /// Goes through all names in the order of a walk. Ends early where `visit` fails.
    pub(crate) fn walk<E: From<Broken>>(
        &self,
        mut visit: impl FnMut(Visit<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut cursor = Cursor::new(self);
        while let Some(met) = cursor.next()? {
            visit(met)?;
        }
        Ok(())
    }

    /// The names in a directory; `None` if it isn't one.
    fn children(&self, inode: u64) -> Result<Option<&[Child]>, Broken> {
        match self.nodes.get(&inode).map(|node| &node.body) {
            Some(Body::Directory(children)) => Ok(Some(children)),
            Some(_) => Ok(None),
            None => Err(Broken(inode)),
        }
    }

    /// How many names each inode has that has any.
    pub(crate) fn count_names(&self) -> Result<HashMap<u64, u32>, Broken> {
        let mut names = HashMap::with_capacity(self.nodes.len());
        self.walk(|visit: Visit<'_>| {
            *names.entry(visit.inode).or_default() += 1;
            Ok::<(), Broken>(())
        })?;
        Ok(names)
    }

    /// A path to the inode, for a message: found by going through everything.
    pub(crate) fn path(&self, wanted: u64) -> Vec<u8> {
        let (mut path, mut ends) = (Vec::new(), Vec::new());
        let found = self.walk(|visit: Visit<'_>| {
            ends.truncate(visit.depth);
            path.truncate(ends.last().copied().unwrap_or(0));
            if visit.depth > 1 {
                path.push(b'/');
            }
            path.extend_from_slice(visit.name);
            ends.push(path.len());
            if visit.inode == wanted { Err(Broken(wanted)) } else { Ok(()) }
        });
        if found.is_err() { path } else { format!("inode {wanted}").into_bytes() }
    }

    /// The ranges of the pages file that the files' pages take, in no order.
    pub(crate) fn pages(&self) -> impl Iterator<Item = Range<u64>> {
        let extents = self.nodes.values().filter_map(|node| match &node.body {
            Body::File(contents) => Some(contents.extents.iter()),
            _ => None,
        });
        extents.flatten().map(|extent| {
            extent.pages_offset.0..extent.pages_offset.0 + extent.length.next_multiple_of(PAGE_SIZE)
        })
    }
}

/// A walk through all names, a directory's before those in it.
pub(crate) struct Cursor<'a> {
    model: &'a Model,
    /// The directories that it is in, from the root on, and what is left of each.
    stack: Vec<(u64, slice::Iter<'a, Child>)>,
    /// Directories that were met: none has two names.
    seen: HashSet<u64>,
    begun: bool,
}

/// A place in a walk, for as long as no names change.
#[derive(Clone, Debug)]
pub(crate) struct Mark {
    /// Directories, and how many of the names in each are left.
    left: Vec<(u64, usize)>,
    begun: bool,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(model: &'a Model) -> Self {
        Self { model, stack: Vec::new(), seen: HashSet::new(), begun: false }
    }

    /// Where it is.
    pub(crate) fn mark(&self) -> Mark {
        let left = self.stack.iter().map(|(inode, names)| (*inode, names.len())).collect();
        Mark { left, begun: self.begun }
    }

    /// One that goes on from there.
    pub(crate) fn resume(model: &'a Model, Mark { left, begun }: &Mark) -> Result<Self, Broken> {
        let mut cursor = Self { begun: *begun, ..Self::new(model) };
        for (inode, left) in left {
            let names = model.children(*inode)?.ok_or(Broken(*inode))?;
            let met = names.len().checked_sub(*left).ok_or(Broken(*inode))?;
            cursor.stack.push((*inode, names[met..].iter()));
        }
        Ok(cursor)
    }

    /// The next name.
    pub(crate) fn next(&mut self) -> Result<Option<Visit<'a>>, Broken> {
        if !self.begun {
            self.begun = true;
            let root = self.model.root;
            self.enter(root, self.model.children(root)?.ok_or(Broken(root))?)?;
            return Ok(Some(Visit { name: &[], depth: 0, inode: root }));
        }
        while let Some((_, names)) = self.stack.last_mut() {
            let Some(Child { inode, name }) = names.next() else {
                self.stack.pop();
                continue;
            };
            let visit = Visit { name, depth: self.stack.len(), inode: *inode };
            if let Some(below) = self.model.children(*inode)? {
                self.enter(*inode, below)?;
            }
            return Ok(Some(visit));
        }
        Ok(None)
    }

    fn enter(&mut self, inode: u64, names: &'a [Child]) -> Result<(), Broken> {
        self.stack.push((inode, names.iter()));
        if self.seen.insert(inode) { Ok(()) } else { Err(Broken(inode)) }
    }
}
