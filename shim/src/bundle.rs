//! An OCI bundle as containerd laid it out: what the shim reads from its config.json and leaves in it.
//!
//! Only the fields that decide something here are decoded, so that a spec newer than this shim is no error. Files the shim
//! adds are those of containerd-shim-runc-v2, so that either can clean up after the other: `options.json`, `runtime`,
//! `address`, `init.pid`, `<exec id>.pid`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use stillframe_runtime::config::{CheckpointMode, UnknownMode};
use stillframe_runtime::spec::{
    CRI_NAME_ANNOTATION, MODE_ANNOTATION, NAME_ANNOTATION, RESTORE_FROM_ANNOTATION,
};

/// Why a bundle can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// config.json isn't there or isn't readable.
    #[error("{path} can't be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// config.json is not an OCI spec.
    #[error("{path} is not an OCI runtime spec")]
    Decode {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
}

/// What the shim needs of a spec.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Spec {
    #[serde(default)]
    annotations: HashMap<String, String>,
    root: Option<Root>,
    linux: Option<Linux>,
    #[serde(default)]
    mounts: Vec<Mount>,
}

#[derive(Clone, Debug, Deserialize)]
struct Mount {
    destination: PathBuf,
    #[serde(default)]
    source: PathBuf,
}

#[derive(Clone, Debug, Deserialize)]
struct Root {
    path: PathBuf,
}

#[derive(Clone, Debug, Deserialize)]
struct Linux {
    namespaces: Option<Vec<Namespace>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Namespace {
    r#type: String,
    #[serde(default)]
    path: String,
}

/// The annotations whose value groups containers into one shim, in order of preference (manager_linux.go of
/// containerd-shim-runc-v2).
const GROUP_ANNOTATIONS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

impl Spec {
    /// Reads `bundle`'s config.json.
    pub fn read(bundle: &Path) -> Result<Self, BundleError> {
        let path = bundle.join("config.json");
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(source) => return Err(BundleError::Read { path, source }),
        };
        serde_json::from_slice(&text).map_err(|source| BundleError::Decode { path, source })
    }

    /// The name of the image of containerd's that the container is to be restored from, if it is one: a path isn't.
    pub fn image_to_restore(&self) -> Option<&str> {
        let from = self.annotations.get(RESTORE_FROM_ANNOTATION)?;
        (!from.is_empty() && !from.starts_with('/')).then_some(from)
    }

    /// The container's name, if an annotation gives it one: by it a container is the same when it is made again.
    pub fn container_name(&self) -> Option<&str> {
        let names = [NAME_ANNOTATION, CRI_NAME_ANNOTATION].into_iter();
        names.filter_map(|name| self.annotations.get(name)).map(String::as_str).find(|name| !name.is_empty())
    }

    /// Where containerd's CRI keeps what it knows of container `id`; beside it is the pod's, whose hostname is bind-mounted.
    pub fn cri_directory(&self, id: &str) -> Option<PathBuf> {
        let hostname = self.mounts.iter().find(|mount| mount.destination == Path::new("/etc/hostname"))?;
        let sandboxes = hostname.source.ancestors().nth(2)?;
        let ours =
            self.annotations.get("io.kubernetes.cri.container-type").is_some_and(|kind| kind == "container");
        (ours && sandboxes.ends_with("sandboxes")).then(|| sandboxes.with_file_name("containers").join(id))
    }

    /// What checkpoints save, where an annotation says so.
    pub fn checkpoint_mode(&self) -> Result<Option<CheckpointMode>, UnknownMode> {
        self.annotations.get(MODE_ANNOTATION).map(|mode| mode.parse()).transpose()
    }

    /// The sandbox that container `id` belongs to: the containers of one sandbox share a shim and a state directory. A
    /// container without a group is a sandbox of its own.
    pub fn sandbox_id<'a>(&'a self, id: &'a str) -> &'a str {
        GROUP_ANNOTATIONS.iter().find_map(|name| self.annotations.get(*name)).map_or(id, String::as_str)
    }

