//! Keeper and loader of a filesystem killed at once: the gate stays closed for as long as whoever made the sandbox lives.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

#[path = "support/behind.rs"]
mod behind;
#[path = "support/pod.rs"]
mod pod;

use behind::{contents, lazy_pod, sleep};
use pod::Pod;

const CONFIG: &str = r#""root": {"path": "rootfs"}, "mounts": [
    {"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["size=64m"]}]"#;
const FILES: [&str; 2] = ["early", "late"];

/// Somebody who reads a file, and has come to the gate.
fn reader(path: &Path) -> Child {
    let mut child = Command::new("cat").arg(path).stdout(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !waits(&child) {
        assert!(child.try_wait().unwrap().is_none(), "it was let in");
        assert!(Instant::now() < deadline, "it doesn't come to the gate");
        std::thread::yield_now();
    }
    child
}

fn waits(child: &Child) -> bool {
    fs::read_to_string(format!("/proc/{}/wchan", child.id())).is_ok_and(|place| place.contains("fanotify"))
}

#[test]
fn with_keeper_and_loader_killed_nobody_is_let_in_to_what_is_not_there() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let image = dir.path().join("image");
    {
        let mut pod = Pod::new();
        pod.running("c", CONFIG);
        for name in FILES {
            fs::write(pod.mount("c.0").join(name), contents(name, 1 << 20)).unwrap();
        }
        pod.checkpoint("c", &image, &[]).unwrap();
    }
    let mut pod = lazy_pod();
    let prepared = pod.prepare("c", CONFIG, Some(&image)).unwrap();

    assert_eq!(prepared.gates.len(), 1);
    let root = pod.mount("c.0");
    let record = fs::read(pod.state().join("s/filesystems/c.0/load.json")).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    let pid = |who: &str| Pid::from_raw(record[who]["pid"].as_i64().unwrap() as i32).unwrap();
    let both = [pid("keeper"), pid("loader")];
    // Neither can answer, nor replace the other.
    both.iter().for_each(|pid| kill_process(*pid, Signal::STOP).unwrap());
    let mut early = reader(&root.join("early"));
    let ends = both.map(|pid| pidfd_open(pid, PidfdFlags::empty()).unwrap());
    both.iter().for_each(|pid| kill_process(*pid, Signal::KILL).unwrap());
    for end in &ends {
        poll(&mut [PollFd::new(end, PollFlags::IN)], None).unwrap();
    }
    let mut late = reader(&root.join("late"));
    for child in [&mut early, &mut late] {
        assert!(waits(child) && child.try_wait().unwrap().is_none(), "it was let in");
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success());
    }
    let pid = pod.spawn("c", &mut sleep());
    assert!(pod.sandbox.set_init_pid("c", pid).is_err(), "nobody loads it");
    // What is removed has nobody who could open it.
    pod.remove("c");
    drop(prepared);
}
