//! Taking a checkpoint: freeze, read every selected filesystem, thaw, make durable, commit.
//!
//! Nothing of the container is changed: its filesystems are read through read-only views, and whatever
//! fails, it is thawed (if it was frozen here) and what was written of the image is removed. The image
//! is the state at one instant: all filesystems are saved within one freeze, which other containers share that have
//! one of the filesystems.
//!
//! Phases, and what they are called: [`Phase`]. What is frozen, and for how long at most: `checkpoint/freeze.rs`.
//!
//! A filesystem on disk is frozen besides, once no process can write to it any more, so that its file is
//! consistent, and if the host's filesystem has reflinks, that file is read from a clone when all is thawed. Lock order: the containers' cgroups, then filesystems; a process that waits for a frozen filesystem
//! couldn't be frozen itself.

mod error;
mod freeze;
mod phase;

use std::fs::File;
use std::iter;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use stillframe_pgalloc::{
    AsyncPagesFileSave, Direct, MemoryFile, PagesFileSummary, PagesMeta, SaveError, SaveOptions,
};
use stillframe_tmpfs::ResourceId;
use stillframe_tmpfs::precopy::Precopied;
use stillframe_tmpfs::save::{Contents, SaveTreeError, save_copied_tree, save_private_tree};

use crate::ahead::Ahead;
pub use crate::checkpoint::error::{CheckpointCause, CheckpointError};
use crate::checkpoint::freeze::Freeze;
pub use crate::checkpoint::phase::{Phase, PhaseTime};
use crate::checkpoint::phase::{Progress, milliseconds};
use crate::freezer::Cgroup;
use crate::image::{self, ImageWriter, PartWriter};
use crate::manifest::{Manifest, Offsets, Part, PrivateFormat, SavedContainer, SavedFilesystem};
use crate::process;
use crate::processes;
use crate::selected::{SavedFile, Selected, count_unlinked, not_on_itself, open_views, others, select};
use crate::selector::Selector;
use crate::state::{ContainerRecord, FilesystemRecord, Locked};
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
    /// How long the containers may be frozen by it. A checkpoint that would take longer fails, and they run on at once. With
    /// `kill` it counts until everything is read; that they are frozen during the commit is felt by nobody.
    pub pause_limit: Option<Duration>,
    /// Files in the image directory which CRIU has made of the container's processes, within the freeze that the container is
    /// in already: they become part of the image.
    pub processes: Vec<String>,
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
            pause_limit: None,
            processes: Vec::new(),
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
    /// How often what had changed was copied while the containers ran, the first copy included.
    pub rounds: u32,
    /// Bytes that were copied while the containers ran.
    pub copied_live_bytes: u64,
    /// Bytes that were copied while they were frozen.
    pub copied_frozen_bytes: u64,
    /// Bytes that were copied after that: of the files of filesystems on disk, from clones made while they were frozen.
    pub copied_thawed_bytes: u64,
    /// Bytes that were copied while they ran in vain: they are in the pages file, and nothing refers to them.
    pub superseded_bytes: u64,
    /// Files that were open but had no name: they aren't in the image.
    pub unlinked: Unlinked,
    /// How long the container was needed frozen, in milliseconds. If it was frozen before (paused), it
    /// stays so afterwards.
    pub frozen_ms: f64,
    /// How long it took from the request to the commit, in milliseconds.
    pub total_ms: f64,
    /// How long each phase took, in their order.
    pub phases: Vec<PhaseTime>,
}

/// Takes a checkpoint. Blocks until the image is durable.
pub fn checkpoint(state: &Locked, request: &CheckpointRequest) -> Result<CheckpointResult, CheckpointError> {
    let mut progress = Progress::new(&request.container_id);
    let taken = take(state, request, &mut progress);
    let phase = progress.phase();
    let mut result = taken.map_err(|cause| CheckpointError { phase, cause: Box::new(cause) })?;
    (result.phases, result.total_ms) = progress.finish();
    if let Err(error) = state.put_last_checkpoint(&result) {
        // The image is committed: that is what was asked for.
        tracing::warn!(%error, "the result of the checkpoint couldn't be recorded");
    }
    tracing::info!(container = %request.container_id, result = ?result, "checkpoint taken");
    Ok(result)
}

