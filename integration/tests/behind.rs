//! Restoring behind the start, as a container of containerd's sees it: nobody reads what isn't there, whatever dies.

use std::path::Path;
use std::process::Command;

use stillframe_integration::reads::Reads;
use stillframe_integration::{Background, Container, Containerd, binaries, compare};

const CHECKPOINT: &str = "stillframe.test/checkpoint:1";

fn saved(containerd: &Containerd) -> stillframe_integration::Listing {
    let container = containerd.container("c").tmpfs("/scratch", "size=200m").start().unwrap();
    container
        .shell("cd /scratch; for i in $(seq 1 60); do head -c 2000000 /dev/urandom > $i; echo small > s$i; done; \
                cp /bin/busybox . && chmod 755 busybox")
        .unwrap();
    let listing = container.list("/scratch").unwrap();
    containerd.checkpoint(container.id(), CHECKPOINT).unwrap();
    container.remove().unwrap();
    listing
}

fn wait(containerd: &Containerd, id: &str) -> String {
    containerd
        .stillframe(&["wait", "--restored", "--json", "--namespace", containerd.namespace(), id])
        .unwrap()
        .stdout
}

#[test]
fn a_restored_container_sees_everything_from_its_first_moment() {
    let containerd = Containerd::start().unwrap();
    let before = saved(&containerd);
    for round in 0..3 {
        let container = Container::restore(&containerd, &format!("r{round}"), CHECKPOINT).unwrap();
        // A file before its turn; then all of them, reading which changes no access time; then a program.
        assert_eq!(container.shell("wc -c < /scratch/s60").unwrap().stdout, "6\n");
        let differences = compare(&before, &container.list("/scratch").unwrap());
        let differences: Vec<_> =
            differences.iter().filter(|d| !d.to_string().contains("s60: atime")).collect();
        assert!(differences.is_empty(), "{differences:?}");
        assert_eq!(container.shell("/scratch/busybox echo runs").unwrap().stdout, "runs\n");
        let status: serde_json::Value = serde_json::from_str(&wait(&containerd, container.id())).unwrap();
        assert_eq!((status[0]["phase"].as_str(), status[0]["files"].as_u64()), (Some("done"), Some(121)));
        container.remove().unwrap();
        containerd.assert_nothing_left();
    }
}

#[test]
fn a_shim_that_is_killed_meanwhile_stops_nothing() {
    let containerd = Containerd::start().unwrap();
    saved(&containerd);
    let image = containerd.dir().join("image");
    containerd.unpack_checkpoint(CHECKPOINT, &image).unwrap();
    let spec = containerd.container("r").tmpfs("/scratch", "size=200m");
    let container = spec.annotation("dev.stillframe.restore-from", &image.to_string_lossy()).start().unwrap();
    let pid = container.pid().unwrap().unwrap();
    let scratch = std::path::PathBuf::from(format!("/proc/{pid}/root/scratch"));
    let shims = containerd.shims();
    let [shim] = shims.as_slice() else { panic!("{} shims", shims.len()) };
    let opened: Vec<_> = (1..=60)
        .map(|number| {
            let path = scratch.join(number.to_string());
            std::thread::spawn(move || std::fs::read(path).map(|bytes| bytes.iter().all(|byte| *byte == 0)))
        })
        .collect();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim.pid), nix::sys::signal::SIGKILL).unwrap();
    for opened in opened {
        // containerd ends the container when its shim is gone; until then everybody reads what was saved.
        if let Ok(zeros) = opened.join().unwrap() {
            assert!(!zeros);
        }
    }
    container.remove().unwrap();
    containerd.assert_nothing_left();
}

#[test]
fn containers_that_are_paused_killed_and_removed_while_they_are_loaded() {
    let containerd = Containerd::start().unwrap();
    let before = saved(&containerd);
    let ctr = containerd.ctr();
    let container = Container::restore(&containerd, "paused", CHECKPOINT).unwrap();
    ctr.run(&["tasks", "pause", container.id()]).unwrap();
    // It is loaded all the same.
    wait(&containerd, container.id());
    ctr.run(&["tasks", "resume", container.id()]).unwrap();
    assert_eq!(compare(&before, &container.list("/scratch").unwrap()), []);
    container.remove().unwrap();
    for round in 0..3 {
        Container::restore(&containerd, &format!("gone{round}"), CHECKPOINT).unwrap().remove().unwrap();
    }
    containerd.assert_nothing_left();
    // A checkpoint of one that isn't loaded yet holds all of it.
    let container = Container::restore(&containerd, "again", CHECKPOINT).unwrap();
    let image = containerd.dir().join("image").to_string_lossy().into_owned();
    let words =
        ["fscheckpoint", "--leave-running", "--image-path", &image, "--namespace", containerd.namespace()];
    containerd.stillframe(&[&words[..], &[container.id()]].concat()).unwrap();
    container.remove().unwrap();
    let last = containerd.container("last").tmpfs("/scratch", "size=200m");
    let container = last.annotation("dev.stillframe.restore-from", &image).start().unwrap();
    assert_eq!(compare(&before, &container.list("/scratch").unwrap()), []);
    container.remove().unwrap();
    containerd.assert_nothing_left();
}

