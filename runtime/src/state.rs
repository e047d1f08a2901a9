//! The state directory of a sandbox: `/run/stillframe/<containerd namespace>/<sandbox id>/`, mode 0700.
//!
//! | name | what |
//! | --- | --- |
//! | `lock` | flock(2), exclusive, held by whoever changes something or takes a checkpoint |
//! | `containers/<id>.json` | [`ContainerRecord`] |
//! | `filesystems/<name>/mnt` | where a filesystem is mounted; `<name>` is `<container id>.<number>`, or `pod-<name>` |
//! | `filesystems/<name>/record.json` | [`FilesystemRecord`] |
//! | `filesystems/<name>/load.*` | what is still being loaded of it ([`crate::lazy`]) |
//! | `restored.json` | names of the containers that have been restored here |
//! | `names.json` | names of the containers that have been here, those that an annotation gave |
//! | `last-checkpoint.json` | what the last checkpoint did |
//! | `freeze.json` | [`FreezeMarker`]: what a checkpoint has frozen, while it has |
//!
//! Records are written by rename, so a reader needs no lock. The shim and the `stillframe` command work
//! on the same directory; neither keeps anything that the other would need.

mod record;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use stillframe_tmpfs::filestore;

use crate::lazy::{self, LazyError};
pub use crate::state::record::{ContainerRecord, FilesystemRecord, FilesystemUser, FreezeMarker, InitRecord};

/// Where all state is. tmpfs on every node, so a reboot leaves none.
pub const STATE_ROOT: &str = "/run/stillframe";

/// Why state couldn't be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A namespace or id can't be a directory's name.
    #[error("\"{0}\" can't be the name of a namespace, sandbox or container: it must be a plain file name")]
    Name(String),
    /// A call on a file failed.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A record can't be read, though it is ours.
    #[error("the record {path} can't be decoded")]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// Paths of one sandbox's state.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// The directory of a sandbox below `root`; nothing is made.
    pub fn new(root: &Path, namespace: &str, sandbox_id: &str) -> Result<Self, StateError> {
        let path = root.join(checked(namespace)?).join(checked(sandbox_id)?);
        Ok(Self { path })
    }

    /// Ids of the sandboxes of a namespace.
    pub fn sandboxes(root: &Path, namespace: &str) -> Result<Vec<String>, StateError> {
        names(&root.join(checked(namespace)?))
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory and takes its lock, waiting for it.
    pub fn create(&self) -> Result<Locked, StateError> {
        loop {
            make_dir(&self.path)?;
            if let Some(locked) = self.lock()? {
                return Ok(locked);
            }
        }
    }

    /// Takes the lock, waiting for it; `None` where there is no such sandbox (any more).
    pub fn lock(&self) -> Result<Option<Locked>, StateError> {
        let path = self.path.join("lock");
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = match file {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(at("open", &path))?,
        };
        let lock =
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| at("lock", &path)(e.into()))?;
        // Whoever had it before may have removed the directory, with the lock in it.
        let mine = lock.metadata().map_err(at("stat", &path))?.ino();
        match fs::metadata(&path) {
            Ok(there) if there.ino() == mine => {
                let locked = Locked { dir: self.clone(), _lock: lock };
                locked.thaw_leftovers()?;
                Ok(Some(locked))
            }
            Ok(_) => self.lock(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at("stat", &path)(error)),
        }
    }

    fn container_path(&self, id: &str) -> Result<PathBuf, StateError> {
        Ok(self.path.join("containers").join(format!("{}.json", checked(id)?)))
    }

    /// The record of a container, if there is one.
    pub fn container(&self, id: &str) -> Result<Option<ContainerRecord>, StateError> {
        read(&self.container_path(id)?)
    }

    /// Ids of the containers.
    pub fn containers(&self) -> Result<Vec<String>, StateError> {
        let names = names(&self.path.join("containers"))?;
        Ok(names.iter().filter_map(|name| Some(name.strip_suffix(".json")?.to_owned())).collect())
    }

    /// Whether a container of this name has been restored here.
    pub fn was_restored(&self, name: &str) -> Result<bool, StateError> {
        let names: Option<Vec<String>> = read(&self.path.join(RESTORED))?;
        Ok(names.is_some_and(|names| names.iter().any(|restored| restored == name)))
    }

    /// Names of the containers that have been here, in their order, as far as an annotation gave them.
    pub fn container_names(&self) -> Result<Vec<String>, StateError> {
        Ok(read(&self.path.join(NAMES))?.unwrap_or_default())
    }

    /// Where a filesystem is mounted.
    pub fn mountpoint(&self, filesystem: &str) -> PathBuf {
        self.filesystem_dir(filesystem).join("mnt")
    }

    /// Everything else of a filesystem.
    pub fn filesystem_dir(&self, filesystem: &str) -> PathBuf {
        self.path.join("filesystems").join(filesystem)
    }

    /// The record of a filesystem, if there is one.
    pub fn filesystem(&self, name: &str) -> Result<Option<FilesystemRecord>, StateError> {
        read(&self.path.join("filesystems").join(name).join("record.json"))
    }

    /// Names of the directories of filesystems that belong to the pod.
    pub fn pod_filesystems(&self) -> Result<Vec<String>, StateError> {
        let names = names(&self.path.join("filesystems"))?;
        Ok(names.into_iter().filter(|name| name.starts_with(POD) && !name.contains('.')).collect())
    }

    fn freeze_path(&self) -> PathBuf {
        self.path.join("freeze.json")
    }

    /// Whether a checkpoint has something frozen, or has left it so.
    pub fn is_marked_frozen(&self) -> bool {
        self.freeze_path().exists()
    }

    /// Whether there is no container and no filesystem.
    pub fn is_unused(&self) -> Result<bool, StateError> {
        Ok(self.containers()?.is_empty() && names(&self.path.join("filesystems"))?.is_empty())
    }

    /// The names of the namespace and the sandbox.
    pub fn location(&self) -> (&Path, &Path) {
        let sandbox = self.path.file_name().map(Path::new);
        let namespace = self.path.parent().and_then(|path| path.file_name()).map(Path::new);
        namespace.zip(sandbox).expect("made of both")
    }

    /// Names of the filesystems' directories that belong to a container, whatever its record says.
    pub fn filesystems_of(&self, container: &str) -> Result<Vec<String>, StateError> {
        let names = names(&self.path.join("filesystems"))?;
        let number = |name: &str| Some(name.strip_prefix(container)?.strip_prefix('.')?.parse::<u32>().ok());
        Ok(names.into_iter().filter(|name| number(name).flatten().is_some()).collect())
    }
}

