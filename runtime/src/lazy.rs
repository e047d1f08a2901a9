//! Restoring behind the start: a container runs while its files are still being loaded.
//!
//! ```text
//! prepare          names and attributes of the tree are built; a keeper is started
//!   keeper         closes the gate on each large file, starts the loader
//! set_init_pid     the loader joins the container's memory cgroup and loads the small files; create returns
//!   loader         loads the large ones: those that somebody waits for first, then those beside them
//! (all is loaded)  both end
//! remove           both are ended; whoever still waits gets EIO
//! ```
//!
//! Two processes for each filesystem that isn't complete yet, which need no shim: the *loader* does the work
//! ([`loader`]), the *keeper* answers who waits at the gate and starts another loader if that dies ([`keeper`]). Both have
//! every descriptor of the gate, and whoever made the sandbox, the shim, holds it too ([`HeldGate`]): nobody is let in to what isn't there,
//! whichever of them are killed, unless it is all three. They run this library's code in the program that
//! the caller names ([`run`]), and find what they need in the filesystem's state directory ([`files`]). Pages are
//! charged to the memory cgroup of the container, since the loader is in it; it isn't in the container's freezer, so a
//! paused container's files are loaded, too.
//!
//! A large file gets its pages without being written to, so that its times are right all the while; not on a filesystem with
//! huge pages, where they are put back when it is loaded.
//!
//! A checkpoint waits for none of them: it takes what isn't loaded from where it is loaded from ([`unloaded`]).
//!
//! Small files are loaded before the container's program runs, and before hooks that `runc create` runs in between ([`hook`]), since a
//! file behind the gate costs a descriptor and two messages. What a gate can't hold (files with inode flags; what there are no descriptors
//! for; all, where the kernel has no permission events) is taken for small.

mod channel;
pub(crate) mod control;
mod doors;
mod files;
mod keeper;
mod loader;
mod memory;
mod schedule;
mod unloaded;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{SigSet, Signal};
use oci_spec::runtime::State;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use stillframe_pgalloc::{LoadError, PagesMeta, can_install};
use stillframe_tmpfs::lazy::{HugePages, PendingFile, SmallFiles};

use crate::freezer::Cgroup;
use crate::process;
use crate::state::{InitRecord, StateDir};
pub use files::{LoadPhase, LoadStatus};
pub(crate) use files::{NAMES, PendingList};
pub(crate) use unloaded::unloaded;

/// Files with at least so many bytes of data are loaded behind the start. A smaller one is read in the time that the gate for it takes.
pub(crate) const LARGE: u64 = 64 * 1024;

/// When the files of a restored container are loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Load {
    /// Before `prepare` returns, by the calling process.
    #[default]
    InPrepare,
    /// By processes of their own, which run `program load DIRECTORY`: that has to call [`run`]. All of it before the
    /// container's program runs, if `eager`.
    Apart {
        /// The program.
        program: PathBuf,
        /// Whether nothing is left for later.
        eager: bool,
    },
}

/// A gate that nobody gets through but by its keeper's or loader's answer, for as long as this lives: to be kept by whoever made the
/// sandbox until that is gone. It costs a descriptor; once all is loaded, it stands for nothing.
#[derive(Debug)]
pub struct HeldGate(#[expect(dead_code, reason = "what counts is that it is open")] OwnedFd);

/// First argument with which a program is to call [`run`].
pub const ARGUMENT: &str = "load";
/// Second argument of a process that is run as a hook.
const HOOK: &str = "hook";

/// Why files can't be loaded behind the start.
#[derive(Debug, thiserror::Error)]
pub enum LazyError {
    /// A call on a file of the state failed.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of the state holds something else.
    #[error("{path} can't be decoded: something else writes to the state directory")]
    Decode {
        /// The file.
        path: PathBuf,
    },
    /// What the files are loaded from can't be read.
    #[error("read {path}")]
    Pages {
        /// The pages file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<LoadError>,
    },
    /// A process couldn't be started, or ended at once.
    #[error("start {program} to load the restored files")]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A process says that it can't.
    #[error("{0}")]
    Told(String),
    /// The processes are gone and not all files are loaded.
    #[error(
        "the processes that load the restored files in {directory} have died; remove the container and create it again"
    )]
    Gone {
        /// The filesystem's state directory.
        directory: PathBuf,
    },
}

fn at<'a>(operation: &'static str, path: &'a Path) -> impl Fn(io::Error) -> LazyError + 'a {
    move |source| LazyError::File { operation, path: path.to_owned(), source }
}

/// What is known of a filesystem before anything is loaded.
pub(crate) struct Fresh {
    /// The huge pages that its large files would get. Small ones get none: see `stillframe_tmpfs::huge`.
    pub(crate) huge: HugePages,
    /// Its size in bytes, if it is a tmpfs with one.
    pub(crate) size: Option<u64>,
}

