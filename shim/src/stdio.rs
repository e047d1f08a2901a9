//! A process's stdin, stdout and stderr between runc and what containerd asked for.
//!
//! | asked for             | the process gets | who moves the bytes                              |
//! |-----------------------|------------------|--------------------------------------------------|
//! | nothing               | /dev/null        | nobody                                           |
//! | fifos                 | pipes            | containerd-shim's `IoTasks`, holding both ends open |
//! | `file://`             | pipes            | a task that appends                              |
//! | `binary://`           | pipes            | the logging binary itself                        |
//! | a terminal            | a pty            | as above, from the pty                           |
//!
//! Life: [`ProcessIo::open`] before runc is called, [`ProcessIo::attach`] when runc has succeeded, [`ProcessIo::shutdown`] when the
//! process is deleted; [`ProcessIo::abort`] where runc failed. The fifos' other ends are held by this process, so a restart of
//! containerd gives the container no EPIPE.
//!
//! A container's pipe is never the log file itself: it could truncate it.

pub mod binary;
pub mod console;
pub mod uri;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim::io::{IoTasks, Pty, Stdio};
use runc::io::{Io, IoOption, NullIo, PipedIo};
use tokio::io::AsyncRead;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

use self::binary::{BinaryError, Logger};
use self::console::ConsoleSocket;
use self::uri::{Target, UnknownScheme};
use crate::reaper::Reaper;

/// How long a deleted process's output may take to be written to a file; for fifos containerd-shim has the same limit.
const DRAIN: Duration = Duration::from_secs(10);

/// Why a process's stdio can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The URI's scheme.
    #[error(transparent)]
    Scheme(#[from] UnknownScheme),
    /// `binary://`.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// A pipe, a file or a terminal.
    #[error("{what} can't be opened")]
    Open {
        /// Which.
        what: String,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// A fifo.
    #[error("the fifo {path} can't be connected")]
    Fifo {
        /// Its path.
        path: String,
        /// What failed.
        #[source]
        source: containerd_shim::Error,
    },
}

/// Who the process is, for its pipes and its logging binary.
#[derive(Debug)]
pub struct Owner<'a> {
    /// The container's id, or the exec's.
    pub id: &'a str,
    /// containerd's namespace.
    pub namespace: &'a str,
    /// Owner of the pipes (options IoUid, IoGid).
    pub uid: u32,
    /// Their group.
    pub gid: u32,
}

/// See the module's documentation.
pub struct ProcessIo {
    stdio: Stdio,
    targets: Targets,
    tasks: IoTasks,
    files: Mutex<Vec<JoinHandle<()>>>,
    console: Mutex<Option<ConsoleSocket>>,
    pty: Mutex<Option<Pty>>,
    driver: Mutex<Option<Arc<dyn Io>>>,
    logger: Option<Logger>,
    /// The logging binary's stdin for what a terminal says.
    logger_input: Mutex<Option<OwnedFd>>,
}

impl std::fmt::Debug for ProcessIo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProcessIo").field("stdio", &self.stdio).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Targets {
    stdout: Option<Target>,
    stderr: Option<Target>,
}

impl ProcessIo {
    /// Makes what runc needs: pipes, a console socket, a logging binary that runs.
    pub async fn open(stdio: &Stdio, owner: &Owner<'_>, reaper: &Arc<Reaper>) -> Result<Self, StdioError> {
        let targets = Targets::new(stdio)?;
        let mut io = Self {
            stdio: stdio.clone(),
            targets,
            tasks: IoTasks::default(),
            files: Mutex::default(),
            console: Mutex::default(),
            pty: Mutex::default(),
            driver: Mutex::default(),
            logger: None,
            logger_input: Mutex::default(),
        };
        let mut streams = None;
        if let Some(Target::Binary(binary)) = &io.targets.stdout {
            let (logger, stdout, stderr) = Logger::start(binary, owner.id, owner.namespace, reaper).await?;
            io.logger = Some(logger);
            streams = Some((stdout, stderr));
        }
        if stdio.terminal {
            io.console = Mutex::new(Some(ConsoleSocket::bind().map_err(open("the console socket"))?));
            io.logger_input = Mutex::new(streams.map(|(stdout, _)| stdout));
            return Ok(io);
        }
        let driver: Arc<dyn Io> = match streams {
            Some((stdout, stderr)) => {
                let stdin =
                    IoOption { open_stdin: !stdio.stdin.is_empty(), open_stdout: false, open_stderr: false };
                let stdin = PipedIo::new(owner.uid, owner.gid, &stdin).map_err(open("a pipe"))?;
                Arc::new(LoggedIo { stdin, output: Mutex::new(Some((stdout, stderr))) })
            }
            None if stdio.is_null() => Arc::new(NullIo {}),
            None => {
                let wanted = IoOption {
                    open_stdin: !stdio.stdin.is_empty(),
                    open_stdout: !stdio.stdout.is_empty(),
                    open_stderr: !stdio.stderr.is_empty(),
                };
                Arc::new(PipedIo::new(owner.uid, owner.gid, &wanted).map_err(open("a pipe"))?)
            }
        };
        io.driver = Mutex::new(Some(driver));
        Ok(io)
    }