/// The state directory while its lock is held: what may be changed.
#[derive(Debug)]
pub struct Locked {
    dir: StateDir,
    _lock: Flock<File>,
}

impl Locked {
    /// The paths.
    pub fn dir(&self) -> &StateDir {
        &self.dir
    }

    /// Writes a container's record.
    pub fn put_container(&self, record: &ContainerRecord) -> Result<(), StateError> {
        make_dir(&self.dir.path.join("containers"))?;
        write(&self.dir.container_path(&record.id)?, record)
    }

    /// Makes the directories of filesystem `number` of a container, and gives its name.
    pub fn make_filesystem(&self, container: &str, number: usize) -> Result<String, StateError> {
        let name = format!("{}.{number}", checked(container)?);
        make_dir(&self.dir.mountpoint(&name))?;
        Ok(name)
    }

    /// Makes the directories of the pod's filesystem `volume`, and gives its name.
    pub fn make_pod_filesystem(&self, volume: &str) -> Result<String, StateError> {
        let name = pod_filesystem(volume);
        make_dir(&self.dir.mountpoint(checked(&name)?))?;
        Ok(name)
    }

    /// Takes note that a container of this name has been restored.
    pub fn put_restored(&self, name: &str) -> Result<(), StateError> {
        self.add_name(RESTORED, name)
    }

    /// Takes note that a container of this name has been here.
    pub fn put_name(&self, name: &str) -> Result<(), StateError> {
        self.add_name(NAMES, name)
    }

    fn add_name(&self, file: &str, name: &str) -> Result<(), StateError> {
        let path = self.dir.path.join(file);
        let mut names: Vec<String> = read(&path)?.unwrap_or_default();
        if names.iter().any(|there| there == name) {
            return Ok(());
        }
        names.push(name.to_owned());
        write(&path, &names)
    }

    /// Writes a filesystem's record.
    pub fn put_filesystem(&self, name: &str, record: &FilesystemRecord) -> Result<(), StateError> {
        write(&self.dir.path.join("filesystems").join(name).join("record.json"), record)
    }

    /// Writes what the last checkpoint did.
    pub fn put_last_checkpoint<T: Serialize>(&self, result: &T) -> Result<(), StateError> {
        write(&self.dir.path.join("last-checkpoint.json"), result)
    }

    /// Writes what is about to be frozen.
    pub fn put_freeze(&self, marker: &FreezeMarker) -> Result<(), StateError> {
        write(&self.dir.freeze_path(), marker)
    }

    /// Says that all of it is thawed.
    pub fn remove_freeze(&self) -> Result<(), StateError> {
        let path = self.dir.freeze_path();
        absent_is_fine(fs::remove_file(&path)).map_err(at("remove", &path))
    }

