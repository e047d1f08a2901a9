//! `ctr` (or any other command line program) with captured output, a deadline, and errors that tell all.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// How long one command may take: far more than any does, so that a hang becomes an error.
pub const DEADLINE: Duration = Duration::from_secs(180);

/// A command that failed, or couldn't be run: what it was, how it ended, what it said.
#[derive(thiserror::Error)]
pub struct CtrError {
    /// The command line.
    pub command: String,
    /// Exit status, signal or error of starting it, in words.
    pub status: String,
    /// The exit code, if it ended by itself.
    pub code: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl fmt::Display for CtrError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}`: {}\nstderr: {}\nstdout: {}",
            self.command,
            self.status,
            self.stderr.trim(),
            self.stdout.trim()
        )
    }
}

/// As `Display`: it's what `unwrap` in a test prints.
impl fmt::Debug for CtrError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a command that ended well wrote.
#[derive(Debug, Clone)]
pub struct Said {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// `ctr` with the address and the namespace of one containerd.
#[derive(Debug, Clone)]
pub struct Ctr {
    /// The program.
    pub program: PathBuf,
    /// The socket.
    pub address: PathBuf,
    /// containerd's namespace.
    pub namespace: String,
}

impl Ctr {
    /// The command `ctr ARGUMENTS`, not yet started.
    pub fn command<S: AsRef<str>>(&self, arguments: &[S]) -> Command {
        let mut command = with_deadline(&self.program);
        command.arg("--address").arg(&self.address).arg("--namespace").arg(&self.namespace);
        command.args(arguments.iter().map(AsRef::as_ref));
        command
    }

    /// Runs `ctr ARGUMENTS` to its end. Fails when its status isn't 0, or after [`DEADLINE`].
    pub fn run<S: AsRef<str>>(&self, arguments: &[S]) -> Result<Said, CtrError> {
        run(&mut self.command(arguments))
    }
}

/// `program` under timeout(1), which kills it after [`DEADLINE`].
pub fn with_deadline(program: &Path) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--foreground", "--kill-after=5"]).arg(DEADLINE.as_secs().to_string()).arg(program);
    command
}

/// Runs a command to its end with nothing on standard input.
pub fn run(command: &mut Command) -> Result<Said, CtrError> {
    let line = command_line(command);
    let failed = |status: String| CtrError {
        command: line.clone(),
        status,
        code: None,
        stdout: String::new(),
        stderr: String::new(),
    };
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(format!("can't be started: {error}")))?;
    drop(child.stdin.take());
    let output = child.wait_with_output().map_err(|error| failed(format!("can't be waited for: {error}")))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        return Ok(Said { stdout, stderr });
    }
    let code = output.status.code();
    let status = match code {
        Some(124 | 137) => format!("{} (124, 137: timed out after {DEADLINE:?})", output.status),
        _ => output.status.to_string(),
    };
    Err(CtrError { command: line, status, code, stdout, stderr })
}

/// The words of a command, for messages.
fn command_line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// A command that runs on while the test goes on; killed when dropped.
#[derive(Debug)]
pub struct Background {
    line: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    stderr: Option<thread::JoinHandle<String>>,
}

impl Background {
    /// Starts it with both ends of its standard input and output in our hands.
    pub fn start(command: &mut Command) -> Result<Self, CtrError> {
        let line = command_line(command);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(
                |error| CtrError {
                    command: line.clone(),
                    status: format!("can't be started: {error}"),
                    code: None,
                    stdout: String::new(),
                    stderr: String::new(),
                },
            )?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("it was piped");
        let mut stderr = child.stderr.take().expect("it was piped");
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned()).is_err() {
                    break;
                }
            }
        });
        let stderr = thread::spawn(move || {
            let mut text = Vec::new();
            // What was read until an error is still worth showing.
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Ok(Self { line, child, stdin, lines, stderr: Some(stderr) })
    }

    /// Writes to its standard input.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), CtrError> {
        let stdin = self.stdin.as_mut().expect("standard input is still open");
        match stdin.write_all(bytes).and_then(|()| stdin.flush()) {
            Ok(()) => Ok(()),
            Err(error) => Err(self.failed(format!("takes no input: {error}"))),
        }
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// The next line of its standard output that `wanted` accepts; earlier ones are dropped.
    pub fn expect_line(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> Result<String, CtrError> {
        let end = Instant::now() + DEADLINE;
        let mut seen = Vec::new();
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) if wanted(&line) => return Ok(line),
                Ok(line) => seen.push(line),
                Err(reason) => {
                    let reason = match reason {
                        RecvTimeoutError::Timeout => format!("didn't say {what} within {DEADLINE:?}"),
                        RecvTimeoutError::Disconnected => format!("ended without saying {what}"),
                    };
                    let mut error = self.failed(reason);
                    error.stdout = seen.join("\n");
                    return Err(error);
                }
            }
        }
    }

    /// Waits for its end; gives the exit code, or an error when it was killed.
    pub fn wait(mut self) -> Result<(i32, Said), CtrError> {
        self.stdin = None;
        let status = self.child.wait();
        let stdout = self.lines.iter().collect::<Vec<_>>().join("\n");
        let stderr = self.stderr_text();
        match status.map(|status| status.code()) {
            Ok(Some(code)) => Ok((code, Said { stdout, stderr })),
            other => Err(CtrError {
                command: self.line.clone(),
                status: format!("{other:?}"),
                code: None,
                stdout,
                stderr,
            }),
        }
    }

    /// The process, for signals.
    pub fn pid(&self) -> i32 {
        self.child.id().try_into().expect("Linux's process ids are positive ints")
    }

    fn stderr_text(&mut self) -> String {
        self.stderr.take().map(|thread| thread.join().expect("reading doesn't panic")).unwrap_or_default()
    }

    fn failed(&mut self, status: String) -> CtrError {
        self.stop();
        let stderr = self.stderr_text();
        CtrError { command: self.line.clone(), status, code: None, stdout: String::new(), stderr }
    }

    /// timeout(1) is asked first, since it passes the signal on; killed, it would leave the command behind.
    fn stop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let pid = nix::unistd::Pid::from_raw(self.pid());
            // Gone in this moment: then there is nothing to stop.
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = self.child.wait();
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.stop();
    }
}
