//! Bad input, on the ways it really comes in: an error names the thing, the running container is untouched,
//! and nothing is left that could be taken for a checkpoint.

use std::fs;
use std::path::Path;

use nix::mount::{MsFlags, mount, umount};
use stillframe_integration::alter::{self, Alterations};
use stillframe_integration::{Container, Containerd, CtrError, Listing, RUNC, compare};

const GOOD: &str = "stillframe.test/checkpoint:good";
const BAD: &str = "stillframe.test/checkpoint:bad";
const FILES: [&str; 4] = ["manifest.json", "tree.tar", "pages.meta", "pages.img"];

fn filled<'a>(containerd: &'a Containerd, name: &str) -> (Container<'a>, Listing) {
    // Damage to large files would else show behind the start only.
    let container = containerd.container(name).tmpfs("/scratch", "size=64m");
    let container = container.annotation("dev.stillframe.restore.load", "eager").start().unwrap();
    let line =
        "head -c 8000000 /dev/urandom > /scratch/data; mkdir /scratch/d; echo small > /scratch/d/small";
    container.shell(line).unwrap();
    let listing = container.list("/scratch").unwrap();
    (container, listing)
}

fn save(containerd: &Containerd, dir: &Path, more: &[&str], id: &str) -> Result<(), CtrError> {
    let dir = dir.to_string_lossy();
    let words =
        ["fscheckpoint", "--namespace", containerd.namespace(), "--image-path", &dir, "--leave-running"];
    containerd.stillframe(&[&words[..], more, &[id]].concat()).map(|_| ())
}

/// Runs, isn't frozen, has what it had.
#[track_caller]
fn untouched(container: &Container<'_>, before: &Listing) {
    assert_eq!(container.status().unwrap().as_deref(), Some("RUNNING"));
    assert_eq!(compare(before, &container.list("/scratch").unwrap()), []);
}

#[track_caller]
fn names(error: &CtrError, words: &[&str]) {
    for word in words {
        assert!(error.stderr.contains(word), "no {word:?} in: {error}");
    }
    assert!(!error.stderr.contains("panicked"), "{error}");
}

#[test]
fn where_the_image_can_not_go() {
    let containerd = Containerd::start().unwrap();
    let (container, before) = filled(&containerd, "c");
    let dir = |name: &str| containerd.dir().join(name);

    let full = dir("not-empty");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("something"), "precious").unwrap();
    let error = save(&containerd, &full, &[], container.id()).unwrap_err();
    names(&error, &[&full.to_string_lossy(), "empty", "something"]);
    assert_eq!(fs::read_to_string(full.join("something")).unwrap(), "precious");
    assert_eq!(fs::read_dir(&full).unwrap().count(), 1);
    untouched(&container, &before);

    let file = dir("a-file");
    fs::write(&file, "precious").unwrap();
    let error = save(&containerd, &file, &[], container.id()).unwrap_err();
    names(&error, &[&file.to_string_lossy()]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");

    let read_only = dir("read-only");
    fs::create_dir(&read_only).unwrap();
    let none = None::<&str>;
    mount(Some("tmpfs"), &read_only, Some("tmpfs"), MsFlags::MS_RDONLY, none).unwrap();
    for target in [read_only.clone(), read_only.join("below")] {
        let error = save(&containerd, &target, &[], container.id()).unwrap_err();
        names(&error, &[&target.to_string_lossy(), "Read-only"]);
        untouched(&container, &before);
    }

    let small = dir("small");
    fs::create_dir(&small).unwrap();
    mount(Some("tmpfs"), &small, Some("tmpfs"), MsFlags::empty(), Some("size=2m")).unwrap();
    let target = small.join("image");
    let error = save(&containerd, &target, &[], container.id()).unwrap_err();
    names(&error, &[&target.to_string_lossy(), "No space left"]);
    assert!(!target.join("manifest.json").exists());
    let error = containerd.stillframe(&["inspect", &target.to_string_lossy()]).unwrap_err();
    names(&error, &[&target.to_string_lossy()]);
    untouched(&container, &before);

    umount(&read_only).unwrap();
    umount(&small).unwrap();
    // After all that it still works.
    save(&containerd, &dir("good/deep"), &[], container.id()).unwrap();
    containerd.stillframe(&["inspect", &dir("good/deep").to_string_lossy()]).unwrap();
    untouched(&container, &before);
    container.remove().unwrap();
    containerd.assert_nothing_left();
}