/// Starts loading the large and the small files of the filesystem whose state directory is `directory`, from `pages` (at `pages_path`).
/// When this returns, nobody can read what isn't there; nothing is loaded before [`join`].
pub(crate) fn start(
    program: &Path,
    directory: &Path,
    (large, small): (Vec<PendingFile>, SmallFiles),
    fresh: Fresh,
    (pages, pages_path): (&File, &Path),
    meta: &PagesMeta,
) -> Result<Option<HeldGate>, LazyError> {
    // Huge pages come only by writing. It changes times for as long as a file is loaded.
    let quiet = can_install() && !fresh.huge.fit;
    let pages_path = pages_path.to_owned();
    let (huge, size) = (fresh.huge.option, fresh.size);
    files::prepare(directory, &PendingList { large, quiet, huge, size, pages_path }, &small, meta)?;
    let failed = |source| LazyError::Start { program: program.to_owned(), source };
    let mut child = Command::new(program)
        .args([OsStr::new(ARGUMENT), directory.as_os_str()])
        .stdin(Stdio::from(pages.try_clone().map_err(failed)?))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .current_dir("/")
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    let mut answer = String::new();
    let output = child.stdout.take().expect("it is piped");
    BufReader::new(output).read_line(&mut answer).map_err(failed)?;
    match answer.trim_end() {
        keeper::READY => Ok(hold(&child, directory)),
        "" => {
            // In a shim somebody else may have asked for its end already.
            let ended = child.wait().map_or_else(|_| "early".to_owned(), |status| format!("with {status}"));
            Err(LazyError::Told(format!("{} ended {ended}", program.display())))
        }
        told => Err(LazyError::Told(told.to_owned())),
    }
}

/// Holds the gate as well: where keeper and loader are both killed, who waits at it goes on waiting, and can be killed.
fn hold(keeper: &Child, directory: &Path) -> Option<HeldGate> {
    let group = files::processes(directory).ok().flatten()?.group?;
    let held = Pid::from_raw(keeper.id().cast_signed()).ok_or(Errno::SRCH).and_then(|pid| {
        let keeper = pidfd_open(pid, PidfdFlags::empty())?;
        pidfd_getfd(keeper, group, PidfdGetfdFlags::empty())
    });
    if let Err(error) = &held {
        tracing::warn!(%error, "should keeper and loader be killed at once, nobody holds the gate");
    }
    held.ok().map(HeldGate)
}

/// State directories of those of a container's `filesystems` for whose files it has to wait before its program runs: for the small ones,
/// which nothing keeps anybody from reading, or for `all`.
pub(crate) fn awaited(dir: &StateDir, filesystems: &[String], all: bool) -> Result<Vec<PathBuf>, LazyError> {
    let mut awaited = Vec::new();
    for name in filesystems {
        let directory = dir.filesystem_dir(name);
        let phase = status(&directory)?.map(|status| status.phase);
        if matches!(phase, Some(LoadPhase::Held | LoadPhase::Small)) || all && phase == Some(LoadPhase::Large)
        {
            awaited.push(directory);
        }
    }
    Ok(awaited)
}

/// Once the container has a process: loads the small files in its memory cgroup, and begins with the others; with `all`
/// waits for those, too.
pub(crate) fn join(directories: &[PathBuf], init: &InitRecord, all: bool) -> Result<(), LazyError> {
    let join = |directory: &Path| match control::ask(
        directory,
        &control::Request::Join { init: init.clone(), all },
    )? {
        control::Reply::Done => Ok(()),
        control::Reply::Failed { error } => Err(LazyError::Told(error)),
    };
    std::thread::scope(|scope| {
        let joining: Vec<_> =
            directories.iter().map(|directory| scope.spawn(move || join(directory))).collect();
        joining.into_iter().try_for_each(|thread| thread.join().expect("it doesn't panic"))
    })
}

/// The hook that loads the small files of filesystems that are [`awaited`] before other hooks of `runc create` can look at them: a
/// program, which is the keeper's own, and its arguments. `None` if there are none of these.
pub(crate) fn hook(directories: &[PathBuf]) -> Result<Option<(PathBuf, Vec<OsString>)>, LazyError> {
    let Some(first) = directories.first() else { return Ok(None) };
    let gone = || LazyError::Gone { directory: first.clone() };
    let keeper = files::processes(first)?.ok_or_else(gone)?.keeper.pid;
    let arguments = [OsStr::new("stillframe"), OsStr::new(ARGUMENT), OsStr::new(HOOK)];
    let arguments = arguments.into_iter().chain(directories.iter().map(|directory| directory.as_os_str()));
    Ok(Some((format!("/proc/{keeper}/exe").into(), arguments.map(OsStr::to_owned).collect())))
}

