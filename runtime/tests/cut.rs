//! Images of a pod whose containers write in every way they can, at full rate, and run on: each is a cut through what they
//! did, with everything before one instant in it and nothing after.
//!
//! Each writer's steps are numbered, and its directory in the image must be what it was after one of them
//! (`support/writers.rs`). All writers, in two containers, take numbers from one clock before and after each step: if a step
//! is in the image that began after another one had ended, that one must be in it, too. So nothing is taken from a
//! freeze that wasn't one.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use stillframe_runtime::image::Image;
use stillframe_runtime::sandbox::{CheckpointRequest, CheckpointResult};
use stillframe_tmpfs::entry::Kind;

#[path = "support/pod.rs"]
mod pod;
#[path = "support/sys.rs"]
mod sys;
#[path = "support/writers.rs"]
mod writers;

use pod::Pod;
use writers::{ALL, Seen, Tree};

const DIRECTORY: &str = "STILLFRAME_TEST_CUT";
/// Names of the containers and of their writers: every other one.
const CONTAINERS: [&str; 2] = ["a", "b"];
const ROUNDS: u64 = 3;
/// Steps of each writer that are remembered.
const REMEMBERED: u64 = 1 << 16;
/// Numbers kept of each: which step, when it began, when it ended.
const FIELDS: u64 = 3;

