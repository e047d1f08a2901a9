//! The memory-backed volumes of a pod are saved once and come back in a new pod, on every containerd.

use std::path::{Path, PathBuf};

use stillframe_cri::{Cri, MemoryVolume, Pod, PodContainer, PodSpec};
use stillframe_integration::ctr::CtrError;
use stillframe_integration::{ContainerdVersion, assert_same};

stillframe_integration::with_every_containerd!(
    volumes_come_back_in_a_new_pod,
    a_volume_on_disk_and_the_hosts_shared_memory_are_left_alone,
    what_cannot_be_restored_fails_with_the_reason,
    a_pod_that_differs_gets_what_fits,
);

const RESTORE_FROM: &str = "dev.stillframe.restore-from";

fn volume(cri: &Cri, spec: &PodSpec<'_>, size: u64) -> MemoryVolume {
    MemoryVolume::new(cri.containerd().dir(), &spec.uid(), "cache", Some(size)).unwrap()
}

/// Two containers with the same volume at different places.
fn two<'a>(pod: &Pod<'a>, volume: &MemoryVolume) -> (PodContainer<'a>, PodContainer<'a>) {
    let web = pod.container("web").capability("SYS_ADMIN").mount(volume.path(), "/cache").start().unwrap();
    let db = pod.container("db").capability("SYS_ADMIN").mount(volume.path(), "/elsewhere").start().unwrap();
    (web, db)
}

/// `stillframe fscheckpoint` of a container, and what is in the image.
fn save(cri: &Cri, container: &PodContainer<'_>, dir: &Path) -> Result<String, CtrError> {
    let containerd = cri.containerd();
    let path = dir.display().to_string();
    let words = ["fscheckpoint", "--namespace", containerd.namespace(), "--leave-running", "--image-path"];
    containerd.stillframe(&[&words[..], &[&path, container.id()]].concat())?;
    Ok(containerd.stillframe(&["inspect", "--list", &path])?.stdout)
}

/// The ids of the filesystems that `stillframe inspect` shows.
fn filesystems(inspected: &str) -> Vec<&str> {
    inspected.lines().filter_map(|line| line.strip_prefix("filesystem")).map(str::trim).collect()
}

fn restored<'a>(cri: &'a Cri, from: &Path) -> PodSpec<'a> {
    cri.pod("new").annotation(RESTORE_FROM, &from.display().to_string())
}

fn volumes_come_back_in_a_new_pod(version: &ContainerdVersion) {
    let cri = Cri::start(version).unwrap();
    let spec = cri.pod("old");
    let old = volume(&cri, &spec, 64 << 20);
    let pod = spec.run().unwrap();
    let (web, db) = two(&pod, &old);
    let fill = ["probe", "fill", "/cache", "--seed", "21", "--big", "5000000", "--beyond-path-max"];
    assert_eq!(web.exec(&fill).unwrap().code, 0);
    db.shell("head -c 300000 /dev/urandom > /dev/shm/segment; chmod 600 /dev/shm/segment");
    let (cache, shm) = (web.list("/cache"), db.list("/dev/shm"));
    assert_same("the other container's view", &cache, &db.list("/elsewhere"));

    let image = cri.containerd().dir().join("image");
    let inspected = save(&cri, &web, &image).unwrap();
    assert_eq!(filesystems(&inspected), [":/cache", ":/dev/shm"], "{inspected}");
    // Saved as the other container, it is the same.
    let again = save(&cri, &db, &cri.containerd().dir().join("again")).unwrap();
    assert_eq!(filesystems(&again), filesystems(&inspected));
    assert_same("after the checkpoint", &cache, &web.list("/cache"));
    pod.remove().unwrap();
    drop(old);
    cri.containerd().assert_nothing_left();

    // Another pod, with more room: all containers have it, and the room is the new one's.
    let spec = restored(&cri, &image);
    let new = volume(&cri, &spec, 96 << 20);
    let pod = spec.run().unwrap();
    let (web, db) = two(&pod, &new);
    assert_same("/cache restored", &cache, &web.list("/cache"));
    assert_same("/elsewhere restored", &cache, &db.list("/elsewhere"));
    assert_same("/dev/shm restored", &shm, &web.list("/dev/shm"));
    assert_same("/dev/shm restored, in the other container", &shm, &db.list("/dev/shm"));
    assert_eq!(web.shell("df -m /cache | awk 'END {print $2}'"), "96\n");
    // What happens afterwards isn't undone by a container that comes later, or comes back.
    web.shell("rm -r /cache/*; echo newer > /cache/file; echo newer > /dev/shm/segment");
    db.stop(0).unwrap();
    db.remove().unwrap();
    let db = pod.container("db").mount(new.path(), "/elsewhere").start().unwrap();
    assert_eq!(db.shell("cat /elsewhere/file /dev/shm/segment"), "newer\nnewer\n");
    pod.remove().unwrap();
    drop(new);
    cri.containerd().assert_nothing_left();
    cri.stop().unwrap();
}

