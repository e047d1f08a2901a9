//! The memory-backed volumes of a pod, laid out as kubelet and containerd do it, without either.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "support/pod.rs"]
mod pod;

use pod::Pod;

/// What kubelet and containerd have mounted for a pod.
struct Node {
    dir: tempfile::TempDir,
    uid: &'static str,
}

impl Node {
    fn new(uid: &'static str) -> Self {
        let node = Self { dir: tempfile::tempdir().unwrap(), uid };
        for path in [node.volume(), node.shm()] {
            fs::create_dir_all(&path).unwrap();
            let mounted =
                Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"]).arg(&path).status();
            assert!(mounted.unwrap().success());
        }
        node
    }

    fn volume(&self) -> PathBuf {
        self.dir.path().join(format!("pods/{}/volumes/kubernetes.io~empty-dir/cache", self.uid))
    }

    fn shm(&self) -> PathBuf {
        self.dir.path().join("sandboxes/s/shm")
    }

    /// Members of a config.json of a container called `name` that mounts the volume at `path`, and /dev/shm.
    fn config(&self, name: &str, path: &str, annotations: &str) -> String {
        format!(
            r#""annotations":{{"io.kubernetes.cri.container-name":"{name}"{annotations}}},"mounts":[
               {{"destination":"{path}","type":"bind","source":"{}","options":["rbind","rprivate","rro"]}},
               {{"destination":"/dev/shm","type":"bind","source":"{}","options":["rbind","rw"]}}]"#,
            self.volume().display(),
            self.shm().display(),
        )
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for path in [self.volume(), self.shm()] {
            // A directory of a bind mount counts too: nothing of ours may hold it.
            assert!(Command::new("umount").arg(&path).status().unwrap().success());
        }
    }
}

fn ids(ids: &[stillframe_tmpfs::ResourceId]) -> Vec<String> {
    ids.iter().map(ToString::to_string).collect()
}

/// The image of a pod with two containers that share a volume.
fn image(dir: &Path) -> PathBuf {
    let node = Node::new("old-uid");
    let mut pod = Pod::new();
    pod.running("a", &node.config("web", "/cache", ""));
    pod.running("b", &node.config("db", "/elsewhere", ""));
    assert_eq!(pod.mounts("a")[0]["source"], node.volume().to_str().unwrap(), "the spec stays as it is");
    fs::write(node.volume().join("data"), vec![7; 100_000]).unwrap();
    fs::write(node.shm().join("segment"), "shared").unwrap();
    let image = dir.join("image");
    let result = pod.checkpoint("a", &image, &[]).unwrap();
    assert_eq!(ids(&result.filesystems), [":/cache", ":/dev/shm"]);
    // By the name that the other container has for it, and once.
    let result = pod.checkpoint("b", &dir.join("other"), &["db:/elsewhere"]).unwrap();
    assert_eq!((ids(&result.filesystems), result.files), (vec![":/cache".to_owned()], 1));
    image
}

#[test]
fn a_volume_comes_back_in_another_pod_with_its_first_container_and_stays_for_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let node = Node::new("new-uid");
    let mut pod = Pod::new();
    let from = format!(r#","dev.stillframe.restore-from":"{}""#, image.display());
    let first = pod.prepare("a", &node.config("web", "/cache", &from), None).unwrap().restored.unwrap();
    assert_eq!(first.restored.len(), 2);
    assert_eq!(fs::read(node.volume().join("data")).unwrap(), vec![7; 100_000]);
    assert_eq!(fs::read_to_string(node.shm().join("segment")).unwrap(), "shared");
    fs::write(node.volume().join("data"), "newer").unwrap();

    let second = pod.prepare("b", &node.config("db", "/elsewhere", &from), None).unwrap().restored.unwrap();
    assert_eq!(second.restored, []);
    assert_eq!(fs::read_to_string(node.volume().join("data")).unwrap(), "newer");
    // Also when all containers were gone in between: the volume has outlived them.
    pod.remove("a");
    pod.remove("b");
    let again = pod.prepare("a", &node.config("web", "/cache", &from), None).unwrap().restored.unwrap();
    assert_eq!(again.restored, []);
    assert_eq!(fs::read_to_string(node.volume().join("data")).unwrap(), "newer");
}

