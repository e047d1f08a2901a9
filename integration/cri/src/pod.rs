//! Pods and their containers, through the calls that kubelet makes, in its order.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use stillframe_integration::ctr::DEADLINE;
use stillframe_integration::{Listing, image};

use crate::api;
use crate::client::{Cri, CriError};

pub use crate::api::ContainerState as State;

/// The runtime handler with Stillframe.
pub const HANDLER: &str = "stillframe";
/// The runtime handler with Stillframe under the name of runc's shim.
pub const AS_RUNC: &str = "stillframe-as-runc";

/// A pod about to be run.
#[derive(Debug, Clone)]
pub struct PodSpec<'a> {
    cri: &'a Cri,
    handler: String,
    config: api::PodSandboxConfig,
}

impl<'a> PodSpec<'a> {
    pub(crate) fn new(cri: &'a Cri, name: String) -> Self {
        let containerd = cri.containerd();
        // Namespaces of its own but for the network, which would need plugins.
        let namespaces = api::NamespaceOption {
            network: api::NamespaceMode::Node.into(),
            pid: api::NamespaceMode::Container.into(),
            ipc: api::NamespaceMode::Pod.into(),
            ..Default::default()
        };
        let security =
            api::LinuxSandboxSecurityContext { namespace_options: Some(namespaces), ..Default::default() };
        let config = api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                uid: format!("uid-{}-{name}", containerd.cgroup()),
                name: name.clone(),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            log_directory: containerd.dir().join("logs").join(&name).display().to_string(),
            linux: Some(api::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", containerd.cgroup()),
                security_context: Some(security),
                ..Default::default()
            }),
            ..Default::default()
        };
        Self { cri, handler: HANDLER.to_owned(), config }
    }

    /// Another runtime handler than Stillframe's.
    pub fn handler(mut self, handler: &str) -> Self {
        self.handler = handler.to_owned();
        self
    }

    /// An annotation of the pod.
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.config.annotations.insert(name.to_owned(), value.to_owned());
        self
    }

    /// With containers that may be privileged.
    pub fn privileged(mut self) -> Self {
        let linux = self.config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
        self
    }

    /// Which processes its containers see, and whose shared memory they have.
    pub fn namespaces(mut self, change: impl FnOnce(&mut api::NamespaceOption)) -> Self {
        let linux = self.config.linux.get_or_insert_default();
        change(linux.security_context.get_or_insert_default().namespace_options.get_or_insert_default());
        self
    }

    /// The pod's UID.
    pub fn uid(&self) -> String {
        self.config.metadata.as_ref().map(|metadata| metadata.uid.clone()).unwrap_or_default()
    }

    /// Runs its sandbox.
    pub fn run(self) -> Result<Pod<'a>, CriError> {
        let logs = &self.config.log_directory;
        fs::create_dir_all(logs).map_err(|source| CriError::Io { what: logs.clone(), source })?;
        let request = api::RunPodSandboxRequest {
            config: Some(self.config.clone()),
            runtime_handler: self.handler.clone(),
        };
        let answer =
            self.cri.call("RunPodSandbox", |mut cri| async move { cri.run_pod_sandbox(request).await })?;
        know(self.cri, &answer.pod_sandbox_id)?;
        Ok(Pod { cri: self.cri, config: self.config, id: answer.pod_sandbox_id })
    }
}

/// A pod whose sandbox has been started.
#[derive(Debug)]
pub struct Pod<'a> {
    cri: &'a Cri,
    config: api::PodSandboxConfig,
    id: String,
}

impl<'a> Pod<'a> {
    /// The sandbox's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its UID.
    pub fn uid(&self) -> String {
        self.config.metadata.as_ref().map(|metadata| metadata.uid.clone()).unwrap_or_default()
    }

