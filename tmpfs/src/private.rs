//! Trees of private filesystems: those whose pages lie in a private MemoryFile, the filestore.
//!
//! Such a tree's extents are offsets in the filestore, since the filestore is saved as a whole: a reader that wants a
//! single file, or the whole tree on another medium, finds the pages by [`translate`]. On a filesystem that was just
//! frozen FIEMAP tells where a file's blocks are (ext4_fiemap).

use std::collections::HashMap;
use std::fs::File;
use std::io;

use stillframe_pgalloc::{PAGE_SIZE, PageExtent, PagesOffset, PrivateMemoryFileMeta};

use crate::decode::decode_tree;
use crate::entry::{Entry, Kind, PathName, Tree};
use crate::id_map::Ids;
use crate::save::{SaveTreeError, save_listing};
use crate::sys::filesystem::{self, MappedExtent};

/// FIEMAP_EXTENT_UNWRITTEN: allocated, reads as zeros.
const UNWRITTEN: u32 = 0x800;
/// Flags that only inform: LAST, MERGED, SHARED.
const HARMLESS: u32 = 0x1 | 0x1000 | 0x2000;

/// Where the data of a file of `size` bytes lies in its filestore.
pub(crate) fn extents(file: &File, size: u64) -> io::Result<Vec<PageExtent>> {
    join(&filesystem::extents(file)?, size)
        .ok_or_else(|| io::Error::other("its blocks are stored in a way that isn't known"))
}

/// Written extents as the image has them: inside the file, joined where contiguous. `None` if data lies anywhere
/// but in whole blocks.
fn join(mapped: &[MappedExtent], size: u64) -> Option<Vec<PageExtent>> {
    let mut all: Vec<PageExtent> = Vec::new();
    for &MappedExtent { logical, physical, length, flags } in mapped {
        if flags & UNWRITTEN != 0 || logical >= size {
            continue;
        }
        let whole = [logical, physical, length].iter().all(|number| number.is_multiple_of(PAGE_SIZE));
        if flags & !HARMLESS != 0 || !whole {
            return None;
        }
        let length = length.min(size - logical);
        match all.last_mut() {
            Some(last)
                if last.file_offset + last.length == logical
                    && last.pages_offset.0 + last.length == physical =>
            {
                last.length += length;
            }
            _ => all.push(PageExtent { file_offset: logical, length, pages_offset: PagesOffset(physical) }),
        }
    }
    Some(all)
}

/// Why a tree and the filestore that it belongs to contradict each other.
#[derive(Debug, thiserror::Error)]
pub enum PrivateError {
    /// The filestore's size isn't made of pages.
    #[error("the private MemoryFile {index} has {size} bytes, which are no whole pages")]
    Size {
        /// Its number.
        index: u32,
        /// Its size.
        size: u64,
    },
    /// Two files have the same block.
    #[error(
        "\"{path}\" has pages at {offset:#x} of the private MemoryFile, which another part of a file has too"
    )]
    Overlap {
        /// The later one in the MemoryFile.
        path: PathName,
        /// Where, in bytes.
        offset: u64,
    },
    /// The filestore can't be looked through.
    #[error("list what the loaded filestore holds")]
    List(#[source] Box<SaveTreeError>),
    /// What is listed can't be understood: a contradiction to our own rules.
    #[error("list what the loaded filestore holds: {0}")]
    Listing(String),
    /// The filestore holds something else than the tree says.
    #[error(
        "\"{path}\" is not the same in the saved filestore and in its tree: the image was made up or damaged"
    )]
    Differs {
        /// The first difference.
        path: PathName,
    },
}

/// The tree with extents in the pages file instead of the private MemoryFile `private`, which it was decoded for. What
/// the MemoryFile's metadata leave out is zero, so it becomes a hole.
pub fn translate(mut tree: Tree, private: &PrivateMemoryFileMeta) -> Result<Tree, PrivateError> {
    judge(&tree, private)?;
    for entry in &mut tree.entries {
        if let Kind::File { extents, .. } = &mut entry.kind {
            *extents = extents.iter().flat_map(|extent| pages_of(extent, &private.extents)).collect();
        }
    }
    Ok(tree)
}

