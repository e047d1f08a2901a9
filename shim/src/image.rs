//! Finds the checkpoint in an image of containerd's and unpacks it.
//!
//! | image | made by | where the checkpoint is |
//! | --- | --- | --- |
//! | index | `ctr containers checkpoint --task`, `ctr tasks checkpoint` | a tar, of containerd's media type for it |
//! | manifest, or an index of some | buildah and the like, of an archive that kubelet's checkpoint request wrote | in a layer, below `checkpoint/` |
//!
//! What is in an image is somebody else's: its documents are read up to a limit, and of its tars only our files are taken.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;
use serde::Deserialize;
use stillframe_runtime::image_source;

use crate::store::{Store, StoreError, Target};

/// The media type of a task's checkpoint (`images.MediaTypeContainerd1Checkpoint`): a tar of what the shim wrote.
const CHECKPOINT: &str = "application/vnd.containerd.container.criu.checkpoint.criu.tar";
/// An index lists manifests.
const INDEXES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
/// A manifest lists layers.
const MANIFESTS: [&str; 2] =
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];
/// How large a manifest or an index may be (containerd's own limit for them).
const LARGEST_DOCUMENT: u64 = 8 << 20;
/// How many documents an image may consist of: indexes may name indexes.
const MOST_DOCUMENTS: usize = 1000;

/// Why there is no checkpoint to be had.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No image of that name.
    #[error(
        "containerd has no image {name:?} in its namespace {namespace}: pull or import it there, or give the absolute path of \
         a directory or an archive instead"
    )]
    NoImage {
        /// As asked.
        name: String,
        /// containerd's.
        namespace: String,
    },
    /// An image of something else.
    #[error(
        "the image {name:?} holds no checkpoint of Stillframe's: {found}. `ctr containers checkpoint --task` makes one, and so \
         does an image with an archive of a checkpoint request as its layer"
    )]
    NoCheckpoint {
        /// As asked.
        name: String,
        /// What there was.
        found: String,
    },
    /// containerd.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A manifest or an index.
    #[error("the image's document {digest} can't be read")]
    Document {
        /// Its digest.
        digest: String,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// A tar.
    #[error("the image's part {digest} can't be unpacked")]
    Unpack {
        /// Its digest.
        digest: String,
        /// What failed.
        #[source]
        source: io::Error,
    },
}

/// Where an image's parts are.
trait Blobs {
    fn blob(&self, digest: &str) -> Result<impl Read, StoreError>;
}

impl Blobs for Store {
    fn blob(&self, digest: &str) -> Result<impl Read, StoreError> {
        Store::blob(self, digest)
    }
}

/// What the image `name` is.
pub fn find(store: &Store, name: &str, namespace: &str) -> Result<Target, ImageError> {
    let none = || ImageError::NoImage { name: name.to_owned(), namespace: namespace.to_owned() };
    store.image(name)?.ok_or_else(none)
}

/// Unpacks the checkpoint in an image, which is called `name`, into an empty directory.
pub fn unpack(store: &Store, name: &str, target: Target, directory: &Path) -> Result<(), ImageError> {
    unpack_target(store, name, target, directory)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Part {
    #[serde(default)]
    media_type: String,
    digest: String,
}

/// An index or a manifest.
#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    manifests: Vec<Part>,
    #[serde(default)]
    layers: Vec<Part>,
}

fn unpack_target(store: &impl Blobs, name: &str, target: Target, directory: &Path) -> Result<(), ImageError> {
    let mut queue = VecDeque::from([target]);
    let mut layers = Vec::new();
    let mut documents = 0;
    while let Some(Target { media_type, digest }) = queue.pop_front() {
        let kind = media_type.as_str();
        if kind == CHECKPOINT {
            // Whatever else there is, the image with which the container was made for instance, is not asked for.
            layers = vec![digest];
            break;
        }
        if documents == MOST_DOCUMENTS || !(INDEXES.contains(&kind) || MANIFESTS.contains(&kind)) {
            continue;
        }
        documents += 1;
        let document = document(store, &digest)?;
        queue.extend(document.manifests.into_iter().map(Target::from));
        layers.extend(document.layers.into_iter().map(|layer| layer.digest));
    }
    let mut missing = None;
    for digest in &layers {
        let failed = |source| ImageError::Unpack { digest: digest.clone(), source };
        let tar = plain(store.blob(digest)?).map_err(failed)?;
        missing = image_source::unpack(tar, directory).map_err(failed)?;
        if missing.is_none() {
            return Ok(());
        }
    }
    let found = match missing {
        Some(missing) => format!("there is no {missing} in it"),
        None => "it has no parts that could".to_owned(),
    };
    Err(ImageError::NoCheckpoint { name: name.to_owned(), found })
}

impl From<Part> for Target {
    fn from(Part { media_type, digest }: Part) -> Self {
        Self { media_type, digest }
    }
}

fn document(store: &impl Blobs, digest: &str) -> Result<Document, ImageError> {
    let failed = |source| ImageError::Document { digest: digest.to_owned(), source };
    let mut text = Vec::new();
    let mut blob = store.blob(digest)?.take(LARGEST_DOCUMENT + 1);
    blob.read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > LARGEST_DOCUMENT {
        return Err(failed(io::Error::other(format!("it is larger than {LARGEST_DOCUMENT} bytes"))));
    }
    serde_json::from_slice(&text).map_err(|error| failed(error.into()))
}