    /// Thaws what a checkpoint has left frozen that died. What can't be thawed stays marked, for the next one.
    fn thaw_leftovers(&self) -> Result<(), StateError> {
        let Some(FreezeMarker { cgroups, filesystems }) = read(&self.dir.freeze_path())? else {
            return Ok(());
        };
        tracing::warn!(?cgroups, ?filesystems, "thawing what a checkpoint that died has left frozen");
        let mut stuck = false;
        let mut failed = |error: &dyn std::error::Error| {
            tracing::error!(
                error = crate::cli::chain(error),
                "what a dead checkpoint froze couldn't be thawed"
            );
            stuck = true;
        };
        // First the filesystems: a process that waits for one couldn't go on.
        for name in &filesystems {
            let mountpoint = self.dir.mountpoint(name);
            if let Err(error) = filestore::thaw(&mountpoint)
                && mountpoint.exists()
            {
                failed(&error);
            }
        }
        for cgroup in &cgroups {
            if let Err(error) = cgroup.thaw_if_there() {
                failed(&error);
            }
        }
        if stuck { Ok(()) } else { self.remove_freeze() }
    }

    /// Ends what loads a filesystem's files, and forgets it. `true` if all were loaded.
    pub fn end_load(&self, name: &str) -> Result<bool, LazyError> {
        let path = self.dir.filesystem_dir(name);
        let complete = lazy::stop(&path)?;
        for file in lazy::NAMES.map(|name| path.join(name)) {
            absent_is_fine(fs::remove_file(&file)).map_err(|source| LazyError::File {
                operation: "remove",
                path: file.clone(),
                source,
            })?;
        }
        Ok(complete)
    }

    /// Removes a filesystem's directory; it must be unmounted. A directory that is gone is fine.
    pub fn remove_filesystem(&self, name: &str) -> Result<(), StateError> {
        let path = self.dir.path.join("filesystems").join(name);
        // Not remove_dir_all: if it is still mounted, the container's data must not be deleted.
        for file in [path.join("record.json"), path.join("record.json.new")] {
            absent_is_fine(fs::remove_file(&file)).map_err(at("remove", &file))?;
        }
        for dir in [path.join("mnt"), path] {
            absent_is_fine(fs::remove_dir(&dir)).map_err(at("remove", &dir))?;
        }
        Ok(())
    }

    /// Removes a container's record, and with the last one the sandbox's directory.
    pub fn remove_container(&self, id: &str) -> Result<(), StateError> {
        let path = self.dir.container_path(id)?;
        absent_is_fine(fs::remove_file(&path)).map_err(at("remove", &path))?;
        self.remove_if_unused()
    }

    /// Removes the sandbox's directory if nothing uses it.
    pub fn remove_if_unused(&self) -> Result<(), StateError> {
        if !self.dir.is_unused()? {
            return Ok(());
        }
        for name in [RESTORED, NAMES, "last-checkpoint.json", "freeze.json", "lock"] {
            let file = self.dir.path.join(name);
            absent_is_fine(fs::remove_file(&file)).map_err(at("remove", &file))?;
        }
        let path = &self.dir.path;
        for dir in [path.join("containers"), path.join("filesystems"), path.clone()] {
            absent_is_fine(fs::remove_dir(&dir)).map_err(at("remove", &dir))?;
        }
        // The namespace's directory goes with its last sandbox; another one may just have been made.
        if let Some(namespace) = path.parent() {
            let _ = fs::remove_dir(namespace);
        }
        Ok(())
    }
}

const RESTORED: &str = "restored.json";
const NAMES: &str = "names.json";

/// What names of the pod's filesystems begin with. They have no dot, and those of a container's always have one.
const POD: &str = "pod-";

/// Name of the directory of the pod's filesystem `volume`, which has no dot. (`dev/shm` has a slash, and no
/// volume's name a tilde.)
pub fn pod_filesystem(volume: &str) -> String {
    format!("{POD}{}", volume.replace('/', "~"))
}

fn at<'a>(operation: &'static str, path: &'a Path) -> impl Fn(io::Error) -> StateError + 'a {
    move |source| StateError::File { operation, path: path.to_owned(), source }
}

/// Refuses what would lead out of its directory. containerd's identifiers are stricter than this.
fn checked(name: &str) -> Result<&str, StateError> {
    if name.is_empty() || name.len() > 200 || name.starts_with('.') || name.contains(['/', '\0']) {
        return Err(StateError::Name(name.to_owned()));
    }
    Ok(name)
}

pub(crate) fn make_dir(path: &Path) -> Result<(), StateError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(at("make the directory", path))
}

pub(crate) fn names(dir: &Path) -> Result<Vec<String>, StateError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(at("list", dir))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(at("list", dir))?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

pub(crate) fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(at("read", path))?,
    };
    let decoded = serde_json::from_slice(&text);
    decoded.map(Some).map_err(|source| StateError::Record { path: path.to_owned(), source })
}

fn write<T: Serialize>(path: &Path, record: &T) -> Result<(), StateError> {
    let new = PathBuf::from(format!("{}.new", path.display()));
    let text = serde_json::to_vec_pretty(record).expect("records have string keys only");
    fs::write(&new, text).map_err(at("write", &new))?;
    fs::rename(&new, path).map_err(at("write", path))
}
