//! A pod is restored from an image that containerd has: one that `ctr` made, and one that was made of an archive.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use stillframe_cri::{Cri, MemoryVolume, PodContainer};
use stillframe_integration::{ContainerdVersion, assert_same, image};

stillframe_integration::with_every_containerd!(
    a_pod_comes_back_from_an_image_in_containerd,
    an_image_without_a_checkpoint_is_refused_by_name,
);

const RESTORE_FROM: &str = "dev.stillframe.restore-from";

#[track_caller]
fn nothing_left(cri: &Cri) {
    cri.containerd().assert_nothing_left();
    let unpacked = fs::read_dir(cri.containerd().dir().join("tmp")).unwrap();
    let left: Vec<_> = unpacked
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("stillframe"))
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

/// An archive as a checkpoint request writes it: by one, from containerd 2.0 on, else laid out in the same way.
fn archive(cri: &Cri, version: &ContainerdVersion, web: &PodContainer<'_>) {
    let dir = cri.containerd().dir();
    let archive = dir.join("checkpoint.tar");
    if version.numbers() >= (2, 0) {
        return web.checkpoint(&archive).unwrap();
    }
    let image = dir.join("saved/checkpoint");
    fs::create_dir(dir.join("saved")).unwrap();
    let words = ["fscheckpoint", "--namespace", "k8s.io", "--leave-running", "--image-path"];
    let path = image.display().to_string();
    cri.containerd().stillframe(&[&words[..], &[&path, web.id()]].concat()).unwrap();
    let mut tar = Command::new("tar");
    tar.arg("-cf").arg(&archive).arg("-C").arg(dir.join("saved")).arg("checkpoint");
    assert!(tar.status().unwrap().success());
}

fn a_pod_comes_back_from_an_image_in_containerd(version: &ContainerdVersion) {
    let cri = Cri::start(version).unwrap();
    let containerd = cri.containerd();
    let ctr = |words: &[&str]| containerd.ctr().run(words).unwrap();
    let spec = cri.pod("old");
    let old = MemoryVolume::new(containerd.dir(), &spec.uid(), "cache", Some(64 << 20)).unwrap();
    let pod = spec.run().unwrap();
    let web = pod.container("web").capability("SYS_ADMIN").mount(old.path(), "/cache").start().unwrap();
    web.exec(&["probe", "fill", "/cache", "--seed", "41", "--big", "3000000"]).unwrap();
    web.shell("echo segment > /dev/shm/segment");
    let (cache, shm) = (web.list("/cache"), web.list("/dev/shm"));
    archive(&cri, version, &web);
    ctr(&["containers", "checkpoint", "--task", "--image", web.id(), "stillframe.test/by-ctr:1"]);
    pod.remove().unwrap();
    drop(old);

    let dir = containerd.dir();
    let gzip = Command::new("gzip").arg("-k").arg(dir.join("checkpoint.tar")).status();
    assert!(gzip.unwrap().success());
    for (name, layer) in
        [("stillframe.test/layer:1", "checkpoint.tar"), ("stillframe.test/gzip:1", "checkpoint.tar.gz")]
    {
        let path = dir.join("image-of-archive.tar");
        image::of_layer(&path, name, &dir.join(layer)).unwrap();
        ctr(&["images", "import", "--no-unpack", &path.display().to_string()]);
    }
    for name in ["stillframe.test/by-ctr:1", "stillframe.test/layer:1", "stillframe.test/gzip:1"] {
        let spec = cri.pod("new").annotation(RESTORE_FROM, name);
        let new = MemoryVolume::new(dir, &spec.uid(), "cache", Some(64 << 20)).unwrap();
        let pod = spec.run().unwrap();
        let web = pod.container("web").capability("SYS_ADMIN").mount(new.path(), "/cache").start().unwrap();
        assert_same(&format!("/cache from {name}"), &cache, &web.list("/cache"));
        assert_same(&format!("/dev/shm from {name}"), &shm, &web.list("/dev/shm"));
        pod.remove().unwrap();
        drop(new);
        nothing_left(&cri);
    }
    cri.stop().unwrap();
}

fn an_image_without_a_checkpoint_is_refused_by_name(version: &ContainerdVersion) {
    let cri = Cri::start(version).unwrap();
    for (name, words) in [
        (
            "stillframe.test/none:1",
            "containerd has no image \"stillframe.test/none:1\" in its namespace k8s.io",
        ),
        (image::NAME, "holds no checkpoint of Stillframe's: there is no manifest.json in it"),
    ] {
        let spec = cri.pod("new").annotation(RESTORE_FROM, name);
        let error = spec.run().map(|pod| pod.id().to_owned()).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(RESTORE_FROM), "no {words:?} in {error}");
    }
    nothing_left(&cri);
    cri.stop().unwrap();
}

/// Who fetches the image for it ends with the shim, and what it has unpacked until then is removed.
#[test]
fn a_shim_that_is_killed_while_it_fetches_an_image_leaves_nothing() {
    let cri = Cri::start(&ContainerdVersion::installed().unwrap()).unwrap();
    let containerd = cri.containerd();
    let spec = cri.pod("old");
    let volume = MemoryVolume::new(containerd.dir(), &spec.uid(), "cache", Some(512 << 20)).unwrap();
    let pod = spec.run().unwrap();
    let web = pod.container("web").mount(volume.path(), "/cache").start().unwrap();
    web.shell("head -c 400000000 /dev/urandom > /cache/file");
    let name = "stillframe.test/large:1";
    containerd.ctr().run(&["containers", "checkpoint", "--task", web.id(), name]).unwrap();
    pod.remove().unwrap();
    drop(volume);
    containerd.assert_nothing_left();

    let all = Path::new("/var/lib/stillframe/filestore/k8s.io");
    let before = directories(all);
    let spec = cri.pod("new").annotation(RESTORE_FROM, name);
    let unpacked = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let deadline = Instant::now() + Duration::from_secs(60);
            loop {
                assert!(Instant::now() < deadline, "nothing is fetched");
                let new = directories(all).into_iter().filter(|path| !before.contains(path));
                let mut new = new.filter(|path| directories(&path.join("images")).len() == 1);
                let (Some(path), [shim, ..]) = (new.next(), &*containerd.shims()) else { continue };
                kill(Pid::from_raw(shim.pid), Signal::SIGKILL).unwrap();
                return path;
            }
        });
        let error = spec.run().map(|pod| pod.id().to_owned()).unwrap_err();
        println!("{error}");
        watch.join().unwrap()
    });
    let deadline = Instant::now() + Duration::from_secs(20);
    while unpacked.exists() {
        assert!(Instant::now() < deadline, "{unpacked:?} has {:?}", directories(&unpacked.join("images")));
        std::thread::yield_now();
    }
    nothing_left(&cri);
    cri.stop().unwrap();
}

fn directories(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}
