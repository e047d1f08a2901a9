//! The door to Stillframe's own work on a container's filesystems: `stillframe_runtime`, whose calls block, as futures.

use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use stillframe_runtime::images::Images;
use stillframe_runtime::sandbox::{Ahead, Away, CheckpointRequest, HeldGate, Load, PrepareRequest, Sandbox};

use crate::error::TaskError;

/// The first argument with which this program does nothing but [`load`].
pub const LOAD: &str = stillframe_runtime::lazy::ARGUMENT;

/// Loads restored files: what `prepare` has this program started for.
pub fn load(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    stillframe_runtime::lazy::run(arguments)
}

/// One container's part in a sandbox.
#[derive(Clone, Debug)]
pub struct Filesystems {
    sandbox: Sandbox,
    container_id: String,
    /// While it is frozen by something else than a checkpoint.
    away: Arc<Mutex<Option<Away>>>,
}

impl Filesystems {
    /// The container's part in sandbox `sandbox_id`. Nothing is made yet.
    pub fn new(namespace: &str, sandbox_id: &str, container_id: &str) -> Result<Self, TaskError> {
        let sandbox = Sandbox::new(namespace, sandbox_id).map_err(|error| TaskError::Sandbox {
            action: "finding",
            id: container_id.into(),
            source: Box::new(error),
        })?;
        Ok(Self::of(sandbox, container_id))
    }

    /// Finds the sandbox that the container is in, if it is in one.
    pub async fn find(namespace: &str, container_id: &str) -> Result<Option<Self>, TaskError> {
        let (namespace, id) = (namespace.to_string(), container_id.to_string());
        let sandbox =
            blocking("finding", container_id, move || Sandbox::of_container(&namespace, &id)).await?;
        Ok(sandbox.map(|sandbox| Self::of(sandbox, container_id)))
    }

    fn of(sandbox: Sandbox, container_id: &str) -> Self {
        Self { sandbox, container_id: container_id.into(), away: Arc::default() }
    }

    /// Mounts the container's filesystems, with the contents of the image at `restore_from` if there is one, and rewrites the
    /// bundle's config.json to use them. Undoes everything on error. `runtime` is the command of runc. Gives the image's directory if it holds
    /// the container's processes, too, and what the shim has to keep while it lives.
    pub async fn prepare(
        &self,
        bundle: PathBuf,
        rootfs: PathBuf,
        runtime: PathBuf,
        restore_from: Option<PathBuf>,
    ) -> Result<(Option<PathBuf>, Vec<HeldGate>), TaskError> {
        let container_id = self.container_id.clone();
        // By this program, which is there for sure: see `load`.
        let load = Load::Apart { program: "/proc/self/exe".into(), eager: false };
        let request = PrepareRequest { container_id, bundle, rootfs, runtime, restore_from, load };
        let prepared = self.call("preparing", move |sandbox| sandbox.prepare(&request)).await?;
        if let Some(restored) = prepared.restored {
            tracing::info!(container = self.container_id, bytes = restored.bytes, ?restored, "restored");
        }
        Ok((prepared.processes, prepared.gates))
    }

    /// Where an image of containerd's can be unpacked for the sandbox; it stays while what is returned lives.
    pub async fn images(&self) -> Result<Images, TaskError> {
        self.call("finding the images of", |sandbox| sandbox.images()).await
    }

    /// Tells the sandbox by which process the container's cgroup is found.
    pub async fn set_init_pid(&self, pid: i32) -> Result<(), TaskError> {
        let id = self.container_id.clone();
        self.call("recording the process of", move |sandbox| sandbox.set_init_pid(&id, pid)).await
    }

    /// Before the container is frozen by something else than a checkpoint.
    pub async fn before_freeze(&self) {
        let sandbox = self.sandbox.clone();
        // A panic is logged where it happens.
        let away = tokio::task::spawn_blocking(move || sandbox.before_freeze()).await.ok();
        *self.away.lock().expect("only ever replaced") = away;
    }

    /// Once it isn't frozen any more, or couldn't be.
    pub fn after_thaw(&self) {
        drop(self.away.lock().expect("only ever replaced").take());
    }

    /// Saves the container's filesystems to a directory. With `kill` the init is killed once they are saved, but stays frozen if
    /// it was. `processes` are CRIU's files there.
    pub async fn checkpoint(
        &self,
        image_path: PathBuf,
        kill: bool,
        processes: Vec<String>,
        ahead: Option<Ahead>,
    ) -> Result<(), TaskError> {
        let container_id = self.container_id.clone();
        let request =
            CheckpointRequest { kill, processes, ..CheckpointRequest::new(container_id, image_path) };
        let result =
            self.call("checkpointing", move |sandbox| sandbox.checkpoint_as_asked(request, ahead)).await?;
        tracing::info!(container = self.container_id, ?result, "checkpointed");
        Ok(())
    }

    /// Before a pause: copies the container's filesystems while it runs, if it is asked for by its annotations.
    pub async fn copy_ahead(&self) -> Result<Option<Ahead>, TaskError> {
        let id = self.container_id.clone();
        self.call("copying ahead", move |sandbox| sandbox.copy_ahead(&id)).await
    }

    /// Thaws what a checkpoint of the `stillframe` command has left frozen that died.
    pub async fn recover(&self) -> Result<(), TaskError> {
        self.call("thawing", |sandbox| sandbox.recover()).await
    }

    /// Unmounts the container's filesystems and forgets them. Idempotent.
    pub async fn remove(&self) -> Result<(), TaskError> {
        let id = self.container_id.clone();
        self.call("removing", move |sandbox| sandbox.remove(&id)).await
    }

    async fn call<T, E>(
        &self,
        action: &'static str,
        call: impl FnOnce(&Sandbox) -> Result<T, E> + Send + 'static,
    ) -> Result<T, TaskError>
    where
        T: Send + 'static,
        E: Error + Send + Sync + 'static,
    {
        let sandbox = self.sandbox.clone();
        blocking(action, &self.container_id, move || call(&sandbox)).await
    }
}

async fn blocking<T, E>(
    action: &'static str,
    id: &str,
    call: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, TaskError>
where
    T: Send + 'static,
    E: Error + Send + Sync + 'static,
{
    match tokio::task::spawn_blocking(call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(TaskError::Sandbox { action, id: id.into(), source: Box::new(error) }),
        // What was being done must be undone like after any other error.
        Err(panic) => Err(TaskError::Sandbox { action, id: id.into(), source: Box::new(panic) }),
    }
}
