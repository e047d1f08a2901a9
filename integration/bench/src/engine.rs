//! Saving and restoring, against the tools of today and against what the disk and the kernel can do at most.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::Result;
use crate::data::{self, disk_ceiling, evict, run, scratch};
use crate::sandbox::Bench;
use crate::series::{Results, Wanted, seconds};

type Benchmark = (&'static str, fn(&mut Results) -> Result<()>);

/// The benchmarks of the engine.
pub const ALL: &[Benchmark] = &[
    ("save.large", save_large),
    ("save.small", save_small),
    ("save.sparse", save_sparse),
    ("save.zeros", save_zeros),
    ("restore.large", restore_large),
    ("restore.small", restore_small),
];

const LARGE: u64 = 2 << 30;
const FILES: usize = 50_000;

/// Saves and throws the image away; the seconds of the checkpoint alone.
fn save(bench: &Bench, scratch: &Path) -> Result<f64> {
    let image = scratch.join("image");
    let taken = seconds(|| bench.checkpoint(&image).map(|_| ()))?;
    fs::remove_dir_all(&image)?;
    Ok(taken)
}

/// Makes something with a tool and makes it durable.
fn with_tool(scratch: &Path, program: &str, arguments: &[&str]) -> Result<f64> {
    let made = scratch.join("made");
    let path = made.to_string_lossy();
    let arguments: Vec<&str> =
        arguments.iter().map(|argument| if *argument == "@" { &*path } else { *argument }).collect();
    let taken = seconds(|| {
        run(program, &arguments)?;
        Ok(File::open(&made)?.sync_all()?)
    })?;
    fs::remove_file(&made)?;
    Ok(taken)
}

fn save_large(results: &mut Results) -> Result<()> {
    let scratch = scratch()?;
    let bench = Bench::prepare(None)?.start()?;
    let mount = bench.mount();
    data::large(&mount, LARGE)?;
    let mount = mount.to_string_lossy().into_owned();
    let medians = results.medians(
        1,
        &mut [
            ("ceiling, bytes/s", Box::new(|| disk_ceiling(scratch.path(), "write", LARGE))),
            ("stillframe, s", Box::new(|| save(&bench, scratch.path()))),
            ("tar, s", Box::new(|| with_tool(scratch.path(), "tar", &["cf", "@", "-C", &mount, "."]))),
        ],
    )?;
    let (ceiling, ours, tar) = (medians[0], medians[1], medians[2]);
    let rate = LARGE as f64 / ours;
    results.ratio(
        "save.large.vs_ceiling",
        ("stillframe_bytes_per_s", rate),
        ("disk_bytes_per_s", ceiling),
        Wanted::AtLeast(0.9),
    );
    results.ratio("save.large.vs_tar", ("tar_s", tar), ("stillframe_s", ours), Wanted::AtLeast(3.0));
    Ok(())
}

fn versus(
    results: &mut Results,
    name: &str,
    fill: impl FnOnce(&Path) -> Result<()>,
    tool: (&str, &[&str]),
    wanted: f64,
) -> Result<()> {
    let scratch = scratch()?;
    let bench = Bench::prepare(None)?.start()?;
    fill(&bench.mount())?;
    let mount = bench.mount().to_string_lossy().into_owned();
    let arguments: Vec<String> = tool.1.iter().map(|argument| argument.replace("MOUNT", &mount)).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let medians = results.medians(
        1,
        &mut [
            ("stillframe, s", Box::new(|| save(&bench, scratch.path()))),
            (tool.0, Box::new(|| with_tool(scratch.path(), tool.0, &arguments))),
        ],
    )?;
    results.ratio(
        name,
        (&format!("{}_s", tool.0), medians[1]),
        ("stillframe_s", medians[0]),
        Wanted::AtLeast(wanted),
    );
    Ok(())
}

fn save_small(results: &mut Results) -> Result<()> {
    let tar: &[&str] = &["cf", "@", "-C", "MOUNT", "."];
    versus(results, "save.small.vs_tar", |dir| data::small(dir, FILES), ("tar", tar), 4.0)
}

fn save_sparse(results: &mut Results) -> Result<()> {
    let tar: &[&str] = &["cSf", "@", "-C", "MOUNT", "."];
    versus(results, "save.sparse.vs_tar", |dir| data::sparse(dir, 8 << 30), ("tar", tar), 10.0)
}

fn save_zeros(results: &mut Results) -> Result<()> {
    let cp: &[&str] = &["--sparse=always", "MOUNT/zeros", "@"];
    let fill = |dir: &Path| {
        let file = File::create(dir.join("zeros"))?;
        let zeros = vec![0; 1 << 20];
        (0..1024).try_for_each(|mib| file.write_all_at(&zeros, mib << 20))?;
        Ok(())
    };
    versus(results, "save.zeros.vs_cp", fill, ("cp", cp), 2.0)
}

/// Restores into a fresh sandbox; the seconds of that alone.
fn restore(image: &Path) -> Result<f64> {
    let mut bench = None;
    let taken = seconds(|| {
        bench = Some(Bench::prepare(Some(image))?);
        Ok(())
    })?;
    drop(bench);
    Ok(taken)
}

/// Bytes a second at which two threads fill fresh pages of a tmpfs.
fn allocation_ceiling(bytes: u64) -> Result<f64> {
    let bench = Bench::prepare(None)?;
    let block = data::noise(1 << 20)?;
    let mount = bench.mount();
    let fill = |name: &str| -> std::io::Result<()> {
        let file = File::create(mount.join(name))?;
        (0..bytes / 2 / (1 << 20)).try_for_each(|mib| file.write_all_at(&block, mib << 20))
    };
    let taken = seconds(|| {
        Ok(std::thread::scope(|scope| {
            let other = scope.spawn(|| fill("a"));
            fill("b").and(other.join().expect("filling doesn't panic"))
        })?)
    })?;
    Ok(bytes as f64 / taken)
}

fn restore_large(results: &mut Results) -> Result<()> {
    let scratch = scratch()?;
    let image = scratch.path().join("image");
    {
        let bench = Bench::prepare(None)?.start()?;
        data::large(&bench.mount(), LARGE)?;
        bench.checkpoint(&image)?;
    }
    let medians = results.medians(
        1,
        &mut [
            ("disk, bytes/s", Box::new(|| disk_ceiling(scratch.path(), "read", LARGE))),
            ("allocation, bytes/s", Box::new(|| allocation_ceiling(LARGE))),
            (
                "stillframe, s",
                Box::new(|| {
                    evict(&image.join("pages.img"))?;
                    restore(&image)
                }),
            ),
            ("stillframe, cached, s", Box::new(|| restore(&image))),
        ],
    )?;
    let ceiling = medians[0].min(medians[1]);
    let rate = LARGE as f64 / medians[2];
    results.ratio(
        "restore.large.vs_ceiling",
        ("stillframe_bytes_per_s", rate),
        ("ceiling_bytes_per_s", ceiling),
        Wanted::AtLeast(0.8),
    );
    let rate = LARGE as f64 / medians[3];
    results.ratio(
        "restore.large.cached",
        ("stillframe_bytes_per_s", rate),
        ("allocation_bytes_per_s", medians[1]),
        Wanted::Nothing,
    );
    Ok(())
}

fn restore_small(results: &mut Results) -> Result<()> {
    let scratch = scratch()?;
    let image = scratch.path().join("image");
    let archive = scratch.path().join("tar").to_string_lossy().into_owned();
    {
        let bench = Bench::prepare(None)?.start()?;
        data::small(&bench.mount(), FILES)?;
        bench.checkpoint(&image)?;
        run("tar", &["cf", &archive, "-C", &bench.mount().to_string_lossy(), "."])?;
    }
    // Both from the page cache: what is compared is making the files.
    fs::copy(image.join("pages.img"), "/dev/null")?;
    let untar = || {
        let bench = Bench::prepare(None)?;
        let into = bench.mount().to_string_lossy().into_owned();
        seconds(|| run("tar", &["xf", &archive, "-C", &into]).map(|_| ()))
    };
    let medians = results
        .medians(1, &mut [("stillframe, s", Box::new(|| restore(&image))), ("tar, s", Box::new(untar))])?;
    results.ratio(
        "restore.small.vs_tar",
        ("tar_s", medians[1]),
        ("stillframe_s", medians[0]),
        Wanted::AtLeast(2.0),
    );
    Ok(())
}
