//! Writers of files' contents: every call that changes bytes or a size.

use std::fs::{self, File, OpenOptions};
use std::io::{IoSlice, Write as _};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{CWD, FallocateFlags, FileType, Mode};

use crate::{FILES, PAGE, PAGES, Step, Tree, last, make, pattern, plain, sys, writable};

/// The number of the loop devices' driver (Documentation/admin-guide/devices.txt), and how many are tried.
const LOOP_MAJOR: u32 = 7;
const LOOPS: u32 = 64;

pub(crate) const WHOLE: u64 = 3 * PAGE;

pub(crate) fn whole(dir: &Path) -> impl Fn(u64) -> PathBuf + use<> {
    let dir = dir.to_owned();
    for k in 0..FILES {
        make(&dir.join(format!("f{k}")), &pattern(0, WHOLE));
    }
    move |s| dir.join(format!("f{}", s % FILES))
}

pub(crate) fn whole_files(s: u64) -> Tree {
    let file = |k| (format!("f{k}"), plain(pattern(last(s, k, FILES), WHOLE)));
    (0..FILES).map(file).collect()
}

pub(crate) fn pwrite(dir: &Path) -> Step {
    let path = whole(dir);
    Box::new(move |s| writable(&path(s)).write_all_at(&pattern(s, WHOLE), 0).unwrap())
}

pub(crate) fn pwritev(dir: &Path) -> Step {
    let path = whole(dir);
    Box::new(move |s| {
        let bytes = pattern(s, WHOLE);
        let (one, other) = bytes.split_at(5000);
        let written =
            nix::sys::uio::pwritev(writable(&path(s)), &[IoSlice::new(one), IoSlice::new(other)], 0);
        assert_eq!(written.unwrap() as u64, WHOLE);
    })
}

pub(crate) fn io_uring(dir: &Path) -> Step {
    let path = whole(dir);
    let files: Vec<File> = (0..FILES).map(|k| writable(&path(k))).collect();
    let mut ring = io_uring::IoUring::new(4).unwrap();
    Box::new(move |s| sys::ring_write(&mut ring, &files[(s % FILES) as usize], &pattern(s, WHOLE)))
}

/// A write to another file that takes its place.
pub(crate) fn replace(dir: &Path) -> Step {
    let path = whole(dir);
    let new = dir.join("new");
    Box::new(move |s| {
        make(&new, &pattern(s, WHOLE));
        fs::rename(&new, path(s)).unwrap();
    })
}

pub(crate) fn large(dir: &Path) -> PathBuf {
    let path = dir.join("large");
    make(&path, &pattern(0, PAGES * PAGE));
    path
}

pub(crate) fn pages(s: u64) -> Tree {
    let content = (0..PAGES).flat_map(|page| pattern(last(s, page, PAGES), PAGE)).collect();
    Tree::from([("large".to_owned(), plain(content))])
}

pub(crate) fn write_pages(dir: &Path) -> Step {
    let file = writable(&large(dir));
    Box::new(move |s| file.write_all_at(&pattern(s, PAGE), s % PAGES * PAGE).unwrap())
}

pub(crate) fn splice(dir: &Path) -> Step {
    let file = writable(&large(dir));
    let (reader, writer) = std::io::pipe().unwrap();
    let mut writer = File::from(std::os::fd::OwnedFd::from(writer));
    Box::new(move |s| {
        writer.write_all(&pattern(s, PAGE)).unwrap();
        let mut at = (s % PAGES * PAGE) as i64;
        let flags = nix::fcntl::SpliceFFlags::empty();
        let moved = nix::fcntl::splice(&reader, None, &file, Some(&mut at), PAGE as usize, flags).unwrap();
        assert_eq!(moved as u64, PAGE);
    })
}

const SOURCES: u64 = 50;

pub(crate) fn copy_range(dir: &Path) -> Step {
    let file = writable(&large(dir));
    let source = dir.join("source");
    make(&source, &(0..SOURCES).flat_map(|n| pattern(n + 1, PAGE)).collect::<Vec<_>>());
    let source = File::open(source).unwrap();
    Box::new(move |s| {
        let (mut from, mut to) = ((s % SOURCES * PAGE) as i64, (s % PAGES * PAGE) as i64);
        let copied =
            nix::fcntl::copy_file_range(&source, Some(&mut from), &file, Some(&mut to), PAGE as usize);
        assert_eq!(copied.unwrap() as u64, PAGE);
    })
}

