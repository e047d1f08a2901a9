//! Restoring behind the start: nobody reads a byte that isn't there, whatever happens to those who load.

#[path = "support/behind.rs"]
mod behind;
#[path = "../../tmpfs/tests/support/kernel.rs"]
mod kernel;
#[path = "support/pod.rs"]
mod pod;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use behind::{begin, contents, end, lazy_pod, pod_with, sleep};
use kernel::denial;
use pod::Pod;
use stillframe_runtime::sandbox::{LoadPhase, LoadStatus};

const CONFIG: &str = r#""root": {"path": "rootfs"}, "mounts": [
    {"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["size=256m"]}]"#;
const LARGE: usize = 24;
const SMALL: usize = 300;
const LARGE_SIZE: usize = (1 << 20) + 77;

fn large(index: usize) -> String {
    format!("dir{}/large{index}", index % 3)
}

fn small(index: usize) -> String {
    format!("dir{}/small{index}", index % 3)
}

fn all() -> impl Iterator<Item = (String, usize)> {
    (0..LARGE)
        .map(|index| (large(index), LARGE_SIZE))
        .chain((0..SMALL).map(|index| (small(index), 100 + index * 13)))
}

/// An image of a container with files of both kinds, and what they look like.
struct Saved {
    dir: tempfile::TempDir,
    image: PathBuf,
    attributes: Vec<(String, [i64; 6])>,
}

fn attributes(root: &Path) -> Vec<(String, [i64; 6])> {
    let of = |name: String| {
        let m = root.join(&name).symlink_metadata().unwrap();
        let numbers = [
            i64::from(m.mode()),
            i64::from(m.uid()),
            m.size().cast_signed(),
            m.mtime(),
            m.mtime_nsec(),
            m.atime_nsec(),
        ];
        (name, numbers)
    };
    all().map(|(name, _)| of(name)).collect()
}

fn save() -> Saved {
    let mut pod = Pod::new();
    pod.running("c", CONFIG);
    let root = pod.mount("c.0");
    for (index, (name, size)) in all().enumerate() {
        let path = root.join(&name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, contents(&name, size)).unwrap();
        std::os::unix::fs::chown(&path, Some(index as u32), Some(7)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o4750)).unwrap();
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let image = dir.path().join("image");
    let attributes = attributes(&root);
    pod.checkpoint("c", &image, &[]).unwrap();
    Saved { dir, image, attributes }
}

/// Reads large files from a thread each, and compares them.
fn read_all(root: &Path, files: impl Iterator<Item = usize>) -> Vec<Receiver<Result<(), String>>> {
    let read = |index: usize| {
        let name = large(index);
        let path = root.join(&name);
        begin(move || match fs::read(&path) {
            Ok(bytes) if bytes == contents(&name, LARGE_SIZE) => Ok(()),
            Ok(bytes) => Err(format!("{name}: {} zeros", bytes.iter().filter(|b| **b == 0).count())),
            Err(error) => Err(format!("{name}: {error}")),
        })
    };
    files.map(read).collect()
}

fn assert_whole(root: &Path, saved: &Saved) {
    for (name, size) in all() {
        assert!(fs::read(root.join(&name)).unwrap() == contents(&name, size), "{name}");
    }
    // Reading may have changed access times.
    let times = |attributes: Vec<(String, [i64; 6])>| -> Vec<_> {
        attributes
            .into_iter()
            .map(|(name, [mode, uid, size, s, ns, _])| (name, [mode, uid, size, s, ns]))
            .collect()
    };
    assert_eq!(times(attributes(root)), times(saved.attributes.clone()));
}

/// The processes that load: the keeper and the loader.
fn processes(pod: &Pod) -> (i32, i32) {
    let path = pod.state().join("s/filesystems/c.0/load.json");
    let record: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let pid = |who: &str| i32::try_from(record[who]["pid"].as_i64().unwrap()).unwrap();
    (pid("keeper"), pid("loader"))
}

fn signal(pid: i32, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
}

fn loaded(pod: &Pod) -> LoadStatus {
    let status = pod.sandbox.await_load("c").unwrap();
    assert_eq!(status.len(), 1);
    status.into_iter().next().unwrap().1
}

#[test]
fn whoever_opens_a_file_waits_for_it_and_nothing_else() {
    let saved = save();
    let mut pod = lazy_pod();
    let restored = pod.prepare("c", CONFIG, Some(&saved.image)).unwrap().restored.unwrap();
    assert_eq!(restored.behind_files, (LARGE + SMALL) as u64);
    let root = pod.mount("c.0");
    // All names are there at once, with owners and modes; sizes and times of large files, too.
    for ((name, is), (_, was)) in attributes(&root).iter().zip(&saved.attributes) {
        let known = if name.contains("large") { 6 } else { 2 };
        assert_eq!(is[..known], was[..known], "{name}");
    }
    let status = pod.sandbox.load_status("c").unwrap().remove(0).1;
    assert_eq!((status.phase, status.loaded_files), (LoadPhase::Held, 0));
    // One that is waited for is loaded even now.
    end(&read_all(&root, 5..6)[0]).unwrap();
    let status = pod.sandbox.load_status("c").unwrap().remove(0).1;
    assert_eq!((status.phase, status.loaded_files), (LoadPhase::Held, 1));
    pod.start("c", &mut sleep());
    // What is small is there when the container's program could begin.
    let status = pod.sandbox.load_status("c").unwrap().remove(0).1;
    assert!(status.phase >= LoadPhase::Large, "{status:?}");
    for index in 0..SMALL {
        let name = small(index);
        assert!(fs::read(root.join(&name)).unwrap() == contents(&name, 100 + index * 13), "{name}");
    }
    let status = loaded(&pod);
    assert_eq!((status.phase, status.loaded_files), (LoadPhase::Done, status.files));
    assert_eq!((status.loaded_bytes, status.failed_files), (status.bytes, 0));
    assert_whole(&root, &saved);
}

#[test]
fn readers_from_the_first_moment_on_see_every_byte() {
    let saved = save();
    for _ in 0..5 {
        let mut pod = lazy_pod();
        pod.prepare("c", CONFIG, Some(&saved.image)).unwrap();
        let root = pod.mount("c.0");
        let readers = read_all(&root, (0..LARGE).rev());
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            // Attributes are as they were saved at any time, small files' only when the container could see them.
            let stat = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let now = attributes(&root);
                    let times = |of: &[(String, [i64; 6])]| -> Vec<[i64; 2]> {
                        of[..LARGE].iter().map(|(_, [_, _, _, s, ns, _])| [*s, *ns]).collect()
                    };
                    assert_eq!(times(&now), times(&saved.attributes));
                }
            });
            pod.start("c", &mut sleep());
            for reader in &readers {
                end(reader).unwrap();
            }
            loaded(&pod);
            stop.store(true, Ordering::Relaxed);
            stat.join().unwrap();
        });
        assert_whole(&root, &saved);
    }
}