/// What the hook does, with the container's state on its standard input.
fn run_hook(directories: &[PathBuf]) -> Result<(), LazyError> {
    let told = |what: &str, error: &dyn std::fmt::Display| LazyError::Told(format!("{what}: {error}"));
    let state = serde_json::from_reader::<_, State>(io::stdin())
        .map_err(|error| told("read the container's state", &error))?;
    let pid = state.pid().ok_or_else(|| LazyError::Told("the container's state has no pid".to_owned()))?;
    let init = process::describe(pid).map_err(|error| told("look at the container's process", &error))?;
    join(directories, &init, false)
}

/// How far loading has come; `None` where nothing was to be loaded.
pub fn status(directory: &Path) -> Result<Option<LoadStatus>, LazyError> {
    files::Progress::open(directory)?.map(|progress| progress.read()).transpose()
}

/// Waits until all is loaded, or some of it can't be.
pub fn wait(directory: &Path) -> Result<Option<LoadStatus>, LazyError> {
    files::await_end(directory)?;
    status(directory)
}

/// Ends the processes. Whoever waits for a file gets EIO. `true` if everything was loaded.
pub(crate) fn stop(directory: &Path) -> Result<bool, LazyError> {
    let Some(status) = status(directory)? else { return Ok(true) };
    if let Err(error) = control::ask(directory, &control::Request::Stop) {
        tracing::debug!(directory = %directory.display(), %error, "the loader doesn't answer");
    }
    files::kill_processes(directory)?;
    Ok(status.phase == LoadPhase::Done && status.failed_files == 0)
}

/// Before containers of the sandbox are frozen: has the loaders leave their cgroups, where those are what is frozen. (A
/// loader could otherwise be frozen with an opener that waits for it, and such a freeze doesn't complete.) Who waits for a file when
/// this is called has it when it returns.
pub(crate) fn leave_cgroups(dir: &StateDir) -> Away {
    let mut away = Away::default();
    for id in dir.containers().unwrap_or_default() {
        let Ok(Some(container)) = dir.container(&id) else { continue };
        let cgroup = container.init.and_then(|init| init.cgroup);
        if !matches!(cgroup, Some(Cgroup::V2(_))) {
            continue;
        }
        for name in &container.filesystems {
            match leave(&dir.filesystem_dir(name)) {
                Ok(asked) => away.asked.extend(asked),
                Err(error) => {
                    tracing::warn!(container = id, %error, "a loader may be frozen with the container");
                }
            }
        }
    }
    away
}

/// For as long as it lives, loaders stay out of the cgroups that they were asked to leave: until what was frozen is thawed.
#[derive(Debug, Default)]
#[must_use]
pub struct Away {
    asked: Vec<UnixStream>,
}

fn leave(directory: &Path) -> Result<Option<UnixStream>, LazyError> {
    let loading = status(directory)?.is_some_and(|status| status.phase != LoadPhase::Done);
    if !loading {
        return Ok(None);
    }
    let (reply, asked) = control::converse(directory, &control::Request::Leave)?;
    if let Err(error) = reply {
        // It has left, and comes back if it isn't asked any more.
        let directory = directory.display();
        tracing::warn!(%directory, %error, "who waits for a restored file may keep the container from freezing");
    }
    Ok(Some(asked))
}

/// What the program does that [`start`] starts: `arguments` are those after [`ARGUMENT`]. Ends when all is loaded.
pub fn run(arguments: impl Iterator<Item = std::ffi::OsString>) -> std::process::ExitCode {
    let arguments: Vec<PathBuf> = arguments.map(PathBuf::from).collect();
    if let [hook, directories @ ..] = arguments.as_slice()
        && hook == Path::new(HOOK)
    {
        return match run_hook(directories) {
            Ok(()) => std::process::ExitCode::SUCCESS,
            Err(error) => {
                // runc shows it.
                eprintln!("{}", crate::cli::chain(&error));
                std::process::ExitCode::FAILURE
            }
        };
    }
    // Whoever waits at the gate depends on these processes: only what can't be blocked ends them. (The kernel sends SIGHUP by
    // itself to a stopped process whose parent dies.)
    let blocked = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM, Signal::SIGQUIT];
    let _ = blocked.into_iter().collect::<SigSet>().thread_block();
    let done = match arguments.as_slice() {
        [directory] => keeper::run(directory),
        [directory, loader] if loader == Path::new(loader::ARGUMENT) => {
            // Nobody reads what it prints.
            loader::run(directory)
                .inspect_err(|error| files::put_error(directory, 0, &crate::cli::chain(error)))
        }
        _ => Err(LazyError::Told("this command is for the runtime's own use: load DIRECTORY".to_owned())),
    };
    match done {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            // The keeper's standard output is read by who has started it.
            println!("{}", crate::cli::chain(&error));
            std::process::ExitCode::FAILURE
        }
    }
}
