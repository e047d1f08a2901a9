//! Makes a container, or nothing: each phase that is done is undone when a later one fails.
//!
//! ```text
//!   Nothing -> Mounted -> Prepared -> Created -> (the container exists, TaskCreate is queued)
//! ```
//!
//! The checkpoint that containerd asks to restore is read completely in `Prepared`: containerd may remove it after create.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use containerd_shim::api::{CreateTaskRequest, Options};
use containerd_shim::io::Stdio;
use containerd_shim::protos::events::task::{TaskCreate, TaskIO};
use containerd_shim::util::{read_pid_from_file, write_options, write_runtime};
use runc::options::CreateOpts;
use stillframe_runtime::config::Config;
use tokio::sync::oneshot;

use crate::ahead::Copied;
use crate::bundle::Spec;
use crate::container::{Container, Shim};
use crate::driver::Runc;
use crate::error::TaskError;
use crate::exec::Execs;
use crate::full::{Mode, Restoring};
use crate::process::Process;
use crate::reaper::{Birth, Exit};
use crate::sandbox::Filesystems;
use crate::stdio::{Owner, ProcessIo};
use crate::{driver, error, fetch, oom, options, rootfs};

/// How far the making has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Nothing,
    Mounted,
    Prepared,
    Created,
}

struct Making<'a> {
    shim: &'a Arc<Shim>,
    request: &'a CreateTaskRequest,
    options: Options,
    bundle: PathBuf,
    spec: Spec,
    mode: Mode,
    runc: Runc,
    filesystems: Filesystems,
    phase: Phase,
}

/// Makes the container that `request` describes and queues TaskCreate.
pub async fn create(shim: &Arc<Shim>, request: &CreateTaskRequest) -> Result<Arc<Container>, TaskError> {
    let options = options::decode(request.options.as_ref())?;
    let bundle = PathBuf::from(&request.bundle);
    let spec = Spec::read(&bundle)?;
    let Config { checkpoint_mode, criu, .. } = Config::load()?;
    let mode = Mode { mode: spec.checkpoint_mode()?.unwrap_or(checkpoint_mode), criu };
    // What the `delete` action needs should this process die.
    let failed = |what| move |source| TaskError::Shim { what, source };
    write_options(&bundle, &options).await.map_err(failed("writing the bundle's options"))?;
    let binary = driver::binary(&options).display().to_string();
    write_runtime(&bundle, &binary).await.map_err(failed("writing the bundle's runtime"))?;

    let filesystems = Filesystems::new(&shim.namespace, spec.sandbox_id(&request.id), &request.id)?;
    let runc = Runc::new(&shim.namespace, &bundle, &options, shim.reaper.clone());
    let mut making =
        Making { shim, request, options, bundle, spec, mode, runc, filesystems, phase: Phase::Nothing };
    match making.make().await {
        Ok(made) => Ok(making.finish(made).await),
        Err(error) => {
            making.undo().await;
            Err(error)
        }
    }
}

/// What has become of the init.
enum Made {
    Created {
        pid: i32,
        io: Arc<ProcessIo>,
        exit: oneshot::Receiver<Exit>,
        oom: Option<oom::Watch>,
    },
    /// It is in an image, and there with the container's start.
    Saved(Restoring),
}

