//! The files that hold filesystems on disk: `FILESTORE_DIR/<namespace>/<sandbox>/<filesystem>.img`, 0600 in directories
//! of 0700. Beside them are the sandbox's unpacked images ([`crate::images`]).
//!
//! Invariant: a file is made only while its sandbox's lock is held and its filesystem's record is written, and removed
//! before the record is. So what is here of a sandbox without containers and filesystems is what a crash or a reboot
//! has left (the state directory lives in memory), and [`Filestores::sweep`] removes it, under that sandbox's
//! lock. Lock order: a sweep holds one sandbox's lock at a time and comes before the caller takes its own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::images;
use crate::state::{Locked, StateDir, StateError, absent_is_fine, make_dir, names};

/// Attempts to make directories that somebody else may be removing.
const ATTEMPTS: usize = 16;

/// The directory of all of them.
#[derive(Clone, Debug)]
pub struct Filestores {
    root: PathBuf,
}

fn at<'a>(operation: &'static str, path: &'a Path) -> impl Fn(io::Error) -> StateError + 'a {
    move |source| StateError::File { operation, path: path.to_owned(), source }
}

impl Filestores {
    /// Those in the directory `root`, which needn't be there yet.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Where the file of a filesystem of a sandbox is.
    pub fn path(&self, sandbox: &StateDir, filesystem: &str) -> PathBuf {
        let (namespace, id) = sandbox.location();
        self.root.join(namespace).join(id).join(format!("{filesystem}.img"))
    }

    /// Where the unpacked images of a sandbox are.
    pub fn images(&self, sandbox: &StateDir) -> PathBuf {
        let (namespace, id) = sandbox.location();
        self.root.join(namespace).join(id).join("images")
    }

    /// Makes the directory of `path` and removes what was left at it.
    pub fn make_room(&self, path: &Path) -> Result<(), StateError> {
        let parent = path.parent().expect("made by `path`");
        let mut attempts = 0;
        // The last filesystem of the namespace may just be going, with its directories.
        while let Err(error) =
            make_dir(parent).and_then(|()| fs::metadata(parent).map(drop).map_err(at("stat", parent)))
        {
            attempts += 1;
            if attempts == ATTEMPTS {
                return Err(error);
            }
        }
        absent_is_fine(fs::remove_file(path)).map_err(at("remove", path))
    }

    /// Removes what sandboxes that are gone have left. A failure is logged: it is no reason not to start a container.
    pub fn sweep(&self, state_root: &Path) {
        for namespace in names(&self.root).unwrap_or_default() {
            for sandbox in names(&self.root.join(&namespace)).unwrap_or_default() {
                // Another name was never ours.
                let Ok(state) = StateDir::new(state_root, &namespace, &sandbox) else { continue };
                if let Err(error) = self.sweep_sandbox(&state) {
                    tracing::warn!(%namespace, %sandbox, %error, "what a sandbox has left on disk couldn't be removed");
                }
            }
        }
    }

    fn sweep_sandbox(&self, state: &StateDir) -> Result<(), StateError> {
        // A busy sandbox's lock may take long.
        if !state.is_unused()? {
            return Ok(());
        }
        let locked = state.create()?;
        let swept = self.sweep_locked(&locked);
        locked.remove_if_unused()?;
        swept
    }

    fn sweep_locked(&self, locked: &Locked) -> Result<(), StateError> {
        if !locked.dir().is_unused()? {
            return Ok(());
        }
        let (namespace, id) = locked.dir().location();
        let directory = self.root.join(namespace).join(id);
        for name in names(&directory)?.iter().filter(|name| name.ends_with(".img")) {
            tracing::info!(path = %directory.join(name).display(), "removed what a sandbox has left");
            remove(&directory.join(name))?;
        }
        images::remove(&self.images(locked.dir()))?;
        remove_directories(&directory);
        Ok(())
    }
}

/// Removes a filesystem's file, and the directories that it was the last in. One that is gone is fine.
pub fn remove(path: &Path) -> Result<(), StateError> {
    absent_is_fine(fs::remove_file(path)).map_err(at("remove", path))?;
    if let Some(parent) = path.parent() {
        remove_directories(parent);
    }
    Ok(())
}

/// Those of a sandbox and its namespace, if they are empty.
pub(crate) fn remove_directories(sandbox: &Path) {
    if fs::remove_dir(sandbox).is_ok()
        && let Some(namespace) = sandbox.parent()
    {
        let _ = fs::remove_dir(namespace);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::ContainerRecord;

    #[test]
    fn what_has_no_sandbox_any_more_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let (state, store) = (dir.path().join("state"), dir.path().join("store"));
        let filestores = Filestores::new(&store);
        filestores.sweep(&state);
        let sandbox = |id: &str| StateDir::new(&state, "ns", id).unwrap();
        let make = |id: &str| {
            let path = filestores.path(&sandbox(id), "c.0");
            filestores.make_room(&path).unwrap();
            fs::write(&path, id).unwrap();
            path
        };
        let alive = sandbox("alive").create().unwrap();
        let record = ContainerRecord {
            id: "c".to_owned(),
            name: "c".to_owned(),
            sandbox: false,
            named: false,
            ids: stillframe_tmpfs::Ids::default(),
            pages_dir: None,
            precopy: false,
            load_all: false,
            init: None,
            filesystems: Vec::new(),
        };
        alive.put_container(&record).unwrap();
        let kept = make("alive");
        let gone = make("gone");
        // A sweep that died has left an empty sandbox.
        let half = make("half");
        drop(sandbox("half").create().unwrap());
        // Held by somebody who is at it, so it isn't waited for.
        filestores.sweep(&state);
        assert!(kept.exists());
        for path in [gone, half] {
            assert!(!path.exists() && !path.parent().unwrap().exists());
        }
        assert_eq!(names(&state.join("ns")).unwrap(), ["alive"], "a sweep leaves no sandboxes");
        remove(&kept).unwrap();
        remove(&kept).unwrap();
        assert_eq!(names(&store).unwrap(), [""; 0]);
    }

    #[test]
    fn a_sandbox_that_is_being_made_is_waited_for_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (state, store) = (dir.path().join("state"), dir.path().join("store"));
        let filestores = Filestores::new(&store);
        let sandbox = StateDir::new(&state, "ns", "new").unwrap();
        let path = filestores.path(&sandbox, "c.0");
        // Before the sandbox is made, with its image being unpacked.
        let images = images::Images::lock(filestores.images(&sandbox)).unwrap();
        filestores.sweep(&state);
        assert!(images.directory().exists());
        drop(images);
        filestores.sweep(&state);
        assert!(!store.join("ns").exists());
        // Between making the sandbox and writing the first record, with a file already there.
        let locked = sandbox.create().unwrap();
        filestores.make_room(&path).unwrap();
        fs::write(&path, "new").unwrap();
        std::thread::scope(|scope| {
            let sweeper = scope.spawn(|| filestores.sweep(&state));
            locked.make_filesystem("c", 0).unwrap();
            drop(locked);
            sweeper.join().unwrap();
        });
        assert!(path.exists());
    }
}