/// The tar in a layer. By its first bytes: media types of layers are many, and some tools write wrong ones.
fn plain<'a>(layer: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut layer = BufReader::with_capacity(1 << 16, layer);
    match layer.fill_buf()? {
        [0x1f, 0x8b, ..] => Ok(Box::new(MultiGzDecoder::new(layer))),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            Err(io::Error::other("it is compressed with zstd: use gzip, or nothing"))
        }
        _ => Ok(Box::new(layer)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::fs;
    use std::io::Write;

    use serde_json::{Value, json};
    use tonic::Status;

    use super::*;

    #[derive(Default)]
    struct Fake(HashMap<String, Vec<u8>>);

    impl Fake {
        /// Its name stands for its digest.
        fn with(mut self, name: &str, bytes: impl Into<Vec<u8>>) -> Self {
            self.0.insert(name.to_owned(), bytes.into());
            self
        }
    }

    impl Blobs for Fake {
        fn blob(&self, digest: &str) -> Result<impl Read, StoreError> {
            let missing =
                || StoreError::Call { what: digest.to_owned(), status: Box::new(Status::not_found("gone")) };
            self.0.get(digest).map(Vec::as_slice).ok_or_else(missing)
        }
    }

    fn tar(names: &[&str]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for name in names {
            let mut header = tar::Header::new_gnu();
            header.set_size(name.len() as u64);
            header.set_mode(0o600);
            builder.append_data(&mut header, name, name.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn list(field: &str, parts: &[(&str, &str)]) -> String {
        let parts: Vec<Value> = parts
            .iter()
            .map(|(kind, digest)| json!({"mediaType": kind, "digest": digest, "size": 1}))
            .collect();
        json!({"schemaVersion": 2, field: parts}).to_string()
    }

    /// The files that come out, and what is in the manifest.
    fn unpacked(store: &Fake, kind: &str, digest: &str) -> Result<String, String> {
        let directory = tempfile::tempdir().unwrap();
        let target = Target { media_type: kind.to_owned(), digest: digest.to_owned() };
        unpack_target(store, "an-image", target, directory.path())
            .map_err(|error| crate::error::chain(&error))?;
        let mut names: Vec<_> = fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["manifest.json", "pages.img", "pages.meta", "tree.tar"]);
        Ok(fs::read_to_string(directory.path().join("manifest.json")).unwrap())
    }

    const FLAT: [&str; 4] = ["manifest.json", "tree.tar", "pages.meta", "pages.img"];
    const NESTED: [&str; 5] = [
        "spec.dump",
        "checkpoint/manifest.json",
        "checkpoint/tree.tar",
        "checkpoint/pages.meta",
        "checkpoint/pages.img",
    ];

    #[test]
    fn a_tasks_checkpoint_is_taken_and_not_the_image_beside_it() {
        let index = list("manifests", &[(MANIFESTS[0], "base"), (CHECKPOINT, "criu"), ("text/x", "options")]);
        let base = list("layers", &[("layer", "base-layer")]);
        let store = Fake::default()
            .with("index", index)
            .with("base", base)
            .with("base-layer", tar(&NESTED))
            .with("criu", tar(&FLAT));
        assert_eq!(unpacked(&store, INDEXES[0], "index").unwrap(), "manifest.json");
    }

    #[test]
    fn an_archive_in_a_layer_is_found_compressed_or_not() {
        for layer in [tar(&NESTED), gzip(&tar(&NESTED))] {
            for (kind, digest) in
                [(MANIFESTS[0], "manifest"), (MANIFESTS[1], "manifest"), (INDEXES[1], "list")]
            {
                let store = Fake::default()
                    .with("list", list("manifests", &[(MANIFESTS[1], "manifest")]))
                    .with("manifest", list("layers", &[("any", "other"), ("any", "layer")]))
                    .with("other", tar(&["etc/passwd"]))
                    .with("layer", layer.clone());
                assert_eq!(unpacked(&store, kind, digest).unwrap(), "checkpoint/manifest.json");
            }
        }
    }

    #[test]
    fn what_holds_no_checkpoint_is_refused_with_what_is_missing() {
        let zstd = [0x28, 0xb5, 0x2f, 0xfd, 0];
        let ring = list("manifests", &[(INDEXES[0], "ring")]);
        let store = Fake::default()
            .with("ring", ring)
            .with("empty", "{}")
            .with("text", "no JSON")
            .with("long", vec![b' '; (8 << 20) + 1])
            .with("lost", list("layers", &[("any", "gone")]))
            .with("criu", tar(&["pages-1.img", "inventory.img"]))
            .with("half", list("layers", &[("any", "half-layer")]))
            .with("half-layer", tar(&["checkpoint/manifest.json"]))
            .with("new", list("layers", &[("any", "zstd")]))
            .with("zstd", zstd)
            .with("torn", list("layers", &[("any", "torn-layer")]))
            .with("torn-layer", &gzip(&tar(&NESTED))[..100]);
        for (kind, digest, words) in [
            (INDEXES[0], "ring", "no parts that could"),
            (MANIFESTS[0], "empty", "no parts that could"),
            ("application/octet-stream", "text", "no parts that could"),
            (MANIFESTS[0], "text", "document text can't be read: expected"),
            (MANIFESTS[0], "long", "larger than 8388608 bytes"),
            (MANIFESTS[0], "lost", "can't give gone: "),
            (
                CHECKPOINT,
                "criu",
                "\"an-image\" holds no checkpoint of Stillframe's: there is no manifest.json",
            ),
            (MANIFESTS[0], "half", "there is no tree.tar"),
            (MANIFESTS[0], "new", "part zstd can't be unpacked: it is compressed with zstd"),
            (MANIFESTS[0], "torn", "part torn-layer can't be unpacked"),
        ] {
            let error = unpacked(&store, kind, digest).unwrap_err();
            assert!(error.contains(words), "{digest}: no {words:?} in {error}");
        }
    }
}