impl Making<'_> {
    async fn make(&mut self) -> Result<Made, TaskError> {
        let request = self.request;
        rootfs::mount(request, &self.shim.reaper).await?;
        self.phase = Phase::Mounted;

        let rootfs = if request.rootfs.is_empty() {
            self.spec.rootfs(&self.bundle)
        } else {
            rootfs::directory(&self.bundle)
        };
        // containerd before 2.0 passes a client's image path in the options only, for runtimes not named runc.
        let image =
            [&request.checkpoint, &self.options.criu_image_path].into_iter().find(|path| !path.is_empty());
        // Of a directory or an archive that the annotation names nothing need be known here.
        let named = self.spec.image_to_restore().filter(|_| image.is_none());
        let (mut image, mut images) = (image.map(PathBuf::from), None);
        if let Some(name) = named {
            // Until the container is known to the sandbox.
            let images = images.insert(self.filesystems.images().await?);
            let failed = |source| TaskError::Fetch { id: request.id.clone(), source };
            image = Some(fetch::fetch(self.shim, name, images).await.map_err(failed)?);
        }
        let runtime = driver::binary(&self.options);
        let (processes, gates) =
            self.filesystems.prepare(self.bundle.clone(), rootfs, runtime, image).await?;
        self.shim.gates.lock().expect("only ever added to").extend(gates);
        drop(images);
        self.phase = Phase::Prepared;

        let owner = Owner {
            id: &request.id,
            namespace: &self.shim.namespace,
            uid: self.options.io_uid,
            gid: self.options.io_gid,
        };
        let io = Arc::new(ProcessIo::open(&stdio(request), &owner, &self.shim.reaper).await?);
        let name = self.spec.container_name().unwrap_or(&request.id).to_owned();
        let first = || self.shim.restored.lock().expect("only ever added to").insert(name);
        if let Some(image) = processes
            && first()
        {
            return Ok(Made::Saved(Restoring { image, io }));
        }
        let made = self.run(&io).await;
        if made.is_err() {
            io.abort().await;
        }
        let (pid, exit, oom) = made?;
        Ok(Made::Created { pid, io, exit, oom })
    }

    async fn run(
        &mut self,
        io: &ProcessIo,
    ) -> Result<(i32, oneshot::Receiver<Exit>, Option<oom::Watch>), TaskError> {
        let pid_file = self.bundle.join("init.pid");
        let mut options = CreateOpts::new()
            .pid_file(&pid_file)
            .no_pivot(self.options.no_pivot_root)
            .no_new_keyring(self.options.no_new_keyring);
        options.console_socket = io.console_socket();
        options.io = io.driver();
        let birth = self.shim.reaper.birth();
        // From here on runc may know it, also where it fails.
        self.phase = Phase::Created;
        self.runc.create(&self.request.id, &options).await?;
        drop(options);
        let (pid, exit, oom) =
            adopt(self.shim, &self.request.id, &pid_file, &birth, &self.filesystems).await?;
        // Last of all: `ctr run` closes a container's stdin only if it reads the end of its own after create has returned, and
        // it can read from the moment the fifo has a reader.
        io.attach().await?;
        Ok((pid, exit, oom))
    }

    async fn finish(self, made: Made) -> Arc<Container> {
        let request = self.request;
        let init = Arc::new(Process::new(String::new(), stdio(request), None));
        let (exit, oom, restoring) = match made {
            Made::Created { pid, io, exit, oom } => {
                init.born(pid, io);
                (Some(exit), oom, None)
            }
            Made::Saved(restoring) => (None, None, Some(restoring)),
        };
        let pid = init.pid();
        let container = Arc::new(Container {
            id: request.id.clone(),
            bundle: self.bundle,
            init: init.clone(),
            shim: self.shim.clone(),
            runc: self.runc,
            options: self.options,
            execs: Execs::default(),
            filesystems: self.filesystems,
            outlives_init: self.spec.outlives_init(),
            freeze: tokio::sync::Mutex::default(),
            saving: AtomicBool::new(false),
            ahead: Copied::default(),
            cri_directory: self.spec.cri_directory(&request.id),
            mode: self.mode,
            restoring: Mutex::new(restoring),
            oom: Mutex::new(oom),
        });
        let _turn = init.turn.lock().await;
        if let Some(exit) = exit {
            tokio::spawn(container.clone().attend_init(exit));
        }
        self.shim.publisher.publish(TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: Some(TaskIO {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
                ..Default::default()
            })
            .into(),
            checkpoint: request.checkpoint.clone(),
            pid: pid.unsigned_abs(),
            ..Default::default()
        });
        container
    }

    /// Undoes what is done, in reverse. What fails here is logged: the caller gets the first error.
    async fn undo(&self) {
        let id = &self.request.id;
        if self.phase >= Phase::Created
            && let Err(error) = self.runc.delete(id, true).await
        {
            tracing::warn!(container = id, %error, "undoing a failed create");
        }
        // Before that an image may have been unpacked for it.
        if self.phase >= Phase::Mounted
            && let Err(error) = self.filesystems.remove().await
        {
            tracing::warn!(container = id, error = error::chain(&error), "undoing a failed create");
        }
        if self.phase >= Phase::Mounted
            && let Err(error) = rootfs::unmount(&rootfs::directory(&self.bundle)).await
        {
            tracing::warn!(container = id, error = error::chain(&error), "undoing a failed create");
        }
    }
}

/// Takes over the init process that runc has just made, or restored: its exit, its cgroup, and whether memory is short.
pub(crate) async fn adopt(
    shim: &Shim,
    id: &str,
    pid_file: &Path,
    birth: &Birth,
    filesystems: &Filesystems,
) -> Result<(i32, oneshot::Receiver<Exit>, Option<oom::Watch>), TaskError> {
    let pid = read_pid_from_file(pid_file)
        .await
        .map_err(|source| TaskError::Shim { what: "reading the container's pid", source })?;
    let exit = birth.claim(pid);
    filesystems.set_init_pid(pid).await?;
    let oom = oom::watch(id, pid, &shim.publisher);
    if let Err(error) = &oom {
        tracing::warn!(container = id, %error, "out-of-memory events will be missing");
    }
    Ok((pid, exit, oom.ok()))
}

fn stdio(request: &CreateTaskRequest) -> Stdio {
    Stdio::new(&request.stdin, &request.stdout, &request.stderr, request.terminal)
}
