//! Mode `full` in a pod: a container's process goes on in another pod, with the volume that it had a file open on and the pod's shared
//! memory that it had mapped.

use stillframe_cri::{Cri, MemoryVolume, PodContainer, Registry, State};
use stillframe_integration::{ContainerdVersion, criu, image, skip};

stillframe_integration::with_every_containerd!(a_pods_process_goes_on_in_another_pod);

const IMAGE: &str = "stillframe.test/full:1";

/// Its token and how far it has counted, when that is beyond a number.
#[track_caller]
fn counted(container: &PodContainer<'_>, beyond: u64) -> (String, u64) {
    for _ in 0..1000 {
        let log = container.shell("tail -n 2 /cache/log | head -n 1");
        let mut words = log.split_whitespace();
        if let (Some(token), Some(count)) = (words.next(), words.next().and_then(|word| word.parse().ok()))
            && count > beyond
        {
            return (token.to_owned(), count);
        }
    }
    panic!("it doesn't count beyond {beyond}: {}", container.shell("tail -n 3 /cache/log"));
}

fn a_pods_process_goes_on_in_another_pod(version: &ContainerdVersion) {
    if criu::or_skip("a_pods_process_goes_on_in_another_pod").is_none() {
        return;
    }
    let cri = Cri::start(version).unwrap();
    let containerd = cri.containerd();
    let mode = "dev.stillframe.checkpoint.mode";
    let spec = cri.pod("old").annotation(mode, "full");
    let volume = MemoryVolume::new(containerd.dir(), &spec.uid(), "cache", Some(16 << 20)).unwrap();
    let pod = spec.run().unwrap();
    let count = ["probe", "count", "/cache/log", "/dev/shm/segment"];
    let web = pod.container("web").command(&count).mount(volume.path(), "/cache").start().unwrap();
    let (token, before) = counted(&web, 20);
    // By kubelet's request, where containerd has it.
    let from = if version.numbers() >= (2, 0) {
        let archive = containerd.dir().join("checkpoint.tar");
        web.checkpoint(&archive).unwrap();
        archive.display().to_string()
    } else {
        containerd.ctr().run(&["containers", "checkpoint", "--task", web.id(), IMAGE]).unwrap();
        IMAGE.to_owned()
    };
    let (_, after) = counted(&web, before + 20);
    pod.remove().unwrap();
    drop(volume);

    let spec = cri.pod("new").annotation(mode, "full").annotation("dev.stillframe.restore-from", &from);
    let volume = MemoryVolume::new(containerd.dir(), &spec.uid(), "cache", Some(16 << 20)).unwrap();
    let pod = spec.run().unwrap();
    let web = pod.container("web").command(&count).mount(volume.path(), "/cache").start().unwrap();
    assert_eq!(counted(&web, after + 20).0, token, "another process");
    assert_eq!(web.status().unwrap().state(), State::ContainerRunning);
    assert!(web.stats().unwrap().memory.is_some());
    // Made again by kubelet it starts anew: the volume has gone on, and the processes of then don't fit it.
    web.stop(0).unwrap();
    assert_eq!(web.await_state(State::ContainerExited).unwrap().exit_code, 137);
    web.remove().unwrap();
    let web = pod.container("web").command(&count).mount(volume.path(), "/cache").start().unwrap();
    assert_ne!(counted(&web, 1).0, token);
    pod.remove().unwrap();
    drop(volume);
    containerd.assert_nothing_left();
    cri.stop().unwrap();
}

/// containerd 2.1 makes a container of an archive that is given as its image, as it does with runc.
#[test]
fn a_process_goes_on_in_a_container_that_is_created_from_an_archive() {
    const TEST: &str = "a_process_goes_on_in_a_container_that_is_created_from_an_archive";
    let Some(version) = ContainerdVersion::or_skip("2", TEST) else { return };
    if criu::or_skip(TEST).is_none() {
        return;
    }
    if version.numbers() != (2, 1) {
        skip::skipped(TEST, &format!("containerd {:?} doesn't do it unless told to", version.numbers()));
        return;
    }
    let cri = Cri::start(&version).unwrap();
    let registry = Registry::start(cri.containerd(), image::NAME).unwrap();
    cri.pull(&registry.name()).unwrap();
    let archive = cri.containerd().dir().join("checkpoint.tar");
    let count = ["probe", "count", "/cache/log", "/dev/shm/segment"];
    let start = |name: &str, image: &str| {
        let spec = cri.pod(name).annotation("dev.stillframe.checkpoint.mode", "full");
        let volume = MemoryVolume::new(cri.containerd().dir(), &spec.uid(), "cache", Some(16 << 20)).unwrap();
        let pod = spec.run().unwrap();
        let web =
            pod.container("web").image(image).command(&count).mount(volume.path(), "/cache").start().unwrap();
        (volume, pod, web)
    };
    let (volume, pod, web) = start("old", &registry.name());
    let (token, before) = counted(&web, 20);
    web.checkpoint(&archive).unwrap();
    let (_, after) = counted(&web, before);
    pod.remove().unwrap();
    drop(volume);
    let (volume, pod, web) = start("new", &archive.display().to_string());
    assert_eq!(counted(&web, after + 20).0, token, "another process");
    web.stop(0).unwrap();
    assert_eq!(web.await_state(State::ContainerExited).unwrap().exit_code, 137);
    pod.remove().unwrap();
    drop(volume);
    cri.containerd().assert_nothing_left();
    cri.stop().unwrap();
}
