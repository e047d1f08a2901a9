//! Mode `full` in a pod: a container's process goes on in another pod, with the volume that it had a file open on and the pod's shared
//! memory that it had mapped.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use prost_types::Any;
use stillframe_cri::containerd::services::tasks::v1 as tasks;
use stillframe_cri::tasks::Outcome;
use stillframe_cri::{Cri, MemoryVolume, PodContainer, PodContainerSpec, State, Tasks, registry};
use stillframe_integration::{Container, Containerd, ContainerdVersion, criu};

stillframe_integration::with_every_containerd!(
    a_pods_process_goes_on_in_another_pod,
    a_process_with_a_terminal_goes_on_with_another,
    established_connections_are_saved_if_the_options_say_so,
);

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
    goes_on_in_another_pod("a_pods_process_goes_on_in_another_pod", version, |container| container, None);
}

/// Its terminal is another one, which containerd's log is fed from.
fn a_process_with_a_terminal_goes_on_with_another(version: &ContainerdVersion) {
    let test = "a_process_with_a_terminal_goes_on_with_another";
    goes_on_in_another_pod(test, version, |container| container.terminal(), None);
    goes_on_in_another_pod(test, version, |container| container.terminal(), Some(&[0x20, 1, 0x28, 1]));
}

fn goes_on_in_another_pod(
    test: &str,
    version: &ContainerdVersion,
    with: impl for<'p, 'a> Fn(PodContainerSpec<'p, 'a>) -> PodContainerSpec<'p, 'a>,
    options: Option<&[u8]>,
) {
    if criu::or_skip(test).is_none() {
        return;
    }
    let cri = Cri::start(version).unwrap();
    let containerd = cri.containerd();
    let mode = "dev.stillframe.checkpoint.mode";
    let spec = cri.pod("old").annotation(mode, "full");
    let volume = MemoryVolume::new(containerd.dir(), &spec.uid(), "cache", Some(16 << 20)).unwrap();
    let pod = spec.run().unwrap();
    let count = ["probe", "count", "/cache/log", "/dev/shm/segment", "--aloud"];
    let web = with(pod.container("web")).command(&count).mount(volume.path(), "/cache").start().unwrap();
    let (token, before) = counted(&web, 20);
    // By kubelet's request, where containerd has it.
    let from = if let Some(options) = options {
        unpack(containerd, &save(&Tasks::new(containerd).keeping().unwrap(), web.id(), options).unwrap())
            .display()
            .to_string()
    } else if version.numbers() >= (2, 0) {
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
    let web = with(pod.container("web")).command(&count).mount(volume.path(), "/cache").start().unwrap();
    let (again, count_now) = counted(&web, after + 20);
    assert_eq!(again, token, "another process");
    // What it says is heard.
    let said = format!("{token} {count_now} ");
    let end = Instant::now() + Duration::from_secs(20);
    while !web.log().lines().any(|line| line.contains(&said)) {
        assert!(Instant::now() < end, "no {said:?} in {}", web.log());
        std::thread::yield_now();
    }
    assert_eq!(web.status().unwrap().state(), State::ContainerRunning);
    assert!(web.stats().unwrap().memory.is_some());
    // Made again by kubelet it starts anew: the volume has gone on, and the processes of then don't fit it.
    web.stop(0).unwrap();
    assert_eq!(web.await_state(State::ContainerExited).unwrap().exit_code, 137);
    web.remove().unwrap();
    let web = pod.container("web").command(&count).mount(volume.path(), "/cache").start().unwrap();
    // The last line may still be the old process's.
    let end = Instant::now() + Duration::from_secs(20);
    while counted(&web, 0).0 == token {
        assert!(Instant::now() < end, "the old process has come back");
    }
    pod.remove().unwrap();
    drop(volume);
    containerd.assert_nothing_left();
    cri.stop().unwrap();
}

/// What it has said to itself lately: its token and count.
#[track_caller]
fn conversed(container: &Container<'_>, beyond: u64) -> (String, u64) {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let line = container.shell("tail -n 2 /scratch/log | head -n 1").unwrap().stdout;
        let mut words = line.split_whitespace();
        if let (Some(token), Some(Ok(count))) = (words.next(), words.next().map(str::parse::<u64>))
            && count > beyond
        {
            return (token.to_owned(), count);
        }
        assert!(Instant::now() < end, "it doesn't talk any more: {line}, not beyond {beyond}");
    }
}

