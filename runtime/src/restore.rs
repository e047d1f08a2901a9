//! Restoring: which filesystem of an image goes where, and building it there.
//!
//! Decode, validate everything, build: nothing is built before every tree has been decoded and fits its
//! filesystem. The filesystems are fresh and no process can reach them yet, so the caller undoes a
//! failure by removing them.
//!
//! Matching is by ResourceID, also by those of a shared filesystem's mounts. A container that no annotation names is
//! called by its id, which another container can't have; so if the image holds one container and either side is unnamed,
//! its filesystems are matched by path alone. Whatever isn't matched is reported, on either side, and so is
//! what was there before: a pod's filesystem is restored for the first container that has it.
//!
//! Contents may come later, by processes of their own ([`crate::lazy`]), where no other container has the filesystem.
//!
//! What was saved on disk and goes to disk is loaded as a whole; everything else goes through its tree, on
//! whatever medium it was.

mod error;
pub(crate) mod pod;

use std::path::{Path, PathBuf};

use stillframe_pgalloc::{AsyncPagesFileLoad, LoadError, LoadOptions, MemoryFile, PrivateMemoryFileMeta};
use stillframe_tmpfs::build::{BuildOptions, build_names, build_tree, check_tree};
use stillframe_tmpfs::entry::Tree;
use stillframe_tmpfs::filestore::{self, FilestoreError, Root};
use stillframe_tmpfs::lazy::{HugePages, PendingFile, Room};
use stillframe_tmpfs::mount::{DefaultMode, TmpfsMount, open_root, open_view, unmount, usage};
use stillframe_tmpfs::options::TmpfsOptions;
use stillframe_tmpfs::private::{self};
use stillframe_tmpfs::{Ids, ResourceId};

use crate::image::Image;
use crate::lazy::{self, Fresh, HeldGate, Load};
use crate::manifest::{Manifest, Offsets, PrivateFormat};
pub use crate::restore::error::RestoreError;

/// What was restored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RestoreResult {
    /// ResourceIDs in the image and of the container, of each filesystem that was restored.
    pub restored: Vec<(ResourceId, ResourceId)>,
    /// Filesystems of the image for which the container has no mount.
    pub unused: Vec<ResourceId>,
    /// ResourceIDs in the image and of the pod, of each filesystem that was there before and stays as it is.
    pub kept: Vec<(ResourceId, ResourceId)>,
    /// Filesystems of the container which the image doesn't hold: they start empty.
    pub empty: Vec<ResourceId>,
    /// Bytes of pages that were loaded.
    pub bytes: u64,
    /// Names of every kind that were made.
    pub entries: u64,
    /// Files whose contents are loaded later.
    pub behind_files: u64,
    /// Bytes of those.
    pub behind_bytes: u64,
}

/// A filesystem of the container that is being made.
#[derive(Clone, Debug)]
pub struct Target {
    /// Name of its directory.
    pub name: String,
    /// Its ResourceID.
    pub id: ResourceId,
    /// Its ResourceIDs by this container's mounts, where they are others.
    pub aliases: Vec<ResourceId>,
    /// Whether an annotation named its container.
    pub named: bool,
    /// Where it is mounted on the host.
    pub mountpoint: PathBuf,
    /// Whether it was made just now, so that nobody has it yet.
    pub fresh: bool,
    /// Whether no other container has it.
    pub alone: bool,
    /// What it takes to replace it as a whole, if it is on disk.
    pub disk: Option<DiskTarget>,
    /// The mappings between the ids on it and the container's.
    pub ids: Ids,
}

/// A filesystem on disk.
#[derive(Clone, Debug)]
pub struct DiskTarget {
    /// The file that holds it.
    pub path: PathBuf,
    /// The options it is mounted with.
    pub options: TmpfsOptions,
    /// SELinux label of everything on it.
    pub label: Option<String>,
}

impl Target {
    fn ids(&self) -> impl Iterator<Item = &ResourceId> {
        std::iter::once(&self.id).chain(&self.aliases)
    }
}

