//! Two containers of a pod that share a filesystem which is being loaded.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

#[path = "support/behind.rs"]
mod behind;
#[path = "support/pod.rs"]
mod pod;

use behind::{contents, lazy_pod, sleep};
use pod::Pod;
use stillframe_integration::reads::Reads;
use stillframe_runtime::sandbox::LoadPhase;

const FILES: usize = 200;

/// A container that mounts the pod's volume.
fn config() -> &'static str {
    r#""root": {"path": "rootfs"}, "mounts": [
        {"destination": "/cache", "type": "bind", "source": "/vol", "options": ["rbind"]}], "annotations": {
        "dev.stillframe.mount.vol.source": "/vol", "dev.stillframe.mount.vol.medium": "memory",
        "dev.stillframe.mount.vol.share": "pod", "dev.stillframe.mount.vol.options": "size=64m"}"#
}

fn name(number: usize) -> String {
    format!("file-{number}")
}

fn wrong(volume: &Path) -> usize {
    let is_wrong = |number: &usize| {
        let want = contents(&name(*number), 1000 + number);
        fs::read(volume.join(name(*number))).unwrap() != want
    };
    (0..FILES).filter(is_wrong).count()
}

#[test]
fn a_second_container_waits_for_the_small_files_as_the_first_does() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let image = dir.path().join("image");
    {
        let mut pod = Pod::new();
        pod.running("a", config());
        for number in 0..FILES {
            let path = pod.mount("pod-vol").join(name(number));
            fs::write(path, contents(&name(number), 1000 + number)).unwrap();
        }
        pod.checkpoint("a", &image, &[]).unwrap();
    }
    let mut pod = lazy_pod();
    let volume = pod.mount("pod-vol");
    let sandbox = pod.sandbox.clone();
    let is_small = move |_| {
        let status = sandbox.load_status("a").unwrap_or_default();
        status.first().is_some_and(|(_, status)| status.phase == LoadPhase::Small)
    };
    let reads = Reads::of(&image.join("pages.img"), is_small);
    let start = |pod: &mut Pod, id: &'static str, command: &mut Command| {
        let pid = pod.spawn(id, command);
        let (sandbox, volume) = (pod.sandbox.clone(), volume.clone());
        let (done, result) = channel();
        thread::spawn(move || {
            sandbox.set_init_pid(id, pid).unwrap();
            // Its program would run now.
            done.send(wrong(&volume)).unwrap();
        });
        result
    };
    pod.prepare("a", config(), Some(&image)).unwrap();
    let first = start(&mut pod, "a", &mut sleep());
    reads.await_held();
    pod.prepare("b", config(), Some(&image)).unwrap();
    let second = start(&mut pod, "b", &mut sleep());
    // That nothing happens can't be awaited; if it did, it would find nothing in the files.
    let none = Err(RecvTimeoutError::Timeout);
    assert_eq!(second.recv_timeout(Duration::from_millis(300)), none);
    assert_eq!(first.recv_timeout(Duration::ZERO), none);
    drop(reads);
    assert_eq!(first.recv_timeout(Duration::from_secs(60)), Ok(0));
    assert_eq!(second.recv_timeout(Duration::from_secs(60)), Ok(0));
}
