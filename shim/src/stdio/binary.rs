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

/// How long it may take to end by itself, having seen the end of both streams. containerd-shim-runc-v2 sends SIGTERM at once,
/// which costs a binary that doesn't expect it the last lines.
const GRACE: Duration = Duration::from_millis(100);
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
        if tokio::time::timeout(GRACE, &mut exit).await.is_ok() {
            return;
        }
        drop(self.reaper.kill(self.pid, libc::SIGTERM));
        if tokio::time::timeout(TERMINATION, &mut exit).await.is_err() {
            tracing::warn!(pid = self.pid, "a logging binary ignores SIGTERM, killing it");
            drop(self.reaper.kill(self.pid, libc::SIGKILL));
            drop(exit.await);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;
    use crate::reaper::tests::shared;

    fn shell(script: &str) -> Binary {
        Binary { path: "/bin/sh".into(), arguments: vec!["-c".into(), script.into()] }
    }

    #[tokio::test]
    async fn a_binary_reads_both_streams_to_their_end_and_knows_whose_they_are() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let script = format!(
            "exec >{} 5>&-; trap 'echo end; exit' TERM; echo $CONTAINER_NAMESPACE/$CONTAINER_ID; cat <&3; cat <&4; \
             while :; do sleep 0.01; done",
            log.display()
        );
        let (logger, stdout, stderr) = Logger::start(&shell(&script), "c", "ns", &shared()).await.unwrap();
        File::from(stdout).write_all(b"out\n").unwrap();
        File::from(stderr).write_all(b"err\n").unwrap();
        // Both ends have been seen; it goes on until it is told to end.
        while std::fs::read_to_string(&log).is_ok_and(|text| !text.ends_with("err\n")) {
            tokio::task::yield_now().await;
        }
        logger.stop().await;
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "ns/c\nout\nerr\nend\n");
        logger.stop().await;
    }

    #[tokio::test]
    async fn a_binary_that_fails_is_an_error() {
        let error = Logger::start(&shell("exit 3"), "c", "ns", &shared()).await.unwrap_err();
        assert!(matches!(error, BinaryError::Died { code: 3, .. }), "{error}");
        let missing = Binary { path: "/nonexistent".into(), arguments: Vec::new() };
        let error = Logger::start(&missing, "c", "ns", &shared()).await.unwrap_err();
        assert!(
            matches!(error, BinaryError::Spawn { .. }) && error.to_string().contains("/nonexistent"),
            "{error}"
        );
    }
}