/// Checks that no page of the MemoryFile belongs to two files; so translating can't multiply anything.
pub fn judge(tree: &Tree, private: &PrivateMemoryFileMeta) -> Result<(), PrivateError> {
    if !private.size.is_multiple_of(PAGE_SIZE) {
        return Err(PrivateError::Size { index: private.index, size: private.size });
    }
    let mut all: Vec<(u64, u64, usize)> = Vec::new();
    for (index, entry) in tree.entries.iter().enumerate() {
        let Kind::File { extents, .. } = &entry.kind else { continue };
        // Valid extents end inside the MemoryFile, in whole pages.
        let ends = |extent: &PageExtent| extent.pages_offset.0 + extent.length.next_multiple_of(PAGE_SIZE);
        all.extend(extents.iter().map(|extent| (extent.pages_offset.0, ends(extent), index)));
    }
    all.sort_unstable();
    match all.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        Some(pair) => Err(PrivateError::Overlap { path: tree.path(pair[1].2), offset: pair[1].0 }),
        None => Ok(()),
    }
}

/// The parts of an extent that the MemoryFile's extents (ascending) have, where they are in the pages file.
fn pages_of<'a>(
    extent: &PageExtent,
    private: &'a [PageExtent],
) -> impl Iterator<Item = PageExtent> + use<'a> {
    let PageExtent { file_offset, length, pages_offset: PagesOffset(start) } = *extent;
    let end = start + length;
    let first = private.partition_point(|part| part.file_offset + part.length <= start);
    private[first..].iter().take_while(move |part| part.file_offset < end).map(move |part| {
        let from = start.max(part.file_offset);
        let to = end.min(part.file_offset + part.length);
        PageExtent {
            file_offset: file_offset + (from - start),
            length: to - from,
            pages_offset: PagesOffset(part.pages_offset.0 + (from - part.file_offset)),
        }
    })
}

/// Compares the mounted filestore whose root is `root` with the tree that was saved with it, but for the places
/// of pages: an image may be made up so that they differ, and only the tree has been judged.
pub fn verify(root: &File, ids: &Ids, tree: &Tree) -> Result<(), PrivateError> {
    let listing = save_listing(root, ids).map_err(|source| PrivateError::List(Box::new(source)))?;
    let found = decode_tree(&listing, 0).map_err(|source| PrivateError::Listing(source.to_string()))?;
    match difference(&found, tree) {
        Some(path) => Err(PrivateError::Differs { path }),
        None => Ok(()),
    }
}

/// The first difference, but for the places of pages and the order of names.
fn difference(found: &Tree, saved: &Tree) -> Option<PathName> {
    let key = |parent: usize, index: usize, tree: &'_ Tree| (parent, tree.entries[index].name.clone());
    let mut there: HashMap<(usize, Vec<u8>), usize> = (1..found.entries.len())
        .map(|index| (key(found.entries[index].parent, index, found), index))
        .collect();
    // Of each entry, and of each inode by its first name, the one that it is in the other tree.
    let mut names = vec![0; saved.entries.len()];
    let (mut inodes, mut back) = (vec![None; saved.entries.len()], vec![None; found.entries.len()]);
    for (index, entry) in saved.entries.iter().enumerate().skip(1) {
        let Some(other) = there.remove(&key(names[entry.parent], index, saved)) else {
            return Some(saved.path(index));
        };
        names[index] = other;
        let (inode, other) = (inode(saved, index), inode(found, other));
        let new = (*inodes[inode].get_or_insert(other), *back[other].get_or_insert(inode)) == (other, inode);
        if !new || !is_same(&saved.entries[inode], &found.entries[other]) {
            return Some(saved.path(index));
        }
    }
    if !is_same(&saved.entries[0], &found.entries[0]) {
        return Some(saved.path(0));
    }
    there.into_values().min().map(|more| found.path(more))
}

