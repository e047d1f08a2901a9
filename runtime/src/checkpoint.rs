//! Taking a checkpoint: freeze, read every selected filesystem, thaw, make durable, commit.
//!
//! Nothing of the container is changed: its filesystems are read through read-only views, and whatever
//! fails, it is thawed (if it was frozen here) and what was written of the image is removed. The image
//! is the state at one instant: all filesystems are saved within one freeze, which other containers share that have
//! one of the filesystems.
//!
//! Phases, and what they are called: [`Phase`]. What is frozen, and for how long at most: `checkpoint/freeze.rs`.
//!
//! A filesystem on disk is frozen besides, once no process can write to it any more, so that its file is consistent, and if the
//! host's filesystem has reflinks, that file is read from a clone when all is thawed. Files that aren't loaded yet are taken from
//! what they are loaded from. Lock order: the containers' cgroups, then filesystems; a process that waits for a frozen
//! filesystem couldn't be frozen itself.

mod ahead;
mod durable;
mod error;
mod freeze;
mod lives;
mod phase;
mod scope;
mod trees;

use std::fs::File;
use std::io::Write;
use std::iter;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use stillframe_pgalloc::{
    AsyncMemoryFileSave, AsyncPagesFileSave, Direct, MemoryFile, PagesFileSummary, SaveError, SaveOptions,
};
use stillframe_tmpfs::entry::Timestamp;
use stillframe_tmpfs::lazy::unloaded::Unloaded;
use stillframe_tmpfs::live::coarse_now;
use stillframe_tmpfs::save::{SaveTreeError, TreeSummary, save_moving_tree, save_private_tree, save_tree};
use stillframe_tmpfs::{Ids, ResourceId};

pub use crate::checkpoint::ahead::Ahead;
use crate::checkpoint::durable::make_durable;
pub use crate::checkpoint::error::{CheckpointCause, CheckpointError};
use crate::checkpoint::freeze::Freeze;
use crate::checkpoint::lives::Lives;
pub use crate::checkpoint::phase::{Phase, PhaseTime};
use crate::checkpoint::phase::{Progress, milliseconds};
use crate::checkpoint::scope::Scope;
use crate::checkpoint::trees::{Archive, Described, ToWrite};
use crate::freezer::Cgroup;
use crate::image::{self, ImageWriter, PartWriter};
use crate::lazy;
use crate::manifest::{Manifest, Offsets, PrivateFormat, SavedContainer, SavedFilesystem, SavedPod};
use crate::processes;
use crate::selected::{SavedFile, Selected, count_unlinked, not_on_itself, open_views, select};
use crate::selector::Selector;
use crate::state::{FilesystemRecord, Locked};
use crate::unlinked::Unlinked;

/// What a checkpoint is asked to do.
#[derive(Clone, Debug)]
pub struct CheckpointRequest {
    /// The container whose filesystems are saved.
    pub container_id: String,
    /// Whether those of all containers that run in its pod are saved, in one image of one instant.
    pub pod: bool,
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
            pod: false,
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
    /// How long the container was needed frozen, in milliseconds. One that was paused before stays so.
    pub frozen_ms: f64,
    /// How long it took from the request to the commit, in milliseconds.
    pub total_ms: f64,
    /// How long each phase took, in their order.
    pub phases: Vec<PhaseTime>,
}

