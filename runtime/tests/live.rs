//! Checkpoints of a container that writes in every way it can, at full rate.
//!
//! The oracle is the live filesystem itself: the container is killed without being thawed, so what its tmpfs holds
//! afterwards is what it held at the instant of the freeze, and the image must hold exactly that. The container is this
//! test program, run again as a process in a cgroup of its own.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FallocateFlags, RenameFlags, XattrFlags};
use stillframe_runtime::sandbox::CheckpointRequest;
use stillframe_tmpfs::mount::open_view;

#[path = "../../tmpfs/tests/support/filesystem.rs"]
mod filesystem;
#[path = "support/pod.rs"]
mod pod;
#[path = "support/sys.rs"]
mod sys;

use filesystem::{describe_directory, noise};
use pod::Pod;

const MOUNT: &str = r#""mounts":[{"destination":"/scratch","type":"tmpfs","options":["size=1g"]}]"#;
const DIRECTORY: &str = "STILLFRAME_TEST_WRITERS";
const FILES: u64 = 300;
const MAPPED: u64 = 400;
const COLD: u64 = 2000;
const ROUNDS: u64 = 2;

fn describe(mountpoint: &Path) -> BTreeMap<PathBuf, String> {
    let view = open_view(mountpoint).unwrap();
    let mut all = BTreeMap::new();
    describe_directory(&view, Path::new("/"), &mut all, &mut BTreeMap::new());
    all
}

/// A number that no two calls of a thread give alike.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

fn file(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{}", number % 10)).join(format!("file-{number}"))
}

fn open(path: &Path) -> Option<File> {
    OpenOptions::new().read(true).write(true).open(path).ok()
}

/// pwrite, append, truncation both ways, punched holes, preallocation.
fn write_data(dir: &Path, random: &mut Random, step: u64) {
    let Some(file) = open(&file(dir, random.below(FILES))) else { return };
    let stamp = step.to_le_bytes();
    match random.below(6) {
        0 => file.set_len(random.below(80_000)).unwrap(),
        1 => {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, hole, random.below(16) * 4096, 8192).unwrap();
        }
        2 => rustix::fs::fallocate(&file, FallocateFlags::empty(), random.below(60_000), 4096).unwrap(),
        3 => file.write_all_at(&stamp, file.metadata().unwrap().len()).unwrap(),
        4 => file.write_all_at(&noise(30_000, step as u8), random.below(60_000)).unwrap(),
        _ => file.write_all_at(&stamp, random.below(60_000)).unwrap(),
    }
}

/// Names: rename, exchange, link, unlink and making anew, directories, O_TMPFILE with linkat.
fn write_names(dir: &Path, random: &mut Random, step: u64) {
    let (one, other) = (file(dir, random.below(FILES)), file(dir, random.below(FILES)));
    match random.below(6) {
        0 => drop(rustix::fs::renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE)),
        1 => drop(fs::rename(&one, dir.join("moved")).and_then(|()| fs::rename(dir.join("moved"), &one))),
        2 => drop(fs::hard_link(&one, dir.join(format!("link-{}", step % 50)))),
        3 => drop(fs::remove_file(dir.join(format!("link-{}", random.below(50))))),
        4 => {
            let _ = fs::remove_file(&one);
            let _ = fs::write(&one, noise(random.below(20_000) as usize, step as u8));
        }
        _ => {
            let made = dir.join(format!("dir-{}", step % 20));
            if fs::create_dir(&made).is_err() {
                let _ = fs::remove_dir(&made);
            }
        }
    }
}

/// Attributes: mode, times, xattrs.
fn write_attributes(dir: &Path, random: &mut Random, step: u64) {
    let path = file(dir, random.below(FILES));
    match random.below(3) {
        0 => {
            drop(fs::set_permissions(&path, fs::Permissions::from_mode(random.below(0o1000) as u32 | 0o600)))
        }
        1 => drop(rustix::fs::setxattr(&path, "user.step", &step.to_le_bytes(), XattrFlags::empty())),
        _ => filesystem::set_times_if_there(&path, (step as i64, 7)),
    }
}

/// Changes each of the files that were left alone so far, once: they are copied ahead, and only their ctime tells, since
/// none is opened for it or closed after it.
fn write_cold(dir: &Path, held: &[File], number: u64) {
    let path = dir.join("cold").join(format!("{number}"));
    match number % 4 {
        0 => fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap(),
        1 => rustix::fs::setxattr(&path, "user.step", &number.to_le_bytes(), XattrFlags::empty()).unwrap(),
        2 => fs::rename(&path, dir.join("cold").join(format!("renamed-{number}"))).unwrap(),
        _ => held[number as usize / 4].write_all_at(&number.to_le_bytes(), 5000).unwrap(),
    }
}

/// Every fourth of those files, open for writing.
fn hold(dir: &Path) -> Vec<File> {
    (0..COLD / 4).map(|n| open(&dir.join("cold").join(format!("{}", n * 4 + 3))).unwrap()).collect()
}

