//! What a checkpoint takes: the filesystems that are selected, who else has them, and views of them.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use stillframe_pgalloc::{AsyncPagesFileSave, MemoryFile, PrivateMemoryFileMeta, SaveError};
use stillframe_tmpfs::Ids;
use stillframe_tmpfs::filestore::{self, FilestoreError, reflink};
use stillframe_tmpfs::lazy::unloaded::Unloaded;
use stillframe_tmpfs::mount::open_view;

use crate::checkpoint::{CheckpointCause, pages_failed};
use crate::freezer::Cgroup;
use crate::image::ImageWriter;
use crate::lazy;
use crate::process;
use crate::selector::Selector;
use crate::state::{ContainerRecord, FilesystemRecord, StateDir, StateError};
use crate::unlinked::{self, Unlinked};

/// A filesystem to be saved.
pub(crate) struct Selected {
    /// Name of its directory in the state.
    pub(crate) name: String,
    pub(crate) record: FilesystemRecord,
    pub(crate) mountpoint: PathBuf,
    /// The mappings between the ids on it and those in the containers that have it.
    pub(crate) ids: Ids,
}

impl Selected {
    /// Its files that aren't loaded yet.
    pub(crate) fn unloaded(&self) -> Result<Option<Unloaded>, CheckpointCause> {
        let directory = self.mountpoint.parent().expect("it is in the filesystem's directory");
        let id = || self.record.resource_id.clone();
        lazy::unloaded(directory).map_err(|source| CheckpointCause::Unloaded { id: id(), source })
    }

    fn filestore_failed(&self, source: FilestoreError) -> CheckpointCause {
        CheckpointCause::Filestore { id: self.record.resource_id.clone(), source: Box::new(source) }
    }

    /// Before the freeze, what makes it short. And a process that died may have left it frozen.
    pub(crate) fn settle(&self) -> Result<(), CheckpointCause> {
        filestore::thaw(&self.mountpoint)
            .and_then(|()| filestore::settle(&self.mountpoint))
            .map_err(|source| self.filestore_failed(source))?;
        self.record.filestore.as_ref().map_or(Ok(()), |path| {
            reflink::prepare(path).map_err(|source| self.file_failed("sync", path, source))
        })
    }

    /// Freezes it, and clones its file or has it saved.
    pub(crate) fn save_filestore(
        &self,
        path: &Path,
        pages: &AsyncPagesFileSave,
        image: &ImageWriter,
    ) -> Result<(filestore::Frozen, SavedFile), CheckpointCause> {
        let file = File::open(path).map_err(|source| self.file_failed("open", path, source))?;
        let frozen = filestore::freeze(&self.mountpoint).map_err(|source| self.filestore_failed(source))?;
        if let Some(clone) = reflink::clone(path) {
            return Ok((frozen, SavedFile::Clone(MemoryFile::private(clone))));
        }
        let saved = MemoryFile::private(file)
            .save_to(pages)
            .map_err(|source| pages_failed(&image.pages_path(), source))?;
        Ok((frozen, SavedFile::InPlace(saved)))
    }

    fn file_failed(&self, operation: &'static str, path: &Path, source: io::Error) -> CheckpointCause {
        self.filestore_failed(FilestoreError::File { operation, path: path.to_owned(), source })
    }
}

/// How the file of a filesystem on disk is saved.
pub(crate) enum SavedFile {
    /// From a clone, which is still to be done and needs no freeze any more.
    Clone(MemoryFile),
    /// Itself: it must be still until the pages are drained.
    InPlace(PrivateMemoryFileMeta),
}

impl SavedFile {
    /// The metadata of private MemoryFile number `index`, and the bytes that had to be read for them.
    pub(crate) fn finish(
        self,
        index: u32,
        pages: &AsyncPagesFileSave,
    ) -> Result<(PrivateMemoryFileMeta, u64), SaveError> {
        match self {
            Self::Clone(clone) => {
                let meta = clone.save_to(pages)?;
                let read = meta.extents.iter().map(|extent| extent.length).sum();
                Ok((PrivateMemoryFileMeta { index, ..meta }, read))
            }
            Self::InPlace(meta) => Ok((PrivateMemoryFileMeta { index, ..meta }, 0)),
        }
    }
}

