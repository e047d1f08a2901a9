//! Containers under Stillframe's shim, against runc's own shim, in one containerd.

use std::fs;
use std::path::Path;

use stillframe_integration::{Container, Containerd, RUNC, STILLFRAME};

use crate::Result;
use crate::data;
use crate::series::{Results, Wanted, median, seconds};

type Benchmark = (&'static str, fn(&mut Results) -> Result<()>);

/// The benchmarks of containers.
pub const ALL: &[Benchmark] =
    &[("runtime", runtime), ("shim.rss", shim_rss), ("start", start), ("pause.ctr", pause_ctr)];

/// fio from the host, in a container whose `/scratch` is a tmpfs.
fn with_fio<'a>(containerd: &'a Containerd, name: &str, runtime: &str) -> Result<Container<'a>> {
    let spec = containerd.container(name).runtime(runtime).tmpfs("/scratch", "size=2g");
    let spec = ["/usr", "/lib", "/lib64"].iter().fold(spec, |spec, dir| spec.bind(dir, dir));
    Ok(spec.start()?)
}

/// One run of fio: operations a second.
fn fio(container: &Container<'_>, job: &[&str]) -> Result<f64> {
    let common = [
        "/usr/bin/fio",
        "--name=x",
        "--directory=/scratch",
        "--output-format=json",
        "--time_based",
        "--runtime=2",
    ];
    let report = container.exec(&[&common[..], job].concat())?.stdout;
    let report: serde_json::Value =
        serde_json::from_str(&report[report.find('{').ok_or("fio printed no report")?..])?;
    let job = &report["jobs"][0];
    let iops = ["read", "write"].iter().filter_map(|kind| job[*kind]["iops"].as_f64()).sum::<f64>();
    if iops > 0.0 { Ok(iops) } else { Err("fio reports no operations".into()) }
}

/// Files made and removed in a second, by a shell in the container.
fn create_unlink(container: &Container<'_>) -> Result<f64> {
    let files = 20_000;
    let line = format!(
        "cd /scratch && mkdir -p d && i=0; while [ $i -lt {files} ]; do : > d/$i; i=$((i+1)); done; rm -r d"
    );
    Ok(f64::from(files) / seconds(|| Ok(container.shell(&line).map(|_| ())?))?)
}

fn runtime(results: &mut Results) -> Result<()> {
    let containerd = Containerd::start()?;
    let (ours, runcs) = (with_fio(&containerd, "ours", STILLFRAME)?, with_fio(&containerd, "runcs", RUNC)?);
    let jobs: [(&str, &[&str]); 3] = [
        ("randread", &["--rw=randread", "--bs=4k", "--size=512m", "--ioengine=psync"]),
        ("randwrite", &["--rw=randwrite", "--bs=4k", "--size=512m", "--ioengine=psync"]),
        ("mmap", &["--rw=randwrite", "--bs=4k", "--size=512m", "--ioengine=mmap"]),
    ];
    let mut ratios = Vec::new();
    for (name, job) in jobs {
        let medians = results.medians(
            1,
            &mut [
                ("stillframe, 1/s", Box::new(|| fio(&ours, job))),
                ("runc, 1/s", Box::new(|| fio(&runcs, job))),
            ],
        )?;
        ratios.push(medians[0] / medians[1]);
        results.ratio(
            &format!("runtime.{name}"),
            ("stillframe_per_s", medians[0]),
            ("runc_per_s", medians[1]),
            Wanted::Nothing,
        );
    }
    let medians = results.medians(
        1,
        &mut [
            ("stillframe, files/s", Box::new(|| create_unlink(&ours))),
            ("runc, files/s", Box::new(|| create_unlink(&runcs))),
        ],
    )?;
    ratios.push(medians[0] / medians[1]);
    results.ratio(
        "runtime.create",
        ("stillframe_per_s", medians[0]),
        ("runc_per_s", medians[1]),
        Wanted::Nothing,
    );
    let mean = ratios.iter().product::<f64>().powf(1.0 / ratios.len() as f64);
    results.put(
        "runtime.vs_runc",
        mean,
        "ratio",
        serde_json::json!({ "geometric_mean_of": ratios }),
        Wanted::AtLeast(0.98),
    );
    Ok(())
}

/// Resident memory of the one shim of a containerd, in bytes.
fn resident(containerd: &Containerd) -> Result<f64> {
    let shims = containerd.shims();
    let [shim] = shims.as_slice() else { return Err(format!("{} shims, not one", shims.len()).into()) };
    let status = fs::read_to_string(format!("/proc/{}/status", shim.pid))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? * 1024.0)
}