/// The entry that has the inode of this one.
fn inode(tree: &Tree, index: usize) -> usize {
    if let Kind::HardLink { target } = tree.entries[index].kind { target } else { index }
}

fn is_same(saved: &Entry, found: &Entry) -> bool {
    let kind = match (&saved.kind, &found.kind) {
        (Kind::File { size, .. }, Kind::File { size: other, .. }) => size == other,
        (kind, other) => kind == other,
    };
    kind && saved.attributes == found.attributes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::entry::Attributes;

    fn extent(file_offset: u64, length: u64, pages_offset: u64) -> PageExtent {
        PageExtent { file_offset, length, pages_offset: PagesOffset(pages_offset) }
    }

    fn tree(files: Vec<Vec<PageExtent>>) -> Tree {
        let entry = |name: &str, kind| Entry {
            parent: 0,
            name: name.into(),
            kind,
            attributes: Attributes::default(),
        };
        let files = files.into_iter().enumerate().map(|(index, extents)| {
            let size = extents.last().map_or(0, |last| last.file_offset + last.length);
            entry(&index.to_string(), Kind::File { size, extents })
        });
        Tree { entries: std::iter::once(entry("", Kind::Directory)).chain(files).collect() }
    }

    fn extents_of(tree: &Tree, index: usize) -> &[PageExtent] {
        let Kind::File { extents, .. } = &tree.entries[index].kind else { panic!("no file") };
        extents
    }

    #[test]
    fn blocks_are_joined_clipped_and_judged() {
        let mapped = |logical, physical, length, flags| MappedExtent { logical, physical, length, flags };
        let page = PAGE_SIZE;
        let some = [
            mapped(0, 8 * page, 2 * page, 0),
            mapped(2 * page, 10 * page, page, UNWRITTEN),
            mapped(3 * page, 11 * page, page, 0),
            mapped(4 * page, 12 * page, 2 * page, 0x1001),
            mapped(9 * page, 20 * page, page, 0),
        ];
        let want = vec![extent(0, 2 * page, 8 * page), extent(3 * page, 2 * page + 5, 11 * page)];
        assert_eq!(join(&some, 5 * page + 5), Some(want));
        for flags in [0x2, 0x4, 0x8, 0x80, 0x100, 0x200, 0x400, 0x1_0000] {
            assert_eq!(join(&[mapped(0, 0, page, flags)], page), None, "{flags:#x}");
        }
        assert_eq!(join(&[mapped(0, 512, page, 0)], page), None);
    }

    #[test]
    fn extents_are_translated_and_what_is_left_out_is_a_hole() {
        let page = PAGE_SIZE;
        let private = PrivateMemoryFileMeta {
            index: 3,
            size: 100 * page,
            extents: vec![extent(10 * page, 4 * page, 0), extent(20 * page, page, 4 * page)],
        };
        let files = vec![
            vec![extent(0, 2 * page, 9 * page), extent(2 * page, 100, 12 * page)],
            vec![extent(5 * page, 10 * page, 13 * page)],
            vec![extent(0, page, 50 * page)],
        ];
        let translated = translate(tree(files), &private).unwrap();
        assert_eq!(extents_of(&translated, 1), [extent(page, page, 0), extent(2 * page, 100, 2 * page)]);
        assert_eq!(
            extents_of(&translated, 2),
            [extent(5 * page, page, 3 * page), extent(12 * page, page, 4 * page)]
        );
        assert_eq!(extents_of(&translated, 3), []);
    }

    #[test]
    fn a_page_of_two_files_is_refused() {
        let page = PAGE_SIZE;
        let private = PrivateMemoryFileMeta { index: 0, size: 100 * page, extents: Vec::new() };
        for files in [
            vec![vec![extent(0, 3 * page, 4 * page)], vec![extent(0, page, 6 * page)]],
            vec![vec![extent(0, 1, 4 * page), extent(page, page, 4 * page)]],
        ] {
            let error = translate(tree(files), &private).unwrap_err();
            assert!(matches!(error, PrivateError::Overlap { .. }), "{error}");
        }
        let odd = PrivateMemoryFileMeta { size: page + 1, ..private };
        assert!(matches!(translate(tree(Vec::new()), &odd), Err(PrivateError::Size { .. })));
    }

    #[test]
    fn any_difference_but_order_and_places_is_found() {
        let entry = |parent, name: &str, kind| Entry {
            parent,
            name: name.into(),
            kind,
            attributes: Attributes::default(),
        };
        let file = |size, at| Kind::File { size, extents: vec![extent(0, size, at)] };
        let link = |target| Kind::HardLink { target };
        let saved = Tree {
            entries: vec![
                entry(0, "", Kind::Directory),
                entry(0, "d", Kind::Directory),
                entry(1, "a", file(5, 0)),
                entry(0, "b", link(2)),
                entry(1, "c", file(5, 4096)),
            ],
        };
        // Another order, so that another name is the first.
        let same = Tree {
            entries: vec![
                entry(0, "", Kind::Directory),
                entry(0, "b", file(5, 8192)),
                entry(0, "d", Kind::Directory),
                entry(2, "c", file(5, 0)),
                entry(2, "a", link(1)),
            ],
        };
        assert_eq!(difference(&same, &saved), None);
        assert_eq!(difference(&saved, &same), None);
        let changed = |change: fn(&mut Tree)| {
            let mut tree = same.clone();
            change(&mut tree);
            difference(&tree, &saved).map(|path| path.to_string())
        };
        let differs = |path: &str| Some(path.to_owned());
        assert_eq!(
            changed(|tree| tree.entries[3].kind = Kind::File { size: 6, extents: vec![] }),
            differs("/d/c")
        );
        assert_eq!(changed(|tree| tree.entries[1].attributes.mode = 1), differs("/d/a"));
        assert_eq!(changed(|tree| tree.entries[0].attributes.mode = 1), differs("/"));
        assert_eq!(changed(|tree| tree.entries[3].parent = 0), differs("/d/c"));
        assert_eq!(changed(|tree| tree.entries[3].name = b"e".to_vec()), differs("/d/c"));
        assert_eq!(changed(|tree| drop(tree.entries.pop())), differs("/d/a"));
        // Two files where there was one of two names, and the other way round.
        assert_eq!(changed(|tree| tree.entries[4].kind = tree.entries[1].kind.clone()), differs("/b"));
        assert_eq!(changed(|tree| tree.entries[3].kind = Kind::HardLink { target: 1 }), differs("/d/c"));
        let more = Entry { parent: 2, name: b"x".to_vec(), ..same.entries[3].clone() };
        let mut tree = same.clone();
        tree.entries.push(more);
        assert_eq!(difference(&tree, &saved).map(|path| path.to_string()), differs("/d/x"));
    }

    proptest! {
        /// Byte for byte what reading through the MemoryFile gives.
        #[test]
        fn a_translation_reads_the_same(
            private in prop::collection::btree_set(0u64..40, 0..20),
            file in prop::collection::vec(0u64..40, 0..12),
        ) {
            let page = PAGE_SIZE;
            let at = |(number, offset): (usize, &u64)| extent(offset * page, page, number as u64 * page);
            let meta = PrivateMemoryFileMeta {
                index: 0, size: 40 * page, extents: private.iter().enumerate().map(at).collect(),
            };
            let mut file = file;
            file.sort_unstable();
            file.dedup();
            file.reverse();
            let extents: Vec<_> = file.iter().enumerate()
                .map(|(number, offset)| extent(number as u64 * page, page, offset * page)).collect();
            let translated = translate(tree(vec![extents]), &meta).unwrap();
            let found: HashMap<u64, u64> = extents_of(&translated, 1).iter()
                .map(|extent| (extent.file_offset / page, extent.pages_offset.0 / page)).collect();
            for (number, offset) in file.iter().enumerate() {
                let want = private.iter().position(|there| there == offset).map(|at| at as u64);
                prop_assert_eq!(found.get(&(number as u64)).copied(), want);
            }
        }
    }
}
