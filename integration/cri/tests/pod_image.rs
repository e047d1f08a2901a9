//! One image of a whole pod: each container gets its own filesystems back by its name, and the pod its volumes once, on every
//! containerd.

use std::path::Path;

use stillframe_cri::{Cri, MemoryVolume, Pod, PodContainer, PodSpec, State};
use stillframe_integration::{ContainerdVersion, Listing, assert_same};

stillframe_integration::with_every_containerd!(
    a_pod_of_two_comes_back_from_one_image,
    a_pod_of_three_comes_back_from_one_image_in_containerd,
);

/// A pod's volume in memory, and what each container has for its own instead of a volume on disk.
struct Volumes {
    cache: MemoryVolume,
    own: MemoryVolume,
}

impl Volumes {
    fn new(cri: &Cri, spec: &PodSpec<'_>) -> Self {
        let volume = |name, size| MemoryVolume::new(cri.containerd().dir(), &spec.uid(), name, size).unwrap();
        Self { cache: volume("cache", Some(64 << 20)), own: volume("own", None) }
    }

    fn hint<'a>(&self, spec: PodSpec<'a>) -> PodSpec<'a> {
        let source = self.own.path().display().to_string();
        [("source", source.as_str()), ("medium", "memory"), ("share", "container"), ("options", "size=32m")]
            .into_iter()
            .fold(spec, |spec, (field, value)| {
                spec.annotation(&format!("dev.stillframe.mount.own.{field}"), value)
            })
    }
}

fn run<'a>(cri: &'a Cri, spec: PodSpec<'a>) -> (Volumes, Pod<'a>) {
    let volumes = Volumes::new(cri, &spec);
    let pod = volumes.hint(spec).run().unwrap();
    (volumes, pod)
}

fn start<'a>(pod: &Pod<'a>, volumes: &Volumes, name: &str) -> PodContainer<'a> {
    let container = pod.container(name).capability("SYS_ADMIN");
    container.mount(volumes.cache.path(), "/cache").mount(volumes.own.path(), "/own").start().unwrap()
}

/// Runs to its end before the others, as an init container does.
fn run_first(pod: &Pod<'_>, volumes: &Volumes) {
    let setup = pod.container("setup").command(&["sh", "-c", "test -e /cache/done || touch /cache/done"]);
    let setup = setup.mount(volumes.cache.path(), "/cache").start().unwrap();
    assert_eq!(setup.await_state(State::ContainerExited).unwrap().exit_code, 0);
}