    /// What runc's command is given; `None` for a terminal.
    pub fn driver(&self) -> Option<Arc<dyn Io>> {
        lock(&self.driver).clone()
    }

    /// For `--console-socket`.
    pub fn console_socket(&self) -> Option<PathBuf> {
        lock(&self.console).as_ref().map(ConsoleSocket::path)
    }

    /// Starts moving bytes: runc has created the process.
    pub async fn attach(&self) -> Result<(), StdioError> {
        // The socket goes with its last use.
        let console = lock(&self.console).take();
        if let Some(console) = console {
            let pty = console.receive().await.map_err(open("the terminal"))?;
            *lock(&self.pty) = Some(pty.clone());
            if !self.stdio.stdin.is_empty() {
                self.tasks.copy_from_fifo(&self.stdio.stdin, pty.clone()).map_err(fifo(&self.stdio.stdin))?;
            }
            return self.copy_terminal(pty).await;
        }
        let Some(driver) = lock(&self.driver).take() else { return Ok(()) };
        if let Some(stdin) = driver.stdin() {
            self.tasks.copy_from_fifo(&self.stdio.stdin, stdin).map_err(fifo(&self.stdio.stdin))?;
        }
        if let (Some(stdout), Some(target)) = (driver.stdout(), &self.targets.stdout) {
            self.copy(stdout, target).await?;
        }
        if let (Some(stderr), Some(target)) = (driver.stderr(), &self.targets.stderr) {
            self.copy(stderr, target).await?;
        }
        Ok(())
    }

    async fn copy_terminal(&self, pty: Pty) -> Result<(), StdioError> {
        let logger = lock(&self.logger_input).take();
        match (&self.targets.stdout, logger) {
            (Some(Target::Binary(_)), Some(input)) => {
                let input = pipe::Sender::from_owned_fd(input).map_err(open("the logging binary's pipe"))?;
                self.spawn_copy(pty, input);
                Ok(())
            }
            (Some(target), _) => self.copy(pty, target).await,
            (None, _) => Ok(()),
        }
    }

    async fn copy(
        &self,
        from: impl AsyncRead + Send + Unpin + 'static,
        to: &Target,
    ) -> Result<(), StdioError> {
        let path = match to {
            Target::Path(path) if is_fifo(path) => {
                let path = path.display().to_string();
                return self.tasks.copy_to_fifo(from, &path).map_err(fifo(&path));
            }
            Target::Path(path) | Target::File(path) => path,
            Target::Binary(_) => return Ok(()),
        };
        let file =
            append(path, matches!(to, Target::File(_))).await.map_err(open(&path.display().to_string()))?;
        self.spawn_copy(from, file);
        Ok(())
    }

    fn spawn_copy(
        &self,
        mut from: impl AsyncRead + Send + Unpin + 'static,
        mut to: impl tokio::io::AsyncWrite + Send + Unpin + 'static,
    ) {
        let copy = tokio::spawn(async move {
            let copied = tokio::io::copy(&mut from, &mut to).await;
            // A terminal that hangs up says EIO.
            match copied {
                Err(error) if error.raw_os_error() != Some(libc::EIO) => {
                    tracing::warn!(%error, "a container's output is lost");
                }
                _ => drop(tokio::io::AsyncWriteExt::flush(&mut to).await),
            }
        });
        lock(&self.files).push(copy);
    }

    /// Sets the terminal's size; without a terminal there is nothing to do.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        match &*lock(&self.pty) {
            Some(pty) => {
                let size =
                    rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
                Ok(rustix::termios::tcsetwinsize(pty, size)?)
            }
            None => Ok(()),
        }
    }

    /// containerd has no more input: the process sees the end once what was written is read.
    pub fn close_input(&self) {
        self.tasks.close_input();
    }

    /// Delivers what the dead process has written, then lets go of everything.
    pub async fn shutdown(&self) {
        let files = std::mem::take(&mut *lock(&self.files));
        let deadline = tokio::time::Instant::now() + DRAIN;
        for mut copy in files {
            if tokio::time::timeout_at(deadline, &mut copy).await.is_err() {
                tracing::warn!("a process's output is still held open, giving up on it");
                copy.abort();
            }
        }
        self.tasks.shutdown().await;
        lock(&self.pty).take();
        if let Some(logger) = &self.logger {
            logger.stop().await;
        }
    }

    /// runc failed: nothing will be delivered.
    pub async fn abort(&self) {
        lock(&self.console).take();
        lock(&self.driver).take();
        lock(&self.logger_input).take();
        lock(&self.pty).take();
        for copy in std::mem::take(&mut *lock(&self.files)) {
            copy.abort();
        }
        self.tasks.abort().await;
        if let Some(logger) = &self.logger {
            logger.stop().await;
        }
    }
}

