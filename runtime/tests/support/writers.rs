//! Writers whose every state is known: after step `s` each has a directory that holds exactly what its `expect` says.
//!
//! A step is one change by one system call (or what else makes a change visible at once), and then the step's number is
//! written to the file `counter`. So an image that has `s` there has the state of step `s`, or, if it was taken between
//! the two, of step `s + 1`.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{IoSlice, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, RenameFlags, XattrFlags};

use crate::sys;

pub const PAGE: u64 = 4096;
/// Files of most writers.
const FILES: u64 = 12;
/// Pages of a large file, more than are copied at once.
const PAGES: u64 = 400;

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    Directory,
    Symlink(Vec<u8>),
    File { content: Vec<u8>, mode: u32, xattr: Option<Vec<u8>>, names: u32 },
}

pub type Tree = BTreeMap<String, Seen>;
type Step = Box<dyn FnMut(u64) + Send>;

pub struct Writer {
    pub name: &'static str,
    /// Makes the state of step 0 in an empty directory, and gives what does a step.
    pub start: fn(&Path) -> Step,
    /// The state after a step, without `counter`.
    pub expect: fn(u64) -> Tree,
}

pub const ALL: &[Writer] = &[
    Writer { name: "pwrite", start: pwrite, expect: whole_files },
    Writer { name: "pwritev", start: pwritev, expect: whole_files },
    Writer { name: "io_uring", start: io_uring, expect: whole_files },
    Writer { name: "splice", start: splice, expect: pages },
    Writer { name: "copy_file_range", start: copy_range, expect: copied_pages },
    Writer { name: "pages", start: write_pages, expect: pages },
    Writer { name: "append", start: append, expect: appended },
    Writer { name: "resize", start: resize, expect: resized },
    Writer { name: "punch", start: punch, expect: punched },
    Writer { name: "rename", start: rename, expect: renamed },
    Writer { name: "exchange", start: exchange, expect: exchanged },
    Writer { name: "link", start: link, expect: linked },
    Writer { name: "tmpfile", start: tmpfile, expect: tmpfiles },
    Writer { name: "replace", start: replace, expect: whole_files },
    Writer { name: "xattr", start: xattr, expect: xattrs },
    Writer { name: "mode", start: mode, expect: modes },
    Writer { name: "mapped", start: mapped, expect: stored },
    Writer { name: "mapped-once", start: mapped_once, expect: stored_once },
    Writer { name: "mapped-held", start: mapped_held, expect: stored },
    Writer { name: "directory", start: directory, expect: directories },
    Writer { name: "move", start: move_directory, expect: moved },
    Writer { name: "symlink", start: symbolic, expect: symbolics },
    Writer { name: "loop", start: loop_device, expect: pages },
    Writer { name: SQLITE, start: sqlite, expect: |_| Tree::new() },
];

/// Bytes that only step `s` writes.
fn pattern(s: u64, length: u64) -> Vec<u8> {
    // Never zero, so that what isn't written is told from it.
    (s.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1).to_le_bytes().repeat(length.div_ceil(8) as usize)
        [..length as usize]
        .to_vec()
}

/// The last step up to `s` that had number `k` among `of`; 0 if none had.
fn last(s: u64, k: u64, of: u64) -> u64 {
    if s < k { 0 } else { s - (s - k) % of }
}

/// How many steps from 1 to `s` had number `k` among `of`.
fn count(s: u64, k: u64, of: u64) -> u64 {
    if k == 0 {
        s / of
    } else if s < k {
        0
    } else {
        (s - k) / of + 1
    }
}

fn plain(content: Vec<u8>) -> Seen {
    Seen::File { content, mode: 0o644, xattr: None, names: 1 }
}

