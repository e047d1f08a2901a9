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
    /// How long the container had to be frozen, in milliseconds.
    pub frozen_ms: f64,
    /// From request to commit, in milliseconds.
    pub total_ms: f64,
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
const TASK_DATA: &str = "application/vnd.containerd.container.criu.checkpoint.criu.tar";

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
        let missing =
            |part, index: &str| LookError::Missing { name: name.to_owned(), part, index: index.to_owned() };
        let images = self.ctr().run(&["images", "list"])?.stdout;
        let line = images.lines().find(|line| line.split_whitespace().next() == Some(name));
        let digest = line.and_then(|line| line.split_whitespace().find(|word| word.starts_with("sha256:")));
        let digest = digest.ok_or_else(|| missing("digest", &images))?;
        let index = self.ctr().run(&["content", "get", digest])?.stdout;
        let parsed: serde_json::Value = serde_json::from_str(&index)
            .map_err(|source| LookError::Json { what: format!("the index of {name}"), source })?;
        let manifests = parsed["manifests"].as_array().cloned().unwrap_or_default();
        let blob = manifests.iter().find(|part| part["mediaType"] == TASK_DATA);
        let blob =
            blob.and_then(|part| part["digest"].as_str()).ok_or_else(|| missing("task data", &index))?;
        let io = |source| LookError::Io { path: into.to_owned(), source };
        fs::create_dir(into).map_err(io)?;
        // Straight from the content store: it's ours, and `ctr content get` would have to go through memory.
        let hex = blob.trim_start_matches("sha256:");
        let path = self.dir().join("root/io.containerd.content.v1.content/blobs/sha256").join(hex);
        let file = fs::File::open(&path).map_err(|source| LookError::Io { path, source })?;
        tar::Archive::new(file).unpack(into).map_err(io)
    }
}
