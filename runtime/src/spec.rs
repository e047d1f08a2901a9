//! The bundle's `config.json`: read what the mount plan needs, rewrite the mounts, keep the rest.
//!
//! The file is kept as JSON and only the parts that are looked at are decoded (by oci-spec): a field
//! that this program has never heard of must reach runc as it is.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxIdMapping, Mount};
use serde::de::DeserializeOwned;
use serde_json::Value;
use stillframe_tmpfs::{IdMap, IdMapping, Ids};

/// Name of the container in ResourceIDs, over all else.
pub const NAME_ANNOTATION: &str = "dev.stillframe.container-name";
/// Image to restore the container's filesystems from: an absolute path of a directory or a tar archive of one. (The shim
/// also takes the name of an image in containerd, and gives the runtime a directory for it.)
pub const RESTORE_FROM_ANNOTATION: &str = "dev.stillframe.restore-from";
/// Directory in which the pages of a checkpoint taken through containerd are kept, apart from its archive.
pub const IMAGE_DIR_ANNOTATION: &str = "dev.stillframe.image-dir";
/// Annotation: `on` has containerd's Pause copy the container's filesystems while it runs, and freeze it then, so that the
/// Checkpoint that follows has only the rest to do. Needs [`IMAGE_DIR_ANNOTATION`], where it copies to.
pub const PRECOPY_ANNOTATION: &str = "dev.stillframe.precopy";
/// What a checkpoint through containerd saves: `filesystem` or `full`.
pub const MODE_ANNOTATION: &str = "dev.stillframe.checkpoint.mode";
/// Whether the contents of restored files are loaded before the container's program runs, or behind it: `eager` or `lazy`.
pub const LOAD_ANNOTATION: &str = "dev.stillframe.restore.load";
/// What of the image a container gets that has been restored in this sandbox before: see [`OnRestart`].
pub const ON_RESTART_ANNOTATION: &str = "dev.stillframe.restore.on-restart";
/// What a container is to its pod, `container` or `sandbox`, as containerd's CRI writes it.
const CRI_TYPE_ANNOTATION: &str = "io.kubernetes.cri.container-type";
/// Name of the container in its pod, as containerd's CRI writes it.
pub const CRI_NAME_ANNOTATION: &str = "io.kubernetes.cri.container-name";

/// Why a bundle's spec couldn't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file couldn't be read.
    #[error("read the OCI spec {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It isn't JSON.
    #[error("the OCI spec {path} is not JSON")]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A part of it isn't what the OCI runtime specification says.
    #[error("the OCI spec {path}: {field} is not what the specification says")]
    Field {
        /// The file.
        path: PathBuf,
        /// Which part.
        field: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The rewritten file couldn't be written.
    #[error("write the OCI spec {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What a container gets that is made again in its pod, with an image to restore from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnRestart {
    /// What has survived stays as it is; what hasn't comes from the image.
    #[default]
    Keep,
    /// All comes from the image, also volumes that have survived, if no other container has them.
    Image,
    /// What has survived stays as it is; the rest is empty, as with runc.
    Empty,
}

impl OnRestart {
    /// What the annotation says; `Err` if that is nothing of this.
    pub fn parse(annotation: Option<&str>) -> Result<Self, String> {
        match annotation {
            None | Some("keep") => Ok(Self::Keep),
            Some("image") => Ok(Self::Image),
            Some("empty") => Ok(Self::Empty),
            Some(other) => Err(other.to_owned()),
        }
    }
}

/// A bundle's spec.
#[derive(Clone, Debug)]
pub struct Spec {
    path: PathBuf,
    value: Value,
    mounts: Vec<Mount>,
    ids: Ids,
}

impl Spec {
    /// Reads `bundle`/config.json.
    pub fn read(bundle: &Path) -> Result<Self, SpecError> {
        let path = bundle.join("config.json");
        let text = fs::read(&path).map_err(|source| SpecError::Read { path: path.clone(), source })?;
        let value =
            serde_json::from_slice(&text).map_err(|source| SpecError::Json { path: path.clone(), source })?;
        let mut spec = Self { path, value, mounts: Vec::new(), ids: Ids::default() };
        spec.mounts = spec.decode("/mounts", "mounts")?;
        spec.ids = Ids {
            uid: id_map(&spec.decode::<Vec<LinuxIdMapping>>("/linux/uidMappings", "linux.uidMappings")?),
            gid: id_map(&spec.decode::<Vec<LinuxIdMapping>>("/linux/gidMappings", "linux.gidMappings")?),
        };
        Ok(spec)
    }

    fn decode<T: DeserializeOwned + Default>(
        &self,
        pointer: &str,
        field: &'static str,
    ) -> Result<T, SpecError> {
        match self.value.pointer(pointer) {
            None | Some(Value::Null) => Ok(T::default()),
            Some(part) => T::deserialize(part).map_err(|source| SpecError::Field {
                path: self.path.clone(),
                field,
                source,
            }),
        }
    }

    /// The mounts, in order.
    pub fn mounts(&self) -> &[Mount] {
        &self.mounts
    }

    /// The user namespace's mappings; identity where there is none.
    pub fn ids(&self) -> &Ids {
        &self.ids
    }

