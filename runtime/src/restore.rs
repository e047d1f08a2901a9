//! Restoring: which filesystem of an image goes where, and building it there.
//!
//! Decode, validate everything, build: nothing is built before every tree has been decoded and fits its
//! filesystem. The filesystems are fresh and no process can reach them yet, so the caller undoes a
//! failure by unmounting them.
//!
//! Matching is by ResourceID. A container that no annotation names is called by its id, which another
//! container can't have; so if the image holds one container and either side is unnamed, its
//! filesystems are matched by path alone. Whatever isn't matched is reported, on either side.

use std::path::{Path, PathBuf};

use stillframe_pgalloc::{AsyncPagesFileLoad, LoadError, LoadOptions};
use stillframe_tmpfs::ResourceId;
use stillframe_tmpfs::build::{BuildError, BuildOptions, build_tree, check_tree};
use stillframe_tmpfs::decode::{TreeError, decode_tree};
use stillframe_tmpfs::entry::Tree;
use stillframe_tmpfs::mount::{MountError, open_root, usage};

use crate::image::{Image, ImageError, PAGES};
use crate::manifest::Manifest;

/// Why an image couldn't be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The image can't be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A tree can't be used.
    #[error("the filesystem {id} of the image {image}")]
    Tree {
        /// Its ResourceID in the image.
        id: ResourceId,
        /// The image directory.
        image: PathBuf,
        /// Why.
        #[source]
        source: Box<TreeError>,
    },
    /// The new filesystem couldn't be looked into.
    #[error("open the new filesystem {id}")]
    Open {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: MountError,
    },
    /// A tree doesn't fit, or couldn't be built.
    #[error("restore the filesystem {id}")]
    Build {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: BuildError,
    },
    /// The pages couldn't be loaded.
    #[error("load {path}")]
    Load {
        /// The pages file.
        path: PathBuf,
        /// Why.
        #[source]
        source: LoadError,
    },
}

/// What was restored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RestoreResult {
    /// ResourceIDs in the image and of the container, of each filesystem that was restored.
    pub restored: Vec<(ResourceId, ResourceId)>,
    /// Filesystems of the image for which the container has no mount.
    pub unused: Vec<ResourceId>,
    /// Filesystems of the container which the image doesn't hold: they start empty.
    pub empty: Vec<ResourceId>,
    /// Bytes of pages that were loaded.
    pub bytes: u64,
    /// Names of every kind that were made.
    pub entries: u64,
}

/// A fresh filesystem to restore into.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its ResourceID.
    pub id: ResourceId,
    /// Whether an annotation named its container.
    pub named: bool,
    /// Where it is mounted on the host.
    pub mountpoint: PathBuf,
}

/// Pairs of a filesystem of the image and a target, by their numbers.
pub fn match_filesystems(manifest: &Manifest, targets: &[Target]) -> Vec<(usize, usize)> {
    let one_container = manifest.containers.len() == 1;
    let saved_named = manifest.containers.iter().all(|container| container.named);
    let mut pairs = Vec::new();
    for (index, filesystem) in manifest.filesystems.iter().enumerate() {
        let id = &filesystem.resource_id;
        let fits = |target: &Target| {
            let by_path = one_container && !(saved_named && target.named);
            target.id == *id || (by_path && target.id.path == id.path)
        };
        // The last of equals: of two mounts at one path, the container sees the later one.
        if let Some(target) = targets.iter().rposition(fits) {
            pairs.push((index, target));
        }
    }
    pairs
}

/// Restores what `pairs` says of `image`, opened from the directory `path`, into the `targets`.
pub fn restore(
    path: &Path,
    image: Image,
    targets: &[Target],
    pairs: &[(usize, usize)],
    options: &BuildOptions,
) -> Result<RestoreResult, RestoreError> {
    let mut trees: Vec<(Tree, &Target)> = Vec::new();
    for (index, target) in pairs {
        let target = &targets[*target];
        let tree = decode_tree(image.archive(*index), image.manifest.pages_length).map_err(|source| {
            let id = image.manifest.filesystems[*index].resource_id.clone();
            RestoreError::Tree { id, image: path.to_owned(), source: source.into() }
        })?;
        let usage = usage(&target.mountpoint)
            .map_err(|source| RestoreError::Open { id: target.id.clone(), source })?;
        check_tree(&tree, options, &usage)
            .map_err(|source| RestoreError::Build { id: target.id.clone(), source })?;
        trees.push((tree, target));
    }
    let mut result = report(&image.manifest, targets, pairs);

    let load_failed = |source| RestoreError::Load { path: path.join(PAGES), source };
    let loader = AsyncPagesFileLoad::new(image.pages, image.meta.digests, LoadOptions::default())
        .map_err(load_failed)?;
    let mut roots = Vec::new();
    for (_, target) in &trees {
        let root = open_root(&target.mountpoint);
        roots.push(root.map_err(|source| RestoreError::Open { id: target.id.clone(), source })?);
    }
    let mut built = Vec::new();
    let mut failed = None;
    for ((tree, target), root) in trees.iter().zip(&roots) {
        match build_tree(root, tree, options, &loader) {
            Ok(tree) => built.push((tree, *target)),
            Err(source) => {
                failed = Some(RestoreError::Build { id: target.id.clone(), source });
                break;
            }
        }
        result.entries += tree.inodes();
    }
    // The loader's own error is the cause, if it has one: it names the offset in the image.
    let loaded = loader.finish().map_err(load_failed)?;
    if let Some(failed) = failed {
        return Err(failed);
    }
    for (tree, target) in built {
        tree.finish().map_err(|source| RestoreError::Build { id: target.id.clone(), source })?;
    }
    result.bytes = loaded.bytes;
    Ok(result)
}

