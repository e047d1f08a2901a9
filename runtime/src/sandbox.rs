//! A sandbox: the containers that share a shim, and their filesystems.
//!
//! A container's life here: `prepare` before `runc create` -> `set_init_pid` after it -> any number of
//! `checkpoint` -> `remove` after `runc delete`. Each takes the sandbox's lock. All state is in the
//! state directory, so any process may make any of these calls; `remove` also cleans up after a
//! `prepare` that died half-way. Blocking.

mod error;

use std::path::{Path, PathBuf};

use stillframe_tmpfs::ResourceId;

pub use crate::checkpoint::{
    Ahead, CheckpointCause, CheckpointError, CheckpointRequest, CheckpointResult, Phase, PhaseTime,
};
use crate::config::{Config, ConfigError};
use crate::filestores::Filestores;
use crate::filesystems::{self, Maker};
use crate::image::Image;
use crate::image_source;
use crate::images::{self, Images};
use crate::lazy;
pub use crate::lazy::{Away, HeldGate, LazyError, Load, LoadPhase, LoadStatus};
use crate::manifest::{Manifest, SavedContainer};
use crate::plan::{PlannedMount, plan};
use crate::process;
use crate::restore::{self, Target, match_filesystems, restore};
pub use crate::restore::{RestoreError, RestoreResult};
pub use crate::sandbox::error::{InitError, LoadStatusError, PrepareError, RemoveError};
use crate::spec::{
    IMAGE_DIR_ANNOTATION, LOAD_ANNOTATION, ON_RESTART_ANNOTATION, OnRestart, PRECOPY_ANNOTATION,
    RESTORE_FROM_ANNOTATION, Spec,
};
pub use crate::state::StateError;
use crate::state::{ContainerRecord, Locked, STATE_ROOT, StateDir};

/// What `prepare` is asked to do.
#[derive(Clone, Debug)]
pub struct PrepareRequest {
    /// The container's id.
    pub container_id: String,
    /// The OCI bundle; its config.json is rewritten, by rename.
    pub bundle: PathBuf,
    /// Where the container's root filesystem is mounted.
    pub rootfs: PathBuf,
    /// The low-level runtime's command, `runc` by default: what a mount looks like depends on its version.
    pub runtime: PathBuf,
    /// Image directory to restore the container's filesystems from. It isn't needed any more when
    /// `prepare` returns.
    pub restore_from: Option<PathBuf>,
    /// When its contents are loaded.
    pub load: Load,
}

/// What `prepare` did.
#[derive(Debug, Default)]
pub struct Prepared {
    /// The filesystems that were mounted, in the order of the spec.
    pub filesystems: Vec<ResourceId>,
    /// What was restored, where that was asked for.
    pub restored: Option<RestoreResult>,
    /// The image, where it holds the container's processes as well, and the filesystems are as they knew them: they can be restored
    /// from its directory.
    pub processes: Option<PathBuf>,
    /// To be kept until the sandbox is gone, as far as that can be: see [`HeldGate`].
    pub gates: Vec<HeldGate>,
}

/// Whether the image has processes, and they are this container's. In a pod several may be given the same image by the pod's
/// annotation, which is for those of the same name only. What containerd itself asks for is meant: it may even have changed the name (2.1
/// calls a container that it creates from an archive "containerd").
fn holds_processes_of(manifest: &Manifest, container: &ContainerRecord, meant: bool) -> bool {
    let theirs = |saved: &SavedContainer| {
        saved.named == container.named && (!saved.named || saved.name == container.name)
    };
    !manifest.processes.is_empty() && (meant || manifest.containers.iter().all(theirs))
}

/// A checkpoint that failed before it had begun.
fn in_preparation(cause: impl Into<CheckpointCause>) -> CheckpointError {
    CheckpointError { phase: Phase::Prepare, cause: Box::new(cause.into()) }
}