/// Checkpoints a task with `containerd.runc.v1.CheckpointOptions`, of these bytes: `open_tcp` is field 2, `terminal` 4, `file_locks` 5.
/// Gives the digest of what the shim wrote.
fn save(client: &Tasks<'_>, id: &str, options: &[u8]) -> Result<String, String> {
    let options =
        Any { type_url: "containerd.runc.v1.CheckpointOptions".to_owned(), value: options.to_vec() };
    let request = tasks::CheckpointTaskRequest {
        container_id: id.to_owned(),
        options: Some(options),
        ..Default::default()
    };
    let call = |mut client: tasks::tasks_client::TasksClient<_>, request| async move {
        client.checkpoint(request).await
    };
    match client.call(request, call, |answer: tasks::CheckpointTaskResponse| {
        answer.descriptors.into_iter().next().unwrap_or_default().digest
    }) {
        Outcome::Done(digest) => Ok(digest),
        refused @ Outcome::Refused(..) => Err(refused.to_string()),
    }
}

/// Unpacks it to a directory.
fn unpack(containerd: &Containerd, digest: &str) -> PathBuf {
    let blobs = containerd.dir().join("root/io.containerd.content.v1.content/blobs");
    let image = containerd.dir().join("image");
    std::fs::create_dir(&image).unwrap();
    let blob = std::fs::File::open(blobs.join(digest.replace(':', "/"))).unwrap();
    tar::Archive::new(blob).unpack(&image).unwrap();
    image
}

/// As runc's shim does it: by `containerd.runc.v1.CheckpointOptions`, which only a client of the task service can give.
fn established_connections_are_saved_if_the_options_say_so(version: &ContainerdVersion) {
    const TEST: &str = "established_connections_are_saved_if_the_options_say_so";
    if criu::or_skip(TEST).is_none() {
        return;
    }
    let containerd = Containerd::start_version(version).unwrap();
    let talking = |name: &str| {
        // Of a network namespace that runc makes it has CRIU save nothing, so its loopback device isn't up in time.
        let spec = containerd.container(name).tmpfs("/scratch", "size=16m").option("--net-host");
        let spec = spec.annotation("dev.stillframe.checkpoint.mode", "full");
        spec.annotation("dev.stillframe.container-name", "work").arguments(&[
            "probe",
            "converse",
            "/scratch/log",
        ])
    };
    let old = talking("old").start().unwrap();
    conversed(&old, 5);
    let client = Tasks::new(&containerd).keeping().unwrap();
    let error = save(&client, old.id(), &[0x28, 1]).unwrap_err();
    assert!(error.contains("CRIU: ") && error.contains("--tcp-established"), "{error}");
    let (token, before) = conversed(&old, 5);
    let digest = save(&client, old.id(), &[0x10, 1, 0x28, 1]).unwrap();
    let (_, after) = conversed(&old, before + 5);
    old.remove().unwrap();

    let image = unpack(&containerd, &digest);
    let new = talking("new").annotation("dev.stillframe.restore-from", &image.display().to_string());
    let new = new.start().unwrap();
    assert_eq!(conversed(&new, after + 20).0, token, "another process");
    new.remove().unwrap();
    containerd.assert_nothing_left();
    containerd.stop().unwrap();
}

/// containerd 2.1 makes a container of an archive that is given as its image, as it does with runc.
#[test]
fn a_process_goes_on_in_a_container_that_is_created_from_an_archive() {
    const TEST: &str = "a_process_goes_on_in_a_container_that_is_created_from_an_archive";
    if criu::or_skip(TEST).is_none() {
        return;
    }
    let Some((cri, registry)) = registry::with_archives(TEST) else { return };
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
