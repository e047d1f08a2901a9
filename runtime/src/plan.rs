//! The mount plan: which mounts of a spec become filesystems of ours, and which are left to runc.
//!
//! Taken: every mount of type `tmpfs`, since it is empty at the start and its contents are the
//! application's; every bind mount that a hint ([`crate::hints`]) is for; and the bind mounts of a pod's
//! memory-backed volumes ([`crate::volumes`]), whose filesystem is there already. Left:
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
use stillframe_tmpfs::Ids;
use stillframe_tmpfs::copy_up::open_in_root;
use stillframe_tmpfs::options::{OptionsError, TmpfsOptions};
use stillframe_tmpfs::resource::clean;

use crate::hints::{HintError, Hints, Medium, Share};
use crate::spec::{Spec, id_map};
use crate::volumes::{PodVolume, recognise};

/// A mount of the spec that becomes a filesystem of ours.
#[derive(Clone, Debug)]
pub struct PlannedMount {
    /// Its number in the spec's mounts.
    pub index: usize,
    /// Destination in the container, clean.
    pub destination: String,
    /// Its options, with the hint's: what the container sees of the mount.
    pub options: TmpfsOptions,
    /// The options that the filesystem is made with. What a pod shares has only the hint's.
    pub superblock: TmpfsOptions,
    /// Where its contents are.
    pub medium: Medium,
    /// Whether the OCI mount is a tmpfs; else it is a bind mount with a hint.
    pub is_tmpfs: bool,
    /// With whom it shares its filesystem.
    pub volume: Option<Volume>,
    /// Where its filesystem is mounted already, if it is a volume of the pod's that is taken as it is; the
    /// spec's mount stays then.
    pub existing: Option<PathBuf>,
    /// Its source, as mountinfo shows it.
    pub source: Option<String>,
    /// The directory that it will cover.
    pub below: Below,
    /// Mountpoints of later mounts that lie on it.
    pub mountpoints: Vec<Mountpoint>,
    /// Whether the mount translates ids as the container's user namespace does, so that on the filesystem are the container's.
    pub translated: bool,
}

impl PlannedMount {
    /// A bind mount of a volume of the pod's: nothing is to be made, the options are somebody else's.
    fn of_volume(index: usize, destination: String, volume: PodVolume, translated: bool) -> Self {
        Self {
            index,
            destination,
            options: TmpfsOptions::default(),
            superblock: TmpfsOptions::default(),
            medium: Medium::Memory,
            is_tmpfs: false,
            volume: Some(Volume { name: volume.name, share: Share::Pod }),
            existing: Some(volume.root),
            source: None,
            below: Below::Nothing,
            mountpoints: Vec::new(),
            translated,
        }
    }
}

