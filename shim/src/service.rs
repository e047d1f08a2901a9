//! containerd's task API: finds the container that a request is about and answers in containerd's terms.
//!
//! Each request runs as a task of its own: a caller that goes away doesn't leave it half done, and a panic becomes an error
//! instead of a caller that waits forever.
//!
//! Several containers live in one shim (those of a pod). The map's lock is held to look up, insert and remove, never across
//! an await; an id that is being created is taken already, and a request about it waits until it is there or isn't: a
//! containerd that was restarted in the meantime then finds what it had asked for. If it can't wait, it shuts the shim down;
//! so what is being created is no longer wanted, and goes as soon as it is there.

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim::api::*;
use containerd_shim::protos::api::ProcessInfo;
use containerd_shim::protos::shim::oci::ProcessDetails;
use containerd_shim::util::convert_to_any;
use containerd_shim::{ExitSignal, Task, TtrpcContext, TtrpcResult};
use tokio::sync::Notify;

use crate::container::{Container, Shim};
use crate::create;
use crate::error::TaskError;
use crate::lifecycle::Operation;
use crate::process::wait_response;

/// How long a shim stays without containers after a create that failed.
const UNUSED: Duration = Duration::from_secs(5);

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct TaskService(Arc<Inner>);

struct Inner {
    shim: Arc<Shim>,
    containers: Mutex<HashMap<String, Place>>,
    /// A place in the map has changed.
    changed: Notify,
    exit: Arc<ExitSignal>,
}

/// What an id stands for.
enum Place {
    /// It is being created.
    Creating {
        /// Shutdown has been asked for meanwhile.
        unwanted: bool,
    },
    There(Arc<Container>),
}

impl TaskService {
    /// A service without containers; `exit` is signalled when containerd says so and no container is left.
    pub fn new(shim: Arc<Shim>, exit: Arc<ExitSignal>) -> Self {
        Self(Arc::new(Inner { shim, containers: Mutex::default(), changed: Notify::new(), exit }))
    }

    /// Runs one request; see the module's documentation.
    async fn run<T, F>(
        &self,
        request: &'static str,
        id: &str,
        handle: impl FnOnce(Arc<Inner>) -> F,
    ) -> TtrpcResult<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, TaskError>> + Send + 'static,
    {
        tracing::debug!(request, id, "request");
        let result = match tokio::spawn(handle(self.0.clone())).await {
            Ok(result) => result,
            Err(_panic) => Err(TaskError::Panicked { request, id: id.to_string() }),
        };
        result.map_err(|error| {
            tracing::debug!(request, id, error = error.text(), "failed");
            error.into()
        })
    }
}

impl Inner {
    fn containers(&self) -> MutexGuard<'_, HashMap<String, Place>> {
        self.containers.lock().expect("the map is never left half-changed")
    }

    async fn get(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        loop {
            // Before the look, so that no change is missed.
            let changed = self.changed.notified();
            match self.containers().get(id) {
                None => return Err(TaskError::NoContainer),
                Some(Place::There(container)) => return Ok(container.clone()),
                Some(Place::Creating { .. }) => {}
            }
            changed.await;
        }
    }

    async fn create(&self, request: &CreateTaskRequest) -> Result<i32, TaskError> {
        let id = &request.id;
        {
            let mut containers = self.containers();
            if containers.contains_key(id) {
                return Err(TaskError::ContainerExists { id: id.clone() });
            }
            containers.insert(id.clone(), Place::Creating { unwanted: false });
        }
        // Gone with a panic as well.
        let mut taken = Taken { inner: self, id, kept: false };
        let container = create::create(&self.shim, request).await?;
        let pid = container.init.pid();
        {
            let mut containers = self.containers();
            if !matches!(containers.get(id), Some(Place::Creating { unwanted: true })) {
                containers.insert(id.clone(), Place::There(container));
                taken.kept = true;
                return Ok(pid);
            }
        }
        tracing::warn!(id, "shut down while it was created");
        container.delete().await?;
        Err(TaskError::Unwanted { id: id.clone() })
    }

    /// After a create that failed containerd shuts the shim down, unless it was restarted meanwhile: 1.6 then believes that there
    /// is a container. When the shim ends, it has everything of it deleted.
    async fn end_unless_used(self: Arc<Self>) {
        tokio::time::sleep(UNUSED).await;
        if self.containers().is_empty() {
            tracing::warn!("nothing has become of the container, and nobody has shut the shim down");
            self.exit.signal();
        }
    }

    fn shut_down(&self, id: &str) {
        let mut containers = self.containers();
        if containers.is_empty() {
            self.exit.signal();
        } else if let Some(Place::Creating { unwanted }) = containers.get_mut(id) {
            *unwanted = true;
        } else {
            tracing::debug!(id, "other containers are left");
        }
    }

    async fn delete(&self, request: &DeleteRequest) -> Result<DeleteResponse, TaskError> {
        let container = self.get(&request.id).await?;
        if !request.exec_id.is_empty() {
            return container.delete_exec(&request.exec_id).await;
        }
        let response = container.delete().await?;
        self.containers().remove(&request.id);
        Ok(response)
    }
}

