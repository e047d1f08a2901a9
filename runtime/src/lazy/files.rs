//! What the loading of a filesystem has in that filesystem's state directory.
//!
//! | name | what |
//! | --- | --- |
//! | `load.list` | [`PendingList`] (postcard), written once |
//! | `load.small` | the small files, likewise: the keeper has no use for them, and they may be many |
//! | `load.meta` | the image's `pages.meta` |
//! | `load.json` | [`Processes`]: who loads, and by which descriptor numbers; replaced by rename |
//! | `load.joined` | the container's init process, once the loader was told |
//! | `load.progress` | [`Progress`]; a shared lock is to be had when loading has ended |
//! | `load.sock` | where the loader is asked ([`super::control`]) |
//! | `load.errors` | a line for each file that couldn't be loaded |
//!
//! `load.progress`: eight numbers of 64 bits, little-endian: phase, files, bytes, files loaded, bytes loaded, files failed, files that
//! are waited for, large files in the list; then a byte for each of those: 0 pending, 1 loaded, 2 failed, 3 being loaded; then 16 bytes
//! for each, which are zero but for those that are written to: their time of last modification before (seconds, nanoseconds + 1). Only the
//! loader writes it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::RawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use stillframe_pgalloc::PagesMeta;
use stillframe_tmpfs::lazy::{PendingFile, SmallFiles};

use super::{LazyError, at};
use crate::process;
use crate::state::InitRecord;

const LIST: &str = "load.list";
const SMALL: &str = "load.small";
const META: &str = "load.meta";
const PROCESSES: &str = "load.json";
const JOINED: &str = "load.joined";
const PROGRESS: &str = "load.progress";
pub(crate) const SOCKET: &str = "load.sock";
const ERRORS: &str = "load.errors";
/// All of them, to be removed with the filesystem.
pub(crate) const NAMES: [&str; 10] =
    [LIST, SMALL, META, PROCESSES, JOINED, PROGRESS, SOCKET, ERRORS, "load.json.new", "load.joined.new"];
/// Lines of errors that are kept.
const MAX_ERRORS: u64 = 100;

/// Files to load behind the start.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PendingList {
    /// Behind the gate, in the order of the image.
    pub(crate) large: Vec<PendingFile>,
    /// Whether the large ones get their pages without being written to.
    pub(crate) quiet: bool,
    /// The filesystem's option `huge=`, if it gives files huge pages by itself.
    pub(crate) huge: Option<String>,
    /// Bytes of the filesystem by its options, if it is a tmpfs with a size.
    pub(crate) size: Option<u64>,
    /// Where the pages file was, for errors.
    pub(crate) pages_path: PathBuf,
}

/// Who loads.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Processes {
    pub(crate) keeper: InitRecord,
    pub(crate) loader: Option<InitRecord>,
    /// Descriptors that the loader is executed with.
    pub(crate) group: Option<RawFd>,
    pub(crate) pages: RawFd,
    pub(crate) listener: RawFd,
    pub(crate) channel: RawFd,
    pub(crate) lock: RawFd,
    /// Of each large file; `None` if it was loaded, or failed.
    pub(crate) files: Vec<Option<RawFd>>,
}

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LoadPhase {
    /// The container has no process yet; nothing but what is waited for is loaded.
    Held,
    /// Before the start.
    Small,
    /// Behind the container.
    Large,
    /// Everything is loaded, or couldn't be.
    Done,
}

/// What has been loaded, and what hasn't.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LoadStatus {
    /// How far it has come.
    pub phase: LoadPhase,
    /// Files with contents.
    pub files: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Files that are complete.
    pub loaded_files: u64,
    /// Bytes of those.
    pub loaded_bytes: u64,
    /// Files that can't be loaded: who opens one gets EIO.
    pub failed_files: u64,
    /// Files that somebody waits for.
    pub waiting_files: u64,
    /// Why files failed; a hundred at most.
    pub errors: Vec<String>,
}

/// Writes the lists and what else is known before a process is started.
pub(crate) fn prepare(
    directory: &Path,
    list: &PendingList,
    small: &SmallFiles,
    meta: &PagesMeta,
) -> Result<(), LazyError> {
    let write = |name: &str, contents: &[u8]| {
        let path = directory.join(name);
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(contents)).map_err(at("write", &path))
    };
    write(LIST, &postcard::to_stdvec(list).expect("numbers and bytes only"))?;
    write(SMALL, &postcard::to_stdvec(small).expect("numbers and bytes only"))?;
    write(META, &meta.encode())?;
    let header = Header {
        files: (list.large.len() + small.len()) as u64,
        bytes: list.large.iter().map(PendingFile::bytes).sum::<u64>() + small.bytes(),
        large: list.large.len() as u64,
        ..Header::default()
    };
    let mut progress = header.encode().to_vec();
    progress.resize(HEADER + list.large.len(), PENDING);
    write(PROGRESS, &progress)
}