#[test]
fn files_on_huge_pages_keep_them() {
    let saved = save();
    let mut pod = lazy_pod();
    let config = CONFIG.replace("size=256m", "size=256m\", \"huge=always");
    pod.prepare("c", &config, Some(&saved.image)).unwrap();
    let root = pod.mount("c.0");
    let readers = read_all(&root, 0..3);
    pod.start("c", &mut sleep());
    for reader in &readers {
        end(reader).unwrap();
    }
    loaded(&pod);
    assert_whole(&root, &saved);
    // Nobody waited for it while small files were being loaded.
    let blocks = root.join(large(LARGE - 1)).metadata().unwrap().blocks();
    assert_eq!(blocks % 4096, 0, "{blocks} blocks of 512 bytes aren't whole huge pages");
    // One for each would be more than there is room for.
    for index in 0..SMALL {
        assert!(root.join(small(index)).metadata().unwrap().blocks() <= 8, "{index}");
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mounts.lines().find(|line| line.contains(root.to_str().unwrap())).unwrap();
    assert!(line.contains("huge=always"), "{line}");
}

#[test]
fn a_loader_that_is_killed_is_followed_by_another() {
    let saved = save();
    for round in 0..6 {
        let mut pod = lazy_pod();
        pod.prepare("c", CONFIG, Some(&saved.image)).unwrap();
        let root = pod.mount("c.0");
        let (_, loader) = processes(&pod);
        if round % 2 == 0 {
            // Somebody waits while it can't do anything.
            signal(loader, nix::sys::signal::SIGSTOP);
            let readers = read_all(&root, 0..4);
            assert!(matches!(
                readers[0].recv_timeout(Duration::from_millis(20)),
                Err(RecvTimeoutError::Timeout)
            ));
            signal(loader, nix::sys::signal::SIGKILL);
            for reader in &readers {
                end(reader).unwrap();
            }
            pod.start("c", &mut sleep());
        } else {
            pod.start("c", &mut sleep());
            let readers = read_all(&root, 0..LARGE);
            signal(loader, nix::sys::signal::SIGKILL);
            for reader in &readers {
                end(reader).unwrap_or_else(|error| panic!("{error}: {:?}", pod.sandbox.load_status("c")));
            }
        }
        loaded(&pod);
        assert_whole(&root, &saved);
    }
}

#[test]
fn a_keeper_that_is_killed_lets_nobody_in() {
    let saved = save();
    let mut pod = lazy_pod();
    pod.prepare("c", CONFIG, Some(&saved.image)).unwrap();
    let root = pod.mount("c.0");
    let (keeper, loader) = processes(&pod);
    signal(loader, nix::sys::signal::SIGSTOP);
    // More than there are threads that read events.
    let early = read_all(&root, 0..20);
    let pidfd = rustix::process::pidfd_open(
        rustix::process::Pid::from_raw(keeper).unwrap(),
        rustix::process::PidfdFlags::empty(),
    )
    .unwrap();
    signal(keeper, nix::sys::signal::SIGKILL);
    let mut dead = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut dead, None).unwrap();
    let late = read_all(&root, 20..LARGE);
    signal(loader, nix::sys::signal::SIGCONT);
    for reader in &early {
        // An opener whose event is just being read when the keeper dies is refused; no other.
        if let Err(error) = end(reader) {
            let status = pod.sandbox.load_status("c");
            assert!(error.ends_with("Operation not permitted (os error 1)"), "{error}: {status:?}");
        }
    }
    for reader in &late {
        end(reader).unwrap();
    }
    pod.start("c", &mut sleep());
    loaded(&pod);
    assert_whole(&root, &saved);
}

