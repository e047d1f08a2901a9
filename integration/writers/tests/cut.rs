//! Images of a pod whose containers write in every way they can, at full rate, and run on: each is a cut through what they
//! did, with everything before one instant in it and nothing after.
//!
//! Each writer's steps are numbered, and its directory in the image must be what it was after one of them
//! ([`stillframe_writers`]). All writers, in two containers, take numbers from one clock before and after each step: if a step
//! is in the image that began after another one had ended, that one must be in it, too. So nothing is taken from a
//! freeze that wasn't one. `STILLFRAME_CUT_ROUNDS` is how many images are taken, `STILLFRAME_CUT_SHOW` shows what came of each.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use stillframe_cri::{Cri, MemoryVolume};
use stillframe_integration::{ContainerdVersion, binaries};
use stillframe_runtime::image::Image;
use stillframe_tmpfs::entry::Kind;
use stillframe_writers::{ALL, Log, SQLITE, Seen, Tree, steps_of_database};

/// The containers; each has every other writer.
const CONTAINERS: [&str; 2] = ["a", "b"];
const ROUNDS: u64 = 3;
/// Files that nobody touches, so that copying takes a while, and their size.
const IDLE: (u64, usize) = (2000, 20_000);

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
        if name == SQLITE {
            let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
            let (_, last) = steps_of_database(&tree, scratch.path())
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

/// Waits until a container says that its writers are about to begin.
fn await_line(ready: &File) {
    let mut fds = [PollFd::new(ready.as_fd(), PollFlags::POLLIN)];
    let any = poll(&mut fds, PollTimeout::from(60_000u16)).unwrap();
    assert_eq!(any, 1, "a container's writers didn't begin");
    let mut line = [0; 16];
    let length = (&*ready).read(&mut line).unwrap();
    assert_eq!(&line[..length], b"writing\n");
}

#[test]
fn an_image_is_a_cut_through_what_two_containers_did() {
    const TEST: &str = "an_image_is_a_cut_through_what_two_containers_did";
    let Some(version) = ContainerdVersion::or_skip("2", TEST) else { return };
    let rounds = std::env::var("STILLFRAME_CUT_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(ROUNDS);
    let cri = Cri::start(&version).unwrap();
    let containerd = cri.containerd();
    let spec = cri.pod("pod").privileged();
    let volume = MemoryVolume::new(containerd.dir(), &spec.uid(), "data", Some(1 << 30)).unwrap();
    fs::create_dir(volume.path().join("idle")).unwrap();
    for number in 0..IDLE.0 {
        fs::write(volume.path().join(format!("idle/{number}")), vec![number as u8 | 1; IDLE.1]).unwrap();
    }
    let shared = tempfile::tempdir_in("/dev/shm").unwrap();
    let log = Log::open(&shared.path().join("log")).unwrap();
    let ready = shared.path().join("ready");
    nix::unistd::mkfifo(&ready, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Open for writing, too, so that it isn't at its end between the containers.
    let ready = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(ready).unwrap();
    let pod = spec.run().unwrap();
    let containers = [0, 1].map(|part| {
        let (part_of, parts) = (part.to_string(), CONTAINERS.len().to_string());
        let command = ["/writers", &part_of, &parts, "/data", "/log/log", "/log/ready"];
        let container = pod.container(CONTAINERS[part]).privileged().command(&command);
        let container = container.mount(&binaries::writers(), "/writers").mount(shared.path(), "/log");
        let container = container.mount(volume.path(), "/data").start().unwrap();
        await_line(&ready);
        container
    });
    let image = containerd.dir().join("image");
    let path = image.display().to_string();
    let save = ["fscheckpoint", "--namespace", "k8s.io", "--leave-running", "--json", "--path", "/data"];
    let save = [&save[..], &["--image-path", &path, containers[0].id()]].concat();
    let mut compared = 0;
    for number in 0..rounds {
        // Another moment in each round; what is waited for is time itself.
        std::thread::sleep(Duration::from_micros(number * 7919 % 50_000));
        let said = containerd.stillframe(&save).unwrap().stdout;
        let context = format!("in round {number} of {said}");
        if std::env::var_os("STILLFRAME_CUT_SHOW").is_some() {
            println!("{number}: {}", said.replace('\n', " "));
        }
        let result: serde_json::Value = serde_json::from_str(&said).unwrap();
        let bytes = |name: &str| result[name].as_u64().unwrap();
        assert!(bytes("copied_live_bytes") >= IDLE.0 * IDLE.1 as u64, "nothing was copied ahead {context}");
        assert!(bytes("superseded_bytes") <= bytes("pages_bytes") / 10, "{context}");
        let steps = steps(&image, &context);
        compared += check_order(&log, &steps, &context);
        fs::remove_dir_all(&image).unwrap();
    }
    assert!(compared as u64 > rounds, "the log is too short to compare the writers");
    pod.remove().unwrap();
    drop(volume);
    containerd.assert_nothing_left();
    cri.stop().unwrap();
}
