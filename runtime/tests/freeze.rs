//! What becomes of the freeze when a checkpoint is killed in it, or takes too long.
//!
//! A checkpoint is held at a known place by a fanotify permission event: reading a file under the freeze, it waits until it
//! is let.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::fanotify::{
    EventFFlags, Fanotify, FanotifyEvent, FanotifyResponse, InitFlags, MarkFlags, MaskFlags, Response,
};
use stillframe_runtime::freezer::{Cgroup, FREEZE_TIMEOUT};
use stillframe_runtime::sandbox::{CheckpointCause, CheckpointRequest, Phase};

#[path = "support/pod.rs"]
mod pod;

use pod::Pod;

const MOUNT: &str = r#""mounts":[{"destination":"/scratch","type":"tmpfs","options":["size=64m"]}]"#;

/// Holds whoever opens a file of a filesystem.
struct Gate {
    group: Fanotify,
}

impl Gate {
    fn new(mountpoint: &Path) -> Self {
        let group = Fanotify::init(
            InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK,
            EventFFlags::O_RDONLY,
        );
        let group = group.unwrap();
        let mark = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM;
        group.mark(mark, MaskFlags::FAN_OPEN_PERM, File::open(mountpoint).unwrap(), Some(".")).unwrap();
        Self { group }
    }

    /// Waits for somebody to hold.
    fn wait(&self) -> FanotifyEvent {
        let mut wanted = [PollFd::new(self.group.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut wanted, PollTimeout::from(30_000u16)).unwrap(), 1, "nobody opens a file");
        self.group.read_events().unwrap().pop().unwrap()
    }

    fn let_go(&self, event: &FanotifyEvent) {
        let response = FanotifyResponse::new(event.fd().unwrap(), Response::FAN_ALLOW);
        self.group.write_response(response).unwrap();
    }
}

fn is_frozen(cgroup: &Path) -> bool {
    let state = fs::read_to_string(cgroup.join("freezer.state"));
    let state = state.or_else(|_| fs::read_to_string(cgroup.join("cgroup.freeze"))).unwrap();
    matches!(state.trim(), "FROZEN" | "FREEZING" | "1")
}

/// Freezes it, as runc does for a pause.
fn freeze(cgroup: &Path) {
    let v1 = cgroup.join("freezer.state").exists();
    let cgroup = if v1 { Cgroup::V1(cgroup.to_owned()) } else { Cgroup::V2(cgroup.to_owned()) };
    // It stays so.
    std::mem::forget(cgroup.freeze(FREEZE_TIMEOUT).unwrap());
}

