//! Asking a loader: one line of JSON each way, on a socket in the filesystem's state directory.
//!
//! The directory's path may be longer than a socket's address can be (108 bytes), so it is reached through a
//! descriptor of the directory.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::files::SOCKET;
use super::{LazyError, at};
use crate::state::InitRecord;

/// How long a loader may take to stop, or to load what it is loading.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a loader is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Load the small files in the memory cgroup of this process, and begin with the others; answer when the small ones
    /// are there, or with `all` when all are.
    Join { init: InitRecord, all: bool },
    /// Leave the container's cgroup, so that it can be frozen: memory is no longer charged to it. Answered once those who wait
    /// for a file now have it; come back when the connection is closed and nothing is frozen any more.
    Leave,
    /// Let nobody in any more, and end.
    Stop,
}

/// What it says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    Done,
    Failed { error: String },
}

/// Asks, and waits for the answer.
pub(crate) fn ask(directory: &Path, request: &Request) -> Result<Reply, LazyError> {
    converse(directory, request)?.0
}

/// The same, and stays connected, also if there is no answer.
pub(crate) fn converse(
    directory: &Path,
    request: &Request,
) -> Result<(Result<Reply, LazyError>, UnixStream), LazyError> {
    let failed = at("ask the loader at", directory);
    let (_open, path) = address(directory).map_err(&failed)?;
    let mut stream = UnixStream::connect(path).map_err(&failed)?;
    // A loader that waits for a disk is killed then, or left to itself.
    let patience = matches!(request, Request::Stop | Request::Leave).then_some(PATIENCE);
    stream.set_read_timeout(patience).map_err(&failed)?;
    send(&mut stream, request).map_err(&failed)?;
    let reply = receive(&stream).map_err(&failed);
    let gone = || LazyError::Gone { directory: directory.to_owned() };
    Ok((reply.and_then(|reply| reply.ok_or_else(gone)), stream))
}

/// Makes the socket.
pub(crate) fn listen(directory: &Path) -> Result<UnixListener, LazyError> {
    let failed = at("make the loader's socket in", directory);
    let (_open, path) = address(directory).map_err(&failed)?;
    UnixListener::bind(path).map_err(&failed)
}

fn address(directory: &Path) -> io::Result<(File, PathBuf)> {
    let open = File::open(directory)?;
    let path = format!("/proc/self/fd/{}/{SOCKET}", open.as_raw_fd()).into();
    Ok((open, path))
}

pub(crate) fn send<T: Serialize>(stream: &mut UnixStream, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message).expect("messages have string keys only");
    line.push(b'\n');
    stream.write_all(&line)
}

/// The next message; `None` if the other side is gone.
pub(crate) fn receive<T: for<'de> Deserialize<'de>>(stream: &UnixStream) -> io::Result<Option<T>> {
    let mut line = String::new();
    if BufReader::new(stream).read_line(&mut line)? == 0 {
        return Ok(None);
    }
    serde_json::from_str(&line).map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
