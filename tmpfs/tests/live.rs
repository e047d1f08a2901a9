//! Each rule by which a filesystem is saved while it is in use, by itself: what is changed when, and what the image must hold.
//!
//! Changes are made by another process, the *actor*, which does what it is told and then waits: so it is as good as frozen
//! whenever this test wants it to be. What this process does itself wouldn't be reported.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::SystemTime;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::fs::{AtFlags, CWD, IFlags, Mode, OFlags, RenameFlags, XattrFlags};
use stillframe_pgalloc::{AsyncPagesFileSave, MemoryFile, SaveOptions};
use stillframe_tmpfs::Ids;
use stillframe_tmpfs::entry::Timestamp;
use stillframe_tmpfs::live::{Live, coarse_now};
use stillframe_tmpfs::mount::open_view;
use stillframe_tmpfs::save::{SaveTreeError, TreeSummary};

#[path = "support/filesystem.rs"]
mod filesystem;
#[path = "support/sys.rs"]
mod sys;

use filesystem::{DEVICES, Saved, Tmpfs, describe, noise};

const ACTOR: &str = "STILLFRAME_TEST_ACTOR";
const PAGE: usize = 4096;

/// What the actor holds.
#[derive(Default)]
struct Held {
    files: HashMap<String, File>,
    maps: HashMap<String, memmap2::MmapMut>,
    /// Descriptors that are in no table of descriptors: on their way through a socket.
    hidden: Vec<(UnixStream, UnixStream)>,
}

impl Held {
    /// Does one thing; the words of a line.
    fn act(&mut self, words: &[&str]) {
        let open = |name: &str| OpenOptions::new().read(true).write(true).open(name).unwrap();
        match *words {
            ["open", name] => drop(self.files.insert(name.into(), open(name))),
            ["close", name] => drop(self.files.remove(name).unwrap()),
            ["map", name] => {
                drop(self.maps.insert(name.into(), sys::map_shared(&self.files[name]).unwrap()));
            }
            // Silently: the page is stored to a first time when it is mapped.
            ["touch", name] => {
                self.maps.get_mut(name).unwrap().chunks_mut(PAGE).for_each(|page| page[0] ^= 1)
            }
            ["store", name, byte] => {
                let map = self.maps.get_mut(name).unwrap();
                map[PAGE + 5] = byte.parse().unwrap();
            }
            ["unmap", name] => drop(self.maps.remove(name).unwrap()),
            ["hide", name] => {
                let file = self.files.remove(name).unwrap();
                let (one, other) = UnixStream::pair().unwrap();
                let descriptors = [file.as_raw_fd()];
                let rights = [ControlMessage::ScmRights(&descriptors)];
                let bytes = [std::io::IoSlice::new(b"x")];
                sendmsg::<()>(one.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None).unwrap();
                self.hidden.push((one, other));
            }
            ["write", name, at, byte] => {
                let bytes = vec![byte.parse::<u8>().unwrap(); 100];
                self.files.get(name).unwrap().write_all_at(&bytes, at.parse().unwrap()).unwrap();
            }
            ["resize", name, size] => open(name).set_len(size.parse().unwrap()).unwrap(),
            ["make", name, size] => fs::write(name, noise(size.parse().unwrap(), 7)).unwrap(),
            ["tmpfile", name] => {
                let file =
                    rustix::fs::openat(CWD, ".", OFlags::TMPFILE | OFlags::RDWR, Mode::from(0o600)).unwrap();
                let file = File::from(file);
                file.write_all_at(b"linked", 0).unwrap();
                let from = format!("/proc/self/fd/{}", file.as_raw_fd());
                rustix::fs::linkat(CWD, from, CWD, name, AtFlags::SYMLINK_FOLLOW).unwrap();
                self.files.insert(name.into(), file);
            }
            ["mkdir", name] => fs::create_dir(name).unwrap(),
            ["rmdir", name] => fs::remove_dir(name).unwrap(),
            ["rename", one, other] => fs::rename(one, other).unwrap(),
            ["exchange", one, other] => {
                rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).unwrap();
            }
            ["link", one, other] => fs::hard_link(one, other).unwrap(),
            ["symlink", to, name] => std::os::unix::fs::symlink(to, name).unwrap(),
            ["unlink", name] => fs::remove_file(name).unwrap(),
            ["mode", name, mode] => {
                let mode = u32::from_str_radix(mode, 8).unwrap();
                fs::set_permissions(name, fs::Permissions::from_mode(mode)).unwrap();
            }
            ["xattr", name, value] => {
                rustix::fs::setxattr(name, "user.x", value.as_bytes(), XattrFlags::empty()).unwrap();
            }
            ["flags", name] => {
                let file = File::open(name).unwrap();
                rustix::fs::ioctl_setflags(&file, IFlags::NODUMP).unwrap();
            }
            ["read", name] => drop(fs::read(name).unwrap()),
            ref unknown => panic!("{unknown:?}"),
        }
    }
}