    /// A container about to be run in it, which waits to be killed.
    pub fn container(&self, name: &str) -> PodContainerSpec<'_, 'a> {
        let metadata = api::ContainerMetadata { name: name.to_owned(), attempt: 0 };
        let image = api::ImageSpec { image: image::NAME.to_owned(), ..Default::default() };
        // Kubelet gives them to each container, too.
        let pod = self.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let security = api::LinuxContainerSecurityContext {
            namespace_options: pod.and_then(|security| security.namespace_options.clone()),
            ..Default::default()
        };
        let linux = api::LinuxContainerConfig { security_context: Some(security), ..Default::default() };
        let config = api::ContainerConfig {
            metadata: Some(metadata),
            image: Some(image),
            command: vec!["probe".to_owned(), "idle".to_owned()],
            log_path: format!("{name}.log"),
            linux: Some(linux),
            ..Default::default()
        };
        PodContainerSpec { pod: self, config }
    }

    /// Whether its sandbox is ready.
    pub fn is_ready(&self) -> Result<bool, CriError> {
        let request = api::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        let status = self
            .cri
            .call("PodSandboxStatus", |mut cri| async move { cri.pod_sandbox_status(request).await })?;
        Ok(status.status.unwrap_or_default().state() == api::PodSandboxState::SandboxReady)
    }

    /// Stops it with all its containers. It may be stopped again.
    pub fn stop(&self) -> Result<(), CriError> {
        let request = api::StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.cri.call("StopPodSandbox", |mut cri| async move { cri.stop_pod_sandbox(request).await })?;
        Ok(())
    }

    /// Stops and removes it with all its containers.
    pub fn remove(self) -> Result<(), CriError> {
        self.stop()?;
        let request = api::RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.cri.call("RemovePodSandbox", |mut cri| async move { cri.remove_pod_sandbox(request).await })?;
        Ok(())
    }
}

/// A container about to be run in a pod.
#[derive(Debug, Clone)]
pub struct PodContainerSpec<'p, 'a> {
    pod: &'p Pod<'a>,
    config: api::ContainerConfig,
}

impl<'a> PodContainerSpec<'_, 'a> {
    /// What it runs.
    pub fn command(mut self, command: &[&str]) -> Self {
        self.config.command = command.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// A volume of the pod's, or any other directory of the host.
    pub fn mount(mut self, host: &Path, container: &str) -> Self {
        self.config.mounts.push(api::Mount {
            container_path: container.to_owned(),
            host_path: host.display().to_string(),
            ..Default::default()
        });
        self
    }

    /// The image it is made from; an archive that a checkpoint made, where containerd still takes one.
    pub fn image(mut self, image: &str) -> Self {
        self.config.image = Some(api::ImageSpec { image: image.to_owned(), ..Default::default() });
        self
    }

    /// With a terminal, whose output is its log.
    pub fn terminal(mut self) -> Self {
        self.config.tty = true;
        self
    }

    /// A capability, by its name without `CAP_`.
    pub fn capability(mut self, name: &str) -> Self {
        let security = self.config.linux.get_or_insert_default().security_context.get_or_insert_default();
        security.capabilities.get_or_insert_default().add_capabilities.push(name.to_owned());
        self
    }

    /// With all capabilities and the host's devices, in a pod that allows it.
    pub fn privileged(mut self) -> Self {
        let linux = self.config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
        self
    }

    /// Creates and starts it.
    pub fn start(self) -> Result<PodContainer<'a>, CriError> {
        let cri = self.pod.cri;
        let config = &self.pod.config;
        let log = Path::new(&config.log_directory).join(&self.config.log_path);
        let request = api::CreateContainerRequest {
            pod_sandbox_id: self.pod.id.clone(),
            config: Some(self.config),
            sandbox_config: Some(config.clone()),
        };
        let answer =
            cri.call("CreateContainer", |mut cri| async move { cri.create_container(request).await })?;
        let id = answer.container_id;
        know(cri, &id)?;
        let request = api::StartContainerRequest { container_id: id.clone() };
        cri.call("StartContainer", |mut cri| async move { cri.start_container(request).await })?;
        Ok(PodContainer { cri, id, log })
    }
}

/// What a command in a container said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecResult {
    /// Its exit code.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// A container in a pod, that has been started.
#[derive(Debug)]
pub struct PodContainer<'a> {
    cri: &'a Cri,
    id: String,
    log: PathBuf,
}