/// Pairs of a filesystem of the image and a target, by their numbers; each is in one pair at most.
pub fn match_filesystems(manifest: &Manifest, targets: &[Target]) -> Vec<(usize, usize)> {
    let saved_named = manifest.containers.iter().all(|container| container.named);
    let only = match manifest.containers.as_slice() {
        [container] => Some(&container.name),
        _ => None,
    };
    let mut pairs: Vec<(usize, usize)> = Vec::new();
    // A filesystem's own name counts before those of its mounts.
    for by_alias in [false, true] {
        for (index, filesystem) in manifest.filesystems.iter().enumerate() {
            let fits = |target: &Target| {
                if !by_alias {
                    return target.id == filesystem.resource_id;
                }
                filesystem.ids().any(|id| {
                    let by_path = only == Some(&id.container) && !(saved_named && target.named);
                    let mut ids = target.ids();
                    ids.any(|own| own == id || (by_path && !own.container.is_empty() && own.path == id.path))
                })
            };
            let free = |number: usize| pairs.iter().all(|(_, target)| *target != number);
            // The last of equals: of two mounts at one path, the container sees the later one.
            let target = (0..targets.len()).rev().find(|number| fits(&targets[*number]) && free(*number));
            if let Some(target) = target.filter(|_| pairs.iter().all(|(saved, _)| *saved != index)) {
                pairs.push((index, target));
            }
        }
    }
    pairs.sort_unstable();
    pairs
}

/// How a filesystem is restored.
enum Way {
    /// By building the tree, whose extents are in the pages file.
    Build,
    /// The same, but its contents are loaded by a process of their own.
    Names,
    /// By loading the filestore that it was on, which then gets `size` bytes.
    Whole { private: PrivateMemoryFileMeta, size: u64 },
}

/// One filesystem to restore.
struct Job<'a> {
    tree: Tree,
    target: &'a Target,
    options: BuildOptions,
    way: Way,
}

/// Restores what `pairs` says of `image` into the `targets` that are fresh.
pub fn restore(
    image: Image,
    targets: &[Target],
    pairs: &[(usize, usize)],
    devices: bool,
    load: &Load,
) -> Result<(RestoreResult, Vec<HeldGate>), RestoreError> {
    let mut gates = Vec::new();
    let mut result = report(&image.manifest, targets, pairs);
    let mut jobs = Vec::new();
    for (index, target) in pairs.iter().filter(|(_, target)| targets[*target].fresh) {
        let target = &targets[*target];
        let options = BuildOptions { ids: target.ids.clone(), devices };
        jobs.push(prepare(&image, *index, target, options, load)?);
    }
    let (image_path, pages_path) = (image.path().to_owned(), image.pages_path().to_owned());
    for Job { tree, target, options, .. } in jobs.iter().filter(|job| matches!(job.way, Way::Names)) {
        let Load::Apart { program, .. } = load else { unreachable!("decided by `prepare`") };
        let (pending, gate) = behind(&image, tree, target, options, program)?;
        gates.extend(gate);
        result.entries += tree.inodes();
        result.behind_files += pending.0;
        result.behind_bytes += pending.1;
    }
    jobs.retain(|job| !matches!(job.way, Way::Names));
    let load_failed = |source| RestoreError::Load { path: pages_path.clone(), source };
    let loader = AsyncPagesFileLoad::new(image.pages, image.meta.digests, LoadOptions::default())
        .map_err(load_failed)?;
    let mut roots = Vec::new();
    for Job { target, way, .. } in &jobs {
        // An open root would hold a filesystem that is about to be replaced.
        let root = match way {
            Way::Build => Some(open_root(&target.mountpoint)),
            Way::Whole { .. } | Way::Names => None,
        };
        let root = root.transpose();
        roots.push(root.map_err(|source| RestoreError::Open { id: target.id.clone(), source })?);
    }
    let mut built = Vec::new();
    let mut failed = None;
    for (Job { tree, target, options, way }, root) in jobs.iter().zip(&roots) {
        let begun = match (way, root) {
            (Way::Build, Some(root)) => build_tree(root, tree, options, &loader)
                .map(|tree| built.push((tree, *target)))
                .map_err(|source| RestoreError::Build { id: target.id.clone(), source }),
            (Way::Whole { private, .. }, _) => replace(target, private, &loader, load_failed),
            (Way::Build | Way::Names, _) => unreachable!("its root was opened above, or it is done"),
        };
        if let Err(error) = begun {
            failed = Some(error);
            break;
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
    for Job { tree, target, options, way } in &jobs {
        if let Way::Whole { size, .. } = way {
            mount_again(tree, target, *size, options, &image_path)?;
        }
    }
    result.bytes = loaded.bytes;
    Ok((result, gates))
}

/// Decodes a filesystem of the image, decides how it is restored, and judges whether it fits.
fn prepare<'a>(
    image: &Image,
    index: usize,
    target: &'a Target,
    options: BuildOptions,
    load: &Load,
) -> Result<Job<'a>, RestoreError> {
    let mut tree = image.decode_tree(index)?;
    let open_failed = |source| RestoreError::Open { id: target.id.clone(), source };
    let mut usage = usage(&target.mountpoint).map_err(open_failed)?;
    // On disk it is quick; and who has it already would see what isn't complete.
    let behind = matches!(load, Load::Apart { .. }) && target.disk.is_none() && target.alone;
    let mut way = if behind { Way::Names } else { Way::Build };
    let saved = &image.manifest.filesystems[index];
    if let (Some(private), Offsets::PrivateFile { format, ids, .. }) =
        (image.private_file(index), &saved.offsets)
    {
        let failed = |source| {
            let id = saved.resource_id.clone();
            RestoreError::Private { id, image: image.path().to_owned(), source }
        };
        private::judge(&tree, private).map_err(failed)?;
        let same = *format == PrivateFormat::Ext4 && *ids == options.ids;
        let size = target.disk.as_ref().and_then(|disk| room_for(disk, private));
        if let Some(size) = size.filter(|_| same && filestore::survives_e2fsck(&tree)) {
            way = Way::Whole { private: private.clone(), size };
            // It brings its inodes along.
            (usage.inodes, usage.used_inodes) = (None, None);
        } else {
            tree = private::translate(tree, private).map_err(failed)?;
        }
    }
    check_tree(&tree, &options, &usage)
        .map_err(|source| RestoreError::Build { id: target.id.clone(), source })?;
    Ok(Job { tree, target, options, way })
}

