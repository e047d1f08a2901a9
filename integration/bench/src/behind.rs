//! Restoring behind the start: how soon a container runs, and what it then costs.

use std::fs::{self, File};
use std::io::Read;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::json;
use stillframe_integration::{Container, Containerd, RUNC, STILLFRAME};

use crate::Result;
use crate::data::{self, evict, run, scratch};
use crate::sandbox::Bench;
use crate::series::{Results, Wanted, median, seconds};

type Benchmark = (&'static str, fn(&mut Results) -> Result<()>);

/// The benchmarks of restoring behind the start.
pub const ALL: &[Benchmark] = &[
    ("restore.start", start),
    ("restore.start.small", start_small),
    ("restore.after", after),
    ("restore.concurrent20", concurrent),
];

const FILE: u64 = 4 << 20;
const FILES: u64 = 1_000;
const SMALL: usize = 100_000;
const SANDBOXES: usize = 20;

/// An image of a tmpfs that `fill` has filled.
fn image(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let bench = Bench::prepare(None)?.start()?;
    fill(&bench.mount())?;
    let image = dir.join("image");
    bench.checkpoint(&image)?;
    Ok(image)
}

fn files(dir: &Path, files: u64) -> Result<()> {
    let block = data::noise((FILE + files) as usize)?;
    for number in 0..files as usize {
        fs::write(dir.join(format!("file-{number}")), &block[number..number + FILE as usize])?;
    }
    Ok(())
}

/// A container with a tmpfs, restored from an image if there is one; how long `ctr run` took until its program ran.
fn run_container<'a>(
    containerd: &'a Containerd,
    image: Option<&Path>,
    load: &str,
) -> Result<(f64, Container<'a>)> {
    let mut spec = containerd.container("restored").tmpfs("/scratch", "size=6g");
    if let Some(image) = image {
        spec = spec.annotation("dev.stillframe.restore-from", &image.to_string_lossy());
        spec = spec.annotation("dev.stillframe.restore.load", load);
    }
    let mut container = None;
    let taken = seconds(|| {
        container = Some(spec.start()?);
        Ok(())
    })?;
    Ok((taken, container.expect("it was started")))
}

fn await_load(containerd: &Containerd, container: &Container<'_>) -> Result<()> {
    containerd.stillframe(&["wait", "--restored", "--namespace", containerd.namespace(), container.id()])?;
    Ok(())
}

/// 4 GiB in 1,000 files.
fn start(results: &mut Results) -> Result<()> {
    let scratch = scratch()?;
    let image = image(scratch.path(), |dir| files(dir, FILES))?;
    // From the page cache, all of them: what is compared is waiting for the data, not the disk.
    fs::copy(image.join("pages.img"), "/dev/null")?;
    let containerd = Containerd::start()?;
    let mut lazy_total = Vec::new();
    let medians = results.medians(
        1,
        &mut [
            (
                "empty, s",
                Box::new(|| {
                    let (taken, container) = run_container(&containerd, None, "")?;
                    container.remove()?;
                    Ok(taken)
                }),
            ),
            (
                "lazy, s",
                Box::new(|| {
                    let (taken, container) = run_container(&containerd, Some(&image), "lazy")?;
                    let rest = seconds(|| await_load(&containerd, &container))?;
                    lazy_total.push(taken + rest);
                    container.remove()?;
                    Ok(taken)
                }),
            ),
            (
                "eager, s",
                Box::new(|| {
                    let (taken, container) = run_container(&containerd, Some(&image), "eager")?;
                    container.remove()?;
                    Ok(taken)
                }),
            ),
        ],
    )?;
    let [empty, lazy, eager] = medians[..] else { unreachable!("three were measured") };
    results.ratio("restore.start.vs_empty", ("lazy_s", lazy), ("empty_s", empty), Wanted::AtMost(2.0));
    let total = median(lazy_total);
    results.ratio("restore.lazy.total", ("lazy_s", total), ("eager_s", eager), Wanted::AtMost(1.2));
    Ok(())
}

