//! How fast trees of small files are saved and restored. To be run alone, in a release build:
//!
//! ```text
//! cargo test --release -p stillframe-tmpfs --test throughput -- --ignored --nocapture
//! ```
//!
//! Prints medians of the times that passed and of the processor time of all threads, which tells more on a machine
//! that does something else too. What they are worth depends on the machine, so nothing is asserted but that the work was done.
//! Takes 1 GiB of memory and 200 MiB of disk (in the target directory).

#[path = "support/filesystem.rs"]
mod filesystem;

use std::fs::{self, File};
use std::io::Write;
use std::time::{Duration, Instant};

use stillframe_pgalloc::{
    AsyncPagesFileLoad, AsyncPagesFileSave, DigestTable, LoadOptions, MemoryFile, SaveOptions,
};
use stillframe_tmpfs::Ids;
use stillframe_tmpfs::build::{build_tree, check_tree};
use stillframe_tmpfs::decode::decode_tree;
use stillframe_tmpfs::mount::{open_root, open_view, usage};
use stillframe_tmpfs::save::save_tree;

use filesystem::{DEVICES, Tmpfs, noise};

const DISK: &str = env!("CARGO_TARGET_TMPDIR");
const DIRECTORIES: usize = 500;
const FILES: usize = 50_000;
const ROUNDS: usize = 9;

/// The phases of one round, each with the time that passed and the processor time that it took.
#[derive(Default)]
struct Phases(Vec<(&'static str, Duration, Duration)>);

impl Phases {
    fn push(&mut self, what: &'static str, begun: &Clock) {
        let now = Clock::now();
        self.0.push((what, now.wall - begun.wall, now.processor - begun.processor));
    }
}

struct Clock {
    wall: Instant,
    processor: Duration,
}

impl Clock {
    fn now() -> Self {
        let processor = nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID.now().unwrap().into();
        Self { wall: Instant::now(), processor }
    }
}

fn save(filesystem: &Tmpfs, phases: &mut Phases) -> (Vec<u8>, File, DigestTable) {
    let pages = tempfile::tempfile_in(DISK).unwrap();
    let begun = Clock::now();
    let save = AsyncPagesFileSave::new(pages.try_clone().unwrap(), SaveOptions::default()).unwrap();
    let memory = save.register_memory_file(&MemoryFile::main()).unwrap();
    let view = open_view(filesystem.path()).unwrap();
    let (archive, summary) = save_tree(&view, &Ids::default(), &memory, Vec::new()).unwrap();
    phases.push("walk and save", &begun);
    let finished = save.finish().unwrap();
    phases.push("save, until it is durable", &begun);
    assert_eq!(summary.files as usize, FILES);
    (archive, pages, finished.digests)
}

fn restore((archive, pages, digests): &(Vec<u8>, File, DigestTable), phases: &mut Phases) {
    let filesystem = Tmpfs::new(&[]);
    let begun = Clock::now();
    let tree = decode_tree(archive, digests.pages_length()).unwrap();
    phases.push("decode", &begun);
    check_tree(&tree, &DEVICES(), &usage(filesystem.path()).unwrap()).unwrap();
    phases.push("decode and check", &begun);
    let building = Clock::now();
    let loader = AsyncPagesFileLoad::new(pages.try_clone().unwrap(), digests.clone(), LoadOptions::default());
    let loader = loader.unwrap();
    let root = open_root(filesystem.path()).unwrap();
    let options = DEVICES();
    let built = build_tree(&root, &tree, &options, &loader).unwrap();
    phases.push("make the names", &building);
    assert_eq!(loader.finish().unwrap().files as usize, FILES);
    built.finish().unwrap();
    phases.push("build", &building);
    phases.push("decode, check and build", &begun);
}

#[test]
#[ignore = "a benchmark"]
fn small_files() {
    let old = Tmpfs::new(&[]);
    for directory in 0..DIRECTORIES {
        let directory = old.path().join(format!("directory-{directory:03}"));
        fs::create_dir(&directory).unwrap();
        for file in 0..FILES / DIRECTORIES {
            let mut file = File::create_new(directory.join(format!("file-{file:03}.dat"))).unwrap();
            file.write_all(&noise(4096, 1)).unwrap();
        }
    }
    let mut rounds: Vec<Phases> = Vec::new();
    for _ in 0..ROUNDS {
        let mut phases = Phases::default();
        let saved = save(&old, &mut phases);
        restore(&saved, &mut phases);
        rounds.push(phases);
    }
    for phase in 0..rounds[0].0.len() {
        let sorted = |time: fn(&(&str, Duration, Duration)) -> Duration| {
            let mut times: Vec<f64> =
                rounds.iter().map(|round| time(&round.0[phase]).as_secs_f64()).collect();
            times.sort_by(f64::total_cmp);
            times
        };
        let (wall, processor) = (sorted(|phase| phase.1), sorted(|phase| phase.2));
        let (what, median, best) = (rounds[0].0[phase].0, wall[ROUNDS / 2], wall[0]);
        let (rate, most) = (FILES as f64 / median, FILES as f64 / best);
        let each = processor[ROUNDS / 2] / FILES as f64 * 1e6;
        println!(
            "{what:30} {median:6.3} s {rate:9.0} files/s (best {most:9.0}); processor {each:6.2} us a file"
        );
    }
}
