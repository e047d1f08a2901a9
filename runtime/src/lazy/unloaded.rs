//! What a checkpoint needs of a filesystem that is being loaded: which files aren't, and the pages that they are loaded from.
//!
//! The pages file is reached through the keeper's or the loader's descriptor, since its image may have been removed. A file that
//! couldn't be loaded is saved all the same, if the pages file has it: the container can't read it, but it is what was saved.
//! Where it is damaged, the checkpoint fails and says so.

use std::fs::File;
use std::io;
use std::path::Path;

use stillframe_pgalloc::VerifiedPages;
use stillframe_tmpfs::lazy::unloaded::{Load, Standing, Unloaded};
use stillframe_tmpfs::mount::open_root;

use super::files::{self, LOADED, PENDING, Processes, Progress};
use super::{LazyError, LoadPhase, at};
use crate::process;
use crate::state::InitRecord;

/// The files that aren't loaded yet of the filesystem whose state directory is `directory`; `None` if all are.
pub(crate) fn unloaded(directory: &Path) -> Result<Option<Unloaded>, LazyError> {
    let Some(progress) = Progress::open(directory)? else { return Ok(None) };
    let failed = at("read how far loading has come in", directory);
    let header = progress.header().map_err(&failed)?;
    if header.phase() == Some(LoadPhase::Done) && header.failed_files == 0 {
        return Ok(None);
    }
    let gone = || LazyError::Gone { directory: directory.to_owned() };
    let processes = files::processes(directory)?.ok_or_else(gone)?;
    let Some(pages) = pages(&processes) else {
        // They may have ended just now because all is loaded.
        let header = progress.header().map_err(&failed)?;
        let done = header.phase() == Some(LoadPhase::Done) && header.failed_files == 0;
        return if done { Ok(None) } else { Err(gone()) };
    };
    let mut list = files::list(directory)?;
    let meta = files::meta(directory)?;
    let pages = VerifiedPages::new(pages, meta.digests)
        .map_err(|source| LazyError::Pages { path: list.pages_path.clone(), source: Box::new(source) })?;
    let large = list.large.len();
    if header.phase() < Some(LoadPhase::Large) {
        let mountpoint = directory.join("mnt");
        let root =
            open_root(&mountpoint).map_err(|error| at("open", &mountpoint)(io::Error::other(error)))?;
        let small = files::small(directory)?;
        let small = small.pending(&root).map_err(at("find the small files below", &mountpoint))?;
        list.large.extend(small);
    }
    let load = Loading {
        progress,
        large,
        quiet: list.quiet,
        ungated: processes.files.iter().map(Option::is_none).collect(),
        loaders: processes.loader.into_iter().chain([processes.keeper]).collect(),
    };
    Ok(Some(Unloaded::new(list.large, pages, list.pages_path, Box::new(load))))
}

/// The pages file, as one of the processes has it open.
fn pages(processes: &Processes) -> Option<File> {
    let open = |who: &InitRecord| {
        let file = File::open(format!("/proc/{}/fd/{}", who.pid, processes.pages)).ok()?;
        // If it is now, it was.
        process::is_alive(who).then_some(file)
    };
    open(&processes.keeper).or_else(|| open(processes.loader.as_ref()?))
}

#[derive(Debug)]
struct Loading {
    progress: Progress,
    /// So many files come first that are loaded behind the start; then those that are loaded before it.
    large: usize,
    quiet: bool,
    /// Of each large file, whether there was no descriptor for it when this was made.
    ungated: Vec<bool>,
    /// Known from before the filesystem was watched, so that as long as they live their pids are nobody else's.
    loaders: Vec<InitRecord>,
}

impl Load for Loading {
    fn standing(&self, index: usize) -> io::Result<Standing> {
        let before_start = || Ok::<_, io::Error>(self.progress.header()?.phase() < Some(LoadPhase::Large));
        if index >= self.large {
            return Ok(if before_start()? { Standing::Changing(None) } else { Standing::Loaded });
        }
        Ok(match self.progress.state(index)? {
            LOADED => Standing::Loaded,
            PENDING if self.ungated.get(index) == Some(&true) => Standing::Changing(None),
            PENDING => Standing::Unloaded,
            _ if self.quiet => Standing::Unloaded,
            _ => Standing::Changing(self.progress.mtime(index)?),
        })
    }

    fn is_loader(&self, process: i32) -> bool {
        self.loaders.iter().any(|loader| loader.pid == process && process::is_alive(loader))
    }
}
