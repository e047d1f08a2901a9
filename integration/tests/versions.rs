//! What differs, or could, from one containerd to the next: the first words with the shim, the task API's version, what a
//! checkpoint's directory is called and who packs it, what becomes of a shim when containerd or itself is gone.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use stillframe_integration::ctr::{self, CtrError};
use stillframe_integration::{
    Background, Container, Containerd, ContainerdVersion, RUNC, STILLFRAME, assert_same, watchdog,
};

const CHECKPOINT: &str = "stillframe.test/checkpoint:1";

stillframe_integration::with_every_containerd!(
    a_container_runs_and_leaves_nothing,
    a_tree_survives_its_container,
    an_exiting_checkpoint_ends_the_container,
    a_checkpoint_goes_into_a_directory_of_the_callers,
    a_killed_shim_is_cleaned_up_after,
    containerd_restarts_beside_a_live_container,
    a_container_ends_while_containerd_is_away,
    containerd_is_killed_in_the_middle_of_a_checkpoint,
    containerd_is_killed_in_the_middle_of_a_restore,
);

fn started<'a>(containerd: &'a Containerd, name: &str) -> Container<'a> {
    containerd
        .container(name)
        .option("--cap-add=CAP_SYS_ADMIN")
        .tmpfs("/scratch", "size=64m:mode=1770:uid=7:gid=8")
        .start()
        .unwrap()
}

fn code(result: Result<ctr::Said, CtrError>) -> i32 {
    match result {
        Ok(_) => 0,
        Err(error) => error.code.unwrap_or_else(|| panic!("no exit code: {error}")),
    }
}

fn a_container_runs_and_leaves_nothing(version: &ContainerdVersion) {
    let containerd = Containerd::start_version(version).unwrap();
    for wanted in [0, 7] {
        let spec = containerd.container("once").arguments(&["sh", "-c", &format!("exit {wanted}")]);
        assert_eq!(code(spec.run()), wanted);
    }
    let container = started(&containerd, "c");
    let said = container.shell("echo out; echo err >&2").unwrap();
    assert_eq!((said.stdout.as_str(), said.stderr.as_str()), ("out\n", "err\n"));
    assert_eq!(code(container.shell("exit 3")), 3);
    let mut cat = container.exec_background(&["cat"]).unwrap();
    cat.write(b"one\n").unwrap();
    cat.expect_line("what went in", |line| line == "one").unwrap();
    assert_eq!(cat.wait().unwrap().0, 0);
    containerd.ctr().run(&["tasks", "pause", container.id()]).unwrap();
    assert_eq!(container.status().unwrap().as_deref(), Some("PAUSED"));
    containerd.ctr().run(&["tasks", "resume", container.id()]).unwrap();
    let metrics = containerd.ctr().run(&["tasks", "metrics", container.id()]).unwrap().stdout;
    assert!(metrics.contains("memory.usage"), "{metrics}");
    container.remove().unwrap();
    let spec = containerd.container("c").arguments(&[
        "sh",
        "-c",
        "trap 'exit 42' TERM; echo ready; while :; do usleep 9000; done",
    ]);
    let mut foreground = Background::start(&mut spec.command(&["--rm"])).unwrap();
    foreground.expect_line("ready", |line| line == "ready").unwrap();
    containerd.ctr().run(&["tasks", "kill", "--signal", "SIGTERM", spec.id()]).unwrap();
    assert_eq!(foreground.wait().unwrap().0, 42);
    containerd.assert_nothing_left();
    containerd.stop().unwrap();
}

fn a_tree_survives_its_container(version: &ContainerdVersion) {
    let containerd = Containerd::start_version(version).unwrap();
    let container = started(&containerd, "c");
    let fill = ["probe", "fill", "/scratch", "--seed", "11", "--big", "5000000", "--beyond-path-max"];
    container.exec(&fill).unwrap();
    container.exec(&["probe", "fill", "/dev/shm", "--seed", "12"]).unwrap();
    let dirs = ["/scratch", "/dev/shm", "/run"];
    let before = dirs.map(|dir| container.list(dir).unwrap());
    containerd.checkpoint(container.id(), CHECKPOINT).unwrap();
    assert_eq!(container.status().unwrap().as_deref(), Some("RUNNING"));
    for (dir, before) in dirs.iter().zip(&before) {
        assert_same(&format!("{dir} of the original"), before, &container.list(dir).unwrap());
    }
    container.remove().unwrap();
    containerd.assert_nothing_left();
    let container = Container::restore(&containerd, "restored", CHECKPOINT).unwrap();
    for (dir, before) in dirs.iter().zip(&before) {
        assert_same(&format!("{dir} restored"), before, &container.list(dir).unwrap());
    }
    container.remove().unwrap();
    // With the container's own layer, and the image.
    let container = started(&containerd, "rw");
    container.shell("echo layer > /layer; echo memory > /scratch/memory").unwrap();
    let image = "stillframe.test/checkpoint:rw";
    let words = ["containers", "checkpoint", "--task", "--rw", "--image", container.id(), image];
    containerd.ctr().run(&words).unwrap();
    container.remove().unwrap();
    let id = containerd.id("rw-restored");
    containerd.ctr().run(&["containers", "restore", "--live", "--rw", &id, image]).unwrap();
    let container = Container::attach(&containerd, id);
    assert_eq!(container.shell("cat /layer /scratch/memory").unwrap().stdout, "layer\nmemory\n");
    container.remove().unwrap();
    containerd.assert_nothing_left();
}

