//! The mount plan: which mounts of a spec become filesystems of ours, and which are left to runc.
//!
//! Taken: every mount of type `tmpfs`, since it is empty at the start and its contents are the
//! application's. Left:
//!
//! - `/dev` itself: runc fills it with device nodes, consoles and links after mounting it;
//! - below `/proc` and `/sys`: these tmpfs hide something of the kernel's (masked paths) or hold cgroup
//!   mountpoints; there is no application data there, and runc forbids bind mounts over `/proc`;
//! - the root `/`, which isn't a mount of the spec's.
//!
//! Mounts of other types, `cgroup` and `mqueue` among them, are runc's.

use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;
use stillframe_tmpfs::copy_up::open_in_root;
use stillframe_tmpfs::options::{OptionsError, TmpfsOptions};
use stillframe_tmpfs::resource::clean;

use crate::spec::Spec;

/// A mount of the spec that becomes a filesystem of ours.
#[derive(Clone, Debug)]
pub struct PlannedMount {
    /// Its number in the spec's mounts.
    pub index: usize,
    /// Destination in the container, clean.
    pub destination: String,
    /// Its options, parsed.
    pub options: TmpfsOptions,
    /// Its source, as mountinfo shows it.
    pub source: Option<String>,
    /// The directory that it will cover.
    pub below: Below,
    /// Mountpoints of later mounts that lie on it.
    pub mountpoints: Vec<Mountpoint>,
}

/// A place on a filesystem where something else will be mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mountpoint {
    /// Path from the filesystem's root.
    pub path: String,
    /// A directory, else a file.
    pub directory: bool,
}

/// What is at a mount's destination before it is mounted.
#[derive(Clone, Debug)]
pub enum Below {
    /// Nothing, as far as can be known: runc makes the directory.
    Nothing,
    /// This directory of the host: in the rootfs, or in the source of a bind mount.
    Directory {
        /// A directory of the host ...
        root: PathBuf,
        /// ... and the path from there, resolved as if chrooted.
        path: String,
    },
    /// The root of the filesystem of an earlier planned mount, by its number in the plan.
    Planned(usize),
}

/// Why a spec has no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// An option of a tmpfs can't be honoured.
    #[error("mount {destination}")]
    Options {
        /// Destination of the mount.
        destination: String,
        /// Which option, and why.
        #[source]
        source: OptionsError,
    },
    /// The rootfs couldn't be looked into.
    #[error("look for {path} in {root}")]
    Rootfs {
        /// Root of the search.
        root: PathBuf,
        /// Path in it.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The filesystems of a spec, in its order. `rootfs` is where the container's root is mounted.
pub fn plan(spec: &Spec, rootfs: &Path) -> Result<Vec<PlannedMount>, PlanError> {
    let mut planned: Vec<PlannedMount> = Vec::new();
    for (index, mount) in spec.mounts().iter().enumerate() {
        if !is_taken(mount) {
            continue;
        }
        let destination = destination(mount);
        let options = mount.options().clone().unwrap_or_default();
        let options = TmpfsOptions::parse(&options)
            .map_err(|source| PlanError::Options { destination: destination.clone(), source })?;
        let source = mount.source().as_ref().map(|source| source.to_string_lossy().into_owned());
        let below = below(&spec.mounts()[..index], &planned, &destination, rootfs)?;
        let mountpoints = Vec::new();
        planned.push(PlannedMount { index, destination, options, source, below, mountpoints });
    }
    for (index, mount) in spec.mounts().iter().enumerate() {
        let destination = destination(mount);
        let Some((on, _, at)) = innermost(&spec.mounts()[..index], &destination) else { continue };
        if let Some(planned) = planned.iter_mut().find(|planned| planned.index == on) {
            let path = destination[at.len()..].to_owned();
            let is_file = || is_bind(mount) && mount.source().as_ref().is_some_and(|source| !source.is_dir());
            planned.mountpoints.push(Mountpoint { path, directory: !is_file() });
        }
    }
    Ok(planned)
}

/// The mount among `earlier` that a path lies on, with its number and clean destination: the last of the
/// longest, since a later mount at the same place covers an earlier one.
fn innermost<'a>(earlier: &'a [Mount], path: &str) -> Option<(usize, &'a Mount, String)> {
    let on = earlier.iter().enumerate().filter_map(|(index, mount)| {
        let at = destination(mount);
        is_at_or_below(path, &at).then_some((index, mount, at))
    });
    on.max_by_key(|(index, _, at)| (at.len(), *index))
}

fn destination(mount: &Mount) -> String {
    clean(&mount.destination().to_string_lossy())
}

/// Whether a mount becomes ours; the module's documentation gives the reasons.
fn is_taken(mount: &Mount) -> bool {
    let destination = destination(mount);
    mount.typ().as_deref() == Some("tmpfs")
        && destination != "/"
        && destination != "/dev"
        && !is_at_or_below(&destination, "/proc")
        && !is_at_or_below(&destination, "/sys")
}

