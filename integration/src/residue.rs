//! What is left of a container, or of a whole containerd: processes, mounts, cgroups, files.
//!
//! Everything of one containerd is known by its directory, by its namespace, by ids that begin with the namespace (or,
//! where the namespace is everybody's, that were written down), or by descent from its watchdog; so other containerds on the machine are never taken for it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::watchdog::Plan;

/// All that is there, one line each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Residue {
    /// Processes that containerd, its shims or their containers are or have started; not containerd itself.
    pub processes: Vec<String>,
    /// Mount points below the directory or the namespace's state.
    pub mounts: Vec<String>,
    /// Cgroups of containers.
    pub cgroups: Vec<String>,
    /// State of shims and runc, bundles, fifos.
    pub files: Vec<String>,
}

impl Residue {
    /// What there is of one containerd now. `watchdog` is the process id of its watchdog.
    pub fn of(plan: &Plan, watchdog: u32) -> Self {
        let bundles = entries(&bundles(plan)).into_iter().filter(|path| !hidden(path));
        let processes = descendants(watchdog).into_iter().filter(|process| process.exe != plan.containerd);
        let cgroups = cgroups(&plan.cgroup);
        Self {
            processes: processes.map(|process| format!("{} {}", process.pid, process.command)).collect(),
            mounts: mounts(plan).iter().map(|path| path.display().to_string()).collect(),
            // The namespace's own cgroup stays between containers; those below it are containers.
            cgroups: cgroups
                .iter()
                .flat_map(|path| directories(path))
                .map(|path| path.display().to_string())
                .collect(),
            // A namespace's own directory stays between containers, too.
            files: files(plan)
                .iter()
                .flat_map(
                    |path| if path.ends_with(&plan.namespace) { entries(path) } else { vec![path.clone()] },
                )
                .chain(bundles)
                .map(|path| path.display().to_string())
                .collect(),
        }
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Residue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = [
            ("process", &self.processes),
            ("mount", &self.mounts),
            ("cgroup", &self.cgroups),
            ("file", &self.files),
        ];
        for (kind, all) in kinds {
            for one in all {
                writeln!(f, "  {kind}: {one}")?;
            }
        }
        Ok(())
    }
}

/// A process, as /proc shows it.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its program; empty for one that is gone but not yet reaped.
    pub exe: PathBuf,
    /// Its command line.
    pub command: String,
}

/// All processes that descend from `root`, without itself.
pub fn descendants(root: u32) -> Vec<Process> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // A process that ends in this moment has no stat file any more, which is as it should be.
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        // "pid (comm) state ppid": comm may contain anything, so the last parenthesis counts.
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split(' ').nth(2)?.parse::<i32>().ok());
        children.entry(parent.unwrap_or(0)).or_default().push(pid);
    }
    let mut queue = vec![root as i32];
    let mut found = Vec::new();
    while let Some(parent) = queue.pop() {
        for &pid in children.get(&parent).into_iter().flatten() {
            queue.push(pid);
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).trim_end_matches('\0').replace('\0', " ");
            let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            found.push(Process { pid, exe, command });
        }
    }
    found
}

/// Mount points of this process's mount namespace below the directory or the namespace's state, in mount order.
pub fn mounts(plan: &Plan) -> Vec<PathBuf> {
    let state = owned(plan, Path::new("/run/stillframe"));
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points =
        text.lines().filter_map(|line| line.split(' ').nth(4)).map(|point| PathBuf::from(octal(point)));
    points
        .filter(|point| point.starts_with(&plan.dir) || state.iter().any(|state| point.starts_with(state)))
        .collect()
}

/// The cgroup of this name in each hierarchy that has one.
pub fn cgroups(name: &str) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let hierarchies: BTreeSet<PathBuf> = text
        .lines()
        .filter(|line| line.contains(" - cgroup ") || line.contains(" - cgroup2 "))
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| Path::new(&octal(point)).join(name))
        .filter(|path| path.is_dir())
        .collect();
    hierarchies.into_iter().collect()
}

/// What of the containers lies in the directories that all containerds share.
pub fn files(plan: &Plan) -> Vec<PathBuf> {
    let shared = [
        "/run/stillframe",
        "/run/containerd/runc",
        "/run/containerd/stillframe",
        "/var/lib/stillframe/filestore",
    ];
    let mut found: Vec<PathBuf> = shared
        .iter()
        .flat_map(|parent| owned(plan, Path::new(parent)))
        .filter(|path| path.exists())
        .collect();
    // A directory of random name for each task, with fifos that are called after the container. CRI has its own.
    for dir in entries(Path::new("/run/containerd/fifo")) {
        let ours = |path: &PathBuf| {
            let prefix = format!("{}-", plan.namespace);
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
        };
        if entries(&dir).iter().any(ours) {
            found.push(dir);
        }
    }
    found
}

/// What of `parent`, which has a directory for each namespace, belongs to one containerd.
fn owned(plan: &Plan, parent: &Path) -> Vec<PathBuf> {
    let namespace = parent.join(&plan.namespace);
    if plan.shared { ids(plan).iter().map(|id| namespace.join(id)).collect() } else { vec![namespace] }
}

/// Where a test that knows of a container's or a pod's id writes it, one a line.
pub fn ids_file(dir: &Path) -> PathBuf {
    dir.join("ids")
}

/// The ids that are known: of what there is now, and of what tests have known.
fn ids(plan: &Plan) -> BTreeSet<String> {
    let mut ids: BTreeSet<String> =
        fs::read_to_string(ids_file(&plan.dir)).unwrap_or_default().lines().map(str::to_owned).collect();
    let cri = plan.dir.join("root/io.containerd.grpc.v1.cri");
    for dir in [bundles(plan), cri.join("sandboxes"), cri.join("containers")] {
        let names = entries(&dir).into_iter().filter(|path| !hidden(path));
        ids.extend(names.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())));
    }
    ids
}

fn bundles(plan: &Plan) -> PathBuf {
    plan.dir.join("state/io.containerd.runtime.v2.task").join(&plan.namespace)
}

/// Where the shim of a container (or of a group that is called so) listens: containerd's SocketAddress.
pub fn shim_socket(address: &Path, namespace: &str, id: &str) -> PathBuf {
    let mut name = String::new();
    for byte in Sha256::digest(address.join(namespace).join(id).as_os_str().as_encoded_bytes()) {
        name.push_str(&format!("{byte:02x}"));
    }
    Path::new("/run/containerd/s").join(name)
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> =
        fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// The directories in a directory.
pub fn directories(dir: &Path) -> Vec<PathBuf> {
    entries(dir).into_iter().filter(|path| path.is_dir()).collect()
}

/// containerd renames a bundle to `.name` while it removes it.
fn hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'))
}

/// mountinfo writes spaces as `\040`; the directories here have none, other mounts may.
fn octal(point: &str) -> String {
    point.replace("\\040", " ")
}
