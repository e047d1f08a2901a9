//! Images of whole pods: what all containers have, of one instant, and whose it is afterwards.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use stillframe_runtime::cli::chain;
use stillframe_runtime::image::Image;
use stillframe_runtime::sandbox::{CheckpointRequest, CheckpointResult};

#[path = "../../tmpfs/tests/support/filesystem.rs"]
mod filesystem;

#[path = "support/pod.rs"]
mod pod;

use filesystem::noise;
use pod::Pod;

/// Members of a config.json: a container of this name, with a tmpfs of its own at /own and the pod's volume at `volume`.
fn container(name: &str, volume: &str) -> String {
    let name = match name {
        "" => String::new(),
        name => format!(
            r#""io.kubernetes.cri.container-name":"{name}","io.kubernetes.cri.container-type":"container","#
        ),
    };
    format!(
        r#""annotations":{{{name}
            "dev.stillframe.mount.vol.source":"/vol","dev.stillframe.mount.vol.medium":"memory",
            "dev.stillframe.mount.vol.share":"pod","dev.stillframe.mount.vol.options":"size=64m"}},
        "mounts":[{{"destination":"/own","type":"tmpfs","source":"own","options":["size=256m"]}},
            {{"destination":"{volume}","type":"bind","source":"/vol","options":["rbind"]}}]"#
    )
}

/// The pod's own container; containerd 1.6 gives it a tmpfs that it covers with the pod's shared memory.
const SANDBOX: &str = r#""annotations":{"io.kubernetes.cri.container-type":"sandbox"},
    "mounts":[{"destination":"/dev/shm","type":"tmpfs","source":"shm"}]"#;

fn save(pod: &Pod, id: &str, image: &Path) -> Result<CheckpointResult, String> {
    let request = CheckpointRequest { pod: true, ..CheckpointRequest::new(id, image) };
    pod.sandbox.checkpoint(&request).map_err(|error| chain(&error))
}

fn ids(result: &CheckpointResult) -> Vec<String> {
    result.filesystems.iter().map(ToString::to_string).collect()
}

/// A pod of two, one that has ended, and its own; each filesystem has a file with its name.
fn three() -> Pod {
    let mut pod = Pod::new();
    pod.running("s", SANDBOX);
    pod.prepare("0", &container("setup", "/v"), None).unwrap();
    pod.remove("0");
    pod.running("a", &container("web", "/v"));
    pod.running("b", &container("db", "/elsewhere"));
    for (name, text) in [("a.0", "web"), ("b.0", "db"), ("pod-vol", "shared")] {
        fs::write(pod.mount(name).join("file"), text).unwrap();
    }
    pod
}

