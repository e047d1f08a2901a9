//! The one place that cleans up: a process between the test and its containerd.
//!
//! ```text
//! test --pipe--> watchdog (subreaper) --> containerd --> shims --> containers
//! ```
//!
//! The watchdog starts containerd and then waits for its standard input to end. That happens when the test
//! closes it, and just as well when the test is killed, in whatever way: there is no second path for accidents.
//! Until then a line there is the wish that containerd be restarted: [`TERMINATE`] or [`KILL`] says how it is to end.
//! Since it is the subreaper of all that containerd starts, "everything that belongs to this containerd" is its
//! descendants, and their end can be awaited. Then it removes what Linux and containerd leave outside of
//! the directory: mounts, cgroups, runc's state, sockets and fifos. The directories that all containerds share
//! (`/run/containerd/s` and the like) stay, empty or not: another one may be about to use them.

use std::fs;
use std::io::{self, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::residue::{self, Residue};

/// How long containerd, and afterwards everything else, may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Restart containerd after it was asked to end.
pub const TERMINATE: &str = "terminate";
/// Restart containerd after it was killed.
pub const KILL: &str = "kill";

/// What the watchdog starts and removes; its only argument, as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// The directory with everything of this containerd.
    pub dir: PathBuf,
    /// containerd's namespace.
    pub namespace: String,
    /// Name of the cgroup, in each hierarchy, that those of the containers are in.
    pub cgroup: String,
    /// Whether others use the namespace, too, as with all that serve CRI: then only what has one of our ids is ours.
    pub shared: bool,
    /// The program.
    pub containerd: PathBuf,
    /// Its configuration file.
    pub config: PathBuf,
    /// Its standard error.
    pub log: PathBuf,
    /// Its PATH.
    pub path: String,
}

/// The watchdog's whole life. Gives what it couldn't remove.
///
/// Prints containerd's process id when it has been started. Whether it is ready its socket tells.
pub fn run(plan: &Plan) -> io::Result<Residue> {
    nix::sys::prctl::set_child_subreaper(true)?;
    let mut pid = start(plan)?;
    println!("{pid}");
    // An error is as good an end as any.
    for line in io::stdin().lines().map_while(Result::ok) {
        stop_containerd(pid, if line == KILL { Signal::SIGKILL } else { Signal::SIGTERM });
        pid = start(plan)?;
        println!("{pid}");
    }
    clean_up(plan, pid)
}

/// Starts containerd, and somebody to take leave of it.
fn start(plan: &Plan) -> io::Result<Pid> {
    let log = fs::File::options().create(true).append(true).open(&plan.log)?;
    // A process group of its own: what the terminal sends to the test doesn't end containerd first.
    let containerd = Command::new(&plan.containerd)
        .arg("--config")
        .arg(&plan.config)
        .env("PATH", &plan.path)
        // Where containerd puts checkpoints on their way to and from the shim.
        .env("XDG_RUNTIME_DIR", plan.dir.join("tmp"))
        .env("TMPDIR", plan.dir.join("tmp"))
        .env_remove("NOTIFY_SOCKET")
        // Mode `full` uses it; what only asks for a version of CRIU has another one in its PATH.
        .envs(crate::criu::find().ok().map(|criu| ("STILLFRAME_CRIU", criu)))
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()?;
    thread::spawn(reap);
    Ok(Pid::from_raw(containerd.id().try_into().expect("process ids are positive ints")))
}

fn clean_up(plan: &Plan, containerd: Pid) -> io::Result<Residue> {
    let sockets = shim_sockets(&plan.dir);
    let files = residue::files(plan);
    stop_containerd(containerd, Signal::SIGTERM);
    end_descendants(&plan.cgroup);
    unmount_all(plan);
    let deadline = Instant::now() + PATIENCE;
    for cgroup in residue::cgroups(&plan.cgroup) {
        remove_cgroup(&cgroup, deadline);
    }
    for path in residue::files(plan).into_iter().chain(files).chain(sockets) {
        remove(&path);
    }
    // The log is the last thing to go: who waits for the directory's end waits for the whole.
    remove(&plan.dir);
    let mut residue = Residue::of(plan, std::process::id());
    if plan.dir.exists() {
        residue.files.push(plan.dir.display().to_string());
    }
    Ok(residue)
}

/// Takes leave of every child that ends, also of those that we inherit. Ends with the last one.
fn reap() {
    while !matches!(waitpid(None::<Pid>, None), Err(Errno::ECHILD)) {}
}

/// containerd goes first, or it would still act on the death of the others.
fn stop_containerd(containerd: Pid, signal: Signal) {
    // It may have ended by itself; then there is nobody to signal.
    let _ = kill(containerd, signal);
    let deadline = Instant::now() + PATIENCE;
    while kill(containerd, None).is_ok() {
        if Instant::now() > deadline {
            let _ = kill(containerd, Signal::SIGKILL);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Kills until nobody is left; who is killed may leave children behind, which become ours.
fn end_descendants(cgroup: &str) {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        // A frozen process doesn't die before it's thawed.
        for cgroup in residue::cgroups(cgroup).iter().flat_map(|cgroup| residue::directories(cgroup)) {
            for (file, word) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
                // A hierarchy without a freezer has no such file.
                let _ = fs::OpenOptions::new()
                    .write(true)
                    .open(cgroup.join(file))
                    .and_then(|mut f| f.write_all(word.as_bytes()));
            }
        }
        let living = residue::descendants(std::process::id());
        if living.is_empty() {
            return;
        }
        for process in &living {
            // Whoever is gone by now needs no signal.
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn unmount_all(plan: &Plan) {
    // Mounts can lie on each other: as many rounds as there are layers.
    for _ in 0..16 {
        let mounts = residue::mounts(plan);
        if mounts.is_empty() {
            return;
        }
        for mount in mounts.iter().rev() {
            // What is left is found by the residue at the end.
            let _ = umount2(mount, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
    }
}

/// A cgroup goes when its last process is reaped; children before parents.
fn remove_cgroup(cgroup: &Path, deadline: Instant) {
    loop {
        let removed = remove_cgroup_once(cgroup);
        if removed.is_ok() || Instant::now() > deadline {
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn remove_cgroup_once(cgroup: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(cgroup) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_cgroup_once(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}

/// The sockets of shims that can no longer remove them: their address is in the bundle.
fn shim_sockets(dir: &Path) -> Vec<PathBuf> {
    let mut sockets = Vec::new();
    let bundles = dir.join("state/io.containerd.runtime.v2.task");
    for namespace in fs::read_dir(bundles).into_iter().flatten().flatten() {
        for bundle in fs::read_dir(namespace.path()).into_iter().flatten().flatten() {
            if let Ok(address) = fs::read_to_string(bundle.path().join("address")) {
                sockets.extend(address.trim().strip_prefix("unix://").map(PathBuf::from));
            }
        }
    }
    sockets
}

/// A directory as a whole, or a file; what can't be removed the residue reports.
fn remove(path: &Path) {
    let _ = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    };
}

/// How a process ended, in words.
pub fn ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (_, Some(signal)) => format!("signal {signal}"),
        _ => format!("{status:?}"),
    }
}
