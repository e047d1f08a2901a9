//! `manifest.json`: what an image is, and the lengths and digests of its other parts.
//!
//! An envelope apart from its contents: `format` and `version` are judged first, then `digest` over the
//! bytes of `body` exactly as they stand in the file, and only then is the body decoded. The manifest is
//! the last file of an image to appear (by rename), so a directory without one is no image.

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use stillframe_pgalloc::{CHUNK_SIZE, digest_chunks};
use stillframe_tmpfs::{Ids, ResourceId};
use xxhash_rust::xxh3::xxh3_64;

use crate::processes::{ProcessFile, is_process_file};

/// Value of `format`.
pub const FORMAT: &str = "stillframe-image";
/// The version written, and the only one read.
pub const VERSION: u64 = 1;
/// Most bytes of compressed archives together, uncompressed: about a million names. What is larger isn't compressed, so that
/// an image takes memory in proportion to its own size or to this.
pub const COMPRESSED_MAX: u64 = 1 << 30;

/// An XXH3-64 digest, in JSON as 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest(pub u64);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let hexadecimal = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let digest = u64::from_str_radix(&text, 16).ok().filter(|_| hexadecimal);
        digest.map(Self).ok_or_else(|| serde::de::Error::custom("a digest has 16 hexadecimal digits"))
    }
}

#[derive(Serialize, Deserialize)]
struct Envelope<'a> {
    format: String,
    version: u64,
    digest: Digest,
    #[serde(borrow)]
    body: &'a RawValue,
}

/// Why a manifest can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It isn't JSON of the envelope's shape.
    #[error("manifest.json is damaged or no manifest")]
    Envelope(#[source] serde_json::Error),
    /// It is a manifest of something else.
    #[error("manifest.json says format \"{0}\", not \"{FORMAT}\": this is no image of Stillframe")]
    Format(String),
    /// It is of a version that isn't known.
    #[error("the image has version {0}, this program reads version {VERSION}: use a newer Stillframe")]
    Version(u64),
    /// The body isn't what was written.
    #[error("manifest.json is damaged: its body has digest {found}, not {expected}")]
    Digest {
        /// What the envelope says.
        expected: Digest,
        /// What the body has.
        found: Digest,
    },
    /// The body is intact but not understood.
    #[error("manifest.json has a body that can't be understood")]
    Body(#[source] serde_json::Error),
    /// The body contradicts itself.
    #[error("manifest.json: {0}")]
    Contradiction(&'static str),
}

/// The body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the program that wrote it; informational.
    pub stillframe: String,
    /// When it was written, in seconds since 1970; informational.
    pub created: u64,
    /// `tree.tar`, or `tree.tar.zst` if the archives are compressed.
    pub tree: Part,
    /// `pages.meta`.
    pub meta: Part,
    /// Length of `pages.img` in bytes; its digests are in `pages.meta`.
    pub pages_length: u64,
    /// Absolute path of the pages file, where it isn't `pages.img` in the image directory but is kept apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages_path: Option<PathBuf>,
    /// The containers whose filesystems are saved.
    pub containers: Vec<SavedContainer>,
    /// Set if the image is of a whole pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<SavedPod>,
    /// The filesystems, in the order of their trees.
    pub filesystems: Vec<SavedFilesystem>,
    /// Images of the processes of the one container there is, if they were saved, too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<ProcessFile>,
}

/// A part of the image that is digested in the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its length in bytes.
    pub length: u64,
    /// Bytes to a digest; the last may cover fewer.
    pub chunk_size: u64,
    /// The digests of its chunks, in order.
    pub digests: Vec<Digest>,
}

impl Part {
    /// Describes the contents of a part.
    pub fn of(bytes: &[u8]) -> Self {
        let digests = digest_chunks(bytes, CHUNK_SIZE as usize).into_iter().map(Digest).collect();
        Self { length: bytes.len() as u64, chunk_size: CHUNK_SIZE, digests }
    }

    /// Offset of the first chunk of `bytes`, which begin at the chunk at `start`, that isn't what was written, if there is
    /// one. The length must have been compared before.
    pub fn first_damage(&self, start: u64, bytes: &[u8]) -> Option<u64> {
        let found = digest_chunks(bytes, CHUNK_SIZE as usize);
        let expected = self.digests.iter().skip((start / CHUNK_SIZE) as usize);
        let differs = found.iter().zip(expected).position(|(found, expected)| *found != expected.0);
        differs.map(|chunk| start + chunk as u64 * CHUNK_SIZE)
    }
}