/// containerd's own disk: where the shim writes for it, and where it stores that.
#[test]
fn where_containerds_disk_is_full() {
    let containerd = Containerd::start().unwrap();
    let (container, before) = filled(&containerd, "c");
    for full in ["tmp", "root/io.containerd.content.v1.content/ingest"] {
        let full = containerd.dir().join(full);
        fs::create_dir_all(&full).unwrap();
        mount(Some("tmpfs"), &full, Some("tmpfs"), MsFlags::empty(), Some("size=2m")).unwrap();
        let error = containerd.checkpoint(container.id(), GOOD).unwrap_err();
        assert!(error.stderr.to_lowercase().contains("no space left"), "{error}");
        untouched(&container, &before);
        let left: Vec<_> = fs::read_dir(&full).unwrap().map(|entry| entry.unwrap().path()).collect();
        let image =
            left.iter().find(|path| path.join("manifest.json").exists() || path.join("pages.img").exists());
        assert_eq!(image, None);
        umount(&full).unwrap();
    }
    containerd.checkpoint(container.id(), BAD).unwrap();
    container.remove().unwrap();
    let container = Container::restore(&containerd, "r", BAD).unwrap();
    assert_eq!(compare(&before, &container.list("/scratch").unwrap()), []);
    container.remove().unwrap();
    containerd.assert_nothing_left();
}

#[test]
fn what_can_not_be_saved() {
    let containerd = Containerd::start().unwrap();
    let (container, before) = filled(&containerd, "c");
    let dir = containerd.dir().join("image");
    let error = save(&containerd, &dir, &["--path", "/nowhere"], container.id()).unwrap_err();
    names(&error, &["/nowhere", "/scratch", "/dev/shm"]);
    assert!(!dir.join("manifest.json").exists());
    let error = save(&containerd, &dir, &["--path", "someone-else:/scratch"], container.id()).unwrap_err();
    names(&error, &["someone-else:/scratch"]);
    let error = save(&containerd, &dir, &[], "no-such-container").unwrap_err();
    names(&error, &["no-such-container", containerd.namespace()]);
    let theirs = containerd.container("theirs").runtime(RUNC).start().unwrap();
    let error = save(&containerd, &dir, &[], theirs.id()).unwrap_err();
    names(&error, &[theirs.id()]);
    theirs.remove().unwrap();
    untouched(&container, &before);

    // Two filesystems with one ResourceID.
    let twice = containerd.container("twice").tmpfs("/t", "size=1m").tmpfs("/t", "size=2m").start().unwrap();
    let error = save(&containerd, &dir, &[], twice.id()).unwrap_err();
    names(&error, &["/t", "two"]);
    assert_eq!(twice.status().unwrap().as_deref(), Some("RUNNING"));
    twice.exec(&["true"]).unwrap();
    let error = containerd.checkpoint(twice.id(), GOOD).unwrap_err();
    names(&error, &["/t"]);
    assert_eq!(twice.status().unwrap().as_deref(), Some("RUNNING"));
    twice.exec(&["true"]).unwrap();
    twice.remove().unwrap();

    let stopped =
        containerd.container("stopped").tmpfs("/scratch", "size=1m").arguments(&["true"]).start().unwrap();
    stopped.await_status("STOPPED").unwrap();
    let error = save(&containerd, &dir, &[], stopped.id()).unwrap_err();
    names(&error, &[stopped.id()]);
    stopped.remove().unwrap();
    assert!(!dir.join("manifest.json").exists());
    container.remove().unwrap();
    containerd.assert_nothing_left();
}

/// Restores and has to fail; then nothing may be left.
#[track_caller]
fn refused(containerd: &Containerd, image: &str) -> CtrError {
    let id = containerd.id("refused");
    let error = containerd.ctr().run(&["containers", "restore", "--live", &id, image]).map(|_| ()).err();
    let error = error.unwrap_or_else(|| panic!("{image} was restored"));
    // `ctr` leaves the container's record behind when its task can't be made.
    if containerd.ctr().run(&["containers", "info", &id]).is_ok() {
        containerd.ctr().run(&["containers", "delete", &id]).unwrap();
    }
    containerd.assert_nothing_left();
    error
}

