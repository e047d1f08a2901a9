//! Filesystems that several containers of a pod share, or several mounts of a container, on either medium.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use stillframe_runtime::image::Image;

#[path = "../../tmpfs/tests/support/filesystem.rs"]
mod filesystem;

#[path = "support/pod.rs"]
mod pod;

#[path = "support/disk.rs"]
mod disk;

use disk::config;
use filesystem::noise;
use pod::Pod;

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
