//! runc, as containerd-shim-runc-v2 drives it: the same root, the same flags, the same error texts.
//!
//! Each command logs to a file of its own in the bundle: a command's stderr may be the container's, and commands for one
//! container run at the same time. A failed command's text is the last error in that file (getLastRuntimeError). Commands
//! are spawned through the [`Reaper`], which collects all children of this process.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim::api::Options;
use containerd_shim::protos::shim::oci::CheckpointOptions;
use oci_spec::runtime::{LinuxResources, Process};
use runc::options::{CreateOpts, DeleteOpts, ExecOpts, GlobalOpts, KillOpts};
use runc::{Command, Io, Spawner};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::unix::pipe::Receiver;

use crate::full::Mode;
use crate::reaper::Reaper;

/// Where containerd-shim-runc-v2 keeps runc's state; the namespace comes below.
const ROOT: &str = "/run/containerd/runc";
/// How long a dead command's output may stay open: somebody it left behind may hold it.
const LEFTOVER: Duration = Duration::from_millis(500);

/// A runc command that failed. Prints as `OCI runtime create failed: <runc's own words>`.
#[derive(Debug, thiserror::Error)]
pub struct RuncError {
    /// The command.
    pub command: &'static str,
    /// runc's last logged error; empty where it logged none.
    pub message: String,
    /// What became of the process.
    #[source]
    pub source: runc::error::Error,
}

impl fmt::Display for RuncError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OCI runtime {} failed", self.command)?;
        if self.message.is_empty() { Ok(()) } else { write!(f, ": {}", self.message) }
    }
}

impl RuncError {
    /// Whether runc says that the container's init is dead.
    pub fn is_dead(&self) -> bool {
        let message = self.message.to_lowercase();
        ["process already finished", "container not running", "no such process"]
            .iter()
            .any(|text| message.contains(text))
    }

    /// Whether runc doesn't know the container.
    pub fn is_unknown(&self) -> bool {
        self.message.contains("does not exist")
    }

    /// CRIU's own words besides: runc only says where they are, in a directory that goes with the container.
    fn with_criu_log(mut self, path: &Path) -> Self {
        let log = std::fs::read(path).map(lossy).unwrap_or_default();
        let errors: Vec<_> =
            log.lines().filter_map(|line| line.split_once("Error ")).map(|(_, said)| said).collect();
        if !errors.is_empty() {
            // The first is the cause, but for what every run complains of.
            let cause = errors.iter().find(|said| !said.contains("RLIMIT_NOFILE")).unwrap_or(&errors[0]);
            self.message = format!("{}: CRIU: {}", self.message.replace('\n', ", "), cause.trim());
        }
        self
    }

    /// Whether there is anything to say besides runc's own words: the exit status tells nothing where it has logged.
    pub fn tells_all(&self) -> bool {
        !self.message.is_empty()
    }
}

/// Runs runc for the containers of one bundle.
#[derive(Debug)]
pub struct Runc {
    binary: PathBuf,
    root: PathBuf,
    systemd_cgroup: bool,
    bundle: PathBuf,
    reaper: Arc<Reaper>,
    commands: AtomicU64,
}

impl Runc {
    /// A driver with the options of the task.
    pub fn new(namespace: &str, bundle: &Path, options: &Options, reaper: Arc<Reaper>) -> Self {
        let root = if options.root.is_empty() { ROOT } else { &options.root };
        Self {
            binary: binary(options),
            root: Path::new(root).join(namespace),
            systemd_cgroup: options.systemd_cgroup,
            bundle: bundle.to_path_buf(),
            reaper,
            commands: AtomicU64::new(0),
        }
    }

    /// `runc create`.
    pub async fn create(&self, id: &str, options: &CreateOpts) -> Result<(), RuncError> {
        let log = self.log();
        let result = match self.client(&log) {
            Ok(runc) => runc.create(id, &self.bundle, Some(options)).await.map(drop),
            Err(error) => Err(error),
        };
        log.close("create", result)
    }

    /// `runc start`.
    pub async fn start(&self, id: &str) -> Result<(), RuncError> {
        let log = self.log();
        let result = match self.client(&log) {
            Ok(runc) => runc.start(id).await.map(drop),
            Err(error) => Err(error),
        };
        log.close("start", result)
    }

    /// `runc exec`.
    pub async fn exec(&self, id: &str, process: &Process, options: &ExecOpts) -> Result<(), RuncError> {
        self.call("exec", async |runc| runc.exec(id, process, Some(options)).await).await
    }

    /// `runc checkpoint`: has CRIU save the container's processes to a directory. They stay, frozen if they were.
    pub async fn checkpoint(
        &self,
        id: &str,
        images: &Path,
        work: &Path,
        options: &CheckpointOptions,
        mode: &Mode,
    ) -> Result<(), RuncError> {
        let log = self.log();
        let mut command = self.command(&log, mode, "checkpoint", images, work);
        command.args(["--leave-running", "--file-locks"]);
        for (flag, set) in [
            ("--tcp-established", options.open_tcp),
            ("--ext-unix-sk", options.external_unix_sockets),
            ("--shell-job", options.terminal),
        ] {
            command.args(set.then_some(flag));
        }
        for namespace in &options.empty_namespaces {
            command.arg("--empty-ns").arg(namespace);
        }
        let result = self.execute(command.arg(id), None).await;
        log.close("checkpoint", result).map_err(|error| error.with_criu_log(&work.join("dump.log")))
    }