/// A container whose filesystems are saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedContainer {
    /// Its name in ResourceIDs.
    pub name: String,
    /// Whether an annotation gave the name; else it is the container's id, which no other can have.
    pub named: bool,
}

/// A pod that is saved as a whole: its containers are those that ran.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedPod {
    /// Names of those that had ended, which have nothing in the image.
    #[serde(default)]
    pub ended: Vec<String>,
}

/// What the offsets in a tree's extents mean.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Offsets {
    /// Offsets in `pages.img` (main MemoryFile).
    PagesFile,
    /// Offsets in a private MemoryFile, which is saved as a whole.
    PrivateFile {
        /// Its number in `pages.meta`.
        index: u32,
        /// What it is to whoever loads it as a whole.
        format: PrivateFormat,
        /// The user namespace's mappings when it was saved: on disk are the host's ids.
        ids: Ids,
    },
}

/// The contents of a private MemoryFile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrivateFormat {
    /// A filesystem of Linux's ext4.
    Ext4,
}

/// A saved filesystem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedFilesystem {
    /// Its ResourceID.
    pub resource_id: ResourceId,
    /// Its other ResourceIDs: one for each mount of a filesystem that several mounts share.
    #[serde(default)]
    pub aliases: Vec<ResourceId>,
    /// Meaning of the offsets in its tree.
    pub offsets: Offsets,
    /// Start of its archive in `tree.tar`, in bytes.
    pub tree_start: u64,
    /// End of its archive.
    pub tree_end: u64,
    /// Length of the archive uncompressed, in `tree.tar.zst`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tree_length: Option<u64>,
    /// The superblock options it had, as mount(8) has them; informational.
    pub options: String,
    /// Regular files, hard links counted once.
    pub files: u64,
    /// Names of every kind, the root not counted.
    pub entries: u64,
    /// Sum of the sizes of the regular files, in bytes.
    pub logical_bytes: u64,
    /// Bytes of file contents that are saved.
    pub data_bytes: u64,
}

impl SavedFilesystem {
    /// All its ResourceIDs, the canonical one first.
    pub fn ids(&self) -> impl Iterator<Item = &ResourceId> {
        std::iter::once(&self.resource_id).chain(&self.aliases)
    }
}

impl Manifest {
    /// The file's contents.
    pub fn encode(&self) -> Vec<u8> {
        let body = serde_json::value::to_raw_value(self).expect("a manifest has string keys only");
        let digest = Digest(xxh3_64(body.get().as_bytes()));
        let envelope = Envelope { format: FORMAT.to_owned(), version: VERSION, digest, body: &body };
        let mut text = serde_json::to_vec(&envelope).expect("an envelope has string keys only");
        text.push(b'\n');
        text
    }

    /// Whether the archives are compressed: all or none of them are.
    pub fn has_compressed_trees(&self) -> bool {
        self.filesystems.iter().any(|filesystem| filesystem.tree_length.is_some())
    }