#[test]
#[ignore = "the other process of the other tests"]
fn actor() {
    let Some(directory) = std::env::var_os(ACTOR) else { return };
    std::env::set_current_dir(directory).unwrap();
    let mut held = Held::default();
    println!("\nready");
    for line in std::io::stdin().lines() {
        held.act(&line.unwrap().split(' ').collect::<Vec<_>>());
        println!("done");
    }
}

/// A filesystem that another process uses while it is saved.
struct Used {
    filesystem: Tmpfs,
    actor: Child,
    orders: ChildStdin,
    answers: BufReader<Box<dyn Read>>,
}

impl Used {
    fn new() -> Self {
        let filesystem = Tmpfs::new(&["size=256m"]);
        for name in ["one", "two", "three"] {
            fs::write(filesystem.path().join(name), noise(5 * PAGE + 17, name.len() as u8)).unwrap();
        }
        fs::write(filesystem.path().join("large"), noise(3 << 20, 9)).unwrap();
        fs::create_dir_all(filesystem.path().join("dir/below")).unwrap();
        fs::write(filesystem.path().join("dir/below/file"), "deep").unwrap();
        let mut actor = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "actor", "--ignored", "--nocapture"])
            .env(ACTOR, filesystem.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers: Box<dyn Read> = Box::new(actor.stdout.take().unwrap());
        let orders = actor.stdin.take().unwrap();
        let mut used = Self { filesystem, actor, orders, answers: BufReader::new(answers) };
        used.await_answer("ready");
        used
    }

    fn await_answer(&mut self, wanted: &str) {
        let mut line = String::new();
        while line.trim() != wanted {
            line.clear();
            assert!(self.answers.read_line(&mut line).unwrap() > 0, "the actor has failed");
        }
    }

    /// Has the actor do all of it.
    fn act(&mut self, script: &[&str]) {
        for order in script {
            writeln!(self.orders, "{order}").unwrap();
            self.await_answer("done");
        }
    }

    /// Saves it, while the actor does `live` after the first copy, `round` after another round, and `after` when everything
    /// was read. The image, and what there was under the freeze.
    fn save(&mut self, live: &[&str], round: &[&str], after: &[&str]) -> Result<Outcome, SaveTreeError> {
        let pages = tempfile::tempfile().unwrap();
        let save = AsyncPagesFileSave::new(pages.try_clone().unwrap(), SaveOptions::default()).unwrap();
        let main = MemoryFile::main();
        let memory = save.register_memory_file(&main).unwrap();
        let mut saving = Live::begin(&open_view(self.filesystem.path()).unwrap(), None).unwrap();
        assert!(saving.copy(&memory)?);
        self.act(live);
        saving.round(&memory)?;
        self.act(round);
        let before = saving.written();
        saving.settle(&memory)?;
        let written = saving.written() - before;
        let want = describe(&self.filesystem);
        // Within a tick of the kernel's clock, before and after can't be told apart.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let now = Timestamp { sec: now.as_secs() as i64, nsec: now.subsec_nanos() };
        let mut thaw = coarse_now();
        while thaw <= now {
            std::thread::yield_now();
            thaw = coarse_now();
        }
        self.act(after);
        saving.verify(thaw)?;
        let mut pages_file = save.settle().unwrap();
        let free = saving.superseded();
        let moves = pages_file.compact(free, saving.pages()).unwrap();
        saving.relocate(|extents| moves.apply(extents));
        let finished = pages_file.finish().unwrap();
        let (archive, summary) = saving.write(&Ids::default(), Vec::new())?;
        assert!(
            finished.length <= summary.data_bytes.next_multiple_of(4096) + 4096 * summary.files,
            "no waste is left"
        );
        Ok(Outcome {
            saved: Saved { archive, summary, pages, digests: finished.digests },
            want,
            written,
            summary,
        })
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        let _ = self.actor.kill();
        let _ = self.actor.wait();
    }
}

struct Outcome {
    saved: Saved,
    want: BTreeMap<PathBuf, String>,
    /// Bytes that were written under the freeze.
    written: u64,
    summary: TreeSummary,
}

impl Outcome {
    #[track_caller]
    fn check(&self) {
        let restored = Tmpfs::new(&["size=256m"]);
        self.saved.restore(&restored, &DEVICES()).unwrap();
        let found = describe(&restored);
        for (path, want) in &self.want {
            assert_eq!(found.get(path), Some(want), "{path:?}");
        }
        assert_eq!(found.len(), self.want.len());
        assert_eq!(self.summary.entries + 1, self.want.len() as u64);
    }
}

#[test]
fn what_nobody_touches_is_not_read_again() {
    let outcome = Used::new().save(&[], &[], &[]).unwrap();
    assert_eq!(outcome.written, 0);
    outcome.check();
}

