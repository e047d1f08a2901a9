//! Checkpoints through containerd of containers whose filesystems are copied before they are paused.

use std::fs;

use stillframe_integration::{Container, Containerd, compare};

const CHECKPOINT: &str = "localhost/precopied:1";

#[test]
fn what_is_copied_before_the_pause_is_not_copied_in_it() {
    let containerd = Containerd::start().unwrap();
    let pages = containerd.dir().join("pages");
    let container = containerd
        .container("c")
        .tmpfs("/scratch", "size=256m")
        .annotation("dev.stillframe.image-dir", &pages.to_string_lossy())
        .annotation("dev.stillframe.precopy", "on")
        .start()
        .unwrap();
    container.exec(&["probe", "fill", "/scratch", "--seed", "5", "--big", "30000000"]).unwrap();
    let kept = || fs::read_dir(&pages).map_or(0, |entries| entries.count());

    // A pause without a checkpoint costs a copy, of which nothing is left.
    containerd.ctr().run(&["tasks", "pause", container.id()]).unwrap();
    assert_eq!(kept(), 1, "it is copied while the container runs");
    containerd.ctr().run(&["tasks", "resume", container.id()]).unwrap();
    assert_eq!(kept(), 0);

    let before = container.list("/scratch").unwrap();
    containerd.checkpoint(container.id(), CHECKPOINT).unwrap();
    let saved = containerd.last_checkpoint(container.id()).unwrap();
    assert!(saved.rounds >= 1 && saved.copied_live_bytes >= 30_000_000, "{saved:?}");
    assert!(saved.copied_frozen_bytes < 1_000_000, "{saved:?}");
    assert_eq!(kept(), 1, "the image's own");
    assert_eq!(container.status().unwrap().as_deref(), Some("RUNNING"));
    container.remove().unwrap();

    let restored = Container::restore(&containerd, "restored", CHECKPOINT).unwrap();
    let differences = compare(&before, &restored.list("/scratch").unwrap());
    assert!(differences.is_empty(), "{differences:?}");
    restored.remove().unwrap();
}

#[test]
fn a_precopy_that_has_nowhere_to_go_is_refused() {
    let containerd = Containerd::start().unwrap();
    for (asked, image_dir) in [("on", None), ("maybe", Some("/var/tmp/pages"))] {
        let mut spec = containerd.container("c").annotation("dev.stillframe.precopy", asked);
        if let Some(directory) = image_dir {
            spec = spec.annotation("dev.stillframe.image-dir", directory);
        }
        let error = spec.start().map(|_| ()).unwrap_err().to_string();
        assert!(
            error.contains("dev.stillframe.precopy") && error.contains("dev.stillframe.image-dir"),
            "{error}"
        );
    }
}