    /// `runc restore`: has CRIU restore processes as the container, which they run in at once. What had to be allowed to be saved is
    /// allowed to come back: only the image knows.
    pub async fn restore(
        &self,
        id: &str,
        options: &CreateOpts,
        images: &Path,
        work: &Path,
        mode: &Mode,
    ) -> Result<(), RuncError> {
        let log = self.log();
        let mut command = self.command(&log, mode, "restore", images, work);
        command.args(["--tcp-established", "--ext-unix-sk", "--file-locks"]);
        command.args(["--detach", "--no-subreaper", "--bundle"]).arg(&self.bundle);
        for (flag, path) in [("--pid-file", &options.pid_file), ("--console-socket", &options.console_socket)]
        {
            if let Some(path) = path {
                command.arg(flag).arg(path);
            }
        }
        command.args(options.no_pivot.then_some("--no-pivot"));
        let result = self.execute(command.arg(id), options.io.as_deref()).await;
        log.close("restore", result).map_err(|error| error.with_criu_log(&work.join("restore.log")))
    }

    /// What the runc crate doesn't have; with its global options.
    fn command(&self, log: &Log, mode: &Mode, verb: &str, images: &Path, work: &Path) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--root").arg(&self.root).arg("--log").arg(&log.path).args(["--log-format", "json"]);
        command.args(self.systemd_cgroup.then_some("--systemd-cgroup"));
        command.arg(verb).arg("--image-path").arg(images).arg("--work-path").arg(work);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env_remove("NOTIFY_SOCKET");
        // From 1.2 on runc finds it there only.
        if let Some(directory) = mode.criu.as_deref().and_then(Path::parent) {
            let mut path = directory.as_os_str().to_owned();
            path.push(":");
            path.push(std::env::var_os("PATH").unwrap_or_default());
            command.env("PATH", path);
        }
        command
    }

    async fn execute(&self, command: &mut Command, io: Option<&dyn Io>) -> runc::Result<()> {
        if let Some(io) = io {
            io.set(command).await.map_err(|error| runc::error::Error::IoSet(error.to_string()))?;
        }
        let command = std::mem::replace(command, Command::new("true"));
        let result = ReaperSpawner(self.reaper.clone()).execute(command).await;
        if let Some(io) = io {
            io.close_after_start().await;
        }
        let (status, _, stdout, stderr) = result?;
        if status.success() {
            Ok(())
        } else {
            Err(runc::error::Error::CommandFailed { status, stdout, stderr })
        }
    }

    /// `runc kill`; `all` signals every process of the container, also where its init is dead.
    pub async fn kill(&self, id: &str, signal: u32, all: bool) -> Result<(), RuncError> {
        self.call("kill", async |runc| runc.kill(id, signal, Some(&KillOpts::new().all(all))).await).await
    }

    /// `runc delete`; `force` kills it first. A container that runc doesn't know is fine.
    pub async fn delete(&self, id: &str, force: bool) -> Result<(), RuncError> {
        match self
            .call("delete", async |runc| runc.delete(id, Some(&DeleteOpts::new().force(force))).await)
            .await
        {
            Err(error) if error.is_unknown() => Ok(()),
            result => result,
        }
    }

    /// `runc pause`.
    pub async fn pause(&self, id: &str) -> Result<(), RuncError> {
        self.call("pause", async |runc| runc.pause(id).await).await
    }

    /// `runc resume`.
    pub async fn resume(&self, id: &str) -> Result<(), RuncError> {
        self.call("resume", async |runc| runc.resume(id).await).await
    }

    /// `runc ps`: the host's pids of all processes in the container.
    pub async fn pids(&self, id: &str) -> Result<Vec<u32>, RuncError> {
        let pids = self.call("ps", async |runc| runc.ps(id).await).await?;
        Ok(pids.into_iter().filter_map(|pid| u32::try_from(pid).ok()).collect())
    }

    /// `runc update`.
    pub async fn update(&self, id: &str, resources: &LinuxResources) -> Result<(), RuncError> {
        self.call("update", async |runc| runc.update(id, resources).await).await
    }

    /// Has runc do one command; where it fails, its log says why.
    async fn call<T>(
        &self,
        command: &'static str,
        call: impl AsyncFnOnce(runc::Runc) -> runc::Result<T>,
    ) -> Result<T, RuncError> {
        let log = self.log();
        let result = match self.client(&log) {
            Ok(runc) => call(runc).await,
            Err(error) => Err(error),
        };
        log.close(command, result)
    }

    fn client(&self, log: &Log) -> runc::Result<runc::Runc> {
        let mut options = GlobalOpts::new()
            .command(&self.binary)
            .root(&self.root)
            .systemd_cgroup(self.systemd_cgroup)
            .log(&log.path)
            .log_json();
        options.custom_spawner(Arc::new(ReaperSpawner(self.reaper.clone())));
        options.build()
    }

    fn log(&self) -> Log {
        let number = self.commands.fetch_add(1, Ordering::Relaxed);
        // The pid keeps the `delete` action apart from a shim that it cleans up after.
        Log { path: self.bundle.join(format!("runc-{}-{number}.json", std::process::id())) }
    }
}