/// Whether the image is given for this container and no other: not by an annotation, neither a path nor the name of an image, for which
/// the shim has got a directory.
fn is_meant(request: &PrepareRequest, spec: &Spec) -> bool {
    let by_name = spec.annotation(RESTORE_FROM_ANNOTATION).is_some_and(|from| !from.starts_with('/'));
    request.restore_from.is_some() && !by_name
}

/// One sandbox, by its state directory.
#[derive(Clone, Debug)]
pub struct Sandbox {
    dir: StateDir,
    /// `None`: the node's.
    config: Option<Config>,
}

impl Sandbox {
    /// The sandbox `sandbox_id` of a containerd namespace. Nothing is made.
    pub fn new(namespace: &str, sandbox_id: &str) -> Result<Self, StateError> {
        Ok(Self { dir: StateDir::new(Path::new(STATE_ROOT), namespace, sandbox_id)?, config: None })
    }

    /// The same sandbox, with `config` instead of the node's configuration.
    pub fn with_config(self, config: Config) -> Self {
        Self { config: Some(config), ..self }
    }

    /// Finds the sandbox that holds a container.
    pub fn of_container(namespace: &str, container_id: &str) -> Result<Option<Self>, StateError> {
        for sandbox in StateDir::sandboxes(Path::new(STATE_ROOT), namespace)? {
            let dir = StateDir::new(Path::new(STATE_ROOT), namespace, &sandbox)?;
            if dir.container(container_id)?.is_some() {
                return Ok(Some(Self { dir, config: None }));
            }
        }
        Ok(None)
    }

    /// Before `runc create`: mounts each tmpfs of the bundle's spec, restores them if asked to, and
    /// rewrites the spec so that runc gets bind mounts. Undoes everything on error.
    pub fn prepare(&self, request: &PrepareRequest) -> Result<Prepared, PrepareError> {
        let prepared = self.prepare_from_image(request);
        if prepared.is_err()
            && let Err(error) = self.remove_images()
        {
            tracing::warn!(%error, "what was unpacked couldn't be removed again");
        }
        prepared
    }

    fn prepare_from_image(&self, request: &PrepareRequest) -> Result<Prepared, PrepareError> {
        let id = &request.container_id;
        let mut spec = Spec::read(&request.bundle)?;
        let plan = plan(&spec, &request.rootfs)?;
        if let Some(path) = spec.annotation(IMAGE_DIR_ANNOTATION).filter(|path| !path.starts_with('/')) {
            return Err(PrepareError::ImageDir(path.to_owned()));
        }
        let precopy = spec.annotation(PRECOPY_ANNOTATION).unwrap_or("off");
        if !matches!((precopy, spec.annotation(IMAGE_DIR_ANNOTATION)), ("off", _) | ("on", Some(_))) {
            return Err(PrepareError::Precopy(precopy.to_owned()));
        }
        if let Some(load) = spec.annotation(LOAD_ANNOTATION).filter(|load| !["eager", "lazy"].contains(load))
        {
            return Err(PrepareError::Load(load.to_owned()));
        }
        let on_restart = OnRestart::parse(spec.annotation(ON_RESTART_ANNOTATION));
        let on_restart = on_restart.map_err(PrepareError::OnRestart)?;
        // An image is judged before anything is mounted.
        let asked = spec.annotation(RESTORE_FROM_ANNOTATION).map(PathBuf::from);
        let find = |path: PathBuf| image_source::find(&path, || self.images());
        let source = request.restore_from.clone().or(asked).map(find).transpose();
        let source = source.map_err(PrepareError::Source)?;
        let image = source
            .as_ref()
            .map(|found| Image::open(&found.directory))
            .transpose()
            .map_err(RestoreError::from)?;
        // Before the sandbox is locked: it locks others.
        Filestores::new(&self.config()?.filestore_dir).sweep(Path::new(STATE_ROOT));
        let locked = self.dir.create()?;
        if self.dir.container(id)?.is_some() {
            return Err(PrepareError::Exists(id.clone()));
        }
        let name = spec.container_name();
        let mut record = ContainerRecord {
            id: id.clone(),
            name: name.unwrap_or(id).to_owned(),
            named: name.is_some(),
            sandbox: spec.is_sandbox(),
            ids: spec.ids().clone(),
            pages_dir: spec.annotation(IMAGE_DIR_ANNOTATION).map(PathBuf::from),
            precopy: spec.annotation(PRECOPY_ANNOTATION) == Some("on"),
            load_all: matches!(request.load, Load::Apart { eager: true, .. })
                || spec.annotation(LOAD_ANNOTATION) == Some("eager"),
            init: None,
            filesystems: Vec::new(),
        };
        let restarted = image.is_some() && self.dir.was_restored(&record.name)?;
        let image = image.filter(|_| !(restarted && on_restart == OnRestart::Empty));
        let roll_back = restarted && on_restart == OnRestart::Image;
        // First of all, so that `remove` finds whatever a crash leaves.
        locked.put_container(&record)?;
        let processes = image
            .as_ref()
            .is_some_and(|image| holds_processes_of(&image.manifest, &record, is_meant(request, &spec)));
        let prepared = self.fill(&locked, request, &mut spec, &plan, (image, roll_back), &mut record);
        if prepared.is_err()
            && let Err(error) = self.remove_locked(&locked, id)
        {
            tracing::warn!(container = %id, %error, "what was prepared couldn't be removed again");
        }
        let (mut prepared, outlived) = prepared?;
        // Processes go with the files that they had, not with what has become of a volume since.
        prepared.processes = source.map(|found| found.directory).filter(|_| processes && !outlived);
        Ok(prepared)
    }

