//! SKETCH of the interface that the shim uses; being implemented.
use std::path::PathBuf;
/// One sandbox's state directory: `/run/stillframe/<namespace>/<sandbox id>/`.
#[derive(Clone, Debug)]
pub struct Sandbox;
/// What `Sandbox::prepare` is asked to do.
#[derive(Clone, Debug)]
pub struct PrepareRequest {
    /// The container's id.
    pub container_id: String,
    /// The OCI bundle: holds config.json (rewritten in place, by rename) ...
    pub bundle: PathBuf,
    /// ... and the root filesystem, already mounted.
    pub rootfs: PathBuf,
    /// Image directory to restore the container's filesystems from (CreateTaskRequest.checkpoint).
    pub restore_from: Option<PathBuf>,
}
/// What was prepared: what was restored, for the log.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// One line a filesystem, for the log; empty where nothing was restored.
    pub restored: Vec<String>,
}
/// What `Sandbox::checkpoint` is asked to do.
#[derive(Clone, Debug)]
pub struct CheckpointRequest {
    /// Containers whose filesystems are saved.
    pub container_id: String,
    /// Image directory: made if missing, must be empty.
    pub image_path: PathBuf,
    /// Which filesystems; empty means all of the container. `PATH`, `CONTAINER:PATH` or `all-tmpfs`.
    pub paths: Vec<String>,
}
/// What a checkpoint did.
#[derive(Clone, Debug)]
pub struct CheckpointResult {
    /// Bytes written.
    pub bytes: u64,
}
/// Why something of a sandbox failed. (In reality one enum an operation.)
#[derive(Debug, thiserror::Error)]
#[error("sketch")]
pub struct SketchError;
impl Sandbox {
    /// Opens the sandbox's state directory, making it if it is missing.
    pub fn create(_namespace: &str, _sandbox_id: &str) -> Result<Self, SketchError> { unimplemented!() }
    /// Opens an existing sandbox; `None` where there is no such state directory.
    pub fn open(_namespace: &str, _sandbox_id: &str) -> Result<Option<Self>, SketchError> { unimplemented!() }
    /// Before `runc create`: mounts each tmpfs of the bundle's spec, restores it if asked to, and rewrites
    /// the bundle's config.json so that runc gets bind mounts. Undoes everything on error.
    pub fn prepare(&self, _request: &PrepareRequest) -> Result<Prepared, SketchError> { unimplemented!() }
    /// After `runc create`: records the init process's pid, by which the container's freezer is found.
    pub fn set_init_pid(&self, _container_id: &str, _pid: i32) -> Result<(), SketchError> { unimplemented!() }
    /// Saves the container's filesystems. Freezes the container if it isn't frozen (paused) yet, and thaws
    /// only what it froze. Blocking: seconds.
    pub fn checkpoint(&self, _request: &CheckpointRequest) -> Result<CheckpointResult, SketchError> { unimplemented!() }
    /// After `runc delete`, or when the shim has died: unmounts the container's filesystems, removes its
    /// state, and the sandbox's directory with the last container. Idempotent: unknown ids are fine.
    pub fn remove(&self, _container_id: &str) -> Result<(), SketchError> { unimplemented!() }
}
