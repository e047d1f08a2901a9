//! The main job: what was in a container's tmpfs filesystems is in them again after a restore, byte for byte and
//! attribute for attribute, as seen from inside; and the container that was saved doesn't notice.

use std::path::PathBuf;

use stillframe_integration::{Container, ContainerSpec, Containerd, assert_same, binaries, ctr, skip};

const CHECKPOINT: &str = "stillframe.test/checkpoint:1";

fn privileged<'a>(containerd: &'a Containerd, name: &str) -> ContainerSpec<'a> {
    containerd.container(name).option("--cap-add=CAP_SYS_ADMIN").option("--cap-add=CAP_LINUX_IMMUTABLE")
}

fn fill(container: &Container<'_>, dir: &str, more: &[&str]) {
    let said = container.exec(&[&["probe", "fill", dir][..], more].concat()).unwrap();
    assert!(said.stdout.contains("filled "), "{said:?}");
    assert!(!said.stdout.contains("left out"), "{}", said.stdout);
}

fn inspected(containerd: &Containerd, dir: &std::path::Path) -> String {
    containerd.stillframe(&["inspect", "--list", &dir.to_string_lossy()]).unwrap().stdout
}

#[test]
fn a_real_tree_survives_its_container() {
    let containerd = Containerd::start().unwrap();
    let container = privileged(&containerd, "c")
        .tmpfs("/scratch", "size=256m:mode=1770:uid=7:gid=8")
        .bind("/usr/include/linux", "/host-include")
        .start()
        .unwrap();
    fill(
        &container,
        "/scratch",
        &["--seed", "3", "--big", "20000000", "--copy", "/host-include", "--beyond-path-max"],
    );
    fill(&container, "/dev/shm", &["--seed", "4"]);
    let mut hold = container.exec_background(&["probe", "hold", "/scratch"]).unwrap();
    hold.expect_line("ready", |line| line == "ready").unwrap();
    let dirs = ["/scratch", "/dev/shm", "/run"];
    let before = dirs.map(|dir| container.list(dir).unwrap());

    containerd.checkpoint(container.id(), CHECKPOINT).unwrap();

    // The original runs on, unchanged, and isn't frozen.
    assert_eq!(container.status().unwrap().as_deref(), Some("RUNNING"));
    for (dir, before) in dirs.iter().zip(&before) {
        assert_same(&format!("{dir} of the original"), before, &container.list(dir).unwrap());
    }
    let saved = containerd.last_checkpoint(container.id()).unwrap();
    assert_eq!(saved.filesystems.len(), 3, "{saved:?}");
    assert!(saved.pages_bytes > 20_000_000 && saved.frozen_ms > 0.0, "{saved:?}");
    drop(hold);
    container.remove().unwrap();
    containerd.assert_nothing_left();

    let container = Container::restore(&containerd, "restored", CHECKPOINT).unwrap();
    for (dir, before) in dirs.iter().zip(&before) {
        assert_same(&format!("{dir} restored"), before, &container.list(dir).unwrap());
    }
    // It is of use: writable, with its limit.
    container.shell("echo x > /scratch/new && rm /scratch/new").unwrap();
    assert!(container.shell("df -m /scratch | grep -q '256 '").is_ok());
    container.remove().unwrap();
    containerd.assert_nothing_left();
    containerd.stop().unwrap();
}

#[test]
fn what_the_guest_mounts_hides_nothing_and_is_not_saved() {
    let containerd = Containerd::start().unwrap();
    let container = privileged(&containerd, "c").tmpfs("/scratch", "size=16m").start().unwrap();
    container
        .shell("mkdir /scratch/covered; echo below > /scratch/covered/hidden; mkdir /scratch/other")
        .unwrap();
    let before = container.list("/scratch").unwrap();
    container.exec(&["probe", "mount-tmpfs", "/scratch/covered"]).unwrap();
    container.shell("echo above > /scratch/covered/guest-file").unwrap();
    // The whole filesystem covered by another one.
    container.exec(&["probe", "mount-tmpfs", "/scratch"]).unwrap();
    container.shell("echo top > /scratch/guest-top").unwrap();
    containerd.checkpoint(container.id(), CHECKPOINT).unwrap();
    assert_eq!(container.shell("cat /scratch/guest-top").unwrap().stdout, "top\n");
    let dir = containerd.dir().join("image");
    containerd.unpack_checkpoint(CHECKPOINT, &dir).unwrap();
    let seen = inspected(&containerd, &dir);
    assert!(seen.contains("covered/hidden"), "{seen}");
    assert!(!seen.contains("guest-"), "{seen}");
    container.remove().unwrap();
    containerd.assert_nothing_left();
    let container = Container::restore(&containerd, "restored", CHECKPOINT).unwrap();
    assert_same("/scratch", &before, &container.list("/scratch").unwrap());
    container.remove().unwrap();
}

