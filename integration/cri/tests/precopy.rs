//! kubelet's checkpoint request for a pod whose pages are kept apart, and are copied before its container is paused.

use std::fs::{self, File};

use stillframe_cri::{Cri, MemoryVolume};
use stillframe_integration::{ContainerdVersion, assert_same};

#[test]
fn the_archive_holds_the_trees_and_the_pages_stay_on_the_node() {
    const TEST: &str = "the_archive_holds_the_trees_and_the_pages_stay_on_the_node";
    // Older ones' CRI knows no checkpoints.
    let Some(version) = ContainerdVersion::or_skip("2", TEST) else { return };
    let cri = Cri::start(&version).unwrap();
    let archive = cri.containerd().dir().join("checkpoint.tar");
    let pages = cri.containerd().dir().join("pages");
    let spec = cri
        .pod("old")
        .annotation("dev.stillframe.image-dir", &pages.display().to_string())
        .annotation("dev.stillframe.precopy", "on");
    let old = MemoryVolume::new(cri.containerd().dir(), &spec.uid(), "cache", Some(64 << 20)).unwrap();
    let pod = spec.run().unwrap();
    let web = pod.container("web").capability("SYS_ADMIN").mount(old.path(), "/cache").start().unwrap();
    web.exec(&["probe", "fill", "/cache", "--seed", "32"]).unwrap();
    let cache = web.list("/cache");
    web.checkpoint(&archive).unwrap();
    let mut files: Vec<String> = tar::Archive::new(File::open(&archive).unwrap())
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .filter_map(|name| {
            name.strip_prefix("checkpoint/").filter(|name| !name.is_empty()).map(str::to_owned)
        })
        .collect();
    files.sort();
    assert_eq!(files, ["manifest.json", "pages.meta", "tree.tar.zst"]);
    let kept: Vec<_> = fs::read_dir(&pages).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_same("/cache after the checkpoint", &cache, &web.list("/cache"));
    pod.remove().unwrap();
    drop(old);
    cri.containerd().assert_nothing_left();

    let restoring = |name: &str| {
        let spec = cri.pod(name).annotation("dev.stillframe.restore-from", &archive.display().to_string());
        let volume = MemoryVolume::new(cri.containerd().dir(), &spec.uid(), "cache", Some(64 << 20)).unwrap();
        (spec, volume)
    };
    let (spec, new) = restoring("new");
    let pod = spec.run().unwrap();
    let web = pod.container("web").capability("SYS_ADMIN").mount(new.path(), "/cache").start().unwrap();
    assert_same("/cache restored", &cache, &web.list("/cache"));
    pod.remove().unwrap();
    drop(new);

    // Without the pages not even the pod comes, whose /dev/shm is in the image.
    fs::remove_file(&kept[0]).unwrap();
    let (spec, new) = restoring("without");
    let error = spec.run().map(|_| ()).unwrap_err().to_string();
    assert!(error.contains(&kept[0].display().to_string()), "{error}");
    drop(new);
    cri.containerd().assert_nothing_left();
    cri.stop().unwrap();
}
