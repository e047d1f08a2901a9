//! Trees that are made by several threads, with whatever umask the process has, in a root that may hand its group down.

#[path = "support/filesystem.rs"]
mod filesystem;

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, IFlags, Mode, XattrFlags};
use stillframe_pgalloc::{AsyncPagesFileLoad, LoadOptions, LoadTarget};
use stillframe_tmpfs::build::{BuildError, build_names, build_tree};
use stillframe_tmpfs::lazy::{Loading, SmallFiles};
use stillframe_tmpfs::mount::{open_root, open_view};

use filesystem::{DEVICES, Saved, Tmpfs, describe, noise, save, set_times};

const DIRECTORIES: usize = 60;
const LARGE: u64 = 64 * 1024;

/// Files of all sizes and owners, links there and back between directories, and one directory with very many names.
fn fill(root: &Path) {
    let dir = |number: usize| root.join(format!("d{}/sub{number}", number % 7));
    for number in 0..DIRECTORIES {
        fs::create_dir_all(dir(number)).unwrap();
        for file in 0..30 {
            let path = dir(number).join(format!("f{}", (file * 17) % 30));
            let size = [4096, 1, 0, 9000, 20_000, 70_000][(number + file) % 6];
            fs::write(&path, noise(size, (number * 30 + file) as u8)).unwrap();
            match file {
                3 => chown(&path, Some(1000 + number as u32), Some(7)).unwrap(),
                5 => File::options().write(true).open(&path).unwrap().set_len(30_000).unwrap(),
                7 => rustix::fs::lsetxattr(&path, "user.x", b"value", XattrFlags::empty()).unwrap(),
                9 => fs::create_dir(dir(number).join("between")).unwrap(),
                11 => symlink("anywhere", dir(number).join("link")).unwrap(),
                _ => {}
            }
            let mode = [0o644, 0o600, 0o777, 0o6755, 0o000, 0o1666][file % 6];
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        }
    }
    for number in 0..DIRECTORIES {
        for (other, name) in [((number + 1) % DIRECTORIES, "f4"), ((number + 31) % DIRECTORIES, "f0")] {
            let link = dir(number).join(format!("to-{other}-{name}"));
            rustix::fs::linkat(CWD, dir(other).join(name), CWD, link, AtFlags::empty()).unwrap();
            fs::write(dir(number).join(format!("after-{other}-{name}")), b"after").unwrap();
        }
        let file = File::open(dir(number).join("f4")).unwrap();
        let own = rustix::fs::ioctl_getflags(&file).unwrap();
        rustix::fs::ioctl_setflags(&file, own | IFlags::NODUMP).unwrap();
    }
    fs::create_dir(root.join("crowd")).unwrap();
    for file in 0..5000 {
        fs::write(root.join(format!("crowd/{file}")), noise(100, file as u8)).unwrap();
    }
    let immutable = File::open(dir(3).join("f4")).unwrap();
    let own = rustix::fs::ioctl_getflags(&immutable).unwrap();
    rustix::fs::ioctl_setflags(&immutable, own | IFlags::IMMUTABLE).unwrap();
    set_times(&dir(5).join("f1"), (1_700_000_000, 123_456_789), (5, 6));
    set_times(&dir(5), (-7, 8), (9, 10));
}

/// The names of each directory in the order in which it lists them; read through a view, so that looking changes nothing.
fn listings(filesystem: &Tmpfs) -> BTreeMap<PathBuf, Vec<Vec<u8>>> {
    let view = open_view(filesystem.path()).unwrap();
    let root = PathBuf::from(format!("/proc/self/fd/{}/", view.as_raw_fd()));
    let mut all = BTreeMap::new();
    let mut left = vec![root.clone()];
    while let Some(dir) = left.pop() {
        let entries: Vec<_> = fs::read_dir(&dir).unwrap().map(Result::unwrap).collect();
        left.extend(entries.iter().filter(|e| e.file_type().unwrap().is_dir()).map(|e| e.path()));
        let names = entries.iter().map(|entry| entry.file_name().as_bytes().to_vec()).collect();
        all.insert(dir.strip_prefix(&root).unwrap().to_owned(), names);
    }
    all
}

/// A target whose root has that mode, setgid to hand its group down, in a process whose umask takes everything away.
fn target(mode: u32) -> Tmpfs {
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let target = Tmpfs::new(&[]);
    chown(target.path(), Some(3), Some(5)).unwrap();
    fs::set_permissions(target.path(), Permissions::from_mode(mode)).unwrap();
    target
}