impl PodContainer<'_> {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Runs a command in it to its end.
    pub fn exec(&self, command: &[&str]) -> Result<ExecResult, CriError> {
        let request = api::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: DEADLINE.as_secs().cast_signed(),
        };
        let said = self.cri.call("ExecSync", |mut cri| async move { cri.exec_sync(request).await })?;
        Ok(ExecResult {
            code: said.exit_code,
            stdout: String::from_utf8_lossy(&said.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&said.stderr).into_owned(),
        })
    }

    /// Runs a shell command line in it, which must succeed, and gives its output.
    #[track_caller]
    pub fn shell(&self, line: &str) -> String {
        let said = self.exec(&["sh", "-c", line]).unwrap_or_else(|error| panic!("{line}: {error}"));
        assert_eq!(said.code, 0, "{line}: {said:?}");
        said.stdout
    }

    /// What the probe sees below a directory.
    #[track_caller]
    pub fn list(&self, dir: &str) -> Listing {
        let said = self.exec(&["probe", "list", dir]).unwrap_or_else(|error| panic!("list {dir}: {error}"));
        Listing::parse(&said.stdout).unwrap_or_else(|error| panic!("list {dir}: {error}: {said:?}"))
    }

    /// What containerd says of it.
    pub fn status(&self) -> Result<api::ContainerStatus, CriError> {
        let request = api::ContainerStatusRequest { container_id: self.id.clone(), verbose: false };
        let status =
            self.cri.call("ContainerStatus", |mut cri| async move { cri.container_status(request).await })?;
        Ok(status.status.unwrap_or_default())
    }

    /// Waits until it has the state, and gives the status then. CRI before 2.x has no events, so it is asked again and again.
    pub fn await_state(&self, wanted: State) -> Result<api::ContainerStatus, CriError> {
        let end = Instant::now() + DEADLINE / 4;
        loop {
            let status = self.status()?;
            if status.state() == wanted {
                return Ok(status);
            }
            assert!(Instant::now() < end, "{} is {:?}, not {wanted:?}", self.id, status.state());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Processor time and memory.
    pub fn stats(&self) -> Result<api::ContainerStats, CriError> {
        let request = api::ContainerStatsRequest { container_id: self.id.clone() };
        let stats =
            self.cri.call("ContainerStats", |mut cri| async move { cri.container_stats(request).await })?;
        Ok(stats.stats.unwrap_or_default())
    }

    /// Limits it.
    pub fn update(&self, linux: api::LinuxContainerResources) -> Result<(), CriError> {
        let request = api::UpdateContainerResourcesRequest {
            container_id: self.id.clone(),
            linux: Some(linux),
            ..Default::default()
        };
        self.cri.call("UpdateContainerResources", |mut cri| async move {
            cri.update_container_resources(request).await
        })?;
        Ok(())
    }

    /// Writes a checkpoint archive, as kubelet's checkpoint endpoint has it done.
    pub fn checkpoint(&self, archive: &Path) -> Result<(), CriError> {
        let request = api::CheckpointContainerRequest {
            container_id: self.id.clone(),
            location: archive.display().to_string(),
            timeout: 0,
        };
        self.cri
            .call("CheckpointContainer", |mut cri| async move { cri.checkpoint_container(request).await })?;
        Ok(())
    }

    /// Its log, as kubelet finds it: a line is `TIME STREAM TAG TEXT`.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Asks it to end, and kills it after `seconds`.
    pub fn stop(&self, seconds: i64) -> Result<(), CriError> {
        let request = api::StopContainerRequest { container_id: self.id.clone(), timeout: seconds };
        self.cri.call("StopContainer", |mut cri| async move { cri.stop_container(request).await })?;
        Ok(())
    }

    /// Removes it.
    pub fn remove(self) -> Result<(), CriError> {
        let request = api::RemoveContainerRequest { container_id: self.id.clone() };
        self.cri.call("RemoveContainer", |mut cri| async move { cri.remove_container(request).await })?;
        Ok(())
    }
}

fn know(cri: &Cri, id: &str) -> Result<(), CriError> {
    let known = cri.containerd().know(id);
    known.map_err(|source| CriError::Io { what: "taking note of an id".to_owned(), source })
}
