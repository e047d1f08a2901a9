//! Mode `full`: a container's processes are saved and restored with its filesystems, by CRIU, as runc drives it.
//!
//! ```text
//!   checkpoint   frozen -> runc checkpoint, processes stay -> filesystems, verified and committed with CRIU's files -> thawed, or killed
//!   restore      Create: filesystems -> (the container has no process) -> Start: runc restore -> Running
//! ```
//!
//! One freeze holds from before CRIU looks at the processes until the filesystems are read, so files and processes are of one
//! instant; and the filesystems are back before CRIU opens the first file. To CRIU they are bind mounts, which runc declares as external.
//! CRIU's files lie flat beside the image's own, as containerd's CRI wants it and checkpointctl knows it. The order of restoring is that of
//! containerd-shim-runc-v2 (createdCheckpointState): the processes would run from the moment they are there, so that is
//! `start`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim::protos::events::task::TaskStart;
use containerd_shim::protos::shim::oci::CheckpointOptions;
use runc::options::CreateOpts;
use stillframe_runtime::config::CheckpointMode;
use stillframe_runtime::processes::is_process_file;

use crate::container::Container;
use crate::create::adopt;
use crate::error::TaskError;
use crate::lifecycle::{Operation, State};
use crate::reaper::Exit;
use crate::stdio::ProcessIo;

/// What checkpoints of a container save, and with what.
#[derive(Clone, Debug)]
pub struct Mode {
    /// What.
    pub mode: CheckpointMode,
    /// CRIU, if it isn't the one in PATH.
    pub criu: Option<PathBuf>,
}

/// Processes that `start` restores.
#[derive(Debug)]
pub struct Restoring {
    /// The image's directory.
    pub image: PathBuf,
    /// Their stdio.
    pub io: Arc<ProcessIo>,
}

impl Container {
    /// Saves what the container's mode says to `path`. What fails leaves nothing there.
    pub(crate) async fn save(&self, path: &Path, options: &CheckpointOptions) -> Result<(), TaskError> {
        if self.mode.mode == CheckpointMode::Filesystem {
            return self
                .filesystems
                .checkpoint(path.to_owned(), options.exit, Vec::new(), self.ahead.take())
                .await;
        }
        // Paused by containerd, as a rule.
        let running = self.init.state() == State::Running;
        if running {
            self.runc.pause(&self.id).await?;
        }
        let saved = self.save_all(path, options).await;
        if running && let Err(error) = self.runc.resume(&self.id).await {
            // A killed one is dead already with cgroup v2, which runc takes for an error.
            tracing::warn!(container = self.id, %error, "thawing the saved container");
        }
        saved
    }

    async fn save_all(&self, path: &Path, options: &CheckpointOptions) -> Result<(), TaskError> {
        let failed = |source| TaskError::Io { what: "making the image directory", source };
        std::fs::create_dir_all(path).map_err(failed)?;
        if std::fs::read_dir(path).map_err(failed)?.next().is_some() {
            // It is refused, with the name of what is in the way.
            return self
                .filesystems
                .checkpoint(path.to_owned(), options.exit, Vec::new(), self.ahead.take())
                .await;
        }
        let work = self.work(&options.work_path);
        let saved = match self.runc.checkpoint(&self.id, path, &work, options, &self.mode).await {
            Ok(()) => {
                let ahead = self.ahead.take();
                self.filesystems.checkpoint(path.to_owned(), options.exit, process_files(path), ahead).await
            }
            Err(error) => Err(error.into()),
        };
        if saved.is_err() {
            for name in process_files(path) {
                drop(std::fs::remove_file(path.join(name)));
            }
        }
        saved
    }

    /// Restores the processes. The init's turn is the caller's.
    pub(crate) async fn start_restored(self: &Arc<Self>, restoring: Restoring) -> Result<i32, TaskError> {
        let restored = self.run_restored(&restoring).await;
        if restored.is_err() {
            restoring.io.abort().await;
            if let Err(error) = self.runc.delete(&self.id, true).await {
                tracing::warn!(container = self.id, %error, "undoing a failed restore");
            }
            // Whoever waits for it has to hear of it.
            self.init.finish(Exit::now(255));
        }
        restored
    }

    async fn run_restored(self: &Arc<Self>, restoring: &Restoring) -> Result<i32, TaskError> {
        let pid_file = self.bundle.join("init.pid");
        let mut options = CreateOpts::new().pid_file(&pid_file).no_pivot(self.options.no_pivot_root);
        options.console_socket = restoring.io.console_socket();
        options.io = restoring.io.driver();
        let birth = self.shim.reaper.birth();
        let images = &restoring.image;
        self.runc.restore(&self.id, &options, images, &self.work(""), &self.mode).await?;
        drop(options);
        let (pid, exit, oom) = adopt(&self.shim, &self.id, &pid_file, &birth, &self.filesystems).await?;
        *self.oom.lock().expect("only ever replaced") = oom;
        restoring.io.attach().await?;
        self.init.born(pid, restoring.io.clone());
        self.init.begin(Operation::Start, State::Running)?;
        tokio::spawn(self.clone().attend_init(exit));
        self.shim.publisher.publish(TaskStart {
            container_id: self.id.clone(),
            pid: pid.unsigned_abs(),
            ..Default::default()
        });
        Ok(pid)
    }

    /// Where CRIU logs: as asked, else in the directory that containerd keeps beside the bundle.
    fn work(&self, asked: &str) -> PathBuf {
        if asked.is_empty() { self.bundle.join("work") } else { PathBuf::from(asked) }
    }
}

/// Names of CRIU's files in a directory.
fn process_files(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| is_process_file(name)).collect()
}