    /// Besides what was done, whether the image has a filesystem that was there before the sandbox.
    fn fill(
        &self,
        locked: &Locked,
        request: &PrepareRequest,
        spec: &mut Spec,
        plan: &[PlannedMount],
        (image, roll_back): (Option<Image>, bool),
        record: &mut ContainerRecord,
    ) -> Result<(Prepared, bool), PrepareError> {
        let mut of_others = Vec::new();
        if let Some(image) = &image {
            restore::pod::judge(&image.manifest, record, locked.dir())?;
            of_others = restore::pod::of_others(&image.manifest, &record.name);
        }
        let original = spec.clone();
        let filestores = Filestores::new(&self.config()?.filestore_dir);
        let mut maker = Maker {
            locked,
            filestores: &filestores,
            request,
            spec: &original,
            plan,
            record,
            targets: Vec::new(),
            of_mounts: Vec::new(),
        };
        for (number, planned) in plan.iter().enumerate() {
            let target = maker.obtain(number)?;
            if planned.existing.is_none() {
                spec.replace_with_bind(planned.index, &target.mountpoint, planned.options.bind_options());
            }
        }
        let pairs = image.as_ref().map(|image| match_filesystems(&image.manifest, &maker.targets));
        let pairs = pairs.unwrap_or_default();
        if roll_back {
            maker.roll_back(&pairs)?;
        }
        for (number, planned) in plan.iter().enumerate() {
            let target = maker.of_mounts[number];
            // What is restored replaces what would be copied up, and what is there already has its contents.
            if planned.options.copy_up
                && maker.targets[target].fresh
                && !maker.of_mounts[..number].contains(&target)
                && pairs.iter().all(|(_, restored)| *restored != target)
            {
                maker.copy_up(number)?;
            }
        }
        let (mut outlived, mut gates) = (false, Vec::new());
        for (_, target) in &pairs {
            let Target { name, fresh, .. } = &maker.targets[*target];
            let record = locked.dir().filesystem(name)?;
            outlived |= !fresh && !record.is_some_and(|record| record.restored);
        }
        let restored = match image {
            None => None,
            Some(image) => {
                let fresh = |target: &usize| maker.targets[*target].fresh;
                let restoring: Vec<usize> = pairs.iter().map(|(_, target)| *target).filter(fresh).collect();
                maker.mark_restoring(&restoring, true)?;
                // Processes that come back have their files open already.
                let whole = holds_processes_of(&image.manifest, maker.record, is_meant(request, &original));
                let load = if whole { &Load::InPrepare } else { &request.load };
                let (mut restored, held) =
                    restore(image, &maker.targets, &pairs, spec.may_make_devices(), load)?;
                gates = held;
                restored.unused.retain(|id| !of_others.contains(id));
                maker.mark_restoring(&restoring, false)?;
                locked.put_restored(&maker.record.name)?;
                Some(restored)
            }
        };
        for (number, _) in plan.iter().enumerate().filter(|(_, planned)| planned.options.flags.ro) {
            maker.make_mountpoints(number, &maker.record.ids)?;
        }
        let Maker { targets, record, .. } = maker;
        locked.put_container(record)?;
        if spec.has_create_hooks() {
            let awaited = lazy::awaited(locked.dir(), &record.filesystems, false);
            let hook = awaited.and_then(|directories| lazy::hook(&directories));
            if let Some((path, arguments)) = hook.map_err(PrepareError::Hook)? {
                spec.put_first_hook(&path, &arguments);
            }
        }
        if record.named {
            locked.put_name(&record.name)?;
        }
        spec.write()?;
        let filesystems = targets.into_iter().map(|target| target.id).collect();
        Ok((Prepared { filesystems, restored, processes: None, gates }, outlived))
    }

