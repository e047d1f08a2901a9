//! Taking a checkpoint: freeze, read every selected filesystem, thaw, make durable, commit.
//!
//! Nothing of the container is changed: its filesystems are read through read-only views, and whatever
//! fails, it is thawed (if it was frozen here) and what was written of the image is removed. The image
//! is the state at one instant: all filesystems are saved within one freeze.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;
use stillframe_pgalloc::{
    AsyncPagesFileSave, Direct, MemoryFile, PagesFileSummary, PagesMeta, SaveError, SaveOptions,
    SettledPagesFile,
};
use stillframe_tmpfs::ResourceId;
use stillframe_tmpfs::mount::{MountError, open_view};
use stillframe_tmpfs::save::{SaveTreeError, save_tree};

use crate::freezer::{Cgroup, FREEZE_TIMEOUT, FreezeError};
use crate::image::{self, ImageError, ImageWriter, PartWriter};
use crate::manifest::{Manifest, Offsets, Part, SavedContainer, SavedFilesystem};
use crate::process;
use crate::selector::Selector;
use crate::state::{ContainerRecord, FilesystemRecord, Locked, StateDir, StateError};
use crate::unlinked::{self, Unlinked};

/// What a checkpoint is asked to do.
#[derive(Clone, Debug)]
pub struct CheckpointRequest {
    /// The container whose filesystems are saved.
    pub container_id: String,
    /// The image directory: made if it is missing, else it must be empty.
    pub image_path: PathBuf,
    /// Which filesystems; none is all of the container's.
    pub paths: Vec<Selector>,
    /// Whether the pages file is written past the page cache.
    pub direct: Direct,
    /// Whether the container's init process is killed (SIGKILL) once the image is committed. It isn't
    /// thawed before: nothing runs between the instant of the image and the end.
    pub kill: bool,
}

/// What a checkpoint did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckpointResult {
    /// Where the image is.
    pub image_path: PathBuf,
    /// The filesystems that were saved.
    pub filesystems: Vec<ResourceId>,
    /// Regular files, hard links counted once.
    pub files: u64,
    /// Names of every kind.
    pub entries: u64,
    /// Sum of the sizes of the regular files, in bytes.
    pub logical_bytes: u64,
    /// Length of the pages file, in bytes.
    pub pages_bytes: u64,
    /// Bytes that were read, found to be zero, and left out.
    pub zero_bytes: u64,
    /// Files that were open but had no name: they aren't in the image.
    pub unlinked: Unlinked,
    /// How long the container was needed frozen, in milliseconds. If it was frozen before (paused), it
    /// stays so afterwards.
    pub frozen_ms: f64,
    /// How long it took from the request to the commit, in milliseconds.
    pub total_ms: f64,
}