/// What is to be read of a container's image for its large files is held: its loader doesn't get beyond the small ones.
fn hold_large(containerd: &Containerd, id: &str, image: &Path) -> Reads {
    let (namespace, id) = (containerd.namespace().to_owned(), id.to_owned());
    let is_loader = |pid: i32| {
        // Of the two that `load`, the keeper reads nothing.
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).nth(1) == Some(b"load")
    };
    let hold = move |pid| is_loader(pid) && load_status(&namespace, &id)["phase"] == "large";
    Reads::of(&image.join("pages.img"), hold)
}

/// What is loaded of the one filesystem of a container; null as long as there is no such container.
fn load_status(namespace: &str, id: &str) -> serde_json::Value {
    let program = binaries::program("stillframe");
    let said = Command::new(program).args(["status", "--json", "--namespace", namespace, id]).output();
    let status: serde_json::Value = serde_json::from_slice(&said.unwrap().stdout).unwrap_or_default();
    status[0].clone()
}

#[test]
fn a_checkpoint_by_containerd_waits_for_nothing_that_is_being_loaded() {
    const AGAIN: &str = "stillframe.test/again:1";
    let containerd = Containerd::start().unwrap();
    let before = saved(&containerd);
    let image = containerd.dir().join("image");
    containerd.unpack_checkpoint(CHECKPOINT, &image).unwrap();
    let restored = |name: &str, image: &Path| {
        let spec = containerd.container(name).tmpfs("/scratch", "size=200m");
        spec.annotation("dev.stillframe.restore-from", &image.to_string_lossy())
    };
    let same = |container: &Container<'_>| {
        assert_eq!(compare(&before, &container.list("/scratch").unwrap()), [], "{}", container.id());
    };

    // containerd pauses it meanwhile; it runs on.
    let spec = restored("midst", &image);
    let reads = hold_large(&containerd, spec.id(), &image);
    let container = spec.start().unwrap();
    reads.await_held();
    containerd.checkpoint(container.id(), AGAIN).unwrap();
    let status = load_status(containerd.namespace(), container.id());
    assert_eq!(status["phase"], "large");
    assert!(status["loaded_files"].as_u64().unwrap() < 121);
    assert_eq!(container.status().unwrap().as_deref(), Some("RUNNING"));
    drop(reads);
    same(&container);
    // Not beside it, since ctr gives the copy the same cgroup.
    container.remove().unwrap();
    let copy = Container::restore(&containerd, "copy", AGAIN).unwrap();
    same(&copy);
    copy.remove().unwrap();

    // It ends with the checkpoint, and so does its load.
    let spec = restored("last", &image);
    let reads = hold_large(&containerd, spec.id(), &image);
    let container = spec.start().unwrap();
    reads.await_held();
    let again = containerd.dir().join("again");
    let words = ["fscheckpoint", "--namespace", containerd.namespace(), "--image-path"];
    containerd.stillframe(&[&words[..], &[&again.to_string_lossy(), container.id()]].concat()).unwrap();
    container.await_status("STOPPED").unwrap();
    drop(reads);
    container.remove().unwrap();
    let copy = restored("copy", &again).start().unwrap();
    same(&copy);
    copy.remove().unwrap();
    containerd.assert_nothing_left();
}

/// Whether this process, and so those that it starts, has CAP_SYS_RESOURCE.
fn may_lower_oom_score() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap() & 1 << 24 != 0
}

#[test]
fn an_image_that_exceeds_the_memory_limit_ends_the_container() {
    let containerd = Containerd::start().unwrap();
    saved(&containerd);
    let image = containerd.dir().join("image");
    containerd.unpack_checkpoint(CHECKPOINT, &image).unwrap();
    let spec = containerd.container("r").tmpfs("/scratch", "size=200m").option("--memory-limit=50000000");
    let events = Background::start(&mut containerd.ctr().command(&["events"])).unwrap();
    let mut events = events;
    let container = spec.annotation("dev.stillframe.restore-from", &image.to_string_lossy()).start().unwrap();
    // As if it had written as much itself.
    events.expect_line("an out-of-memory event", |line| line.contains("/tasks/oom")).unwrap();
    if may_lower_oom_score() {
        container.await_status("STOPPED").unwrap();
    } else {
        // Without CAP_SYS_RESOURCE the loader can't be kept from being the victim itself.
        let words = ["wait", "--restored", "--namespace", containerd.namespace(), container.id()];
        let error = containerd.stillframe(&words).unwrap_err();
        assert!(error.stderr.contains("memory limit too small"), "{error}");
        // From outside: in the container there is no memory left for a process.
        let scratch = format!("/proc/{}/root/scratch", container.pid().unwrap().unwrap());
        let files = (1..=60).map(|number| std::fs::read(format!("{scratch}/{number}")));
        let errors: Vec<_> = files.filter_map(Result::err).map(|error| error.raw_os_error()).collect();
        assert!(
            !errors.is_empty() && errors.iter().all(|error| *error == Some(nix::errno::Errno::EIO as i32)),
            "{errors:?}"
        );
    }
    container.remove().unwrap();
    drop(events);
    containerd.assert_nothing_left();
}