/// Finds the containers' filesystems, each once; every selection must find one, and no two may have the same name.
pub(crate) fn select(
    dir: &StateDir,
    containers: &[&ContainerRecord],
    selectors: &[Selector],
) -> Result<Vec<Selected>, CheckpointCause> {
    let mut all = Vec::new();
    for (container, name) in containers
        .iter()
        .flat_map(|container| container.filesystems.iter().map(move |name| (container, name)))
    {
        if all.iter().any(|selected: &Selected| selected.mountpoint == dir.mountpoint(name)) {
            continue;
        }
        let missing = || StateError::File {
            operation: "read",
            path: dir.mountpoint(name).with_file_name("record.json"),
            source: io::ErrorKind::NotFound.into(),
        };
        let record = dir.filesystem(name)?.ok_or_else(missing)?;
        if container.sandbox && !record.resource_id.container.is_empty() {
            // Nobody's: containerd 1.6 covers one with the pod's /dev/shm.
            continue;
        }
        let ids = record.ids_of(&container.ids);
        all.push(Selected { name: name.clone(), record, mountpoint: dir.mountpoint(name), ids });
    }
    let matches = |selected: &Selected, selector: &Selector| {
        selected.record.ids().into_iter().any(|id| selector.matches(id))
    };
    for selector in selectors {
        if !all.iter().any(|selected| matches(selected, selector)) {
            let there: Vec<String> = all.iter().map(describe).collect();
            let there = if there.is_empty() { "none at all".to_owned() } else { there.join(", ") };
            return Err(CheckpointCause::NoMatch { selector: selector.to_string(), there });
        }
    }
    all.retain(|selected| {
        selectors.is_empty() || selectors.iter().any(|selector| matches(selected, selector))
    });
    for (index, selected) in all.iter().enumerate() {
        for id in selected.record.ids() {
            if all[..index].iter().any(|before| before.record.ids().contains(&id)) {
                return Err(CheckpointCause::Duplicate(id.clone()));
            }
        }
    }
    Ok(all)
}

/// Its ResourceID, and those of the mounts that share it.
fn describe(selected: &Selected) -> String {
    let ids: Vec<String> = selected.record.ids().iter().map(ToString::to_string).collect();
    match ids.as_slice() {
        [id] => id.clone(),
        [id, aliases @ ..] => format!("{id} ({})", aliases.join(" ")),
        [] => unreachable!("a filesystem has a ResourceID"),
    }
}

/// The cgroups of containers other than these that have one of the filesystems and run.
pub(crate) fn others(
    dir: &StateDir,
    containers: &[&ContainerRecord],
    selected: &[Selected],
) -> Result<Vec<Cgroup>, CheckpointCause> {
    let users =
        selected.iter().flat_map(|selected| &selected.record.users).map(|user| user.container.as_str());
    let other = |user: &&str| containers.iter().all(|container| container.id != *user);
    let users: BTreeSet<&str> = users.filter(other).collect();
    let mut cgroups = Vec::new();
    for user in users {
        let Some(record) = dir.container(user)? else { continue };
        // One without a process is starting, which takes the lock that is held here, or has ended.
        let Some(init) = record.init.filter(process::is_alive) else { continue };
        cgroups.push(init.cgroup.ok_or_else(|| CheckpointCause::NoCgroup(user.to_owned()))?);
    }
    Ok(cgroups)
}

/// Writing to a frozen filesystem would wait for ever.
pub(crate) fn not_on_itself(image: &Path, selected: &[Selected]) -> Result<(), CheckpointCause> {
    let Ok(device) = device(image) else { return Ok(()) };
    match selected.iter().find(|selected| self::device(&selected.mountpoint).is_ok_and(|own| own == device)) {
        Some(selected) => {
            Err(CheckpointCause::OnItself { path: image.to_owned(), id: selected.record.resource_id.clone() })
        }
        None => Ok(()),
    }
}

fn device(path: &Path) -> io::Result<u64> {
    Ok(path.metadata()?.dev())
}

pub(crate) fn count_unlinked<'a>(
    cgroups: impl Iterator<Item = &'a Cgroup>,
    selected: &[Selected],
) -> Unlinked {
    // A mountpoint that can't be looked at is reported when it is saved.
    let devices = selected.iter().filter_map(|selected| device(&selected.mountpoint).ok());
    let processes: Vec<i32> = cgroups.flat_map(Cgroup::processes).collect();
    unlinked::count(&processes, &devices.collect::<Vec<_>>())
}

/// Views of the filesystems, by which they are read before and under the freeze.
pub(crate) fn open_views(selected: &[Selected]) -> Result<Vec<File>, CheckpointCause> {
    let open = |selected: &Selected| {
        let id = || selected.record.resource_id.clone();
        open_view(&selected.mountpoint).map_err(|source| CheckpointCause::Open { id: id(), source })
    };
    selected.iter().map(open).collect()
}