/// Why a checkpoint failed.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The container isn't one of ours.
    #[error("container {id} is unknown in {sandbox}")]
    Unknown {
        /// Its id.
        id: String,
        /// The sandbox's state directory.
        sandbox: PathBuf,
    },
    /// The container doesn't run.
    #[error("container {0} has no running process: only a running or paused container can be checkpointed")]
    NotRunning(String),
    /// The container can't be frozen.
    #[error(
        "container {0} has no cgroup of its own, so it can't be frozen: give it one (linux.cgroupsPath), or pause it"
    )]
    NoCgroup(String),
    /// A selection matches nothing.
    #[error("no filesystem of the container is \"{selector}\"; there are: {there}")]
    NoMatch {
        /// The selection.
        selector: String,
        /// What there is.
        there: String,
    },
    /// Two filesystems have one ResourceID.
    #[error(
        "two filesystems are called {0}: the container mounts a tmpfs twice at one path; \
         save the others by --path, or mount it once"
    )]
    Duplicate(ResourceId),
    /// The sandbox's state couldn't be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The container couldn't be frozen.
    #[error("freeze the container")]
    Freeze(#[from] FreezeError),
    /// A filesystem couldn't be looked into.
    #[error("open the filesystem {id}")]
    Open {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: MountError,
    },
    /// A filesystem couldn't be saved.
    #[error("save the filesystem {id}")]
    Save {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: SaveTreeError,
    },
    /// The pages file couldn't be written.
    #[error("write {path}")]
    Pages {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: SaveError,
    },
    /// The image is complete, but the container couldn't be killed.
    #[error("the image is complete, but the container's init process {pid} couldn't be killed")]
    Kill {
        /// Its process id.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The image couldn't be written.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// Takes a checkpoint. Blocks until the image is durable.
pub fn checkpoint(state: &Locked, request: &CheckpointRequest) -> Result<CheckpointResult, CheckpointError> {
    let begun = Instant::now();
    let dir = state.dir();
    let id = &request.container_id;
    let unknown = || CheckpointError::Unknown { id: id.clone(), sandbox: dir.path().to_owned() };
    let container = dir.container(id)?.ok_or_else(unknown)?;
    let init = container.init.as_ref().filter(|init| process::is_alive(init));
    let init = init.ok_or_else(|| CheckpointError::NotRunning(id.clone()))?;
    let cgroup = init.cgroup.as_ref().ok_or_else(|| CheckpointError::NoCgroup(id.clone()))?;
    let selected = select(dir, &container, &request.paths)?;
    let image = ImageWriter::create(&request.image_path)?;
    let unlinked = count_unlinked(cgroup, &selected);

    let freezing = Instant::now();
    let frozen = cgroup.freeze(FREEZE_TIMEOUT)?;
    let saved = save(&container, &selected, &image, request)?;
    // What is to be killed isn't thawed before; whatever fails until then thaws it.
    let (frozen, thawed_after) = if request.kill {
        (Some(frozen), None)
    } else {
        drop(frozen);
        (None, Some(freezing.elapsed()))
    };
    let (manifest, pages) = commit(saved, &container, image, request)?;
    if request.kill {
        process::kill(init).map_err(|source| CheckpointError::Kill { pid: init.pid, source })?;
    }
    drop(frozen);
    let frozen_for = thawed_after.unwrap_or_else(|| freezing.elapsed());

    let sum = |count: fn(&SavedFilesystem) -> u64| {
        manifest.filesystems.iter().map(count).fold(0, u64::saturating_add)
    };
    let result = CheckpointResult {
        image_path: request.image_path.clone(),
        filesystems: manifest.filesystems.iter().map(|filesystem| filesystem.resource_id.clone()).collect(),
        files: sum(|filesystem| filesystem.files),
        entries: sum(|filesystem| filesystem.entries),
        logical_bytes: sum(|filesystem| filesystem.logical_bytes),
        pages_bytes: pages.length,
        zero_bytes: pages.zero_bytes,
        unlinked,
        frozen_ms: milliseconds(frozen_for),
        total_ms: milliseconds(begun.elapsed()),
    };
    if let Err(error) = state.put_last_checkpoint(&result) {
        // The image is committed: that is what was asked for.
        tracing::warn!(%error, "the result of the checkpoint couldn't be recorded");
    }
    tracing::info!(container = %id, result = ?result, "checkpoint taken");
    Ok(result)
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// A filesystem to be saved.
struct Selected {
    record: FilesystemRecord,
    mountpoint: PathBuf,
}

/// Finds the filesystems; every selection must find one, and no two may have the same name.
fn select(
    dir: &StateDir,
    container: &ContainerRecord,
    selectors: &[Selector],
) -> Result<Vec<Selected>, CheckpointError> {
    let mut all = Vec::new();
    for name in &container.filesystems {
        let missing = || StateError::File {
            operation: "read",
            path: dir.mountpoint(name).with_file_name("record.json"),
            source: io::ErrorKind::NotFound.into(),
        };
        let record = dir.filesystem(name)?.ok_or_else(missing)?;
        all.push(Selected { record, mountpoint: dir.mountpoint(name) });
    }
    for selector in selectors {
        if !all.iter().any(|selected| selector.matches(&selected.record.resource_id)) {
            let there: Vec<String> =
                all.iter().map(|selected| selected.record.resource_id.to_string()).collect();
            let there = if there.is_empty() { "none at all".to_owned() } else { there.join(", ") };
            return Err(CheckpointError::NoMatch { selector: selector.to_string(), there });
        }
    }
    let is_selected =
        |id: &ResourceId| selectors.is_empty() || selectors.iter().any(|selector| selector.matches(id));
    all.retain(|selected| is_selected(&selected.record.resource_id));
    for (index, selected) in all.iter().enumerate() {
        let id = &selected.record.resource_id;
        if all[..index].iter().any(|before| before.record.resource_id == *id) {
            return Err(CheckpointError::Duplicate(id.clone()));
        }
    }
    Ok(all)
}

fn count_unlinked(cgroup: &Cgroup, selected: &[Selected]) -> Unlinked {
    // A mountpoint that can't be looked at is reported when it is saved.
    let devices = selected.iter().filter_map(|selected| Some(selected.mountpoint.metadata().ok()?.dev()));
    unlinked::count(&cgroup.processes(), &devices.collect::<Vec<_>>())
}

/// What was read within the freeze, and needs the container no more.
struct Saved {
    pages: SettledPagesFile,
    tree: PartWriter,
    filesystems: Vec<SavedFilesystem>,
}

/// Reads the filesystems; nothing is durable yet.
fn save(
    container: &ContainerRecord,
    selected: &[Selected],
    image: &ImageWriter,
    request: &CheckpointRequest,
) -> Result<Saved, CheckpointError> {
    let pages_failed = |source| pages_failed(request, source);
    let options = SaveOptions { direct: request.direct, ..SaveOptions::default() };
    let pages = AsyncPagesFileSave::new(image.file(image::PAGES)?, options).map_err(pages_failed)?;
    let memory_file = MemoryFile::main();
    let memory = pages.register_memory_file(&memory_file).map_err(pages_failed)?;
    let mut tree = PartWriter::new(image.file(image::TREE)?);
    let mut filesystems = Vec::new();
    for Selected { record, mountpoint } in selected {
        let id = &record.resource_id;
        let view =
            open_view(mountpoint).map_err(|source| CheckpointError::Open { id: id.clone(), source })?;
        let tree_start = tree.position();
        let saved = save_tree(&view, &container.ids, &memory, tree);
        let (out, summary) = saved.map_err(|source| CheckpointError::Save { id: id.clone(), source })?;
        tree = out;
        filesystems.push(SavedFilesystem {
            resource_id: id.clone(),
            offsets: Offsets::PagesFile,
            tree_start,
            tree_end: tree.position(),
            options: options_text(record),
            files: summary.files,
            entries: summary.entries,
            logical_bytes: summary.logical_bytes,
            data_bytes: summary.data_bytes,
        });
    }
    let pages = pages.settle().map_err(pages_failed)?;
    Ok(Saved { pages, tree, filesystems })
}

/// Makes the parts durable and the directory an image.
fn commit(
    saved: Saved,
    container: &ContainerRecord,
    image: ImageWriter,
    request: &CheckpointRequest,
) -> Result<(Manifest, PagesFileSummary), CheckpointError> {
    let pages = saved.pages.finish().map_err(|source| pages_failed(request, source))?;
    let tree = saved.tree.finish().map_err(|source| image.failed("write", image::TREE, source))?;
    let meta = PagesMeta { pages_length: pages.length, digests: pages.digests.clone(), private: Vec::new() };
    let meta = meta.encode();
    image.write(image::META, &meta)?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let manifest = Manifest {
        stillframe: env!("CARGO_PKG_VERSION").to_owned(),
        created: now.as_secs(),
        tree,
        meta: Part::of(&meta),
        pages_length: pages.length,
        containers: vec![SavedContainer { name: container.name.clone(), named: container.named }],
        filesystems: saved.filesystems,
    };
    image.commit(&manifest)?;
    Ok((manifest, pages))
}

fn pages_failed(request: &CheckpointRequest, source: SaveError) -> CheckpointError {
    CheckpointError::Pages { path: request.image_path.join(image::PAGES), source }
}

fn options_text(record: &FilesystemRecord) -> String {
    let options = record.options.data.iter().map(|option| match &option.value {
        Some(value) => format!("{}={value}", option.key),
        None => option.key.clone(),
    });
    options.collect::<Vec<_>>().join(",")
}
