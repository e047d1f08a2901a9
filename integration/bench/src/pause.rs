//! How long containers are frozen by a checkpoint that copies while they run.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use stillframe_runtime::sandbox::{CheckpointResult, Phase};

use crate::Result;
use crate::data::{self, noise, run, scratch};
use crate::sandbox::Bench;
use crate::series::{Results, Wanted, median};
use crate::sys;

type Benchmark = (&'static str, fn(&mut Results) -> Result<()>);

/// The benchmarks of pauses.
pub const ALL: &[Benchmark] = &[("pause.idle", idle), ("pause.busy", busy)];

/// 2 GiB in 100,000 files, and 2 GiB in one.
const FILES: usize = 100_000;
const LARGE: u64 = 2 << 30;
/// A sixteenth of it.
const FEWER: (usize, u64) = (6_000, 128 << 20);
const SIZE: usize = 21_474;

/// What the busy container does: so many bytes a second over so many files, and so many pages a second of a mapping.
const RATE: u64 = 100_000_000;
const WRITTEN: usize = 1_000;
const MAPPED: u64 = 128 << 20;
const PAGES: u64 = 1_000;
/// Where it does it; set for the process that is the container.
const DIRECTORY: &str = "STILLFRAME_BENCH_WRITER";

fn fill(bench: &Bench, files: usize, large: u64) -> Result<()> {
    data::many(&bench.mount(), files, SIZE)?;
    data::large(&bench.mount(), large)
}

fn idle(results: &mut Results) -> Result<()> {
    let scratch = scratch()?;
    let image = scratch.path().join("image");
    let (large, small) = (Bench::prepare(None)?.start()?, Bench::prepare(None)?.start()?);
    fill(&large, FILES, LARGE)?;
    fill(&small, FEWER.0, FEWER.1)?;
    let pause = |bench: &Bench| Ok(bench.live_checkpoint(&image)?.frozen_ms);
    let tar = || {
        let archive = scratch.path().join("archive.tar");
        let (to, from) = (archive.to_string_lossy(), large.mount().to_string_lossy().into_owned());
        let taken = large.frozen(|| {
            run("tar", &["cf", &to, "-C", &from, "."])?;
            Ok(File::open(&archive)?.sync_all()?)
        })?;
        fs::remove_file(&archive)?;
        Ok(taken * 1000.0)
    };
    let medians = results.medians(
        1,
        &mut [
            ("4 GiB in 100,000 files, ms", Box::new(|| pause(&large))),
            ("256 MiB in 6,000 files, ms", Box::new(|| pause(&small))),
            ("freeze, tar, thaw, ms", Box::new(tar)),
        ],
    )?;
    results.put("pause.idle.ms", medians[0], "ms", serde_json::json!({}), Wanted::AtMost(10.0));
    results.ratio("pause.growth", ("large_ms", medians[0]), ("small_ms", medians[1]), Wanted::AtMost(2.0));
    results.ratio(
        "pause.vs_tar",
        ("tar_ms", medians[2]),
        ("stillframe_ms", medians[0]),
        Wanted::AtLeast(100.0),
    );
    Ok(())
}

fn busy(results: &mut Results) -> Result<()> {
    let scratch = scratch()?;
    let image = scratch.path().join("image");
    let bench = Bench::prepare(None)?;
    fill(&bench, FILES, LARGE)?;
    let mapped = File::create(bench.mount().join("mapped"))?;
    let block = noise(1 << 20)?;
    (0..MAPPED >> 20).try_for_each(|mib| mapped.write_all_at(&block, mib << 20))?;
    let mut writer = Command::new(std::env::current_exe()?);
    writer.env(DIRECTORY, bench.mount()).stdout(Stdio::piped());
    let (bench, output) = bench.start_with(&mut writer)?;
    let meter = Meter::new(output.ok_or("the writer's output isn't piped")?);
    meter.await_samples(20)?;

    let (mut pauses, mut slowdowns) = (Vec::new(), Vec::new());
    let measure = || {
        // A second without a checkpoint, to be compared with.
        meter.await_samples(20)?;
        let begun = Instant::now();
        let result = bench.live_checkpoint(&image)?;
        let before = meter.rate(begun - Duration::from_secs(1), begun);
        slowdowns.push(meter.rate(begun, begun + copying(&result)) / before);
        pauses.push(result.frozen_ms);
        eprintln!("bench:   {:?}, {} rounds", result.phases, result.rounds);
        Ok(result.frozen_ms)
    };
    let medians = results.medians(1, &mut [("a busy container, ms", Box::new(measure))])?;
    results.put(
        "pause.busy.ms",
        medians[0],
        "ms",
        serde_json::json!({ "all": pauses }),
        Wanted::AtMost(60.0),
    );
    let of = serde_json::json!({ "all": slowdowns });
    results.put("slowdown.busy", median(slowdowns), "ratio", of, Wanted::AtLeast(0.5));
    Ok(())
}

/// From the request until everything was copied.
fn copying(result: &CheckpointResult) -> Duration {
    let before = result.phases.iter().filter(|time| time.phase <= Phase::Copy);
    Duration::from_secs_f64(before.map(|time| time.ms).sum::<f64>() / 1000.0)
}

/// What the writer says it has written, and when.
struct Meter {
    samples: Arc<Mutex<Vec<(Instant, u64)>>>,
}

impl Meter {
    fn new(output: ChildStdout) -> Self {
        let samples = Arc::new(Mutex::new(Vec::new()));
        let meter = Self { samples: samples.clone() };
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(std::io::Result::ok) {
                if let (Ok(bytes), Ok(mut samples)) = (line.parse(), samples.lock()) {
                    samples.push((Instant::now(), bytes));
                }
            }
        });
        meter
    }

    fn samples(&self) -> Vec<(Instant, u64)> {
        self.samples.lock().expect("nobody panics with it").clone()
    }

    /// Waits for so many more samples, one in 50 ms.
    fn await_samples(&self, count: usize) -> Result<()> {
        let (before, begun) = (self.samples().len(), Instant::now());
        while self.samples().len() < before + count {
            if begun.elapsed() > Duration::from_secs(60) {
                return Err("the writer says nothing".into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Bytes a second between the two times.
    fn rate(&self, from: Instant, to: Instant) -> f64 {
        let samples = self.samples();
        let between: Vec<_> = samples.iter().filter(|(at, _)| (from..=to).contains(at)).collect();
        match (between.first(), between.last()) {
            (Some((first, start)), Some((last, end))) if last > first => {
                (end - start) as f64 / (*last - *first).as_secs_f64()
            }
            _ => f64::NAN,
        }
    }
}

/// The busy container's process, if this is it.
pub fn writer() -> Option<ExitCode> {
    let directory = PathBuf::from(std::env::var_os(DIRECTORY)?);
    match write_for_ever(&directory) {
        Ok(()) => Some(ExitCode::SUCCESS),
        Err(error) => {
            eprintln!("bench: the writer: {error}");
            Some(ExitCode::FAILURE)
        }
    }
}

fn write_for_ever(directory: &Path) -> Result<()> {
    let mapped = File::options().read(true).write(true).open(directory.join("mapped"))?;
    let mut mapping = sys::map(&mapped)?;
    drop(mapped);
    let block = noise(SIZE)?;
    let begun = Instant::now();
    let (mut bytes, mut pages, mut told) = (0u64, 0u64, 0);
    for number in 0u64.. {
        let file = number as usize % WRITTEN;
        let path = directory.join(format!("{:04}/file-{file}", file / 100));
        File::options().write(true).open(path)?.write_all_at(&block, 0)?;
        bytes += SIZE as u64;
        let elapsed = begun.elapsed();
        while pages < elapsed.as_millis() as u64 * PAGES / 1000 {
            let at = (pages * 7919 % (MAPPED / 4096)) * 4096;
            mapping[at as usize..at as usize + 8].copy_from_slice(&pages.to_le_bytes());
            pages += 1;
        }
        if elapsed.as_millis() / 50 != told {
            told = elapsed.as_millis() / 50;
            println!("{bytes}");
            std::io::stdout().flush()?;
        }
        let due = Duration::from_secs_f64(bytes as f64 / RATE as f64);
        std::thread::sleep(due.saturating_sub(elapsed));
    }
    Ok(())
}