/// 100,000 files of 4 KiB, which are loaded before the start.
fn start_small(results: &mut Results) -> Result<()> {
    let scratch = scratch()?;
    let archive = scratch.path().join("tar").to_string_lossy().into_owned();
    let image = image(scratch.path(), |dir| {
        data::small(dir, SMALL)?;
        run("tar", &["cf", &archive, "-C", &dir.to_string_lossy(), "."]).map(drop)
    })?;
    fs::copy(image.join("pages.img"), "/dev/null")?;
    let containerd = Containerd::start()?;
    let mut first_read = Vec::new();
    let untar = || {
        let bench = Bench::prepare(None)?;
        let into = bench.mount().to_string_lossy().into_owned();
        seconds(|| run("tar", &["xf", &archive, "-C", &into]).map(drop))
    };
    let medians = results.medians(
        1,
        &mut [
            (
                "stillframe, s",
                Box::new(|| {
                    let (taken, container) = run_container(&containerd, Some(&image), "lazy")?;
                    let number = (first_read.len() * 7919 + 12_345) % SMALL;
                    let pid = container.pid()?.ok_or("the container has no process")?;
                    let path = format!("/proc/{pid}/root/scratch/{:04}/file-{number}", number / 100);
                    let mut bytes = Vec::new();
                    first_read.push(seconds(|| {
                        File::open(&path)?.read_to_end(&mut bytes)?;
                        Ok(())
                    })?);
                    assert_eq!(bytes.len(), 4096);
                    container.remove()?;
                    Ok(taken)
                }),
            ),
            ("tar, s", Box::new(untar)),
        ],
    )?;
    results.ratio(
        "restore.start.small",
        ("stillframe_s", medians[0]),
        ("tar_s", medians[1]),
        Wanted::AtMost(0.5),
    );
    let milliseconds = median(first_read) * 1000.0;
    results.put("restore.first_read.ms", milliseconds, "ms", json!({}), Wanted::AtMost(10.0));
    Ok(())
}

/// Opening and reading files that were restored, when all is loaded, and files that never were.
fn after(results: &mut Results) -> Result<()> {
    let scratch = scratch()?;
    let image = image(scratch.path(), |dir| files(dir, 100))?;
    let restored = Bench::restore(&image)?.start()?;
    restored.await_load()?;
    let plain = Bench::prepare(None)?;
    files(&plain.mount(), 100)?;
    let rate = |dir: PathBuf| -> Result<f64> {
        let mut buffer = [0; 4096];
        let taken = seconds(|| {
            for number in 0..200_000 {
                File::open(dir.join(format!("file-{}", number % 100)))?.read_exact(&mut buffer)?;
            }
            Ok(())
        })?;
        Ok(200_000.0 / taken)
    };
    let medians = results.medians(
        3,
        &mut [
            ("restored, 1/s", Box::new(|| rate(restored.mount()))),
            ("never restored, 1/s", Box::new(|| rate(plain.mount()))),
        ],
    )?;
    results.ratio(
        "restore.after",
        ("restored_per_s", medians[0]),
        ("never_restored_per_s", medians[1]),
        Wanted::AtLeast(0.99),
    );
    Ok(())
}

/// Bytes that have been read from the disk with a file.
fn disk_reads(path: &Path) -> Result<u64> {
    let device = path.metadata()?.st_dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let stat = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat"))?;
    let sectors = stat.split_whitespace().nth(2).ok_or("a disk's stat has no third field")?;
    Ok(sectors.parse::<u64>()? * 512)
}