#[test]
fn stores_through_a_mapping_are_found_however_the_file_is_held() {
    // Mapped before the copy, the first stores done; with and without its descriptor.
    for close in
        [&["open one", "map one", "touch one"][..], &["open one", "map one", "touch one", "close one"]]
    {
        let mut used = Used::new();
        used.act(close);
        let outcome = used.save(&["store one 1"], &["store one 2"], &["store one 3"]).unwrap();
        assert_eq!(outcome.written, PAGE as u64, "the page that differs");
        outcome.check();
    }
    // Mapped after the copy, and after the round.
    let map = ["open one", "map one", "touch one", "store one 1"];
    Used::new().save(&map, &["store one 2"], &["store one 3"]).unwrap().check();
    Used::new().save(&[], &map, &["store one 3"]).unwrap().check();
    // A mapping that has gone, of a file that is open still: in a table of descriptors, or nowhere that can be looked at.
    for hold in [&["unmap one"][..], &["unmap one", "hide one"], &["hide one", "unmap one"]] {
        let mut used = Used::new();
        used.act(&["open one", "map one", "touch one"]);
        let script = [&["store one 5"][..], hold].concat();
        used.save(&[], &script, &[]).unwrap().check();
        let mut used = Used::new();
        used.act(&["open one", "map one", "touch one"]);
        used.save(&script, &[], &[]).unwrap().check();
    }
    // One that has gone with everything: that it was closed is all that tells.
    let mut used = Used::new();
    used.act(&["open one", "map one", "touch one"]);
    used.save(&["store one 5"], &["store one 6", "unmap one", "close one"], &[]).unwrap().check();
}

#[test]
fn of_a_large_file_only_the_pages_that_differ_are_written_again() {
    let script = ["open large", "write large 1000000 1", "write large 2000000 2"];
    let outcome = Used::new().save(&[], &script, &["write large 3 3"]).unwrap();
    assert_eq!(outcome.written, 2 * PAGE as u64);
    outcome.check();
    for (size, written) in [("5000", 1), ("6000000", 0)] {
        let outcome = Used::new().save(&[], &[&format!("resize large {size}")], &[]).unwrap();
        assert_eq!(outcome.written, written * (5000 % PAGE) as u64, "the last page, shorter now");
        outcome.check();
    }
}

#[test]
fn names_are_those_of_the_freeze() {
    let script = [
        "rename one dir/renamed",
        "exchange two three",
        "link two dir/below/link",
        "mkdir new",
        "make new/file 9000",
        "mkdir new/deeper",
        "symlink somewhere new/deeper/symlink",
        "rename dir/below new/moved",
        "unlink large",
        "make large 100",
        "tmpfile unnamed",
        "mkdir gone",
        "make gone/file 10",
        "unlink gone/file",
        "rmdir gone",
    ];
    let after =
        ["rename two later", "mkdir later-too", "unlink new/file", "rename new renamed", "unlink large"];
    Used::new().save(&script, &[], &after).unwrap().check();
    Used::new().save(&[], &script, &after).unwrap().check();
    Used::new().save(&script, &["rename new again", "rename dir new"], &[]).unwrap().check();
    // More names of a file that has changed in no other way, and fewer.
    Used::new().save(&["link one more", "link one most"], &["unlink more"], &["unlink one"]).unwrap().check();
}

#[test]
fn attributes_are_those_of_the_freeze() {
    let script =
        ["mode one 600", "xattr two value", "mode dir 711", "xattr dir/below x", "read three", "flags one"];
    let after = ["mode one 644", "xattr two other", "mode dir 755"];
    Used::new().save(&script, &[], &after).unwrap().check();
    Used::new().save(&[], &script[..5], &after).unwrap().check();
}

#[test]
fn what_is_read_tells_its_access_time_though_nobody_reports_it() {
    // With relatime a file's first read after a change sets it.
    Used::new().save(&["read one", "read dir/below/file"], &["read two"], &["read three"]).unwrap().check();
}

#[test]
fn flags_that_are_set_after_the_copy_are_found_after_the_thaw() {
    Used::new().save(&["flags one", "flags dir"], &[], &["flags two"]).unwrap().check();
}

#[test]
fn a_change_that_was_not_read_is_an_error_and_no_image() {
    let used = Used::new();
    let path = used.filesystem.path().join("one");
    // As if it had been there under the freeze: it comes after it, and the thaw is said to be later still.
    let save = AsyncPagesFileSave::new(tempfile::tempfile().unwrap(), SaveOptions::default()).unwrap();
    let main = MemoryFile::main();
    let memory = save.register_memory_file(&main).unwrap();
    let mut saving = Live::begin(&open_view(used.filesystem.path()).unwrap(), None).unwrap();
    saving.copy(&memory).unwrap();
    saving.settle(&memory).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let much_later = Timestamp { sec: coarse_now().sec + 1000, nsec: 0 };
    let error = saving.verify(much_later).unwrap_err();
    assert!(matches!(&error, SaveTreeError::Unreported { path } if path.0 == b"one"), "{error}");
}
