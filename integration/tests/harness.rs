//! The harness itself, with runc's own shim: what it starts works, and whatever ends a test, nothing is left.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use stillframe_integration::watchdog::Plan;
use stillframe_integration::{Background, Containerd, RUNC, compare, residue};

#[test]
fn a_container_runs_and_leaves_nothing() {
    let containerd = Containerd::start().unwrap();
    let said = containerd.container("once").runtime(RUNC).arguments(&["echo", "hello"]).run().unwrap();
    assert_eq!(said.stdout, "hello\n");
    let container = containerd.container("c").runtime(RUNC).tmpfs("/scratch", "size=64m").start().unwrap();
    container.exec(&["probe", "fill", "/scratch", "--seed", "1", "--beyond-path-max"]).unwrap();
    let before = container.list("/scratch").unwrap();
    let after = container.list("/scratch").unwrap();
    assert_eq!(compare(&before, &after), []);
    assert!(before.len() > 400, "{}", before.len());
    let there = containerd.residue();
    for (what, found) in
        [("shim and process", &there.processes), ("rootfs", &there.mounts), ("cgroup", &there.cgroups)]
    {
        assert!(!found.is_empty(), "no {what}, of a container that runs:\n{there}");
    }
    for part in ["/run/containerd/runc/", "/run/containerd/s/", "/state/"] {
        assert!(there.files.iter().any(|path| path.contains(part)), "nothing in {part}:\n{there}");
    }
    container.remove().unwrap();
    let residue = containerd.settled_residue();
    assert!(residue.is_empty(), "{residue}");
    containerd.stop().unwrap();
}

#[test]
fn what_a_test_leaves_running_is_removed() {
    let containerd = Containerd::start().unwrap();
    let (namespace, dir) = (containerd.namespace().to_owned(), containerd.dir().to_owned());
    let container = containerd.container("c").runtime(RUNC).tmpfs("/scratch", "size=64m").start().unwrap();
    let pid = container.pid().unwrap().unwrap();
    // The worst case: frozen, and its shim is dead.
    containerd.ctr().run(&["tasks", "pause", container.id()]).unwrap();
    let shim = Pid::from_raw(containerd.shims()[0].pid);
    kill(shim, Signal::SIGSTOP).unwrap();
    containerd.stop().unwrap();
    gone(&namespace, &dir);
    assert!(kill(Pid::from_raw(pid), None).is_err(), "the container's process {pid} is still there");
}

/// Not a test by itself: what the next ones start and kill.
#[test]
fn victim() {
    if std::env::var_os("STILLFRAME_VICTIM").is_none() {
        return;
    }
    let containerd = Containerd::start().unwrap();
    let container = containerd.container("c").runtime(RUNC).tmpfs("/scratch", "size=64m").start().unwrap();
    println!(
        "up {} {} {}",
        containerd.namespace(),
        containerd.dir().display(),
        container.pid().unwrap().unwrap()
    );
    loop {
        std::thread::park();
    }
}

#[test]
fn a_killed_test_leaves_nothing() {
    let code = end_the_victim(Signal::SIGKILL);
    assert_eq!(code, None);
}

#[test]
fn an_interrupted_test_leaves_nothing() {
    let code = end_the_victim(Signal::SIGINT);
    assert_eq!(code, Some(130));
}

fn end_the_victim(signal: Signal) -> Option<i32> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "victim", "--nocapture"]).env("STILLFRAME_VICTIM", "1");
    let mut victim = Background::start(&mut command).unwrap();
    let line = victim.expect_line("up", |line| line.contains("up sf-")).unwrap();
    let words: Vec<&str> = line[line.find("up sf-").unwrap()..].split(' ').collect();
    let (namespace, dir, pid) = (words[1], Path::new(words[2]), words[3].parse().unwrap());
    kill(Pid::from_raw(victim.pid()), signal).unwrap();
    let code = match victim.wait() {
        Ok((code, _)) => Some(code),
        Err(_) => None,
    };
    // The directory is the last that the watchdog removes; nobody else could tell us that it's done.
    let end = Instant::now() + Duration::from_secs(30);
    while dir.exists() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    gone(namespace, dir);
    assert!(kill(Pid::from_raw(pid), None).is_err(), "the container's process {pid} is still there");
    code
}

#[track_caller]
fn gone(namespace: &str, dir: &Path) {
    assert!(!dir.exists(), "{}", dir.display());
    assert_eq!(residue::cgroups(namespace), Vec::<std::path::PathBuf>::new());
    let plan = Plan {
        dir: dir.to_owned(),
        namespace: namespace.to_owned(),
        cgroup: namespace.to_owned(),
        shared: false,
        containerd: Default::default(),
        config: Default::default(),
        log: Default::default(),
        path: String::new(),
    };
    assert_eq!(residue::files(&plan), Vec::<std::path::PathBuf>::new());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&*dir.to_string_lossy()), "{mounts}");
}