/// Members of a config.json: a filesystem in memory that both containers have.
fn config() -> String {
    let hint = [("source", "shared"), ("medium", "memory"), ("share", "pod"), ("options", "size=1g")]
        .map(|(field, value)| format!(r#""dev.stillframe.mount.vol.{field}":"{value}""#));
    let mount = r#"{"destination":"/data","type":"bind","source":"shared","options":["rbind"]}"#;
    format!(r#""annotations":{{{}}},"mounts":[{mount}]"#, hint.join(","))
}

/// What the writers did, in memory that they share with the test: a clock, and then for each writer its last steps.
struct Log {
    map: memmap2::MmapMut,
}

impl Log {
    fn open(path: &Path) -> Self {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        file.set_len(8 * (1 + ALL.len() as u64 * REMEMBERED * FIELDS)).unwrap();
        Self { map: sys::map_shared(&file).unwrap() }
    }

    fn tick(&self) -> u64 {
        sys::atomics(&self.map)[0].fetch_add(1, SeqCst) + 1
    }

    fn entry(&self, writer: usize, step: u64) -> &[AtomicU64] {
        let at = 1 + (writer as u64 * REMEMBERED + step % REMEMBERED) * FIELDS;
        &sys::atomics(&self.map)[at as usize..(at + FIELDS) as usize]
    }

    /// When a step began and ended, 0 if it hasn't; `None` if it isn't remembered any more.
    fn times(&self, writer: usize, step: u64) -> Option<(u64, u64)> {
        let entry = self.entry(writer, step);
        match entry[0].load(SeqCst) {
            there if there == step => Some((entry[1].load(SeqCst), entry[2].load(SeqCst))),
            there if there < step => Some((0, 0)),
            _ => None,
        }
    }
}

#[test]
#[ignore = "a container of the other test"]
fn container() {
    let Some(asked) = std::env::var_os(DIRECTORY) else { return };
    let asked = asked.into_string().unwrap();
    let [part, mount, log] = asked.split(':').collect::<Vec<_>>()[..] else { panic!("{asked}") };
    let (part, mount, log) = (part.parse::<usize>().unwrap(), Path::new(mount), Log::open(Path::new(log)));
    let mine: Vec<_> =
        ALL.iter().enumerate().filter(|(number, _)| number % CONTAINERS.len() == part).collect();
    let ready = Barrier::new(mine.len() + 1);
    std::thread::scope(|scope| {
        for (number, writer) in mine {
            let (log, ready) = (&log, &ready);
            scope.spawn(move || {
                let dir = mount.join(writer.name);
                fs::create_dir(&dir).unwrap();
                let counter = File::create(dir.join("counter")).unwrap();
                counter.write_all_at(&0u64.to_le_bytes(), 0).unwrap();
                let mut step = (writer.start)(&dir);
                ready.wait();
                let started = Instant::now();
                for s in 1.. {
                    // At full rate for one second, and then for one so that a checkpoint has time to be short.
                    if started.elapsed().as_secs().is_multiple_of(2) {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                    let entry = log.entry(number, s);
                    let begun = log.tick();
                    entry[2].store(0, SeqCst);
                    entry[1].store(begun, SeqCst);
                    entry[0].store(s, SeqCst);
                    step(s);
                    counter.write_all_at(&s.to_le_bytes(), 0).unwrap();
                    entry[2].store(log.tick(), SeqCst);
                }
            });
        }
        ready.wait();
        println!("writing");
        std::io::stdout().flush().unwrap();
    });
}

/// What the image says of each directory at the root.
fn trees(image: &Path) -> HashMap<String, Tree> {
    let image = Image::open(image).unwrap();
    let tree = image.decode_tree(0).unwrap();
    let mut paths: Vec<PathBuf> = Vec::new();
    let mut seen: Vec<Seen> = Vec::new();
    let mut firsts: Vec<usize> = Vec::new();
    for (index, entry) in tree.entries.iter().enumerate() {
        let name = std::str::from_utf8(&entry.name).unwrap();
        paths.push(if index == 0 { PathBuf::new() } else { paths[entry.parent].join(name) });
        let mut first = index;
        let what = match &entry.kind {
            Kind::File { size, extents } => {
                let mut content = vec![0; *size as usize];
                for extent in extents {
                    let at = extent.file_offset as usize..(extent.file_offset + extent.length) as usize;
                    image.pages.read_exact_at(&mut content[at], extent.pages_offset.0).unwrap();
                }
                let xattr = entry.attributes.xattrs.first().map(|xattr| xattr.value.clone());
                Seen::File { content, mode: entry.attributes.mode, xattr, names: 1 }
            }
            Kind::Symlink { target } => Seen::Symlink(target.clone()),
            Kind::HardLink { target } => {
                first = *target;
                if let Seen::File { names, .. } = &mut seen[*target] {
                    *names += 1;
                }
                Seen::Directory
            }
            _ => Seen::Directory,
        };
        seen.push(what);
        firsts.push(first);
    }
    let mut trees: HashMap<String, Tree> = HashMap::new();
    for (index, path) in paths.iter().enumerate().skip(1) {
        let mut parts = path.to_str().unwrap().splitn(2, '/');
        let tree = trees.entry(parts.next().unwrap().to_owned()).or_default();
        if let Some(path) = parts.next() {
            tree.insert(path.to_owned(), seen[firsts[index]].clone());
        }
    }
    trees
}

/// Why two trees aren't the same, in few words.
fn difference(found: &Tree, want: &Tree) -> String {
    for (path, want) in want {
        match (found.get(path), want) {
            (Some(found), want) if found == want => {}
            (None, _) => return format!("{path} isn't there"),
            (Some(Seen::File { content, .. }), Seen::File { content: wanted, .. }) if content != wanted => {
                let at = content.iter().zip(wanted).position(|(found, want)| found != want);
                return format!(
                    "{path}: {} bytes, not {}; first difference at {at:?}",
                    content.len(),
                    wanted.len()
                );
            }
            (Some(_), _) => return format!("{path} has other attributes"),
        }
    }
    found
        .keys()
        .find(|path| !want.contains_key(*path))
        .map_or_else(String::new, |path| format!("{path} is there"))
}

/// The steps up to which each writer's state is in the image: at least, and at most.
fn steps(image: &Path, context: &str) -> BTreeMap<usize, (u64, u64)> {
    let mut trees = trees(image);
    let mut steps = BTreeMap::new();
    for (number, writer) in ALL.iter().enumerate() {
        let name = writer.name;
        let mut tree = trees.remove(name).unwrap_or_else(|| panic!("{name} isn't in the image {context}"));
        let Some(Seen::File { content, .. }) = tree.remove("counter") else { panic!("{name} {context}") };
        let s = u64::from_le_bytes(content.try_into().unwrap());
        // Half of a step that takes several calls.
        tree.remove("new");
        if name == writers::SQLITE {
            let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
            let (_, last) = writers::steps_of_database(&tree, scratch.path())
                .unwrap_or_else(|error| panic!("{name} at step {s}: {error} {context}"));
            assert!(last == s || last == s + 1, "{name} is at step {last}, not {s} {context}");
            steps.insert(number, (last, last));
            continue;
        }
        let (now, next) = (tree == (writer.expect)(s), tree == (writer.expect)(s + 1));
        assert!(
            now || next,
            "{name} is neither in the state of step {s} ({}) nor in the next one ({}) {context}",
            difference(&tree, &(writer.expect)(s)),
            difference(&tree, &(writer.expect)(s + 1)),
        );
        steps.insert(number, (if now { s } else { s + 1 }, if next { s + 1 } else { s }));
    }
    steps
}

/// No step is in the image that began after one had ended that isn't; how many writers could be compared.
fn check_order(log: &Log, steps: &BTreeMap<usize, (u64, u64)>, context: &str) -> usize {
    let begun =
        steps.iter().filter_map(|(writer, (least, _))| Some((log.times(*writer, *least)?.0, *writer)));
    let Some((latest, of)) = begun.max() else { return 0 };
    let mut compared = 0;
    for (writer, (_, most)) in steps {
        let Some((_, ended)) = log.times(*writer, most + 1) else { continue };
        compared += 1;
        assert!(
            ended == 0 || ended > latest,
            "a step of {} is in the image that began at {latest}, and step {} of {} isn't, which ended at {ended}, {context}",
            ALL[of].name,
            most + 1,
            ALL[*writer].name,
        );
    }
    compared
}

#[test]
fn an_image_is_a_cut_through_what_two_containers_did() {
    let rounds = std::env::var("STILLFRAME_CUT_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(ROUNDS);
    let mut pod = Pod::new();
    for id in CONTAINERS {
        pod.prepare(id, &config(), None).unwrap();
    }
    let mount = pod.mount("pod-vol");
    // Some that nobody touches, so that copying takes a while.
    fs::create_dir(mount.join("idle")).unwrap();
    for number in 0..2000u64 {
        fs::write(mount.join(format!("idle/{number}")), vec![number as u8 | 1; 20_000]).unwrap();
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let shared = tempfile::tempdir_in("/dev/shm").unwrap();
    let log = Log::open(&shared.path().join("log"));
    // Kept, so that they can go on printing.
    let mut outputs = Vec::new();
    for (part, id) in CONTAINERS.into_iter().enumerate() {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "container", "--ignored", "--nocapture"]);
        command.env(DIRECTORY, format!("{part}:{}:{}", mount.display(), shared.path().join("log").display()));
        let mut output = BufReader::new(pod.start_reading(id, command.stdout(Stdio::piped())).unwrap());
        let writing = output.by_ref().lines().map_while(Result::ok).any(|line| line.contains("writing"));
        assert!(writing, "container {id} ended before it began");
        outputs.push(output);
    }
    let mut compared = 0;
    for number in 0..rounds {
        // Another moment in each round; what is waited for is time itself.
        let until = Instant::now() + Duration::from_micros(number * 7919 % 50_000);
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        let image = dir.path().join("image");
        let result: CheckpointResult = pod.sandbox.checkpoint(&CheckpointRequest::new("a", &image)).unwrap();
        if std::env::var_os("STILLFRAME_LIVE_SHOW").is_some() {
            println!("{number}: {result:?}");
        }
        assert!(result.copied_live_bytes >= 2000 * 20_000, "nothing was copied ahead: {result:?}");
        assert!(result.superseded_bytes <= result.pages_bytes / 10, "{result:?}");
        let context = format!("in round {number} of {result:?}");
        let steps = steps(&image, &context);
        compared += check_order(&log, &steps, &context);
        fs::remove_dir_all(&image).unwrap();
    }
    assert!(compared as u64 > rounds, "the log is too short to compare the writers");
}