    /// Decodes and judges the file's contents.
    pub fn decode(text: &[u8]) -> Result<Self, ManifestError> {
        /// The envelope as far as any version has it.
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u64,
        }
        let head: Head = serde_json::from_slice(text).map_err(ManifestError::Envelope)?;
        if head.format != FORMAT {
            return Err(ManifestError::Format(head.format));
        }
        if head.version != VERSION {
            return Err(ManifestError::Version(head.version));
        }
        let envelope: Envelope<'_> = serde_json::from_slice(text).map_err(ManifestError::Envelope)?;
        let (expected, found) = (envelope.digest, Digest(xxh3_64(envelope.body.get().as_bytes())));
        if found != expected {
            return Err(ManifestError::Digest { expected, found });
        }
        let manifest: Self = serde_json::from_str(envelope.body.get()).map_err(ManifestError::Body)?;
        manifest.judge().map_err(ManifestError::Contradiction)?;
        Ok(manifest)
    }

    fn judge(&self) -> Result<(), &'static str> {
        for part in [&self.tree, &self.meta].into_iter().chain(self.processes.iter().map(|file| &file.part)) {
            if part.chunk_size != CHUNK_SIZE {
                return Err("a part's chunk_size isn't 65536");
            }
            if part.digests.len() as u64 != part.length.div_ceil(CHUNK_SIZE) {
                return Err("a part doesn't have one digest a chunk");
            }
        }
        if self.pages_path.as_ref().is_some_and(|path| !path.is_absolute()) {
            return Err("pages_path isn't absolute");
        }
        if !self.processes.is_empty() && (self.containers.len() != 1 || self.pod.is_some()) {
            return Err("there are processes, but not of one container");
        }
        let mut containers = HashSet::new();
        if self.pod.is_some()
            && !self.containers.iter().all(|container| container.named && containers.insert(&container.name))
        {
            return Err("a container of the pod has no name, or another's");
        }
        let mut names = HashSet::new();
        if !self.processes.iter().all(|file| is_process_file(&file.name) && names.insert(&file.name)) {
            return Err("a file of processes has a name that CRIU doesn't give, or another has, too");
        }
        let lengths = self.filesystems.iter().filter_map(|filesystem| filesystem.tree_length);
        if self.has_compressed_trees() && lengths.clone().count() != self.filesystems.len() {
            return Err("some of the filesystems' trees are compressed, and others aren't");
        }
        if lengths.fold(0, u64::saturating_add) > COMPRESSED_MAX {
            return Err("the filesystems' trees have more than 1 GiB uncompressed");
        }
        let mut at = 0;
        let (mut ids, mut private) = (HashSet::new(), HashSet::new());
        for filesystem in &self.filesystems {
            if filesystem.tree_start != at || filesystem.tree_end < at {
                return Err("the filesystems' trees don't follow each other in tree.tar");
            }
            at = filesystem.tree_end;
            let id = &filesystem.resource_id;
            // What belongs to the pod belongs to no container.
            if !id.container.is_empty() && !self.containers.iter().any(|known| known.name == id.container) {
                return Err("a filesystem belongs to a container that isn't listed");
            }
            if !filesystem.ids().all(|id| ids.insert(id)) {
                return Err("two filesystems have the same ResourceID");
            }
            if let Offsets::PrivateFile { index, .. } = filesystem.offsets
                && !private.insert(index)
            {
                return Err("two filesystems have the same private MemoryFile");
            }
        }
        if at != self.tree.length { Err("the filesystems' trees don't fill tree.tar") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let filesystem = |path: &str, tree_start, tree_end| SavedFilesystem {
            resource_id: ResourceId::new("c", path),
            aliases: Vec::new(),
            offsets: Offsets::PagesFile,
            tree_start,
            tree_end,
            tree_length: None,
            options: String::new(),
            files: 0,
            entries: 0,
            logical_bytes: 0,
            data_bytes: 0,
        };
        Manifest {
            stillframe: "0".to_owned(),
            created: 0,
            tree: Part::of(&[0; 70_000]),
            meta: Part::of(b"x"),
            pages_length: 0,
            pages_path: None,
            containers: vec![SavedContainer { name: "c".to_owned(), named: true }],
            pod: None,
            filesystems: vec![filesystem("/a", 0, 50_000), filesystem("/b", 50_000, 70_000)],
            processes: Vec::new(),
        }
    }

    /// A filesystem that belongs to the pod, and one with an alias.
    fn with_private(offsets: &[Offsets; 2]) -> Manifest {
        let mut manifest = manifest();
        for (filesystem, offsets) in manifest.filesystems.iter_mut().zip(offsets) {
            filesystem.offsets = offsets.clone();
        }
        manifest.filesystems[0].resource_id = ResourceId::new("", "volume");
        manifest.filesystems[1].aliases = vec![ResourceId::new("other", "/b")];
        manifest
    }

    #[test]
    fn a_manifest_round_trips() {
        assert_eq!(Manifest::decode(&manifest().encode()).unwrap(), manifest());
        let pod = Manifest { pod: Some(SavedPod { ended: vec!["setup".to_owned()] }), ..manifest() };
        assert_eq!(Manifest::decode(&pod.encode()).unwrap(), pod);
        let private = Offsets::PrivateFile { index: 7, format: PrivateFormat::Ext4, ids: Ids::default() };
        let manifest = with_private(&[private, Offsets::PagesFile]);
        assert_eq!(Manifest::decode(&manifest.encode()).unwrap(), manifest);
    }

    #[test]
    fn a_manifest_without_aliases_is_one_with_none() {
        let body = serde_json::to_string(&manifest()).unwrap().replace(r#""aliases":[],"#, "");
        assert!(!body.contains("aliases"));
        let digest = xxh3_64(body.as_bytes());
        let text = format!(r#"{{"format":"{FORMAT}","version":1,"digest":"{digest:016x}","body":{body}}}"#);
        assert_eq!(Manifest::decode(text.as_bytes()).unwrap(), manifest());
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let text = manifest().encode();
        for at in 0..text.len() - 1 {
            for bit in 0..8 {
                let mut damaged = text.clone();
                damaged[at] ^= 1 << bit;
                match Manifest::decode(&damaged) {
                    Err(_) => {}
                    // Hexadecimal digits of the digest may change their case without meaning another.
                    Ok(decoded) => assert_eq!(decoded, manifest(), "bit {bit} at {at}"),
                }
            }
        }
    }

    #[test]
    fn every_truncation_is_found() {
        let text = manifest().encode();
        for length in 0..text.len() - 1 {
            assert!(Manifest::decode(&text[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn another_version_is_named_before_all_else() {
        let error =
            Manifest::decode(br#"{"format":"stillframe-image","version":7,"unheard":{}}"#).unwrap_err();
        assert!(matches!(error, ManifestError::Version(7)), "{error}");
        let error = Manifest::decode(br#"{"format":"tar","version":1}"#).unwrap_err();
        assert!(matches!(error, ManifestError::Format(_)), "{error}");
    }

    #[test]
    fn contradictions_are_refused() {
        type Change = fn(&mut Manifest);
        let private =
            |index| Offsets::PrivateFile { index, format: PrivateFormat::Ext4, ids: Ids::default() };
        assert!(Manifest::decode(&with_private(&[private(0), private(1)]).encode()).is_ok());
        let twice = with_private(&[private(1), private(1)]).encode();
        assert!(matches!(Manifest::decode(&twice), Err(ManifestError::Contradiction(_))));
        let changes: [Change; 14] = [
            |m| m.tree.length += 1,
            |m| m.meta.digests.clear(),
            |m| m.meta.chunk_size = 0,
            |m| m.filesystems[1].tree_length = Some(1),
            |m| m.filesystems.iter_mut().for_each(|of| of.tree_length = Some(COMPRESSED_MAX / 2 + 1)),
            |m| m.filesystems.iter_mut().for_each(|of| of.tree_length = Some(u64::MAX)),
            |m| m.filesystems[1].tree_start = 0,
            |m| m.filesystems[1].tree_end = 60_000,
            |m| m.filesystems[1].resource_id = m.filesystems[0].resource_id.clone(),
            |m| m.containers.clear(),
            |m| m.filesystems[1].aliases = vec![m.filesystems[0].resource_id.clone()],
            |m| m.filesystems[1].aliases = vec![ResourceId::new("x", "/y"), ResourceId::new("x", "/y")],
            |m| (m.pod, m.containers[0].named) = (Some(SavedPod::default()), false),
            |m| {
                (m.pod, m.containers) =
                    (Some(SavedPod::default()), [&m.containers[..], &m.containers[..]].concat())
            },
        ];
        for (index, change) in changes.into_iter().enumerate() {
            let mut manifest = manifest();
            change(&mut manifest);
            let error = Manifest::decode(&manifest.encode()).unwrap_err();
            assert!(matches!(error, ManifestError::Contradiction(_)), "{index}: {error}");
        }
    }

    #[test]
    fn the_damaged_chunk_is_named() {
        let mut bytes = vec![7; 200_000];
        let part = Part::of(&bytes);
        assert_eq!(part.first_damage(0, &bytes), None);
        bytes[140_000] ^= 1;
        assert_eq!(part.first_damage(0, &bytes), Some(131_072));
        assert_eq!(part.first_damage(65_536, &bytes[65_536..]), Some(131_072));
        assert_eq!(part.first_damage(196_608, &bytes[196_608..]), None);
    }
}
