//! Filesystems on disk, without containerd or runc: bundles, processes in cgroups of their own, real ext4 on loop
//! devices, real tmpfs.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use stillframe_runtime::config::Config;
use stillframe_runtime::image::Image;
use stillframe_runtime::sandbox::Sandbox;

#[path = "../../tmpfs/tests/support/filesystem.rs"]
mod filesystem;

#[path = "support/pod.rs"]
mod pod;

#[path = "support/disk.rs"]
mod disk;

use disk::{assert_same, config, describe, scratch};
use filesystem::{EXT4_LARGEST, fill_up_to, noise};
use pod::Pod;

/// An image of a container with a filled filesystem on that medium, and what it holds.
fn image(medium: &str, options: &str) -> (tempfile::TempDir, PathBuf, BTreeMap<PathBuf, String>) {
    let mut pod = Pod::new();
    pod.running("c", &scratch(medium, "container", options));
    let mount = pod.mount("c.0");
    fill_up_to(&mount, EXT4_LARGEST);
    let before = describe(&mount);
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    pod.checkpoint("c", &image, &[]).unwrap();
    assert_same(&describe(&mount), &before);
    fs::write(mount.join("after"), "thawed").unwrap();
    (dir, image, before)
}

#[test]
fn every_medium_is_restored_on_every_medium() {
    for from in ["disk", "memory"] {
        let (_dir, image, want) = image(from, "size=128m");
        let opened = Image::open(&image).unwrap();
        assert_eq!(opened.meta.private.len(), usize::from(from == "disk"));
        for (to, options) in
            [("disk", "size=128m"), ("disk", "size=1g"), ("disk", "size=64m"), ("memory", "")]
        {
            let mut pod = Pod::new();
            let config = scratch(to, "container", options);
            let restored = pod.prepare("c", &config, Some(&image)).unwrap().restored.unwrap();
            assert_eq!((restored.restored.len(), restored.entries), (1, want.len() as u64 - 1));
            assert_same(&describe(&pod.mount("c.0")), &want);
            // As a whole: all pages, those of the filesystem's own among them.
            let whole = from == "disk" && to == "disk" && options != "size=64m";
            assert_eq!(restored.bytes == opened.manifest.pages_length, whole, "{from} {to} {options}");
            assert_eq!(pod.file("c.0").exists(), to == "disk");
            if to == "disk" {
                let size = fs::metadata(pod.file("c.0")).unwrap().len();
                assert_eq!(
                    size,
                    if options == "size=1g" {
                        1 << 30
                    } else {
                        options[5..8].trim_end_matches('m').parse::<u64>().unwrap() << 20
                    }
                );
            }
            // And it can be saved again.
            pod.start("c", Command::new("sleep").arg("1000"));
            pod.checkpoint("c", &image.with_file_name(format!("again {to} {options}")), &[]).unwrap();
        }
    }
}

#[test]
fn a_filesystem_on_disk_is_handed_over_as_a_tmpfs_would_be() {
    let mut pod = Pod::new();
    let bound = tempfile::tempdir().unwrap();
    let source = bound.path().to_str().unwrap();
    let hints = [
        ("d", source, "disk", "container", "size=16m,mode=750,uid=3"),
        ("t", "scratch", "disk", "container", ""),
    ];
    let mounts =
        [("/bound", "bind", source, "rbind,nosuid,ro"), ("/tmpfs", "tmpfs", "scratch", "size=32m,noexec")];
    pod.running("c", &config(&hints, &mounts));
    let mounts = pod.mounts("c");
    for (number, size, extra) in [(0, 16u64, "nosuid"), (1, 32, "noexec")] {
        let name = format!("c.{number}");
        assert_eq!(mounts[number]["type"], "bind");
        assert_eq!(mounts[number]["source"], pod.mount(&name).to_str().unwrap());
        assert!(mounts[number]["options"].as_array().unwrap().iter().any(|option| option == extra));
        assert_eq!(fs::metadata(pod.file(&name)).unwrap().len(), size << 20);
        let metadata = fs::metadata(pod.file(&name)).unwrap();
        assert_eq!(metadata.mode() & 0o7777, 0o600);
        assert_eq!(fs::metadata(pod.file(&name).parent().unwrap()).unwrap().mode() & 0o7777, 0o700);
    }
    let root = fs::metadata(pod.mount("c.0")).unwrap();
    assert_eq!((root.mode() & 0o7777, root.uid()), (0o750, 3));
    assert_eq!(fs::metadata(pod.mount("c.1")).unwrap().mode() & 0o7777, 0o1777);
    assert_eq!(fs::read_dir(bound.path()).unwrap().count(), 0, "the bind mount's source isn't touched");

    let mut file = fs::File::create(pod.mount("c.0").join("f")).unwrap();
    let error = (0..16).find_map(|_| file.write_all(&noise(1 << 20, 1)).err()).unwrap();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
}

