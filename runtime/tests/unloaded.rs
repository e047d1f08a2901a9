//! Checkpoints while files are being loaded: they wait for none of them, and hold each as it is to be and whatever was done to it.
//!
//! The oracle is the filesystem itself: after a checkpoint that kills the containers nothing changes it any more but those
//! who load it, so when they are done it is what the image has to hold.

#[path = "support/behind.rs"]
mod behind;
#[path = "support/pod.rs"]
mod pod;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant};

use behind::{begin, contents, end, lazy_pod, sleep};
use pod::Pod;
use stillframe_integration::reads::Reads;
use stillframe_runtime::freezer::{Cgroup, FREEZE_TIMEOUT};
use stillframe_runtime::sandbox::{CheckpointRequest, CheckpointResult, LoadPhase, LoadStatus};

const LARGE: usize = 40;
const SIZE: usize = (1 << 20) + 77;
const SMALL: usize = 100;

fn config(options: &str) -> String {
    format!(
        r#""root": {{"path": "rootfs"}}, "mounts": [
        {{"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["size=512m"{options}]}}]"#
    )
}

/// The same, with annotations that ask for files to be copied before a pause.
fn asking_for_copies(options: &str, pages: &Path) -> String {
    let annotations =
        format!(r#""dev.stillframe.precopy": "on", "dev.stillframe.image-dir": "{}""#, pages.display());
    format!(r#"{}, "annotations": {{{annotations}}}"#, config(options))
}

fn large(index: usize) -> String {
    format!("dir{}/large{index}", index % 3)
}

fn small(index: usize) -> String {
    format!("dir{}/small{index}", index % 3)
}

struct Saved {
    dir: tempfile::TempDir,
    image: PathBuf,
}

fn save() -> Saved {
    let mut pod = Pod::new();
    pod.running("c", &config(""));
    let root = pod.mount("c.0");
    let large = (0..LARGE).map(|index| (large(index), SIZE));
    let small = (0..SMALL).map(|index| (small(index), 100 + index * 13));
    for (index, (name, size)) in large.chain(small).enumerate() {
        let path = root.join(&name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut bytes = contents(&name, size);
        if index % 4 == 1 && size == SIZE {
            // With a hole.
            bytes[200_000..500_000].fill(0);
        }
        fs::write(&path, bytes).unwrap();
        std::os::unix::fs::chown(&path, Some(index as u32), Some(7)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o4750)).unwrap();
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let image = dir.path().join("image");
    pod.checkpoint("c", &image, &[]).unwrap();
    Saved { dir, image }
}

/// Everything in a filesystem by its path: attributes, and contents or, of those that aren't files, nothing.
type Listing = BTreeMap<PathBuf, ([i64; 7], Vec<u8>)>;

fn list(root: &Path) -> Listing {
    let mut listing = Listing::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let m = path.symlink_metadata().unwrap();
            let size = if m.is_file() { m.size().cast_signed() } else { 0 };
            let numbers = [
                i64::from(m.mode()),
                i64::from(m.uid()),
                size,
                m.nlink().cast_signed(),
                if m.is_file() { m.mtime() } else { 0 },
                if m.is_file() { m.mtime_nsec() } else { 0 },
                i64::from(m.gid()),
            ];
            let bytes = if m.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            if m.is_dir() {
                directories.push(path.clone());
            }
            listing.insert(path.strip_prefix(root).unwrap().to_owned(), (numbers, bytes));
        }
    }
    listing
}

fn assert_same(found: &Listing, want: &Listing, context: &str) {
    let names = |listing: &Listing| listing.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(want), "{context}");
    for (name, (attributes, bytes)) in want {
        let (found, there) = &found[name];
        assert_eq!(found, attributes, "{} {context}", name.display());
        let at = bytes.iter().zip(there).position(|(want, there)| want != there);
        assert!(bytes == there, "{} differs at {at:?} {context}", name.display());
    }
}

/// What the image holds.
fn restored(image: &Path, options: &str) -> Listing {
    let mut pod = Pod::new();
    pod.prepare("c", &config(options), Some(image)).unwrap();
    list(&pod.mount("c.0"))
}

fn status(pod: &Pod) -> LoadStatus {
    pod.sandbox.load_status("c").unwrap().remove(0).1
}

/// A pod that is restored, with its reads of the image held once its container could have started.
fn held(saved: &Saved, config: &str) -> (Pod, Reads) {
    let mut pod = lazy_pod();
    let sandbox = pod.sandbox.clone();
    let started = move |_| {
        let status = sandbox.load_status("c").unwrap_or_default();
        status.first().is_some_and(|(_, status)| status.phase >= LoadPhase::Large)
    };
    let reads = Reads::of(&saved.image.join("pages.img"), started);
    pod.prepare("c", config, Some(&saved.image)).unwrap();
    (pod, reads)
}

fn checkpoint(
    pod: &Pod,
    image: &Path,
    change: impl Fn(&mut CheckpointRequest),
) -> Result<CheckpointResult, String> {
    let mut request = CheckpointRequest::new("c", image);
    change(&mut request);
    pod.sandbox.checkpoint(&request).map_err(|error| stillframe_runtime::cli::chain(&error))
}

/// Ways to take a checkpoint: what is copied when, and how.
type Way = (&'static str, fn(&mut CheckpointRequest));

const WAYS: [Way; 3] = [
    ("copied before the freeze", |_| {}),
    ("copied under the freeze", |request| request.precopy = false),
    ("copied under a freeze with a limit", |request| {
        request.precopy = false;
        request.pause_limit = Some(Duration::from_secs(50));
    }),
];

#[test]
fn a_checkpoint_waits_for_no_file_and_has_what_was_done_to_those_that_are_pending() {
    let saved = save();
    for (way, change) in WAYS {
        let (mut pod, reads) = held(&saved, &config(""));
        let root = pod.mount("c.0");
        // Loaded already, and changed.
        for index in [30, 31] {
            let file = File::options().read(true).write(true).open(root.join(large(index))).unwrap();
            file.write_all_at(b"changed", 5000).unwrap();
        }
        pod.start("c", &mut sleep());
        reads.await_held();
        fs::rename(root.join(large(0)), root.join("moved")).unwrap();
        fs::hard_link(root.join(large(1)), root.join("link")).unwrap();
        fs::remove_file(root.join(large(2))).unwrap();
        fs::set_permissions(root.join(large(3)), fs::Permissions::from_mode(0o600)).unwrap();
        let time = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH + Duration::new(1_000_000_000, 5));
        File::open(root.join(large(31))).unwrap().set_times(time).unwrap();
        fs::write(root.join("new"), b"new").unwrap();
        fs::rename(root.join("new"), root.join(large(4))).unwrap();
        // These wait; the image has them as they were.
        let cut = root.join(large(5));
        let truncated = begin(move || nix::unistd::truncate(&cut, 1000));
        let overwritten = root.join(large(6));
        let written = begin(move || fs::write(overwritten, b"short"));

        let before = status(&pod);
        let image = saved.dir.path().join("again");
        let taken = checkpoint(&pod, &image, change).unwrap();
        let after = status(&pod);
        assert!(
            after.loaded_files as usize - SMALL < LARGE / 2 && after.phase == LoadPhase::Large,
            "{way}: {after:?}"
        );
        assert_eq!(before.loaded_files, after.loaded_files, "{way}");
        assert!(taken.files as usize == LARGE + SMALL - 1, "{taken:?}");

        let mut found = restored(&image, "");
        drop(reads);
        end(&truncated).unwrap();
        end(&written).unwrap();
        pod.sandbox.await_load("c").unwrap();
        let mut want = list(&root);
        for index in [5, 6] {
            let name = PathBuf::from(large(index));
            let (mut was, mut bytes) = (found[&name].0, contents(&large(index), SIZE));
            if index % 4 == 1 {
                bytes[200_000..500_000].fill(0);
            }
            assert_eq!(was[2], SIZE as i64);
            was[4..6].fill(0);
            assert!(found.remove(&name).unwrap().1 == bytes, "{way}: {}", name.display());
            want.remove(&name);
        }
        assert_same(&found, &want, way);
        fs::remove_dir_all(&image).unwrap();
    }
}

/// What a container does to files of which most aren't loaded, again and again.
const WRITER: &str = r#"
cd "$0" || exit 1
i=0
while :; do
    i=$((i + 1))
    for n in $1; do
        f=dir$((n % 3))/large$n
        case $(((n + i) % 7)) in
        0) [ -e $f ] && printf "$i" | dd of=$f bs=1 seek=70000 conv=notrunc 2>/dev/null ;;
        1) [ -e $f ] && mv $f moved$n && mv moved$n $f ;;
        2) [ -e $f ] && printf "$i" > new$n && mv new$n $f ;;
        3) rm -f $f ;;
        4) [ -e $f ] && truncate -s $((40000 + i)) $f ;;
        5) [ -e $f ] && ln -f $f link$n ;;
        6) [ -e $f ] && chmod 0$((600 + i % 8)) $f && touch -c -d @$((1000000 + i)) $f ;;
        esac
    done
