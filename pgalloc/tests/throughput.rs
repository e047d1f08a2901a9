//! How fast pages are saved and loaded, next to dd, cp and tar. To be run alone, in a release build:
//!
//! ```text
//! cargo test --release -p stillframe-pgalloc --test throughput -- --ignored --nocapture
//! ```
//!
//! Prints figures; what they are worth depends on the machine, so nothing is asserted but that the work was done.
//! Takes 5 GiB of memory and 4 GiB of disk (in the target directory). `WITHOUT_TOOLS=1` leaves cp and tar out.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stillframe_pgalloc::{
    AsyncPagesFileLoad, AsyncPagesFileSave, Direct, FileRange, LoadOptions, LoadTarget, MemoryFile,
    PAGE_SIZE, PageExtent, PagesFileSummary, SaveOptions,
};

const MEMORY: &str = "/dev/shm";
const DISK: &str = env!("CARGO_TARGET_TMPDIR");
const GIB: u64 = 1 << 30;
const ROUNDS: usize = 5;

/// The median, after one round to warm up.
fn measure(what: &str, bytes: u64, mut round: impl FnMut() -> Duration) -> f64 {
    round();
    let mut times: Vec<_> = (0..ROUNDS).map(|_| round()).collect();
    times.sort();
    let seconds = times[ROUNDS / 2].as_secs_f64();
    let rate = bytes as f64 / seconds / 1e9;
    let (best, worst) = (times[0].as_secs_f64(), times[ROUNDS - 1].as_secs_f64());
    println!("{what:50} {seconds:7.3} s  {rate:6.2} GB/s  ({best:.3} to {worst:.3} s)");
    rate
}

fn filled(path: &Path, length: u64) -> Arc<File> {
    let file = File::create_new(path).unwrap();
    let mut block: Vec<u8> =
        (0..1 << 20).map(|index: u32| (index.wrapping_mul(0x9e37_79b1) >> 13) as u8).collect();
    for offset in (0..length).step_by(block.len()) {
        block[..8].copy_from_slice(&offset.to_le_bytes());
        file.write_all_at(&block, offset).unwrap();
    }
    Arc::new(File::open(path).unwrap())
}

type Saved = (File, PagesFileSummary, Vec<Vec<PageExtent>>);

fn save(files: &[Arc<File>], length: u64, directory: &str, direct: Direct, live: bool) -> (Duration, Saved) {
    let pages = tempfile::tempfile_in(directory).unwrap();
    let start = Instant::now();
    let save =
        AsyncPagesFileSave::new(pages.try_clone().unwrap(), SaveOptions { direct, ..Default::default() })
            .unwrap();
    let main = save.register_memory_file(&MemoryFile::main()).unwrap();
    let range = FileRange::new(0, length).unwrap();
    let write = |file| if live { main.write_live_range(file, range) } else { main.write_range(file, range) };
    let extents = files.iter().map(|file| write(file).unwrap()).collect();
    let summary = save.finish().unwrap();
    (start.elapsed(), (pages, summary, extents))
}

fn load((pages, summary, extents): &Saved, threads: usize) -> Duration {
    let files = extents.iter().map(|_| Arc::new(tempfile::tempfile_in(MEMORY).unwrap())).collect::<Vec<_>>();
    let start = Instant::now();
    let (pages, digests) = (pages.try_clone().unwrap(), summary.digests.clone());
    let load =
        AsyncPagesFileLoad::new(pages, digests, LoadOptions { threads, ..LoadOptions::default() }).unwrap();
    for (file, extents) in files.iter().zip(extents) {
        let target = LoadTarget::new(file.clone(), extents.clone());
        load.load_ranges_into(vec![target]).unwrap();
    }
    let loaded = load.finish().unwrap();
    assert_eq!(loaded.files as usize, files.len());
    start.elapsed()
}

#[test]
#[ignore = "a benchmark"]
fn one_large_file() {
    let directory = tempfile::tempdir_in(MEMORY).unwrap();
    let path = directory.path().join("source");
    let source = filled(&path, GIB);
    let target = tempfile::tempdir_in(DISK).unwrap();
    let output = target.path().join("dd.img");
    let dd = |flags: &'static [&str]| {
        let (path, output) = (path.clone(), output.clone());
        move || {
            let _ = std::fs::remove_file(&output);
            let start = Instant::now();
            let status = Command::new("dd")
                .args([format!("if={}", path.display()), format!("of={}", output.display())])
                .args(["bs=1M", "status=none"])
                .args(flags)
                .status();
            assert!(status.unwrap().success());
            start.elapsed()
        }
    };
    measure("dd oflag=direct conv=fsync", GIB, dd(&["oflag=direct", "conv=fsync"]));
    measure("dd conv=fsync", GIB, dd(&["conv=fsync"]));
    std::fs::remove_file(&output).unwrap();
    let sources = [source];
    for (what, directory, direct, live) in [
        ("save to disk, direct", DISK, Direct::Always, false),
        ("save to disk, direct, live file", DISK, Direct::Always, true),
        ("save to disk, buffered", DISK, Direct::Never, false),
        ("save to tmpfs", MEMORY, Direct::Auto, false),
        ("save to tmpfs, live file", MEMORY, Direct::Auto, true),
    ] {
        measure(what, GIB, || save(&sources, GIB, directory, direct, live).0);
    }
    let saved = save(&sources, GIB, DISK, Direct::Never, false).1;
    for threads in [1, 2, 4] {
        measure(&format!("load from the disk, {threads} threads"), GIB, || {
            let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
            nix::fcntl::posix_fadvise(&saved.0, 0, 0, advice).unwrap();
            load(&saved, threads)
        });
    }
    for threads in [1, 2] {
        measure(&format!("load from the page cache, {threads} threads"), GIB, || load(&saved, threads));
    }
}