/// Starts so many at once: how long the slowest took, and all of them.
fn at_once<T: Send>(count: usize, start: impl Fn(usize) -> Result<T> + Sync) -> Result<(f64, Vec<T>)> {
    let one = |number: usize| -> std::result::Result<(f64, T), String> {
        let mut started = None;
        let taken = seconds(|| {
            started = Some(start(number)?);
            Ok(())
        });
        let taken = taken.map_err(|error| error.to_string())?;
        Ok((taken, started.expect("it was started")))
    };
    let started = std::thread::scope(|scope| {
        let one = &one;
        let threads: Vec<_> = (0..count).map(|number| scope.spawn(move || one(number))).collect();
        threads.into_iter().map(|thread| thread.join().expect("it doesn't panic")).collect::<Vec<_>>()
    });
    let (mut slowest, mut all) = (0f64, Vec::new());
    for started in started {
        let (taken, one) = started?;
        slowest = slowest.max(taken);
        all.push(one);
    }
    Ok((slowest, all))
}

/// So many containers at once, with a tmpfs each, which is restored from an image if there is one.
fn slowest(containerd: &Containerd, runtime: &str, image: Option<&Path>, containers: usize) -> Result<f64> {
    let (slowest, containers) = at_once(containers, |number| {
        let mut spec = containerd.container(&format!("c{number}")).runtime(runtime);
        spec = spec.tmpfs("/scratch", "size=1g");
        if let Some(image) = image {
            spec = spec.annotation("dev.stillframe.restore-from", &image.to_string_lossy());
        }
        Ok(spec.start()?)
    })?;
    containers.into_iter().try_for_each(Container::remove)?;
    Ok(slowest)
}

/// 20 sandboxes at once from one image of 64 files of 4 MiB, which isn't in the page cache.
fn concurrent(results: &mut Results) -> Result<()> {
    let scratch = scratch()?;
    let image = image(scratch.path(), |dir| files(dir, 64))?;
    let pages = image.join("pages.img");
    let mut read = Vec::new();
    let restore = |sandboxes: usize| -> Result<f64> {
        evict(&pages)?;
        let (slowest, benches) = at_once(sandboxes, |_| Bench::restore(&image)?.start())?;
        benches.iter().try_for_each(Bench::await_load)?;
        Ok(slowest)
    };
    let medians = results.medians(
        1,
        &mut [
            ("one, s", Box::new(|| restore(1))),
            (
                "the slowest of 20, s",
                Box::new(|| {
                    let before = disk_reads(&pages)?;
                    let taken = restore(SANDBOXES)?;
                    read.push((disk_reads(&pages)? - before) as f64);
                    Ok(taken)
                }),
            ),
        ],
    )?;
    results.ratio(
        "restore.concurrent20",
        ("slowest_of_20_s", medians[1]),
        ("one_s", medians[0]),
        Wanted::AtMost(1.5),
    );
    let size = pages.metadata()?.len() as f64;
    fs::copy(&pages, "/dev/null")?;
    let containerd = Containerd::start()?;
    let medians = results.medians(
        1,
        &mut [
            ("one by runc's shim, s", Box::new(|| slowest(&containerd, RUNC, None, 1))),
            ("20 by runc's shim, s", Box::new(|| slowest(&containerd, RUNC, None, SANDBOXES))),
            ("20 restored, s", Box::new(|| slowest(&containerd, STILLFRAME, Some(&image), SANDBOXES))),
        ],
    )?;
    // What it is to start so many at once here, with nothing to restore; and what restoring adds to that.
    results.ratio(
        "start.concurrent20.runc",
        ("slowest_of_20_s", medians[1]),
        ("one_s", medians[0]),
        Wanted::Nothing,
    );
    results.ratio(
        "restore.concurrent20.vs_runc",
        ("restored_s", medians[2]),
        ("runc_empty_s", medians[1]),
        Wanted::Nothing,
    );
    results.ratio(
        "restore.concurrent20.disk",
        ("read_bytes", median(read)),
        ("image_bytes", size),
        Wanted::AtMost(1.1),
    );
    Ok(())
}
