//! Writers through mappings, which the kernel reports to nobody.

use std::collections::VecDeque;
use std::path::Path;

use crate::contents::{WHOLE, large, whole};
use crate::{FILES, PAGE, PAGES, Step, Tree, last, make, pattern, plain, sys, writable};

fn store(map: &mut memmap2::MmapMut, s: u64, page: u64) {
    let at = (page * PAGE) as usize;
    // One store, so that it is there or isn't.
    sys::store(&mut map[at..at + 8], s);
}

/// One mapping for all its life, whose descriptor is closed.
pub(crate) fn mapped(dir: &Path) -> Step {
    let mut map = sys::map_shared(&writable(&large(dir))).unwrap();
    Box::new(move |s| store(&mut map, s, s % PAGES))
}

/// A mapping for each store, of a file that is held open.
pub(crate) fn mapped_held(dir: &Path) -> Step {
    let file = writable(&large(dir));
    Box::new(move |s| store(&mut sys::map_shared(&file).unwrap(), s, s % PAGES))
}

pub(crate) fn stored(s: u64) -> Tree {
    let page = |page| stored_page(last(s, page, PAGES));
    Tree::from([("large".to_owned(), plain((0..PAGES).flat_map(page).collect()))])
}

/// A page to which step `s` has stored its number; none has, if that is 0.
fn stored_page(s: u64) -> Vec<u8> {
    let mut bytes = pattern(0, PAGE);
    if s > 0 {
        bytes[..8].copy_from_slice(&s.to_le_bytes());
    }
    bytes
}

/// A file that is opened, mapped, stored to, unmapped and closed.
pub(crate) fn mapped_once(dir: &Path) -> Step {
    let path = whole(dir);
    Box::new(move |s| store(&mut sys::map_shared(&writable(&path(s))).unwrap(), s, 1))
}

/// Files of a page each, so many that a file's turn comes seldom, ...
const LATER: u64 = 2000;
/// ... and mappings of them that are held: so many steps later each is unmapped.
const HELD: usize = 6;

/// The same, but unmapped only later: until then nothing tells of the store but that the file was opened.
pub(crate) fn mapped_later(dir: &Path) -> Step {
    let dir = dir.to_owned();
    (0..LATER).for_each(|k| make(&dir.join(format!("f{k}")), &pattern(0, PAGE)));
    let mut held = VecDeque::new();
    Box::new(move |s| {
        let mut map = sys::map_shared(&writable(&dir.join(format!("f{}", s % LATER)))).unwrap();
        store(&mut map, s, 0);
        held.push_back(map);
        if held.len() > HELD {
            held.pop_front();
        }
    })
}

pub(crate) fn stored_later(s: u64) -> Tree {
    (0..LATER).map(|k| (format!("f{k}"), plain(stored_page(last(s, k, LATER))))).collect()
}

pub(crate) fn stored_once(s: u64) -> Tree {
    let content =
        |k| [pattern(0, PAGE), stored_page(last(s, k, FILES)), pattern(0, WHOLE - 2 * PAGE)].concat();
    (0..FILES).map(|k| (format!("f{k}"), plain(content(k)))).collect()
}
