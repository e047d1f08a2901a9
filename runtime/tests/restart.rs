//! What a container gets from an image when it is made again in its pod.

use std::fs;
use std::path::Path;
use std::process::Command;

#[path = "support/behind.rs"]
mod behind;
#[path = "support/pod.rs"]
mod pod;

use behind::{contents, lazy_pod, sleep};
use pod::Pod;

#[test]
fn a_container_that_restarts_gets_what_is_asked_for() {
    let config = |volume: &Path, on_restart: &str| {
        format!(
            r#""root": {{"path": "rootfs"}}, "annotations": {{"io.kubernetes.cri.container-name": "web"{on_restart}}}, "mounts": [
               {{"destination": "/own", "type": "tmpfs", "source": "tmpfs", "options": ["size=8m"]}},
               {{"destination": "/cache", "type": "bind", "source": "{}", "options": ["rbind"]}},
               {{"destination": "/other", "type": "bind", "source": "{}", "options": ["rbind"]}}]"#,
            volume.display(),
            volume.with_file_name("other").display(),
        )
    };
    let node = tempfile::tempdir().unwrap();
    let volume = |uid: &str| {
        let volumes = node.path().join(format!("pods/{uid}/volumes/kubernetes.io~empty-dir"));
        for name in ["cache", "other"] {
            fs::create_dir_all(volumes.join(name)).unwrap();
            let mount = ["-t", "tmpfs", "-o", "size=8m", "tmpfs"];
            assert!(Command::new("mount").args(mount).arg(volumes.join(name)).status().unwrap().success());
        }
        volumes.join("cache")
    };
    let unmount = |volume: &Path| {
        for path in [volume.to_owned(), volume.with_file_name("other")] {
            assert!(Command::new("umount").arg(path).status().unwrap().success());
        }
    };
    let old = volume("old");
    let image = node.path().join("image");
    {
        let mut pod = Pod::new();
        pod.running("c", &config(&old, ""));
        fs::write(pod.mount("c.0").join("file"), contents("own", 100_000)).unwrap();
        fs::write(old.join("file"), contents("cache", 100_000)).unwrap();
        pod.checkpoint("c", &image, &["/own", "/cache"]).unwrap();
    }
    unmount(&old);
    for (on_restart, own, cache) in [
        ("", Some("own"), "changed"),
        (r#", "dev.stillframe.restore.on-restart": "keep""#, Some("own"), "changed"),
        (r#", "dev.stillframe.restore.on-restart": "image""#, Some("own"), "cache"),
        (r#", "dev.stillframe.restore.on-restart": "empty""#, None, "changed"),
    ] {
        let new = volume("new");
        {
            let mut pod = lazy_pod();
            // The pod's own container keeps the sandbox.
            pod.running("pause", r#""root": {"path": "rootfs"}, "mounts": []"#);
            let config = config(&new, on_restart);
            pod.prepare("first", &config, Some(&image)).unwrap();
            pod.start("first", &mut sleep());
            for (_, status) in pod.sandbox.await_load("first").unwrap() {
                assert_eq!(status.loaded_files, 1);
            }
            assert!(fs::read(pod.mount("first.0").join("file")).unwrap() == contents("own", 100_000));
            assert!(fs::read(new.join("file")).unwrap() == contents("cache", 100_000));
            for (path, name) in [(pod.mount("first.0"), "changed"), (new.clone(), "changed")] {
                fs::write(path.join("file"), contents(name, 100_000)).unwrap();
            }
            fs::write(new.with_file_name("other").join("file"), "not in the image").unwrap();
            pod.remove("first");
            pod.prepare("second", &config, Some(&image)).unwrap();
            pod.start("second", &mut sleep());
            pod.sandbox.await_load("second").unwrap();
            let file = fs::read(pod.mount("second.0").join("file")).ok();
            assert!(file == own.map(|name| contents(name, 100_000)), "own, {on_restart}");
            assert!(fs::read(new.join("file")).unwrap() == contents(cache, 100_000), "cache, {on_restart}");
            let other = fs::read_to_string(new.with_file_name("other").join("file")).unwrap();
            assert_eq!(other, "not in the image");
        }
        unmount(&new);
    }
    let error = lazy_pod().prepare(
        "c",
        r#""mounts": [], "annotations": {"dev.stillframe.restore.on-restart": "never"}"#,
        None,
    );
    assert!(error.unwrap_err().contains("\"never\": give keep, image or empty"));
}

/// What an init container does to a volume counts, though it ends before the volume is loaded; so does that the volume was emptied.
#[test]
fn a_volume_goes_on_being_loaded_for_the_container_that_comes_next() {
    let node = tempfile::tempdir().unwrap();
    let volume = node.path().join("pods/uid/volumes/kubernetes.io~empty-dir/cache");
    fs::create_dir_all(&volume).unwrap();
    let tmpfs = || Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&volume).status().unwrap();
    let unmount = || Command::new("umount").arg(&volume).status().unwrap();
    let config = format!(
        r#""root": {{"path": "rootfs"}}, "mounts": [{{"destination": "/cache", "type": "bind", "source": "{}", "options": ["rbind"]}}]"#,
        volume.display()
    );
    let image = node.path().join("image");
    assert!(tmpfs().success());
    {
        let mut pod = Pod::new();
        pod.running("c", &config);
        for name in ["small", "large"] {
            let size = if name == "small" { 100 } else { 5_000_000 };
            fs::write(volume.join(name), contents(name, size)).unwrap();
        }
        pod.checkpoint("c", &image, &[]).unwrap();
    }
    assert!(unmount().success() && tmpfs().success());
    {
        let mut pod = lazy_pod();
        pod.running("pause", r#""root": {"path": "rootfs"}, "mounts": []"#);
        // Nothing is loaded before it has a process, which it never gets.
        pod.prepare("setup", &config, Some(&image)).unwrap();
        fs::write(volume.join("added"), "by setup").unwrap();
        pod.remove("setup");
        let restored = pod.prepare("web", &config, Some(&image)).unwrap().restored.unwrap();
        assert_eq!((restored.restored.len(), restored.kept.len()), (0, 1));
        pod.start("web", &mut sleep());
        pod.sandbox.await_load("web").unwrap();
        assert_eq!(fs::read_to_string(volume.join("added")).unwrap(), "by setup");
        assert!(fs::read(volume.join("small")).unwrap() == contents("small", 100));
        assert!(fs::read(volume.join("large")).unwrap() == contents("large", 5_000_000));
        for name in ["added", "small", "large"] {
            fs::remove_file(volume.join(name)).unwrap();
        }
        pod.remove("web");
        let restored = pod.prepare("again", &config, Some(&image)).unwrap().restored.unwrap();
        assert_eq!((restored.restored.len(), restored.kept.len()), (0, 1));
        assert_eq!(fs::read_dir(&volume).unwrap().count(), 0);
    }
    assert!(unmount().success());
}
