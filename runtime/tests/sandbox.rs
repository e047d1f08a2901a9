//! A sandbox without containerd or runc: a bundle, a process in a cgroup of its own, real tmpfs.

use std::error::Error;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use stillframe_pgalloc::Direct;
use stillframe_runtime::sandbox::{CheckpointRequest, CheckpointResult, Prepared, Sandbox};

#[path = "support/pod.rs"]
mod pod;

use pod::Pod;

/// A pod of one container, "c".
struct Container {
    pod: Pod,
    config: String,
}

impl Container {
    /// A bundle with these mounts, in JSON.
    fn new(mounts: &str) -> Self {
        let pod = Pod::new();
        let bundle = pod.dir.path().join("c");
        fs::create_dir_all(bundle.join("rootfs/tmp")).unwrap();
        let config = format!(r#""ociVersion":"1.0.2","mounts":[{mounts}]"#);
        fs::write(bundle.join("config.json"), format!("{{{config}}}")).unwrap();
        Self { pod, config }
    }

    fn prepare(&mut self, image: Option<&Path>) -> Result<Prepared, String> {
        self.pod.prepare("c", &self.config, image)
    }

    fn running(mounts: &str) -> Self {
        let mut container = Self::new(mounts);
        container.pod.running("c", &container.config);
        container
    }

    fn config_json(&self) -> String {
        fs::read_to_string(self.pod.dir.path().join("c/config.json")).unwrap()
    }

    fn state(&self) -> PathBuf {
        self.pod.state()
    }

    /// Where its filesystem number `number` is mounted.
    fn mount(&self, number: u32) -> PathBuf {
        self.pod.mount(&format!("c.{number}"))
    }

    fn checkpoint(&self, image: &Path, paths: &[&str]) -> Result<CheckpointResult, String> {
        self.pod.checkpoint("c", image, paths)
    }

    /// Thawed and alive?
    fn is_untouched(&self) -> bool {
        let (child, _) = &self.pod.processes[0];
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        let frozen = self.freezer_state();
        // It may be starting still.
        !stat.contains(") Z ") && (frozen == "THAWED" || frozen == "0")
    }

    fn freezer_state(&self) -> String {
        let (_, cgroup) = &self.pod.processes[0];
        let state = fs::read_to_string(cgroup.join("freezer.state"));
        state.or_else(|_| fs::read_to_string(cgroup.join("cgroup.freeze"))).unwrap().trim().to_owned()
    }
}

const TWO: &str = r#"
    {"destination":"/scratch","type":"tmpfs","options":["size=16m"]},
    {"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["nosuid","size=65536k"]}"#;

fn mounted_below(path: &Path) -> usize {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.lines().filter(|line| line.contains(&format!("{}/", path.display()))).count()
}

/// Puts a file with an extent into each filesystem.
fn fill(container: &Container) {
    for number in 0..2 {
        let mount = container.mount(number);
        fs::write(mount.join("data"), vec![b'0' + number as u8; 200_000]).unwrap();
        fs::create_dir(mount.join("dir")).unwrap();
        fs::set_permissions(mount.join("dir"), fs::Permissions::from_mode(0o1750)).unwrap();
    }
}

/// An image of a container with two filled filesystems.
fn image() -> (tempfile::TempDir, PathBuf) {
    let container = Container::running(TWO);
    fill(&container);
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    container.checkpoint(&image, &[]).unwrap();
    (dir, image)
}

#[test]
fn filesystems_are_prepared_saved_and_restored() {
    let container = Container::running(TWO);
    let config = container.config_json();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    for (number, extra) in [(0, &[][..]), (1, &["nosuid"][..])] {
        let mount = &config["mounts"][number];
        assert_eq!(mount["type"], "bind");
        assert_eq!(mount["source"], container.mount(number as u32).to_str().unwrap());
        let options: Vec<&str> =
            mount["options"].as_array().unwrap().iter().map(|o| o.as_str().unwrap()).collect();
        assert!(
            options.contains(&"bind") && extra.iter().all(|extra| options.contains(extra)),
            "{options:?}"
        );
    }
    fill(&container);
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("made/for/it");
    let result = container.checkpoint(&image, &[]).unwrap();
    assert!(container.is_untouched());
    assert_eq!((result.filesystems.len(), result.files, result.entries), (2, 2, 4));
    assert_eq!(result.logical_bytes, 400_000);
    assert_eq!(result.pages_bytes, 2 * 200_704);
    let mut names: Vec<_> = fs::read_dir(&image).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["manifest.json", "pages.img", "pages.meta", "tree.tar"]);

    let mut new = Container::new(TWO);
    let restored = new.prepare(Some(&image)).unwrap().restored.unwrap();
    assert_eq!((restored.restored.len(), restored.entries, restored.bytes), (2, 4, 400_000));
    for number in 0..2 {
        assert_eq!(fs::read(new.mount(number).join("data")).unwrap(), vec![b'0' + number as u8; 200_000]);
        assert_eq!(
            fs::metadata(new.mount(number).join("dir")).unwrap().permissions().mode() & 0o7777,
            0o1750
        );
    }
}

#[test]
fn files_without_a_name_are_reported() {
    let mut container = Container::new(TWO);
    container.prepare(None).unwrap();
    let path = container.mount(0).join("held");
    fs::write(&path, vec![1; 5000]).unwrap();
    let mut holder = Command::new("sleep");
    container.pod.start_reading("c", holder.arg("1000").stdout(fs::File::open(&path).unwrap()));
    fs::remove_file(&path).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let result = container.checkpoint(&dir.path().join("image"), &[]).unwrap();
    assert_eq!((result.unlinked.files, result.unlinked.bytes, result.files), (1, 5000, 0));
    let result = container.checkpoint(&dir.path().join("other"), &["/dev/shm"]).unwrap();
    assert_eq!(result.unlinked.files, 0, "only those of the filesystems that are saved");
}

#[test]
fn tar_lists_every_archive_of_tree_tar() {
    let (_dir, image) = image();
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(image.join("manifest.json")).unwrap()).unwrap();
    let tree = fs::read(image.join("tree.tar")).unwrap();
    for filesystem in manifest["body"]["filesystems"].as_array().unwrap() {
        let offset = |name: &str| usize::try_from(filesystem[name].as_u64().unwrap()).unwrap();
        let archive = image.with_file_name("archive.tar");
        fs::write(&archive, &tree[offset("tree_start")..offset("tree_end")]).unwrap();
        let output = Command::new("tar").arg("tvf").arg(&archive).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let names: Vec<&str> = text.lines().map(|line| line.rsplit(' ').next().unwrap()).collect();
        assert_eq!(names, ["./", "./data", "./dir/"]);
        assert!(text.contains("drwxr-x--T"), "{text}");
    }
}