/// A filesystem that several mounts have, by the name of its hint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// The hint's name.
    pub name: String,
    /// Whose mounts.
    pub share: Share,
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
    /// A hint can't be followed.
    #[error(transparent)]
    Hint(#[from] HintError),
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
    let hints = Hints::parse(spec.annotations())?;
    let mut planned: Vec<PlannedMount> = Vec::new();
    for (index, mount) in spec.mounts().iter().enumerate() {
        let source = mount.source().as_ref().map(|source| source.to_string_lossy().into_owned());
        let hint = source.as_deref().and_then(|source| hints.find(source));
        let destination = destination(mount);
        if is_bind(mount) && hint.is_none() {
            if let Some(volume) =
                source.as_deref().and_then(|source| recognise(Path::new(source), &destination))
            {
                match translation(mount, spec) {
                    Some(translated) => {
                        planned.push(PlannedMount::of_volume(index, destination, volume, translated));
                    }
                    None => tracing::warn!(
                        destination,
                        "a volume is left alone: its mount translates ids otherwise than the container's user namespace"
                    ),
                }
            }
            continue;
        }
        if !(is_tmpfs(mount) || is_bind(mount)) {
            continue;
        }
        if !may_be_taken(&destination) {
            if let Some(hint) = hint {
                tracing::warn!(hint = hint.name, destination, "a hint is ignored: the mount is runc's");
            }
            continue;
        }
        let own =
            mount.options().iter().flatten().filter(|option| is_tmpfs(mount) || !is_bind_option(option));
        let own = TmpfsOptions::parse(&own.cloned().collect::<Vec<_>>())
            .map_err(|source| PlanError::Options { destination: destination.clone(), source })?;
        let options = hint.map_or(own.clone(), |hint| own.overlaid(&hint.options));
        let superblock = match hint {
            Some(hint) if hint.share == Share::Pod => hint.options.clone(),
            _ => options.clone(),
        };
        planned.push(PlannedMount {
            index,
            below: below(&spec.mounts()[..index], &planned, &destination, rootfs)?,
            destination,
            options,
            superblock,
            medium: hint.map_or(Medium::Memory, |hint| hint.medium_for(!is_tmpfs(mount))),
            volume: hint.map(|hint| Volume { name: hint.name.clone(), share: hint.share }),
            existing: None,
            is_tmpfs: is_tmpfs(mount),
            // What mountinfo shows of a bind mount isn't its source.
            source: source.filter(|_| is_tmpfs(mount)),
            mountpoints: Vec::new(),
            translated: false,
        });
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

/// Whether a mount translates ids as the user namespace does (kubelet asks for that of all volumes of a pod that has one); `None` if
/// it does so in another way.
fn translation(mount: &Mount, spec: &Spec) -> Option<bool> {
    let ids = Ids {
        uid: id_map(mount.uid_mappings().as_deref().unwrap_or_default()),
        gid: id_map(mount.gid_mappings().as_deref().unwrap_or_default()),
    };
    let asked = |option: &String| option == "idmap" || option == "ridmap";
    if ids == Ids::default() {
        return Some(mount.options().iter().flatten().any(asked));
    }
    (ids == *spec.ids()).then_some(true)
}

fn destination(mount: &Mount) -> String {
    clean(&mount.destination().to_string_lossy())
}

fn is_tmpfs(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("tmpfs")
}

/// Whether a mount there can be ours; the module's documentation gives the reasons.
fn may_be_taken(destination: &str) -> bool {
    destination != "/"
        && destination != "/dev"
        && !is_at_or_below(destination, "/proc")
        && !is_at_or_below(destination, "/sys")
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
    mount.typ().as_deref() == Some("bind") || options.iter().any(|option| is_bind_option(option))
}

fn is_bind_option(option: &str) -> bool {
    option == "bind" || option == "rbind"
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
    fn hints_decide_about_medium_and_sharing() {
        let rootfs = tempfile::tempdir().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let hint = |name: &str, source: &str, medium: &str, share: &str, options: &str| {
            [("source", source), ("medium", medium), ("share", share), ("options", options)]
                .map(|(field, value)| format!(r#""dev.stillframe.mount.{name}.{field}":"{value}""#))
                .join(",")
        };
        let annotations = [
            hint("disk", "/host/disk", "disk", "container", "size=1m,mode=700"),
            hint("pod", "/host/pod", "memory", "pod", "size=2m,noexec"),
            hint("scratch", "scratch", "disk", "container", ""),
        ]
        .join(",");
        let mounts = r#"
            {"destination":"/a","type":"bind","source":"/host/disk","options":["rbind","ro","size=3m","uid=5"]},
            {"destination":"/b","type":"bind","source":"/host/pod","options":["bind","nodev","size=3m"]},
            {"destination":"/c","type":"tmpfs","source":"scratch","options":["size=4m"]},
            {"destination":"/d","type":"bind","source":"/host/other","options":["bind"]},
            {"destination":"/proc/x","type":"bind","source":"/host/disk","options":["bind"]},
            {"destination":"/q","type":"mqueue","source":"/host/disk"},
            {"destination":"/t","type":"tmpfs","source":"tmpfs"}"#;
        let config = format!(r#"{{"annotations":{{{annotations}}},"mounts":[{mounts}]}}"#);
        fs::write(dir.path().join("config.json"), config).unwrap();
        let plan = plan(&Spec::read(dir.path()).unwrap(), rootfs.path()).unwrap();
        let described: Vec<_> = plan
            .iter()
            .map(|mount| {
                let volume = mount.volume.as_ref().map(|volume| (volume.name.as_str(), volume.share));
                let size = |options: &TmpfsOptions| options.size.clone().unwrap_or_default();
                let sizes = (size(&mount.options), size(&mount.superblock));
                (mount.destination.as_str(), mount.medium, volume, sizes, mount.source.as_deref())
            })
            .collect();
        let sizes = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(
            described,
            [
                ("/a", Medium::Disk, Some(("disk", Share::Container)), sizes("1m", "1m"), None),
                ("/b", Medium::Memory, Some(("pod", Share::Pod)), sizes("2m", "2m"), None),
                ("/c", Medium::Disk, Some(("scratch", Share::Container)), sizes("4m", "4m"), Some("scratch")),
                ("/t", Medium::Memory, None, sizes("", ""), Some("tmpfs")),
            ]
        );
        assert_eq!((plan[0].options.mode, plan[0].options.uid), (Some(0o700), Some(5)));
        assert!(plan[0].options.flags.ro);
        let (mount, superblock) = (plan[1].options.flags, plan[1].superblock.flags);
        assert!(mount.nodev && mount.noexec && superblock.noexec && !superblock.nodev);
    }

    #[test]
    fn a_volume_whose_mount_translates_ids_has_the_containers() {
        let map = |host: u32| format!(r#"[{{"containerID":0,"hostID":{host},"size":10}}]"#);
        let dir = tempfile::tempdir().unwrap();
        for (mount, want) in [
            (String::new(), Some(false)),
            (format!(r#","uidMappings":{0},"gidMappings":{0}"#, map(7)), Some(true)),
            (r#","options":["rbind","ridmap"]"#.to_owned(), Some(true)),
            (format!(r#","uidMappings":{},"gidMappings":{}"#, map(7), map(8)), None),
        ] {
            let linux = format!(r#"{{"uidMappings":{0},"gidMappings":{0}}}"#, map(7));
            let mount = format!(r#"{{"destination":"/c","source":"/x","type":"bind"{mount}}}"#);
            let config = format!(r#"{{"linux":{linux},"mounts":[{mount}]}}"#);
            fs::write(dir.path().join("config.json"), config).unwrap();
            let spec = Spec::read(dir.path()).unwrap();
            assert_eq!(translation(&spec.mounts()[0], &spec), want, "{mount}");
        }
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