    fn config(&self) -> Result<Config, ConfigError> {
        self.config.clone().map_or_else(Config::load, Ok)
    }

    /// After `runc create`: records the init process, by which the container is frozen.
    pub fn set_init_pid(&self, container_id: &str, pid: i32) -> Result<(), InitError> {
        let unknown = || InitError::Unknown(container_id.to_owned());
        let locked = self.dir.lock()?.ok_or_else(unknown)?;
        let mut record = self.dir.container(container_id)?.ok_or_else(unknown)?;
        let init = process::describe(pid).map_err(|source| InitError::Process { pid, source })?;
        record.init = Some(init.clone());
        locked.put_container(&record)?;
        // Whoever removes the container meanwhile needs it.
        drop(locked);
        let all = record.load_all;
        lazy::awaited(&self.dir, &record.filesystems, all)
            .and_then(|directories| lazy::join(&directories, &init, all))
            .map_err(InitError::Load)
    }

    /// Before something else freezes a container: what loads its files mustn't be frozen with it, until that is thawed and what this
    /// returns is dropped.
    pub fn before_freeze(&self) -> Away {
        lazy::leave_cgroups(&self.dir)
    }

    /// How far the loading of the container's restored files has come, by filesystem; those that are complete aren't
    /// named.
    pub fn load_status(&self, container_id: &str) -> Result<Vec<(ResourceId, LoadStatus)>, LoadStatusError> {
        self.loads(container_id, lazy::status)
    }

    /// Waits until all of the container's restored files are loaded, or can't be.
    pub fn await_load(&self, container_id: &str) -> Result<Vec<(ResourceId, LoadStatus)>, LoadStatusError> {
        self.loads(container_id, lazy::wait)
    }

    fn loads(
        &self,
        container_id: &str,
        status: impl Fn(&Path) -> Result<Option<LoadStatus>, LazyError>,
    ) -> Result<Vec<(ResourceId, LoadStatus)>, LoadStatusError> {
        let container = self.dir.container(container_id)?;
        let container = container.ok_or_else(|| LoadStatusError::Unknown(container_id.to_owned()))?;
        let mut statuses = Vec::new();
        for name in &container.filesystems {
            let Some(record) = self.dir.filesystem(name)? else { continue };
            if let Some(status) = status(&self.dir.filesystem_dir(name))? {
                statuses.push((record.resource_id, status));
            }
        }
        Ok(statuses)
    }

