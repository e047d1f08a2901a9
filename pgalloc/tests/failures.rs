//! What goes wrong is an error that names the place, and nothing half-done is taken for done.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use stillframe_pgalloc::{
    AsyncPagesFileLoad, AsyncPagesFileSave, CHUNK_SIZE, DigestTable, Direct, FileRange, LoadError,
    LoadOptions, LoadTarget, MemoryFile, PAGE_SIZE, PageExtent, PagesFileSummary, PagesOffset, SaveError,
    SaveOptions,
};

const MEMORY: &str = "/dev/shm";
const DISK: &str = env!("CARGO_TARGET_TMPDIR");

fn data_file(length: usize) -> Arc<File> {
    let file = tempfile::tempfile_in(MEMORY).unwrap();
    let data: Vec<u8> = (0..length).map(|index| (index * 31 % 251) as u8 + 1).collect();
    file.write_all_at(&data, 0).unwrap();
    Arc::new(file)
}

fn range(length: u64) -> FileRange {
    FileRange::new(0, length).unwrap()
}

fn save(source: &Arc<File>, length: u64) -> (File, PagesFileSummary, Vec<PageExtent>) {
    let pages = tempfile::tempfile_in(MEMORY).unwrap();
    let save = AsyncPagesFileSave::new(pages.try_clone().unwrap(), SaveOptions::default()).unwrap();
    let extents =
        save.register_memory_file(&MemoryFile::main()).unwrap().write_range(source, range(length)).unwrap();
    (pages, save.finish().unwrap(), extents)
}

fn target(extents: Vec<PageExtent>) -> LoadTarget {
    LoadTarget::new(Arc::new(tempfile::tempfile_in(MEMORY).unwrap()), extents)
}

fn load(pages: &File, digests: &DigestTable, targets: Vec<LoadTarget>) -> Result<(), LoadError> {
    let load = AsyncPagesFileLoad::new(pages.try_clone().unwrap(), digests.clone(), LoadOptions::default())?;
    let enqueued = load.load_ranges_into(targets);
    load.finish().and(enqueued)
}