fn is_at_or_below(path: &str, directory: &str) -> bool {
    path.strip_prefix(directory).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// What a mount at `destination` covers: the innermost of the `earlier` mounts that it lies on decides.
fn below(
    earlier: &[Mount],
    planned: &[PlannedMount],
    destination: &str,
    rootfs: &Path,
) -> Result<Below, PlanError> {
    let (root, path) = match innermost(earlier, destination) {
        None => (rootfs.to_owned(), destination.to_owned()),
        Some((index, mount, at)) => {
            let rest = destination[at.len()..].to_owned();
            let ours = planned.iter().position(|plan| plan.index == index);
            match (ours, is_bind(mount), mount.source()) {
                (Some(number), _, _) if rest.is_empty() => return Ok(Below::Planned(number)),
                (None, true, Some(source)) => (source.clone(), rest),
                // Fresh, so nothing is there; or the kernel's (proc, sysfs), where nothing is known.
                _ => return Ok(Below::Nothing),
            }
        }
    };
    match open_in_root(&root, &path) {
        Ok(Some(_)) => Ok(Below::Directory { root, path }),
        Ok(None) => Ok(Below::Nothing),
        Err(source) => Err(PlanError::Rootfs { root, path, source }),
    }
}

fn is_bind(mount: &Mount) -> bool {
    let options = mount.options().as_deref().unwrap_or_default();
    mount.typ().as_deref() == Some("bind")
        || options.iter().any(|option| option == "bind" || option == "rbind")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn spec(mounts: &str) -> Spec {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), format!(r#"{{"mounts":[{mounts}]}}"#)).unwrap();
        Spec::read(dir.path()).unwrap()
    }

    fn tmpfs(destination: &str) -> String {
        format!(r#"{{"destination":"{destination}","type":"tmpfs"}}"#)
    }

    #[test]
    fn tmpfs_mounts_are_taken_but_for_the_kernels_places() {
        let destinations = [
            ("/scratch", true),
            ("/scratch/", true),
            ("/dev/shm", true),
            ("/run", true),
            ("/system", true),
            ("/dev", false),
            ("/dev/", false),
            ("/", false),
            ("/proc/acpi", false),
            ("/sys/fs/cgroup", false),
            ("/x/../sys/firmware", false),
        ];
        let mounts: Vec<String> = destinations.iter().map(|(path, _)| tmpfs(path)).collect();
        let rootfs = tempfile::tempdir().unwrap();
        let plan = plan(&spec(&mounts.join(",")), rootfs.path()).unwrap();
        let taken: Vec<usize> = plan.iter().map(|mount| mount.index).collect();
        let want: Vec<usize> = (0..destinations.len()).filter(|i| destinations[*i].1).collect();
        assert_eq!(taken, want);
        let other =
            spec(r#"{"destination":"/q","type":"mqueue"},{"destination":"/b","source":"/x","type":"bind"}"#);
        assert!(super::plan(&other, rootfs.path()).unwrap().is_empty());
    }

    #[test]
    fn what_a_mount_covers_is_found_in_the_rootfs_or_on_an_earlier_mount() {
        let rootfs = tempfile::tempdir().unwrap();
        let bound = tempfile::tempdir().unwrap();
        fs::create_dir_all(rootfs.path().join("data/below")).unwrap();
        fs::create_dir_all(rootfs.path().join("dev/shm")).unwrap();
        fs::create_dir_all(bound.path().join("in")).unwrap();
        let bind = format!(
            r#"{{"destination":"/bound","type":"bind","source":"{}"}}"#,
            bound.path().to_str().unwrap()
        );
        let mounts = ["/dev", "/dev/shm", "/data", "/data/below", "/data", "/missing"].map(tmpfs).join(",")
            + ","
            + &bind
            + ","
            + &tmpfs("/bound/in")
            + ","
            + &tmpfs("/bound/out");
        let plan = plan(&spec(&mounts), rootfs.path()).unwrap();
        let below = |destination: &str, nth: usize| {
            &plan.iter().filter(|mount| mount.destination == destination).nth(nth).unwrap().below
        };
        assert!(matches!(below("/dev/shm", 0), Below::Nothing), "runc's /dev is fresh");
        assert!(matches!(below("/data", 0), Below::Directory { path, .. } if path == "/data"));
        assert!(matches!(below("/data/below", 0), Below::Nothing), "the tmpfs at /data is fresh");
        assert!(matches!(below("/data", 1), Below::Planned(1)));
        assert!(matches!(below("/missing", 0), Below::Nothing));
        assert!(matches!(below("/bound/in", 0), Below::Directory { root, .. } if root == bound.path()));
        assert!(matches!(below("/bound/out", 0), Below::Nothing));
        let on =
            |number: usize| plan[number].mountpoints.iter().map(|on| on.path.as_str()).collect::<Vec<_>>();
        assert_eq!(plan[1].destination, "/data");
        assert_eq!(on(1), ["/below", ""], "and the second /data covers the first");
    }

    #[test]
    fn an_unknown_option_is_refused_with_the_mount_it_belongs_to() {
        let rootfs = tempfile::tempdir().unwrap();
        let spec = spec(r#"{"destination":"/d","type":"tmpfs","options":["size=1m","sizze=2m"]}"#);
        let error = plan(&spec, rootfs.path()).unwrap_err();
        assert_eq!(error.to_string(), "mount /d");
        let PlanError::Options { source, .. } = error else { panic!("{error:?}") };
        assert!(source.to_string().contains("sizze=2m"), "{source}");
    }
}
