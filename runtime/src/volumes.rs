//! The memory-backed volumes that Kubernetes gives a pod: recognised by where kubelet and containerd put them.
//!
//! They come as bind mounts of a tmpfs that somebody else has mounted, so they are taken as they are: never mounted
//! over, never replaced, and the spec stays as it is. Kubelet's size limit, ownership, metrics and teardown stay right.
//!
//! | source of the bind mount | volume | ResourceID |
//! | --- | --- | --- |
//! | `.../pods/UID/volumes/kubernetes.io~empty-dir/NAME` | itself | (`""`, `/NAME`) |
//! | `.../pods/UID/volume-subpaths/NAME/CONTAINER/N` (subPath) | the whole volume NAME | (`""`, `/NAME`) |
//! | `.../sandboxes/ID/shm`, mounted at `/dev/shm` | itself | (`""`, `/dev/shm`) |
//!
//! The UID and the sandbox's id are not part of the identity: a volume is found again in another pod by its name. An
//! emptyDir that isn't a tmpfs (`medium: ""`) is left alone, and so is the host's own `/dev/shm` (hostIPC).

use std::path::{Path, PathBuf};

use stillframe_tmpfs::mount::is_whole_tmpfs;

/// A volume of the pod's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodVolume {
    /// Its name; the path of its ResourceID.
    pub name: String,
    /// Where it is mounted on the host.
    pub root: PathBuf,
}

/// The volume that a bind mount shows, if its source is a place of one and a tmpfs is mounted there.
pub fn recognise(source: &Path, destination: &str) -> Option<PodVolume> {
    place(source, destination).filter(|volume| is_whole_tmpfs(&volume.root))
}

/// The volume whose place a source is, whatever is there.
fn place(source: &Path, destination: &str) -> Option<PodVolume> {
    let names: Vec<&str> = source.to_str()?.split('/').collect();
    let (name, root) = match names.as_slice() {
        [.., "pods", _, "volumes", "kubernetes.io~empty-dir", name] => (*name, source.to_owned()),
        [.., "pods", _, "volume-subpaths", name, _, _] => {
            let pod = source.ancestors().nth(4)?;
            (*name, pod.join("volumes/kubernetes.io~empty-dir").join(name))
        }
        [.., "sandboxes", _, "shm"] if destination == "/dev/shm" => ("dev/shm", source.to_owned()),
        _ => return None,
    };
    // Volumes' names are DNS labels.
    (!name.is_empty() && !name.contains('.')).then(|| PodVolume { name: name.to_owned(), root })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_recognised_by_their_places() {
        let volumes = "/var/lib/kubelet/pods/1-2/volumes/kubernetes.io~empty-dir";
        let cache = format!("{volumes}/cache");
        let shm = "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/ab/shm";
        for (source, destination, want) in [
            (cache.as_str(), "/cache", Some(("cache", cache.as_str()))),
            ("/var/lib/kubelet/pods/1-2/volume-subpaths/cache/web/0", "/c", Some(("cache", &cache))),
            (shm, "/dev/shm", Some(("dev/shm", shm))),
            (shm, "/elsewhere", None),
            ("/dev/shm", "/dev/shm", None),
            (&format!("{cache}/below"), "/c", None),
            (&format!("{volumes}/.."), "/c", None),
            (&format!("{volumes}/"), "/c", None),
            ("/var/lib/kubelet/pods/1-2/volumes/kubernetes.io~secret/s", "/s", None),
            ("/srv/data", "/data", None),
        ] {
            let found = place(Path::new(source), destination);
            let want =
                want.map(|(name, root): (&str, &str)| PodVolume { name: name.into(), root: root.into() });
            assert_eq!(found, want, "{source}");
        }
    }

    #[test]
    fn a_place_without_a_tmpfs_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("pods/1/volumes/kubernetes.io~empty-dir/disk");
        std::fs::create_dir_all(&source).unwrap();
        assert_eq!(recognise(&source, "/disk"), None);
        assert_eq!(recognise(&source.join("missing"), "/disk"), None);
    }
}