#[test]
fn the_image_is_four_flat_files_that_are_not_sparse() {
    let containerd = Containerd::start().unwrap();
    let container = containerd.container("c").tmpfs("/scratch", "size=64m").start().unwrap();
    container.shell("truncate -s 1T /scratch/huge; echo x > /scratch/small").unwrap();
    containerd.checkpoint(container.id(), CHECKPOINT).unwrap();
    let dir = containerd.dir().join("image");
    containerd.unpack_checkpoint(CHECKPOINT, &dir).unwrap();
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&dir).unwrap() {
        let entry = entry.unwrap();
        assert!(entry.file_type().unwrap().is_file());
        assert!(entry.metadata().unwrap().len() < 1 << 20, "{entry:?}");
        names.push(entry.file_name().into_string().unwrap());
    }
    names.sort();
    assert_eq!(names, ["manifest.json", "pages.img", "pages.meta", "tree.tar"]);
    container.remove().unwrap();
}

/// Writes `n` to `a`, then to `b`, over and over: whenever it is frozen, `a` is `b` or one ahead.
const COUNTER: &str = "n=0; while :; do n=$((n+1)); echo $n > /scratch/a.new; mv /scratch/a.new /scratch/a; \
                       echo $n > /scratch/b.new; mv /scratch/b.new /scratch/b; done";

#[test]
fn a_checkpoint_is_of_one_moment() {
    let containerd = Containerd::start().unwrap();
    for round in 0..5 {
        let container =
            containerd.container(&format!("c{round}")).tmpfs("/scratch", "size=16m").start().unwrap();
        let writer = container.exec_background(&["sh", "-c", COUNTER]).unwrap();
        container
            .shell("until [ -s /scratch/b ] && [ $(cat /scratch/b) -gt 20 ]; do usleep 1000; done")
            .unwrap();
        let image = format!("stillframe.test/round:{round}");
        containerd.checkpoint(container.id(), &image).unwrap();
        let at_most: u64 = container.shell("cat /scratch/a").unwrap().stdout.trim().parse().unwrap();
        drop(writer);
        container.remove().unwrap();
        let container = Container::restore(&containerd, &format!("r{round}"), &image).unwrap();
        let read = container.shell("cat /scratch/a /scratch/b").unwrap().stdout;
        let numbers: Vec<u64> = read.lines().map(|line| line.parse().unwrap()).collect();
        assert!(numbers[0] == numbers[1] || numbers[0] == numbers[1] + 1, "{numbers:?}");
        assert!((20..=at_most).contains(&numbers[1]), "{numbers:?}, afterwards {at_most}");
        container.remove().unwrap();
    }
    containerd.assert_nothing_left();
}

#[test]
fn a_restored_container_can_be_saved_and_restored_again() {
    let containerd = Containerd::start().unwrap();
    let container = privileged(&containerd, "c0").tmpfs("/scratch", "size=64m").start().unwrap();
    fill(&container, "/scratch", &["--seed", "5", "--inode-flags"]);
    let before = container.list("/scratch").unwrap();
    assert_eq!(before.get("./contents/1-bytes", "flags"), Some("immutable"));
    containerd.checkpoint(container.id(), "stillframe.test/generation:0").unwrap();
    container.remove().unwrap();
    for generation in 1..4 {
        let old = format!("stillframe.test/generation:{}", generation - 1);
        let container = Container::restore(&containerd, &format!("c{generation}"), &old).unwrap();
        assert_same(&format!("generation {generation}"), &before, &container.list("/scratch").unwrap());
        containerd.ctr().run(&["images", "remove", "--sync", &old]).unwrap();
        containerd.checkpoint(container.id(), &format!("stillframe.test/generation:{generation}")).unwrap();
        container.remove().unwrap();
    }
    containerd.assert_nothing_left();
}

#[test]
fn one_checkpoint_makes_many_containers() {
    let containerd = Containerd::start().unwrap();
    let container = containerd.container("c").tmpfs("/scratch", "size=64m").start().unwrap();
    container.shell("head -c 3000000 /dev/urandom > /scratch/data; mkdir /scratch/mine").unwrap();
    let before = container.list("/scratch").unwrap();
    containerd.checkpoint(container.id(), CHECKPOINT).unwrap();
    // The original runs on beside them.
    let all: Vec<Container<'_>> = std::thread::scope(|scope| {
        let start = |index: usize| {
            let containerd = &containerd;
            scope.spawn(move || Container::restore(containerd, &format!("r{index}"), CHECKPOINT).unwrap())
        };
        let threads: Vec<_> = (0..3).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for container in &all {
        assert_same(container.id(), &before, &container.list("/scratch").unwrap());
        container.shell(&format!("echo {} > /scratch/mine/id", container.id())).unwrap();
    }
    for container in &all {
        assert_eq!(container.shell("cat /scratch/mine/*").unwrap().stdout.trim(), container.id());
    }
    assert_eq!(container.shell("ls /scratch/mine").unwrap().stdout, "");
    for restored in all {
        restored.remove().unwrap();
    }
    container.remove().unwrap();
    containerd.assert_nothing_left();
}