/// An id that is being created.
struct Taken<'a> {
    inner: &'a Inner,
    id: &'a str,
    kept: bool,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if !self.kept {
            let mut containers = self.inner.containers();
            let unwanted = matches!(containers.remove(self.id), Some(Place::Creating { unwanted: true }));
            if unwanted && containers.is_empty() {
                self.inner.exit.signal();
            }
        }
        self.inner.changed.notify_waiters();
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> TtrpcResult<CreateTaskResponse> {
        let id = request.id.clone();
        self.run("Create", &id, |inner| async move {
            let created = inner.create(&request).await;
            if created.is_err() {
                tokio::spawn(inner.clone().end_unless_used());
            }
            Ok(CreateTaskResponse { pid: created?.unsigned_abs(), ..Default::default() })
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> TtrpcResult<StartResponse> {
        let id = request.id.clone();
        self.run("Start", &id, |inner| async move {
            let container = inner.get(&request.id).await?;
            let pid = match request.exec_id.as_str() {
                "" => container.start().await?,
                exec_id => container.start_exec(exec_id).await?,
            };
            Ok(StartResponse { pid: pid.unsigned_abs(), ..Default::default() })
        })
        .await
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> TtrpcResult<StateResponse> {
        let id = request.id.clone();
        self.run("State", &id, |inner| async move {
            let container = inner.get(&request.id).await?;
            let process = container.process(&request.exec_id)?;
            Ok(process.describe(&container.id, &container.bundle.display().to_string()))
        })
        .await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> TtrpcResult<WaitResponse> {
        let id = request.id.clone();
        self.run("Wait", &id, |inner| async move {
            let process = inner.get(&request.id).await?.process(&request.exec_id)?;
            Ok(wait_response(&process.wait().await))
        })
        .await
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> TtrpcResult<Empty> {
        let id = request.id.clone();
        self.run("Kill", &id, |inner| async move {
            inner.get(&request.id).await?.kill(&request.exec_id, request.signal, request.all).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> TtrpcResult<DeleteResponse> {
        let id = request.id.clone();
        self.run("Delete", &id, |inner| async move { inner.delete(&request).await }).await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> TtrpcResult<Empty> {
        let id = request.id.clone();
        self.run("Exec", &id, |inner| async move {
            inner.get(&request.id).await?.add_exec(&request)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> TtrpcResult<PidsResponse> {
        let id = request.id.clone();
        self.run("Pids", &id, |inner| async move {
            let pids = inner.get(&request.id).await?.pids().await?;
            let processes = pids.into_iter().map(|(pid, exec_id)| {
                let details = exec_id.map(|exec_id| ProcessDetails { exec_id, ..Default::default() });
                let info = details.and_then(|details| convert_to_any(Box::new(details)).ok());
                ProcessInfo { pid, info: info.into(), ..Default::default() }
            });
            Ok(PidsResponse { processes: processes.collect(), ..Default::default() })
        })
        .await
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> TtrpcResult<Empty> {
        let id = request.id.clone();
        self.run("Pause", &id, |inner| async move {
            inner.get(&request.id).await?.pause().await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> TtrpcResult<Empty> {
        let id = request.id.clone();
        self.run("Resume", &id, |inner| async move {
            inner.get(&request.id).await?.resume().await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> TtrpcResult<Empty> {
        let id = request.id.clone();
        self.run("Checkpoint", &id, |inner| async move {
            let container = inner.get(&request.id).await?;
            container.checkpoint(PathBuf::from(&request.path), request.options.as_ref()).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> TtrpcResult<Empty> {
        let id = request.id.clone();
        self.run("ResizePty", &id, |inner| async move {
            let process = inner.get(&request.id).await?.process(&request.exec_id)?;
            // An init may be resized when it is dead: containerd-shim-runc-v2 asks only execs for their state.
            if !process.exec_id.is_empty() {
                process.admit(Operation::Resize)?;
            }
            if let Some(io) = process.io() {
                // A terminal has 16 bits for either.
                let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
                io.resize(cells(request.width), cells(request.height))
                    .map_err(|source| TaskError::Io { what: "resizing the terminal", source })?;
            }
            Ok(Empty::new())
        })
        .await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> TtrpcResult<Empty> {
        let id = request.id.clone();
        self.run("CloseIO", &id, |inner| async move {
            let process = inner.get(&request.id).await?.process(&request.exec_id)?;
            if request.stdin {
                process.close_input();
            }
            Ok(Empty::new())
        })
        .await
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> TtrpcResult<Empty> {
        let id = request.id.clone();
        self.run("Update", &id, |inner| async move {
            inner.get(&request.id).await?.update(&request.resources.value).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> TtrpcResult<StatsResponse> {
        let id = request.id.clone();
        self.run("Stats", &id, |inner| async move {
            let stats = inner.get(&request.id).await?.stats().await?;
            Ok(StatsResponse { stats: Some(stats).into(), ..Default::default() })
        })
        .await
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> TtrpcResult<ConnectResponse> {
        let id = request.id.clone();
        self.run("Connect", &id, |inner| async move {
            let task_pid =
                inner.get(&request.id).await.map_or(0, |container| container.init.pid().unsigned_abs());
            Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, ..Default::default() })
        })
        .await
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> TtrpcResult<Empty> {
        let id = request.id.clone();
        self.run("Shutdown", &id, |inner| async move {
            inner.shut_down(&request.id);
            Ok(Empty::new())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim::protos::ttrpc::{Code, Error};

    use super::*;
    use crate::events::Publisher;
    use crate::reaper::Reaper;

    fn service() -> (TaskService, Arc<ExitSignal>) {
        let publisher = Publisher::start("/nonexistent/ttrpc".into(), "tests".into());
        let shim = Shim {
            namespace: "tests".into(),
            address: PathBuf::new(),
            reaper: Arc::new(Reaper::default()),
            publisher,
            restored: Mutex::default(),
            gates: Mutex::default(),
        };
        let exit = Arc::new(ExitSignal::default());
        (TaskService::new(Arc::new(shim), exit.clone()), exit)
    }

    fn code(error: Error) -> Code {
        let Error::RpcStatus(status) = error else { panic!("{error} has no code") };
        status.code()
    }

    #[tokio::test]
    async fn a_panic_is_an_answer() {
        let (service, _) = service();
        let result = service.run("Checkpoint", "c", |_| async { panic!("on purpose") });
        let error = TtrpcResult::<Empty>::unwrap_err(result.await);
        assert!(error.to_string().contains("Checkpoint of container c"), "{error}");
        assert_eq!(code(error), Code::INTERNAL);
    }

    #[tokio::test]
    async fn a_create_that_fails_leaves_its_id_free() {
        let (service, _) = service();
        let bundle = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let bundle = bundle.path().display().to_string();
            let request = CreateTaskRequest { id: "c".into(), bundle, ..Default::default() };
            let result = service.run("Create", "c", |inner| async move { inner.create(&request).await });
            let error = result.await.unwrap_err();
            // No config.json, and not ALREADY_EXISTS the second time.
            assert!(error.to_string().contains("config.json"), "{error}");
        }
        assert!(service.0.containers().is_empty());
    }

    #[tokio::test]
    async fn an_id_is_taken_while_its_container_is_created() {
        let (service, _) = service();
        service.0.containers().insert("c".into(), Place::Creating { unwanted: false });
        let request = CreateTaskRequest { id: "c".into(), ..Default::default() };
        let created = service.run("Create", "c", |inner| async move { inner.create(&request).await }).await;
        assert_eq!(code(created.unwrap_err()), Code::ALREADY_EXISTS);
        assert_eq!(service.0.containers().len(), 1, "somebody else's place was given up");
    }

    #[tokio::test]
    async fn a_request_waits_for_a_container_that_is_created() {
        let (service, _) = service();
        service.0.containers().insert("c".into(), Place::Creating { unwanted: false });
        let inner = service.0.clone();
        let mut asked = tokio::spawn(async move { inner.get("c").await.map(|_| ()) });
        assert!(tokio::time::timeout(Duration::from_millis(20), &mut asked).await.is_err());
        drop(Taken { inner: &service.0, id: "c", kept: false });
        assert!(matches!(asked.await.unwrap(), Err(TaskError::NoContainer)));
    }

    #[tokio::test]
    async fn what_is_created_while_the_shim_is_shut_down_ends_it() {
        let (service, exit) = service();
        for id in ["c", "other"] {
            service.0.containers().insert(id.into(), Place::Creating { unwanted: false });
        }
        service.0.shut_down("c");
        drop(Taken { inner: &service.0, id: "c", kept: false });
        // The other one is wanted still.
        assert!(tokio::time::timeout(Duration::from_millis(20), exit.wait()).await.is_err());
        service.0.shut_down("other");
        drop(Taken { inner: &service.0, id: "other", kept: false });
        tokio::time::timeout(Duration::from_secs(5), exit.wait()).await.unwrap();
    }
}