done"#;

#[test]
fn an_image_is_what_writers_had_done_to_files_that_were_being_loaded() {
    let saved = save();
    for round in 0..6 {
        let (way, change) = WAYS[round % WAYS.len()];
        let options = if round % 2 == 0 { "" } else { ",\"huge=always\"" };
        let pages = saved.dir.path().join("pages");
        fs::create_dir_all(&pages).unwrap();
        let (mut pod, reads) = held(&saved, &asking_for_copies(options, &pages));
        let root = pod.mount("c.0");
        let numbers: Vec<String> = (0..LARGE).map(|index| (index * 17 % LARGE).to_string()).collect();
        pod.start("c", Command::new("sh").args(["-c", WRITER]).arg(&root).arg(numbers.join(" ")));
        reads.await_held();
        // So that writers are about, another moment each time.
        reads.pass(3 + 4 * round);
        reads.await_held();
        let ahead = if round % 3 == 0 { pod.sandbox.copy_ahead("c").unwrap() } else { None };
        assert_eq!(ahead.is_some(), round % 3 == 0);
        // Frozen by somebody else, as by `ctr task pause`, so that it stays so.
        let cgroup = Cgroup::of_process(pod.processes[0].0.id().cast_signed()).unwrap().unwrap();
        let freezing = begin({
            let (sandbox, cgroup) = (pod.sandbox.clone(), cgroup.clone());
            move || (sandbox.before_freeze(), cgroup.freeze(FREEZE_TIMEOUT).unwrap())
        });
        let mut frozen = None;
        // With cgroup v2 not before those who wait for a file have it.
        await_reading(&reads, "it freezes", || {
            frozen = freezing.try_recv().ok();
            frozen.is_some()
        });
        let (away, frozen) = frozen.unwrap();
        let image = saved.dir.path().join("again");
        thread::scope(|scope| {
            let taking = scope.spawn(|| {
                let mut request = CheckpointRequest::new("c", &image);
                change(&mut request);
                pod.sandbox.checkpoint_as_asked(request, ahead).unwrap()
            });
            // The rest is loaded in the midst of it.
            reads.pass(usize::MAX / 2);
            taking.join().unwrap();
        });
        for process in cgroup.processes() {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(process), nix::sys::signal::Signal::SIGKILL)
                .unwrap();
        }
        frozen.thaw().unwrap();
        drop(away);
        pod.await_death();
        drop(reads);
        let loaded = pod.sandbox.await_load("c").unwrap().remove(0).1;
        assert_eq!(loaded.failed_files, 0, "{loaded:?}");
        let context = format!("in round {round}, {way}, options {options}");
        assert_same(&restored(&image, options), &list(&root), &context);
        fs::remove_dir_all(&image).unwrap();
    }
}