#[test]
fn files_that_cannot_be_loaded_give_an_error_and_the_rest_is_there() {
    let saved = save();
    let pages = File::options().read(true).write(true).open(saved.image.join("pages.img")).unwrap();
    // The pages of a large file begin where its contents are found.
    let mut bytes = vec![0; pages.metadata().unwrap().len() as usize];
    pages.read_exact_at(&mut bytes, 0).unwrap();
    let wanted = &contents(&large(3), LARGE_SIZE)[..4096];
    let at = (0..bytes.len()).step_by(4096).find(|at| bytes[*at..].starts_with(wanted)).unwrap();
    pages.write_all_at(b"damaged!", at as u64 + (512 << 10)).unwrap();
    let mut pod = lazy_pod();
    pod.prepare("c", CONFIG, Some(&saved.image)).unwrap();
    let root = pod.mount("c.0");
    let early = read_all(&root, 3..4);
    pod.start("c", &mut sleep());
    let failed = end(&early[0]).unwrap_err();
    assert!(failed.ends_with(&io::Error::from_raw_os_error(denial()).to_string()), "{failed}");
    let status = loaded(&pod);
    assert_eq!(
        (status.phase, status.failed_files, status.loaded_files),
        (LoadPhase::Done, 1, status.files - 1)
    );
    let chunk = format!("{:#x}", (at + (512 << 10)) / 65536 * 65536);
    assert!(status.errors.len() == 1 && status.errors[0].contains(&chunk), "{status:?}, {chunk}");
    let again = File::open(root.join(large(3))).unwrap_err();
    assert_eq!(again.raw_os_error(), Some(denial()));
    for index in (0..LARGE).filter(|index| *index != 3) {
        let name = large(index);
        assert!(fs::read(root.join(&name)).unwrap() == contents(&name, LARGE_SIZE), "{name}");
    }
}

#[test]
fn damage_in_a_small_file_fails_the_start() {
    let saved = save();
    let pages = File::options().read(true).write(true).open(saved.image.join("pages.img")).unwrap();
    let mut bytes = vec![0; pages.metadata().unwrap().len() as usize];
    pages.read_exact_at(&mut bytes, 0).unwrap();
    let wanted = contents(&small(9), 100 + 9 * 13);
    let at = (0..bytes.len()).step_by(4096).find(|at| bytes[*at..].starts_with(&wanted)).unwrap();
    pages.write_all_at(b"damaged!", at as u64).unwrap();
    let mut pod = lazy_pod();
    pod.prepare("c", CONFIG, Some(&saved.image)).unwrap();
    let process = pod.spawn("c", &mut sleep());
    let error = stillframe_runtime::cli::chain(&pod.sandbox.set_init_pid("c", process).unwrap_err());
    assert!(error.contains("damaged at offset"), "{error}");
}