#[test]
fn a_selection_saves_what_it_names_and_nothing_else() {
    let container = Container::running(TWO);
    fill(&container);
    let dir = tempfile::tempdir().unwrap();
    let result = container.checkpoint(&dir.path().join("one"), &["c:/dev/shm/"]).unwrap();
    assert_eq!(result.filesystems.iter().map(ToString::to_string).collect::<Vec<_>>(), ["c:/dev/shm"]);
    let error = container.checkpoint(&dir.path().join("none"), &["/dev/shm", "/nosuch"]).unwrap_err();
    assert_eq!(error, "no filesystem of the container is \"/nosuch\"; there are: c:/scratch, c:/dev/shm");
    assert!(!dir.path().join("none").exists());

    let mut new = Container::new(TWO);
    let restored = new.prepare(Some(&dir.path().join("one"))).unwrap().restored.unwrap();
    assert_eq!(restored.empty.iter().map(ToString::to_string).collect::<Vec<_>>(), ["c:/scratch"]);
    assert_eq!(fs::read_dir(new.mount(0)).unwrap().count(), 0);
    assert_eq!(fs::read_dir(new.mount(1)).unwrap().count(), 2);
}

#[test]
fn what_the_guest_mounts_does_not_hide_what_lies_below() {
    let container = Container::running(TWO);
    fill(&container);
    fs::write(container.mount(0).join("dir/hidden"), "hidden").unwrap();
    // In a mount namespace of its own, as a container's is, and over our own mount, which is worse.
    let over = container.mount(0).join("dir");
    let script = "mount -t tmpfs guest \"$0\" && echo guest > \"$0/guests\"";
    assert!(Command::new("sh").args(["-c", script]).arg(&over).status().unwrap().success());
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let saved = container.checkpoint(&image, &[]);
    assert!(Command::new("umount").arg(&over).status().unwrap().success());
    saved.unwrap();
    let mut new = Container::new(TWO);
    new.prepare(Some(&image)).unwrap();
    assert_eq!(fs::read_to_string(new.mount(0).join("dir/hidden")).unwrap(), "hidden");
    assert!(!new.mount(0).join("dir/guests").exists());
}