fn loader(saved: &Saved) -> AsyncPagesFileLoad {
    let pages = saved.pages.try_clone().unwrap();
    AsyncPagesFileLoad::new(pages, saved.digests.clone(), LoadOptions::default()).unwrap()
}

fn assert_same(old: &Tmpfs, new: &Tmpfs) {
    let (before, after) = (describe(old), describe(new));
    for (path, text) in &before {
        assert_eq!(after.get(path), Some(text), "{path:?}");
    }
    assert_eq!(before.len(), after.len());
    assert_eq!(listings(old), listings(new));
}

#[test]
fn a_wide_tree_comes_back_whole_and_in_order() {
    let old = Tmpfs::new(&[]);
    fill(old.path());
    let saved = save(&old);
    for mode in [0o755, 0o2770, 0o755] {
        let new = target(mode);
        saved.restore(&new, &DEVICES()).unwrap();
        assert_same(&old, &new);
    }
}

#[test]
fn names_first_and_contents_later_are_the_same() {
    let old = Tmpfs::new(&[]);
    fill(old.path());
    let saved = save(&old);
    let tree = saved.tree();
    let new = target(0o755);
    let root = open_root(new.path()).unwrap();
    let (large, small) = build_names(&root, &tree, &DEVICES(), LARGE).unwrap();
    assert_eq!(listings(&old), listings(&new));
    assert!(large.iter().all(|file| file.bytes() >= LARGE && file.may_be_gated()));
    assert_eq!((large.len(), small.is_empty()), (280, false));
    let text = serde_json::to_vec(&small).unwrap();
    let small: SmallFiles = serde_json::from_slice(&text).unwrap();
    let bytes = large.iter().map(|file| file.bytes()).sum::<u64>() + small.bytes();
    assert_eq!(bytes, saved.summary.data_bytes);
    let (files, loader) = (small.len() + large.len(), loader(&saved));
    small.load(&root, &loader).unwrap();
    for pending in &large {
        let file = pending.open(&root).unwrap();
        let begun = Loading::begin(pending, &file).unwrap();
        let target = LoadTarget {
            on_loaded: Some(Box::new(move |file| begun.complete(file))),
            ..LoadTarget::new(Arc::new(file), pending.extents())
        };
        loader.load_ranges_into(vec![target]).unwrap();
    }
    assert_eq!(loader.finish().unwrap().files, files as u64);
    assert_same(&old, &new);
}

#[test]
fn small_files_can_be_loaded_again() {
    let old = Tmpfs::new(&[]);
    for (name, flags) in [("plain", IFlags::empty()), ("i", IFlags::IMMUTABLE), ("a", IFlags::APPEND)] {
        let path = old.path().join(name);
        fs::write(&path, noise(5000, 3)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o4555)).unwrap();
        let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        rustix::fs::setxattr(&path, "security.capability", &capability, XattrFlags::empty()).unwrap();
        rustix::fs::ioctl_setflags(File::open(&path).unwrap(), flags).unwrap();
    }
    let saved = save(&old);
    let new = target(0o755);
    let root = open_root(new.path()).unwrap();
    let (_, small) = build_names(&root, &saved.tree(), &DEVICES(), LARGE).unwrap();
    assert_eq!(small.len(), 3);
    // As by a process that dies before it has said that all are loaded, and the next one.
    for _ in 0..2 {
        let loader = loader(&saved);
        small.clone().load(&root, &loader).unwrap();
        loader.finish().unwrap();
        assert_same(&old, &new);
    }
}

#[test]
fn a_name_that_is_there_already_is_an_error_that_says_which() {
    let old = Tmpfs::new(&[]);
    fill(old.path());
    let saved = save(&old);
    let tree = saved.tree();
    let new = target(0o2770);
    fs::create_dir_all(new.path().join("d2/sub9")).unwrap();
    fs::write(new.path().join("d2/sub9/f1"), b"").unwrap();
    let root = open_root(new.path()).unwrap();
    let names = build_names(&root, &tree, &DEVICES(), LARGE).map(drop).unwrap_err();
    let options = DEVICES();
    let empty = target(0o2770);
    fs::create_dir_all(empty.path().join("d2/sub9")).unwrap();
    fs::write(empty.path().join("d2/sub9/f1"), b"").unwrap();
    let root = open_root(empty.path()).unwrap();
    let loader = loader(&saved);
    let whole = build_tree(&root, &tree, &options, &loader).map(drop).unwrap_err();
    for error in [names, whole] {
        let text = error.to_string();
        assert!(text.contains("make \"/d2/sub9/f1\""), "{text}");
        assert!(matches!(&error, BuildError::Object { source, .. }
            if source.kind() == std::io::ErrorKind::AlreadyExists));
    }
}