    /// An annotation, if it is there and isn't empty.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.value.get("annotations")?.get(key)?.as_str().filter(|value| !value.is_empty())
    }

    /// All annotations that are strings.
    pub fn annotations(&self) -> impl Iterator<Item = (&str, &str)> {
        let all = self.value.get("annotations").and_then(Value::as_object);
        all.into_iter().flatten().filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)))
    }

    /// The name given to the container by an annotation, if one does.
    pub fn container_name(&self) -> Option<&str> {
        self.annotation(NAME_ANNOTATION).or_else(|| self.annotation(CRI_NAME_ANNOTATION))
    }

    /// Whether it is the pod's own container.
    pub fn is_sandbox(&self) -> bool {
        self.annotation(CRI_TYPE_ANNOTATION) == Some("sandbox")
    }

    /// SELinux label of the container's mounts.
    pub fn mount_label(&self) -> Option<&str> {
        self.value.pointer("/linux/mountLabel")?.as_str().filter(|label| !label.is_empty())
    }

    /// Whether the container's process could make device nodes: CAP_MKNOD, and no user namespace.
    pub fn may_make_devices(&self) -> bool {
        let bounding = self.value.pointer("/process/capabilities/bounding").and_then(Value::as_array);
        let has = bounding.is_some_and(|caps| caps.iter().any(|cap| cap.as_str() == Some("CAP_MKNOD")));
        has && self.ids == Ids::default()
    }

    /// Whether other programs are run between making the container's mounts and starting its program: hooks of `runc create`.
    pub fn has_create_hooks(&self) -> bool {
        ["prestart", "createRuntime", "createContainer"].iter().any(|kind| {
            let hooks = self.value.pointer(&format!("/hooks/{kind}")).and_then(Value::as_array);
            hooks.is_some_and(|hooks| !hooks.is_empty())
        })
    }

    /// Has `path` run with `arguments`, the first of which is its name, before all hooks there are.
    pub fn put_first_hook(&mut self, path: &Path, arguments: &[OsString]) {
        let arguments: Vec<_> = arguments.iter().map(|argument| argument.to_string_lossy()).collect();
        let hook = serde_json::json!({ "path": path.to_string_lossy(), "args": arguments });
        // These come first, and are still run by every runc.
        match &mut self.value["hooks"]["prestart"] {
            Value::Array(hooks) => hooks.insert(0, hook),
            none => *none = vec![hook].into(),
        }
    }

    /// Makes mount number `index` a bind mount of `source` with `options`; its destination stays.
    pub fn replace_with_bind(&mut self, index: usize, source: &Path, options: Vec<String>) {
        let mount = &mut self.value["mounts"][index];
        mount["type"] = "bind".into();
        mount["source"] = source.to_string_lossy().into_owned().into();
        mount["options"] = options.into();
    }

    /// Writes the spec back, by rename, so that nobody reads half of it.
    pub fn write(&self) -> Result<(), SpecError> {
        let fail = |source| SpecError::Write { path: self.path.clone(), source };
        let text = serde_json::to_vec(&self.value).map_err(|e| fail(e.into()))?;
        let mode = fs::metadata(&self.path).map_err(fail)?.permissions();
        let new = self.path.with_file_name("config.json.stillframe");
        fs::write(&new, text).map_err(fail)?;
        fs::set_permissions(&new, mode).map_err(fail)?;
        fs::rename(&new, &self.path).map_err(fail)
    }
}

pub(crate) fn id_map(mappings: &[LinuxIdMapping]) -> IdMap {
    let one =
        |m: &LinuxIdMapping| IdMapping { container: m.container_id(), host: m.host_id(), size: m.size() };
    IdMap(mappings.iter().map(one).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(config: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), config).unwrap();
        dir
    }

    #[test]
    fn what_is_not_looked_at_is_kept() {
        let dir = bundle(
            r#"{"ociVersion":"9.9","unheardOf":{"x":[1]},"mounts":[{"destination":"/a","type":"tmpfs","new":1}]}"#,
        );
        let mut spec = Spec::read(dir.path()).unwrap();
        spec.replace_with_bind(0, Path::new("/src"), vec!["bind".into()]);
        spec.write().unwrap();
        let text = fs::read_to_string(dir.path().join("config.json")).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["unheardOf"]["x"][0], 1);
        assert_eq!(value["ociVersion"], "9.9");
        let mount = r#"{"destination":"/a","new":1,"options":["bind"],"source":"/src","type":"bind"}"#;
        assert_eq!(value["mounts"][0], serde_json::from_str::<Value>(mount).unwrap());
    }

    #[test]
    fn the_name_is_the_annotations_before_the_cris() {
        for (annotations, want) in [
            ("{}", None),
            (r#"{"io.kubernetes.cri.container-name":"web"}"#, Some("web")),
            (r#"{"io.kubernetes.cri.container-name":"web","dev.stillframe.container-name":"x"}"#, Some("x")),
            (r#"{"dev.stillframe.container-name":""}"#, None),
        ] {
            let dir = bundle(&format!(r#"{{"annotations":{annotations}}}"#));
            assert_eq!(Spec::read(dir.path()).unwrap().container_name(), want, "{annotations}");
        }
    }

    #[test]
    fn devices_need_the_capability_and_no_user_namespace() {
        let capable = r#""process":{"capabilities":{"bounding":["CAP_MKNOD"]}}"#;
        for (config, want) in [
            ("{}".to_owned(), false),
            (format!("{{{capable}}}"), true),
            (
                format!(
                    r#"{{{capable},"linux":{{"uidMappings":[{{"containerID":0,"hostID":5,"size":1}}]}}}}"#
                ),
                false,
            ),
        ] {
            assert_eq!(Spec::read(bundle(&config).path()).unwrap().may_make_devices(), want, "{config}");
        }
    }

    #[test]
    fn a_bad_spec_is_refused_by_name() {
        let missing = Spec::read(Path::new("/nonexistent")).unwrap_err();
        assert_eq!(missing.to_string(), "read the OCI spec /nonexistent/config.json");
        assert!(matches!(Spec::read(bundle("{").path()).unwrap_err(), SpecError::Json { .. }));
        let field = Spec::read(bundle(r#"{"mounts":5}"#).path()).unwrap_err();
        assert!(matches!(field, SpecError::Field { field: "mounts", .. }));
    }
}