pub(crate) fn list(directory: &Path) -> Result<PendingList, LazyError> {
    decode(directory.join(LIST))
}

/// Files to load before the start.
pub(crate) fn small(directory: &Path) -> Result<SmallFiles, LazyError> {
    decode(directory.join(SMALL))
}

fn decode<T: DeserializeOwned>(path: PathBuf) -> Result<T, LazyError> {
    let bytes = fs::read(&path).map_err(at("read", &path))?;
    postcard::from_bytes(&bytes).map_err(|_| LazyError::Decode { path })
}

pub(crate) fn meta(directory: &Path) -> Result<PagesMeta, LazyError> {
    let path = directory.join(META);
    let bytes = fs::read(&path).map_err(at("read", &path))?;
    PagesMeta::decode(&bytes).map_err(|_| LazyError::Decode { path })
}

pub(crate) fn processes(directory: &Path) -> Result<Option<Processes>, LazyError> {
    read(&directory.join(PROCESSES))
}

pub(crate) fn put_processes(directory: &Path, processes: &Processes) -> Result<(), LazyError> {
    replace(&directory.join(PROCESSES), processes)
}

/// The container's init process, if it was told.
pub(crate) fn joined(directory: &Path) -> Result<Option<InitRecord>, LazyError> {
    read(&directory.join(JOINED))
}

pub(crate) fn put_joined(directory: &Path, init: &InitRecord) -> Result<(), LazyError> {
    replace(&directory.join(JOINED), init)
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, LazyError> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(at("read", path))?,
    };
    serde_json::from_slice(&text).map(Some).map_err(|_| LazyError::Decode { path: path.to_owned() })
}

fn replace<T: Serialize>(path: &Path, record: &T) -> Result<(), LazyError> {
    let new = path.with_extension(format!("{}.new", path.extension().unwrap_or_default().display()));
    let text = serde_json::to_vec(record).expect("records have string keys only");
    fs::write(&new, text).map_err(at("write", &new))?;
    fs::rename(&new, path).map_err(at("write", path))
}

/// Kills the processes (SIGKILL), the keeper first, since it would start another loader; and waits until they are gone.
pub(crate) fn kill_processes(directory: &Path) -> Result<(), LazyError> {
    let kill = |record: &InitRecord| {
        process::kill_and_wait(record).map_err(at("end the processes that load, of", directory))
    };
    if let Some(before) = processes(directory)? {
        kill(&before.keeper)?;
    }
    match processes(directory)?.and_then(|after| after.loader) {
        Some(loader) => kill(&loader),
        None => Ok(()),
    }
}

const HEADER: usize = 64;
/// Bytes of a time.
const MTIME: u64 = 16;
pub(crate) const PENDING: u8 = 0;
pub(crate) const LOADED: u8 = 1;
pub(crate) const FAILED: u8 = 2;
pub(crate) const LOADING: u8 = 3;

/// The numbers of `load.progress`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Header {
    pub(crate) phase: u64,
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    pub(crate) loaded_files: u64,
    pub(crate) loaded_bytes: u64,
    pub(crate) failed_files: u64,
    pub(crate) waiting_files: u64,
    pub(crate) large: u64,
}

impl Header {
    fn encode(&self) -> [u8; HEADER] {
        let Self { phase, files, bytes, loaded_files, loaded_bytes, failed_files, waiting_files, large } =
            *self;
        let numbers = [phase, files, bytes, loaded_files, loaded_bytes, failed_files, waiting_files, large];
        let mut encoded = [0; HEADER];
        for (field, number) in encoded.chunks_exact_mut(8).zip(numbers) {
            field.copy_from_slice(&number.to_le_bytes());
        }
        encoded
    }

    fn decode(encoded: &[u8; HEADER]) -> Self {
        let mut numbers =
            encoded.chunks_exact(8).map(|field| u64::from_le_bytes(field.try_into().expect("eight bytes")));
        let mut next = || numbers.next().expect("eight numbers");
        Self {
            phase: next(),
            files: next(),
            bytes: next(),
            loaded_files: next(),
            loaded_bytes: next(),
            failed_files: next(),
            waiting_files: next(),
            large: next(),
        }
    }

    /// The phase, which is a number in the file.
    pub(crate) fn phase(&self) -> Option<LoadPhase> {
        [LoadPhase::Held, LoadPhase::Small, LoadPhase::Large, LoadPhase::Done]
            .into_iter()
            .find(|phase| *phase as u64 == self.phase)
    }
}

