//! How members of `tree.tar` are named, and how hard links name their targets.
//!
//! A name is `./` and the path, so that a standard tool lists it and finds it where it belongs. Where that is longer than
//! [`LONGEST`], which no tool could open, it is `@INDEX/NAME`: the number of the parent directory's member in
//! the archive (the root's is 0, extended headers aren't counted) and the last component. So an archive grows with the
//! names in it, and not with their depth. A hard link's target is a path or `@INDEX`.
//!
//! No path begins with `@`, and a reader that knows paths only refuses such a name.

use std::io::Write as _;

use crate::pax;

/// Most bytes of a name that is a path (PATH_MAX without its NUL).
pub(crate) const LONGEST: usize = 4095;

const INDEXED: u8 = b'@';
const ROOT: &[u8] = b"./";

/// A name that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemberName<'a> {
    /// A path as it stands, to be judged yet.
    Path(&'a [u8]),
    /// The number of a member; for a member's own name its parent's, and the name in it.
    Indexed(usize, Option<&'a [u8]>),
}

/// Writes the name of a member: of the object at `path` (empty for the root), whose parent is member number `parent`.
pub(crate) fn write(name: &mut Vec<u8>, path: &[u8], parent: usize, directory: bool) {
    name.clear();
    let slash = usize::from(directory && !path.is_empty());
    if ROOT.len() + path.len() + slash <= LONGEST {
        name.extend_from_slice(ROOT);
        name.extend_from_slice(path);
    } else {
        let last = path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
        write!(name, "@{parent}/").expect("a Vec takes everything");
        name.extend_from_slice(&path[last..]);
    }
    name.extend_from_slice(&b"/"[..slash]);
}

/// Writes what a hard link names: the object at `path` (empty if it isn't known), which is member number `index`.
pub(crate) fn write_target(name: &mut Vec<u8>, path: &[u8], index: usize) {
    name.clear();
    if path.is_empty() || ROOT.len() + path.len() > LONGEST {
        write!(name, "@{index}").expect("a Vec takes everything");
    } else {
        name.extend_from_slice(ROOT);
        name.extend_from_slice(path);
    }
}

/// Takes a name apart; `None` if it begins as an indexed one does, and isn't.
pub(crate) fn parse(name: &[u8]) -> Option<MemberName<'_>> {
    let Some(indexed) = name.strip_prefix(&[INDEXED]) else { return Some(MemberName::Path(name)) };
    let slash = indexed.iter().position(|byte| *byte == b'/');
    let index = pax::decimal(&indexed[..slash.unwrap_or(indexed.len())])?;
    let last = slash.map(|slash| &indexed[slash + 1..]);
    Some(MemberName::Indexed(index, last.map(|last| last.strip_suffix(b"/").unwrap_or(last))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(path: &[u8], directory: bool) -> Vec<u8> {
        let mut name = b"rest of the one before".to_vec();
        write(&mut name, path, 7, directory);
        name
    }

    #[test]
    fn a_path_is_written_up_to_the_longest_that_a_tool_can_open() {
        assert_eq!(written(b"", true), b"./");
        assert_eq!(written(b"a/b", false), b"./a/b");
        assert_eq!(written(b"a/b", true), b"./a/b/");
        let path = [vec![b'd'; LONGEST - 6], b"/bcd".to_vec()].concat();
        assert_eq!(written(&path[1..], true).len(), LONGEST);
        assert_eq!(written(&path, false).len(), LONGEST);
        assert_eq!(written(&path, true), b"@7/bcd/");
        assert_eq!(written(&[b"d", &*path].concat(), false), b"@7/bcd");

        let mut target = Vec::new();
        for (path, want) in [(&path[..], [b"./", &*path].concat()), (&[b'd'; LONGEST], b"@9".to_vec())] {
            write_target(&mut target, path, 9);
            assert_eq!(target, want);
        }
        write_target(&mut target, b"", 9);
        assert_eq!(target, b"@9");
    }

    #[test]
    fn what_is_written_is_read() {
        use MemberName::{Indexed, Path};
        for (name, want) in [
            (&b"./a"[..], Some(Path(b"./a"))),
            (b"", Some(Path(b""))),
            (b"@12/n", Some(Indexed(12, Some(b"n")))),
            (b"@12/n/", Some(Indexed(12, Some(b"n")))),
            (b"@12/@1/", Some(Indexed(12, Some(b"@1")))),
            (b"@12/", Some(Indexed(12, Some(b"")))),
            (b"@12", Some(Indexed(12, None))),
            (b"@", None),
            (b"@/n", None),
            (b"@-1/n", None),
            (b"@+1/n", None),
            (b"@99999999999999999999/n", None),
        ] {
            assert_eq!(parse(name), want, "{}", name.escape_ascii());
        }
    }
}
