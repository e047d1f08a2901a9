//! Images of a container's processes beside those of its filesystems: made by CRIU, which is called by whoever drives the
//! low-level runtime, and lying in the image directory, flat, under CRIU's own names.
//!
//! They become part of an image by being listed in its manifest with their lengths and digests, so that one that is missing or
//! altered is found before anything is restored. What is in them is CRIU's affair.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use stillframe_pgalloc::CHUNK_SIZE;

use crate::image::{ImageError, MANIFEST, META, PAGES, TREE, TREE_ZSTD, at, open_part, open_sized};
use crate::manifest::{Digest, Part};

/// One of CRIU's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessFile {
    /// Its name in the image directory.
    pub name: String,
    /// Its contents.
    #[serde(flatten)]
    pub part: Part,
}

/// Whether a file of this name can be one of them: what CRIU writes, and `runc checkpoint` besides.
pub fn is_process_file(name: &str) -> bool {
    let known = (name.ends_with(".img") && name != PAGES) || name == "descriptors.json";
    known && !name.contains('/') && ![MANIFEST, TREE, TREE_ZSTD, META].contains(&name)
}

/// Makes these files of a directory durable and describes them.
pub fn describe(directory: &Path, names: &[String]) -> Result<Vec<ProcessFile>, ImageError> {
    let describe = |name: &String| {
        let path = directory.join(name);
        let file = open_part(&path)?;
        file.sync_all().map_err(at("sync", &path))?;
        let mut part = Part { length: 0, chunk_size: CHUNK_SIZE, digests: Vec::new() };
        for_each_chunk(&file, |chunk| {
            part.length += chunk.len() as u64;
            part.digests.extend(Part::of(chunk).digests);
            true
        })
        .map_err(at("read", &path))?;
        Ok(ProcessFile { name: name.clone(), part })
    };
    names.iter().map(describe).collect()
}

/// Compares the files of an image with its manifest.
pub fn verify(directory: &Path, files: &[ProcessFile]) -> Result<(), ImageError> {
    for ProcessFile { name, part } in files {
        let path = directory.join(name);
        let file = open_sized(&path, part.length)?;
        let mut digests = part.digests.iter();
        let mut start = 0;
        let mut damaged = None;
        for_each_chunk(&file, |chunk| {
            let expected: Option<&Digest> = digests.next();
            if expected != Part::of(chunk).digests.first() {
                damaged = Some(start);
            }
            start += chunk.len() as u64;
            damaged.is_none()
        })
        .map_err(at("read", &path))?;
        if let Some(start) = damaged {
            let end = (start + CHUNK_SIZE).min(part.length);
            return Err(ImageError::Damaged { path, start, end });
        }
    }
    Ok(())
}

/// Until it says no.
fn for_each_chunk(mut file: &File, mut each: impl FnMut(&[u8]) -> bool) -> io::Result<()> {
    let mut chunk = Vec::new();
    loop {
        chunk.clear();
        (&mut file).take(CHUNK_SIZE).read_to_end(&mut chunk)?;
        if chunk.is_empty() || !each(&chunk) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_altered_or_missing_is_found_with_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let contents = vec![7; 100_000];
        fs::write(dir.path().join("pages-1.img"), &contents).unwrap();
        fs::write(dir.path().join("empty.img"), "").unwrap();
        let names = ["pages-1.img", "empty.img"].map(str::to_owned);
        let files = describe(dir.path(), &names).unwrap();
        assert_eq!(files[0].part, Part::of(&contents));
        verify(dir.path(), &files).unwrap();
        let altered = [&contents[..70_000], &[8], &contents[70_001..]].concat();
        for (bytes, words) in [
            (Some(altered.as_slice()), "pages-1.img is damaged between offsets 65536 and 100000"),
            (Some(&contents[..99_999]), "pages-1.img has 99999 bytes, not 100000"),
            (None, "open "),
        ] {
            match bytes {
                Some(bytes) => fs::write(dir.path().join("pages-1.img"), bytes).unwrap(),
                None => fs::remove_file(dir.path().join("pages-1.img")).unwrap(),
            }
            let error = verify(dir.path(), &files).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn names_are_criu_s() {
        for (name, want) in [
            ("pages-1.img", true),
            ("inventory.img", true),
            ("descriptors.json", true),
            ("pages.img", false),
            ("manifest.json", false),
            ("a/b.img", false),
            ("spec.dump", false),
        ] {
            assert_eq!(is_process_file(name), want, "{name}");
        }
    }
}