#[test]
fn an_image_of_a_pod_gives_each_container_its_own_and_the_pod_its_volumes_once() {
    let dir = tempfile::tempdir().unwrap();
    let pod = three();
    for (number, id) in ["s", "a", "b"].into_iter().enumerate() {
        let image = dir.path().join(number.to_string());
        assert_eq!(ids(&save(&pod, id, &image).unwrap()), ["web:/own", ":/vol", "db:/own"], "asked by {id}");
    }
    let image = dir.path().join("0");
    let manifest = Image::open(&image).unwrap().manifest;
    let names: Vec<&str> = manifest.containers.iter().map(|container| container.name.as_str()).collect();
    assert_eq!((names, manifest.pod.unwrap().ended), (vec!["web", "db"], vec!["setup".to_owned()]));
    drop(pod);

    let mut new = Pod::new();
    let empty = new.prepare("s", SANDBOX, Some(&image)).unwrap().restored.unwrap();
    assert_eq!((empty.restored.len(), empty.unused.len()), (0, 0));
    // Also what had ended runs again, and in another order.
    for (id, name, volume, restored, kept) in [
        ("n0", "setup", "/v", &[":/vol"][..], &[][..]),
        ("nb", "db", "/moved", &["db:/own"], &[":/vol"]),
        ("na", "web", "/v", &["web:/own"], &[":/vol"]),
    ] {
        let result = new.prepare(id, &container(name, volume), Some(&image)).unwrap().restored.unwrap();
        let saved = |pairs: &[(stillframe_tmpfs::ResourceId, stillframe_tmpfs::ResourceId)]| {
            pairs.iter().map(|(saved, _)| saved.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(
            (saved(&result.restored), saved(&result.kept)),
            (
                restored.iter().map(ToString::to_string).collect(),
                kept.iter().map(ToString::to_string).collect()
            ),
            "{name}"
        );
        assert_eq!(result.unused, [], "{name}");
    }
    for (name, text) in [("na.0", "web"), ("nb.0", "db"), ("pod-vol", "shared")] {
        assert_eq!(fs::read_to_string(new.mount(name).join("file")).unwrap(), text, "{name}");
    }
    assert!(!new.mount("n0.0").join("file").exists());
}

#[test]
fn a_container_that_the_image_does_not_know_is_refused_until_all_have_come() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    save(&three(), "s", &image).unwrap();
    let mut new = Pod::new();
    let refused = |new: &mut Pod, name: &str, missing: &str| {
        let error = new.prepare("x", &container(name, "/v"), Some(&image)).map(|_| ()).unwrap_err();
        assert!(error.contains(&format!("{missing} isn't here yet")), "{error}");
        // Nothing of it is left, and nothing was restored for it.
        assert!(!new.mount("x.0").exists());
        error
    };
    let error = refused(&mut new, "other", "web, db");
    assert!(error.contains("no container \"other\""), "{error}");
    assert!(!new.state().exists());
    new.prepare("a", &container("web", "/v"), Some(&image)).unwrap();
    refused(&mut new, "other", "db");
    refused(&mut new, "", "db");
    new.prepare("b", &container("db", "/v"), Some(&image)).unwrap();
    // Nobody's place can be taken any more.
    let result = new.prepare("d", &container("debugger", "/v"), Some(&image)).unwrap().restored.unwrap();
    assert_eq!((result.restored.len(), result.kept.len(), result.empty.len()), (0, 1, 1));
    // Made again it is the one that it was.
    new.remove("a");
    let result = new.prepare("a2", &container("web", "/v"), Some(&image)).unwrap().restored.unwrap();
    assert_eq!((result.restored.len(), result.kept.len()), (1, 1));
}

#[test]
fn containers_of_a_pod_need_names_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let mut pod = Pod::new();
    pod.running("a", &container("web", "/v"));
    pod.running("b", &container("", "/v"));
    let error = save(&pod, "a", &image).unwrap_err();
    assert!(
        error.contains("container b of the pod") && error.contains("dev.stillframe.container-name"),
        "{error}"
    );
    assert!(!image.exists());
    pod.remove("b");
    pod.running("c", &container("web", "/v"));
    let error = save(&pod, "a", &image).unwrap_err();
    assert!(error.contains("two containers of the pod are called \"web\""), "{error}");
    pod.remove("c");
    assert_eq!(ids(&save(&pod, "a", &image).unwrap()), ["web:/own", ":/vol"]);
    let error = save(&pod, "unknown", &dir.path().join("other")).unwrap_err();
    assert!(error.contains("unknown is unknown"), "{error}");
}

/// A process of one container writes to both containers' filesystems in turn: in the image they are at most one step apart.
#[test]
fn a_pod_is_saved_at_one_instant() {
    let dir = tempfile::tempdir().unwrap();
    let mut pod = Pod::new();
    pod.running("a", &container("web", "/v"));
    pod.prepare("b", &container("db", "/v"), None).unwrap();
    // Saved in this order, with some time between the first and the last.
    let (first, last) = (pod.mount("a.0"), pod.mount("b.0"));
    fs::write(first.join("n"), "00000000").unwrap();
    fs::write(pod.mount("pod-vol").join("large"), noise(40 << 20, 1)).unwrap();
    fs::write(last.join("n"), "00000000").unwrap();
    let script = r#"while :; do i=$((i+1)); printf %08d $i 1<>"$0/n"; printf %08d $i 1<>"$1/n"; done"#;
    pod.start("b", Command::new("sh").args(["-c", script]).args([&first, &last]));
    let count = |mount: &Path| fs::read_to_string(mount.join("n")).unwrap().parse::<u64>().unwrap();
    let runs_on = || {
        let (now, deadline) = (count(&last), Instant::now() + Duration::from_secs(20));
        while count(&last) == now {
            assert!(Instant::now() < deadline, "it doesn't run");
            std::thread::yield_now();
        }
    };
    for (number, precopy) in [true, false, true, false].into_iter().enumerate() {
        runs_on();
        let image = dir.path().join(number.to_string());
        let request = CheckpointRequest { pod: true, precopy, ..CheckpointRequest::new("a", &image) };
        pod.sandbox.checkpoint(&request).unwrap();
        let mut new = Pod::new();
        for (id, name) in [("a", "web"), ("b", "db")] {
            new.prepare(id, &container(name, "/v"), Some(&image)).unwrap();
        }
        let (first, last) = (count(&new.mount("a.0")), count(&new.mount("b.0")));
        assert!(first == last || first == last + 1, "{first} and {last}, precopy {precopy}");
    }
    // And all of them are killed.
    let request =
        CheckpointRequest { pod: true, kill: true, ..CheckpointRequest::new("b", dir.path().join("end")) };
    pod.sandbox.checkpoint(&request).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    for (child, _) in &mut pod.processes {
        while child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "one lives");
            std::thread::yield_now();
        }
    }
}