#[test]
fn a_file_that_is_being_written_to_by_its_loader_has_its_own_time_in_the_image() {
    let saved = save();
    for (way, change) in WAYS {
        let options = ", \"huge=always\"";
        let (mut pod, reads) = held(&saved, &config(options));
        let root = pod.mount("c.0");
        let time = nix::sys::time::TimeSpec::new(1_000_000_000, 5);
        let follow = nix::sys::stat::UtimensatFlags::FollowSymlink;
        for index in 0..LARGE {
            let path = root.join(large(index));
            nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, &path, &time, &time, follow).unwrap();
        }
        pod.start("c", &mut sleep());
        // Files are longer than what is read at once, so some have begun and aren't complete.
        reads.pass(3);
        reads.await_held();
        let is_begun = |index: &usize| root.join(large(*index)).metadata().unwrap().mtime() != 1_000_000_000;
        assert!((0..LARGE).any(|index| is_begun(&index)), "none is being written to");
        let image = saved.dir.path().join("again");
        checkpoint(&pod, &image, change).unwrap();
        let found = restored(&image, "");
        for index in 0..LARGE {
            let (numbers, bytes) = &found[&PathBuf::from(large(index))];
            assert_eq!(numbers[4..6], [1_000_000_000, 5], "{way}: {index}");
            assert!(bytes[..4096] == contents(&large(index), 4096), "{way}: {index}");
        }
        drop(reads);
        fs::remove_dir_all(&image).unwrap();
    }
}

