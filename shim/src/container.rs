//! One container: its init, its exec'd processes, and what is done to them. States are in [`crate::lifecycle`]; making and
//! undoing a container is in [`crate::create`], exec'd processes are in [`crate::exec`].
//!
//! ```text
//!   create ----> start ----> pause <-> resume ----> exit ----> delete
//!                  |            \_ checkpoint _/      ^
//!                  +--> exec: added, started, exit ---+
//! ```
//!
//! Locks, in order; nobody else's container is ever waited for:
//! 1. `freeze`: pause, resume, checkpoint, delete. A container isn't thawed while it is saved.
//! 2. a process's `turn` (see [`crate::process`]): start, exit, delete. Never taken by kill, wait, state, which must work
//!    while runc hangs.
//!
//! The init's exit is told last: first all processes are killed that could outlive it, no exec starts any more, and the exits
//! of those that did start are told.

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use containerd_shim::api::{DeleteResponse, Options};
use containerd_shim::protos::events::task::{
    TaskCheckpointed, TaskDelete, TaskExit, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::LinuxResources;
use stillframe_runtime::sandbox::HeldGate;
use tokio::sync::oneshot;

use crate::ahead::Copied;
use crate::driver::Runc;
use crate::error::TaskError;
use crate::events::Publisher;
use crate::exec::Execs;
use crate::full::{Mode, Restoring};
use crate::lifecycle::{Operation, State};
use crate::metrics::MetricsError;
use crate::process::{Process, timestamp};
use crate::reaper::{Exit, Reaper};
use crate::sandbox::Filesystems;
use crate::{metrics, oom, options, rootfs};

/// How long a killed container may take to die.
const DEATH: Duration = Duration::from_secs(10);

/// What all containers of a shim share.
#[derive(Debug)]
pub struct Shim {
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's main socket.
    pub address: PathBuf,
    /// Collects dead children.
    pub reaper: Arc<Reaper>,
    /// Events to containerd.
    pub publisher: Publisher,
    /// Names of containers that got processes from an image: one that is made again starts anew.
    pub restored: Mutex<HashSet<String>>,
    /// Gates of filesystems that were restored, also of those that other containers of the pod have by now.
    pub gates: Mutex<Vec<HeldGate>>,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Container {
    /// containerd's id of it, and runc's.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its first process.
    pub init: Arc<Process>,
    pub(crate) shim: Arc<Shim>,
    pub(crate) runc: Runc,
    pub(crate) options: Options,
    pub(crate) execs: Execs,
    pub(crate) filesystems: Filesystems,
    pub(crate) outlives_init: bool,
    pub(crate) freeze: tokio::sync::Mutex<()>,
    pub(crate) saving: AtomicBool,
    /// What was copied of its filesystems before it was paused.
    pub(crate) ahead: Copied,
    pub(crate) mode: Mode,
    /// Where containerd's CRI keeps what it knows of it, in a pod.
    pub(crate) cri_directory: Option<PathBuf>,
    /// Until it is started, where its processes come from an image.
    pub(crate) restoring: Mutex<Option<Restoring>>,
    pub(crate) oom: Mutex<Option<oom::Watch>>,
}

impl Container {
    /// The init, or an exec'd process.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, TaskError> {
        if exec_id.is_empty() { Ok(self.init.clone()) } else { self.execs.get(exec_id) }
    }

    /// Runs the init's program. Returns its pid.
    pub async fn start(self: &Arc<Self>) -> Result<i32, TaskError> {
        let _turn = self.init.turn.lock().await;
        self.init.admit(Operation::Start)?;
        if let Some(restoring) = self.take_restoring() {
            return self.start_restored(restoring).await;
        }
        self.runc.start(&self.id).await?;
        // It may be dead already, but its exit waits for this turn to end.
        self.init.begin(Operation::Start, State::Running)?;
        let pid = self.init.pid();
        self.shim.publisher.publish(TaskStart {
            container_id: self.id.clone(),
            pid: pid.unsigned_abs(),
            ..Default::default()
        });
        Ok(pid)
    }

    fn take_restoring(&self) -> Option<Restoring> {
        self.restoring.lock().expect("only ever replaced").take()
    }

    /// Waits for the init's death and tells of it; runs as a task of its own from the moment the init has a pid.
    pub(crate) async fn attend_init(self: Arc<Self>, exit: oneshot::Receiver<Exit>) {
        let Ok(exit) = exit.await else { return };
        if self.outlives_init {
            match self.runc.kill(&self.id, libc::SIGKILL as u32, true).await {
                Err(error) if !error.is_dead() && !error.is_unknown() => {
                    tracing::warn!(container = self.id, %error, "killing what outlives the init");
                }
                _ => {}
            }
        }
        self.execs.wind_up().await;
        let _turn = self.init.turn.lock().await;
        if let Some(watch) = self.oom.lock().expect("only ever replaced").take() {
            drop(watch);
        }
        self.tell_exit(&self.init, &exit);
        self.init.finish(exit);
    }

    pub(crate) fn tell_exit(&self, process: &Process, exit: &Exit) {
        let id = if process.exec_id.is_empty() { &self.id } else { &process.exec_id };
        self.shim.publisher.publish(TaskExit {
            container_id: self.id.clone(),
            id: id.clone(),
            pid: process.pid().unsigned_abs(),
            exit_status: exit.code(),
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        });
    }

    /// Signals the init, an exec'd process, or with `all` every process.
    pub async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), TaskError> {
        let process = self.process(exec_id)?;
        process.admit(Operation::Kill)?;
        if !exec_id.is_empty() {
            return self.kill_exec(&process, signal);
        }
        match self.runc.kill(&self.id, signal, all).await {
            Err(error) if error.is_dead() => Err(TaskError::Finished),
            Err(error) if error.is_unknown() => Err(TaskError::NoContainer),
            result => Ok(result?),
        }
    }

    /// Freezes the container.
    pub async fn pause(&self) -> Result<(), TaskError> {
        let _freeze = self.freeze.lock().await;
        // What is frozen already, by a checkpoint that died, runc refuses to pause.
        self.filesystems.recover().await?;
        self.init.admit(Operation::Pause)?;
        let ahead = self.filesystems.copy_ahead().await.unwrap_or_else(|error| {
            // The pause is asked for with or without it, and the checkpoint will say what is wrong.
            tracing::warn!(container = self.id, %error, "copying before the pause");
            None
        });
        self.init.begin(Operation::Pause, State::Pausing)?;
        self.filesystems.before_freeze().await;
        if let Err(error) = self.runc.pause(&self.id).await {
            self.filesystems.after_thaw();
            self.init.step(State::Pausing, State::Running);
            return Err(error.into());
        }
        if !self.init.step(State::Pausing, State::Paused) {
            // It has died meanwhile.
            self.init.admit(Operation::Pause)?;
        }
        if let Some(ahead) = ahead {
            self.ahead.keep(ahead);
        }
        self.shim.publisher.publish(TaskPaused { container_id: self.id.clone(), ..Default::default() });
        Ok(())
    }

    /// Thaws the container.
    pub async fn resume(&self) -> Result<(), TaskError> {
        let _freeze = self.freeze.lock().await;
        self.init.admit(Operation::Resume)?;
        self.runc.resume(&self.id).await?;
        self.filesystems.after_thaw();
        self.init.step(State::Paused, State::Running);
        // The pause was for something else than a checkpoint, or is over.
        drop(self.ahead.take());
        self.shim.publisher.publish(TaskResumed { container_id: self.id.clone(), ..Default::default() });
        Ok(())
    }

    /// Saves the container's filesystems, and in mode `full` its processes, to `path`, which may not exist yet. Running or paused, it is so again afterwards, unless
    /// the options say that it has to die: then it has died when this returns.
    pub async fn checkpoint(&self, path: PathBuf, any: Option<&Any>) -> Result<(), TaskError> {
        let options = options::checkpoint(any)?;
        if self.saving.swap(true, Ordering::AcqRel) {
            return Err(TaskError::CheckpointRuns { id: self.id.clone() });
        }
        let _saving = Saving(&self.saving);
        let _freeze = self.freeze.lock().await;
        self.init.admit(Operation::Checkpoint)?;
        self.save(&path, &options).await?;
        self.leave_stats();
        self.shim.publisher.publish(TaskCheckpointed {
            container_id: self.id.clone(),
            checkpoint: path.display().to_string(),
            ..Default::default()
        });
        if options.exit {
            self.thaw_killed().await;
        }
        Ok(())
    }

    /// Some containerds (2.1.0 to 2.1.8, 2.2.0 to 2.2.4, 2.3.0, 2.3.1) fail a checkpoint request without CRIU's statistics in that directory,
    /// and tell only runc to write them there. They are put into the archive and nobody reads them.
    fn leave_stats(&self) {
        let Some(directory) = self.cri_directory.as_deref().filter(|directory| directory.is_dir()) else {
            return;
        };
        let path = directory.join("stats-dump");
        match std::fs::File::create_new(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                tracing::warn!(path = %path.display(), %error, "the file that some containerds want can't be made");
            }
            _ => {}
        }
    }

    /// The saved init has been killed: not one of its instructions runs that the image doesn't know of. With cgroup v1 it dies
    /// once it is thawed.
    async fn thaw_killed(&self) {
        if self.init.state() == State::Paused {
            match self.runc.resume(&self.id).await {
                // With cgroup v2 it's dead already, which runc takes for an error.
                Err(error) => tracing::debug!(container = self.id, %error, "thawing the killed container"),
                Ok(()) => drop(self.init.step(State::Paused, State::Running)),
            }
        }
        if tokio::time::timeout(DEATH, self.init.wait()).await.is_err() {
            tracing::warn!(container = self.id, "the saved container takes long to die");
        }
    }

    /// Changes the container's limits; `resources` is JSON of the OCI spec's LinuxResources.
    pub async fn update(&self, resources: &[u8]) -> Result<(), TaskError> {
        self.init.admit(Operation::Update)?;
        let resources: LinuxResources = serde_json::from_slice(resources)
            .map_err(|source| TaskError::Json { what: "resources", source })?;
        Ok(self.runc.update(&self.id, &resources).await?)
    }

    /// The host's pids of all processes in the container, and the exec's id where it is one.
    pub async fn pids(&self) -> Result<Vec<(u32, Option<String>)>, TaskError> {
        let pids = self.runc.pids(&self.id).await?;
        Ok(pids.into_iter().map(|pid| (pid, self.execs.by_pid(pid))).collect())
    }

    /// The statistics of its cgroups.
    pub async fn stats(&self) -> Result<Any, TaskError> {
        let pid = self.init.pid();
        if self.init.state() == State::Stopped {
            // Its pid may be another process's by now.
            let source = io::Error::from_raw_os_error(libc::ESRCH);
            return Err(MetricsError::Gone { pid, source }.into());
        }
        let collected = tokio::task::spawn_blocking(move || metrics::collect(pid)).await;
        Ok(collected.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?)
    }

    /// Forgets a dead container, or one that never started. Each step can be repeated: after an error the caller may try again.
    pub async fn delete(&self) -> Result<DeleteResponse, TaskError> {
        let _freeze = self.freeze.lock().await;
        self.init.admit(Operation::Delete)?;
        if self.init.state() == State::Created {
            self.runc.delete(&self.id, true).await?;
            if let Some(restoring) = self.take_restoring() {
                restoring.io.abort().await;
                self.init.finish(Exit::now(0));
            }
            if tokio::time::timeout(DEATH, self.init.wait()).await.is_err() {
                tracing::warn!(container = self.id, "the deleted container takes long to die");
            }
        }
        let _turn = self.init.turn.lock().await;
        self.runc.delete(&self.id, false).await?;
        if let Some(io) = self.init.io() {
            io.shutdown().await;
        }
        rootfs::unmount(&rootfs::directory(&self.bundle)).await?;
        self.filesystems.remove().await?;
        self.init.delete();
        let response = deleted(&self.init);
        self.shim.publisher.publish(TaskDelete {
            container_id: self.id.clone(),
            pid: response.pid,
            exit_status: response.exit_status,
            exited_at: response.exited_at.clone(),
            ..Default::default()
        });
        Ok(response)
    }
}

/// How a deleted process died. One that never ran counts as exited now: the time must not be zero.
pub(crate) fn deleted(process: &Process) -> DeleteResponse {
    let exit = process.exited().unwrap_or_else(|| Exit::now(0));
    DeleteResponse {
        pid: process.pid().unsigned_abs(),
        exit_status: exit.code(),
        exited_at: Some(timestamp(exit.at)).into(),
        ..Default::default()
    }
}

struct Saving<'a>(&'a AtomicBool);

impl Drop for Saving<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}