fn shim_rss(results: &mut Results) -> Result<()> {
    let containerd = Containerd::start()?;
    let measure = |runtime: &str| {
        let container = containerd.container("rss").runtime(runtime).start()?;
        container.exec(&["true"])?;
        let resident = resident(&containerd)?;
        container.remove()?;
        Ok(resident)
    };
    let medians = results.medians(
        1,
        &mut [
            ("stillframe, bytes", Box::new(|| measure(STILLFRAME))),
            ("runc, bytes", Box::new(|| measure(RUNC))),
        ],
    )?;
    results.ratio(
        "shim.rss.vs_runc_v2",
        ("stillframe_bytes", medians[0]),
        ("runc_bytes", medians[1]),
        Wanted::AtMost(0.6),
    );
    Ok(())
}

fn start(results: &mut Results) -> Result<()> {
    let containerd = Containerd::start()?;
    let measure = |runtime: &str| {
        let spec = containerd.container("start").runtime(runtime).arguments(&["/bin/true"]);
        seconds(|| Ok(spec.run().map(|_| ())?))
    };
    // The first runs read programs from the disk.
    for runtime in [STILLFRAME, RUNC] {
        median(vec![measure(runtime)?]);
    }
    let medians = results.medians(
        4,
        &mut [("stillframe, s", Box::new(|| measure(STILLFRAME))), ("runc, s", Box::new(|| measure(RUNC)))],
    )?;
    results.ratio(
        "start.vs_runc_v2",
        ("stillframe_s", medians[0]),
        ("runc_s", medians[1]),
        Wanted::AtMost(1.05),
    );
    Ok(())
}

/// How long an application is stopped by a checkpoint through containerd: 4 GiB in 100,000 files and one, each way. Not interleaved:
/// there isn't the memory for it, and only one of them has a bound.
fn pause_ctr(results: &mut Results) -> Result<()> {
    let ways = [("plain", false, false), ("image-dir", true, false), ("precopy and image-dir", true, true)];
    let mut pauses = Vec::new();
    for (way, image_dir, precopy) in ways {
        pauses.push(pause_of(results, way, image_dir, precopy)?);
    }
    let of = serde_json::json!({ "plain_ms": pauses[0], "image_dir_ms": pauses[1] });
    results.put("pause.ctr.ms", pauses[2], "ms", of, Wanted::AtMost(250.0));
    Ok(())
}

fn pause_of(results: &Results, way: &str, image_dir: bool, precopy: bool) -> Result<f64> {
    let containerd = Containerd::start()?;
    let scratch = data::scratch()?;
    let pages = scratch.path().join("pages");
    let mut spec = containerd.container("ctr").tmpfs("/scratch", "size=8g");
    if image_dir {
        spec = spec.annotation("dev.stillframe.image-dir", &pages.to_string_lossy());
    }
    if precopy {
        spec = spec.annotation("dev.stillframe.precopy", "on");
    }
    let container = spec.start()?;
    let state = Path::new("/run/stillframe").join(containerd.namespace()).join(container.id());
    // Among those that ctr gives every container.
    let mounts = fs::read_dir(state.join("filesystems"))?.flatten().map(|entry| entry.path().join("mnt"));
    let mut large = mounts.filter(|mount| {
        rustix::fs::statvfs(mount)
            .is_ok_and(|filesystem| filesystem.f_blocks * filesystem.f_frsize == 8 << 30)
    });
    let mount = large.next().ok_or("the container has no filesystem of 8 GiB")?;
    data::many(&mount, 100_000, 21_474)?;
    data::large(&mount, 2 << 30)?;
    let measure = || {
        // Another for each: none may run for as long as five slow ones take.
        let mut meter = container.exec_background(&["probe", "pause-meter"])?;
        meter.expect_line("ready", |line| line == "ready")?;
        let mut ask = || -> Result<f64> {
            meter.write(b"\n")?;
            let line = meter.expect_line("the pause", |line| line.starts_with("pause_ms="))?;
            let figure =
                line.trim_start_matches("pause_ms=").split(' ').next().and_then(|ms| ms.parse().ok());
            figure.ok_or_else(|| "the meter said no pause".into())
        };
        // What the scheduler does anyway is forgotten.
        ask()?;
        let image = "localhost/bench:1";
        containerd.checkpoint(container.id(), image)?;
        let pause = ask()?;
        let phases = containerd.last_checkpoint(container.id())?.phases;
        let phases: Vec<String> =
            phases.iter().map(|time| format!("{} {:.1}", time.phase, time.ms)).collect();
        eprintln!("bench:   the shim's part, ms: {}", phases.join(", "));
        containerd.ctr().run(&["images", "rm", "--sync", image])?;
        if image_dir {
            fs::remove_dir_all(&pages)?;
        }
        Ok(pause)
    };
    let medians = results.medians(1, &mut [(&format!("ctr, {way}, ms"), Box::new(measure))])?;
    container.remove()?;
    Ok(medians[0])
}