    /// The root filesystem's directory where containerd gives no mounts for it.
    pub fn rootfs(&self, bundle: &Path) -> PathBuf {
        // `join` leaves an absolute path alone.
        self.root.as_ref().map_or_else(|| bundle.join("rootfs"), |root| bundle.join(&root.path))
    }

    /// Whether processes may outlive the init: it isn't the init of a pid namespace of its own, whose end would kill them
    /// (ShouldKillAllOnExit in containerd-shim-runc-v2).
    pub fn outlives_init(&self) -> bool {
        let namespaces =
            self.linux.as_ref().and_then(|linux| linux.namespaces.as_deref()).unwrap_or_default();
        !namespaces.iter().any(|namespace| namespace.r#type == "pid" && namespace.path.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn the_cris_directory_is_found_beside_the_pods() {
        let spec = |kind: &str, source: &str| -> Spec {
            let mounts = format!(r#"[{{"destination":"/etc/hostname","source":"{source}"}}]"#);
            let annotations = format!(r#"{{"io.kubernetes.cri.container-type":"{kind}"}}"#);
            serde_json::from_str(&format!(r#"{{"annotations":{annotations},"mounts":{mounts}}}"#)).unwrap()
        };
        let cri = "/var/lib/containerd/io.containerd.grpc.v1.cri";
        let hostname = format!("{cri}/sandboxes/pod/hostname");
        let want = Some(PathBuf::from(format!("{cri}/containers/c")));
        assert_eq!(spec("container", &hostname).cri_directory("c"), want);
        assert_eq!(spec("sandbox", &hostname).cri_directory("c"), None);
        assert_eq!(spec("container", "/etc/hostname").cri_directory("c"), None);
        assert_eq!(Spec::default().cri_directory("c"), None);
    }

    #[test]
    fn containers_are_grouped_by_annotation() {
        let cri = r#""io.kubernetes.cri.sandbox-id": "pod""#;
        let group = r#""io.containerd.runc.v2.group": "group""#;
        for (annotations, expected) in [
            (String::new(), "id"),
            (cri.to_string(), "pod"),
            (group.to_string(), "group"),
            (format!("{cri}, {group}"), "group"),
        ] {
            let spec = spec(&format!("{{\"annotations\": {{{annotations}}}}}"));
            assert_eq!(spec.sandbox_id("id"), expected, "{annotations}");
        }
        assert_eq!(spec("{}").sandbox_id("id"), "id");
    }

    #[test]
    fn processes_outlive_an_init_without_a_pid_namespace_of_its_own() {
        for (namespaces, expected) in [
            (r#"[{"type": "mount"}]"#, true),
            (r#"[{"type": "pid"}]"#, false),
            (r#"[{"type": "pid", "path": ""}]"#, false),
            (r#"[{"type": "pid", "path": "/proc/1/ns/pid"}]"#, true),
            ("null", true),
        ] {
            let spec = spec(&format!("{{\"linux\": {{\"namespaces\": {namespaces}}}}}"));
            assert_eq!(spec.outlives_init(), expected, "{namespaces}");
        }
        assert!(spec("{}").outlives_init());
    }

    #[test]
    fn rootfs_is_where_the_spec_says() {
        let bundle = Path::new("/bundle");
        assert_eq!(spec(r#"{"root": {"path": "rootfs"}}"#).rootfs(bundle), Path::new("/bundle/rootfs"));
        assert_eq!(spec(r#"{"root": {"path": "/images/a"}}"#).rootfs(bundle), Path::new("/images/a"));
        assert_eq!(spec("{}").rootfs(bundle), Path::new("/bundle/rootfs"));
    }

    #[test]
    fn a_broken_spec_is_an_error_that_names_it() {
        let bundle = tempfile::tempdir().unwrap();
        let error = Spec::read(bundle.path()).unwrap_err();
        assert!(matches!(error, BundleError::Read { .. }) && error.to_string().contains("config.json"));
        std::fs::write(bundle.path().join("config.json"), "{\"linux\": 3}").unwrap();
        assert!(matches!(Spec::read(bundle.path()).unwrap_err(), BundleError::Decode { .. }));
    }
}