/// Stores through shared mappings whose pages were all stored to before: the kernel sees none of it. One mapping after the
/// other is given up, with a last store: of those, only the end of their open file tells.
fn write_mapped(maps: &mut Vec<memmap2::MmapMut>, random: &mut Random, step: u64) {
    if maps.is_empty() {
        return;
    }
    let one = random.below(maps.len() as u64) as usize;
    let at = random.below(maps[one].len() as u64 - 8) as usize;
    maps[one][at..at + 8].copy_from_slice(&step.to_le_bytes());
    if step.is_multiple_of(5) {
        maps.swap_remove(one);
    }
}

fn map_all(dir: &Path) -> Vec<memmap2::MmapMut> {
    let map = |number| {
        let file = open(&dir.join("mapped").join(format!("{number}"))).unwrap();
        let mut map = sys::map_shared(&file).unwrap();
        map.chunks_mut(4096).for_each(|page| page[0] ^= 1);
        map
    };
    (0..MAPPED).map(map).collect()
}

#[test]
#[ignore = "the container of the other test"]
fn writers() {
    let Some(dir) = std::env::var_os(DIRECTORY).map(PathBuf::from) else { return };
    let ready = Barrier::new(5);
    std::thread::scope(|scope| {
        type Writer = fn(&Path, &mut Random, u64);
        let writers: [Writer; 3] = [write_data, write_names, write_attributes];
        for (number, write) in writers.into_iter().enumerate() {
            let (dir, ready) = (&dir, &ready);
            scope.spawn(move || {
                let mut random = Random(number as u64);
                (0..50).for_each(|step| write(dir, &mut random, step));
                ready.wait();
                for step in 50.. {
                    write(dir, &mut random, step);
                }
            });
        }
        let (dir, ready) = (&dir, &ready);
        scope.spawn(move || {
            let (mut random, mut maps, held) = (Random(99), map_all(dir), hold(dir));
            ready.wait();
            // Slower, so that it lasts.
            for step in 1.. {
                write_mapped(&mut maps, &mut random, step);
                if step < COLD {
                    write_cold(dir, &held, step);
                }
                std::thread::sleep(Duration::from_micros(100));
            }
        });
        ready.wait();
        println!("writing");
        std::io::stdout().flush().unwrap();
    });
}

fn fill(dir: &Path) {
    for number in 0..10 {
        fs::create_dir(dir.join(format!("{number}"))).unwrap();
    }
    for number in 0..FILES {
        fs::write(file(dir, number), noise(4096 * (number as usize % 13) + 17, number as u8)).unwrap();
    }
    fs::create_dir(dir.join("mapped")).unwrap();
    for number in 0..MAPPED {
        fs::write(dir.join("mapped").join(format!("{number}")), noise(20_000, number as u8)).unwrap();
    }
    fs::create_dir(dir.join("cold")).unwrap();
    for number in 0..COLD {
        fs::write(dir.join("cold").join(format!("{number}")), noise(10_000, number as u8)).unwrap();
    }
    // And some that nobody touches.
    fs::create_dir(dir.join("idle")).unwrap();
    for number in 0..200 {
        fs::write(dir.join("idle").join(format!("{number}")), noise(50_000, number)).unwrap();
    }
}

/// One checkpoint; how many bytes were copied ahead.
fn round(number: u64) -> u64 {
    let mut pod = Pod::new();
    pod.prepare("c", MOUNT, None).unwrap();
    let mount = pod.mount("c.0");
    fill(&mount);
    let mut writers = Command::new(std::env::current_exe().unwrap());
    writers.args(["--exact", "writers", "--ignored", "--nocapture"]).env(DIRECTORY, &mount);
    let output = pod.start_reading("c", writers.stdout(Stdio::piped()));
    let writing =
        BufReader::new(output.unwrap()).lines().map_while(Result::ok).any(|line| line.contains("writing"));
    assert!(writing, "the writers ended before they began");
    // Another moment in each round; what is waited for is time itself.
    let until = Instant::now() + Duration::from_millis(100 + number * 37 % 200);
    std::thread::sleep(until.saturating_duration_since(Instant::now()));

    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let image = dir.path().join("image");
    let request = CheckpointRequest { kill: true, ..CheckpointRequest::new("c", &image) };
    let result = pod.sandbox.checkpoint(&request).unwrap();
    if std::env::var_os("STILLFRAME_LIVE_SHOW").is_some() {
        println!("{number}: {result:?}");
    }
    pod.await_death();
    let want = describe(&mount);

    let mut new = Pod::new();
    new.prepare("c", MOUNT, Some(&image)).unwrap();
    let found = describe(&new.mount("c.0"));
    for (path, want) in &want {
        let found = found.get(path);
        assert_eq!(found, Some(want), "{path:?} in round {number} of {result:?}");
    }
    assert_eq!(found.len(), want.len());
    result.copied_live_bytes - result.superseded_bytes
}

#[test]
fn an_image_is_the_filesystem_at_the_instant_of_the_freeze() {
    let rounds = std::env::var("STILLFRAME_LIVE_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(ROUNDS);
    for number in 0..rounds {
        // The idle files at least, or the test would show nothing of copying ahead.
        assert!(round(number) >= 200 * 50_000);
    }
}