/// Builds names and attributes, and has the contents loaded by processes of their own; gives their files and bytes.
fn behind(
    image: &Image,
    tree: &Tree,
    target: &Target,
    options: &BuildOptions,
    program: &Path,
) -> Result<((u64, u64), Option<HeldGate>), RestoreError> {
    let id = || target.id.clone();
    let root = open_root(&target.mountpoint).map_err(|source| RestoreError::Open { id: id(), source })?;
    let (large, small) = build_names(&root, tree, options, lazy::LARGE)
        .map_err(|source| RestoreError::Build { id: id(), source })?;
    let bytes = large.iter().map(PendingFile::bytes).sum::<u64>() + small.bytes();
    let sum = ((large.len() + small.len()) as u64, bytes);
    let mut gate = None;
    if sum.0 > 0 {
        let directory = target.mountpoint.parent().expect("it is in the filesystem's directory");
        let fresh = Fresh {
            huge: HugePages::of(&root, tree, lazy::LARGE),
            // Where it can't be told, nothing is done about it.
            size: Room::size(&root).ok().flatten(),
        };
        let files = (large, small);
        gate = lazy::start(program, directory, files, fresh, (&image.pages, image.pages_path()), &image.meta)
            .map_err(|source| RestoreError::Behind { id: id(), source })?;
    }
    Ok((sum, gate))
}

/// The size of a fresh filestore, if it can become the saved one: not if that is larger, nor if the number of inodes
/// is asked for.
fn room_for(disk: &DiskTarget, private: &PrivateMemoryFileMeta) -> Option<u64> {
    let size = disk.path.metadata().ok()?.len();
    (private.size <= size && disk.options.nr_inodes.is_none()).then_some(size)
}

/// Puts another file in the place of a fresh filestore, and has the saved one loaded into it. Another one, since the
/// kernel may have the old one for a while.
fn replace(
    target: &Target,
    private: &PrivateMemoryFileMeta,
    loader: &AsyncPagesFileLoad,
    load_failed: impl Fn(LoadError) -> RestoreError,
) -> Result<(), RestoreError> {
    let path = &target.disk.as_ref().expect("only what is on disk is restored as a whole").path;
    unmount(&target.mountpoint).map_err(|source| RestoreError::Open { id: target.id.clone(), source })?;
    let file = filestore::replace(path)
        .map_err(|source| RestoreError::Filestore { id: target.id.clone(), source: Box::new(source) })?;
    MemoryFile::private(file).load_from(loader, private).map_err(load_failed)
}

/// Mounts a filestore that has been loaded, and compares it with its tree.
fn mount_again(
    tree: &Tree,
    target: &Target,
    size: u64,
    options: &BuildOptions,
    image: &Path,
) -> Result<(), RestoreError> {
    let disk = target.disk.as_ref().expect("only what is on disk is restored as a whole");
    let mount = TmpfsMount {
        options: &disk.options,
        source: None,
        default_mode: DefaultMode::Absent,
        uid_map: &options.ids.uid,
        gid_map: &options.ids.gid,
        label: disk.label.as_deref(),
    };
    let mount = || -> Result<(), FilestoreError> {
        filestore::adopt(&disk.path, size)?;
        filestore::mount(&disk.path, &mount, Root::Saved(tree), &target.mountpoint)
    };
    mount().map_err(|source| RestoreError::Filestore { id: target.id.clone(), source: Box::new(source) })?;
    let view = open_view(&target.mountpoint)
        .map_err(|source| RestoreError::Open { id: target.id.clone(), source })?;
    private::verify(&view, &options.ids, tree).map_err(|source| RestoreError::Private {
        id: target.id.clone(),
        image: image.to_owned(),
        source,
    })
}

