//! kubelet's checkpoint request: CRI's CheckpointContainer, which containerd has from 2.0 on, and what becomes of its archive.
//!
//! That containerd wants to see a criu first is met with a stand-in that the tests put into its PATH.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;

use stillframe_cri::{Cri, CriError, MemoryVolume, State};
use stillframe_integration::{ContainerdVersion, Listing, compare};

stillframe_integration::with_every_containerd!(an_archive_brings_a_pods_volumes_back);

#[track_caller]
fn same(what: &str, before: &Listing, after: &Listing) {
    let differences: Vec<_> = compare(before, after).iter().map(ToString::to_string).collect();
    assert!(differences.is_empty(), "{what}:\n{}", differences.join("\n"));
}

#[track_caller]
fn nothing_left(cri: &Cri) {
    let residue = cri.containerd().settled_residue();
    assert!(residue.is_empty(), "left behind:\n{residue}");
}

/// The names in an archive.
fn names(archive: &Path) -> BTreeSet<String> {
    let mut archive = tar::Archive::new(File::open(archive).unwrap());
    let entries = archive.entries().unwrap();
    entries.map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect()
}

fn an_archive_brings_a_pods_volumes_back(version: &ContainerdVersion) {
    let cri = Cri::start(version).unwrap();
    let archive = cri.containerd().dir().join("checkpoint.tar");
    let spec = cri.pod("old");
    let old = MemoryVolume::new(cri.containerd().dir(), &spec.uid(), "cache", Some(64 << 20)).unwrap();
    let pod = spec.run().unwrap();
    let web = pod.container("web").capability("SYS_ADMIN").mount(old.path(), "/cache").start().unwrap();
    if version.numbers() < (2, 0) {
        match web.checkpoint(&archive).unwrap_err() {
            CriError::Call { status, .. } => assert_eq!(status.code(), tonic::Code::Unimplemented),
            error => panic!("{error}"),
        }
        pod.remove().unwrap();
        return;
    }
    web.exec(&["probe", "fill", "/cache", "--seed", "31"]).unwrap();
    web.shell("echo segment > /dev/shm/segment");
    let (cache, shm) = (web.list("/cache"), web.list("/dev/shm"));
    web.checkpoint(&archive).unwrap();
    assert_eq!(web.status().unwrap().state(), State::ContainerRunning);
    same("/cache after the checkpoint", &cache, &web.list("/cache"));
    // What checkpointctl looks for, and our image.
    let names = names(&archive);
    for name in ["config.dump", "spec.dump", "checkpoint/manifest.json", "checkpoint/pages.img"] {
        assert!(names.contains(name), "no {name} in {names:?}");
    }
    // A second one while the first is there, into the same file.
    web.shell("echo longer > /cache/later");
    let cache = web.list("/cache");
    std::fs::remove_file(&archive).unwrap();
    web.checkpoint(&archive).unwrap();
    pod.remove().unwrap();
    drop(old);
    nothing_left(&cri);

    let spec = cri.pod("new").annotation("dev.stillframe.restore-from", &archive.display().to_string());
    let new = MemoryVolume::new(cri.containerd().dir(), &spec.uid(), "cache", Some(64 << 20)).unwrap();
    let pod = spec.run().unwrap();
    let web = pod.container("web").capability("SYS_ADMIN").mount(new.path(), "/cache").start().unwrap();
    let db = pod.container("db").mount(new.path(), "/elsewhere").start().unwrap();
    same("/cache restored", &cache, &web.list("/cache"));
    same("/dev/shm restored", &shm, &web.list("/dev/shm"));
    assert_eq!(db.shell("cat /elsewhere/later /dev/shm/segment"), "longer\nsegment\n");
    pod.remove().unwrap();
    drop(new);

    // A container without any memory of the pod's can be saved, too: kubelet can't know.
    let pod = cri.pod("bare").namespaces(|namespaces| namespaces.ipc = 2).run().unwrap();
    let bare = pod.container("bare").start().unwrap();
    bare.checkpoint(&cri.containerd().dir().join("bare.tar")).unwrap();
    bare.shell("true");
    pod.remove().unwrap();
    nothing_left(&cri);
    cri.stop().unwrap();
}
