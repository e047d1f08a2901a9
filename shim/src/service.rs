//! containerd's task API: finds the container that a request is about and answers in containerd's terms.
//!
//! Each request runs as a task of its own: a caller that goes away doesn't leave it half done, and a panic becomes an error
//! instead of a caller that waits forever.
//!
//! Several containers live in one shim (those of a pod). The map's lock is held to look up, insert and remove, never across
//! an await; an id that is being created is taken already.

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use containerd_shim::api::*;
use containerd_shim::protos::api::ProcessInfo;
use containerd_shim::protos::shim::oci::ProcessDetails;
use containerd_shim::util::convert_to_any;
use containerd_shim::{ExitSignal, Task, TtrpcContext, TtrpcResult};

use crate::container::{Container, Shim};
use crate::create;
use crate::error::TaskError;
use crate::lifecycle::Operation;
use crate::process::wait_response;

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct TaskService(Arc<Inner>);

struct Inner {
    shim: Arc<Shim>,
    /// `None` while it is being created.
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
    exit: Arc<ExitSignal>,
}

impl TaskService {
    /// A service without containers; `exit` is signalled when containerd says so and no container is left.
    pub fn new(shim: Arc<Shim>, exit: Arc<ExitSignal>) -> Self {
        Self(Arc::new(Inner { shim, containers: Mutex::default(), exit }))
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
    fn containers(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        self.containers.lock().expect("the map is never left half-changed")
    }

    fn get(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        self.containers().get(id).cloned().flatten().ok_or(TaskError::NoContainer)
    }

    async fn create(&self, request: &CreateTaskRequest) -> Result<i32, TaskError> {
        let id = &request.id;
        {
            let mut containers = self.containers();
            if containers.contains_key(id) {
                return Err(TaskError::ContainerExists { id: id.clone() });
            }
            containers.insert(id.clone(), None);
        }
        // Gone with a panic as well.
        let mut place = Place { inner: self, id, kept: false };
        let container = create::create(&self.shim, request).await?;
        let pid = container.init.pid();
        self.containers().insert(id.clone(), Some(container));
        place.kept = true;
        Ok(pid)
    }

    async fn delete(&self, request: &DeleteRequest) -> Result<DeleteResponse, TaskError> {
        let container = self.get(&request.id)?;
        if !request.exec_id.is_empty() {
            return container.delete_exec(&request.exec_id).await;
        }
        let response = container.delete().await?;
        self.containers().remove(&request.id);
        Ok(response)
    }
}

struct Place<'a> {
    inner: &'a Inner,
    id: &'a str,
    kept: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.inner.containers().remove(self.id);
        }
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> TtrpcResult<CreateTaskResponse> {
        let id = request.id.clone();
        self.run("Create", &id, |inner| async move {
            let pid = inner.create(&request).await?.unsigned_abs();
            Ok(CreateTaskResponse { pid, ..Default::default() })
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> TtrpcResult<StartResponse> {
        let id = request.id.clone();
        self.run("Start", &id, |inner| async move {
            let container = inner.get(&request.id)?;
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
            let container = inner.get(&request.id)?;
            let process = container.process(&request.exec_id)?;
            Ok(process.describe(&container.id, &container.bundle.display().to_string()))
        })
        .await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> TtrpcResult<WaitResponse> {
        let id = request.id.clone();
        self.run("Wait", &id, |inner| async move {
            let process = inner.get(&request.id)?.process(&request.exec_id)?;
            Ok(wait_response(&process.wait().await))
        })
        .await
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> TtrpcResult<Empty> {
        let id = request.id.clone();
        self.run("Kill", &id, |inner| async move {
            inner.get(&request.id)?.kill(&request.exec_id, request.signal, request.all).await?;
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
            inner.get(&request.id)?.add_exec(&request)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> TtrpcResult<PidsResponse> {
        let id = request.id.clone();
        self.run("Pids", &id, |inner| async move {
            let pids = inner.get(&request.id)?.pids().await?;
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
            inner.get(&request.id)?.pause().await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> TtrpcResult<Empty> {
        let id = request.id.clone();
        self.run("Resume", &id, |inner| async move {
            inner.get(&request.id)?.resume().await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> TtrpcResult<Empty> {
        let id = request.id.clone();
        self.run("Checkpoint", &id, |inner| async move {
            let container = inner.get(&request.id)?;
            container.checkpoint(PathBuf::from(&request.path), request.options.as_ref()).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> TtrpcResult<Empty> {
        let id = request.id.clone();
        self.run("ResizePty", &id, |inner| async move {
            let process = inner.get(&request.id)?.process(&request.exec_id)?;
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
            let process = inner.get(&request.id)?.process(&request.exec_id)?;
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
            inner.get(&request.id)?.update(&request.resources.value).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> TtrpcResult<StatsResponse> {
        let id = request.id.clone();
        self.run("Stats", &id, |inner| async move {
            let stats = inner.get(&request.id)?.stats().await?;
            Ok(StatsResponse { stats: Some(stats).into(), ..Default::default() })
        })
        .await
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> TtrpcResult<ConnectResponse> {
        let id = request.id.clone();
        self.run("Connect", &id, |inner| async move {
            let task_pid = inner.get(&request.id).map_or(0, |container| container.init.pid().unsigned_abs());
            Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, ..Default::default() })
        })
        .await
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> TtrpcResult<Empty> {
        let id = request.id.clone();
        self.run("Shutdown", &id, |inner| async move {
            if inner.containers().is_empty() {
                inner.exit.signal();
            } else {
                tracing::debug!(id = request.id, "other containers are left");
            }
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
        let shim = Shim { namespace: "tests".into(), reaper: Arc::new(Reaper::default()), publisher };
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
        service.0.containers().insert("c".into(), None);
        let request = CreateTaskRequest { id: "c".into(), ..Default::default() };
        let created = service.run("Create", "c", |inner| async move { inner.create(&request).await }).await;
        assert_eq!(code(created.unwrap_err()), Code::ALREADY_EXISTS);
        // But there is nothing yet to ask.
        assert!(matches!(service.0.get("c"), Err(TaskError::NoContainer)));
        assert_eq!(service.0.containers().len(), 1, "somebody else's place was given up");
    }
}
