//! `make demo`: a container's memory-backed filesystems survive the container. Told while it happens.
//!
//! With `ctr` alone, against a private containerd. Exits with 1 and names path and attribute if anything that is
//! restored differs from what was saved; leaves nothing behind, however it ends.

use std::collections::BTreeSet;
use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use stillframe_integration::checkpoint::LastCheckpoint;
use stillframe_integration::{Background, Container, Containerd, Difference, Listing, STILLFRAME, compare};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const FILESYSTEMS: [&str; 2] = ["/scratch", "/dev/shm"];
const CHECKPOINT: &str = "stillframe.test/checkpoint:demo";
const GUEST: &str = "/scratch/covered";

fn main() -> ExitCode {
    match demo() {
        Ok(proved) if proved.iter().all(|(_, ok)| *ok) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("\nThe demo failed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What was to be shown, and whether it was.
type Proved = Vec<(String, bool)>;

fn demo() -> Result<Proved> {
    step(1, "a private containerd; a container with two tmpfs mounts, filled with a real tree");
    let containerd = Containerd::start()?;
    let version = containerd.ctr().run(&["version"])?.stdout;
    let version = version.lines().rev().find_map(|line| line.trim().strip_prefix("Version:")).unwrap_or("?");
    say(&format!("containerd {}", version.trim()));
    let container = containerd
        .container("demo")
        .option("--cap-add=CAP_SYS_ADMIN")
        .tmpfs("/scratch", &format!("size={}m", scratch_size()?))
        .bind("/usr/include", "/host-include")
        .start()?;
    say(&format!("running: {} with runtime {STILLFRAME}", container.id()));
    fill(&container)?;
    let hold = ready(container.exec_background(&["probe", "hold", "/scratch"])?)?;
    say("/scratch: one more file is open but unlinked");
    let before = look(&container)?;

    step(2, &format!("the container mounts a tmpfs of its own over {GUEST}"));
    container.exec(&["probe", "mount-tmpfs", GUEST])?;
    container.shell(&format!("echo guest > {GUEST}/guest-file"))?;
    say(&container
        .shell(&format!("ls {GUEST}; grep ' {GUEST} ' /proc/mounts"))?
        .stdout
        .trim()
        .replace('\n', "\n    "));

    step(3, &format!("ctr containers checkpoint --task {} {CHECKPOINT}", container.id()));
    let mut meter = ready(container.exec_background(&["probe", "pause-meter"])?)?;
    let quiet = pause(&mut meter)?;
    let begin = Instant::now();
    containerd.checkpoint(container.id(), CHECKPOINT)?;
    let whole = begin.elapsed();
    let paused = pause(&mut meter)?;
    let saved = containerd.last_checkpoint(container.id())?;
    figures(&saved, paused, quiet, whole.as_secs_f64() * 1e3);

    let mut proved = Proved::new();
    let still = look(&container)?;
    let unchanged = before.iter().zip(&still).map(|(before, still)| {
        let below = |path: &str| path.starts_with("./covered");
        compare(&before.clone().without_objects(below), &still.clone().without_objects(below))
    });
    prove(
        &mut proved,
        "the container ran on, its filesystems unchanged",
        &unchanged.flatten().collect::<Vec<_>>(),
    );
    look_into_the_image(&containerd, &mut proved)?;

    step(4, "the container is killed and removed");
    drop((meter, hold));
    container.remove()?;
    let residue = containerd.settled_residue();
    if !residue.is_empty() {
        say(&format!("left behind:\n{residue}"));
    }
    proved.push(("nothing was left of it: no process, mount, cgroup, file".to_owned(), residue.is_empty()));
    say("its tmpfs mounts and their memory are gone");

    let id = containerd.id("restored");
    step(5, &format!("ctr containers restore --live {id} {CHECKPOINT}"));
    let begin = Instant::now();
    let container = Container::restore(&containerd, "restored", CHECKPOINT)?;
    say(&format!("running again after {:.0} ms", begin.elapsed().as_secs_f64() * 1e3));
    let after = look(&container)?;
    for ((path, before), after) in FILESYSTEMS.iter().zip(&before).zip(&after) {
        let what = format!(
            "{path}: {} objects with {} attributes are what they were",
            before.len(),
            before.attributes()
        );
        prove(&mut proved, &what, &compare(before, after));
    }
    let hidden = container.shell(&format!("cat {GUEST}/hidden"))?.stdout == "hidden below\n";
    proved.push((format!("{GUEST}/hidden, which the guest's mount had covered, is back"), hidden));
    let guest = container
        .shell(&format!("test -e {GUEST}/guest-file || ! grep -q ' {GUEST} ' /proc/mounts && echo gone"))?;
    proved.push(("the guest's own tmpfs is not".to_owned(), guest.stdout == "gone\n"));
    container.shell("echo alive > /scratch/new && rm /scratch/new")?;
    container.remove()?;
    let residue = containerd.settled_residue();
    proved.push(("nothing is left of the restored one either".to_owned(), residue.is_empty()));

    step(6, "what was proved");
    containerd.stop()?;
    proved.push(("the private containerd is gone with all it had".to_owned(), true));
    for (what, ok) in &proved {
        println!("  {}  {what}", if *ok { "yes" } else { " NO" });
    }
    Ok(proved)
}

fn step(number: u32, what: &str) {
    println!("\n{number}. {what}");
}

fn say(what: &str) {
    println!("    {what}");
}

/// MiB: 256, or more where /usr/include is larger than usual.
fn scratch_size() -> Result<u64> {
    let said =
        stillframe_integration::ctr::run(std::process::Command::new("du").args(["-sm", "/usr/include"]))?;
    let include: u64 = said.stdout.split_whitespace().next().unwrap_or_default().parse()?;
    Ok((include + 64 + 50).max(256))
}

fn fill(container: &Container<'_>) -> Result<()> {
    let big = (64u64 << 20).to_string();
    let options = ["--seed", "1", "--big", &big, "--copy", "/host-include", "--beyond-path-max"];
    let scratch = container.exec(&[&["probe", "fill", "/scratch"][..], &options].concat())?;
    let shm = container.exec(&["probe", "fill", "/dev/shm", "--seed", "2"])?;
    // Below what the guest will mount; the directory's times must not depend on the moment.
    container.shell(&format!(
        "mkdir {GUEST} && echo hidden below > {GUEST}/hidden && touch -d @1 {GUEST}/hidden {GUEST}"
    ))?;
    for (path, said) in FILESYSTEMS.iter().zip([scratch, shm]) {
        say(&format!("{path}: {}", said.stdout.trim().replace('\n', "; ")));
    }
    Ok(())
}

fn look(container: &Container<'_>) -> Result<Vec<Listing>> {
    let mut listings = Vec::new();
    for path in FILESYSTEMS {
        let listing = container.list(path)?;
        let kinds = ["file", "dir", "symlink", "fifo", "socket", "char", "block"];
        let counts: Vec<_> = kinds.iter().map(|kind| format!("{} {kind}", listing.count(kind))).collect();
        let with = [("xattr.", "with xattrs"), ("linked-with", "hard-linked")];
        let more: Vec<_> =
            with.iter().map(|(name, what)| format!("{} {what}", listing.with_attribute(name))).collect();
        say(&format!("{path} seen from inside: {}, {}", counts.join(", "), more.join(", ")));
        listings.push(listing);
    }
    Ok(listings)
}

fn ready(mut process: Background) -> Result<Background> {
    process.expect_line("ready", |line| line == "ready")?;
    Ok(process)
}

/// The longest time in milliseconds, since the last question, that a process in the container didn't run.
fn pause(meter: &mut Background) -> Result<f64> {
    meter.write(b"\n")?;
    let line = meter.expect_line("the pause", |line| line.starts_with("pause_ms="))?;
    Ok(line["pause_ms=".len()..].split(' ').next().unwrap_or_default().parse()?)
}

fn figures(saved: &LastCheckpoint, paused: f64, quiet: f64, whole: f64) {
    let gb = saved.pages_bytes as f64 / 1e9;
    say(&format!("filesystems        {:>10}", saved.filesystems.len()));
    say(&format!("files, entries     {:>10}, {}", saved.files, saved.entries));
    say(&format!(
        "pages written      {:>10.1} MB, of files of {:.1} GB with their holes",
        gb * 1e3,
        saved.logical_bytes as f64 / 1e9
    ));
    say(&format!("save time          {:>10.1} ms, {:.2} GB/s", saved.total_ms, gb / (saved.total_ms / 1e3)));
    say(&format!("frozen for it      {:>10.1} ms", saved.frozen_ms));
    say(&format!(
        "pause seen inside  {paused:>10.1} ms, with containerd's own part: it pauses, and stores the image"
    ));
    say(&format!("                   {quiet:>10.1} ms is the longest without a checkpoint"));
    say(&format!("the whole command  {whole:>10.1} ms"));
}

fn prove(proved: &mut Proved, what: &str, differences: &[Difference]) {
    const SHOWN: usize = 20;
    for difference in differences.iter().take(SHOWN) {
        println!("    DIFFERENT: {difference}");
    }
    if differences.len() > SHOWN {
        let kinds: BTreeSet<_> = differences.iter().map(|difference| difference.attribute.as_str()).collect();
        println!("    ... and {} more, all in all of {kinds:?}", differences.len() - SHOWN);
    }
    proved.push((what.to_owned(), differences.is_empty()));
}

/// The four files, out of containerd's content store; `stillframe inspect` says what is in them.
fn look_into_the_image(containerd: &Containerd, proved: &mut Proved) -> Result<()> {
    let dir = containerd.dir().join("unpacked");
    containerd.unpack_checkpoint(CHECKPOINT, &dir)?;
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&dir)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    say(&format!("the image: {}", names.join(", ")));
    let seen = containerd.stillframe(&["inspect", "--list", &dir.to_string_lossy()])?.stdout;
    for line in seen.lines().take(8) {
        say(&format!("  {line}"));
    }
    let flat = names == ["manifest.json", "pages.img", "pages.meta", "tree.tar"];
    proved.push(("the image is four flat files, verified by `stillframe inspect`".to_owned(), flat));
    let right = seen.contains("covered/hidden") && !seen.contains("guest-file");
    proved.push(("the image has the covered file, and not the guest's tmpfs".to_owned(), right));
    Ok(())
}