fn a_volume_on_disk_and_the_hosts_shared_memory_are_left_alone(version: &ContainerdVersion) {
    let cri = Cri::start(version).unwrap();
    let spec = cri.pod("pod").namespaces(|namespaces| namespaces.ipc = 2);
    let disk = MemoryVolume::new(cri.containerd().dir(), &spec.uid(), "disk", None).unwrap();
    let pod = spec.run().unwrap();
    let container = pod.container("only").mount(disk.path(), "/disk").start().unwrap();
    container.shell("echo text > /disk/file; grep -q ' /dev/shm ' /proc/mounts");
    // Nothing of it is ours, and who asks for it is told.
    let error = save(&cri, &container, &cri.containerd().dir().join("image")).unwrap_err();
    assert!(error.stderr.contains("there are: none at all"), "{error}");
    pod.remove().unwrap();
    assert_eq!(disk.names(), ["file"]);
    cri.containerd().assert_nothing_left();
}

fn what_cannot_be_restored_fails_with_the_reason(version: &ContainerdVersion) {
    let cri = Cri::start(version).unwrap();
    let spec = cri.pod("old");
    let old = volume(&cri, &spec, 8 << 20);
    let pod = spec.run().unwrap();
    let (web, _) = two(&pod, &old);
    web.shell("head -c 3000000 /dev/urandom > /cache/file");
    let image = cri.containerd().dir().join("image");
    save(&cri, &web, &image).unwrap();
    pod.remove().unwrap();
    drop(old);

    // An image that isn't there, and one that is damaged, are found when the pod's sandbox is made.
    let damaged = copied(&cri, &image);
    let pages = std::fs::File::options().write(true).open(damaged.join("pages.img")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&pages, b"damaged", 1_000_000).unwrap();
    let missing = cri.containerd().dir().join("no-such-image");
    // Too little room is found when the volume is first mounted.
    for (from, size, word) in
        [(&missing, 8 << 20, "no-such-image"), (&damaged, 8 << 20, "pages.img"), (&image, 1 << 20, "1048576")]
    {
        // Damage to large files would else show behind the start.
        let spec = restored(&cri, from).annotation("dev.stillframe.restore.load", "eager");
        let new = volume(&cri, &spec, size);
        let mut pods = Vec::new();
        let error = match spec.run() {
            Err(error) => error.to_string(),
            Ok(pod) => {
                let started = pod.container("web").mount(new.path(), "/cache").start();
                pods.push(pod);
                started.map(|container| container.id().to_owned()).unwrap_err().to_string()
            }
        };
        assert!(error.contains(word), "no {word:?} in {error}");
        assert_eq!(new.names(), Vec::<&str>::new(), "{word}");
        for pod in pods {
            pod.remove().unwrap();
        }
    }
    // containerd keeps the record of a sandbox that couldn't be started, as kubelet expects; only what was ours counts.
    cri.containerd().assert_nothing_left();
}