#[test]
#[ignore = "a benchmark"]
fn zeros() {
    let directory = tempfile::tempdir_in(MEMORY).unwrap();
    let path = directory.path().join("source");
    let file = File::create_new(&path).unwrap();
    let zeros = vec![0; 1 << 20];
    for offset in (0..GIB).step_by(zeros.len()) {
        file.write_all_at(&zeros, offset).unwrap();
    }
    let target = tempfile::tempdir_in(DISK).unwrap();
    let copy = target.path().join("copy");
    compare(
        GIB,
        ("cp --sparse=always", || run(Command::new("cp").arg("--sparse=always").arg(&path).arg(&copy))),
        &[Arc::new(file)],
        GIB,
    );
}

#[test]
#[ignore = "a benchmark"]
fn scattered_pages() {
    const PAGES: u64 = 200_000;
    let directory = tempfile::tempdir_in(MEMORY).unwrap();
    let target = tempfile::tempdir_in(DISK).unwrap();
    let archive = target.path().join("archive");
    // Of so many pages one, at a place in each group that looks random but is the same every time.
    for group in [2, 10, 100] {
        let path = directory.path().join("source");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        let length = PAGES * group * PAGE_SIZE;
        file.set_len(length).unwrap();
        for index in 0..PAGES {
            let page = index * group + (index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) % group;
            file.write_all_at(&[index as u8 | 1; PAGE_SIZE as usize], page * PAGE_SIZE).unwrap();
        }
        println!("{PAGES} pages, one in {group}");
        let tar = || {
            let _ = std::fs::remove_file(&archive);
            run(Command::new("tar")
                .args(["--sparse", "-C"])
                .arg(directory.path())
                .arg("-cf")
                .args([&archive, Path::new("source")]))
                + run(Command::new("sync").arg(&archive))
        };
        compare(PAGES * PAGE_SIZE, ("tar --sparse, sync", tar), &[Arc::new(file)], length);
    }
}

fn run(command: &mut Command) -> Duration {
    let start = Instant::now();
    assert!(command.status().unwrap().success());
    start.elapsed()
}

/// A tool, then a save, of still files and of live ones.
fn compare(bytes: u64, tool: (&str, impl FnMut() -> Duration), sources: &[Arc<File>], length: u64) {
    if std::env::var_os("WITHOUT_TOOLS").is_none() {
        measure(tool.0, bytes, tool.1);
    }
    measure("save", bytes, || save(sources, length, DISK, Direct::Auto, false).0);
    measure("save, live file", bytes, || save(sources, length, DISK, Direct::Auto, true).0);
}

#[test]
#[ignore = "a benchmark"]
fn small_files() {
    const FILES: usize = 50_000;
    let files = FILES as f64;
    let directory = tempfile::tempdir_in(MEMORY).unwrap();
    let paths: Vec<_> = (0..FILES).map(|index| directory.path().join(index.to_string())).collect();
    for (index, path) in paths.iter().enumerate() {
        std::fs::write(path, vec![index as u8 | 1; 4096]).unwrap();
    }
    for (what, directory, direct) in [
        ("save of 50,000 files of 4 KiB", DISK, Direct::Auto),
        ("save of 50,000 files of 4 KiB to tmpfs", MEMORY, Direct::Auto),
    ] {
        let pages = files * 4096.0;
        let rate = measure(what, pages as u64, || {
            // Descriptors are few, so they are opened a thousand at a time, which doesn't count.
            let pages = tempfile::tempfile_in(directory).unwrap();
            let options = SaveOptions { direct, ..Default::default() };
            let mut elapsed = Duration::ZERO;
            let save = AsyncPagesFileSave::new(pages, options).unwrap();
            let main = save.register_memory_file(&MemoryFile::main()).unwrap();
            let range = FileRange::new(0, 4096).unwrap();
            for paths in paths.chunks(1000) {
                let opened: Vec<_> = paths.iter().map(|path| Arc::new(File::open(path).unwrap())).collect();
                let start = Instant::now();
                for file in &opened {
                    main.write_range(file, range).unwrap();
                }
                elapsed += start.elapsed();
            }
            let start = Instant::now();
            save.finish().unwrap();
            elapsed + start.elapsed()
        });
        println!("{:50} {:7.0} files/s", "", rate * 1e9 / 4096.0);
    }
    let mut saved =
        save(&[filled(&directory.path().join("source"), 1 << 20)], 4096, DISK, Direct::Never, false).1;
    saved.2 = vec![saved.2[0].clone(); 1000];
    for threads in [1, 2] {
        measure(&format!("load of 1,000 files of 4 KiB, {threads} threads"), 4096 * 1000, || {
            load(&saved, threads)
        });
    }
}
