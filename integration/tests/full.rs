//! Mode `full`: a process goes on in another container exactly where it was, with the files that it had open on tmpfs and mapped in
//! `/dev/shm`, on every containerd. CRIU alone loses or refuses those.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use stillframe_integration::{Container, ContainerSpec, Containerd, ContainerdVersion, criu};

stillframe_integration::with_every_containerd!(a_process_goes_on_in_another_container_where_it_was);

const CHECKPOINT: &str = "stillframe.test/full:1";
const MODE: &str = "dev.stillframe.checkpoint.mode";
const NAME: &str = "dev.stillframe.container-name";
const RESTORE_FROM: &str = "dev.stillframe.restore-from";

fn counting<'a>(containerd: &'a Containerd, name: &str) -> ContainerSpec<'a> {
    let spec = containerd.container(name).tmpfs("/scratch", "size=16m").annotation(MODE, "full");
    spec.arguments(&["probe", "count", "/scratch/log", "/dev/shm/segment"])
}

/// What it has counted: its token, and up to where. Each line continues the one before.
#[track_caller]
fn counted(container: &Container<'_>) -> (String, u64) {
    let log = container.shell("cat /scratch/log").unwrap().stdout;
    let mut last = (String::new(), 0);
    // The last line may be being written.
    for line in log.lines().take(log.matches('\n').count()) {
        let words: Vec<&str> = line.split(' ').collect();
        let [token, count, mapped] = words[..] else { panic!("{line}") };
        let numbers = [count, mapped].map(|word| word.parse::<u64>().unwrap());
        assert_eq!(numbers, [last.1 + 1, last.1], "{line}, after {last:?}");
        assert!(last.1 == 0 || last.0 == token, "{line}, after {last:?}");
        last = (token.to_owned(), numbers[0]);
    }
    last
}

/// Waits until it has counted further than that.
#[track_caller]
fn await_count(container: &Container<'_>, beyond: u64) -> (String, u64) {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let now = counted(container);
        if now.1 > beyond {
            return now;
        }
        assert!(Instant::now() < end, "it doesn't count any more: {now:?}, not beyond {beyond}");
    }
}

fn a_process_goes_on_in_another_container_where_it_was(version: &ContainerdVersion) {
    if criu::or_skip("a_process_goes_on_in_another_container_where_it_was").is_none() {
        return;
    }
    let containerd = Containerd::start_version(version).unwrap();
    let old = counting(&containerd, "old").start().unwrap();
    let (_, before) = await_count(&old, 20);
    containerd.checkpoint(old.id(), CHECKPOINT).unwrap();
    // It runs on.
    let (token, after) = await_count(&old, before + 20);
    old.remove().unwrap();
    containerd.assert_nothing_left();

    let new = Container::restore(&containerd, "new", CHECKPOINT).unwrap();
    let (again, count) = counted(&new);
    assert_eq!(again, token, "another process");
    assert!(count >= before, "it was at {before} before it was saved");
    await_count(&new, after + 20);
    assert_eq!(new.status().unwrap().as_deref(), Some("RUNNING"));
    // What was restored can be saved again; before 2.0 not while there is an image with the same spec.
    containerd.ctr().run(&["images", "remove", "--sync", CHECKPOINT]).unwrap();
    let again = "stillframe.test/full:2";
    containerd.checkpoint(new.id(), again).unwrap();
    let (_, count) = counted(&new);
    new.remove().unwrap();
    let third = Container::restore(&containerd, "third", again).unwrap();
    assert_eq!(await_count(&third, count).0, token);
    containerd.ctr().run(&["tasks", "kill", "--signal", "SIGKILL", third.id()]).unwrap();
    third.await_status("STOPPED").unwrap();
    third.remove().unwrap();
    containerd.assert_nothing_left();
    containerd.stop().unwrap();
}

#[test]
fn an_images_processes_are_verified_and_restored_for_their_own_container_only() {
    if criu::or_skip("an_images_processes_are_verified_and_restored_for_their_own_container_only").is_none() {
        return;
    }
    let containerd = Containerd::start().unwrap();
    let old = counting(&containerd, "old").annotation(NAME, "work").start().unwrap();
    await_count(&old, 5);
    containerd.checkpoint(old.id(), CHECKPOINT).unwrap();
    let (token, _) = counted(&old);
    old.remove().unwrap();
    let image = containerd.dir().join("image");
    containerd.unpack_checkpoint(CHECKPOINT, &image).unwrap();
    let spec = |id: &str, name: &str| {
        let spec = counting(&containerd, id).annotation(NAME, name);
        spec.annotation(RESTORE_FROM, &image.display().to_string())
    };
    let same = spec("same", "work").start().unwrap();
    assert_eq!(counted(&same).0, token);
    same.remove().unwrap();
    // One of another name starts its own program.
    let other = spec("other", "other").start().unwrap();
    assert_ne!(await_count(&other, 1).0, token);
    other.remove().unwrap();

    let pages = fs::File::options().read(true).write(true).open(image.join("pages-1.img")).unwrap();
    let mut byte = [0];
    pages.read_exact_at(&mut byte, 70_000).unwrap();
    pages.write_all_at(&[byte[0] ^ 1], 70_000).unwrap();
    let error = spec("damaged", "work").start().map(|container| container.id().to_owned()).unwrap_err();
    assert!(error.stderr.contains("pages-1.img is damaged between offsets 65536 and"), "{error}");
    pages.write_all_at(&byte, 70_000).unwrap();
    fs::remove_file(image.join("inventory.img")).unwrap();
    let error = spec("missing", "work").start().map(|container| container.id().to_owned()).unwrap_err();
    assert!(error.stderr.contains("inventory.img"), "{error}");
}

/// CRIU doesn't know every filesystem that a container may mount; it says so, and nothing of the attempt stays.
#[test]
fn what_criu_cannot_save_is_an_error_and_the_container_runs_on() {
    if criu::or_skip("what_criu_cannot_save_is_an_error_and_the_container_runs_on").is_none() {
        return;
    }
    let containerd = Containerd::start().unwrap();
    let container = counting(&containerd, "c").option("--cap-add=CAP_SYS_ADMIN").start().unwrap();
    let (_, before) = await_count(&container, 5);
    container.shell("mount -t ramfs none /tmp && echo text > /tmp/file").unwrap();
    let error = containerd.checkpoint(container.id(), CHECKPOINT).unwrap_err();
    assert!(error.stderr.contains("CRIU: ") && error.stderr.contains("mount.c"), "{error}");
    await_count(&container, before + 5);
    let unpacked = fs::read_dir(containerd.dir().join("tmp")).unwrap();
    let left: Vec<_> = unpacked
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("inventory.img").exists())
        .collect();
    assert_eq!(left, Vec::<std::path::PathBuf>::new());
    let mode = counting(&containerd, "mode").annotation(MODE, "all").start();
    let error = mode.map(|container| container.id().to_owned()).unwrap_err();
    assert!(
        error
            .stderr
            .contains("annotation dev.stillframe.checkpoint.mode: the checkpoint mode \"all\" is unknown"),
        "{error}"
    );
    container.remove().unwrap();
    containerd.assert_nothing_left();
}