#[test]
fn a_frozen_container_stays_frozen_and_a_killed_one_dies_after_the_commit() {
    let mut container = Container::running(TWO);
    let (_, cgroup) = &container.pod.processes[0];
    let (file, frozen) = if cgroup.join("freezer.state").exists() {
        ("freezer.state", "FROZEN")
    } else {
        ("cgroup.freeze", "1")
    };
    fs::write(cgroup.join(file), frozen).unwrap();
    let dir = tempfile::tempdir().unwrap();
    container.checkpoint(&dir.path().join("paused"), &[]).unwrap();
    assert_eq!(container.freezer_state(), frozen);
    let (_, cgroup) = &container.pod.processes[0];
    fs::write(cgroup.join(file), if file == "freezer.state" { "THAWED" } else { "0" }).unwrap();

    let request = |image: &str| CheckpointRequest {
        direct: Direct::Never,
        kill: true,
        ..CheckpointRequest::new("c", dir.path().join(image))
    };
    // Not an empty directory: it fails, and the container lives.
    container.pod.sandbox.checkpoint(&request("paused")).unwrap_err();
    assert!(container.is_untouched());
    container.pod.sandbox.checkpoint(&request("last")).unwrap();
    assert!(dir.path().join("last/manifest.json").exists());
    let (child, _) = &mut container.pod.processes[0];
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()), Some(9));
    let error = container.checkpoint(&dir.path().join("dead"), &[]).unwrap_err();
    assert!(error.contains("container c has no running process"), "{error}");
}

#[test]
fn a_checkpoint_that_fails_leaves_nothing_and_names_the_cause() {
    let container = Container::running(TWO);
    fill(&container);
    let dir = tempfile::tempdir().unwrap();
    let full = dir.path().join("full");
    fs::create_dir(&full).unwrap();
    let mount = |options: &str| {
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(&full).status();
        assert!(status.unwrap().success());
    };
    let check = |image: &Path, want: &str| {
        let error = container.checkpoint(image, &[]).unwrap_err();
        assert!(error.contains(want), "{error}\nwanted: {want}");
        assert!(container.is_untouched(), "{want}");
    };
    fs::write(dir.path().join("file"), "").unwrap();
    fs::create_dir(dir.path().join("used")).unwrap();
    fs::write(dir.path().join("used/tree.tar"), "somebody's").unwrap();

    check(&dir.path().join("used"), "used is not empty (it holds \"tree.tar\")");
    assert_eq!(fs::read_to_string(dir.path().join("used/tree.tar")).unwrap(), "somebody's");
    check(&dir.path().join("file"), "Not a directory");
    check(&dir.path().join("file/below"), "Not a directory");
    mount("ro");
    check(&full.join("image"), "Read-only file system");
    assert!(Command::new("umount").arg(&full).status().unwrap().success());
    mount("size=300k");
    check(&full.join("deep/image"), "deep/image/pages.img");
    check(&full.join("deep/image"), "No space left on device");
    assert_eq!(fs::read_dir(&full).unwrap().count(), 0, "what was made is removed");
    assert!(Command::new("umount").arg(&full).status().unwrap().success());

    // After all that, it can still be saved.
    container.checkpoint(&dir.path().join("good"), &[]).unwrap();
}

