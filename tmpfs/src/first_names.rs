//! The first names of inodes that have several, for hard links to refer to.
//!
//! Memory: about 100 bytes for each inode whose names haven't all been met yet, a tenth of what it takes in the
//! kernel, and at most [`PATHS`] bytes of paths. A first name whose path isn't kept is known by its number alone, which
//! an archive can name as well ([`crate::member_name`]).

use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::member_name::LONGEST;

/// Most bytes of paths that are kept.
const PATHS: usize = 8 << 20;

/// See the module.
#[derive(Default)]
pub(crate) struct FirstNames {
    inodes: HashMap<u64, First>,
    /// Bytes of the paths in `inodes`.
    bytes: usize,
}

struct First {
    index: usize,
    path: Option<Box<[u8]>>,
    /// Names that haven't been met.
    to_come: u32,
}

/// What a name is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Named<'a> {
    /// The first of its inode.
    First,
    /// A further one of the inode whose first name has the number `index` and the path `path`, which is empty if it
    /// wasn't kept.
    Again { index: usize, path: Cow<'a, [u8]> },
}

impl FirstNames {
    /// A name was met, of an inode that has `names` of them in all: with the number `index`, at `path`.
    pub(crate) fn meet(&mut self, inode: u64, names: u32, index: usize, path: &[u8]) -> Named<'_> {
        match self.inodes.entry(inode) {
            Entry::Vacant(vacant) => {
                let keep = path.len() <= LONGEST && self.bytes + path.len() <= PATHS;
                let path: Option<Box<[u8]>> = keep.then(|| path.into());
                self.bytes += path.as_deref().map_or(0, <[u8]>::len);
                vacant.insert(First { index, path, to_come: names - 1 });
                Named::First
            }
            Entry::Occupied(mut occupied) => {
                occupied.get_mut().to_come -= 1;
                if occupied.get().to_come > 0 {
                    let First { index, path, .. } = occupied.into_mut();
                    return Named::Again { index: *index, path: path.as_deref().unwrap_or_default().into() };
                }
                let First { index, path, .. } = occupied.remove();
                let path = path.unwrap_or_default();
                self.bytes -= path.len();
                Named::Again { index, path: Vec::from(path).into() }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_with_the_last_name_and_bounded_before() {
        let mut names = FirstNames::default();
        let again = |index, path: &'static [u8]| Named::Again { index, path: path.into() };
        assert_eq!(names.meet(7, 3, 1, b"a/b"), Named::First);
        assert_eq!(names.meet(7, 3, 2, b"c"), again(1, b"a/b"));
        assert_eq!(names.bytes, 3);
        assert_eq!(names.meet(7, 3, 3, b"d"), again(1, b"a/b"));
        assert_eq!((names.bytes, names.inodes.len()), (0, 0));

        let path = [b'p'; LONGEST];
        for inode in 0..3000 {
            assert_eq!(names.meet(inode, 2, inode as usize, &path), Named::First);
        }
        assert!(names.bytes <= PATHS && names.bytes > PATHS - LONGEST, "{}", names.bytes);
        assert_eq!(names.meet(2999, 2, 5000, b"late"), again(2999, b""));
        assert_eq!(names.meet(0, 2, 5001, b"early"), Named::Again { index: 0, path: path[..].into() });
        assert_eq!(names.meet(9000, 2, 9000, &[b'p'; LONGEST + 1]), Named::First);
        assert_eq!(names.meet(9000, 2, 9001, b"x"), again(9000, b""));
        for inode in 1..2999 {
            assert_ne!(names.meet(inode, 2, 0, b""), Named::First);
        }
        assert_eq!((names.bytes, names.inodes.len()), (0, 0));
    }
}