/// A pod with containers of these ids that share nothing; each has a file.
fn pod(ids: &[&'static str]) -> Pod {
    let mut pod = Pod::new();
    for id in ids {
        pod.running(id, MOUNT);
        fs::write(pod.mount(&format!("{id}.0")).join("file"), vec![7; 100_000]).unwrap();
    }
    pod
}

fn fscheckpoint(pod: &Pod, image: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stillframe"));
    command.args(["fscheckpoint", "--leave-running", "--no-precopy", "--namespace", &pod.namespace]);
    command.arg("--image-path").arg(image).arg("c");
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// A checkpoint that was killed while it had the container frozen.
fn killed_in_the_freeze(pod: &Pod, image: &Path) {
    let gate = Gate::new(&pod.mount("c.0"));
    let mut command = fscheckpoint(pod, image);
    let held = gate.wait();
    assert_eq!(held.pid(), command.id().cast_signed());
    assert!(is_frozen(&pod.processes[0].1), "it reads under the freeze");
    command.kill().unwrap();
    command.wait().unwrap();
}

fn marker(pod: &Pod) -> PathBuf {
    pod.state().join("s/freeze.json")
}

#[test]
fn what_a_killed_checkpoint_froze_is_thawed_by_whoever_comes_next() {
    let dir = tempfile::tempdir().unwrap();
    let mut pod = pod(&["c"]);
    let cgroup = pod.processes[0].1.clone();

    killed_in_the_freeze(&pod, &dir.path().join("first"));
    assert!(is_frozen(&cgroup) && marker(&pod).exists(), "the kernel thaws nothing by itself");
    pod.sandbox.recover().unwrap();
    assert!(!is_frozen(&cgroup) && !marker(&pod).exists());

    killed_in_the_freeze(&pod, &dir.path().join("second"));
    assert!(fscheckpoint(&pod, &dir.path().join("third")).wait().unwrap().success());
    assert!(!is_frozen(&cgroup) && !marker(&pod).exists());

    killed_in_the_freeze(&pod, &dir.path().join("fourth"));
    pod.remove("c");
    assert!(!is_frozen(&cgroup));
}

#[test]
fn what_was_paused_before_a_checkpoint_was_killed_stays_paused() {
    let dir = tempfile::tempdir().unwrap();
    let pod = pod(&["c"]);
    let cgroup = pod.processes[0].1.clone();
    freeze(&cgroup);
    killed_in_the_freeze(&pod, &dir.path().join("image"));
    pod.sandbox.recover().unwrap();
    assert!(is_frozen(&cgroup) && !marker(&pod).exists());
    // Nor does a limit count that it was paused.
    let image = dir.path().join("another");
    let request =
        CheckpointRequest { pause_limit: Some(Duration::ZERO), ..CheckpointRequest::new("c", image) };
    pod.sandbox.checkpoint(&request).unwrap();
    assert!(is_frozen(&cgroup));
}

#[test]
fn a_pause_that_takes_too_long_ends_at_its_limit_whatever_is_being_done() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let pod = pod(&["c"]);
    let cgroup = pod.processes[0].1.clone();
    let request = CheckpointRequest {
        precopy: false,
        pause_limit: Some(Duration::from_millis(50)),
        ..CheckpointRequest::new("c", &image)
    };
    let gate = Gate::new(&pod.mount("c.0"));
    let error = std::thread::scope(|scope| {
        let checkpoint = scope.spawn(|| pod.sandbox.checkpoint(&request));
        let held = gate.wait();
        // It can't go on, and yet the container does.
        let deadline = Instant::now() + Duration::from_secs(30);
        while is_frozen(&cgroup) {
            assert!(Instant::now() < deadline, "still frozen");
            std::thread::yield_now();
        }
        assert!(!checkpoint.is_finished());
        gate.let_go(&held);
        drop(gate);
        checkpoint.join().unwrap().unwrap_err()
    });
    assert_eq!(error.phase, Phase::Settle);
    let CheckpointCause::PauseLimit { paused_ms, limit_ms: 50 } = *error.cause else { panic!("{error}") };
    assert!(paused_ms >= 50.0);
    assert!(!image.exists() && !marker(&pod).exists());

    let enough = CheckpointRequest { pause_limit: Some(Duration::from_secs(60)), ..request };
    let result = pod.sandbox.checkpoint(&enough).unwrap();
    assert!(!is_frozen(&cgroup));
    let phases: Vec<Phase> = result.phases.iter().map(|time| time.phase).collect();
    use Phase::{Commit, Copy, Freeze, Prepare, Settle, Thaw};
    assert_eq!(phases, [Prepare, Copy, Freeze, Settle, Thaw, Commit]);
}

/// A process of the container in uninterruptible sleep: it waits for a loop device, whose file is on a filesystem that is frozen
/// until this is dropped. (One that waits for the frozen filesystem itself can be frozen.)
struct Stuck {
    mountpoint: PathBuf,
    device: String,
    writer: Child,
}

impl Stuck {
    fn new(cgroup: &Path, mountpoint: PathBuf) -> Self {
        let file = mountpoint.join("device");
        File::create(&file).unwrap().set_len(1 << 20).unwrap();
        let output = Command::new("losetup").args(["--find", "--show"]).arg(&file).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        let status = Command::new("fsfreeze").arg("--freeze").arg(&mountpoint).status().unwrap();
        assert!(status.success());
        let line = format!(
            "echo $$ > {}/cgroup.procs; exec dd if=/dev/zero of={device} bs=4096 count=1 oflag=direct status=none",
            cgroup.display()
        );
        let writer = Command::new("sh").args(["-c", &line]).spawn().unwrap();
        let mut stuck = Self { mountpoint, device, writer };
        let stat = format!("/proc/{}/stat", stuck.writer.id());
        let deadline = Instant::now() + Duration::from_secs(30);
        while !fs::read_to_string(&stat).unwrap().contains("(dd) D ") {
            assert!(
                Instant::now() < deadline && stuck.writer.try_wait().unwrap().is_none(),
                "it isn't stuck"
            );
            std::thread::yield_now();
        }
        stuck
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&self.mountpoint).status();
        let _ = self.writer.wait();
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}

#[test]
fn a_process_in_uninterruptible_sleep_is_named_and_everything_thawed() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let mut pod = Pod::new();
    let scratch = r#"{"destination":"/scratch","type":"tmpfs","options":["size=64m"]}"#;
    let disk = r#"{"destination":"/disk","type":"tmpfs","source":"disk","options":["size=64m"]}"#;
    let hints = r#""annotations":{"dev.stillframe.mount.disk.source":"disk","dev.stillframe.mount.disk.medium":"disk","dev.stillframe.mount.disk.share":"container","dev.stillframe.mount.disk.options":"size=64m"}"#;
    pod.running("c", &format!(r#""mounts":[{scratch},{disk}],{hints}"#));
    pod.running("other", MOUNT);
    let cgroup = pod.processes[0].1.clone();
    let stuck = Stuck::new(&cgroup, pod.mount("c.1"));
    let request =
        CheckpointRequest { paths: vec!["/scratch".parse().unwrap()], ..CheckpointRequest::new("c", &image) };
    let error = pod.sandbox.checkpoint(&request).unwrap_err();
    let text = stillframe_runtime::cli::chain(&error);
    assert!(
        text.contains(&format!("process {} (dd), which is in uninterruptible sleep", stuck.writer.id())),
        "{text}"
    );
    assert_eq!(error.phase, Phase::Freeze);
    assert!(!is_frozen(&cgroup) && !image.exists() && !marker(&pod).exists());
    let limited = CheckpointRequest { pause_limit: Some(Duration::from_millis(20)), ..request.clone() };
    let error = pod.sandbox.checkpoint(&limited).unwrap_err();
    assert!(matches!(*error.cause, CheckpointCause::PauseLimit { limit_ms: 20, .. }), "{error}");
    assert!(!is_frozen(&cgroup) && !image.exists() && !marker(&pod).exists());
    drop(stuck);
    pod.sandbox.checkpoint(&request).unwrap();
}

#[test]
fn a_container_that_exits_during_a_checkpoint_is_saved_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    // While it is copied, and under the freeze.
    for precopy in [true, false] {
        let image = dir.path().join(if precopy { "copy" } else { "freeze" });
        let mut pod = pod(&["c"]);
        let (pid, cgroup) = (pod.processes[0].0.id(), pod.processes[0].1.clone());
        let request = CheckpointRequest { precopy, ..CheckpointRequest::new("c", &image) };
        let gate = Gate::new(&pod.mount("c.0"));
        let result = std::thread::scope(|scope| {
            let checkpoint = scope.spawn(|| pod.sandbox.checkpoint(&request));
            let held = gate.wait();
            assert_eq!(is_frozen(&cgroup), !precopy);
            let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            if precopy {
                // It is gone altogether, with its cgroup.
                rustix::process::waitid(
                    rustix::process::WaitId::Pid(pid),
                    rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
                )
                .unwrap();
                while fs::remove_dir(&cgroup).is_err() {
                    std::thread::yield_now();
                }
            }
            gate.let_go(&held);
            drop(gate);
            checkpoint.join().unwrap()
        });
        let result = result.unwrap();
        assert_eq!((result.files, result.pages_bytes), (1, 102_400), "{precopy}");
        pod.await_death();
        assert!(!marker(&pod).exists() && (precopy || !is_frozen(&cgroup)));
    }
}