#[test]
fn what_is_done_to_a_pending_file_without_opening_it_stays_done() {
    let saved = save();
    let mut pod = lazy_pod();
    pod.prepare("c", CONFIG, Some(&saved.image)).unwrap();
    let root = pod.mount("c.0");
    fs::rename(root.join(large(0)), root.join("moved")).unwrap();
    fs::hard_link(root.join(large(1)), root.join("link")).unwrap();
    fs::remove_file(root.join(large(2))).unwrap();
    fs::set_permissions(root.join(large(3)), fs::Permissions::from_mode(0o600)).unwrap();
    let time = nix::sys::time::TimeSpec::new(1_000_000_000, 5);
    nix::sys::stat::utimensat(
        nix::fcntl::AT_FDCWD,
        &root.join(large(4)),
        &time,
        &time,
        nix::sys::stat::UtimensatFlags::FollowSymlink,
    )
    .unwrap();
    let cut = root.join(large(5));
    let truncated = begin(move || nix::unistd::truncate(&cut, 1000));
    pod.start("c", &mut sleep());
    end(&truncated).unwrap();
    loaded(&pod);
    let read = |name: &str| fs::read(root.join(name)).unwrap();
    assert!(read("moved") == contents(&large(0), LARGE_SIZE));
    assert!(read("link") == contents(&large(1), LARGE_SIZE));
    assert!(!root.join(large(2)).exists());
    assert_eq!(root.join(large(3)).metadata().unwrap().mode() & 0o7777, 0o600);
    assert_eq!(root.join(large(4)).metadata().unwrap().mtime(), 1_000_000_000);
    assert!(read(&large(5)) == contents(&large(5), LARGE_SIZE)[..1000]);
}

#[test]
fn a_checkpoint_taken_while_files_are_loaded_holds_all_of_them() {
    let saved = save();
    let mut first = lazy_pod();
    first.prepare("c", CONFIG, Some(&saved.image)).unwrap();
    let (_, loader) = processes(&first);
    first.start("c", &mut sleep());
    signal(loader, nix::sys::signal::SIGSTOP);
    let image = saved.dir.path().join("again");
    thread::scope(|scope| {
        let checkpoint = scope.spawn(|| first.checkpoint("c", &image, &[]).unwrap());
        signal(loader, nix::sys::signal::SIGCONT);
        checkpoint.join().unwrap()
    });
    let mut second = lazy_pod();
    second.prepare("c", CONFIG, Some(&image)).unwrap();
    second.start("c", &mut sleep());
    loaded(&second);
    assert_whole(&second.mount("c.0"), &saved);
}

#[test]
fn a_container_that_is_removed_meanwhile_leaves_nothing() {
    let saved = save();
    for begun in [false, true] {
        let mut pod = lazy_pod();
        pod.prepare("c", CONFIG, Some(&saved.image)).unwrap();
        let (keeper, loader) = processes(&pod);
        if begun {
            pod.start("c", &mut sleep());
        }
        pod.remove("c");
        pod.assert_nothing_is_left();
        for pid in [keeper, loader] {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            assert!(stat.is_empty() || stat.contains(") Z "), "{stat}");
        }
    }
}

#[test]
fn memory_is_charged_to_the_container() {
    let saved = save();
    let mut pod = lazy_pod();
    pod.prepare("c", CONFIG, Some(&saved.image)).unwrap();
    let process = pod.spawn("c", &mut sleep());
    let Some(cgroup) = pod.charge(process) else {
        println!("SKIPPED: memory_is_charged_to_the_container: no hierarchy counts memory");
        return;
    };
    pod.sandbox.set_init_pid("c", process).unwrap();
    let status = loaded(&pod);
    let charged = cgroup.usage();
    let of = cgroup.statistics();
    assert!((status.bytes..status.bytes * 3 / 2).contains(&charged), "{charged} of {}: {of}", status.bytes);
    pod.remove("c");
    drop(pod);
    assert!(fs::remove_dir(&cgroup.path).is_ok() || !cgroup.path.exists());
}

