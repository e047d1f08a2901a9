//! Filesystems on disk and filesystems that a pod shares, without containerd or runc: bundles, processes in cgroups of
//! their own, real ext4 on loop devices, real tmpfs.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use stillframe_runtime::config::Config;
use stillframe_runtime::image::Image;
use stillframe_runtime::manifest::{Manifest, Offsets, Part};
use stillframe_runtime::sandbox::Sandbox;
use stillframe_tmpfs::mount::open_view;

#[path = "../../tmpfs/tests/support/filesystem.rs"]
mod filesystem;

#[path = "support/pod.rs"]
mod pod;

use pod::Pod;

use filesystem::{EXT4_LARGEST, describe_directory, fill_up_to, noise};

/// Members of a config.json: one tmpfs at /data whose source is "scratch", and a hint for it.
fn scratch(medium: &str, share: &str, options: &str) -> String {
    config(&[("vol", "scratch", medium, share, options)], &[("/data", "tmpfs", "scratch", "")])
}

/// Members of a config.json: hints (name, source, medium, share, options), mounts (destination, type, source, options).
fn config(hints: &[(&str, &str, &str, &str, &str)], mounts: &[(&str, &str, &str, &str)]) -> String {
    let hint = |(name, source, medium, share, options): &(&str, &str, &str, &str, &str)| {
        [("source", source), ("medium", medium), ("share", share), ("options", options)]
            .map(|(field, value)| format!(r#""dev.stillframe.mount.{name}.{field}":"{value}""#))
            .join(",")
    };
    let mount = |(destination, kind, source, options): &(&str, &str, &str, &str)| {
        let options: Vec<&str> = options.split(',').filter(|option| !option.is_empty()).collect();
        serde_json::json!({
            "destination": destination, "type": kind, "source": source, "options": options
        })
        .to_string()
    };
    let hints = hints.iter().map(hint).collect::<Vec<_>>().join(",");
    let mounts = mounts.iter().map(mount).collect::<Vec<_>>().join(",");
    let process = r#""process":{"capabilities":{"bounding":["CAP_MKNOD"]}}"#;
    format!(r#""annotations":{{{hints}}},"mounts":[{mounts}],{process}"#)
}

/// What must be the same on ext4 and tmpfs: all but the sizes of directories.
fn describe(path: &Path) -> BTreeMap<PathBuf, String> {
    let view = open_view(path).unwrap();
    let mut all = BTreeMap::new();
    describe_directory(&view, Path::new("/"), &mut all, &mut BTreeMap::new());
    for text in all.values_mut().filter(|text| text.starts_with('4')) {
        let (before, after) = text.split_once(" size ").unwrap();
        *text = format!("{before}{}", &after[after.find(' ').unwrap()..]);
    }
    all
}

fn assert_same(found: &BTreeMap<PathBuf, String>, want: &BTreeMap<PathBuf, String>) {
    for (path, want) in want {
        assert_eq!(found.get(path), Some(want), "{path:?}");
    }
    assert_eq!(found.len(), want.len(), "{:?}", found.keys());
}

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
fn what_does_not_fit_is_refused_with_both_numbers() {
    let mut pod = Pod::new();
    pod.running("c", &scratch("disk", "container", "size=64m"));
    fs::write(pod.mount("c.0").join("large"), noise(20 << 20, 1)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    pod.checkpoint("c", &image, &[]).unwrap();
    for medium in ["disk", "memory"] {
        let error = refused(&image, &scratch(medium, "container", "size=16m"));
        assert!(error.contains("holds 20971520 bytes"), "{error}");
        assert!(error.contains("size= allows 1"), "{error}");
    }
}

#[test]
fn a_filesystem_of_the_pod_is_one_for_all_its_containers() {
    for medium in ["disk", "memory"] {
        let hint = ("vol", "/vol", medium, "pod", "size=32m");
        let at = |path| config(&[hint], &[(path, "bind", "/vol", "rbind")]);
        let twice = config(&[hint], &[("/b", "bind", "/vol", "rbind"), ("/b2", "bind", "/vol", "rbind,ro")]);
        let mut pod = Pod::new();
        pod.running("a", &at("/a"));
        let mount = pod.mount("pod-vol");
        fs::write(mount.join("by a"), "a").unwrap();
        pod.running("b", &twice);
        for (id, number) in [("a", 0), ("b", 0), ("b", 1)] {
            assert_eq!(pod.mounts(id)[number]["source"], mount.to_str().unwrap());
        }
        assert!(pod.mounts("b")[1]["options"].as_array().unwrap().iter().any(|option| option == "ro"));
        assert_eq!(fs::read_to_string(mount.join("by a")).unwrap(), "a");

        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        let error = pod.checkpoint("a", &image, &["/none"]).unwrap_err();
        assert!(error.contains("there are: :/vol (a:/a b:/b b:/b2)"), "{error}");
        for (number, selector) in ["/a", "b:/b2", ":/vol", "all-tmpfs", "b:all-tmpfs"].iter().enumerate() {
            let image = dir.path().join(number.to_string());
            let result = pod.checkpoint("a", &image, &[selector]).unwrap();
            let ids: Vec<String> = result.filesystems.iter().map(ToString::to_string).collect();
            assert_eq!(ids, [":/vol"], "{selector}");
        }
        pod.checkpoint("b", &image, &[]).unwrap();
        let manifest = Image::open(&image).unwrap().manifest;
        let aliases: Vec<String> = manifest.filesystems[0].aliases.iter().map(ToString::to_string).collect();
        assert_eq!(aliases, ["a:/a", "b:/b", "b:/b2"]);

        // It goes with the last container, whoever made it.
        pod.remove("a");
        assert_eq!(fs::read_to_string(mount.join("by a")).unwrap(), "a");
        pod.checkpoint("b", &dir.path().join("without a"), &[]).unwrap();
        let manifest = Image::open(&dir.path().join("without a")).unwrap().manifest;
        assert_eq!(manifest.filesystems[0].aliases.len(), 2);
        pod.remove("b");
        pod.assert_nothing_is_left();

        // The first that has it restores it, for all.
        let mut new = Pod::new();
        let restored = new.prepare("b", &twice, Some(&image)).unwrap().restored.unwrap();
        assert_eq!((restored.restored.len(), restored.kept.len(), restored.empty.len()), (1, 0, 0));
        fs::write(new.mount("pod-vol").join("since"), "x").unwrap();
        let restored = new.prepare("a", &at("/a"), Some(&image)).unwrap().restored.unwrap();
        assert_eq!((restored.restored.len(), restored.kept.len(), restored.unused.len()), (0, 1, 0));
        assert_eq!(fs::read_dir(new.mount("pod-vol")).unwrap().count(), 2);
        // A container that fails leaves it to the others.
        let bad = config(&[hint], &[("/c", "bind", "/vol", "rbind"), ("/x", "tmpfs", "t", "uid=5000000000")]);
        new.prepare("c", &bad, None).map(|_| ()).unwrap_err();
        let other = if medium == "disk" { "memory" } else { "disk" };
        let other = config(&[("vol", "/vol", other, "pod", "")], &[("/d", "bind", "/vol", "rbind")]);
        let error = new.prepare("d", &other, None).map(|_| ()).unwrap_err();
        assert!(error.contains("mount /d") && error.contains("on another medium"), "{error}");
        assert_eq!(fs::read_dir(new.mount("pod-vol")).unwrap().count(), 2);
        let record = fs::read_to_string(new.mount("pod-vol").with_file_name("record.json")).unwrap();
        assert!(!record.contains("\"/c\"") && !record.contains("\"/d\""), "{record}");
    }
}

#[test]
fn a_shared_filesystem_starts_as_a_copy_of_what_it_covers_once() {
    for medium in ["disk", "memory"] {
        let shared = config(
            &[("vol", "/vol", medium, "pod", "size=16m,tmpcopyup")],
            &[("/v", "bind", "/vol", "rbind")],
        );
        let mut pod = Pod::new();
        for id in ["a", "b"] {
            fs::create_dir_all(pod.dir.path().join(id).join("rootfs/v")).unwrap();
            fs::write(pod.dir.path().join(id).join("rootfs/v").join(id), "").unwrap();
        }
        let names = |pod: &Pod| {
            let entries = fs::read_dir(pod.mount("pod-vol")).unwrap();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
        };
        pod.prepare("a", &shared, None).unwrap();
        assert_eq!(names(&pod), ["a"], "{medium}");
        pod.prepare("b", &shared, None).unwrap();
        assert_eq!(names(&pod), ["a"], "{medium}");
    }
}

#[test]
fn a_source_mounted_twice_in_a_container_is_one_filesystem() {
    let hint = ("vol", "/vol", "disk", "container", "size=16m");
    let both = config(&[hint], &[("/one", "bind", "/vol", "rbind"), ("/two", "bind", "/vol", "rbind")]);
    let mut pod = Pod::new();
    pod.running("c", &both);
    pod.running("d", &both);
    assert_eq!(pod.mounts("c")[0]["source"], pod.mounts("c")[1]["source"]);
    assert_ne!(pod.mounts("c")[0]["source"], pod.mounts("d")[0]["source"]);
    fs::write(pod.mount("c.0").join("file"), "x").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let result = pod.checkpoint("c", &image, &["/two"]).unwrap();
    assert_eq!(result.filesystems[0].to_string(), "c:/one");
    let mut new = Pod::new();
    new.prepare("c", &config(&[hint], &[("/two", "bind", "/vol", "rbind")]), Some(&image)).unwrap();
    assert!(new.mount("c.0").join("file").exists());
}

/// All that have a filesystem stand still while it is saved, and move on after it.
#[test]
fn the_other_containers_of_a_shared_filesystem_are_frozen_too() {
    for medium in ["memory", "disk"] {
        let shared =
            config(&[("vol", "/vol", medium, "pod", "size=256m")], &[("/v", "bind", "/vol", "rbind")]);
        let mut pod = Pod::new();
        pod.running("a", &shared);
        pod.prepare("b", &shared, None).unwrap();
        let mount = pod.mount("pod-vol");
        // Saved in this order, with some time between the first and the last.
        fs::write(mount.join("first"), "00000000").unwrap();
        fs::write(mount.join("large"), noise(64 << 20, 1)).unwrap();
        fs::write(mount.join("last"), "00000000").unwrap();
        let script =
            r#"cd "$0"; while :; do i=$((i+1)); printf %08d $i 1<>first; printf %08d $i 1<>last; done"#;
        pod.start("b", Command::new("sh").args(["-c", script]).arg(&mount));
        let count =
            |mount: &Path, name: &str| fs::read_to_string(mount.join(name)).unwrap().parse::<u64>().unwrap();
        let runs_on = || {
            let (now, deadline) = (count(&mount, "last"), Instant::now() + Duration::from_secs(20));
            while count(&mount, "last") == now {
                assert!(Instant::now() < deadline, "it doesn't run");
                std::thread::yield_now();
            }
        };
        runs_on();
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        pod.checkpoint("a", &image, &[]).unwrap();
        runs_on();
        let mut new = Pod::new();
        new.prepare("a", &shared, Some(&image)).unwrap();
        let (first, last) = (count(&new.mount("pod-vol"), "first"), count(&new.mount("pod-vol"), "last"));
        assert!(first == last || first == last + 1, "{medium}: {first} {last}");
        assert!(last > 0);
    }
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

/// Prepares a container that can't be; everything that was begun must be gone.
fn refused(image: &Path, config: &str) -> String {
    let mut pod = Pod::new();
    let error = pod.prepare("c", config, Some(image)).map(|_| ()).unwrap_err();
    pod.assert_nothing_is_left();
    error
}

#[test]
fn a_container_that_can_not_be_prepared_leaves_nothing() {
    let good = ("/good", "tmpfs", "good", "");
    let hint = ("vol", "scratch", "disk", "container", "");
    let with = |options| {
        config(
            &[hint, ("good", "good", "disk", "pod", "size=16m")],
            &[good, ("/bad", "tmpfs", "scratch", options)],
        )
    };
    for (config, want) in [
        (with("size=100k"), "make c:/bad on disk: mkfs.ext4"),
        (with("size=16m,usrquota"), "option \"usrquota\" can't be used with a filesystem on disk"),
        (with("size=16m,context=nosuchlabel"), "the kernel made no filesystem"),
        (with("size=16m,uid=7,gid=4294967295"), "gid=4294967295"),
        (scratch("tape", "pod", ""), "dev.stillframe.mount.vol.medium=\"tape\": expected disk or memory"),
    ] {
        let mut pod = Pod::new();
        let error = pod.prepare("c", &config, None).map(|_| ()).unwrap_err();
        assert!(error.contains(want), "{error}");
        pod.assert_nothing_is_left();
    }
}

#[test]
fn damaged_and_made_up_images_are_refused() {
    let mut pod = Pod::new();
    let config = scratch("disk", "container", "size=32m");
    pod.running("c", &config);
    fs::write(pod.mount("c.0").join("data"), noise(200_000, 1)).unwrap();
    fs::write(pod.mount("c.0").join("twin"), noise(4096, 2)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    pod.checkpoint("c", &image, &[]).unwrap();
    let memory = scratch("memory", "container", "");
    let (manifest, tree) = (image.join("manifest.json"), image.join("tree.tar"));
    let (whole_manifest, whole_tree) = (fs::read(&manifest).unwrap(), fs::read(&tree).unwrap());

    // A flipped bit in the middle of the pages.
    let pages = fs::OpenOptions::new().read(true).write(true).open(image.join("pages.img")).unwrap();
    let middle = pages.metadata().unwrap().len() / 2;
    let mut byte = [0];
    pages.read_exact_at(&mut byte, middle).unwrap();
    pages.write_all_at(&[byte[0] ^ 1], middle).unwrap();
    let error = refused(&image, &config);
    assert!(
        error.contains(&format!(
            "pages.img: the pages file is damaged at offset {:#x}",
            middle / 65536 * 65536
        )),
        "{error}"
    );
    pages.write_all_at(&byte, middle).unwrap();

    let change = |change: &dyn Fn(&mut Manifest)| {
        let mut changed = Manifest::decode(&whole_manifest).unwrap();
        change(&mut changed);
        fs::write(&manifest, changed.encode()).unwrap();
    };
    let set_index = |new: u32| {
        move |m: &mut Manifest| {
            let Offsets::PrivateFile { index, .. } = &mut m.filesystems[0].offsets else {
                panic!("not on disk")
            };
            *index = new;
        }
    };
    change(&set_index(9));
    let error = refused(&image, &config);
    assert!(
        error.contains("the filesystem c:/data is in the private MemoryFile 9, which isn't there"),
        "{error}"
    );
    // As if its extents were offsets in pages.img, which is shorter.
    change(&|m| m.filesystems[0].offsets = Offsets::PagesFile);
    let error = refused(&image, &memory);
    assert!(error.contains("reaches behind the pages file's end"), "{error}");

    // A tree that says something else than the filestore holds: the mode of its file.
    let mut changed = whole_tree.clone();
    let header = changed.chunks(512).position(|block| block.starts_with(b"./data\0")).unwrap() * 512;
    let sum = |header: &[u8]| -> u64 {
        header
            .iter()
            .enumerate()
            .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u64::from(*byte) })
            .sum()
    };
    changed[header + 100..header + 107].copy_from_slice(b"0004755");
    let checksum = format!("{:06o}\0 ", sum(&changed[header..header + 512]));
    changed[header + 148..header + 156].copy_from_slice(checksum.as_bytes());
    let use_tree = |changed: &[u8]| {
        fs::write(&tree, changed).unwrap();
        change(&|m| m.tree = Part::of(changed));
    };
    use_tree(&changed);
    let error = refused(&image, &config);
    assert!(error.contains("\"/data\" is not the same in the saved filestore and in its tree"), "{error}");
    // Through the tree alone it is what the tree says.
    let mut pod = Pod::new();
    pod.prepare("c", &memory, Some(&image)).unwrap();
    assert_eq!(fs::metadata(pod.mount("c.0").join("data")).unwrap().permissions().mode() & 0o7777, 0o4755);

    // A page that two files have, whichever way it would be restored.
    let mut changed = whole_tree.clone();
    let twin = changed.chunks(512).position(|block| block.starts_with(b"./twin\0")).unwrap() * 512 + 512;
    let offset = changed[header + 512 + 56..header + 512 + 64].to_vec();
    changed[twin + 56..twin + 64].copy_from_slice(&offset);
    use_tree(&changed);
    for config in [&memory, &config] {
        let error = refused(&image, config);
        assert!(error.contains("of the private MemoryFile, which another part of a file has too"), "{error}");
    }

    // An extent behind the private file's end.
    let mut changed = whole_tree.clone();
    let record = header + 512;
    changed[record + 40 + 16..record + 40 + 24].copy_from_slice(&(32u64 << 20).to_le_bytes());
    use_tree(&changed);
    let error = refused(&image, &memory);
    assert!(error.contains("entry \"./data\"") && error.contains("reaches behind"), "{error}");

    fs::write(&tree, &whole_tree).unwrap();
    fs::write(&manifest, &whole_manifest).unwrap();
    let mut pod = Pod::new();
    pod.prepare("c", &config, Some(&image)).unwrap();
    assert_eq!(fs::read(pod.mount("c.0").join("data")).unwrap(), noise(200_000, 1));
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
    let config = Config { filestore_dir: pod.dir.path().join("filestore") };
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