fn report(manifest: &Manifest, targets: &[Target], pairs: &[(usize, usize)]) -> RestoreResult {
    let saved = |index: usize| manifest.filesystems[index].resource_id.clone();
    let unused =
        (0..manifest.filesystems.len()).filter(|index| pairs.iter().all(|(saved, _)| saved != index));
    let empty =
        targets.iter().enumerate().filter(|(index, _)| pairs.iter().all(|(_, target)| target != index));
    RestoreResult {
        restored: pairs.iter().map(|(index, target)| (saved(*index), targets[*target].id.clone())).collect(),
        unused: unused.map(saved).collect(),
        empty: empty.map(|(_, target)| target.id.clone()).collect(),
        bytes: 0,
        entries: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Offsets, Part, SavedContainer, SavedFilesystem};

    fn manifest(containers: &[(&str, bool)], ids: &[(&str, &str)]) -> Manifest {
        let filesystem = |(container, path): &(&str, &str)| SavedFilesystem {
            resource_id: ResourceId::new(*container, path),
            offsets: Offsets::PagesFile,
            tree_start: 0,
            tree_end: 0,
            options: String::new(),
            files: 0,
            entries: 0,
            logical_bytes: 0,
            data_bytes: 0,
        };
        Manifest {
            stillframe: String::new(),
            created: 0,
            tree: Part::of(b""),
            meta: Part::of(b""),
            pages_length: 0,
            containers: containers
                .iter()
                .map(|(name, named)| SavedContainer { name: (*name).to_owned(), named: *named })
                .collect(),
            filesystems: ids.iter().map(filesystem).collect(),
        }
    }

    fn targets(ids: &[(&str, &str)], named: bool) -> Vec<Target> {
        let target = |(container, path): &(&str, &str)| Target {
            id: ResourceId::new(*container, path),
            named,
            mountpoint: PathBuf::new(),
        };
        ids.iter().map(target).collect()
    }

    #[test]
    fn filesystems_are_matched_by_name_or_by_path_where_a_name_is_only_an_id() {
        let one = [("web", "/a"), ("web", "/b")];
        for (what, saved, ids, target, target_named, want) in [
            ("same names", &[("web", true)][..], &one[..], &one[..], true, &[(0, 0), (1, 1)][..]),
            ("other name", &[("web", true)], &one, &[("db", "/a")], true, &[]),
            ("saved by id", &[("web", false)], &one, &[("new", "/b")], true, &[(1, 0)]),
            ("target by id", &[("web", true)], &one, &[("new", "/b")], false, &[(1, 0)]),
            ("both by id", &[("web", false)], &one, &[("new", "/c")], false, &[]),
            (
                "two containers",
                &[("web", false), ("db", false)],
                &[("web", "/a"), ("db", "/b")],
                &[("new", "/a"), ("new", "/b")],
                false,
                &[],
            ),
            ("mounted twice", &[("web", true)], &one[..1], &[("web", "/a"), ("web", "/a")], true, &[(0, 1)]),
        ] {
            let pairs = match_filesystems(&manifest(saved, ids), &targets(target, target_named));
            assert_eq!(pairs, want, "{what}");
        }
    }

    #[test]
    fn what_is_not_matched_is_reported() {
        let manifest = manifest(&[("c", true)], &[("c", "/a"), ("c", "/b")]);
        let targets = targets(&[("c", "/b"), ("c", "/n")], true);
        let pairs = match_filesystems(&manifest, &targets);
        let result = report(&manifest, &targets, &pairs);
        assert_eq!(result.restored, [(ResourceId::new("c", "/b"), ResourceId::new("c", "/b"))]);
        assert_eq!(result.unused, [ResourceId::new("c", "/a")]);
        assert_eq!(result.empty, [ResourceId::new("c", "/n")]);
    }
}