fn an_exiting_checkpoint_ends_the_container(version: &ContainerdVersion) {
    let containerd = Containerd::start_version(version).unwrap();
    let container = started(&containerd, "c");
    container.shell("echo text > /scratch/file").unwrap();
    // 1.6 and 1.7 pass the option on to runc's own shims only.
    let said = containerd.ctr().run(&["tasks", "checkpoint", "--exit", container.id()]).unwrap();
    assert!(said.stdout.contains("containerd.io/checkpoint/"), "{said:?}");
    if version.numbers() >= (2, 0) {
        container.await_status("STOPPED").unwrap();
    } else {
        assert_eq!(container.status().unwrap().as_deref(), Some("RUNNING"));
    }
    container.remove().unwrap();
    containerd.assert_nothing_left();
}

fn a_checkpoint_goes_into_a_directory_of_the_callers(version: &ContainerdVersion) {
    let containerd = Containerd::start_version(version).unwrap();
    let container = started(&containerd, "c");
    container.shell("echo text > /scratch/file").unwrap();
    let dir = containerd.dir().join("not-there-yet");
    let path = dir.display().to_string();
    let words = ["tasks", "checkpoint", "--image-path", &path, container.id()];
    containerd.ctr().run(&words).unwrap();
    assert_eq!(container.status().unwrap().as_deref(), Some("RUNNING"));
    // 1.6 and 1.7 ignore the option for all runtimes but runc's.
    if version.numbers() >= (2, 0) {
        let seen = containerd.stillframe(&["inspect", "--list", &path]).unwrap().stdout;
        assert!(seen.contains("/scratch") && seen.contains("file"), "{seen}");
    } else {
        assert!(!dir.exists());
    }
    container.remove().unwrap();
    containerd.assert_nothing_left();
}

fn a_killed_shim_is_cleaned_up_after(version: &ContainerdVersion) {
    let containerd = Containerd::start_version(version).unwrap();
    let container = started(&containerd, "c");
    container.shell("head -c 1000000 /dev/urandom > /scratch/file").unwrap();
    let shims = containerd.shims();
    assert_eq!(shims.len(), 1, "{shims:?}");
    kill(Pid::from_raw(shims[0].pid), Signal::SIGKILL).unwrap();
    // containerd sees the closed connection and has the shim's binary delete what is left.
    let end = Instant::now() + Duration::from_secs(30);
    while container.status().unwrap().is_some_and(|status| status == "RUNNING") {
        assert!(Instant::now() < end, "the task is still running");
        std::thread::sleep(Duration::from_millis(20));
    }
    if container.status().unwrap().is_some() {
        // What it says of a task without a shim differs from version to version; only what is left counts.
        let _ = containerd.ctr().run(&["tasks", "delete", "--force", container.id()]);
    }
    containerd.ctr().run(&["containers", "delete", container.id()]).unwrap();
    containerd.assert_nothing_left();
    // And the id can be used again.
    started(&containerd, "c").remove().unwrap();
    containerd.assert_nothing_left();
}

fn containerd_restarts_beside_a_live_container(version: &ContainerdVersion) {
    let containerd = Containerd::start_version(version).unwrap();
    let container = started(&containerd, "c");
    container.exec(&["probe", "fill", "/scratch", "--seed", "13"]).unwrap();
    let (before, pid) = (container.list("/scratch").unwrap(), container.pid().unwrap());
    let shim = containerd.shims()[0].pid;
    for how in [watchdog::TERMINATE, watchdog::KILL] {
        containerd.restart(how).unwrap();
        assert_eq!(container.status().unwrap().as_deref(), Some("RUNNING"), "{how}");
        assert_eq!(container.pid().unwrap(), pid, "{how}");
        let shims = containerd.shims();
        assert_eq!(shims.iter().map(|shim| shim.pid).collect::<Vec<_>>(), [shim], "{how}: {shims:?}");
        assert_same(how, &before, &container.list("/scratch").unwrap());
        assert_eq!(code(container.shell("exit 4")), 4);
    }
    containerd.checkpoint(container.id(), CHECKPOINT).unwrap();
    container.remove().unwrap();
    containerd.assert_nothing_left();
    let container = Container::restore(&containerd, "restored", CHECKPOINT).unwrap();
    assert_same("restored", &before, &container.list("/scratch").unwrap());
    // A restart between restore and end, too.
    containerd.restart(watchdog::KILL).unwrap();
    container.remove().unwrap();
    containerd.assert_nothing_left();
}

