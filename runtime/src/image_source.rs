//! Where an image to restore from comes from: a directory, or a tar archive that holds one.
//!
//! The archive is the one that containerd's CRI writes on a checkpoint request: the image's files are in its
//! directory `checkpoint/`. They are unpacked once for a sandbox ([`crate::images`]). Nothing else of the archive is looked at, and nothing in it can name a place
//! to write to.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_128;

use crate::image::{MANIFEST, META, PAGES, TREE, TREE_ZSTD};
use crate::images::{Images, UnpackError};
use crate::processes::is_process_file;
use crate::state::StateError;

/// Why there is no image to be had.
#[derive(Debug, thiserror::Error)]
pub enum ImageSourceError {
    /// The path isn't absolute, and nobody could say relative to what.
    #[error(
        "the image to restore from is given as \"{0}\": give the absolute path of a directory or a tar archive"
    )]
    Relative(PathBuf),
    /// It can't be read.
    #[error("{operation} the image to restore from, {path}")]
    Read {
        /// What was tried.
        operation: &'static str,
        /// The directory or archive.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The directory to unpack it into.
    #[error(transparent)]
    Directory(#[from] StateError),
    /// The archive holds no image.
    #[error("the archive {path} holds no checkpoint image: {missing} isn't in its directory checkpoint/")]
    NoImage {
        /// The archive.
        path: PathBuf,
        /// The first file that is missing.
        missing: &'static str,
    },
}

/// An image's directory.
#[derive(Debug)]
pub struct Found {
    /// Where it is.
    pub directory: PathBuf,
    /// While this lives, nobody removes what was unpacked for a sandbox that has no container yet.
    _images: Option<Images>,
}

/// Finds the image at `path`, an archive's among `images`.
pub fn find(
    path: &Path,
    images: impl FnOnce() -> Result<Images, StateError>,
) -> Result<Found, ImageSourceError> {
    if !path.is_absolute() {
        return Err(ImageSourceError::Relative(path.to_owned()));
    }
    // What isn't there is reported by who opens the image.
    if !path.is_file() {
        return Ok(Found { directory: path.to_owned(), _images: None });
    }
    let fail = |operation| move |source| ImageSourceError::Read { operation, path: path.to_owned(), source };
    let archive = File::open(path).map_err(fail("open"))?;
    let key = key(&archive.metadata().map_err(fail("stat"))?);
    let images = images()?;
    let unpacked =
        images.get(&key, |directory| match unpack(archive, directory).map_err(fail("unpack"))? {
            Some(missing) => Err(ImageSourceError::NoImage { path: path.to_owned(), missing }),
            None => Ok(()),
        });
    match unpacked {
        Ok(directory) => Ok(Found { directory, _images: Some(images) }),
        Err(UnpackError::Directory(source)) => Err(source.into()),
        Err(UnpackError::Unpack(error)) => Err(error),
    }
}

/// What an archive is known by: a digest of its contents would take as long as unpacking it.
fn key(archive: &Metadata) -> String {
    let times = [archive.mtime(), archive.mtime_nsec(), archive.ctime(), archive.ctime_nsec()]
        .map(i64::cast_unsigned);
    let parts = [archive.dev(), archive.ino(), archive.size()].into_iter().chain(times);
    let bytes: Vec<u8> = parts.flat_map(u64::to_le_bytes).collect();
    format!("archive-{:032x}", xxh3_128(&bytes))
}

/// Unpacks the image in a tar archive, in its directory `checkpoint/` or in its root, into a directory that is empty. Gives
/// the name of a file that is missing then, if one is. The pages may be kept apart; who opens the image knows.
pub fn unpack(archive: impl Read, directory: &Path) -> io::Result<Option<&'static str>> {
    let mut archive = tar::Archive::new(archive);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path_bytes().into_owned();
        let name = name.strip_prefix(b"./").unwrap_or(&name);
        let name = name.strip_prefix(b"checkpoint/").unwrap_or(name);
        let known = str::from_utf8(name).ok();
        let known = known
            .filter(|name| [MANIFEST, TREE, TREE_ZSTD, META, PAGES].contains(name) || is_process_file(name));
        if let Some(name) = known.filter(|_| entry.header().entry_type().is_file()) {
            let mut file = fs::File::create_new(directory.join(name))?;
            io::copy(&mut entry, &mut file)?;
        }
    }
    let missing = |name: &&str| !directory.join(name).exists();
    let missing_tree = [TREE, TREE_ZSTD].iter().all(missing).then_some(TREE);
    Ok([MANIFEST].into_iter().find(missing).or(missing_tree).or([META].into_iter().find(missing)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(entries: &[(&str, &[u8])]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut builder = tar::Builder::new(file.as_file());
        for (name, contents) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_size(contents.len() as u64);
            header.set_mode(0o600);
            // Not append_data, which refuses the hostile names below.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            builder.append(&header, *contents).unwrap();
        }
        builder.finish().unwrap();
        drop(builder);
        file
    }

    fn open(path: &Path, dir: &Path) -> Result<PathBuf, ImageSourceError> {
        find(path, || Images::lock(dir.join("images"))).map(|found| found.directory)
    }

    #[test]
    fn an_archive_is_unpacked_once_and_again_when_it_is_another() {
        let file = archive(&[
            ("spec.dump", b"not ours"),
            ("checkpoint/manifest.json", b"m"),
            ("checkpoint/tree.tar", b"t"),
            ("checkpoint/pages.meta", b"p"),
            ("checkpoint/pages.img", b"i"),
            ("checkpoint/../../evil", b"e"),
            ("/etc/evil", b"e"),
        ]);
        let dir = tempfile::tempdir().unwrap();
        let directory = open(file.path(), dir.path()).unwrap();
        let mut names: Vec<_> =
            fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["manifest.json", "pages.img", "pages.meta", "tree.tar"]);
        assert_eq!(fs::read(directory.join("pages.img")).unwrap(), b"i");
        fs::write(directory.join("mark"), "").unwrap();
        assert_eq!(open(file.path(), dir.path()).unwrap(), directory);
        assert!(directory.join("mark").exists());
        let time = fs::FileTimes::new().set_modified(std::time::SystemTime::UNIX_EPOCH);
        file.as_file().set_times(time).unwrap();
        let other = open(file.path(), dir.path()).unwrap();
        assert!(other != directory && other.join("tree.tar").exists());
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &Path| open(path, dir.path());
        let without = archive(&[("checkpoint/manifest.json", b"m")]);
        let error = open(without.path()).unwrap_err().to_string();
        assert!(error.contains("tree.tar isn't in its directory"), "{error}");
        let twice = archive(&[("checkpoint/manifest.json", b"m"), ("manifest.json", b"m")]);
        assert!(open(twice.path()).is_err());
        let error = open(Path::new("relative")).unwrap_err().to_string();
        assert!(error.contains("\"relative\""), "{error}");
        let text = tempfile::NamedTempFile::new().unwrap();
        fs::write(text.path(), [b'x'; 2000]).unwrap();
        assert!(open(text.path()).is_err());
    }
}
