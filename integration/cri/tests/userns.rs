//! Pods with a user namespace of their own (`hostUsers: false`), which containerd has from 1.7 on.

use std::os::unix::fs::MetadataExt;

use stillframe_cri::api::{IdMapping, NamespaceMode, UserNamespace};
use stillframe_cri::{Cri, MemoryVolume, PodSpec};
use stillframe_integration::{ContainerdVersion, compare, skip};

stillframe_integration::with_every_containerd!(volumes_of_a_pod_with_user_namespace_come_back);

const HOST: u32 = 400_000;

fn mapped<'a>(spec: PodSpec<'a>, host: u32) -> PodSpec<'a> {
    let ids = vec![IdMapping { host_id: host, container_id: 0, length: 65536 }];
    let users = UserNamespace { mode: NamespaceMode::Pod.into(), uids: ids.clone(), gids: ids };
    // runc doesn't mount /sys for a user namespace that doesn't own its network.
    spec.namespaces(|namespaces| {
        namespaces.userns_options = Some(users);
        namespaces.network = NamespaceMode::Pod.into();
    })
}

fn volumes_of_a_pod_with_user_namespace_come_back(version: &ContainerdVersion) {
    if version.numbers() < (1, 7) {
        skip::skipped("volumes_of_a_pod_with_user_namespace_come_back", "containerd has none before 1.7");
        return;
    }
    // The pod's own files in /etc are mapped mounts, from 2.0 on.
    let version = match (version.numbers() >= (2, 0)).then(|| version.with_mapping_runc()) {
        None => version.clone(),
        Some(Ok(version)) => version,
        Some(Err(reason)) => {
            let reason = format!("containerd wants a runc that can map mounts (1.2 or newer): {reason}");
            skip::skipped("volumes_of_a_pod_with_user_namespace_come_back", &reason);
            return;
        }
    };
    let cri = Cri::start(&version).unwrap();
    let start = |name: &str, host: u32, from: Option<&str>| {
        let mut spec = mapped(cri.pod(name), host);
        if let Some(from) = from {
            spec = spec.annotation("dev.stillframe.restore-from", from);
        }
        let volume = MemoryVolume::new(cri.containerd().dir(), &spec.uid(), "cache", Some(32 << 20)).unwrap();
        // The root filesystem is mapped by now.
        let pod = spec.run().unwrap();
        let web = pod.container("web").mount(volume.path(), "/cache").start().unwrap();
        (volume, pod, web)
    };
    let (volume, pod, web) = start("old", HOST, None);
    let map = web.shell("cat /proc/self/uid_map");
    let map: Vec<&str> = map.split_whitespace().collect();
    assert_eq!(map, ["0", "400000", "65536"]);
    web.shell("cd /cache; id -u > root; echo x > user; chown 1000:7 user; chmod 4750 user; echo s > /dev/shm/segment");
    let lists = ["/cache", "/dev/shm"].map(|path| (path, web.list(path).without("atime")));
    assert_eq!(lists[0].1.get("./user", "uid"), Some("1000"));
    // Somebody outside has made the root.
    assert_eq!(lists[0].1.get(".", "uid"), Some("65534"));
    let image = cri.containerd().dir().join("image").display().to_string();
    let words =
        ["fscheckpoint", "--namespace", "k8s.io", "--leave-running", "--image-path", &image, web.id()];
    cri.containerd().stillframe(&words).unwrap();
    pod.remove().unwrap();
    drop(volume);

    // Another pod has other ids on the host; inside they are the same.
    let (volume, pod, web) = start("new", HOST + 100_000, Some(&image));
    for (path, before) in &lists {
        let differences = compare(before, &web.list(path).without("atime"));
        assert_eq!(differences, [], "{path}");
    }
    let owner = |name| std::fs::metadata(volume.path().join(name)).unwrap().uid();
    assert_eq!((owner("user"), owner(".")), (HOST + 100_000 + 1000, 0));
    pod.remove().unwrap();
    drop(volume);
    cri.containerd().assert_nothing_left();
    cri.stop().unwrap();
}
