//! Walking a filesystem: each directory before what is in it, depth first, by descriptor, the names of
//! a directory in the order in which they were made.
//!
//! Names are never resolved from the root, so a path may be longer than PATH_MAX, and symbolic links
//! are never followed. At most [`OPEN_DIRECTORIES`] directories are open, however deep the tree is: one
//! further up is opened again by its file handle. In memory are the names that are still to come of the
//! directories on the way down, in one buffer a directory: a name's bytes and two more, so that a million names of
//! 10 bytes take 12 MB (and up to twice that, since the buffer grows by doubling). Mirrors nftw(3) with FTW_PHYS and
//! FTW_MOUNT.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir};

use crate::sys::handle::FileHandle;

/// Most directories that a walk has open at once.
pub(crate) const OPEN_DIRECTORIES: usize = 128;
/// Bytes of names that are asked for at once, with what getdents64(2) tells of each.
const LISTING: usize = 64 << 10;

/// A walk over the filesystem at a root directory.
pub(crate) struct Walk<'a> {
    root: &'a File,
    stack: Vec<Frame>,
    path: Vec<u8>,
    listing: Vec<u8>,
    started: bool,
}

struct Frame {
    /// `None` while closed for lack of descriptors.
    dir: Option<File>,
    handle: FileHandle,
    names: Names,
    /// Length of `path` up to and with this directory.
    path_len: usize,
}

/// What an object was when its directory was listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Listed {
    Directory,
    Regular,
    Other,
}

/// One object met on a walk.
pub(crate) struct Met<'w> {
    /// Directory that it is in; for the root, the root itself.
    pub(crate) parent: &'w File,
    /// The object itself when it is a directory.
    pub(crate) dir: Option<&'w File>,
    /// Last component; empty for the root.
    pub(crate) name: &'w [u8],
    /// Path from the root, without a leading slash; empty for the root.
    pub(crate) path: &'w [u8],
    /// Number of directories that it is in: 0 for the root.
    pub(crate) depth: usize,
    pub(crate) listed: Listed,
}

impl<'a> Walk<'a> {
    /// A walk from `root`: a directory open for reading.
    pub(crate) fn new(root: &'a File) -> Self {
        let listing = Vec::with_capacity(LISTING);
        Self { root, stack: Vec::new(), path: Vec::new(), listing, started: false }
    }

    /// Path of the last object met, or of the one that `next` failed at.
    pub(crate) fn path(&self) -> &[u8] {
        &self.path
    }

    /// The next object, or `None` at the end. Not an `Iterator`: what it returns borrows from the walk.
    pub(crate) fn next(&mut self) -> Option<io::Result<Met<'_>>> {
        self.step().transpose()
    }

    fn step(&mut self) -> io::Result<Option<Met<'_>>> {
        if !self.started {
            self.started = true;
            // Opened anew: a duplicate would share its place in the listing with the caller's.
            self.push(File::from(rustix::fs::openat(self.root, ".", DIRECTORY, Mode::empty())?))?;
            let dir = self.stack[0].dir.as_ref();
            let listed = Listed::Directory;
            return Ok(Some(Met { parent: self.root, dir, name: &[], path: &[], depth: 0, listed }));
        }
        let listed = loop {
            let Some(frame) = self.stack.last_mut() else { return Ok(None) };
            self.path.truncate(frame.path_len);
            if frame.path_len != 0 {
                self.path.push(b'/');
            }
            match frame.names.pop(&mut self.path) {
                Some(listed) => break listed,
                None => {
                    self.stack.pop();
                }
            }
        };
        let at = self.stack.len() - 1;
        let frame = &mut self.stack[at];
        let name_at = if frame.path_len == 0 { 0 } else { frame.path_len + 1 };
        if frame.dir.is_none() {
            frame.dir = Some(frame.handle.open(self.root.as_fd(), DIRECTORY)?);
        }
        let parent = frame.dir.as_ref().expect("opened just now");
        let listed = match listed {
            Some(listed) => listed,
            None => ask(parent, &self.path[name_at..])?,
        };
        if listed != Listed::Directory {
            let (name, path) = (&self.path[name_at..], &*self.path);
            let parent = self.stack[at].dir.as_ref().expect("opened just now");
            return Ok(Some(Met { parent, dir: None, name, path, depth: at + 1, listed }));
        }
        let dir = rustix::fs::openat(parent, &self.path[name_at..], DIRECTORY, Mode::empty())?;
        self.push(File::from(dir))?;
        let [.., above, below] = self.stack.as_slice() else { unreachable!("pushed onto a frame") };
        let parent = above.dir.as_ref().expect("opened above");
        let (name, path) = (&self.path[name_at..], &*self.path);
        Ok(Some(Met {
            parent,
            dir: below.dir.as_ref(),
            name,
            path,
            depth: at + 1,
            listed: Listed::Directory,
        }))
    }

    fn push(&mut self, dir: File) -> io::Result<()> {
        let mut names = Names::default();
        let mut listing = RawDir::new(&dir, self.listing.spare_capacity_mut());
        while let Some(entry) = listing.next() {
            let entry = entry?;
            names.push(entry.file_name().to_bytes(), entry.file_type());
        }
        let handle = FileHandle::of(dir.as_fd())?;
        self.stack.push(Frame { dir: Some(dir), handle, names, path_len: self.path.len() });
        if let Some(far) = self.stack.len().checked_sub(OPEN_DIRECTORIES + 1) {
            self.stack[far].dir = None;
        }
        Ok(())
    }
}

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// What an object is whose directory didn't tell, which tmpfs always does.
fn ask(parent: &File, name: &[u8]) -> io::Result<Listed> {
    let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Listed::Directory,
        FileType::RegularFile => Listed::Regular,
        _ => Listed::Other,
    })
}