impl Targets {
    fn new(stdio: &Stdio) -> Result<Self, UnknownScheme> {
        let parse = |uri: &str| if uri.is_empty() { Ok(None) } else { uri::parse(uri).map(Some) };
        let (stdout, stderr) = (parse(&stdio.stdout)?, parse(&stdio.stderr)?);
        Ok(match (stdout, stderr) {
            // A file is for both, as a binary is.
            (Some(Target::File(path)), Some(_)) => {
                Self { stdout: Some(Target::File(path.clone())), stderr: Some(Target::File(path)) }
            }
            (stdout, stderr) => Self { stdout, stderr },
        })
    }
}

/// Pipes whose reading ends a logging binary has.
#[derive(Debug)]
struct LoggedIo {
    stdin: PipedIo,
    output: Mutex<Option<(OwnedFd, OwnedFd)>>,
}

#[async_trait]
impl Io for LoggedIo {
    fn stdin(&self) -> Option<Box<dyn tokio::io::AsyncWrite + Send + Sync + Unpin>> {
        self.stdin.stdin()
    }

    async fn set(&self, command: &mut runc::Command) -> io::Result<()> {
        self.stdin.set(command).await?;
        if let Some((stdout, stderr)) = &*lock(&self.output) {
            command.stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
        }
        Ok(())
    }

    async fn close_after_start(&self) {
        lock(&self.output).take();
    }
}

fn is_fifo(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    // A path that isn't there gets its error from the fifo's code, as containerd-shim-runc-v2 does.
    path.metadata().map_or(true, |metadata| metadata.file_type().is_fifo())
}

async fn append(path: &Path, make: bool) -> io::Result<tokio::fs::File> {
    if let (true, Some(parent)) = (make, path.parent()) {
        tokio::fs::create_dir_all(parent).await?;
    }
    tokio::fs::OpenOptions::new().append(true).create(make).mode(0o644).open(path).await
}

fn open(what: &str) -> impl Fn(io::Error) -> StdioError {
    move |source| StdioError::Open { what: what.to_string(), source }
}

fn fifo(path: &str) -> impl Fn(containerd_shim::Error) -> StdioError {
    move |source| StdioError::Fifo { path: path.to_string(), source }
}

/// No code panics while it holds one of these locks.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("stdio is never left half-changed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reaper::tests::shared;

    const OWNER: Owner<'_> = Owner { id: "c", namespace: "ns", uid: 0, gid: 0 };

    /// Runs `script` with the stdio as runc would be run, then deletes the process.
    async fn run(stdio: &Stdio, script: &str) {
        let io = ProcessIo::open(stdio, &OWNER, &shared()).await.unwrap();
        let mut command = runc::Command::new("sh");
        command.args(["-c", script]);
        let driver = io.driver().unwrap();
        driver.set(&mut command).await.unwrap();
        let (_, exit) = shared().spawn(command.as_std_mut()).unwrap();
        drop(command);
        driver.close_after_start().await;
        drop(driver);
        // What it has written is in its pipes still.
        assert_eq!(exit.await.unwrap().code(), 0);
        io.attach().await.unwrap();
        io.shutdown().await;
    }

    #[tokio::test]
    async fn a_file_has_both_streams_appended_when_the_process_is_deleted() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("new/log");
        let uri = format!("file://{}", log.display());
        let stdio = Stdio::new("", &uri, &uri, false);
        run(&stdio, "echo out; echo err >&2").await;
        run(&stdio, "head -c 60000 /dev/zero | tr '\\0' x").await;
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(text.contains("out\n") && text.contains("err\n"));
        assert_eq!(text.len(), 8 + 60_000);
    }

    #[tokio::test]
    async fn a_plain_file_is_appended_to_as_well() {
        let log = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&log, "before\n").unwrap();
        run(&Stdio::new("", log.path().to_str().unwrap(), "", false), "echo out").await;
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "before\nout\n");
    }

    #[tokio::test]
    async fn stdio_that_nobody_wants_is_null() {
        run(&Stdio::default(), "echo into the void; echo error >&2").await;
    }
}