#[test]
fn a_pod_written_for_gvisor_works() {
    let mut pod = Pod::new();
    let annotations = |name: &str, source: &str, kind: &str, share: &str| {
        [("source", source), ("type", kind), ("share", share)]
            .map(|(field, value)| format!(r#""dev.gvisor.spec.mount.{name}.{field}":"{value}""#))
            .join(",")
    };
    let annotations = [
        annotations("disk", "/a", "tmpfs", "container"),
        annotations("memory", "/b", "tmpfs", "pod"),
        annotations("bind", "/c", "bind", "container"),
    ]
    .join(",");
    let mounts = r#"
        {"destination":"/a","type":"bind","source":"/a","options":["rbind"]},
        {"destination":"/b","type":"tmpfs","source":"/b"},
        {"destination":"/c","type":"bind","source":"/c","options":["rbind"]}"#;
    let prepared =
        pod.prepare("c", &format!(r#""annotations":{{{annotations}}},"mounts":[{mounts}]"#), None).unwrap();
    let ids: Vec<String> = prepared.filesystems.iter().map(ToString::to_string).collect();
    assert_eq!(ids, ["c:/a", ":/memory"]);
    assert!(pod.file("c.0").exists() && !pod.file("pod-memory").exists());
    assert_eq!(pod.mounts("c")[2]["source"], "/c");
}

#[test]
fn ids_of_another_user_namespace_are_translated() {
    let mapped = |host: u32| {
        let map = format!(r#"[{{"containerID":0,"hostID":{host},"size":1000}}]"#);
        let config = scratch("disk", "container", "size=32m");
        format!(r#"{config},"linux":{{"uidMappings":{map},"gidMappings":{map}}}"#)
    };
    let mut pod = Pod::new();
    pod.running("c", &mapped(100_000));
    let file = pod.mount("c.0").join("file");
    fs::write(&file, "contents").unwrap();
    std::os::unix::fs::chown(&file, Some(100_007), Some(100_008)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    pod.checkpoint("c", &dir.path().join("image"), &[]).unwrap();
    let mut new = Pod::new();
    new.prepare("c", &mapped(200_000), Some(&dir.path().join("image"))).unwrap();
    let file = fs::metadata(new.mount("c.0").join("file")).unwrap();
    assert_eq!((file.uid(), file.gid()), (200_007, 200_008));
    assert_eq!(fs::metadata(new.mount("c.0")).unwrap().uid(), 200_000);
}

#[test]
fn a_failed_checkpoint_leaves_the_filesystem_thawed() {
    let mut pod = Pod::new();
    pod.running("c", &scratch("disk", "container", "size=64m"));
    let mount = pod.mount("c.0");
    fs::write(mount.join("data"), noise(8 << 20, 1)).unwrap();
    let full = tempfile::tempdir().unwrap();
    let tmpfs = |options: &str| {
        let status =
            Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(full.path()).status();
        assert!(status.unwrap().success());
    };
    tmpfs("size=1m");
    let error = pod.checkpoint("c", &full.path().join("image"), &[]).unwrap_err();
    // Lazily: a process that another test is just starting may have our descriptors.
    assert!(Command::new("umount").arg("-l").arg(full.path()).status().unwrap().success());
    assert!(error.contains("No space left on device"), "{error}");
    fs::write(mount.join("thawed"), "x").unwrap();

    let error = pod.checkpoint("c", &mount.join("image"), &[]).unwrap_err();
    assert!(error.contains("is on c:/data, which is to be saved"), "{error}");
    assert!(!mount.join("image").exists());

    // What a process that died has left frozen.
    assert!(Command::new("fsfreeze").arg("-f").arg(&mount).status().unwrap().success());
    let dir = tempfile::tempdir().unwrap();
    pod.checkpoint("c", &dir.path().join("image"), &[]).unwrap();
    fs::write(mount.join("thawed again"), "x").unwrap();
    assert!(Command::new("fsfreeze").arg("-f").arg(&mount).status().unwrap().success());
    pod.remove("c");
    pod.assert_nothing_is_left();
}

#[test]
fn what_a_crash_leaves_is_swept_by_the_next_prepare() {
    let mut pod = Pod::new();
    pod.prepare("c", &scratch("disk", "container", "size=16m"), None).unwrap();
    let file = pod.file("c.0");
    // As after a reboot: neither mounts nor state.
    assert!(Command::new("umount").arg(pod.mount("c.0")).status().unwrap().success());
    fs::remove_dir_all(pod.state()).unwrap();
    pod.containers.clear();
    assert!(file.exists());
    let config = Config { filestore_dir: pod.dir.path().join("filestore"), ..Config::default() };
    let mut next = Pod::new();
    next.sandbox = next.sandbox.clone().with_config(config);
    next.prepare("c", &scratch("memory", "container", ""), None).unwrap();
    assert!(!file.exists() && !file.parent().unwrap().exists());
    assert!(!pod.state().exists(), "the sweep leaves no state");

    // A shim that was killed: another process removes by what is recorded.
    let mut pod = Pod::new();
    pod.prepare("c", &scratch("disk", "pod", "size=16m"), None).unwrap();
    assert!(pod.file("pod-vol").exists());
    Sandbox::of_container(&pod.namespace, "c").unwrap().unwrap().remove("c").unwrap();
    pod.containers.clear();
    pod.assert_nothing_is_left();
}

#[test]
fn inspect_lists_a_filesystem_on_disk_like_any_other() {
    let (_dir, image, _) = image("disk", "size=128m");
    let program = env!("CARGO_BIN_EXE_stillframe");
    let output = Command::new(program).args(["inspect", "--list"]).arg(&image).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{:?}", output.stderr);
    assert!(text.contains("on disk    private file 0 of 134217728 bytes"), "{text}");
    // By whichever of its three names comes first.
    assert!(text.contains("/large") && text.contains(" 3000001 bytes in "), "{text}");
}

#[test]
fn a_filesystem_on_disk_is_exported_like_any_other() {
    let (_dir, image, mut want) = image("disk", "size=128m");
    let new = filesystem::Tmpfs::new(&[]);
    let mut export = Command::new(env!("CARGO_BIN_EXE_stillframe"));
    let mut export =
        export.arg("export").arg(&image).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let archive = export.stdout.take().unwrap();
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "--acls", "--sparse", "--numeric-owner", "-xpf", "-"]);
    let output = tar.current_dir(new.path()).stdin(archive).output().unwrap();
    assert!(export.wait().unwrap().success() && output.status.success(), "{output:?}");
    // What a tar can't hold, and what GNU tar doesn't set: access times and inode flags.
    want.remove(Path::new("/socket")).unwrap();
    let kept = |all: &BTreeMap<PathBuf, String>| {
        let strip = |text: &String| {
            let (atime, flags) = (text.find(" a ").unwrap(), text.find(" attr ").unwrap() + 6);
            let rest = &text[flags + text[flags..].find(' ').unwrap()..];
            format!("{}{rest}", &text[..atime])
        };
        all.iter().map(|(path, text)| (path.clone(), strip(text))).collect::<BTreeMap<_, _>>()
    };
    assert_same(&kept(&describe(new.path())), &kept(&want));
}

/// A directory of an xfs that has reflinks.
struct Xfs {
    dir: tempfile::TempDir,
}

impl Xfs {
    fn new() -> Result<Self, String> {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let (image, mountpoint) = (dir.path().join("image"), dir.path().join("mnt"));
        fs::File::create(&image).unwrap().set_len(512 << 20).unwrap();
        fs::create_dir(&mountpoint).unwrap();
        let run = |command: &mut Command| match command.output() {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr))),
            Err(error) => Err(format!("{command:?}: {error}")),
        };
        run(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&image))?;
        run(Command::new("mount").args(["-t", "xfs", "-o", "loop"]).args([&image, &mountpoint]))?;
        Ok(Self { dir })
    }

    fn filestore(&self) -> PathBuf {
        self.dir.path().join("mnt/filestore")
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        // Lazily: a process that another test is just starting may have our descriptors.
        let unmounted = Command::new("umount").arg("-l").arg(self.dir.path().join("mnt")).status();
        assert!(unmounted.unwrap().success());
    }
}

#[test]
fn a_file_that_can_be_cloned_is_read_after_the_freeze() {
    let xfs = match Xfs::new() {
        Ok(xfs) => xfs,
        Err(error) => {
            println!("SKIPPED: a_file_that_can_be_cloned_is_read_after_the_freeze: no xfs: {error}");
            return;
        }
    };
    let config = scratch("disk", "container", "size=128m");
    let mut pod = Pod::new();
    pod.sandbox =
        pod.sandbox.clone().with_config(Config { filestore_dir: xfs.filestore(), ..Config::default() });
    pod.prepare("c", &config, None).unwrap();
    let mount = pod.mount("c.0");
    fs::write(mount.join("first"), "00000000").unwrap();
    let mut large = noise(64 << 20, 1);
    large[(64 << 20) - 8..].copy_from_slice(b"00000000");
    fs::write(mount.join("large"), &large).unwrap();
    // It counts on as soon as it is thawed, in places of the file that are read one long after the other.
    let script = r#"cd "$0"; while :; do
        i=$((i+1)); printf %08d $i 1<>first; sync -d first
        printf %08d $i | dd of=large bs=8 seek=8388607 conv=notrunc,fdatasync status=none
        echo $i
    done"#;
    let output =
        pod.start_reading("c", Command::new("sh").args(["-c", script]).arg(&mount).stdout(Stdio::piped()));
    let mut rounds = BufReader::new(output.unwrap()).lines();
    rounds.next().unwrap().unwrap();
    let reader = std::thread::spawn(move || rounds.map_while(Result::ok).count());
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let result = pod.checkpoint("c", &image, &[]).unwrap();
    assert!(result.copied_thawed_bytes > 64 << 20, "{result:?}");
    // The clone is gone, though the container runs on.
    assert_eq!(fs::read_dir(pod.file_in(&xfs.filestore(), "c.0").parent().unwrap()).unwrap().count(), 1);

    let mut new = Pod::new();
    let restored = new.prepare("c", &config, Some(&image)).unwrap().restored.unwrap();
    assert_eq!(restored.bytes, Image::open(&image).unwrap().manifest.pages_length, "as a whole");
    let number = |bytes: &[u8]| std::str::from_utf8(bytes).unwrap().parse::<u64>().unwrap();
    let first = number(&fs::read(new.mount("c.0").join("first")).unwrap());
    let found = fs::read(new.mount("c.0").join("large")).unwrap();
    let (found, last) = found.split_at(large.len() - 8);
    assert!(found == &large[..large.len() - 8]);
    let last = number(last);
    assert!(last > 0 && (first == last || first == last + 1), "{first} {last}");
    drop(pod);
    assert!(reader.join().unwrap() > 0);
    assert_eq!(fs::read_dir(xfs.filestore()).map_or(0, |entries| entries.count()), 0);
}
