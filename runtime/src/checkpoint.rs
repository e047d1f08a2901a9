//! Taking a checkpoint: freeze, read every selected filesystem, thaw, make durable, commit.
//!
//! Nothing of the container is changed: its filesystems are read through read-only views, and whatever
//! fails, it is thawed (if it was frozen here) and what was written of the image is removed. The image
//! is the state at one instant: all filesystems are saved within one freeze, which other containers share that have
//! one of the filesystems.
//!
//! A filesystem on disk is frozen besides, once no process can write to it any more, so that its file is
//! consistent. Lock order: the containers' cgroups, then filesystems; a process that waits for a frozen filesystem
//! couldn't be frozen itself.

use std::fs::File;
use std::io;
use std::iter;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;
use stillframe_pgalloc::{
    AsyncPagesFileSave, Direct, MemoryFile, PagesFileSummary, PagesMeta, PrivateMemoryFileMeta, SaveError,
    SaveOptions, SettledPagesFile,
};
use stillframe_tmpfs::ResourceId;
use stillframe_tmpfs::filestore::FilestoreError;
use stillframe_tmpfs::mount::MountError;
use stillframe_tmpfs::save::{SaveTreeError, save_copied_tree, save_private_tree, save_tree};

use crate::ahead::Ahead;
use crate::freezer::{Cgroup, FREEZE_TIMEOUT, FreezeError};
use crate::image::{self, ImageError, ImageWriter, PartWriter};
use crate::manifest::{Manifest, Offsets, Part, PrivateFormat, SavedContainer, SavedFilesystem};
use crate::process;
use crate::selected::{Selected, count_unlinked, not_on_itself, open_views, others, select};
use crate::selector::Selector;
use crate::state::{ContainerRecord, FilesystemRecord, Locked, StateError};
use crate::unlinked::Unlinked;

/// What a checkpoint is asked to do.
#[derive(Clone, Debug)]
pub struct CheckpointRequest {
    /// The container whose filesystems are saved.
    pub container_id: String,
    /// The image directory: made if it is missing, else it must be empty.
    pub image_path: PathBuf,
    /// Directory to keep the pages in, if not in the image, which then holds the trees only and finds the
    /// pages by their path.
    pub pages_dir: Option<PathBuf>,
    /// Which filesystems; none is all of the container's.
    pub paths: Vec<Selector>,
    /// Whether the pages file is written past the page cache.
    pub direct: Direct,
    /// Whether files are copied before the freeze, so that it is short; where changes can't be watched, or the
    /// container is frozen already, they aren't.
    pub precopy: bool,
    /// Whether the container's init process is killed (SIGKILL) once the image is committed. It isn't
    /// thawed before: nothing runs between the instant of the image and the end.
    pub kill: bool,
}

impl CheckpointRequest {
    /// All filesystems of a container, which runs on, into one directory.
    pub fn new(container_id: impl Into<String>, image_path: impl Into<PathBuf>) -> Self {
        Self {
            container_id: container_id.into(),
            image_path: image_path.into(),
            pages_dir: None,
            paths: Vec::new(),
            direct: Direct::Auto,
            precopy: true,
            kill: false,
        }
    }
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
    /// Bytes that were copied before the freeze and hadn't changed since.
    pub copied_ahead_bytes: u64,
    /// Bytes that were copied before the freeze in vain: they are in the pages file, and nothing refers to them.
    pub superseded_bytes: u64,
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
    /// The image would be written to what it is to hold.
    #[error(
        "the image directory {path} is on {id}, which is to be saved: give one that isn't in the container"
    )]
    OnItself {
        /// The image directory.
        path: PathBuf,
        /// ResourceID of the filesystem.
        id: ResourceId,
    },
    /// The file of a filesystem on disk couldn't be used.
    #[error("save the filesystem {id} on disk")]
    Filestore {
        /// Its ResourceID.
        id: ResourceId,
        /// Why.
        #[source]
        source: Box<FilestoreError>,
    },
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
    let others = others(dir, id, &selected)?;
    let mut image = ImageWriter::create(&request.image_path)?;
    let pages_file = image.pages_file(request.pages_dir.as_deref())?;
    for directory in iter::once(&request.image_path).chain(&request.pages_dir) {
        not_on_itself(directory, &selected)?;
    }
    for selected in selected.iter().filter(|selected| selected.record.filestore.is_some()) {
        selected.settle()?;
    }
    let unlinked = count_unlinked(cgroup, &selected);
    let views = open_views(&selected)?;
    let options = SaveOptions { direct: request.direct, ..SaveOptions::default() };
    let pages =
        AsyncPagesFileSave::new(pages_file, options).map_err(|source| pages_failed(&image, source))?;
    let mut ahead = if request.precopy && !cgroup.is_frozen()? {
        copy_ahead(&selected, &views, &pages, &image)?
    } else {
        selected.iter().map(|_| None).collect()
    };

    let freezing = Instant::now();
    let frozen = cgroup.freeze(FREEZE_TIMEOUT)?;
    let others_frozen =
        others.iter().map(|cgroup| cgroup.freeze(FREEZE_TIMEOUT)).collect::<Result<Vec<_>, _>>()?;
    let processes: Vec<i32> = iter::once(cgroup).chain(&others).flat_map(Cgroup::processes).collect();
    ahead.iter_mut().flatten().for_each(|ahead| ahead.settle(&processes));
    let saved = save(&container, &selected, &views, &ahead, &image, pages)?;
    drop(others_frozen);
    // What is to be killed isn't thawed before; whatever fails until then thaws it.
    let (frozen, thawed_after) = if request.kill {
        (Some(frozen), None)
    } else {
        drop(frozen);
        (None, Some(freezing.elapsed()))
    };
    let (copied_ahead_bytes, superseded_bytes) = (saved.copied_ahead, saved.superseded);
    let (manifest, pages) = commit(saved, &container, image)?;
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
        copied_ahead_bytes,
        superseded_bytes,
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

