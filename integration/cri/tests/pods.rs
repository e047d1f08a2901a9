//! Pods under the runtime handler `stillframe`, as kubelet runs them, on every containerd.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use stillframe_cri::api::LinuxContainerResources;
use stillframe_cri::{Cri, MemoryVolume, State};
use stillframe_integration::{ContainerdVersion, watchdog};

stillframe_integration::with_every_containerd!(
    a_pod_of_two_containers_has_one_shim,
    the_killed_shim_of_a_pod_is_cleaned_up_after,
    containerd_restarts_beside_a_live_pod,
    pods_that_come_and_go_leave_nothing,
);

fn a_pod_of_two_containers_has_one_shim(version: &ContainerdVersion) {
    let cri = Cri::start(version).unwrap();
    let pod = cri.pod("pod").run().unwrap();
    let speaks = "echo out; echo err >&2; trap 'exit 9' TERM; while :; do usleep 9000; done";
    let first = pod.container("first").command(&["sh", "-c", speaks]).start().unwrap();
    let second = pod.container("second").start().unwrap();
    let shims = cri.containerd().shims();
    assert_eq!(shims.len(), 1, "{shims:?}");
    assert!(shims[0].exe.ends_with("containerd-shim-stillframe-v1"), "{shims:?}");

    let said = first.exec(&["sh", "-c", "echo a; echo b >&2; exit 3"]).unwrap();
    assert_eq!((said.code, said.stdout.as_str(), said.stderr.as_str()), (3, "a\n", "b\n"));
    let error = first.exec(&["no-such-command"]).unwrap_err().to_string();
    assert!(error.contains("no-such-command"), "{error}");
    // One IPC namespace and one /dev/shm; process ids of their own.
    first.shell("echo shared > /dev/shm/file");
    assert_eq!(second.shell("cat /dev/shm/file"), "shared\n");
    assert_eq!(first.shell("readlink /proc/self/ns/ipc"), second.shell("readlink /proc/self/ns/ipc"));
    assert_ne!(first.shell("readlink /proc/self/ns/pid"), second.shell("readlink /proc/self/ns/pid"));
    let log = first.log();
    for line in [" stdout F out", " stderr F err"] {
        assert!(log.lines().any(|one| one.ends_with(line)), "no {line:?} in {log:?}");
    }
    second.shell("head -c 3000000 /dev/zero > /dev/shm/charged");
    let stats = second.stats().unwrap();
    let memory = stats.memory.unwrap().working_set_bytes.unwrap().value;
    assert!(memory > 2_000_000, "{memory}");
    assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    second.update(LinuxContainerResources { memory_limit_in_bytes: 50 << 20, ..Default::default() }).unwrap();

    // Each ends by itself, with its own exit code, and the other one runs on.
    first.stop(20).unwrap();
    assert_eq!(first.await_state(State::ContainerExited).unwrap().exit_code, 9);
    assert_eq!(second.status().unwrap().state(), State::ContainerRunning);
    let short = pod.container("short").command(&["sh", "-c", "exit 5"]).start().unwrap();
    let status = short.await_state(State::ContainerExited).unwrap();
    assert_eq!((status.exit_code, status.reason.as_str()), (5, "Error"));
    // containerd notes the start after it has been told of it, so the end may come before it.
    assert!(status.finished_at >= status.created_at && status.started_at > 0, "{status:?}");
    short.remove().unwrap();
    first.remove().unwrap();
    assert!(pod.is_ready().unwrap());
    // Its first process is killed from outside.
    second.exec(&["kill", "-9", "1"]).unwrap();
    second.stop(0).unwrap();
    assert_eq!(second.await_state(State::ContainerExited).unwrap().exit_code, 137);
    pod.remove().unwrap();
    cri.containerd().assert_nothing_left();
    cri.stop().unwrap();
}

fn the_killed_shim_of_a_pod_is_cleaned_up_after(version: &ContainerdVersion) {
    let cri = Cri::start(version).unwrap();
    let spec = cri.pod("pod");
    let volume = MemoryVolume::new(cri.containerd().dir(), &spec.uid(), "cache", Some(8 << 20)).unwrap();
    let pod = spec.run().unwrap();
    let start = |name| pod.container(name).mount(volume.path(), "/cache").start().unwrap();
    let (first, second) = (start("first"), start("second"));
    first.shell("echo kept > /cache/file");
    let shims = cri.containerd().shims();
    assert_eq!(shims.len(), 1, "{shims:?}");
    kill(Pid::from_raw(shims[0].pid), Signal::SIGKILL).unwrap();
    for container in [&first, &second] {
        container.await_state(State::ContainerExited).unwrap();
    }
    // What kubelet does then: the volume is the pod's, and stays.
    pod.stop().unwrap();
    pod.remove().unwrap();
    assert_eq!(volume.names(), ["file"]);
    drop(volume);
    cri.containerd().assert_nothing_left();
    let pod = cri.pod("next").run().unwrap();
    pod.container("first").start().unwrap().shell("true");
    pod.remove().unwrap();
    cri.containerd().assert_nothing_left();
}

