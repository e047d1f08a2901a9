//! Images that had to be unpacked: `FILESTORE_DIR/<namespace>/<sandbox>/images/<key>/`, on disk, since they may be as large as
//! what they are of.
//!
//! All containers of a pod are given the same image, and one that is made again needs it again: it is unpacked once, and removed with
//! the sandbox. The key tells what it was unpacked from, whatever that is called by then.
//!
//! `KEY.<random>` -> (complete) -> `KEY`, by rename. What a process that died has left of the first goes with the sandbox, too: when its last
//! container is removed, else with the next start of any container ([`crate::filestores`]), for which a sandbox without containers is gone.
//! The first container of a sandbox is in no record yet while its image is unpacked: whoever wants one has the directory
//! locked (flock(2), shared) until then, and nobody removes a directory that is locked.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::filestores::remove_directories;
use crate::state::{StateError, absent_is_fine, make_dir};

/// Attempts to make a directory that somebody else may be removing.
const ATTEMPTS: usize = 16;

fn at<'a>(operation: &'static str, path: &'a Path) -> impl Fn(io::Error) -> StateError + 'a {
    move |source| StateError::File { operation, path: path.to_owned(), source }
}

/// The unpacked images of a sandbox, which stay while this lives.
#[derive(Debug)]
pub struct Images {
    directory: PathBuf,
    _lock: Flock<File>,
}

impl Images {
    /// Those in `directory`, which is made if need be.
    pub(crate) fn lock(directory: PathBuf) -> Result<Self, StateError> {
        for _ in 0..ATTEMPTS {
            make_dir(&directory)?;
            let Ok(file) = File::open(&directory) else { continue };
            let lock = Flock::lock(file, FlockArg::LockShared)
                .map_err(|(_, errno)| at("lock", &directory)(errno.into()))?;
            if is_at(&lock, &directory) {
                return Ok(Self { directory, _lock: lock });
            }
        }
        Err(at("make the directory", &directory)(io::ErrorKind::NotFound.into()))
    }

    /// The directory of all of them.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The image of this key; if it isn't there, it is unpacked by `unpack` into an empty directory.
    pub fn get<E>(
        &self,
        key: &str,
        unpack: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<PathBuf, UnpackError<E>> {
        get(&self.directory, key, unpack)
    }
}

/// The same for a process that somebody else has locked the directory for.
pub fn get<E>(
    directory: &Path,
    key: &str,
    unpack: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<PathBuf, UnpackError<E>> {
    let path = directory.join(key.replace([':', '/'], "-"));
    if path.is_dir() {
        return Ok(path);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let made = tempfile::Builder::new().prefix(&format!("{name}.")).tempdir_in(directory);
    let new = made.map_err(|source| at("make a directory in", directory)(source))?;
    unpack(new.path()).map_err(UnpackError::Unpack)?;
    match fs::rename(new.path(), &path) {
        Ok(()) => {
            let _ = new.keep();
            Ok(path)
        }
        // Another container's was quicker.
        Err(_) if path.is_dir() => Ok(path),
        Err(source) => Err(at("rename", new.path())(source).into()),
    }
}

/// Why an image isn't there.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError<E> {
    /// The directory.
    #[error(transparent)]
    Directory(#[from] StateError),
    /// It couldn't be unpacked.
    #[error(transparent)]
    Unpack(E),
}

/// Whether a directory that was opened is still the one of that path: it may have been removed, and made again, before it was locked.
fn is_at(open: &File, path: &Path) -> bool {
    let same = |one: Metadata, other: Metadata| (one.dev(), one.ino()) == (other.dev(), other.ino());
    open.metadata().and_then(|one| Ok(same(one, fs::metadata(path)?))).unwrap_or(false)
}

/// Removes the unpacked images in `directory`, unless somebody is about to use one. The sandbox has no containers.
pub(crate) fn remove(directory: &Path) -> Result<(), StateError> {
    let file = match File::open(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(at("open", directory))?,
    };
    let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(()) };
    if !is_at(&lock, directory) {
        return Ok(());
    }
    absent_is_fine(fs::remove_dir_all(directory)).map_err(at("remove", directory))?;
    if let Some(sandbox) = directory.parent() {
        remove_directories(sandbox);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpack(directory: &Path) -> io::Result<()> {
        fs::write(directory.join("file"), "unpacked")
    }

    #[test]
    fn an_image_is_unpacked_once_and_goes_when_nobody_wants_it() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("ns/s/images");
        let images = Images::lock(directory.clone()).unwrap();
        let first = images.get("sha256:1", unpack).unwrap();
        assert_eq!(fs::read(first.join("file")).unwrap(), b"unpacked");
        let never = |_: &Path| -> io::Result<()> { panic!("it is there") };
        assert_eq!(images.get("sha256:1", never).unwrap(), first);
        assert_ne!(images.get("sha256:2", unpack).unwrap(), first);
        // Two at once: both find one.
        let outer = images.get("3", |_| images.get("3", unpack).map(drop)).unwrap();
        assert!(outer.join("file").exists());
        remove(&directory).unwrap();
        assert!(first.exists(), "somebody has it locked");
        drop(images);
        remove(&directory).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        remove(&directory).unwrap();
    }

    #[test]
    fn of_an_image_that_cannot_be_unpacked_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::lock(dir.path().join("images")).unwrap();
        let half = |directory: &Path| unpack(directory).and(Err(io::Error::other("torn")));
        let error = images.get("key", half).unwrap_err();
        assert!(matches!(error, UnpackError::Unpack(_)), "{error}");
        assert_eq!(fs::read_dir(images.directory()).unwrap().count(), 0);
    }
}