#[test]
fn images_that_can_not_be_restored() {
    let containerd = Containerd::start().unwrap();
    let (container, before) = filled(&containerd, "c");
    containerd.checkpoint(container.id(), GOOD).unwrap();
    container.remove().unwrap();
    type Change = Box<dyn Fn(&Path)>;
    let mut bad: Vec<(Vec<&str>, Change)> = Vec::new();
    for name in FILES {
        bad.push((vec![name], Box::new(move |dir| fs::remove_file(dir.join(name)).unwrap())));
        bad.push((vec![name], Box::new(move |dir| alter::truncate(&dir.join(name)))));
        bad.push((vec![name], Box::new(move |dir| alter::flip(&dir.join(name)))));
        bad.push((vec![name], Box::new(move |dir| fs::write(dir.join(name), "").unwrap())));
        bad.push((
            vec![name, "regular file"],
            Box::new(move |dir| {
                fs::remove_file(dir.join(name)).unwrap();
                std::os::unix::fs::symlink("/etc/passwd", dir.join(name)).unwrap();
            }),
        ));
    }
    for name in ["tree.tar", "pages.img"] {
        bad.push((vec![name, "offset"], Box::new(move |dir| alter::flip(&dir.join(name)))));
    }
    bad.push((
        vec!["version", "7"],
        Box::new(|dir| alter::replace_text(&dir.join(FILES[0]), "\"version\":1", "\"version\":7")),
    ));
    let mut wrong = Vec::new();
    for (index, (words, change)) in bad.iter().enumerate() {
        let alterations = Alterations { files: Some(&**change), spec: None };
        containerd.alter_checkpoint(GOOD, BAD, &alterations).unwrap();
        let error = refused(&containerd, BAD);
        for word in words.iter().filter(|word| !error.stderr.contains(**word)) {
            wrong.push(format!("{index}: no {word:?} in: {}", error.stderr.trim()));
        }
        containerd.ctr().run(&["images", "remove", "--sync", BAD]).unwrap();
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // The alteration itself isn't what is refused.
    containerd.alter_checkpoint(GOOD, BAD, &Alterations { files: Some(&|_| ()), spec: None }).unwrap();
    let container = Container::restore(&containerd, "r", BAD).unwrap();
    assert_eq!(compare(&before, &container.list("/scratch").unwrap()), []);
    container.remove().unwrap();
    containerd.assert_nothing_left();
}

#[test]
fn a_tree_larger_than_the_new_mount_is_refused() {
    let containerd = Containerd::start().unwrap();
    let (container, _) = filled(&containerd, "c");
    containerd.checkpoint(container.id(), GOOD).unwrap();
    container.remove().unwrap();
    containerd
        .alter_checkpoint(GOOD, BAD, &Alterations { files: None, spec: Some(("size=64m", "size=04m")) })
        .unwrap();
    let error = refused(&containerd, BAD);
    names(&error, &["/scratch"]);
    assert!(error.stderr.contains("size") || error.stderr.contains("space"), "{error}");
}

#[test]
fn parts_that_are_no_regular_files() {
    let containerd = Containerd::start().unwrap();
    let (container, _) = filled(&containerd, "c");
    let dir = containerd.dir().join("image");
    save(&containerd, &dir, &[], container.id()).unwrap();
    let saved = containerd.dir().join("saved");
    let mut wrong = Vec::new();
    for name in FILES {
        let path = dir.join(name);
        fs::rename(&path, &saved).unwrap();
        // The good file itself behind a link: only the link is what is wrong.
        let kinds: [(&str, &dyn Fn()); 3] = [
            ("symlink", &|| std::os::unix::fs::symlink(&saved, &path).unwrap()),
            ("directory", &|| fs::create_dir(&path).unwrap()),
            ("fifo", &|| nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap()),
        ];
        for (kind, make) in kinds {
            make();
            // Opening a fifo may wait for a writer: a deadline of its own.
            let program = stillframe_integration::binaries::program("stillframe");
            let said = stillframe_integration::ctr::run(
                std::process::Command::new("timeout").arg("10").arg(program).arg("inspect").arg(&dir),
            );
            match said {
                Ok(_) => wrong.push(format!("{name} as a {kind} is accepted")),
                Err(error) if error.code == Some(124) => wrong.push(format!("{name} as a {kind} hangs")),
                Err(error) if !error.stderr.contains(name) => {
                    wrong.push(format!("{name} as a {kind}: {error}"))
                }
                Err(_) => {}
            }
            if kind == "directory" { fs::remove_dir(&path).unwrap() } else { fs::remove_file(&path).unwrap() }
        }
        fs::rename(&saved, &path).unwrap();
    }
    containerd.stillframe(&["inspect", &dir.to_string_lossy()]).unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    container.remove().unwrap();
}