#[test]
fn damage_of_a_file_that_is_pending_fails_the_checkpoint_and_names_it() {
    let saved = save();
    let pages = File::options().read(true).write(true).open(saved.image.join("pages.img")).unwrap();
    let mut bytes = vec![0; pages.metadata().unwrap().len() as usize];
    pages.read_exact_at(&mut bytes, 0).unwrap();
    let name = large(39);
    let wanted = &contents(&name, SIZE)[..4096];
    let at = (0..bytes.len()).step_by(4096).find(|at| bytes[*at..].starts_with(wanted)).unwrap();
    let damaged = at as u64 + (300 << 10);
    for (way, change) in WAYS {
        let (mut pod, reads) = held(&saved, &config(""));
        pod.start("c", &mut sleep());
        reads.await_held();
        pages.write_all_at(b"damaged!", damaged).unwrap();
        let image = saved.dir.path().join("again");
        let says = |error: &str| {
            let chunk = format!("{:#x}", damaged / 65536 * 65536);
            assert!(
                error.contains(&name) && error.contains(&chunk) && error.contains("pages.img"),
                "{way}: {error}"
            );
        };
        says(&checkpoint(&pod, &image, change).unwrap_err());
        assert!(!image.join("manifest.json").exists());
        // Nor can it be loaded; then neither.
        drop(reads);
        assert_eq!(pod.sandbox.await_load("c").unwrap().remove(0).1.failed_files, 1);
        says(&checkpoint(&pod, &image, change).unwrap_err());
        // If what it was is there after all, it is saved, though nobody can read it here.
        pages.write_all_at(&bytes[damaged as usize..damaged as usize + 8], damaged).unwrap();
        checkpoint(&pod, &image, change).unwrap();
        assert!(restored(&image, "")[&PathBuf::from(&name)].1 == contents(&name, SIZE), "{way}");
        fs::remove_dir_all(&image).unwrap();
    }
}

/// The memory cgroup of a process.
fn memory_cgroup(pid: i32) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let of = |what: &str| text.lines().find(|line| line.contains(what));
    // The v2 hierarchy's has no name.
    of(":memory:").or_else(|| of("0::")).unwrap_or_default().to_owned()
}

