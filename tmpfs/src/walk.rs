//! Walking a filesystem: each directory before what is in it, depth first, by descriptor, the names of
//! a directory in the order in which they were made.
//!
//! Names are never resolved from the root, so a path may be longer than PATH_MAX, and symbolic links
//! are never followed. At most [`OPEN_DIRECTORIES`] directories are open, however deep the tree is: one
//! further up is opened again by its file handle. The names of the directories on the way down are in
//! memory. Mirrors nftw(3) with FTW_PHYS and FTW_MOUNT.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, Statx, StatxFlags};

use crate::sys::handle::FileHandle;

/// Most directories that a walk has open at once.
pub(crate) const OPEN_DIRECTORIES: usize = 128;

/// A walk over the filesystem at a root directory.
pub(crate) struct Walk<'a> {
    root: &'a File,
    stack: Vec<Frame>,
    path: Vec<u8>,
    started: bool,
}

struct Frame {
    /// `None` while closed for lack of descriptors.
    dir: Option<File>,
    handle: FileHandle,
    names: std::vec::IntoIter<Vec<u8>>,
    /// Length of `path` up to and with this directory.
    path_len: usize,
}

/// One object met on a walk.
pub(crate) struct Met<'w> {
    /// Directory that it is in; for the root, the root itself.
    pub(crate) parent: &'w File,
    /// The object itself when it is a directory.
    pub(crate) dir: Option<&'w File>,
    /// Last component; empty for the root.
    pub(crate) name: Vec<u8>,
    /// Path from the root, without a leading slash; empty for the root.
    pub(crate) path: &'w [u8],
    pub(crate) stat: Statx,
}

impl<'a> Walk<'a> {
    /// A walk from `root`: a directory open for reading.
    pub(crate) fn new(root: &'a File) -> Self {
        Self { root, stack: Vec::new(), path: Vec::new(), started: false }
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
            let stat = stat(self.root, b"")?;
            self.push(self.root.try_clone()?)?;
            let dir = self.stack[0].dir.as_ref().expect("pushed just now");
            return Ok(Some(Met { parent: self.root, dir: Some(dir), name: Vec::new(), path: &[], stat }));
        }
        let name = loop {
            let Some(frame) = self.stack.last_mut() else { return Ok(None) };
            self.path.truncate(frame.path_len);
            match frame.names.next() {
                Some(name) => break name,
                None => {
                    self.stack.pop();
                }
            }
        };
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(&name);
        let at = self.stack.len() - 1;
        if self.stack[at].dir.is_none() {
            self.stack[at].dir = Some(self.stack[at].handle.open(self.root.as_fd(), DIRECTORY)?);
        }
        let parent = self.stack[at].dir.as_ref().expect("opened just now");
        let stat = stat(parent, &name)?;
        if u32::from(stat.stx_mode) & libc::S_IFMT != libc::S_IFDIR {
            let parent = self.stack[at].dir.as_ref().expect("opened just now");
            return Ok(Some(Met { parent, dir: None, name, path: &self.path, stat }));
        }
        let dir = File::from(rustix::fs::openat(parent, name.as_slice(), DIRECTORY, Mode::empty())?);
        self.push(dir)?;
        let [.., above, below] = self.stack.as_slice() else { unreachable!("pushed onto a frame") };
        let parent = above.dir.as_ref().expect("opened above");
        Ok(Some(Met { parent, dir: below.dir.as_ref(), name, path: &self.path, stat }))
    }

    fn push(&mut self, dir: File) -> io::Result<()> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
        }
        // tmpfs lists the newest first. Oldest first, a tree that is built in the order of the walk lists
        // its names in the order that they had.
        names.reverse();
        let handle = FileHandle::of(dir.as_fd())?;
        let path_len = self.path.len();
        self.stack.push(Frame { dir: Some(dir), handle, names: names.into_iter(), path_len });
        if let Some(far) = self.stack.len().checked_sub(OPEN_DIRECTORIES + 1) {
            self.stack[far].dir = None;
        }
        Ok(())
    }
}

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn stat(dir: &File, name: &[u8]) -> io::Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH;
    Ok(rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS)?)
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
            let parent = rustix::fs::fstat(met.parent).unwrap().st_ino;
            let named = rustix::fs::statat(met.parent, met.name.as_slice(), AtFlags::SYMLINK_NOFOLLOW);
            assert!(met.path.is_empty() || named.unwrap().st_ino == met.stat.stx_ino, "{parent}");
            assert!(paths.insert(met.path.to_vec()));
        }
        assert_eq!(paths.len(), depth * 3 + 1);
        assert!(paths.contains(vec![&b"d"[..]; depth].join(&b'/').as_slice()));
    }
}
