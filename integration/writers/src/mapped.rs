//! Writers through mappings, which the kernel reports to nobody.

use std::path::Path;

use crate::contents::{WHOLE, large, whole};
use crate::{FILES, PAGE, PAGES, Step, Tree, last, pattern, plain, sys, writable};

pub(crate) fn store(map: &mut memmap2::MmapMut, s: u64, page: u64) {
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
    let page = |page| {
        let mut bytes = pattern(0, PAGE);
        if last(s, page, PAGES) > 0 {
            bytes[..8].copy_from_slice(&last(s, page, PAGES).to_le_bytes());
        }
        bytes
    };
    Tree::from([("large".to_owned(), plain((0..PAGES).flat_map(page).collect()))])
}

/// A file that is opened, mapped, stored to, unmapped and closed.
pub(crate) fn mapped_once(dir: &Path) -> Step {
    let path = whole(dir);
    Box::new(move |s| store(&mut sys::map_shared(&writable(&path(s))).unwrap(), s, 1))
}

pub(crate) fn stored_once(s: u64) -> Tree {
    let file = |k| {
        let mut bytes = pattern(0, WHOLE);
        if last(s, k, FILES) > 0 {
            bytes[PAGE as usize..PAGE as usize + 8].copy_from_slice(&last(s, k, FILES).to_le_bytes());
        }
        (format!("f{k}"), plain(bytes))
    };
    (0..FILES).map(file).collect()
}
