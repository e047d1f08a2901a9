//! Where an image to restore from comes from: a directory, or a tar archive that holds one.
//!
//! The archive is the one that containerd's CRI writes on a checkpoint request: the image's files are in its
//! directory `checkpoint/`. They are unpacked into a directory below the temporary directory,
//! which is gone when this is dropped. Nothing else of the archive is looked at, and nothing in it can name a place
//! to write to.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::image::{MANIFEST, META, PAGES, TREE};
use crate::processes::is_process_file;

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
    /// The archive holds no image.
    #[error("the archive {path} holds no checkpoint image: {missing} isn't in its directory checkpoint/")]
    NoImage {
        /// The archive.
        path: PathBuf,
        /// The first file that is missing.
        missing: &'static str,
    },
}

/// An image directory that can be opened as long as this lives.
#[derive(Debug)]
pub enum ImageSource {
    /// It is there.
    Directory(PathBuf),
    /// It was unpacked.
    Unpacked(tempfile::TempDir),
}

impl ImageSource {
    /// Finds the image at `path`.
    pub fn open(path: &Path) -> Result<Self, ImageSourceError> {
        if !path.is_absolute() {
            return Err(ImageSourceError::Relative(path.to_owned()));
        }
        // What isn't there is reported by who opens the image.
        if !path.is_file() {
            return Ok(Self::Directory(path.to_owned()));
        }
        let fail =
            |operation| move |source| ImageSourceError::Read { operation, path: path.to_owned(), source };
        let directory = tempfile::Builder::new().prefix("stillframe-image-").tempdir();
        let directory = directory.map_err(fail("unpack"))?;
        let archive = File::open(path).map_err(fail("open"))?;
        let missing = unpack(archive, directory.path()).map_err(fail("unpack"))?;
        match missing {
            Some(missing) => Err(ImageSourceError::NoImage { path: path.to_owned(), missing }),
            None => Ok(Self::Unpacked(directory)),
        }
    }

    /// The image directory.
    pub fn directory(&self) -> &Path {
        match self {
            Self::Directory(path) => path,
            Self::Unpacked(directory) => directory.path(),
        }
    }
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
        let known =
            known.filter(|name| [MANIFEST, TREE, META, PAGES].contains(name) || is_process_file(name));
        if let Some(name) = known.filter(|_| entry.header().entry_type().is_file()) {
            let mut file = fs::File::create_new(directory.join(name))?;
            io::copy(&mut entry, &mut file)?;
        }
    }
    Ok([MANIFEST, TREE, META].into_iter().find(|name| !directory.join(name).exists()))
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

    #[test]
    fn an_archive_is_unpacked_and_goes_again() {
        let file = archive(&[
            ("spec.dump", b"not ours"),
            ("checkpoint/manifest.json", b"m"),
            ("checkpoint/tree.tar", b"t"),
            ("checkpoint/pages.meta", b"p"),
            ("checkpoint/pages.img", b"i"),
            ("checkpoint/../../evil", b"e"),
            ("/etc/evil", b"e"),
        ]);
        let source = ImageSource::open(file.path()).unwrap();
        let directory = source.directory().to_owned();
        let mut names: Vec<_> =
            fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["manifest.json", "pages.img", "pages.meta", "tree.tar"]);
        assert_eq!(fs::read(directory.join("pages.img")).unwrap(), b"i");
        drop(source);
        assert!(!directory.exists());
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        let without = archive(&[("checkpoint/manifest.json", b"m")]);
        let error = ImageSource::open(without.path()).unwrap_err().to_string();
        assert!(error.contains("tree.tar isn't in its directory"), "{error}");
        let twice = archive(&[("checkpoint/manifest.json", b"m"), ("manifest.json", b"m")]);
        assert!(ImageSource::open(twice.path()).is_err());
        let error = ImageSource::open(Path::new("relative")).unwrap_err().to_string();
        assert!(error.contains("\"relative\""), "{error}");
        let text = tempfile::NamedTempFile::new().unwrap();
        fs::write(text.path(), [b'x'; 2000]).unwrap();
        assert!(ImageSource::open(text.path()).is_err());
    }
}