    /// Saves the container's filesystems. Freezes the container if it isn't frozen (paused) yet, and
    /// thaws only what it froze.
    pub fn checkpoint(&self, request: &CheckpointRequest) -> Result<CheckpointResult, CheckpointError> {
        let locked = self.locked(&request.container_id)?;
        crate::checkpoint::checkpoint(&locked, request, None)
    }

    /// The same, but as the container's annotations ask for: for checkpoints that come through containerd,
    /// whose archive the pages may be kept out of. `ahead` is what was copied before the container was paused. That of a pod's own
    /// container is one of the whole pod.
    pub fn checkpoint_as_asked(
        &self,
        mut request: CheckpointRequest,
        ahead: Option<Ahead>,
    ) -> Result<CheckpointResult, CheckpointError> {
        let locked = self.locked(&request.container_id)?;
        let container = self.dir.container(&request.container_id).map_err(in_preparation)?;
        request.pod =
            container.as_ref().is_some_and(|container| container.sandbox) && request.processes.is_empty();
        request.pages_dir = container.and_then(|container| container.pages_dir);
        crate::checkpoint::checkpoint(&locked, &request, ahead)
    }

    /// Before the container is paused to be saved: copies its filesystems while it runs, if its annotations ask for it.
    pub fn copy_ahead(&self, container_id: &str) -> Result<Option<Ahead>, CheckpointError> {
        let asked = self.dir.container(container_id).map_err(in_preparation)?;
        // A pod's own is saved with all others, which aren't paused with it.
        if !asked.is_some_and(|container| container.precopy && !container.sandbox) {
            return Ok(None);
        }
        Ahead::copy(&self.locked(container_id)?, container_id)
    }

    fn locked(&self, container_id: &str) -> Result<Locked, CheckpointError> {
        let unknown =
            || CheckpointCause::Unknown { id: container_id.to_owned(), sandbox: self.dir.path().to_owned() };
        let locked = self.dir.lock().map_err(in_preparation)?;
        locked.ok_or_else(|| in_preparation(unknown()))
    }

    /// After `runc delete`, or when the shim has died: unmounts the container's filesystems and removes
    /// its state, and the sandbox's directory with the last container. Idempotent: what is gone is fine.
    pub fn remove(&self, container_id: &str) -> Result<(), RemoveError> {
        match self.dir.lock()? {
            Some(locked) => self.remove_locked(&locked, container_id),
            None => Ok(self.remove_images()?),
        }
    }

    fn remove_locked(&self, locked: &Locked, container_id: &str) -> Result<(), RemoveError> {
        filesystems::remove_of(locked, container_id)?;
        locked.remove_container(container_id)?;
        Ok(self.remove_images()?)
    }

    /// The sandbox's unpacked images, for one that is to be used before there is a container.
    pub fn images(&self) -> Result<Images, StateError> {
        let config = self.config().unwrap_or_default();
        Images::lock(Filestores::new(&config.filestore_dir).images(&self.dir))
    }

    /// Removes the unpacked images, if the sandbox has no container (any more).
    fn remove_images(&self) -> Result<(), StateError> {
        if !self.dir.is_unused()? {
            return Ok(());
        }
        // What a configuration that can't be read hides is swept later.
        let Ok(config) = self.config() else { return Ok(()) };
        images::remove(&Filestores::new(&config.filestore_dir).images(&self.dir))
    }

    /// Thaws what a checkpoint has left frozen that died, as each other call here does that changes something. Waits for one
    /// that has something frozen and lives.
    pub fn recover(&self) -> Result<(), StateError> {
        if self.dir.is_marked_frozen() {
            // Whoever takes the lock does it.
            self.dir.lock()?;
        }
        Ok(())
    }

    /// The record of a container.
    pub fn container(&self, container_id: &str) -> Result<Option<ContainerRecord>, StateError> {
        self.dir.container(container_id)
    }
}
