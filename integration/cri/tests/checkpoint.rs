//! kubelet's checkpoint request: CRI's CheckpointContainer, which containerd has from 2.0 on, and what becomes of its archive.
//!
//! That containerd wants to see a criu first is met with a stand-in that the tests put into its PATH.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;

use stillframe_cri::pod::{AS_RUNC, HANDLER};
use stillframe_cri::{Cri, CriError, MemoryVolume, State, registry};
use stillframe_integration::{ContainerdVersion, assert_same};

stillframe_integration::with_every_containerd!(
    an_archive_brings_a_pods_volumes_back,
    so_it_does_under_the_name_of_runcs_shim,
);

/// The names in an archive.
fn names(archive: &Path) -> BTreeSet<String> {
    let mut archive = tar::Archive::new(File::open(archive).unwrap());
    let entries = archive.entries().unwrap();
    entries.map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect()
}

fn an_archive_brings_a_pods_volumes_back(version: &ContainerdVersion) {
    saved_and_brought_back(version, HANDLER);
}

/// `runtime_type` is runc's, and `runtime_path` ours.
fn so_it_does_under_the_name_of_runcs_shim(version: &ContainerdVersion) {
    saved_and_brought_back(version, AS_RUNC);
}

fn saved_and_brought_back(version: &ContainerdVersion, handler: &str) {
    let cri = Cri::start(version).unwrap();
    let archive = cri.containerd().dir().join("checkpoint.tar");
    let spec = cri.pod("old").handler(handler);
    let old = MemoryVolume::new(cri.containerd().dir(), &spec.uid(), "cache", Some(64 << 20)).unwrap();
    let pod = spec.run().unwrap();
    let web = pod.container("web").capability("SYS_ADMIN").mount(old.path(), "/cache").start().unwrap();
    let shims = cri.containerd().shims();
    assert_eq!(shims.len(), 1, "{shims:?}");
    if handler == AS_RUNC && version.numbers() < (1, 7) {
        // It has no runtime_path, and doesn't say so.
        assert!(shims[0].exe.ends_with("containerd-shim-runc-v2"), "{shims:?}");
        pod.remove().unwrap();
        return;
    }
    assert!(shims[0].exe.ends_with("containerd-shim-stillframe-v1"), "{shims:?}");
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
    // Some versions look for it, and don't say to anybody but runc that they will.
    let containers = cri.containerd().dir().join("root/io.containerd.grpc.v1.cri/containers");
    assert!(containers.join(web.id()).join("stats-dump").exists());
    assert_same("/cache after the checkpoint", &cache, &web.list("/cache"));
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
    cri.containerd().assert_nothing_left();

    let spec = cri
        .pod("new")
        .handler(handler)
        .annotation("dev.stillframe.restore-from", &archive.display().to_string());
    let new = MemoryVolume::new(cri.containerd().dir(), &spec.uid(), "cache", Some(64 << 20)).unwrap();
    let pod = spec.run().unwrap();
    let web = pod.container("web").capability("SYS_ADMIN").mount(new.path(), "/cache").start().unwrap();
    let db = pod.container("db").mount(new.path(), "/elsewhere").start().unwrap();
    assert_same("/cache restored", &cache, &web.list("/cache"));
    assert_same("/dev/shm restored", &shm, &web.list("/dev/shm"));
    assert_eq!(db.shell("cat /elsewhere/later /dev/shm/segment"), "longer\nsegment\n");
    pod.remove().unwrap();
    drop(new);

    // A container without any memory of the pod's can be saved, too: kubelet can't know.
    let pod = cri.pod("bare").handler(handler).namespaces(|namespaces| namespaces.ipc = 2).run().unwrap();
    let bare = pod.container("bare").start().unwrap();
    bare.checkpoint(&cri.containerd().dir().join("bare.tar")).unwrap();
    bare.shell("true");
    pod.remove().unwrap();
    cri.containerd().assert_nothing_left();
    cri.stop().unwrap();
}

/// containerd 2.1 and 2.2 make a container of an archive when that is given as its image. Later ones don't, or not unless told
/// to, which is why there is the annotation.
#[test]
fn a_container_is_created_from_an_archive() {
    const TEST: &str = "a_container_is_created_from_an_archive";
    let Some((cri, registry)) = registry::with_archives(TEST) else { return };
    for handler in [HANDLER, AS_RUNC] {
        let archive = cri.containerd().dir().join(format!("{handler}.tar"));
        let spec = cri.pod("old").handler(handler);
        let old = MemoryVolume::new(cri.containerd().dir(), &spec.uid(), "cache", Some(64 << 20)).unwrap();
        let pod = spec.run().unwrap();
        let parts = MemoryVolume::new(cri.containerd().dir(), &pod.uid(), "parts", Some(8 << 20)).unwrap();
        let part = parts.sub_path("part", "web", 1).unwrap();
        let web = pod.container("web").image(&registry.name()).capability("SYS_ADMIN");
        let web = web.mount(old.path(), "/cache").mount(part.path(), "/part").start().unwrap();
        assert_eq!(web.exec(&["probe", "fill", "/cache", "--seed", "32"]).unwrap().code, 0);
        web.shell(
            "echo layer > /layer; echo part > /part/file; chmod 750 /part; echo segment > /dev/shm/segment",
        );
        std::fs::write(parts.path().join("beside"), "beside\n").unwrap();
        let lists = ["/cache", "/part", "/dev/shm"].map(|path| (path, web.list(path)));
        web.checkpoint(&archive).unwrap();
        pod.remove().unwrap();
        drop((old, part, parts));

        let spec = cri.pod("new").handler(handler);
        let new = MemoryVolume::new(cri.containerd().dir(), &spec.uid(), "cache", Some(64 << 20)).unwrap();
        let pod = spec.run().unwrap();
        // Only this container is told of the archive: the sandbox's own has had the pod's /dev/shm from the start, and kubelet has
        // made the part's directory and holds it by a bind mount.
        let parts = MemoryVolume::new(cri.containerd().dir(), &pod.uid(), "parts", Some(8 << 20)).unwrap();
        let part = parts.sub_path("part", "web", 1).unwrap();
        let web = pod.container("web").image(&archive.display().to_string()).capability("SYS_ADMIN");
        let web = web.mount(new.path(), "/cache").mount(part.path(), "/part").start().unwrap();
        for (path, list) in &lists {
            assert_same(path, list, &web.list(path));
        }
        assert_eq!(parts.names(), ["beside", "part"]);
        assert_eq!(web.shell("cat /layer"), "layer\n");
        let db = pod.container("db").mount(parts.path(), "/parts").start().unwrap();
        assert_eq!(
            db.shell("cat /parts/part/file /parts/beside /dev/shm/segment"),
            "part\nbeside\nsegment\n"
        );
        web.stop(0).unwrap();
        assert_eq!(web.await_state(State::ContainerExited).unwrap().exit_code, 137);
        pod.remove().unwrap();
        drop((new, part, parts));
        cri.containerd().assert_nothing_left();
    }
    cri.stop().unwrap();
}