/// What a new pod hasn't got, or has in another way, is left out, and the rest comes back: volumes are found by their names,
/// whichever container is the first to have them, else by where a container of the same name has them.
fn a_pod_that_differs_gets_what_fits(version: &ContainerdVersion) {
    let cri = Cri::start(version).unwrap();
    let spec = cri.pod("old");
    let old = volume(&cri, &spec, 8 << 20);
    let pod = spec.run().unwrap();
    let (web, _) = two(&pod, &old);
    web.shell(
        "echo text > /cache/file; chown 7:8 /cache/file; chmod 2775 /cache; echo segment > /dev/shm/segment",
    );
    let image = cri.containerd().dir().join("image");
    save(&cri, &web, &image).unwrap();
    pod.remove().unwrap();
    drop(old);
    let directory = cri.containerd().dir().to_owned();
    let new =
        |spec: &PodSpec<'_>, name, size| MemoryVolume::new(&directory, &spec.uid(), name, size).unwrap();

    // Not the volume, and another container.
    let pod = restored(&cri, &image).run().unwrap();
    let other = pod.container("other").start().unwrap();
    assert_eq!(other.shell("cat /dev/shm/segment; ls /cache 2>&1 || true").lines().next(), Some("segment"));
    pod.remove().unwrap();

    // Another volume, and one of the name that isn't in memory: neither is touched.
    let spec = restored(&cri, &image);
    let (another, disk) = (new(&spec, "another", Some(8 << 20)), new(&spec, "cache", None));
    let pod = spec.run().unwrap();
    let web =
        pod.container("web").mount(another.path(), "/another").mount(disk.path(), "/cache").start().unwrap();
    assert_eq!(web.shell("ls /another /cache; cat /dev/shm/segment"), "/another:\n\n/cache:\nsegment\n");
    pod.remove().unwrap();
    drop((another, disk));

    // One of another name, where the container of this name had it.
    let spec = restored(&cri, &image);
    let renamed = new(&spec, "renamed", Some(8 << 20));
    let pod = spec.run().unwrap();
    let web = pod.container("web").mount(renamed.path(), "/cache").start().unwrap();
    assert_eq!(web.shell("cat /cache/file"), "text\n");
    pod.remove().unwrap();
    drop(renamed);

    // Another owner and mode: the saved ones, as a restored directory has them. Another place, and another container.
    let spec = restored(&cri, &image);
    let cache = new(&spec, "cache", Some(16 << 20));
    std::os::unix::fs::chown(cache.path(), Some(1234), Some(4321)).unwrap();
    let pod = spec.run().unwrap();
    let other = pod.container("other").mount(cache.path(), "/elsewhere").start().unwrap();
    let said =
        other.shell("stat -c '%u %g %a' /elsewhere /elsewhere/file; df -m /elsewhere | awk 'END {print $2}'");
    assert_eq!(said, "0 0 2775\n7 8 644\n16\n");
    pod.remove().unwrap();
    drop(cache);
    cri.containerd().assert_nothing_left();
    cri.stop().unwrap();
}

fn copied(cri: &Cri, image: &Path) -> PathBuf {
    let copy = cri.containerd().dir().join("damaged");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(image).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    copy
}

/// Both containers have the volume: whoever comes second waits, and neither stays frozen.
#[test]
fn two_containers_of_a_pod_are_saved_at_once() {
    let cri = Cri::start(&ContainerdVersion::installed().unwrap()).unwrap();
    let spec = cri.pod("pod");
    let volume = volume(&cri, &spec, 150 << 20);
    let pod = spec.run().unwrap();
    let (web, db) = two(&pod, &volume);
    web.shell("head -c 100000000 /dev/urandom > /cache/file");
    let containerd = cri.containerd();
    let saved = std::thread::scope(|scope| {
        let save = |id: &str, name: &str| {
            let dir = containerd.dir().join(name).display().to_string();
            let namespace = containerd.namespace();
            let words =
                ["fscheckpoint", "--namespace", namespace, "--leave-running", "--image-path", &dir, id];
            containerd.stillframe(&words).map(|_| containerd.stillframe(&["inspect", &dir]).unwrap().stdout)
        };
        let (web, db) = (web.id(), db.id());
        let first = scope.spawn(move || save(web, "first"));
        let second = save(db, "second");
        (first.join().unwrap(), second)
    });
    for inspected in [saved.0.unwrap(), saved.1.unwrap()] {
        assert_eq!(filesystems(&inspected), [":/cache", ":/dev/shm"], "{inspected}");
    }
    db.shell("echo x > /elsewhere/more");
    pod.remove().unwrap();
    drop(volume);
    cri.containerd().assert_nothing_left();
}

/// kubelet gives a container a part of a volume by a bind mount of its own; the whole volume is saved.
#[test]
fn a_part_of_a_volume_stands_for_the_whole_volume() {
    let cri = Cri::start(&ContainerdVersion::installed().unwrap()).unwrap();
    let spec = cri.pod("pod");
    let volume = volume(&cri, &spec, 8 << 20);
    let part = volume.sub_path("part", "web", 0).unwrap();
    let pod = spec.run().unwrap();
    let web = pod.container("web").mount(part.path(), "/part").start().unwrap();
    web.shell("echo inside > /part/file");
    std::fs::write(volume.path().join("outside"), "outside\n").unwrap();
    let inspected = save(&cri, &web, &cri.containerd().dir().join("image")).unwrap();
    assert_eq!(filesystems(&inspected), [":/cache", ":/dev/shm"], "{inspected}");
    assert!(inspected.contains("outside") && inspected.contains("part/file"), "{inspected}");
    pod.remove().unwrap();
    drop(part);
    drop(volume);
    cri.containerd().assert_nothing_left();
}