fn take(
    state: &Locked,
    request: &CheckpointRequest,
    progress: &mut Progress,
) -> Result<CheckpointResult, CheckpointCause> {
    let dir = state.dir();
    let id = &request.container_id;
    let unknown = || CheckpointCause::Unknown { id: id.clone(), sandbox: dir.path().to_owned() };
    let container = dir.container(id)?.ok_or_else(unknown)?;
    let init = container.init.as_ref().filter(|init| process::is_alive(init));
    let init = init.ok_or_else(|| CheckpointCause::NotRunning(id.clone()))?;
    let cgroup = init.cgroup.as_ref().ok_or_else(|| CheckpointCause::NoCgroup(id.clone()))?;
    let selected = select(dir, &container, &request.paths)?;
    let others = others(dir, id, &selected)?;
    let mut image = ImageWriter::create(&request.image_path, &request.processes)?;
    let pages_file = image.pages_file(request.pages_dir.as_deref())?;
    for directory in iter::once(&request.image_path).chain(&request.pages_dir) {
        not_on_itself(directory, &selected)?;
    }
    let on_disk = || selected.iter().filter(|selected| selected.record.filestore.is_some());
    for selected in on_disk() {
        selected.settle()?;
    }
    let unlinked = count_unlinked(cgroup, &selected);
    let views = open_views(&selected)?;
    let options = SaveOptions { direct: request.direct, ..SaveOptions::default() };
    let pages =
        AsyncPagesFileSave::new(pages_file, options).map_err(|source| pages_failed(&image, source))?;

    progress.enter(Phase::Copy);
    let mut ahead = if request.precopy && !cgroup.is_frozen()? {
        copy_ahead(&selected, &views, &pages, &image)?
    } else {
        selected.iter().map(|_| None).collect()
    };

    progress.enter(Phase::Freeze);
    let cgroups: Vec<&Cgroup> = iter::once(cgroup).chain(&others).collect();
    let filesystems = on_disk().map(|selected| selected.name.clone()).collect();
    let freeze = Freeze::new(state, &cgroups, filesystems, request.pause_limit, pages.canceller())?;

    progress.enter(Phase::Settle);
    let processes: Vec<i32> = cgroups.iter().flat_map(|cgroup| cgroup.processes()).collect();
    ahead.iter_mut().flatten().for_each(|ahead| ahead.settle(&processes));
    // Whoever may be thawed in the midst of it can't read files through mappings.
    let contents = if request.pause_limit.is_some() { Contents::Moving } else { Contents::Still };
    let saved = save(&container, &selected, &views, &ahead, contents, &image, pages);
    let saved = saved.map_err(|cause| freeze.because(cause))?;
    freeze.lift_limit()?;

    // What is to be killed isn't thawed before; whatever fails until then thaws it.
    let (freeze, mut frozen_for) = if request.kill {
        (Some(freeze), None)
    } else {
        progress.enter(Phase::Thaw);
        (None, Some(freeze.thaw()?))
    };
    progress.enter(Phase::Commit);
    let (copied_live_bytes, superseded_bytes) = (saved.copied_live, saved.superseded);
    let (manifest, pages, copied_thawed_bytes) = commit(saved, &container, image, &request.processes)?;
    if request.kill {
        process::kill(init).map_err(|source| CheckpointCause::Kill { pid: init.pid, source })?;
    }
    if let Some(freeze) = freeze {
        progress.enter(Phase::Thaw);
        frozen_for = Some(freeze.thaw()?);
    }

    let sum = |count: fn(&SavedFilesystem) -> u64| {
        manifest.filesystems.iter().map(count).fold(0, u64::saturating_add)
    };
    Ok(CheckpointResult {
        image_path: request.image_path.clone(),
        filesystems: manifest.filesystems.iter().map(|filesystem| filesystem.resource_id.clone()).collect(),
        files: sum(|filesystem| filesystem.files),
        entries: sum(|filesystem| filesystem.entries),
        logical_bytes: sum(|filesystem| filesystem.logical_bytes),
        pages_bytes: pages.length,
        zero_bytes: pages.zero_bytes,
        rounds: u32::from(ahead.iter().any(Option::is_some)),
        copied_live_bytes,
        copied_frozen_bytes: pages.data_bytes.saturating_sub(copied_live_bytes + copied_thawed_bytes),
        copied_thawed_bytes,
        superseded_bytes,
        unlinked,
        frozen_ms: frozen_for.map_or(0.0, milliseconds),
        total_ms: 0.0,
        phases: Vec::new(),
    })
}