/// `load.progress`.
#[derive(Debug)]
pub(crate) struct Progress {
    file: File,
    directory: PathBuf,
}

impl Progress {
    /// Opens it; `None` where there is none.
    pub(crate) fn open(directory: &Path) -> Result<Option<Self>, LazyError> {
        let path = directory.join(PROGRESS);
        match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            other => {
                Ok(Some(Self { file: other.map_err(at("open", &path))?, directory: directory.to_owned() }))
            }
        }
    }

    pub(crate) fn header(&self) -> io::Result<Header> {
        let mut encoded = [0; HEADER];
        self.file.read_exact_at(&mut encoded, 0)?;
        Ok(Header::decode(&encoded))
    }

    pub(crate) fn put_header(&self, header: &Header) -> io::Result<()> {
        self.file.write_all_at(&header.encode(), 0)
    }

    /// States of the large files.
    pub(crate) fn states(&self) -> io::Result<Vec<u8>> {
        let length = self.file.metadata()?.len().saturating_sub(HEADER as u64);
        let mut states = vec![0; length.min(self.header()?.large) as usize];
        self.file.read_exact_at(&mut states, HEADER as u64)?;
        Ok(states)
    }

    /// State of a large file.
    pub(crate) fn state(&self, index: usize) -> io::Result<u8> {
        let mut state = [0];
        self.file.read_exact_at(&mut state, (HEADER + index) as u64)?;
        Ok(state[0])
    }

    /// What a large file's time of last modification was before it was written to, if it was.
    pub(crate) fn mtime(&self, index: usize) -> io::Result<Option<(i64, u32)>> {
        let mut encoded = [0; MTIME as usize];
        match self.file.read_exact_at(&mut encoded, self.mtime_at(index)?) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        let (seconds, nanoseconds) = encoded.split_at(8);
        let seconds = i64::from_le_bytes(seconds.try_into().expect("eight bytes"));
        let nanoseconds = u64::from_le_bytes(nanoseconds.try_into().expect("eight bytes"));
        Ok(nanoseconds.checked_sub(1).map(|nanoseconds| (seconds, nanoseconds as u32)))
    }

    pub(crate) fn put_mtime(&self, index: usize, (seconds, nanoseconds): (i64, u32)) -> io::Result<()> {
        let mut encoded = [0; MTIME as usize];
        encoded[..8].copy_from_slice(&seconds.to_le_bytes());
        encoded[8..].copy_from_slice(&(u64::from(nanoseconds) + 1).to_le_bytes());
        self.file.write_all_at(&encoded, self.mtime_at(index)?)
    }

    fn mtime_at(&self, index: usize) -> io::Result<u64> {
        Ok(HEADER as u64 + self.header()?.large + index as u64 * MTIME)
    }

    pub(crate) fn put_state(&self, index: usize, state: u8) -> io::Result<()> {
        self.file.write_all_at(&[state], (HEADER + index) as u64)
    }

    pub(crate) fn read(&self) -> Result<LoadStatus, LazyError> {
        let path = self.directory.join(PROGRESS);
        let header = self.header().map_err(at("read", &path))?;
        let phase = header.phase().ok_or(LazyError::Decode { path })?;
        let errors = fs::read_to_string(self.directory.join(ERRORS)).unwrap_or_default();
        Ok(LoadStatus {
            phase,
            files: header.files,
            bytes: header.bytes,
            loaded_files: header.loaded_files,
            loaded_bytes: header.loaded_bytes,
            failed_files: header.failed_files,
            waiting_files: header.waiting_files,
            errors: errors.lines().map(str::to_owned).collect(),
        })
    }
}

/// Takes note of why a file isn't loaded; `number` counts them.
pub(crate) fn put_error(directory: &Path, number: u64, error: &str) {
    if number > MAX_ERRORS {
        return;
    }
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(directory.join(ERRORS));
    // There is nobody to tell.
    let _ = file.and_then(|mut file| writeln!(file, "{}", error.replace('\n', " ")));
}

/// The lock that is held while files are being loaded: as long as anybody has the descriptor.
pub(crate) fn lock_progress(directory: &Path) -> Result<Flock<File>, LazyError> {
    flock(directory, FlockArg::LockExclusiveNonblock)
}

/// Waits until nothing is being loaded any more.
pub(crate) fn await_end(directory: &Path) -> Result<(), LazyError> {
    match flock(directory, FlockArg::LockShared) {
        Err(LazyError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map(drop),
    }
}

fn flock(directory: &Path, how: FlockArg) -> Result<Flock<File>, LazyError> {
    let path = directory.join(PROGRESS);
    let file = File::open(&path).map_err(at("open", &path))?;
    Flock::lock(file, how).map_err(|(_, error)| at("lock", &path)(error.into()))
}