/// What was read within the freeze, and needs the container no more.
struct Saved {
    pages: SettledPagesFile,
    tree: PartWriter,
    filesystems: Vec<SavedFilesystem>,
    private: Vec<PrivateMemoryFileMeta>,
    /// Bytes that were copied before the freeze and are in the trees.
    copied_ahead: u64,
    /// Bytes that were copied before the freeze in vain; nothing refers to them.
    superseded: u64,
}

/// Copies what is in memory while the containers run.
fn copy_ahead(
    selected: &[Selected],
    views: &[File],
    pages: &AsyncPagesFileSave,
    image: &ImageWriter,
) -> Result<Vec<Option<Ahead>>, CheckpointError> {
    let memory_file = MemoryFile::main();
    let memory = pages.register_memory_file(&memory_file).map_err(|source| pages_failed(image, source))?;
    let copy = |(selected, view): (&Selected, &File)| {
        if selected.record.filestore.is_some() {
            return Ok(None);
        }
        Ahead::copy(view, &memory).map_err(|source| save_failed(&selected.record.resource_id, image, source))
    };
    selected.iter().zip(views).map(copy).collect()
}

/// Reads the filesystems; nothing is durable yet.
fn save(
    container: &ContainerRecord,
    selected: &[Selected],
    views: &[File],
    ahead: &[Option<Ahead>],
    image: &ImageWriter,
    pages: AsyncPagesFileSave,
) -> Result<Saved, CheckpointError> {
    let pages_failed = |source| pages_failed(image, source);
    let memory_file = MemoryFile::main();
    let memory = pages.register_memory_file(&memory_file).map_err(pages_failed)?;
    let mut tree = PartWriter::new(image.file(image::TREE)?);
    let mut filesystems = Vec::new();
    let mut private = Vec::new();
    let mut frozen = Vec::new();
    let mut copied_ahead = 0;
    for ((selected, view), ahead) in selected.iter().zip(views).zip(ahead) {
        let record = &selected.record;
        let id = &record.resource_id;
        let tree_start = tree.position();
        let mut offsets = Offsets::PagesFile;
        let saved = match &record.filestore {
            None => match ahead {
                Some(ahead) => save_copied_tree(view, &container.ids, &memory, ahead.copied(), tree),
                None => save_tree(view, &container.ids, &memory, tree),
            },
            Some(path) => {
                let (guard, meta) = selected.save_filestore(path, &pages, image)?;
                frozen.push(guard);
                let index = u32::try_from(private.len()).expect("a sandbox has fewer filesystems");
                private.push(PrivateMemoryFileMeta { index, ..meta });
                let (format, ids) = (PrivateFormat::Ext4, container.ids.clone());
                offsets = Offsets::PrivateFile { index, format, ids };
                save_private_tree(view, &container.ids, tree)
            }
        };
        let (out, summary) = saved.map_err(|source| save_failed(id, image, source))?;
        tree = out;
        copied_ahead += summary.copied_ahead;
        filesystems.push(SavedFilesystem {
            resource_id: id.clone(),
            aliases: record.ids().into_iter().filter(|alias| *alias != id).cloned().collect(),
            offsets,
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
    drop(frozen);
    let superseded = ahead.iter().flatten().map(|ahead| ahead.copied().bytes).sum::<u64>() - copied_ahead;
    Ok(Saved { pages, tree, filesystems, private, copied_ahead, superseded })
}

/// Makes the parts durable and the directory an image.
fn commit(
    saved: Saved,
    container: &ContainerRecord,
    image: ImageWriter,
) -> Result<(Manifest, PagesFileSummary), CheckpointError> {
    let pages = saved.pages.finish().map_err(|source| pages_failed(&image, source))?;
    let tree = saved.tree.finish().map_err(|source| image.failed("write", image::TREE, source))?;
    let (digests, private) = (pages.digests.clone(), saved.private);
    let meta = PagesMeta { pages_length: pages.length, digests, private };
    let meta = meta.encode();
    image.write(image::META, &meta)?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let manifest = Manifest {
        stillframe: env!("CARGO_PKG_VERSION").to_owned(),
        created: now.as_secs(),
        tree,
        meta: Part::of(&meta),
        pages_length: pages.length,
        pages_path: image.pages_apart(),
        containers: vec![SavedContainer { name: container.name.clone(), named: container.named }],
        filesystems: saved.filesystems,
    };
    image.commit(&manifest)?;
    Ok((manifest, pages))
}

/// A full disk is found out while some file is being saved, which has nothing to do with it.
fn save_failed(id: &ResourceId, image: &ImageWriter, source: SaveTreeError) -> CheckpointError {
    match source {
        SaveTreeError::Pages { source, .. } if source.is_of_pages_file() => pages_failed(image, source),
        source => CheckpointError::Save { id: id.clone(), source },
    }
}

pub(crate) fn pages_failed(image: &ImageWriter, source: SaveError) -> CheckpointError {
    CheckpointError::Pages { path: image.pages_path(), source }
}

fn options_text(record: &FilesystemRecord) -> String {
    let options = record.options.data.iter().map(|option| match &option.value {
        Some(value) => format!("{}={value}", option.key),
        None => option.key.clone(),
    });
    options.collect::<Vec<_>>().join(",")
}