fn report(manifest: &Manifest, targets: &[Target], pairs: &[(usize, usize)]) -> RestoreResult {
    let saved = |index: usize| manifest.filesystems[index].resource_id.clone();
    let unused =
        (0..manifest.filesystems.len()).filter(|index| pairs.iter().all(|(saved, _)| saved != index));
    let empty = targets
        .iter()
        .enumerate()
        .filter(|(index, target)| target.fresh && pairs.iter().all(|(_, paired)| paired != index));
    let paired = |fresh: bool| {
        let pairs = pairs.iter().filter(move |(_, target)| targets[*target].fresh == fresh);
        pairs.map(|(index, target)| (saved(*index), targets[*target].id.clone())).collect()
    };
    RestoreResult {
        restored: paired(true),
        kept: paired(false),
        unused: unused.map(saved).collect(),
        empty: empty.map(|(_, target)| target.id.clone()).collect(),
        bytes: 0,
        entries: 0,
        behind_files: 0,
        behind_bytes: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Offsets, Part, SavedContainer, SavedFilesystem};

    fn manifest(containers: &[(&str, bool)], ids: &[(&str, &str)]) -> Manifest {
        let filesystem = |(container, path): &(&str, &str)| SavedFilesystem {
            resource_id: ResourceId::new(*container, path),
            aliases: Vec::new(),
            offsets: Offsets::PagesFile,
            tree_start: 0,
            tree_end: 0,
            tree_length: None,
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
            pages_path: None,
            containers: containers
                .iter()
                .map(|(name, named)| SavedContainer { name: (*name).to_owned(), named: *named })
                .collect(),
            pod: None,
            filesystems: ids.iter().map(filesystem).collect(),
            processes: Vec::new(),
        }
    }

    fn targets(ids: &[(&str, &str)], named: bool) -> Vec<Target> {
        let target = |(container, path): &(&str, &str)| Target {
            name: String::new(),
            id: ResourceId::new(*container, path),
            aliases: Vec::new(),
            named,
            mountpoint: PathBuf::new(),
            fresh: true,
            alone: true,
            disk: None,
            ids: Ids::default(),
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

    #[test]
    fn a_shared_filesystem_is_found_by_any_of_its_names() {
        let saved = |named| {
            let mut manifest = manifest(&[("web", named)], &[("", "vol"), ("web", "/own")]);
            manifest.filesystems[0].aliases = vec![ResourceId::new("web", "/v"), ResourceId::new("db", "/d")];
            manifest
        };
        let target = |id: (&str, &str), aliases: &[(&str, &str)], named| {
            let mut target = targets(&[id], named).remove(0);
            target.aliases =
                aliases.iter().map(|(container, path)| ResourceId::new(*container, path)).collect();
            target
        };
        for (what, saved_named, target, want) in [
            ("by its own name", true, target(("", "vol"), &[("x", "/x")], true), Some(0)),
            ("its name has changed", true, target(("", "new"), &[("db", "/d")], true), Some(0)),
            ("by none", true, target(("", "new"), &[("db", "/v")], true), None),
            ("shared no more", true, target(("web", "/v"), &[], true), Some(0)),
            ("shared since", true, target(("", "new"), &[("web", "/own")], true), Some(1)),
            ("by path, of the container's", false, target(("", "new"), &[("id", "/v")], true), Some(0)),
            ("by path, of another's", false, target(("", "new"), &[("id", "/d")], true), None),
            ("a name is no path", false, target(("", "v"), &[], false), None),
        ] {
            let pairs = match_filesystems(&saved(saved_named), std::slice::from_ref(&target));
            assert_eq!(pairs, want.map(|index| (index, 0)).into_iter().collect::<Vec<_>>(), "{what}");
        }
        // Each once, and its own name first.
        let both = [target(("", "other"), &[("web", "/v")], true), target(("", "vol"), &[], true)];
        assert_eq!(match_filesystems(&saved(true), &both), [(0, 1)]);
        let mut both = both;
        both[1].fresh = false;
        let result = report(&saved(true), &both, &[(0, 1)]);
        assert_eq!((result.restored.len(), result.kept.len(), result.empty.len()), (0, 1, 1));
    }
}