fn containerd_restarts_beside_a_live_pod(version: &ContainerdVersion) {
    let cri = Cri::start(version).unwrap();
    let pod = cri.pod("pod").run().unwrap();
    let first = pod.container("first").start().unwrap();
    first.shell("echo before > /dev/shm/file");
    for how in [watchdog::TERMINATE, watchdog::KILL] {
        cri.containerd().restart(how).unwrap();
        cri.await_ready().unwrap();
        assert!(pod.is_ready().unwrap(), "{how}");
        assert_eq!(first.status().unwrap().state(), State::ContainerRunning, "{how}");
        assert_eq!(first.shell("cat /dev/shm/file"), "before\n");
    }
    // The shim takes another container, and there is still one.
    let second = pod.container("second").start().unwrap();
    assert_eq!(second.shell("cat /dev/shm/file"), "before\n");
    assert_eq!(cri.containerd().shims().len(), 1);
    pod.remove().unwrap();
    cri.containerd().assert_nothing_left();
}

/// How many pods come and go; a longer run finds what leaks slowly.
const PODS: &str = "STILLFRAME_TEST_PODS";

fn pods_that_come_and_go_leave_nothing(version: &ContainerdVersion) {
    let pods = std::env::var(PODS).map_or(20, |pods| pods.parse().expect("a number of pods"));
    let cri = Cri::start(version).unwrap();
    let namespace = cri.containerd().namespace();
    let mut ids = Vec::new();
    let mut descriptors = 0;
    for round in 0..pods {
        let spec = cri.pod("pod");
        let volume = MemoryVolume::new(cri.containerd().dir(), &spec.uid(), "cache", Some(8 << 20)).unwrap();
        let disk = MemoryVolume::new(cri.containerd().dir(), &spec.uid(), "disk", None).unwrap();
        let hint = |field: &str| format!("dev.stillframe.mount.disk.{field}");
        let spec = spec.annotation(&hint("source"), &disk.path().display().to_string());
        let spec = [("medium", "disk"), ("share", "container"), ("options", "size=16m")]
            .iter()
            .fold(spec, |spec, (field, value)| spec.annotation(&hint(field), value));
        let pod = spec.run().unwrap();
        ids.push(pod.id().to_owned());
        let container = pod.container("only").mount(volume.path(), "/cache");
        let container = container.mount(disk.path(), "/disk").start().unwrap();
        container.shell("echo text | tee /cache/file > /disk/file");
        assert_eq!(filestores(&ids).len(), 2, "one, and the loop device on it: {:?}", filestores(&ids));
        let image = cri.containerd().dir().join("image");
        let path = image.display().to_string();
        let words = ["fscheckpoint", "--namespace", namespace, "--leave-running", "--image-path", &path];
        cri.containerd().stillframe(&[&words[..], &[container.id()]].concat()).unwrap();
        fs::remove_dir_all(&image).unwrap();
        // In each order that kubelet might have it, and some that it hasn't.
        match round % 5 {
            0 => {
                container.stop(0).unwrap();
                container.remove().unwrap();
            }
            1 => container.stop(0).unwrap(),
            2 => {
                let bundle = cri
                    .containerd()
                    .dir()
                    .join("state/io.containerd.runtime.v2.task/k8s.io")
                    .join(container.id());
                let pid = fs::read_to_string(bundle.join("init.pid")).unwrap();
                kill(Pid::from_raw(pid.trim().parse().unwrap()), Signal::SIGKILL).unwrap();
                container.await_state(State::ContainerExited).unwrap();
            }
            3 => {
                let shims = cri.containerd().shims();
                kill(Pid::from_raw(shims[0].pid), Signal::SIGKILL).unwrap();
                container.await_state(State::ContainerExited).unwrap();
            }
            _ => {}
        }
        pod.remove().unwrap();
        drop((volume, disk));
        if round == 4 {
            // By now containerd has what it keeps.
            cri.containerd().assert_nothing_left();
            descriptors = cri.containerd().descriptors();
        }
    }
    cri.containerd().assert_nothing_left();
    assert_eq!(filestores(&ids), Vec::<PathBuf>::new());
    let now = cri.containerd().descriptors();
    assert!(now <= descriptors + 5, "{pods} pods: containerd has {now} descriptors, had {descriptors}");
    cri.stop().unwrap();
}

/// The filestores of pods, and the files that loop devices are on, as far as they are these pods'.
fn filestores(pods: &[String]) -> Vec<PathBuf> {
    let devices = fs::read_dir("/sys/block").unwrap().flatten();
    let backing =
        devices.filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
    let backing = backing.map(|file| PathBuf::from(file.trim()));
    let directory = Path::new("/var/lib/stillframe/filestore/k8s.io");
    let files = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let theirs = |path: &PathBuf| {
        pods.iter().any(|pod| path.components().any(|part| part.as_os_str() == pod.as_str()))
    };
    backing.chain(files).filter(theirs).collect()
}