/// What was read within the freeze, and needs the container no more.
struct Saved {
    /// Drained.
    pages: AsyncPagesFileSave,
    tree: PartWriter,
    filesystems: Vec<SavedFilesystem>,
    /// The private MemoryFiles, by their numbers.
    private: Vec<SavedFile>,
    /// Bytes that were copied before the freeze.
    copied_live: u64,
    /// Bytes that were copied before the freeze in vain; nothing refers to them.
    superseded: u64,
}

/// Copies what is in memory while the containers run.
fn copy_ahead(
    selected: &[Selected],
    views: &[File],
    pages: &AsyncPagesFileSave,
    image: &ImageWriter,
) -> Result<Vec<Option<Ahead>>, CheckpointCause> {
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
    contents: Contents,
    image: &ImageWriter,
    pages: AsyncPagesFileSave,
) -> Result<Saved, CheckpointCause> {
    let pages_failed = |source| pages_failed(image, source);
    let memory_file = MemoryFile::main();
    let memory = pages.register_memory_file(&memory_file).map_err(pages_failed)?;
    let mut tree = PartWriter::new(image.file(image::TREE)?);
    let mut filesystems = Vec::new();
    let mut private: Vec<SavedFile> = Vec::new();
    let mut frozen = Vec::new();
    let mut copied_ahead = 0;
    for ((selected, view), ahead) in selected.iter().zip(views).zip(ahead) {
        let record = &selected.record;
        let id = &record.resource_id;
        let tree_start = tree.position();
        let mut offsets = Offsets::PagesFile;
        let saved = match &record.filestore {
            None => {
                let nothing = Precopied::default();
                let copied = ahead.as_ref().map_or(&nothing, Ahead::copied);
                save_copied_tree(view, &container.ids, &memory, contents, copied, tree)
            }
            Some(path) => {
                let (guard, file) = selected.save_filestore(path, &pages, image)?;
                frozen.push(guard);
                let index = u32::try_from(private.len()).expect("a sandbox has fewer filesystems");
                private.push(file);
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
    pages.drain().map_err(pages_failed)?;
    drop(frozen);
    let copied_live = ahead.iter().flatten().map(|ahead| ahead.copied().bytes).sum::<u64>();
    let superseded = copied_live - copied_ahead;
    Ok(Saved { pages, tree, filesystems, private, copied_live, superseded })
}

/// Reads what needs no freeze, makes the parts durable and the directory an image.
///
/// Besides the image's contents gives the bytes that were read here.
fn commit(
    saved: Saved,
    container: &ContainerRecord,
    image: ImageWriter,
    beside: &[String],
) -> Result<(Manifest, PagesFileSummary, u64), CheckpointCause> {
    let pages_failed = |source| pages_failed(&image, source);
    let (mut private, mut copied_thawed) = (Vec::new(), 0);
    for (index, file) in (0..).zip(saved.private) {
        let (meta, copied) = file.finish(index, &saved.pages).map_err(pages_failed)?;
        private.push(meta);
        copied_thawed += copied;
    }
    let pages = saved.pages.finish().map_err(pages_failed)?;
    let tree = saved.tree.finish().map_err(|source| image.failed("write", image::TREE, source))?;
    let meta = PagesMeta { pages_length: pages.length, digests: pages.digests.clone(), private };
    let meta = meta.encode();
    image.write(image::META, &meta)?;
    let processes = processes::describe(image.path(), beside)?;
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
        processes,
    };
    image.commit(&manifest)?;
    Ok((manifest, pages, copied_thawed))
}

/// A full disk is found out while some file is being saved, which has nothing to do with it.
fn save_failed(id: &ResourceId, image: &ImageWriter, source: SaveTreeError) -> CheckpointCause {
    match source {
        SaveTreeError::Pages { source, .. } if source.is_of_pages_file() => pages_failed(image, source),
        source => CheckpointCause::Save { id: id.clone(), source },
    }
}

pub(crate) fn pages_failed(image: &ImageWriter, source: SaveError) -> CheckpointCause {
    CheckpointCause::Pages { path: image.pages_path(), source }
}

fn options_text(record: &FilesystemRecord) -> String {
    let options = record.options.data.iter().map(|option| match &option.value {
        Some(value) => format!("{}={value}", option.key),
        None => option.key.clone(),
    });
    options.collect::<Vec<_>>().join(",")
}