/// The names of a directory that are still to come: of each a letter for its type, its bytes and a NUL.
///
/// tmpfs lists the newest first. Taken from the end, so oldest first, a tree that is built in the order of the walk
/// lists its names in the order that they had; and what is taken leaves its memory to nobody.
#[derive(Default)]
struct Names {
    bytes: Vec<u8>,
}

impl Names {
    fn push(&mut self, name: &[u8], kind: FileType) {
        if name == b"." || name == b".." {
            return;
        }
        self.bytes.push(match kind {
            FileType::Directory => b'd',
            FileType::RegularFile => b'r',
            FileType::Unknown => b'?',
            _ => b'o',
        });
        self.bytes.extend_from_slice(name);
        self.bytes.push(0);
    }

    /// Takes the last name, appends it to `path` and tells its type, `None` within where it isn't known.
    fn pop(&mut self, path: &mut Vec<u8>) -> Option<Option<Listed>> {
        self.bytes.pop()?;
        let start = self.bytes.iter().rposition(|b| *b == 0).map_or(0, |nul| nul + 1);
        path.extend_from_slice(&self.bytes[start + 1..]);
        let kind = match self.bytes[start] {
            b'd' => Some(Listed::Directory),
            b'r' => Some(Listed::Regular),
            b'o' => Some(Listed::Other),
            _ => None,
        };
        self.bytes.truncate(start);
        Some(kind)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_tree_deeper_than_the_descriptors_is_walked_whole() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut at = File::open(dir.path()).unwrap();
        let depth = OPEN_DIRECTORIES * 3;
        for _ in 0..depth {
            // "z" is met before or after "d": either way the directory above is needed again.
            for name in ["d", "a", "z"] {
                rustix::fs::mkdirat(&at, name, Mode::RWXU).unwrap();
            }
            at = File::from(rustix::fs::openat(&at, "d", DIRECTORY, Mode::empty()).unwrap());
        }
        let root = File::open(dir.path()).unwrap();
        let mut walk = Walk::new(&root);
        let mut paths = BTreeSet::new();
        while let Some(met) = walk.next() {
            let met = met.unwrap();
            if let Some(dir) = met.dir.filter(|_| !met.path.is_empty()) {
                let named = rustix::fs::statat(met.parent, met.name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
                assert_eq!(named.st_ino, rustix::fs::fstat(dir).unwrap().st_ino);
            }
            assert!(paths.insert(met.path.to_vec()));
        }
        assert_eq!(paths.len(), depth * 3 + 1);
        assert!(paths.contains(vec![&b"d"[..]; depth].join(&b'/').as_slice()));
    }

    #[test]
    fn names_come_back_last_first() {
        let mut names = Names::default();
        for (name, kind) in
            [(&b"."[..], FileType::Directory), (b"a", FileType::Directory), (b"..", FileType::Directory)]
        {
            names.push(name, kind);
        }
        names.push(&[b'n'; 255], FileType::RegularFile);
        names.push(b"\xff", FileType::Unknown);
        names.push(b"f", FileType::Fifo);
        let mut pop = || {
            let mut path = b"p/".to_vec();
            names.pop(&mut path).map(|kind| (path[2..].to_vec(), kind))
        };
        assert_eq!(pop(), Some((b"f".to_vec(), Some(Listed::Other))));
        assert_eq!(pop(), Some((b"\xff".to_vec(), None)));
        assert_eq!(pop(), Some((vec![b'n'; 255], Some(Listed::Regular))));
        assert_eq!(pop(), Some((b"a".to_vec(), Some(Listed::Directory))));
        assert_eq!(pop(), None);
    }
}
