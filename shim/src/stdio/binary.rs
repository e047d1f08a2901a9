//! A logging binary (`binary://`): a process that reads a container's output until its end.
//!
//! containerd's contract (`runtime/v2/logging`): descriptors 3 and 4 are the container's stdout and stderr, closing 5 says that
//! it is ready; CONTAINER_ID and CONTAINER_NAMESPACE are its whole environment. The container writes into the pipes without us,
//! so its output survives a shim that dies.

use std::io;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::{Mutex, oneshot};

use crate::reaper::{Exit, Reaper};
use crate::stdio::uri::Binary;

/// How long it may take to flush after SIGTERM (binaryIOProcTermTimeout).
const TERMINATION: Duration = Duration::from_secs(12);

/// Why a logging binary didn't start.
#[derive(Debug, thiserror::Error)]
pub enum BinaryError {
    /// Pipes, fork or exec.
    #[error("the logging binary {path} can't be started")]
    Spawn {
        /// The binary.
        path: String,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// It died before it was ready.
    #[error("the logging binary {path} ended with status {code} before it was ready")]
    Died {
        /// The binary.
        path: String,
        /// Exit code, or 128 plus the signal.
        code: u32,
    },
}

/// A running logging binary.
#[derive(Debug)]
pub struct Logger {
    pid: i32,
    reaper: Arc<Reaper>,
    exit: Mutex<Option<oneshot::Receiver<Exit>>>,
}

/// A logger and the writing ends of the container's stdout and stderr.
pub type Started = (Logger, OwnedFd, OwnedFd);

impl Logger {
    /// Starts `binary` for container (or exec) `id` and waits until it is ready.
    pub async fn start(
        binary: &Binary,
        id: &str,
        namespace: &str,
        reaper: &Arc<Reaper>,
    ) -> Result<Started, BinaryError> {
        let path = binary.path.display().to_string();
        let failed = |source| BinaryError::Spawn { path: path.clone(), source };
        let (out_read, out_write) = io::pipe().map_err(failed)?;
        let (err_read, err_write) = io::pipe().map_err(failed)?;
        let (ready_read, ready_write) = io::pipe().map_err(failed)?;
        let mut command = Command::new(&binary.path);
        command.args(&binary.arguments).env_clear();
        command.env("CONTAINER_ID", id).env("CONTAINER_NAMESPACE", namespace);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
            .fd_mappings(vec![
                FdMapping { parent_fd: out_read.into(), child_fd: 3 },
                FdMapping { parent_fd: err_read.into(), child_fd: 4 },
                FdMapping { parent_fd: ready_write.into(), child_fd: 5 },
            ])
            .map_err(|collision| failed(io::Error::other(collision)))?;
        let (child, mut exit) = reaper.spawn(&mut command).map_err(failed)?;
        // It holds the child's ends of the pipes.
        drop(command);
        let mut ready = Receiver::from_owned_fd(ready_read.into()).map_err(failed)?;
        // Whatever it writes there, the end of the pipe is the message.
        ready.read_to_end(&mut Vec::new()).await.map_err(failed)?;
        // A death closes the pipe as well, just before it can be collected; a binary that is ready doesn't die here.
        if let Ok(Ok(exit)) = tokio::time::timeout(Duration::from_millis(20), &mut exit).await {
            return Err(BinaryError::Died { path, code: exit.code() });
        }
        let exit = Mutex::new(Some(exit));
        Ok((
            Self { pid: child.id() as i32, reaper: reaper.clone(), exit },
            out_write.into(),
            err_write.into(),
        ))
    }

    /// Asks it to end and waits until it has, killing it where it doesn't. The container is dead by now, so it has seen the
    /// end of both streams unless some other process holds them.
    pub async fn stop(&self) {
        let Some(mut exit) = self.exit.lock().await.take() else { return };
        drop(self.reaper.kill(self.pid, libc::SIGTERM));
        if tokio::time::timeout(TERMINATION, &mut exit).await.is_err() {
            tracing::warn!(pid = self.pid, "a logging binary ignores SIGTERM, killing it");
            drop(self.reaper.kill(self.pid, libc::SIGKILL));
            drop(exit.await);
        }
    }
}