/// A filesystem that is unmounted when dropped.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn path(&self) -> &Path {
        self.0.path()
    }

    fn tmpfs(test: &str, options: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        match mount(Some("tmpfs"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some(options)) {
            Ok(()) => Some(Self(directory)),
            Err(error) => {
                println!("SKIPPED: {test}: can't mount a tmpfs: {error}");
                None
            }
        }
    }

    /// A small filesystem on a loop device.
    fn disk(test: &str, kind: &str, image: &Path, size: u64) -> Option<Self> {
        File::create(image).unwrap().set_len(size).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let made = Command::new("mkfs").args(["-t", kind]).args(["-q", "-F"]).arg(image).status();
        let mounted = made.and_then(|made| {
            if !made.success() {
                return Err(io::Error::other("mkfs failed"));
            }
            Command::new("mount").args(["-o", "loop"]).arg(image).arg(directory.path()).status()
        });
        match mounted {
            Ok(status) if status.success() => Some(Self(directory)),
            other => {
                println!("SKIPPED: {test}: can't make and mount an {kind}: {other:?}");
                None
            }
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        umount2(self.0.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn a_flipped_bit_anywhere_is_found_and_its_chunk_named() {
    let length = 5 * CHUNK_SIZE as usize / 2;
    let (pages, summary, extents) = save(&data_file(length), length as u64);
    load(&pages, &summary.digests, vec![target(extents.clone())]).unwrap();
    for position in (0..length as u64).step_by(4099).chain([summary.length - 1]) {
        let mut byte = [0];
        pages.read_exact_at(&mut byte, position).unwrap();
        pages.write_all_at(&[byte[0] ^ 0x40], position).unwrap();
        let error = load(&pages, &summary.digests, vec![target(extents.clone())]).unwrap_err();
        let chunk = position / CHUNK_SIZE * CHUNK_SIZE;
        assert!(
            matches!(error, LoadError::Digest { offset: PagesOffset(offset), .. } if offset == chunk),
            "bit at {position:#x}: {error}"
        );
        pages.write_all_at(&byte, position).unwrap();
    }
}

#[test]
fn nothing_of_a_damaged_chunk_is_written_and_on_loaded_does_not_run() {
    let length = 3 * CHUNK_SIZE;
    let (pages, summary, extents) = save(&data_file(length as usize), length);
    pages.write_all_at(&[0], CHUNK_SIZE + 5).unwrap();
    let ran = Arc::new(AtomicUsize::new(0));
    let mut target = target(extents);
    let file = target.file.clone();
    target.on_loaded = Some(Box::new({
        let ran = ran.clone();
        move |_| {
            ran.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }));
    load(&pages, &summary.digests, vec![target]).unwrap_err();
    assert_eq!(ran.load(Ordering::SeqCst), 0);
    assert!(file.metadata().unwrap().len() <= CHUNK_SIZE);
    assert_eq!(Arc::strong_count(&ran), 1, "the closure is gone");
}

#[test]
fn a_truncated_pages_file_is_refused_with_both_lengths() {
    let (pages, summary, extents) = save(&data_file(100_000), 100_000);
    pages.set_len(summary.length - PAGE_SIZE).unwrap();
    let error = load(&pages, &summary.digests, vec![target(extents)]).unwrap_err();
    assert!(
        matches!(error, LoadError::Length { expected, actual } if expected == actual + PAGE_SIZE),
        "{error}"
    );
}

#[test]
fn a_pages_file_that_shrinks_while_it_is_loaded_is_an_error() {
    let (pages, summary, extents) = save(&data_file(200_000), 200_000);
    let load =
        AsyncPagesFileLoad::new(pages.try_clone().unwrap(), summary.digests, LoadOptions::default()).unwrap();
    pages.set_len(CHUNK_SIZE).unwrap();
    load.load_ranges_into(vec![target(extents)]).unwrap();
    let error = load.finish().unwrap_err();
    assert!(
        matches!(&error, LoadError::Read { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof),
        "{error}"
    );
}

#[test]
fn extents_outside_the_pages_file_are_refused_before_anything_is_loaded() {
    let (pages, summary, _) = save(&data_file(100_000), 100_000);
    for (file_offset, length, pages_offset) in [
        (0, 4096, summary.length),
        (0, u64::MAX, 0),
        (u64::MAX - 4095, 4096, 0),
        (0, 4096, u64::MAX - 4095),
        (0, 0, 0),
    ] {
        let extent = PageExtent { file_offset, length, pages_offset: PagesOffset(pages_offset) };
        let error = load(&pages, &summary.digests, vec![target(vec![extent])]).unwrap_err();
        assert!(matches!(error, LoadError::Extent(_)), "{extent:?}: {error}");
    }
}

#[test]
fn a_file_with_a_callback_for_it_fails_alone() {
    let length = 5 << 20;
    let (pages, summary, extents) = save(&data_file(length), length as u64);
    // The second of the two parts that the file is cut into.
    pages.write_all_at(&[0], (4 << 20) + 7).unwrap();
    let good = PageExtent { length: CHUNK_SIZE, ..extents[0] };
    let (events, seen) = std::sync::mpsc::channel();
    let target = |name: &'static str, extents: Vec<PageExtent>, fails: bool| {
        let file = Arc::new(tempfile::tempfile_in(MEMORY).unwrap());
        let weak = Arc::downgrade(&file);
        let (loaded, failed, closed) = (events.clone(), events.clone(), events.clone());
        LoadTarget {
            on_loaded: Some(Box::new(move |_| {
                loaded.send(format!("{name} loaded")).unwrap();
                if fails { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
            })),
            on_failed: Some(Box::new(move |error| failed.send(format!("{name} failed: {error}")).unwrap())),
            on_closed: Some(Box::new(move || {
                closed.send(format!("{name} closed, held {}", weak.strong_count())).unwrap();
            })),
            ..LoadTarget::new(file, extents)
        }
    };
    let load =
        AsyncPagesFileLoad::new(pages, summary.digests, LoadOptions { threads: 1, ..LoadOptions::default() })
            .unwrap();
    let targets = vec![
        target("damaged", extents, false),
        target("unfinished", vec![good], true),
        target("good", vec![good], false),
    ];
    load.load_ranges_into(targets).unwrap();
    assert_eq!(load.finish().unwrap().files, 1);
    drop(events);
    let seen: Vec<String> = seen.iter().collect();
    let offset = format!("{:#x}", 4 << 20);
    assert!(seen[0].starts_with("damaged failed: ") && seen[0].contains(&offset), "{seen:?}");
    let rest = [
        "damaged closed, held 0",
        "unfinished loaded",
        "unfinished failed: can't finish a loaded file",
        "unfinished closed, held 0",
        "good loaded",
        "good closed, held 0",
    ];
    assert_eq!(seen[1..], rest);
}

#[test]
fn a_full_filesystem_ends_a_load_with_an_error() {
    let test = "a_full_filesystem_ends_a_load_with_an_error";
    let (pages, summary, extents) = save(&data_file(8 << 20), 8 << 20);
    let Some(small) = Mounted::tmpfs(test, "size=3m") else { return };
    let file = Arc::new(File::create(small.path().join("file")).unwrap());
    let target = LoadTarget::new(file, extents);
    let error = load(&pages, &summary.digests, vec![target]).unwrap_err();
    assert!(
        matches!(&error, LoadError::Write { source, .. } if source.raw_os_error() == Some(libc::ENOSPC)),
        "{error}"
    );
}

/// Saves more than there is room for; each later call and the end return what went wrong first.
fn fill(pages: File, direct: Direct) -> SaveError {
    let save = AsyncPagesFileSave::new(pages, SaveOptions { direct, ..Default::default() }).unwrap();
    let main = save.register_memory_file(&MemoryFile::main()).unwrap();
    let (large, small) = (data_file(4 << 20), data_file(5000));
    let error = (0..100)
        .flat_map(|_| [main.write_range(&large, range(4 << 20)), main.write_range(&small, range(5000))])
        .find_map(Result::err)
        .expect("a producer is told of the failure");
    assert_eq!(main.write_range(&small, range(5000)).unwrap_err().to_string(), error.to_string());
    assert!(save.register_memory_file(&MemoryFile::main()).is_err());
    assert_eq!(save.finish().unwrap_err().to_string(), error.to_string());
    error
}

#[test]
fn a_full_tmpfs_ends_a_save_with_an_error() {
    let test = "a_full_tmpfs_ends_a_save_with_an_error";
    for direct in [Direct::Auto, Direct::Never] {
        let Some(small) = Mounted::tmpfs(test, "size=10m") else { return };
        let error = fill(File::create_new(small.path().join("pages.img")).unwrap(), direct);
        assert!(
            matches!(&error, SaveError::Write { offset, source }
                if source.raw_os_error() == Some(libc::ENOSPC) && (9 << 20..=10 << 20).contains(&offset.0)),
            "{error}"
        );
    }
}

#[test]
fn a_full_disk_ends_a_save_with_an_error() {
    let test = "a_full_disk_ends_a_save_with_an_error";
    // ext2 can't preallocate, so that there the writes themselves, in flight, find no room.
    for (kind, direct) in ["ext4", "ext2"]
        .into_iter()
        .flat_map(|kind| [Direct::Auto, Direct::Always, Direct::Never].map(|direct| (kind, direct)))
    {
        let images = tempfile::tempdir_in(DISK).unwrap();
        let Some(small) = Mounted::disk(test, kind, &images.path().join("disk.img"), 32 << 20) else {
            return;
        };
        let error = fill(File::create_new(small.path().join("pages.img")).unwrap(), direct);
        let source = match &error {
            SaveError::Write { source, .. } | SaveError::Extend { source, .. } => source,
            other => panic!("{other}"),
        };
        assert_eq!(source.raw_os_error(), Some(libc::ENOSPC), "{error}");
        // Room ahead must not be what fails: nearly all of the disk is used. Which of the writes that are in flight
        // finds no room, the kernel decides.
        let disk = nix::sys::statvfs::statvfs(small.path()).unwrap();
        let used = (disk.blocks() - disk.blocks_free()) * disk.fragment_size();
        assert!(used >= 24 << 20, "{kind}, {direct:?}: {used} bytes are used: {error}");
    }
}

#[test]
fn a_source_that_is_shorter_than_the_range_is_an_error_that_names_the_place() {
    let pages = tempfile::tempfile_in(MEMORY).unwrap();
    let save = AsyncPagesFileSave::new(pages.try_clone().unwrap(), SaveOptions::default()).unwrap();
    let main = save.register_memory_file(&MemoryFile::main()).unwrap();
    let mut ends = Vec::new();
    for (length, claimed) in [(0, 1), (10_000, 10_001), (10_000, 100_000), (1 << 20, (1 << 20) + 1)] {
        let source = data_file(length);
        let error = main.write_range(&source, range(claimed)).unwrap_err();
        assert!(matches!(error, SaveError::Truncated { offset, .. } if offset == length as u64), "{error}");
        // Leaves data in a buffer that is used again.
        main.write_range(&data_file(100_000), range(100_000)).unwrap();
        // A live file may do that.
        let extents = main.write_live_range(&source, range(claimed)).unwrap();
        let saved: u64 = extents.iter().map(|extent| extent.length).sum();
        assert_eq!(saved, (length as u64).next_multiple_of(PAGE_SIZE).min(claimed));
        ends.extend(
            extents.last().map(|last| (last.pages_offset.0 + length as u64 - last.file_offset, length)),
        );
    }
    let unaligned = FileRange::new(10, 20).unwrap();
    assert!(matches!(main.write_range(&data_file(100), unaligned), Err(SaveError::Unaligned { .. })));
    // A source that can't be saved doesn't end the save.
    save.finish().unwrap();
    for (end, length) in ends {
        let mut rest = vec![1; (end.next_multiple_of(PAGE_SIZE) - end) as usize];
        pages.read_exact_at(&mut rest, end).unwrap();
        assert!(rest.iter().all(|&byte| byte == 0), "what is behind the end of the file of {length} bytes");
    }
}

#[test]
fn a_pages_file_must_be_empty_and_direct_io_can_be_demanded_only_where_it_is() {
    let pages = tempfile::tempfile_in(MEMORY).unwrap();
    pages.set_len(1).unwrap();
    let error = AsyncPagesFileSave::new(pages, SaveOptions::default()).unwrap_err();
    assert!(matches!(error, SaveError::NotEmpty { length: 1 }));
    // procfs has files that can be opened for writing but not written past the page cache.
    let proc = File::options().read(true).write(true).open("/proc/self/comm").unwrap();
    let error = AsyncPagesFileSave::new(proc, SaveOptions { direct: Direct::Always, ..Default::default() })
        .unwrap_err();
    assert!(matches!(error, SaveError::Direct { .. }), "{error}");
}

#[test]
fn the_main_memory_file_is_not_saved_or_loaded_as_a_whole() {
    let pages = tempfile::tempfile_in(MEMORY).unwrap();
    let save = AsyncPagesFileSave::new(pages.try_clone().unwrap(), SaveOptions::default()).unwrap();
    assert!(matches!(MemoryFile::main().save_to(&save), Err(SaveError::MainMemoryFile)));
    let load = AsyncPagesFileLoad::new(pages, DigestTable::default(), LoadOptions::default()).unwrap();
    let meta = Default::default();
    assert!(matches!(MemoryFile::main().load_from(&load, &meta), Err(LoadError::MainMemoryFile)));
}

#[test]
fn a_failing_or_panicking_on_loaded_ends_the_load() {
    let (pages, summary, extents) = save(&data_file(100_000), 100_000);
    let mut failing = target(extents.clone());
    failing.on_loaded = Some(Box::new(|_| Err(io::Error::other("no"))));
    let error = load(&pages, &summary.digests, vec![failing]).unwrap_err();
    assert!(matches!(error, LoadError::OnLoaded { .. }), "{error}");
    let mut panicking = target(extents.clone());
    panicking.on_loaded = Some(Box::new(|_| panic!("expected by the test")));
    // More than the queue holds behind it: nobody may wait for ever.
    let others = (0..5000).map(|_| target(extents.clone()));
    let error =
        load(&pages, &summary.digests, std::iter::once(panicking).chain(others).collect()).unwrap_err();
    assert!(matches!(error, LoadError::Panicked), "{error}");
}

#[test]
fn what_is_urgent_is_loaded_next() {
    let (pages, summary, extents) = save(&data_file(8 << 20), 8 << 20);
    let order = Arc::new(Mutex::new(Vec::new()));
    let (release, released) = mpsc::channel::<()>();
    let load =
        AsyncPagesFileLoad::new(pages, summary.digests, LoadOptions { threads: 1, ..LoadOptions::default() })
            .unwrap();
    let named = |name: &'static str| {
        let mut target = target(extents.clone());
        let order = order.clone();
        target.on_loaded = Some(Box::new(move |_| {
            order.lock().unwrap().push(name);
            Ok(())
        }));
        target
    };
    let (started, has_started) = mpsc::channel();
    let mut first = named("first");
    first.extents.clear();
    first.on_loaded = Some(Box::new(move |_| {
        started.send(()).unwrap();
        let _ = released.recv();
        Ok(())
    }));
    load.load_ranges_into(vec![first]).unwrap();
    has_started.recv().unwrap();
    load.load_ranges_into(vec![named("second"), named("third")]).unwrap();
    load.load_ranges_next(vec![named("urgent")]).unwrap();
    drop(release);
    load.finish().unwrap();
    assert_eq!(*order.lock().unwrap(), ["urgent", "second", "third"]);
}

#[test]
fn dropping_without_finishing_ends_the_threads() {
    let (pages, summary, extents) = save(&data_file(4 << 20), 4 << 20);
    let load = AsyncPagesFileLoad::new(pages, summary.digests, LoadOptions::default()).unwrap();
    let alive = Arc::new(());
    for _ in 0..20 {
        let mut target = target(extents.clone());
        let held = alive.clone();
        target.on_loaded = Some(Box::new(move |_| {
            let _held = held;
            Ok(())
        }));
        load.load_ranges_into(vec![target]).unwrap();
    }
    drop(load);
    assert_eq!(Arc::strong_count(&alive), 1);
}
