//! Copying a container's filesystems before somebody else freezes it: containerd sends Pause, and Checkpoint only then.
//!
//! copied -> handed over to the checkpoint that follows, or dropped, and then nothing is left of it. In between changes go on
//! being watched: other containers of the pod may run on. The sandbox isn't locked then.
//!
//! It is bounded: copying ends after [`LONGEST`], and then nothing was copied; what is written is at most some times what the
//! filesystems hold (`lives.rs`).

use std::fs::File;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use stillframe_pgalloc::{AsyncPagesFileSave, SaveError, SaveOptions};
use tempfile::TempPath;

use crate::checkpoint::error::{CheckpointCause, CheckpointError};
use crate::checkpoint::lives::Lives;
use crate::checkpoint::phase::{Phase, Progress};
use crate::checkpoint::{CheckpointRequest, pages_failed};
use crate::image::{self, ImageWriter};
use crate::selected::{Selected, not_on_itself, open_views, select};
use crate::state::Locked;

/// How long a pause may be held up.
const LONGEST: Duration = Duration::from_secs(120);

/// What was copied of a container's filesystems; see the module.
#[derive(Debug)]
pub struct Ahead {
    container: String,
    pages_dir: PathBuf,
    /// Names of the filesystems' directories in the state.
    filesystems: Vec<String>,
    lives: Lives,
    pages: AsyncPagesFileSave,
    /// Dropped last: it removes the pages file.
    path: TempPath,
}

impl Ahead {
    /// Copies all filesystems of the container to its directory for pages. `None` if that takes too long.
    pub(crate) fn copy(state: &Locked, id: &str) -> Result<Option<Self>, CheckpointError> {
        let mut progress = Progress::new(id);
        let copied = Self::copy_all(state, id, &mut progress);
        match copied {
            Ok(ahead) => Ok(ahead),
            Err(
                CheckpointCause::Pages { source: SaveError::Cancelled, .. } | CheckpointCause::Save { .. },
            ) if progress.is_late(LONGEST) => {
                tracing::warn!(
                    container = id,
                    "copying ahead takes too long: all is copied when it is paused"
                );
                Ok(None)
            }
            Err(cause) => Err(CheckpointError { phase: progress.phase(), cause: Box::new(cause) }),
        }
    }

    fn copy_all(state: &Locked, id: &str, progress: &mut Progress) -> Result<Option<Self>, CheckpointCause> {
        let dir = state.dir();
        let unknown = || CheckpointCause::Unknown { id: id.to_owned(), sandbox: dir.path().to_owned() };
        let container = dir.container(id)?.ok_or_else(unknown)?;
        let Some(pages_dir) = container.pages_dir.clone() else { return Ok(None) };
        let selected = select(dir, &[&container], &[])?;
        let (file, path) = image::pages_apart(&pages_dir)?;
        not_on_itself(&pages_dir, &selected)?;
        let views = open_views(&selected)?;
        let pages = AsyncPagesFileSave::new(file, SaveOptions::default());
        let pages = pages.map_err(|source| pages_failed(&path, source))?;
        progress.enter(Phase::Copy);
        let canceller = pages.canceller();
        let (done, wait) = channel::<()>();
        let mut lives = thread::scope(|scope| {
            let watch = move || {
                if wait.recv_timeout(LONGEST) == Err(RecvTimeoutError::Timeout) {
                    canceller.cancel();
                }
            };
            thread::Builder::new()
                .name("copy-limit".into())
                .spawn_scoped(scope, watch)
                .map_err(CheckpointCause::Thread)?;
            let lives = Lives::copy(&selected, &views, &pages, &path);
            let written = pages.drain();
            drop(done);
            written.map_err(|source| pages_failed(&path, source)).and(lives)
        })?;
        // What is durable before the pause needn't be made so in it. If it can't be, the commit says why.
        if let Err(error) = File::open(&path).and_then(|file| file.sync_all()) {
            tracing::debug!(%error, "the pages file isn't durable before the pause");
        }
        lives.prepare(&selected);
        let filesystems = selected.into_iter().map(|selected| selected.name).collect();
        Ok(Some(Self { container: id.to_owned(), pages_dir, filesystems, lives, pages, path }))
    }

    /// Whether it is of what is asked for.
    pub(crate) fn fits(&self, request: &CheckpointRequest, selected: &[Selected]) -> bool {
        self.container == request.container_id
            && !request.pod
            && request.pages_dir.as_ref() == Some(&self.pages_dir)
            && selected.iter().map(|selected| &selected.name).eq(&self.filesystems)
    }

    /// Makes its pages file the image's.
    pub(crate) fn hand_over(self, image: &mut ImageWriter) -> (AsyncPagesFileSave, Lives) {
        image.adopt_pages(self.path);
        (self.pages, self.lives)
    }
}