/// Takes a checkpoint, with what was copied `ahead` of it, if that is of the same filesystems. Blocks until the image is
/// durable.
pub fn checkpoint(
    state: &Locked,
    request: &CheckpointRequest,
    ahead: Option<Ahead>,
) -> Result<CheckpointResult, CheckpointError> {
    let mut progress = Progress::new(&request.container_id);
    let taken = take(state, request, ahead, &mut progress);
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
    ahead: Option<Ahead>,
    progress: &mut Progress,
) -> Result<CheckpointResult, CheckpointCause> {
    let dir = state.dir();
    let scope = Scope::of(dir, request)?;
    let selected = select(dir, &scope.records(), &request.paths)?;
    let containers = scope.describe(&selected)?;
    let others = scope.others(dir, &selected)?;
    let mut image = ImageWriter::create(&request.image_path, &request.processes)?;
    let ahead = ahead.filter(|ahead| ahead.fits(request, &selected));
    let pages_file = match ahead {
        None => Err(image.pages_file(request.pages_dir.as_deref())?),
        Some(ahead) => Ok(ahead.hand_over(&mut image)),
    };
    for directory in iter::once(&request.image_path).chain(&request.pages_dir) {
        not_on_itself(directory, &selected)?;
    }
    let on_disk = || selected.iter().filter(|selected| selected.record.filestore.is_some());
    for selected in on_disk() {
        selected.settle()?;
    }
    let unlinked = count_unlinked(scope.cgroups(), &selected);
    let views = open_views(&selected)?;
    let options = SaveOptions { direct: request.direct, ..SaveOptions::default() };
    let started = |file| AsyncPagesFileSave::new(file, options);
    let (pages, ahead) = match pages_file {
        Ok((pages, lives)) => (pages, Some(lives)),
        Err(file) => (started(file).map_err(|source| pages_failed(&image.pages_path(), source))?, None),
    };

    progress.enter(Phase::Copy);
    let mut lives = match ahead {
        Some(lives) => lives,
        None if request.precopy && !scope.is_frozen()? => {
            Lives::copy(&selected, &views, &pages, &image.pages_path())?
        }
        None => Lives::none(&selected),
    };

    if lives.rounds > 0 {
        // So that under the freeze there are buffers, and nobody waits for the disk.
        pages.drain().map_err(|source| pages_failed(&image.pages_path(), source))?;
    }
    let away = lazy::leave_cgroups(dir);
    progress.enter(Phase::Freeze);
    let cgroups: Vec<&Cgroup> = scope.cgroups().chain(&others).collect();
    let filesystems = on_disk().map(|selected| selected.name.clone()).collect();
    let freeze = Freeze::new(state, &cgroups, filesystems, request.pause_limit, pages.canceller())?;

    progress.enter(Phase::Settle);
    let output = Output { image: &image, pages };
    let read = read(&selected, &views, &mut lives, request.pause_limit.is_some(), output);
    let read = read.map_err(|cause| freeze.because(cause))?;
    freeze.lift_limit()?;
    let thaw = coarse_now();

    // What is to be killed isn't thawed before; whatever fails until then thaws it.
    let (freeze, mut frozen_for) = if request.kill {
        (Some(freeze), None)
    } else {
        progress.enter(Phase::Thaw);
        (None, Some(freeze.thaw()?))
    };
    drop(away);
    progress.enter(Phase::Commit);
    let (rounds, copied_live_bytes) = (lives.rounds, lives.copied);
    let Committed { manifest, pages, superseded_bytes, copied_thawed_bytes } =
        commit(read, lives, thaw, containers, &selected, image, &request.processes)?;
    if request.kill {
        scope.kill()?;
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
        rounds,
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

/// The parts of an image that are written.
struct Output<'a> {
    image: &'a ImageWriter,
    pages: AsyncPagesFileSave,
}

/// What was read within the freeze.
struct Read {
    /// Drained, if it had files that must be still.
    pages: AsyncPagesFileSave,
    /// What the archives are in that are written.
    tree: Option<PartWriter>,
    filesystems: Vec<ReadFilesystem>,
    /// The private MemoryFiles, by their numbers.
    private: Vec<SavedFile>,
}

/// One filesystem that was read.
struct ReadFilesystem {
    offsets: Offsets,
    /// `None` while it is in memory, as [`Lives`] has it.
    archive: Option<(Archive, TreeSummary)>,
}

/// Reads the filesystems under the freeze; nothing is durable yet.
fn read(
    selected: &[Selected],
    views: &[File],
    lives: &mut Lives,
    limited: bool,
    output: Output<'_>,
) -> Result<Read, CheckpointCause> {
    let Output { image, pages } = output;
    let pages_failed = |source| pages_failed(&image.pages_path(), source);
    let memory_file = MemoryFile::main();
    let memory = pages.register_memory_file(&memory_file).map_err(pages_failed)?;
    let mut filesystems = Vec::new();
    let mut private: Vec<SavedFile> = Vec::new();
    let mut frozen = Vec::new();
    let mut still = false;
    // Archives are in the order of the filesystems, and those in memory are written after the thaw.
    let at_once = lives.filesystems.iter().all(Option::is_none);
    let mut tree = match at_once {
        true => Some(PartWriter::new(image.file(image::TREE)?)),
        false => None,
    };
    for ((selected, view), live) in selected.iter().zip(views).zip(&mut lives.filesystems) {
        let record = &selected.record;
        let failed = |source| save_failed(&record.resource_id, &image.pages_path(), source);
        let ids = selected.ids.clone();
        let mut offsets = Offsets::PagesFile;
        let saving = match (&record.filestore, live) {
            (None, Some(live)) => {
                live.settle(&memory).map_err(failed)?;
                filesystems.push(ReadFilesystem { offsets, archive: None });
                continue;
            }
            (None, None) => match selected.unloaded()? {
                // Whoever may be thawed in the midst of it can't read files through mappings.
                None if !limited => Saving::Still,
                unloaded => Saving::Moving(unloaded),
            },
            (Some(path), _) => {
                let (guard, file) = selected.save_filestore(path, &pages, image)?;
                frozen.push(guard);
                let index = u32::try_from(private.len()).expect("a sandbox has fewer filesystems");
                private.push(file);
                let format = PrivateFormat::Ext4;
                offsets = Offsets::PrivateFile { index, format, ids: ids.clone() };
                Saving::Private
            }
        };
        still |= !matches!(saving, Saving::Moving(_));
        let archive = match tree.take() {
            Some(part) => {
                let start = part.position();
                let (part, summary) = saving.save(view, &ids, &memory, part).map_err(failed)?;
                tree = Some(part);
                (Archive::Written(start), summary)
            }
            None => {
                let (kept, summary) = saving.save(view, &ids, &memory, Vec::new()).map_err(failed)?;
                (Archive::Kept(kept), summary)
            }
        };
        filesystems.push(ReadFilesystem { offsets, archive: Some(archive) });
    }
    if still {
        pages.drain().map_err(pages_failed)?;
    }
    drop(frozen);
    Ok(Read { pages, tree, filesystems, private })
}

/// How a filesystem is saved that isn't in memory.
enum Saving {
    Still,
    Moving(Option<Unloaded>),
    Private,
}

impl Saving {
    fn save<W: Write>(
        self,
        view: &File,
        ids: &Ids,
        memory: &AsyncMemoryFileSave<'_>,
        out: W,
    ) -> Result<(W, TreeSummary), SaveTreeError> {
        match self {
            Self::Still => save_tree(view, ids, memory, out),
            Self::Moving(unloaded) => save_moving_tree(view, ids, memory, unloaded.as_ref(), out),
            Self::Private => save_private_tree(view, ids, out),
        }
    }
}

/// A committed image.
struct Committed {
    manifest: Manifest,
    pages: PagesFileSummary,
    /// Bytes in the pages file to which nothing refers.
    superseded_bytes: u64,
    /// Bytes that were read after the freeze.
    copied_thawed_bytes: u64,
}

/// After the thaw, unless the containers are to be killed: reads what needs no freeze, writes the trees that are in memory,
/// makes the parts durable and the directory an image.
fn commit(
    read: Read,
    mut lives: Lives,
    thaw: Timestamp,
    (containers, pod): (Vec<SavedContainer>, Option<SavedPod>),
    selected: &[Selected],
    image: ImageWriter,
    beside: &[String],
) -> Result<Committed, CheckpointCause> {
    let Read { pages, tree, filesystems, private: files } = read;
    let pages_failed = |source| pages_failed(&image.pages_path(), source);
    lives.verify(selected, &image, thaw)?;
    let (mut private, mut copied_thawed_bytes) = (Vec::new(), 0);
    for (index, file) in (0..).zip(files) {
        let (meta, copied) = file.finish(index, &pages).map_err(pages_failed)?;
        private.push(meta);
        copied_thawed_bytes += copied;
    }
    let mut pages = pages.settle().map_err(pages_failed)?;
    let superseded_bytes = lives.compact(&mut pages).map_err(pages_failed)?;

    let mut offsets = Vec::new();
    let mut to_write = Vec::new();
    for ((selected, read), live) in selected.iter().zip(filesystems).zip(&mut lives.filesystems) {
        offsets.push(read.offsets);
        to_write.push(ToWrite { selected, archive: read.archive, live: live.as_mut() });
    }
    let tree = trees::write(tree, to_write, &image)?;
    let describe = |((selected, offsets), Described { start, end, length, summary }): (
        (&Selected, Offsets),
        Described,
    )| {
        let record = &selected.record;
        let id = &record.resource_id;
        SavedFilesystem {
            resource_id: id.clone(),
            aliases: record.ids().into_iter().filter(|alias| *alias != id).cloned().collect(),
            offsets,
            tree_start: start,
            tree_end: end,
            tree_length: length,
            options: options_text(record),
            files: summary.files,
            entries: summary.entries,
            logical_bytes: summary.logical_bytes,
            data_bytes: summary.data_bytes,
        }
    };
    let filesystems = selected.iter().zip(offsets).zip(tree.archives).map(describe).collect();

    lives.discard();
    let (pages, tree, meta) = make_durable(pages, (tree.part, tree.name), private, &image)?;
    let processes = processes::describe(image.path(), beside)?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let manifest = Manifest {
        stillframe: env!("CARGO_PKG_VERSION").to_owned(),
        created: now.as_secs(),
        tree,
        meta,
        pages_length: pages.length,
        pages_path: image.pages_apart(),
        containers,
        pod,
        filesystems,
        processes,
    };
    image.commit(&manifest)?;
    Ok(Committed { manifest, pages, superseded_bytes, copied_thawed_bytes })
}

/// A full disk is found out while some file is being saved, which has nothing to do with it.
pub(crate) fn save_failed(id: &ResourceId, pages: &Path, source: SaveTreeError) -> CheckpointCause {
    match source {
        SaveTreeError::Pages { source, .. } if source.is_of_pages_file() => pages_failed(pages, source),
        source => CheckpointCause::Save { id: id.clone(), source },
    }
}

pub(crate) fn pages_failed(pages: &Path, source: SaveError) -> CheckpointCause {
    CheckpointCause::Pages { path: pages.to_owned(), source }
}

fn options_text(record: &FilesystemRecord) -> String {
    let options = record.options.data.iter().map(|option| match &option.value {
        Some(value) => format!("{}={value}", option.key),
        None => option.key.clone(),
    });
    options.collect::<Vec<_>>().join(",")
}