fn await_that(what: &str, is: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// The same, for what comes once some more was read: how much depends on what had been begun.
fn await_reading(reads: &Reads, what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        // Time to come, so that not all is read before it does.
        for _ in 0..50 {
            if is() {
                return;
            }
            thread::sleep(Duration::from_millis(4));
        }
        assert!(Instant::now() < deadline, "{what}");
        reads.pass(4);
    }
}

#[test]
fn those_who_wait_for_a_file_are_answered_before_a_freeze_and_the_loader_comes_back_after_it() {
    let unified = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .map(|path| Path::new(path).join("cgroup.subtree_control"));
    if !unified.iter().any(|path| path.exists()) {
        println!("SKIPPED: no v2 hierarchy");
        return;
    }
    let saved = save();
    let (mut pod, reads) = held(&saved, &config(""));
    pod.unified = true;
    let root = pod.mount("c.0");
    let openers = format!(
        "until [ -e {0}/go ]; do sleep 0.01; done; for n in 36 37 38 39; do cat {0}/*/large$n > /dev/null & done; wait; sleep 1000",
        root.display()
    );
    let process = pod.spawn("c", Command::new("sh").args(["-c", &openers]));
    let Some(memory) = pod.charge(process) else {
        println!("SKIPPED: no hierarchy counts memory");
        return;
    };
    let inside = memory_cgroup(process);
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(pod.state().join("s/filesystems/c.0/load.json")).unwrap()).unwrap();
    let pid = |who: &str| i32::try_from(record[who]["pid"].as_i64().unwrap()).unwrap();
    let (loader, home) = (pid("loader"), memory_cgroup(pid("keeper")));
    assert_ne!(inside, home);
    pod.sandbox.set_init_pid("c", process).unwrap();
    assert_eq!(memory_cgroup(loader), inside);
    reads.await_held();
    fs::write(root.join("go"), "").unwrap();
    await_that("somebody waits", || status(&pod).waiting_files > 0);

    // Somebody else's freeze, and whoever asked for it dies in it.
    let before = begin({
        let sandbox = pod.sandbox.clone();
        move || sandbox.before_freeze()
    });
    await_that("the loader leaves", || memory_cgroup(loader) == home);
    let early = before.recv_timeout(Duration::from_millis(50));
    assert!(matches!(early, Err(RecvTimeoutError::Timeout)), "somebody waits still");
    let mut away = None;
    await_reading(&reads, "it is answered", || {
        away = before.try_recv().ok();
        away.is_some()
    });
    let cgroup = pod.processes[0].1.clone();
    fs::write(cgroup.join("cgroup.freeze"), "1").unwrap();
    let is_frozen = || fs::read_to_string(cgroup.join("cgroup.events")).unwrap().contains("frozen 1");
    await_reading(&reads, "it freezes", is_frozen);
    drop(away);
    // It has looked at that when it has dealt with what it was told afterwards, twice, since it polls.
    for _ in 0..2 {
        let mut told = UnixStream::connect(pod.state().join("s/filesystems/c.0/load.sock")).unwrap();
        told.write_all(b"nothing\n").unwrap();
        assert_eq!(told.read(&mut [0]).unwrap(), 0);
    }
    assert_eq!(memory_cgroup(loader), home, "it is frozen with the container");
    fs::write(cgroup.join("cgroup.freeze"), "0").unwrap();
    await_that("the loader comes back", || memory_cgroup(loader) == inside);

    // A checkpoint's own.
    reads.pass(usize::MAX / 2);
    let image = saved.dir.path().join("again");
    checkpoint(&pod, &image, |_| {}).unwrap();
    pod.sandbox.await_load("c").unwrap();
    assert_same(&restored(&image, ""), &list(&root), "");
    for process in fs::read_to_string(memory.path.join("cgroup.procs")).unwrap().lines() {
        let process = nix::unistd::Pid::from_raw(process.parse().unwrap());
        let _ = nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL);
    }
    drop(pod);
    await_that("nobody is in the cgroup", || fs::remove_dir(&memory.path).is_ok() || !memory.path.exists());
}
