//! One object of a tree: what an image keeps of an inode and its name.
//!
//! Ids are the container's (see [`crate::id_map`]); times have nanoseconds; names, symlink targets and
//! xattr values are bytes.

use std::fmt;

use stillframe_pgalloc::PageExtent;

/// A point in time as the kernel keeps it: `nsec` counts forward from `sec`, also before 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    /// Seconds since 1970.
    pub sec: i64,
    /// Nanoseconds, below 1,000,000,000.
    pub nsec: u32,
}

/// One extended attribute.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Xattr {
    /// Full name with its namespace prefix, without NUL.
    pub name: Vec<u8>,
    /// Value, possibly empty.
    pub value: Vec<u8>,
}

/// What every inode has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits with setuid, setgid and sticky (`& 0o7777`).
    pub mode: u32,
    /// Owner, as the container sees it.
    pub uid: u32,
    /// Group, as the container sees it.
    pub gid: u32,
    /// Last modification.
    pub mtime: Timestamp,
    /// Last access.
    pub atime: Timestamp,
    /// Inode flags (`FS_*_FL` of linux/fs.h) among [`KEPT_FLAGS`].
    pub flags: u32,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<Xattr>,
}

/// The inode flags that an image keeps: FS_IMMUTABLE_FL, FS_APPEND_FL, FS_NODUMP_FL.
pub const KEPT_FLAGS: u32 = 0x10 | 0x20 | 0x40;

/// What an object is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file: `size` bytes, whose non-zero pages are at `extents`.
    File {
        /// Size in bytes.
        size: u64,
        /// Ascending, not overlapping; what they leave out is a hole.
        extents: Vec<PageExtent>,
    },
    /// A symbolic link.
    Symlink {
        /// What it points to, without NUL.
        target: Vec<u8>,
    },
    /// A fifo.
    Fifo,
    /// A unix domain socket's name.
    Socket,
    /// A character device; 0/0 is overlayfs's whiteout.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// One more name of an entry that came before.
    HardLink {
        /// Index of that entry in [`Tree::entries`].
        target: usize,
    },
}

/// One name in a tree, and its inode if this is the first name of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Index of the parent directory in [`Tree::entries`]; the root is its own parent.
    pub parent: usize,
    /// Last component of the path; empty for the root.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Its inode's attributes; default for a hard link.
    pub attributes: Attributes,
}

/// A decoded and validated tree. Entry 0 is the root directory; a parent precedes its children.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    /// All objects in the order of the archive.
    pub entries: Vec<Entry>,
}

impl Tree {
    /// The path of an entry, `/`-separated, beginning with `/`, escaped for a message.
    pub fn path(&self, index: usize) -> PathName {
        let mut names = Vec::new();
        let mut at = index;
        while at != 0 {
            let entry = &self.entries[at];
            names.push(entry.name.as_slice());
            at = entry.parent;
        }
        names.reverse();
        let mut path = vec![b'/'];
        path.extend_from_slice(&names.join(&b'/'));
        PathName(path)
    }

    /// The entry of that name in the root directory.
    pub fn root_entry(&self, name: &[u8]) -> Option<&Entry> {
        self.entries.iter().skip(1).find(|entry| entry.parent == 0 && entry.name == name)
    }

    /// Number of inodes that the tree takes on a tmpfs besides its root; a further hard link counts
    /// as one (`shmem_link`).
    pub fn inodes(&self) -> u64 {
        self.entries.len().saturating_sub(1) as u64
    }

    /// Bytes of memory that the tree's file pages take on a tmpfs with pages of `page_size` bytes.
    pub fn page_bytes(&self, page_size: u64) -> u64 {
        self.pages(|_| page_size, |_, _| u64::MAX)
    }

    /// The most that they take where files with at least `from` bytes of data may get pages of `huge_page` bytes. `tails`: also of what
    /// lies behind a file's last page of `page_size` bytes.
    pub fn huge_page_bytes(&self, page_size: u64, huge_page: u64, from: u64, tails: bool) -> u64 {
        let huge = |bytes: u64| bytes >= from;
        self.pages(
            |bytes| if huge(bytes) { huge_page } else { page_size },
            |size, bytes| {
                if tails && huge(bytes) { u64::MAX } else { size.next_multiple_of(page_size) }
            },
        )
    }

    /// Bytes of the pages that hold data, by a file's size and bytes of data: pages of `page_size(bytes)`, up to `end(size, bytes)`.
    fn pages(&self, page_size: impl Fn(u64) -> u64, end: impl Fn(u64, u64) -> u64) -> u64 {
        let mut total = 0u64;
        for entry in &self.entries {
            let Kind::File { size, extents } = &entry.kind else { continue };
            let data = extents.iter().map(|extent| extent.length).sum();
            let (page_size, file_end) = (page_size(data), end(*size, data));
            let mut counted_to = 0; // two extents may share a page that is larger than the image's
            for extent in extents {
                let start = (extent.file_offset / page_size).max(counted_to);
                let end = (extent.file_offset + extent.length).div_ceil(page_size);
                // No overflow: sizes are below 2^63, and so are their ends in any pages.
                let bytes = (end * page_size).min(file_end).saturating_sub(start * page_size);
                total = total.saturating_add(bytes);
                counted_to = end.max(counted_to);
            }
        }
        total
    }
}

/// A path in bytes, printed with escapes where it isn't printable ASCII.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathName(pub Vec<u8>);

impl fmt::Display for PathName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}