fn a_container_ends_while_containerd_is_away(version: &ContainerdVersion) {
    let containerd = Containerd::start_version(version).unwrap();
    for (name, runtime) in [("theirs", RUNC), ("ours", STILLFRAME)] {
        let container = containerd.container(name).runtime(runtime).start().unwrap();
        let pid = Pid::from_raw(container.pid().unwrap().unwrap());
        // Stopped, containerd is as good as away, and nothing has to happen within the time that a start takes.
        kill(containerd.pid(), Signal::SIGSTOP).unwrap();
        kill(pid, Signal::SIGKILL).unwrap();
        containerd.restart(watchdog::KILL).unwrap();
        // 1.6 takes the shim back with its stopped task. Later ones, with any runtime, remove a shim without processes
        // when they start.
        if version.numbers() < (1, 7) {
            container.await_status("STOPPED").unwrap();
            let said = containerd.ctr().run(&["tasks", "delete", container.id()]).unwrap();
            assert!(said.stderr.contains("exit code 137"), "{runtime}: {said:?}");
        }
        assert_eq!(container.status().unwrap(), None, "{runtime}");
        containerd.ctr().run(&["containers", "delete", container.id()]).unwrap();
        containerd.assert_nothing_left();
    }
}

/// Waits for something that only its trace in the file system tells.
#[track_caller]
fn until(what: &str, mut there: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !there() {
        assert!(Instant::now() < end, "{what}: not within 30 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// With enough in it for a save or restore to take a while.
fn much(containerd: &Containerd) -> Container<'_> {
    let container = containerd.container("c").tmpfs("/scratch", "size=150m").start().unwrap();
    container.shell("for i in 1 2; do head -c 60000000 /dev/urandom > /scratch/$i; done").unwrap();
    container
}

fn containerd_is_killed_in_the_middle_of_a_checkpoint(version: &ContainerdVersion) {
    let containerd = Containerd::start_version(version).unwrap();
    let container = much(&containerd);
    let before = container.list("/scratch").unwrap();
    let words = ["containers", "checkpoint", "--task", container.id(), CHECKPOINT];
    let client = Background::start(&mut containerd.ctr().command(&words)).unwrap();
    let tmp = containerd.dir().join("tmp");
    until("the first pages", || {
        let dirs = std::fs::read_dir(&tmp).into_iter().flatten().flatten();
        dirs.map(|dir| dir.path().join("pages.img"))
            .any(|file| file.metadata().is_ok_and(|meta| meta.len() > 0))
    });
    containerd.restart(watchdog::KILL).unwrap();
    // The client has lost its server.
    assert_ne!(client.wait().unwrap().0, 0);
    // It was containerd that had paused it, with any runtime, and nobody else resumes it.
    assert_eq!(container.status().unwrap().as_deref(), Some("PAUSED"));
    containerd.ctr().run(&["tasks", "resume", container.id()]).unwrap();
    assert_same("afterwards", &before, &container.list("/scratch").unwrap());
    containerd.checkpoint(container.id(), CHECKPOINT).unwrap();
    container.remove().unwrap();
    let container = Container::restore(&containerd, "restored", CHECKPOINT).unwrap();
    assert_same("restored", &before, &container.list("/scratch").unwrap());
    container.remove().unwrap();
    containerd.assert_nothing_left();
}

fn containerd_is_killed_in_the_middle_of_a_restore(version: &ContainerdVersion) {
    let containerd = Containerd::start_version(version).unwrap();
    let container = much(&containerd);
    let before = container.list("/scratch").unwrap();
    containerd.checkpoint(container.id(), CHECKPOINT).unwrap();
    container.remove().unwrap();
    let id = containerd.id("half");
    let words = ["containers", "restore", "--live", &id, CHECKPOINT];
    let client = Background::start(&mut containerd.ctr().command(&words)).unwrap();
    let state = std::path::Path::new("/run/stillframe").join(containerd.namespace()).join(&id);
    until("the first filesystem", || state.join("filesystems").exists());
    containerd.restart(watchdog::KILL).unwrap();
    assert_ne!(client.wait().unwrap().0, 0);
    // The shim may have come to the end of it, or containerd has ended the shim.
    let half = Container::attach(&containerd, id);
    half.remove().unwrap();
    containerd.assert_nothing_left();
    let container = Container::restore(&containerd, "restored", CHECKPOINT).unwrap();
    assert_same("restored", &before, &container.list("/scratch").unwrap());
    container.remove().unwrap();
    containerd.assert_nothing_left();
}