fn fill(containers: &[(&str, PodContainer<'_>)]) -> Vec<(String, &'static str, Listing)> {
    containers[0].1.shell("echo segment > /dev/shm/segment");
    for (number, (name, container)) in containers.iter().enumerate() {
        let seed = format!("{}", 50 + number);
        let fill = ["probe", "fill", "/own", "--seed", &seed, "--big", "3000000"];
        assert_eq!(container.exec(&fill).unwrap().code, 0);
        container.shell(&format!("head -c 3000000 /dev/urandom > /cache/{name}"));
    }
    let list = |path, number: usize| {
        let (name, container): &(&str, PodContainer<'_>) = &containers[number];
        ((*name).to_owned(), path, container.list(path))
    };
    let own = (0..containers.len()).map(|number| list("/own", number));
    own.chain([list("/cache", 0), list("/dev/shm", 0)]).collect()
}

#[track_caller]
fn same(lists: &[(String, &str, Listing)], containers: &[(&str, PodContainer<'_>)]) {
    for (name, path, want) in lists {
        for (other, container) in containers {
            if name == other || *path != "/own" {
                assert_same(&format!("{path} of {name} in {other}"), want, &container.list(path));
            }
        }
    }
}

fn a_pod_of_two_comes_back_from_one_image(version: &ContainerdVersion) {
    let cri = Cri::start(version).unwrap();
    let containerd = cri.containerd();
    let (volumes, pod) = run(&cri, cri.pod("old"));
    run_first(&pod, &volumes);
    let containers = ["web", "db"].map(|name| (name, start(&pod, &volumes, name)));
    let lists = fill(&containers);
    let image = containerd.dir().join("image").display().to_string();
    let save = ["fscheckpoint", "--pod", "--namespace", "k8s.io", "--leave-running", "--image-path"];
    containerd.stillframe(&[&save[..], &[&image, pod.id()]].concat()).unwrap();
    same(&lists, &containers);
    let inspected = containerd.stillframe(&["inspect", &image]).unwrap().stdout;
    let line = |start: &str| inspected.lines().filter(|line| line.starts_with(start)).collect::<Vec<_>>();
    assert_eq!(line("filesystem ").len(), 4, "{inspected}");
    let pod_line = line("pod ");
    assert!(pod_line[0].contains("web") && pod_line[0].ends_with(", and had run setup"), "{pod_line:?}");
    pod.remove().unwrap();
    drop(volumes);
    containerd.assert_nothing_left();

    let restored = |name| cri.pod(name).annotation("dev.stillframe.restore-from", &image);
    // The pod of somebody else: its first container isn't the image's.
    let (volumes, pod) = run(&cri, restored("other"));
    let error = pod.container("other").mount(volumes.cache.path(), "/cache").start();
    let error = error.map(|container| container.id().to_owned()).unwrap_err().to_string();
    assert!(error.contains("no container \"other\""), "{error}");
    assert_eq!(volumes.cache.names(), Vec::<&str>::new());
    pod.remove().unwrap();
    drop(volumes);
    containerd.assert_nothing_left();

    let (volumes, pod) = run(&cri, restored("new"));
    run_first(&pod, &volumes);
    let containers = ["web", "db"].map(|name| (name, start(&pod, &volumes, name)));
    same(&lists, &containers);
    // Who comes to look at it isn't the image's either, but all that are have come.
    let debugger = pod.container("debugger").mount(volumes.cache.path(), "/cache").start().unwrap();
    assert_eq!(debugger.shell("cat /dev/shm/segment; ls /cache | wc -l"), "segment\n3\n");
    // A container that kubelet makes again after a crash has its own once more.
    containers[1].1.shell("rm -r /own/*; rm /cache/web");
    let [(_, web), (_, db)] = containers;
    db.stop(0).unwrap();
    db.remove().unwrap();
    let again = [("db", start(&pod, &volumes, "db"))];
    let own: Vec<_> = lists.iter().filter(|(_, path, _)| *path == "/own").cloned().collect();
    same(&own, &again);
    assert_eq!(web.shell("ls /cache"), "db\ndone\n");
    pod.remove().unwrap();
    drop(volumes);
    containerd.assert_nothing_left();
    cri.stop().unwrap();
}

/// `ctr` asked for a checkpoint of the pod's own container makes the pod's image, which can go where images go.
fn a_pod_of_three_comes_back_from_one_image_in_containerd(version: &ContainerdVersion) {
    const IMAGE: &str = "stillframe.test/pod:1";
    let cri = Cri::start(version).unwrap();
    let containerd = cri.containerd();
    let names = ["web", "db", "log"];
    let (volumes, pod) = run(&cri, cri.pod("old"));
    let containers = names.map(|name| (name, start(&pod, &volumes, name)));
    let lists = fill(&containers);
    containerd.ctr().run(&["containers", "checkpoint", "--task", pod.id(), IMAGE]).unwrap();
    same(&lists, &containers);
    pod.remove().unwrap();
    drop(volumes);

    let (volumes, pod) = run(&cri, cri.pod("new").annotation("dev.stillframe.restore-from", IMAGE));
    // It is unpacked for the first that needs it, and stays for the others.
    let unpacked = Path::new("/var/lib/stillframe/filestore/k8s.io").join(pod.id()).join("images");
    let images =
        || std::fs::read_dir(&unpacked).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let there = images();
    assert_eq!(there.len(), 1, "{there:?}");
    std::fs::write(there[0].join("mark"), "").unwrap();
    let containers = names.map(|name| (name, start(&pod, &volumes, name)));
    same(&lists, &containers);
    assert_eq!(images(), there);
    assert!(there[0].join("mark").exists());
    pod.remove().unwrap();
    drop(volumes);
    containerd.assert_nothing_left();
    assert_nothing_unpacked(containerd.dir());
    cri.stop().unwrap();
}

#[track_caller]
fn assert_nothing_unpacked(dir: &Path) {
    let names = std::fs::read_dir(dir.join("tmp")).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = names.filter(|name| name.to_string_lossy().starts_with("stillframe")).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}