#[test]
fn two_filesystems_of_one_name_are_refused_when_saved() {
    let twice = format!("{TWO},{}", r#"{"destination":"/scratch/","type":"tmpfs"}"#);
    let container = Container::running(&twice);
    let dir = tempfile::tempdir().unwrap();
    let error = container.checkpoint(&dir.path().join("image"), &[]).unwrap_err();
    assert!(error.contains("two filesystems are called c:/scratch"), "{error}");
    assert!(container.is_untouched());
    container.checkpoint(&dir.path().join("image"), &["/dev/shm"]).unwrap();
}

/// Restores a damaged image; everything that was begun must be gone.
fn refused(image: &Path, mounts: &str) -> String {
    let mut container = Container::new(mounts);
    let before = container.config_json();
    let prepared = container.prepare(Some(image));
    let error = prepared.expect_err("a damaged image is refused");
    assert_eq!(mounted_below(&container.state()), 0, "{error}");
    assert!(!container.state().exists(), "{error}");
    assert_eq!(container.config_json(), before);
    error
}

#[test]
fn a_flipped_bit_anywhere_is_found_and_its_place_is_told() {
    let (_dir, image) = image();
    for name in ["tree.tar", "pages.meta", "pages.img"] {
        let file = fs::OpenOptions::new().read(true).write(true).open(image.join(name)).unwrap();
        let length = file.metadata().unwrap().len();
        for offset in [0, length / 2, length - 1] {
            let flip = || {
                let mut byte = [0];
                file.read_exact_at(&mut byte, offset).unwrap();
                file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
            };
            flip();
            let error = refused(&image, TWO);
            flip();
            let chunk = offset / 65536 * 65536;
            let place = if name == "pages.img" {
                format!("offset {chunk:#x}")
            } else {
                format!("offsets {chunk} and")
            };
            assert!(error.contains(name) && error.contains(&place), "{name} at {offset}: {error}");
        }
    }
    let manifest = fs::read(image.join("manifest.json")).unwrap();
    for offset in [2, manifest.len() / 2, manifest.len() - 3] {
        let mut damaged = manifest.clone();
        damaged[offset] ^= 1;
        fs::write(image.join("manifest.json"), damaged).unwrap();
        let error = refused(&image, TWO);
        assert!(error.contains("manifest.json"), "{error}");
    }
    fs::write(image.join("manifest.json"), &manifest).unwrap();
    Container::new(TWO).prepare(Some(&image)).unwrap();
}

#[test]
fn a_truncated_or_missing_part_is_named() {
    let (_dir, image) = image();
    for name in ["tree.tar", "pages.meta", "pages.img"] {
        let whole = fs::read(image.join(name)).unwrap();
        fs::write(image.join(name), &whole[..whole.len() - 1]).unwrap();
        let error = refused(&image, TWO);
        let want = format!("{name} has {} bytes, not {}", whole.len() - 1, whole.len());
        assert!(error.contains(&want), "{error}");
        fs::remove_file(image.join(name)).unwrap();
        let error = refused(&image, TWO);
        assert!(error.contains(name) && error.contains("No such file"), "{error}");
        std::os::unix::fs::symlink("/etc/passwd", image.join(name)).unwrap();
        let error = refused(&image, TWO);
        assert!(error.contains(name) && error.contains("not a regular file"), "{error}");
        fs::remove_file(image.join(name)).unwrap();
        fs::write(image.join(name), &whole).unwrap();
    }
    fs::remove_file(image.join("manifest.json")).unwrap();
    assert!(refused(&image, TWO).contains("it has no manifest.json"));
    let error = refused(&image.join("missing"), TWO);
    assert!(error.contains("image/missing") && error.contains("No such file"), "{error}");
    fs::write(image.join("manifest.json"), r#"{"format":"stillframe-image","version":2}"#).unwrap();
    assert!(refused(&image, TWO).contains("the image has version 2, this program reads version 1"));
}

#[test]
fn a_tree_larger_than_the_new_filesystem_is_refused_with_both_numbers() {
    let (_dir, image) = image();
    let error = refused(&image, r#"{"destination":"/scratch","type":"tmpfs","options":["size=100k"]}"#);
    assert!(error.contains("200704 bytes") && error.contains("102400 bytes"), "{error}");
}

#[test]
fn mountpoints_on_a_read_only_filesystem_are_made_before_it_is_handed_over() {
    let mounts = r#"
        {"destination":"/ro","type":"tmpfs","options":["ro"]},
        {"destination":"/ro/inner/x","type":"tmpfs"},
        {"destination":"/ro/file","type":"bind","source":"/etc/passwd","options":["bind"]},
        {"destination":"/rw","type":"tmpfs"},
        {"destination":"/rw/inner","type":"tmpfs"}"#;
    let container = Container::running(mounts);
    assert!(container.mount(0).join("inner/x").is_dir());
    assert!(container.mount(0).join("file").is_file());
    assert_eq!(fs::read_dir(container.mount(2)).unwrap().count(), 0, "runc makes those");
}

#[test]
fn a_mount_that_can_not_be_made_is_named_and_undone() {
    for (options, want) in
        [(r#""size=1m","sizze=2m""#, "\"sizze=2m\""), (r#""uid=5000000000""#, "uid=5000000000")]
    {
        let bad = format!(r#"{TWO},{{"destination":"/bad","type":"tmpfs","options":[{options}]}}"#);
        let mut container = Container::new(&bad);
        let error = container.prepare(None).map(|_| ()).unwrap_err();
        assert!(error.contains("/bad") && error.contains(want), "{error}");
        assert_eq!(mounted_below(&container.state()), 0);
    }
}

#[test]
fn names_that_lead_out_of_the_state_directory_are_refused() {
    for (namespace, id) in [("..", "c"), ("n", "../c"), ("", "c"), ("n", "a/b"), ("n", ".")] {
        assert!(Sandbox::new(namespace, id).is_err(), "{namespace} {id}");
    }
    let error = Sandbox::new("n", "a/b").map(|_| ()).unwrap_err();
    assert!((&error as &dyn Error).to_string().contains("\"a/b\""));
}