pub(crate) fn copied_pages(s: u64) -> Tree {
    let page = |page| match last(s, page, PAGES) {
        0 => pattern(0, PAGE),
        s => pattern(s % SOURCES + 1, PAGE),
    };
    let source = (0..SOURCES).flat_map(|n| pattern(n + 1, PAGE)).collect();
    Tree::from([
        ("large".to_owned(), plain((0..PAGES).flat_map(page).collect())),
        ("source".to_owned(), plain(source)),
    ])
}

const APPENDED: u64 = 700;

pub(crate) fn append(dir: &Path) -> Step {
    let path = dir.join("log");
    make(&path, b"");
    let mut file = OpenOptions::new().append(true).open(path).unwrap();
    Box::new(move |s| {
        if s.is_multiple_of(APPENDED) {
            file.set_len(0).unwrap();
        } else {
            file.write_all(&pattern(s, 24)).unwrap();
        }
    })
}

pub(crate) fn appended(s: u64) -> Tree {
    let content = (s - s % APPENDED + 1..=s).flat_map(|s| pattern(s, 24)).collect();
    Tree::from([("log".to_owned(), plain(content))])
}

fn length(s: u64, k: u64) -> u64 {
    last(s, k, FILES) * 7919 % 90_000
}

pub(crate) fn resize(dir: &Path) -> Step {
    let dir = dir.to_owned();
    for k in 0..FILES {
        make(&dir.join(format!("f{k}")), b"");
    }
    Box::new(move |s| {
        let path = dir.join(format!("f{}", s % FILES));
        // By its path, and by a descriptor.
        if s.is_multiple_of(2) {
            nix::unistd::truncate(&path, length(s, s % FILES) as i64).unwrap();
        } else {
            writable(&path).set_len(length(s, s % FILES)).unwrap();
        }
    })
}

pub(crate) fn resized(s: u64) -> Tree {
    (0..FILES).map(|k| (format!("f{k}"), plain(vec![0; length(s, k) as usize]))).collect()
}

const HOLES: u64 = 40;

pub(crate) fn punch(dir: &Path) -> Step {
    let path = dir.join("holes");
    make(&path, &pattern(0, HOLES * PAGE));
    let file = writable(&path);
    Box::new(move |s| {
        let at = s / 2 % HOLES * PAGE;
        if s.is_multiple_of(2) {
            file.write_all_at(&pattern(s, PAGE), at).unwrap();
        } else {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, flags, at, PAGE).unwrap();
        }
    })
}

pub(crate) fn punched(s: u64) -> Tree {
    let page = |page| {
        let (written, punched) = (last(s, 2 * page, 2 * HOLES), last(s, 2 * page + 1, 2 * HOLES));
        if punched > written { vec![0; PAGE as usize] } else { pattern(written, PAGE) }
    };
    Tree::from([("holes".to_owned(), plain((0..HOLES).flat_map(page).collect()))])
}

/// Direct writes to a loop device, which the kernel itself does to the file.
pub(crate) fn loop_device(dir: &Path) -> Step {
    let device = attach(&large(dir));
    let open = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&device).unwrap();
    // It goes when it is closed.
    losetup(&[Path::new("-d"), &device]).unwrap();
    let mut page = memmap2::MmapMut::map_anon(PAGE as usize).unwrap();
    Box::new(move |s| {
        page.copy_from_slice(&pattern(s, PAGE));
        open.write_all_at(&page, s % PAGES * PAGE).unwrap();
    })
}

/// Attaches a file to the first loop device that takes it. busybox's `losetup` can't find one and say which.
fn attach(file: &Path) -> PathBuf {
    let mut failed = String::new();
    for number in 0..LOOPS {
        let device = PathBuf::from(format!("/dev/loop{number}"));
        // A container's /dev has nodes only for those that were there when it was made.
        if !device.exists() {
            let (kind, id) = (FileType::BlockDevice, rustix::fs::makedev(LOOP_MAJOR, number));
            rustix::fs::mknodat(CWD, &device, kind, Mode::from(0o600), id).unwrap();
        }
        match losetup(&[&device, file]) {
            Ok(()) => return device,
            Err(error) => failed = error,
        }
    }
    panic!("no loop device takes {}: {failed}", file.display());
}

fn losetup(arguments: &[&Path]) -> Result<(), String> {
    let said = Command::new("losetup").args(arguments).output().map_err(|error| error.to_string())?;
    said.status.success().then_some(()).ok_or_else(|| String::from_utf8_lossy(&said.stderr).into_owned())
}
