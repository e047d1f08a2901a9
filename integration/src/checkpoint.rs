//! Checkpoints made through containerd: what the shim said of the last one, and its four files.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::Containerd;
use crate::ctr::{CtrError, Said};

/// What Stillframe's state directory tells of a container's last checkpoint.
#[derive(Debug, Clone, Deserialize)]
pub struct LastCheckpoint {
    /// The filesystems; only how many is of interest here.
    pub filesystems: Vec<serde_json::Value>,
    /// Regular files.
    pub files: u64,
    /// Names of every kind.
    pub entries: u64,
    /// Sum of the sizes of the files, in bytes, holes included.
    pub logical_bytes: u64,
    /// Length of the pages file, in bytes.
    pub pages_bytes: u64,
    /// How often what had changed was copied while the container ran.
    pub rounds: u32,
    /// Bytes that were copied while it ran.
    pub copied_live_bytes: u64,
    /// Bytes that were copied while it was frozen.
    pub copied_frozen_bytes: u64,
    /// How long the container had to be frozen, in milliseconds.
    pub frozen_ms: f64,
    /// From request to commit, in milliseconds.
    pub total_ms: f64,
    /// How long each phase took.
    pub phases: Vec<PhaseTime>,
}

/// A phase of a checkpoint, and how long it took.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct PhaseTime {
    /// Its name.
    pub phase: String,
    /// In milliseconds.
    pub ms: f64,
}

/// Why a checkpoint can't be looked at.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// A file can't be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A document isn't what it should be.
    #[error("{what}: {source}")]
    Json {
        /// The document.
        what: String,
        /// Why.
        source: serde_json::Error,
    },
    /// The containerd image has no such part.
    #[error("the image {name} has no {part}: {index}")]
    Missing {
        /// The image.
        name: String,
        /// The part.
        part: &'static str,
        /// Its index.
        index: String,
    },
    /// `ctr`.
    #[error(transparent)]
    Ctr(#[from] CtrError),
}

/// The media type of the blob with what the shim wrote.
pub const TASK_DATA: &str = "application/vnd.containerd.container.criu.checkpoint.criu.tar";

/// The media type of the blob with the container's spec.
pub const SPEC: &str = "application/vnd.containerd.container.checkpoint.config.v1+proto";

impl Containerd {
    /// What the shim says of the last checkpoint of a container that is alone in its sandbox.
    pub fn last_checkpoint(&self, id: &str) -> Result<LastCheckpoint, LookError> {
        let path = Path::new("/run/stillframe").join(self.namespace()).join(id).join("last-checkpoint.json");
        let text =
            fs::read_to_string(&path).map_err(|source| LookError::Io { path: path.clone(), source })?;
        serde_json::from_str(&text)
            .map_err(|source| LookError::Json { what: path.display().to_string(), source })
    }

    /// `ctr containers checkpoint --task`, which lets the container run on.
    pub fn checkpoint(&self, id: &str, name: &str) -> Result<Said, CtrError> {
        self.ctr().run(&["containers", "checkpoint", "--task", id, name])
    }

    /// Unpacks what the shim wrote out of a checkpoint image into the directory `into`, which is made.
    pub fn unpack_checkpoint(&self, name: &str, into: &Path) -> Result<(), LookError> {
        let (text, index) = self.checkpoint_index(name)?;
        let parts = index["manifests"].as_array().into_iter().flatten();
        let digest =
            parts.filter(|part| part["mediaType"] == TASK_DATA).find_map(|part| part["digest"].as_str());
        let missing = || LookError::Missing { name: name.to_owned(), part: "task data", index: text };
        let path = self.blob(digest.ok_or_else(missing)?);
        fs::create_dir(into).map_err(io_error(into))?;
        let file = fs::File::open(&path).map_err(io_error(&path))?;
        tar::Archive::new(file).unpack(into).map_err(io_error(into))
    }

    /// The index (or manifest) of an image, as text and parsed.
    pub fn checkpoint_index(&self, name: &str) -> Result<(String, serde_json::Value), LookError> {
        let index = self.ctr().run(&["content", "get", &self.image_digest(name)?])?.stdout;
        let parsed = serde_json::from_str(&index)
            .map_err(|source| LookError::Json { what: format!("the index of {name}"), source })?;
        Ok((index, parsed))
    }

    /// The digest of an image's index or manifest.
    pub fn image_digest(&self, name: &str) -> Result<String, LookError> {
        let images = self.ctr().run(&["images", "list"])?.stdout;
        let line = images.lines().find(|line| line.split_whitespace().next() == Some(name));
        let digest = line.and_then(|line| line.split_whitespace().find(|word| word.starts_with("sha256:")));
        let digest = digest.map(str::to_owned);
        digest.ok_or_else(|| LookError::Missing { name: name.to_owned(), part: "digest", index: images })
    }

    /// Where the content store keeps a blob. It is ours; `ctr content get` would go through memory.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        self.dir().join("root/io.containerd.content.v1.content/blobs/sha256").join(hex)
    }
}

/// An error of this path.
pub fn io_error(path: &Path) -> impl FnOnce(io::Error) -> LookError {
    let path = path.to_owned();
    move |source| LookError::Io { path, source }
}
