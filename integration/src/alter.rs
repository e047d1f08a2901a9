//! A checkpoint image of containerd with something changed in it: what damage on the way, or somebody else, does.
//!
//! The new image's digests are right, so containerd and `ctr` are content with it; only Stillframe can tell.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::Containerd;
use crate::checkpoint::{LookError, SPEC, TASK_DATA, io_error};

/// What is to be changed.
#[derive(Default)]
pub struct Alterations<'a> {
    /// Changes the shim's files, which are unpacked in this directory.
    pub files: Option<&'a dyn Fn(&Path)>,
    /// Changes the container's OCI spec: this byte string to that one, of the same length.
    pub spec: Option<(&'a str, &'a str)>,
}

impl Containerd {
    /// Makes the image `new` of the checkpoint image `old`.
    pub fn alter_checkpoint(
        &self,
        old: &str,
        new: &str,
        alterations: &Alterations<'_>,
    ) -> Result<(), LookError> {
        let (_, mut index) = self.checkpoint_index(old)?;
        let work = tempfile::tempdir_in(self.dir()).map_err(io_error(self.dir()))?;
        let layout = work.path().join("layout");
        let blobs = layout.join("blobs/sha256");
        fs::create_dir_all(&blobs).map_err(io_error(&blobs))?;
        for part in index["manifests"].as_array_mut().into_iter().flatten() {
            let blob = self.blob(part["digest"].as_str().unwrap_or_default());
            let mut bytes = fs::read(&blob).map_err(io_error(&blob))?;
            if part["mediaType"] == TASK_DATA
                && let Some(change) = alterations.files
            {
                bytes = repack(&bytes, &work.path().join("files"), change).map_err(io_error(&blob))?;
            }
            if part["mediaType"] == SPEC
                && let Some((from, to)) = alterations.spec
            {
                replace(&mut bytes, from.as_bytes(), to.as_bytes());
            }
            let digest = store(&blobs, &bytes).map_err(io_error(&blobs))?;
            part["digest"] = json!(digest);
            part["size"] = json!(bytes.len());
        }
        // A part may be one that nobody has changed; then it's the very same blob, which is fine.
        let index = index.to_string();
        let digest = store(&blobs, index.as_bytes()).map_err(io_error(&blobs))?;
        let outer = json!({"schemaVersion": 2, "manifests": [{
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "digest": digest,
            "size": index.len(),
            "annotations": {"io.containerd.image.name": new},
        }]});
        for (name, text) in [
            ("index.json", outer.to_string()),
            ("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#.to_owned()),
        ] {
            fs::write(layout.join(name), text).map_err(io_error(&layout))?;
        }
        let tar = work.path().join("image.tar");
        pack(&layout, File::create(&tar).map_err(io_error(&tar))?).map_err(io_error(&tar))?;
        let tar = tar.to_string_lossy();
        self.ctr().run(&["images", "import", "--all-platforms", "--no-unpack", &tar])?;
        Ok(())
    }
}

fn repack(bytes: &[u8], dir: &Path, change: &dyn Fn(&Path)) -> io::Result<Vec<u8>> {
    tar::Archive::new(bytes).unpack(dir)?;
    change(dir);
    let mut out = Vec::new();
    pack(dir, &mut out)?;
    Ok(out)
}

/// As containerd does it: names relative, no entry for the directory itself.
fn pack(dir: &Path, out: impl io::Write) -> io::Result<()> {
    let mut tar = tar::Builder::new(out);
    tar.follow_symlinks(false);
    let mut names: Vec<_> =
        fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<_, _>>()?;
    names.sort();
    for name in names {
        let path = dir.join(&name);
        if path.is_dir() {
            tar.append_dir_all(&name, &path)?;
        } else {
            tar.append_path_with_name(&path, &name)?;
        }
    }
    tar.into_inner()?.flush()
}

fn store(blobs: &Path, bytes: &[u8]) -> io::Result<String> {
    let mut hex = String::new();
    for byte in Sha256::digest(bytes) {
        hex.push_str(&format!("{byte:02x}"));
    }
    fs::write(blobs.join(&hex), bytes)?;
    Ok(format!("sha256:{hex}"))
}

fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    assert_eq!(from.len(), to.len(), "the lengths inside the document must stay right");
    let places: Vec<usize> =
        (0..bytes.len().saturating_sub(from.len())).filter(|&at| bytes[at..].starts_with(from)).collect();
    assert!(!places.is_empty(), "the spec has no {:?}", String::from_utf8_lossy(from));
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
}

/// One byte in the middle of a file, inverted.
pub fn flip(path: &Path) {
    let mut bytes = fs::read(path).expect("the image has this file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    fs::write(path, bytes).expect("our own directory is writable");
}

/// The second half of a file, cut off.
pub fn truncate(path: &Path) {
    let file = File::options().write(true).open(path).expect("the image has this file");
    let length = file.metadata().expect("an open file has metadata").len();
    file.set_len(length / 2).expect("our own directory is writable");
}

/// Replaces a piece of a text file.
pub fn replace_text(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).expect("the image has this file");
    assert!(text.contains(from), "{} has no {from}: {text}", path.display());
    fs::write(path, text.replacen(from, to, 1)).expect("our own directory is writable");
}