#[test]
fn all_is_loaded_before_the_start_where_that_is_asked_for() {
    let saved = save();
    for (load, annotation) in
        [(true, ""), (false, r#", "annotations": {"dev.stillframe.restore.load": "eager"}"#)]
    {
        let mut pod = pod_with(env!("CARGO_BIN_EXE_stillframe"), load);
        pod.prepare("c", &format!("{CONFIG}{annotation}"), Some(&saved.image)).unwrap();
        pod.start("c", &mut sleep());
        let status = pod.sandbox.load_status("c").unwrap().remove(0).1;
        assert_eq!((status.phase, status.loaded_files), (LoadPhase::Done, status.files));
    }
    let config = format!(r#"{CONFIG}, "annotations": {{"dev.stillframe.restore.load": "sometimes"}}"#);
    let error = lazy_pod().prepare("c", &config, Some(&saved.image)).unwrap_err();
    assert!(error.contains("\"sometimes\": give eager or lazy"), "{error}");
}

#[test]
fn the_command_tells_and_waits() {
    let saved = save();
    let mut pod = lazy_pod();
    pod.prepare("c", CONFIG, Some(&saved.image)).unwrap();
    let stillframe = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillframe"));
        command.args(arguments).args(["--namespace", &pod.namespace, "c"]).output().unwrap()
    };
    let output = stillframe(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (status[0]["phase"].as_str(), status[0]["filesystem"]["path"].as_str()),
        (Some("held"), Some("/data"))
    );
    let namespace = pod.namespace.clone();
    let waiting = begin(move || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillframe"));
        command.args(["wait", "--restored", "--namespace", &namespace, "c"]).output().unwrap()
    });
    assert!(matches!(waiting.recv_timeout(Duration::from_millis(50)), Err(RecvTimeoutError::Timeout)));
    pod.start("c", &mut sleep());
    let output = end(&waiting);
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8(output.stdout).unwrap().contains("done"));
}