#[test]
fn the_command_saves_what_containerd_would_have() {
    let containerd = Containerd::start().unwrap();
    let container = privileged(&containerd, "c")
        .tmpfs("/scratch", "size=64m")
        .tmpfs("/other", "size=1m")
        .start()
        .unwrap();
    fill(&container, "/scratch", &["--seed", "6"]);
    container.shell("echo other > /other/file").unwrap();
    let image = |name: &str| containerd.dir().join(name);
    let save = |dir: &PathBuf, more: &[&str]| {
        let dir = dir.to_string_lossy();
        let words = ["fscheckpoint", "--namespace", containerd.namespace(), "--image-path", &dir];
        containerd.stillframe(&[&words[..], more, &[container.id()]].concat())
    };
    // The directory is made, the container runs on.
    let (all, one, both) = (image("all"), image("one"), image("both"));
    save(&all, &["--leave-running"]).unwrap();
    save(&one, &["--leave-running", "--path", "/other"]).unwrap();
    let other = format!("{}:/other", container.id());
    save(&both, &["--leave-running", "--path", &other, "--path", "/scratch"]).unwrap();
    assert_eq!(container.status().unwrap().as_deref(), Some("RUNNING"));
    container.exec(&["true"]).unwrap();
    assert!(inspected(&containerd, &all).contains("/dev/shm"));
    let one = inspected(&containerd, &one);
    assert!(one.contains("/other") && !one.contains("/scratch"), "{one}");
    let both = inspected(&containerd, &both);
    assert!(both.contains("/other") && both.contains("/scratch") && !both.contains("/dev/shm"), "{both}");
    // What containerd stores is the same, up to the moment.
    containerd.checkpoint(container.id(), CHECKPOINT).unwrap();
    let through = image("through");
    containerd.unpack_checkpoint(CHECKPOINT, &through).unwrap();
    let text = |dir: &PathBuf| {
        let said = inspected(&containerd, dir);
        said.lines().filter(|line| !line.starts_with("image ")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(text(&all), text(&through));
    // Paused, it stays paused.
    containerd.ctr().run(&["tasks", "pause", container.id()]).unwrap();
    save(&image("paused"), &["--leave-running"]).unwrap();
    assert_eq!(container.status().unwrap().as_deref(), Some("PAUSED"));
    containerd.ctr().run(&["tasks", "resume", container.id()]).unwrap();
    // Without --leave-running it's dead afterwards, and containerd knows.
    save(&image("last"), &[]).unwrap();
    container.await_status("STOPPED").unwrap();
    container.remove().unwrap();
    containerd.assert_nothing_left();
}

#[test]
fn tree_tar_is_a_tar_archive_per_filesystem() {
    let Some(tar) = binaries::find("tar") else {
        skip::skipped("tree_tar_is_a_tar_archive_per_filesystem", "tar isn't installed");
        return;
    };
    let containerd = Containerd::start().unwrap();
    let container = containerd.container("c").tmpfs("/scratch", "size=16m").start().unwrap();
    container
        .shell("mkdir /scratch/d; echo text > /scratch/d/file; ln -s file /scratch/d/link; mkfifo /scratch/p")
        .unwrap();
    let dir = containerd.dir().join("image");
    let path = dir.to_string_lossy().into_owned();
    let words = [
        "fscheckpoint",
        "--namespace",
        containerd.namespace(),
        "--image-path",
        &path,
        "--leave-running",
        "--path",
        "/scratch",
    ];
    containerd.stillframe(&[&words[..], &[container.id()]].concat()).unwrap();
    let said = ctr::run(
        std::process::Command::new(tar).arg("--numeric-owner").arg("-tvf").arg(dir.join("tree.tar")),
    )
    .unwrap();
    for name in ["d/file", "d/link -> file", "d/", "p"] {
        assert!(said.stdout.lines().any(|line| line.ends_with(name)), "no {name} in\n{}", said.stdout);
    }
    container.remove().unwrap();
}

#[test]
fn a_container_without_any_tmpfs_can_be_saved_too() {
    let containerd = Containerd::start().unwrap();
    let container = containerd.container("c").start().unwrap();
    containerd.checkpoint(container.id(), CHECKPOINT).unwrap();
    container.remove().unwrap();
    let container = Container::restore(&containerd, "r", CHECKPOINT).unwrap();
    container.exec(&["true"]).unwrap();
    container.remove().unwrap();
    containerd.assert_nothing_left();
}

#[test]
fn a_restore_without_live_starts_afresh() {
    let containerd = Containerd::start().unwrap();
    let container = containerd.container("c").tmpfs("/scratch", "size=16m").start().unwrap();
    container.shell("echo old > /scratch/file").unwrap();
    containerd.checkpoint(container.id(), CHECKPOINT).unwrap();
    container.remove().unwrap();
    let id = containerd.id("fresh");
    containerd.ctr().run(&["containers", "restore", &id, CHECKPOINT]).unwrap();
    let container = Container::attach(&containerd, id);
    assert_eq!(container.shell("ls -A /scratch").unwrap().stdout, "");
    container.remove().unwrap();
    containerd.assert_nothing_left();
}