fn writable(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

fn make(path: &Path, content: &[u8]) {
    fs::write(path, content).unwrap();
}

const WHOLE: u64 = 3 * PAGE;

fn whole(dir: &Path) -> impl Fn(u64) -> std::path::PathBuf + use<> {
    let dir = dir.to_owned();
    for k in 0..FILES {
        make(&dir.join(format!("f{k}")), &pattern(0, WHOLE));
    }
    move |s| dir.join(format!("f{}", s % FILES))
}

fn whole_files(s: u64) -> Tree {
    let file = |k| (format!("f{k}"), plain(pattern(last(s, k, FILES), WHOLE)));
    (0..FILES).map(file).collect()
}

fn pwrite(dir: &Path) -> Step {
    let path = whole(dir);
    Box::new(move |s| writable(&path(s)).write_all_at(&pattern(s, WHOLE), 0).unwrap())
}

fn pwritev(dir: &Path) -> Step {
    let path = whole(dir);
    Box::new(move |s| {
        let bytes = pattern(s, WHOLE);
        let (one, other) = bytes.split_at(5000);
        let written =
            nix::sys::uio::pwritev(writable(&path(s)), &[IoSlice::new(one), IoSlice::new(other)], 0);
        assert_eq!(written.unwrap() as u64, WHOLE);
    })
}

fn io_uring(dir: &Path) -> Step {
    let path = whole(dir);
    let files: Vec<File> = (0..FILES).map(|k| writable(&path(k))).collect();
    let mut ring = io_uring::IoUring::new(4).unwrap();
    Box::new(move |s| sys::ring_write(&mut ring, &files[(s % FILES) as usize], &pattern(s, WHOLE)))
}

/// A write to another file that takes its place.
fn replace(dir: &Path) -> Step {
    let path = whole(dir);
    let new = dir.join("new");
    Box::new(move |s| {
        make(&new, &pattern(s, WHOLE));
        fs::rename(&new, path(s)).unwrap();
    })
}

fn large(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("large");
    make(&path, &pattern(0, PAGES * PAGE));
    path
}

fn pages(s: u64) -> Tree {
    let content = (0..PAGES).flat_map(|page| pattern(last(s, page, PAGES), PAGE)).collect();
    Tree::from([("large".to_owned(), plain(content))])
}

fn write_pages(dir: &Path) -> Step {
    let file = writable(&large(dir));
    Box::new(move |s| file.write_all_at(&pattern(s, PAGE), s % PAGES * PAGE).unwrap())
}

fn splice(dir: &Path) -> Step {
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

fn copy_range(dir: &Path) -> Step {
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

fn copied_pages(s: u64) -> Tree {
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

fn append(dir: &Path) -> Step {
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

fn appended(s: u64) -> Tree {
    let content = (s - s % APPENDED + 1..=s).flat_map(|s| pattern(s, 24)).collect();
    Tree::from([("log".to_owned(), plain(content))])
}

fn length(s: u64, k: u64) -> u64 {
    last(s, k, FILES) * 7919 % 90_000
}

fn resize(dir: &Path) -> Step {
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

fn resized(s: u64) -> Tree {
    (0..FILES).map(|k| (format!("f{k}"), plain(vec![0; length(s, k) as usize]))).collect()
}

const HOLES: u64 = 40;

fn punch(dir: &Path) -> Step {
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

fn punched(s: u64) -> Tree {
    let page = |page| {
        let (written, punched) = (last(s, 2 * page, 2 * HOLES), last(s, 2 * page + 1, 2 * HOLES));
        if punched > written { vec![0; PAGE as usize] } else { pattern(written, PAGE) }
    };
    Tree::from([("holes".to_owned(), plain((0..HOLES).flat_map(page).collect()))])
}

fn is_odd(s: u64, k: u64) -> bool {
    !count(s, k, FILES).is_multiple_of(2)
}

/// Names are longer or shorter, in this directory or another one.
fn names(k: u64, odd: bool) -> String {
    if odd { format!("other/of-the-same-file-{k}") } else { format!("f{k}") }
}

fn rename(dir: &Path) -> Step {
    let dir = dir.to_owned();
    fs::create_dir(dir.join("other")).unwrap();
    (0..FILES).for_each(|k| make(&dir.join(names(k, false)), &pattern(k, 100)));
    Box::new(move |s| {
        let k = s % FILES;
        fs::rename(dir.join(names(k, !is_odd(s, k))), dir.join(names(k, is_odd(s, k)))).unwrap();
    })
}

fn renamed(s: u64) -> Tree {
    let files = (0..FILES).map(|k| (names(k, is_odd(s, k)), plain(pattern(k, 100))));
    files.chain([("other".to_owned(), Seen::Directory)]).collect()
}

fn exchange(dir: &Path) -> Step {
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

fn exchanged(s: u64) -> Tree {
    let file = |(k, odd)| (names(k, odd), plain(pattern(2 * k + u64::from(odd ^ is_odd(s, k)), 100)));
    let files = (0..FILES).flat_map(|k| [(k, false), (k, true)]).map(file);
    files.chain([("other".to_owned(), Seen::Directory)]).collect()
}

fn link(dir: &Path) -> Step {
    let dir = dir.to_owned();
    fs::create_dir(dir.join("other")).unwrap();
    (0..FILES).for_each(|k| make(&dir.join(names(k, false)), &pattern(k, 100)));
    Box::new(move |s| {
        let k = s % FILES;
        let (first, second) = (dir.join(names(k, false)), dir.join(names(k, true)));
        if is_odd(s, k) { fs::hard_link(first, second) } else { fs::remove_file(second) }.unwrap();
    })
}

fn linked(s: u64) -> Tree {
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
fn tmpfile(dir: &Path) -> Step {
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

fn tmpfiles(s: u64) -> Tree {
    let there = (0..FILES).filter(|k| is_odd(s, *k));
    there.map(|k| (format!("f{k}"), plain(pattern(last(s, k, FILES), WHOLE)))).collect()
}

fn small(dir: &Path) -> impl Fn(u64) -> std::path::PathBuf + use<> {
    let dir = dir.to_owned();
    (0..FILES).for_each(|k| make(&dir.join(format!("f{k}")), &pattern(k, 100)));
    move |s| dir.join(format!("f{}", s % FILES))
}

fn xattr(dir: &Path) -> Step {
    let path = small(dir);
    Box::new(move |s| {
        rustix::fs::setxattr(path(s), "user.step", &s.to_le_bytes(), XattrFlags::empty()).unwrap();
    })
}

fn xattrs(s: u64) -> Tree {
    let file = |k| {
        let xattr = Some(last(s, k, FILES)).filter(|s| *s > 0).map(|s| s.to_le_bytes().to_vec());
        (format!("f{k}"), Seen::File { content: pattern(k, 100), mode: 0o644, xattr, names: 1 })
    };
    (0..FILES).map(file).collect()
}

fn mode(dir: &Path) -> Step {
    let path = small(dir);
    Box::new(move |s| fs::set_permissions(path(s), Permissions::from_mode(s as u32 % 0o1000)).unwrap())
}

fn modes(s: u64) -> Tree {
    let file = |k| {
        let mode = match last(s, k, FILES) {
            0 => 0o644,
            s => s as u32 % 0o1000,
        };
        (format!("f{k}"), Seen::File { content: pattern(k, 100), mode, xattr: None, names: 1 })
    };
    (0..FILES).map(file).collect()
}

fn store(map: &mut memmap2::MmapMut, s: u64, page: u64) {
    let at = (page * PAGE) as usize;
    // One store, so that it is there or isn't.
    sys::store(&mut map[at..at + 8], s);
}

/// One mapping for all its life, whose descriptor is closed.
fn mapped(dir: &Path) -> Step {
    let mut map = sys::map_shared(&writable(&large(dir))).unwrap();
    Box::new(move |s| store(&mut map, s, s % PAGES))
}

/// A mapping for each store, of a file that is held open.
fn mapped_held(dir: &Path) -> Step {
    let file = writable(&large(dir));
    Box::new(move |s| store(&mut sys::map_shared(&file).unwrap(), s, s % PAGES))
}

fn stored(s: u64) -> Tree {
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
fn mapped_once(dir: &Path) -> Step {
    let path = whole(dir);
    Box::new(move |s| store(&mut sys::map_shared(&writable(&path(s))).unwrap(), s, 1))
}

fn stored_once(s: u64) -> Tree {
    let file = |k| {
        let mut bytes = pattern(0, WHOLE);
        if last(s, k, FILES) > 0 {
            bytes[PAGE as usize..PAGE as usize + 8].copy_from_slice(&last(s, k, FILES).to_le_bytes());
        }
        (format!("f{k}"), plain(bytes))
    };
    (0..FILES).map(file).collect()
}

fn directory(dir: &Path) -> Step {
    let dir = dir.to_owned();
    Box::new(move |s| {
        let path = dir.join(format!("d{}", s % FILES));
        if is_odd(s, s % FILES) { fs::create_dir(path) } else { fs::remove_dir(path) }.unwrap();
    })
}

fn directories(s: u64) -> Tree {
    (0..FILES).filter(|k| is_odd(s, *k)).map(|k| (format!("d{k}"), Seen::Directory)).collect()
}

fn move_directory(dir: &Path) -> Step {
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

fn moved(s: u64) -> Tree {
    let mut tree = Tree::from([("other".to_owned(), Seen::Directory)]);
    for k in 0..FILES {
        let name = names(k, is_odd(s, k));
        tree.insert(format!("{name}/deep"), Seen::Directory);
        tree.insert(format!("{name}/deep/file"), plain(pattern(k, 100)));
        tree.insert(name, Seen::Directory);
    }
    tree
}

fn symbolic(dir: &Path) -> Step {
    let dir = dir.to_owned();
    Box::new(move |s| {
        let path = dir.join(format!("f{}", s % FILES));
        if is_odd(s, s % FILES) { symlink(s.to_string(), path) } else { fs::remove_file(path) }.unwrap();
    })
}

fn symbolics(s: u64) -> Tree {
    let there = (0..FILES).filter(|k| is_odd(s, *k));
    there.map(|k| (format!("f{k}"), Seen::Symlink(last(s, k, FILES).to_string().into_bytes()))).collect()
}

/// The writer whose files only SQLite can read; see [`steps_of_database`].
pub const SQLITE: &str = "sqlite";

/// Transactions of SQLite with its write-ahead log, the index of which is mapped.
fn sqlite(dir: &Path) -> Step {
    let database = rusqlite::Connection::open(dir.join("db")).unwrap();
    database.pragma_update(None, "journal_mode", "wal").unwrap();
    database.pragma_update(None, "synchronous", "off").unwrap();
    database.execute_batch("create table steps (step integer, twice integer, filler blob)").unwrap();
    Box::new(move |s| {
        let sql = "insert into steps values (?1, ?1 + ?1, randomblob(500)); ";
        database.execute(sql, [s as i64]).unwrap();
        if s.is_multiple_of(300) {
            database.execute("delete from steps where step < ?1", [s as i64]).unwrap();
        }
    })
}

/// The steps in the database among `files`, first and last, if it is whole.
pub fn steps_of_database(files: &Tree, scratch: &Path) -> Result<(u64, u64), String> {
    for (name, file) in files {
        let Seen::File { content, .. } = file else { return Err(format!("{name} is no file")) };
        make(&scratch.join(name), content);
    }
    let failed = |error: rusqlite::Error| error.to_string();
    let database = rusqlite::Connection::open(scratch.join("db")).map_err(failed)?;
    let whole: String = database.query_row("pragma integrity_check", [], |row| row.get(0)).map_err(failed)?;
    if whole != "ok" {
        return Err(whole);
    }
    let sql = "select coalesce(min(step), 0), coalesce(max(step), 0), count(*), total(twice - step - step) from steps";
    let (first, last, count, wrong): (i64, i64, i64, f64) = database
        .query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))
        .map_err(failed)?;
    let all = count == if last == 0 { 0 } else { last - first + 1 };
    if all && wrong == 0.0 {
        Ok((first as u64, last as u64))
    } else {
        Err(format!("{count} steps of {first} to {last}"))
    }
}

/// Direct writes to a loop device, which the kernel itself does to the file.
fn loop_device(dir: &Path) -> Step {
    let path = large(dir);
    let attached = Command::new("losetup").args(["--find", "--show"]).arg(&path).output().unwrap();
    assert!(attached.status.success(), "{}", String::from_utf8_lossy(&attached.stderr));
    let device = String::from_utf8(attached.stdout).unwrap();
    let open = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(device.trim()).unwrap();
    // It goes when it is closed.
    assert!(Command::new("losetup").args(["-d", device.trim()]).status().unwrap().success());
    let mut page = memmap2::MmapMut::map_anon(PAGE as usize).unwrap();
    Box::new(move |s| {
        page.copy_from_slice(&pattern(s, PAGE));
        open.write_all_at(&page, s % PAGES * PAGE).unwrap();
    })
}