#[test]
fn hooks_that_run_before_the_start_see_every_byte() {
    let saved = save();
    let mut pod = lazy_pod();
    let (bundle, out) = (pod.dir.path().join("c"), pod.dir.path().join("out"));
    let seen = bundle.join("rootfs/data");
    // In the container's mount namespace, before its root is changed.
    let script = format!(
        "cat {0}/{1} {0}/{2} > {3} && echo hook > {0}/{4}",
        seen.display(),
        small(299),
        large(5),
        out.display(),
        small(7)
    );
    let hook = serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
    let id = format!("{}-c", pod.namespace);
    let mounts = r#""mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}, "#;
    let config = CONFIG.replace(r#""mounts": ["#, mounts);
    let config = format!(
        r#"{config}, "ociVersion": "1.0.2", "process": {{"cwd": "/", "args": ["/none"], "user": {{"uid": 0, "gid": 0}}}},
        "linux": {{"namespaces": [{{"type": "pid"}}, {{"type": "mount"}}], "cgroupsPath": "/{id}"}},
        "hooks": {{"createContainer": [{hook}]}}"#
    );
    pod.prepare("c", &config, Some(&saved.image)).unwrap();
    fs::create_dir_all(&seen).unwrap();
    // It is never started, but runc looks whether it could be.
    fs::copy("/bin/true", bundle.join("rootfs/none")).unwrap();
    let state = pod.dir.path().join("runc");
    let runc = |arguments: &[&str]| {
        let mut command = Command::new("runc");
        command.arg("--root").arg(&state).args(arguments).stdin(std::process::Stdio::null());
        command
    };
    let (pid_file, log) = (pod.dir.path().join("pid"), pod.dir.path().join("log"));
    let mut create = runc(&["create", "--bundle", &bundle.to_string_lossy()]);
    create.arg("--pid-file").arg(&pid_file).arg(&id);
    let told = File::create(&log).unwrap();
    let created = create.stdout(told.try_clone().unwrap()).stderr(told).status().unwrap();
    assert!(created.success(), "{}", fs::read_to_string(&log).unwrap());
    let pid: i32 = fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    let expected = [contents(&small(299), 100 + 299 * 13), contents(&large(5), LARGE_SIZE)].concat();
    assert!(fs::read(&out).unwrap() == expected, "a hook has read something else");
    pod.sandbox.set_init_pid("c", pid).unwrap();
    loaded(&pod);
    let root = pod.mount("c.0");
    assert_eq!(fs::read(root.join(small(7))).unwrap(), b"hook\n", "what a hook wrote is overwritten");
    fs::write(root.join(small(7)), contents(&small(7), 100 + 7 * 13)).unwrap();
    for (name, size) in all() {
        assert!(fs::read(root.join(&name)).unwrap() == contents(&name, size), "{name}");
    }
    assert!(runc(&["delete", "--force", &id]).status().unwrap().success());
}

/// Writes until there is no room.
fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    let error = loop {
        match file.write(&[1; 4096]) {
            Ok(0) => panic!("nothing is written"),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
}

#[test]
fn who_fills_the_filesystem_before_all_is_loaded_takes_no_room_from_it() {
    const SIZE: u64 = 40 << 20;
    let saved = save();
    for huge in ["", "\", \"huge=always"] {
        let mut pod = lazy_pod();
        let config = CONFIG.replace("size=256m", &format!("size=40m{huge}"));
        pod.prepare("c", &config, Some(&saved.image)).unwrap();
        let root = pod.mount("c.0");
        fill(&root.join("filler"));
        pod.start("c", &mut sleep());
        let status = loaded(&pod);
        assert_eq!((status.failed_files, status.errors), (0, Vec::new()));
        assert_whole(&root, &saved);
        // It is larger by what there would have been no room for, and not by more.
        let space = rustix::fs::statfs(&root).unwrap();
        let (size, free) = (space.f_blocks * 4096, space.f_bfree * 4096);
        assert!(size > SIZE + (20 << 20) && size < SIZE + status.bytes * 2, "{size}");
        assert_eq!(free, 0, "of {size}");
        fs::remove_file(root.join("filler")).unwrap();
        fill(&root.join("filler"));
    }
}

#[test]
fn a_filesystem_is_as_large_as_before_when_what_filled_it_was_removed_meanwhile() {
    let saved = save();
    let mut pod = lazy_pod();
    pod.prepare("c", &CONFIG.replace("size=256m", "size=40m"), Some(&saved.image)).unwrap();
    let root = pod.mount("c.0");
    fill(&root.join("filler"));
    // Files that somebody waits for are loaded at once.
    read_all(&root, 0..LARGE - 1).iter().for_each(|reader| end(reader).unwrap());
    assert!(rustix::fs::statfs(&root).unwrap().f_blocks * 4096 > 40 << 20);
    fs::remove_file(root.join("filler")).unwrap();
    pod.start("c", &mut sleep());
    loaded(&pod);
    assert_whole(&root, &saved);
    assert_eq!(rustix::fs::statfs(&root).unwrap().f_blocks * 4096, 40 << 20);
}

#[test]
fn few_descriptors_are_enough_for_many_files_and_directories() {
    const FILES: usize = 3_000;
    const GATED: usize = 60;
    let name = |index: usize| format!("dir{index}/file");
    // Every fifth is large.
    let size = |index: usize| if index.is_multiple_of(5) { 70_000 } else { 100 + index };
    let mut pod = Pod::new();
    pod.running("c", CONFIG);
    for index in 0..FILES {
        let path = pod.mount("c.0").join(name(index));
        fs::create_dir(path.parent().unwrap()).unwrap();
        fs::write(&path, contents(&name(index), size(index))).unwrap();
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let image = dir.path().join("image");
    pod.checkpoint("c", &image, &[]).unwrap();
    let program = dir.path().join("limited");
    let script =
        format!("#!/bin/sh\nulimit -n {}\nexec {} \"$@\"\n", 500 + GATED, env!("CARGO_BIN_EXE_stillframe"));
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();

    let mut pod = pod_with(&program.to_string_lossy(), false);
    pod.prepare("c", CONFIG, Some(&image)).unwrap();
    let record = fs::read(pod.state().join("s/filesystems/c.0/load.json")).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    let gated = record["files"].as_array().unwrap().iter().filter(|file| file.is_number()).count();
    assert_eq!(gated, GATED);
    pod.start("c", &mut sleep());
    let status = loaded(&pod);
    assert_eq!((status.loaded_files, status.failed_files, status.errors), (FILES as u64, 0, Vec::new()));
    let root = pod.mount("c.0");
    for index in 0..FILES {
        assert!(fs::read(root.join(name(index))).unwrap() == contents(&name(index), size(index)), "{index}");
    }
}

#[test]
fn an_error_of_the_program_is_told() {
    let saved = save();
    let mut pod = pod_with("/bin/false", false);
    let error = pod.prepare("c", CONFIG, Some(&saved.image)).unwrap_err();
    assert!(error.contains("/bin/false ended with exit status: 1"), "{error}");
    let error: io::Error = File::open(pod.mount("c.0")).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}