/// The runc binary that `options` ask for, to be looked up in PATH.
pub fn binary(options: &Options) -> PathBuf {
    PathBuf::from(if options.binary_name.is_empty() { "runc" } else { &options.binary_name })
}

/// The log file of one command.
struct Log {
    path: PathBuf,
}

#[derive(Deserialize)]
struct LogLine {
    level: String,
    msg: String,
}

impl Log {
    fn close<T>(self, command: &'static str, result: runc::Result<T>) -> Result<T, RuncError> {
        let result = result.map_err(|source| {
            let message =
                std::fs::read_to_string(&self.path).map(|text| last_error(&text)).unwrap_or_default();
            RuncError { command, message, source }
        });
        // Missing where runc had nothing to log.
        drop(std::fs::remove_file(&self.path));
        result
    }
}

fn last_error(log: &str) -> String {
    let lines = serde_json::Deserializer::from_str(log).into_iter::<LogLine>().map_while(Result::ok);
    lines
        .filter(|line| line.level == "error")
        .last()
        .map(|line| line.msg.trim().to_string())
        .unwrap_or_default()
}

/// Runs commands to their end: their exits are the reaper's.
#[derive(Debug)]
pub struct ReaperSpawner(pub Arc<Reaper>);

#[async_trait]
impl Spawner for ReaperSpawner {
    async fn execute(&self, mut command: Command) -> runc::Result<(ExitStatus, u32, String, String)> {
        let spawned = self.0.spawn(command.as_std_mut());
        // It holds the child's ends of the pipes.
        drop(command);
        let (mut child, exit) = spawned.map_err(runc::error::Error::ProcessSpawnFailed)?;
        let stdout = child.stdout.take().map(|end| Receiver::from_owned_fd(end.into()));
        let stderr = child.stderr.take().map(|end| Receiver::from_owned_fd(end.into()));
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let status = {
            let output = async { tokio::join!(drain(stdout, &mut out), drain(stderr, &mut err)) };
            tokio::pin!(output);
            tokio::pin!(exit);
            let (exit, finished) = tokio::select! {
                exit = &mut exit => (exit, false),
                _ = &mut output => (exit.await, true),
            };
            if !finished {
                drop(tokio::time::timeout(LEFTOVER, output).await);
            }
            exit.expect("the reaper delivers every claimed exit").status
        };
        Ok((status, child.id(), lossy(out), lossy(err)))
    }
}

fn lossy(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn drain(end: Option<std::io::Result<impl AsyncRead + Unpin>>, into: &mut Vec<u8>) {
    match end {
        None => {}
        Some(Ok(mut end)) => drop(end.read_to_end(into).await),
        Some(Err(error)) => tracing::warn!(%error, "a command's output can't be read"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_a_log_is_what_failed() {
        let log = concat!(
            r#"{"level":"warning","msg":"odd","time":"t"}"#,
            "\n",
            r#"{"level":"error","msg":"first","time":"t"}"#,
            "\n",
            r#"{"level":"error","msg":"runc create failed: \"x\" ","time":"t"}"#,
            "\n",
            r#"{"level":"info","msg":"bye","time":"t"}"#,
            "\n{\"level\":\"err",
        );
        assert_eq!(last_error(log), "runc create failed: \"x\"");
        assert_eq!(last_error("no json"), "");
        assert_eq!(last_error(""), "");
    }

    #[test]
    fn errors_read_as_those_of_containerd_shim_runc_v2() {
        let error = |message: &str| RuncError {
            command: "create",
            message: message.into(),
            source: runc::error::Error::NotFound,
        };
        assert_eq!(
            error("runc create failed: x").to_string(),
            "OCI runtime create failed: runc create failed: x"
        );
        assert_eq!(error("").to_string(), "OCI runtime create failed");
        assert!(error("container not running").is_dead());
        assert!(error("container does not exist").is_unknown());
        assert!(!error("permission denied").is_dead() && !error("permission denied").is_unknown());
    }

    #[test]
    fn the_namespace_is_below_the_root() {
        let reaper = Arc::new(Reaper::default());
        let options = Options { root: "/run/other".into(), binary_name: "crun".into(), ..Default::default() };
        let runc = Runc::new("k8s.io", Path::new("/b"), &options, reaper.clone());
        assert_eq!(
            (runc.root.as_path(), runc.binary.as_path()),
            (Path::new("/run/other/k8s.io"), Path::new("crun"))
        );
        let runc = Runc::new("k8s.io", Path::new("/b"), &Options::default(), reaper);
        assert_eq!(runc.root, Path::new("/run/containerd/runc/k8s.io"));
    }
}