#[test]
fn a_volume_is_restored_though_the_pods_own_container_has_it_and_once() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let node = Node::new("new-uid");
    // As kubelet does for a sub-path, and keeps it bind-mounted.
    let sub = node.volume().join("sub");
    fs::create_dir(&sub).unwrap();
    let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&sub).unwrap());
    let mut pod = Pod::new();
    pod.prepare("pause", &node.config("pause", "/cache", ""), None).unwrap();
    let first = pod.prepare("a", &node.config("web", "/cache", ""), Some(&image)).unwrap().restored.unwrap();
    assert_eq!(first.restored.len(), 2);
    assert_eq!(fs::read_to_string(node.shm().join("segment")).unwrap(), "shared");
    assert_eq!(std::os::unix::fs::MetadataExt::ino(&fs::metadata(&sub).unwrap()), inode);
    // Emptied by the application: that is how it is now.
    fs::remove_file(node.shm().join("segment")).unwrap();
    let again = pod.prepare("b", &node.config("db", "/other", ""), Some(&image)).unwrap().restored.unwrap();
    assert_eq!(again.restored, []);
    assert!(!node.shm().join("segment").exists());
}

#[test]
fn a_failed_restore_beside_another_container_leaves_the_volume_empty() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let pages = fs::OpenOptions::new().write(true).open(image.join("pages.img")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&pages, b"damaged", 50_000).unwrap();
    let node = Node::new("new-uid");
    fs::create_dir(node.volume().join("sub")).unwrap();
    let mut pod = Pod::new();
    pod.prepare("pause", &node.config("pause", "/cache", ""), None).unwrap();
    pod.prepare("a", &node.config("web", "/cache", ""), Some(&image)).map(|_| ()).unwrap_err();
    assert!(!node.volume().join("data").exists() && !node.shm().join("segment").exists());
    assert!(node.volume().join("sub").is_dir());
}

#[test]
fn a_restore_that_fails_leaves_the_volume_empty() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let pages = fs::OpenOptions::new().write(true).open(image.join("pages.img")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&pages, b"damaged", 50_000).unwrap();
    let node = Node::new("new-uid");
    let mut pod = Pod::new();
    let error = pod.prepare("a", &node.config("web", "/cache", ""), Some(&image)).map(|_| ()).unwrap_err();
    assert!(error.contains("pages.img"), "{error}");
    for path in [node.volume(), node.shm()] {
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0, "{path:?}");
    }
    pod.assert_nothing_is_left();
}

#[test]
fn a_volume_that_is_too_small_is_refused_with_both_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let node = Node::new("new-uid");
    assert!(
        Command::new("mount").args(["-o", "remount,size=64k"]).arg(node.volume()).status().unwrap().success()
    );
    let error =
        Pod::new().prepare("a", &node.config("web", "/cache", ""), Some(&image)).map(|_| ()).unwrap_err();
    assert!(error.contains("102400 bytes") && error.contains("65536 bytes"), "{error}");
}

#[test]
fn a_sub_path_stands_for_its_whole_volume() {
    let node = Node::new("uid");
    fs::create_dir(node.volume().join("sub")).unwrap();
    fs::write(node.volume().join("outside"), "x").unwrap();
    let sub_path = node.dir.path().join("pods/uid/volume-subpaths/cache/web/0");
    fs::create_dir_all(&sub_path).unwrap();
    let bind =
        |from: &Path, to: &Path| Command::new("mount").arg("--bind").args([from, to]).status().unwrap();
    assert!(bind(&node.volume().join("sub"), &sub_path).success());
    let mut pod = Pod::new();
    let mount = format!(
        r#"{{"destination":"/s","type":"bind","source":"{}","options":["bind"]}}"#,
        sub_path.display()
    );
    pod.running("a", &format!(r#""mounts":[{mount}]"#));
    let dir = tempfile::tempdir().unwrap();
    let result = pod.checkpoint("a", &dir.path().join("image"), &[]);
    assert!(Command::new("umount").arg(&sub_path).status().unwrap().success());
    let result = result.unwrap();
    assert_eq!((ids(&result.filesystems), result.files, result.entries), (vec![":/cache".to_owned()], 1, 2));
}

#[test]
fn a_bad_annotation_is_refused_by_name() {
    let node = Node::new("uid");
    for (value, want) in [("relative", "\"relative\""), ("/nonexistent/image", "/nonexistent/image")] {
        let from = format!(r#","dev.stillframe.restore-from":"{value}""#);
        let error =
            Pod::new().prepare("a", &node.config("web", "/cache", &from), None).map(|_| ()).unwrap_err();
        assert!(error.contains(want), "{error}");
    }
}
