//! How fast pages are saved and loaded, next to dd. To be run alone, in a release build:
//!
//! ```text
//! cargo test --release -p stillframe-pgalloc --test throughput -- --ignored --nocapture
//! ```
//!
//! Prints figures; what they are worth depends on the machine, so nothing is asserted but that the work was done.
//! Takes 2 GiB of memory and 1 GiB of disk (in the target directory).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stillframe_pgalloc::{
    AsyncPagesFileLoad, AsyncPagesFileSave, Direct, FileRange, LoadOptions, LoadTarget, MemoryFile,
    PageExtent, PagesFileSummary, SaveOptions,
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

fn filled(path: &std::path::Path, length: u64) -> Arc<File> {
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
    let load = AsyncPagesFileLoad::new(pages, digests, LoadOptions { threads }).unwrap();
    for (file, extents) in files.iter().zip(extents) {
        let target = LoadTarget { file: file.clone(), extents: extents.clone(), on_loaded: None };
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
    let file = tempfile::tempfile_in(MEMORY).unwrap();
    let zeros = vec![0; 1 << 20];
    for offset in (0..GIB).step_by(zeros.len()) {
        file.write_all_at(&zeros, offset).unwrap();
    }
    let sources = [Arc::new(file)];
    measure("save of zeros", GIB, || save(&sources, GIB, DISK, Direct::Auto, false).0);
}

#[test]
#[ignore = "a benchmark"]
fn small_files() {
    const FILES: usize = 50_000;
    // One file stands for all: what it costs to find and open them is not ours.
    let directory = tempfile::tempdir_in(MEMORY).unwrap();
    let sources = vec![filled(&directory.path().join("source"), 1 << 20); FILES];
    let bytes = FILES as u64 * 4096;
    measure("save of 50,000 files of 4 KiB, direct", bytes, || {
        save(&sources, 4096, DISK, Direct::Auto, false).0
    });
    let mut saved = save(&sources, 4096, DISK, Direct::Never, false).1;
    saved.2.truncate(1000);
    for threads in [1, 2] {
        measure(&format!("load of 1,000 of them, {threads} threads"), 4096 * 1000, || load(&saved, threads));
    }
}
