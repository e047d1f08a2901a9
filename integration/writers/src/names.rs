//! Writers of names: directories, links, renames.

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};

use crate::contents::WHOLE;
use crate::{FILES, Seen, Step, Tree, count, last, make, make_small, pattern, plain};

fn is_odd(s: u64, k: u64) -> bool {
    !count(s, k, FILES).is_multiple_of(2)
}

/// Names are longer or shorter, in this directory or another one.
fn names(k: u64, odd: bool) -> String {
    if odd { format!("other/of-the-same-file-{k}") } else { format!("f{k}") }
}

pub(crate) fn rename(dir: &Path) -> Step {
    let dir = dir.to_owned();
    fs::create_dir(dir.join("other")).unwrap();
    make_small(&dir);
    Box::new(move |s| {
        let k = s % FILES;
        fs::rename(dir.join(names(k, !is_odd(s, k))), dir.join(names(k, is_odd(s, k)))).unwrap();
    })
}

pub(crate) fn renamed(s: u64) -> Tree {
    let files = (0..FILES).map(|k| (names(k, is_odd(s, k)), plain(pattern(k, 100))));
    files.chain([("other".to_owned(), Seen::Directory)]).collect()
}

pub(crate) fn exchange(dir: &Path) -> Step {
    let dir = dir.to_owned();
    fs::create_dir(dir.join("other")).unwrap();
    for (k, odd) in (0..FILES).flat_map(|k| [(k, false), (k, true)]) {
        make(&dir.join(names(k, odd)), &pattern(2 * k + u64::from(odd), 100));
    }
    Box::new(move |s| {
        let (one, other) = (dir.join(names(s % FILES, false)), dir.join(names(s % FILES, true)));
        rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).unwrap();
    })
}

pub(crate) fn exchanged(s: u64) -> Tree {
    let file = |(k, odd)| (names(k, odd), plain(pattern(2 * k + u64::from(odd ^ is_odd(s, k)), 100)));
    let files = (0..FILES).flat_map(|k| [(k, false), (k, true)]).map(file);
    files.chain([("other".to_owned(), Seen::Directory)]).collect()
}

pub(crate) fn link(dir: &Path) -> Step {
    let dir = dir.to_owned();
    fs::create_dir(dir.join("other")).unwrap();
    make_small(&dir);
    Box::new(move |s| {
        let k = s % FILES;
        let (first, second) = (dir.join(names(k, false)), dir.join(names(k, true)));
        if is_odd(s, k) { fs::hard_link(first, second) } else { fs::remove_file(second) }.unwrap();
    })
}

pub(crate) fn linked(s: u64) -> Tree {
    let mut tree = Tree::from([("other".to_owned(), Seen::Directory)]);
    for k in 0..FILES {
        let names_of = if is_odd(s, k) { vec![false, true] } else { vec![false] };
        let file =
            Seen::File { content: pattern(k, 100), mode: 0o644, xattr: None, names: names_of.len() as u32 };
        tree.extend(names_of.into_iter().map(|odd| (names(k, odd), file.clone())));
    }
    tree
}

/// Files come by O_TMPFILE and linkat, so with all that is in them, and go.
pub(crate) fn tmpfile(dir: &Path) -> Step {
    let dir = dir.to_owned();
    Box::new(move |s| {
        let path = dir.join(format!("f{}", s % FILES));
        if !is_odd(s, s % FILES) {
            return fs::remove_file(path).unwrap();
        }
        let flags = OFlags::TMPFILE | OFlags::RDWR;
        let file = File::from(rustix::fs::openat(CWD, &dir, flags, Mode::from(0o644)).unwrap());
        file.write_all_at(&pattern(s, WHOLE), 0).unwrap();
        let from = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::linkat(CWD, from, CWD, path, AtFlags::SYMLINK_FOLLOW).unwrap();
    })
}

pub(crate) fn tmpfiles(s: u64) -> Tree {
    let there = (0..FILES).filter(|k| is_odd(s, *k));
    there.map(|k| (format!("f{k}"), plain(pattern(last(s, k, FILES), WHOLE)))).collect()
}

pub(crate) fn directory(dir: &Path) -> Step {
    let dir = dir.to_owned();
    Box::new(move |s| {
        let path = dir.join(format!("d{}", s % FILES));
        if is_odd(s, s % FILES) { fs::create_dir(path) } else { fs::remove_dir(path) }.unwrap();
    })
}

pub(crate) fn directories(s: u64) -> Tree {
    (0..FILES).filter(|k| is_odd(s, *k)).map(|k| (format!("d{k}"), Seen::Directory)).collect()
}

pub(crate) fn move_directory(dir: &Path) -> Step {
    let dir = dir.to_owned();
    fs::create_dir(dir.join("other")).unwrap();
    for k in 0..FILES {
        fs::create_dir_all(dir.join(names(k, false)).join("deep")).unwrap();
        make(&dir.join(names(k, false)).join("deep/file"), &pattern(k, 100));
    }
    Box::new(move |s| {
        let k = s % FILES;
        fs::rename(dir.join(names(k, !is_odd(s, k))), dir.join(names(k, is_odd(s, k)))).unwrap();
    })
}

pub(crate) fn moved(s: u64) -> Tree {
    let mut tree = Tree::from([("other".to_owned(), Seen::Directory)]);
    for k in 0..FILES {
        let name = names(k, is_odd(s, k));
        tree.insert(format!("{name}/deep"), Seen::Directory);
        tree.insert(format!("{name}/deep/file"), plain(pattern(k, 100)));
        tree.insert(name, Seen::Directory);
    }
    tree
}

pub(crate) fn symbolic(dir: &Path) -> Step {
    let dir = dir.to_owned();
    Box::new(move |s| {
        let path = dir.join(format!("f{}", s % FILES));
        if is_odd(s, s % FILES) { symlink(s.to_string(), path) } else { fs::remove_file(path) }.unwrap();
    })
}

pub(crate) fn symbolics(s: u64) -> Tree {
    let there = (0..FILES).filter(|k| is_odd(s, *k));
    there.map(|k| (format!("f{k}"), Seen::Symlink(last(s, k, FILES).to_string().into_bytes()))).collect()
}
