//! One private containerd: root, state, socket, configuration, namespace of its own.
//!
//! It is started by a [`watchdog`] that outlives this process and removes every trace. States: *starting*
//! until the socket answers, *running*, and *gone* after [`Containerd::stop`] or drop. Starting fails with the end of
//! containerd's log; a test that panics shows it, too.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, Once};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::config::{self, Services};
use crate::container::ContainerSpec;
use crate::ctr::{Ctr, CtrError, run};
use crate::image::{self, ImageError};
use crate::residue::{Residue, descendants};
use crate::watchdog::{self, Plan};
use crate::{ContainerdVersion, binaries, residue};

/// How long containerd may take until its socket answers.
const START: Duration = Duration::from_secs(60);

/// How long what a container leaves may take to go after the command that removes it.
const SETTLE: Duration = Duration::from_secs(10);

/// The namespace of everything that is done through CRI, on every containerd.
const CRI_NAMESPACE: &str = "k8s.io";

/// Why there is no containerd.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A program isn't installed.
    #[error("{0} isn't installed: scripts/setup installs it")]
    Missing(&'static str),
    /// The directory, the configuration or the watchdog.
    #[error("{path}: {source}")]
    Io {
        /// The file or program.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// It ended, or its socket doesn't answer.
    #[error("containerd isn't ready: {reason}; the end of its log:\n{log}")]
    NotReady {
        /// What was waited for.
        reason: String,
        /// Its last lines.
        log: String,
    },
    /// The test image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// `ctr` can't talk to it.
    #[error("containerd is started but doesn't work")]
    Ctr(#[from] CtrError),
}

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    plan: Plan,
    ctr: Ctr,
    watchdog: u32,
    /// Every id that was given out: the names of the shims' sockets are made of them.
    ids: Mutex<BTreeSet<String>>,
    stopped: bool,
}

impl Containerd {
    /// Starts the installed containerd with the test image in it.
    pub fn start() -> Result<Self, StartError> {
        Self::start_version(&ContainerdVersion::installed()?)
    }

    /// Starts the given containerd with the test image in it.
    pub fn start_version(version: &ContainerdVersion) -> Result<Self, StartError> {
        Self::start_with(version, Services::Tasks)
    }

    /// Starts the given containerd with more than `ctr` needs.
    pub fn start_with(version: &ContainerdVersion, services: Services) -> Result<Self, StartError> {
        static INSTANCES: AtomicU32 = AtomicU32::new(0);
        clean_up_on_signals();
        if binaries::find("runc").is_none() {
            return Err(StartError::Missing("runc"));
        }
        let namespace = format!("sf-{}-{}", std::process::id(), INSTANCES.fetch_add(1, Ordering::Relaxed));
        // Short: a socket's path ends after 107 bytes. Not in TMPDIR, which may be long, or on tmpfs.
        let dir = tempfile::Builder::new().prefix("sf-").tempdir_in("/tmp").map_err(at("/tmp"))?.keep();
        let plan = plan(version, services, &dir, &namespace)?;
        let watchdog = start_watchdog(&plan)?;
        let namespace = plan.namespace.clone();
        let ctr = Ctr { program: version.ctr.clone(), address: dir.join("c.sock"), namespace };
        let containerd = Self { plan, ctr, watchdog, ids: Mutex::default(), stopped: false };
        containerd.await_socket()?;
        containerd.ctr.run(&["version"])?;
        let image = dir.join("image.tar");
        image::build(&image)?;
        containerd.ctr.run(&["images", "import", &image.to_string_lossy()])?;
        Ok(containerd)
    }

    /// Its client.
    pub fn ctr(&self) -> &Ctr {
        &self.ctr
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.plan.namespace
    }

    /// Its directory; a test's own files may be put into it, and go with it.
    pub fn dir(&self) -> &Path {
        &self.plan.dir
    }

    /// A container's id that is unique on the machine.
    pub fn id(&self, name: &str) -> String {
        let id = format!("{}-{name}", self.plan.cgroup);
        self.ids.lock().expect("nobody panics while holding it").insert(id.clone());
        id
    }

    /// Takes note of an id that containerd has given to a pod or container, so that what it leaves behind is found.
    pub fn know(&self, id: &str) -> io::Result<()> {
        self.ids.lock().expect("nobody panics while holding it").insert(id.to_owned());
        let file = fs::File::options().create(true).append(true).open(residue::ids_file(self.dir()));
        file?.write_all(format!("{id}\n").as_bytes())
    }

    /// The cgroup, in each hierarchy, that the containers' cgroups are in.
    pub fn cgroup(&self) -> &str {
        &self.plan.cgroup
    }

    /// Ends containerd, with [`watchdog::TERMINATE`] or [`watchdog::KILL`], and starts it again. Shims live on.
    pub fn restart(&self, how: &str) -> Result<(), StartError> {
        let mut all = WATCHDOGS.lock().expect("nobody panics while holding it");
        let watchdog =
            all.iter_mut().find(|one| one.child.id() == self.watchdog).expect("it lives until stop");
        writeln!(watchdog.stdin, "{how}").map_err(at("stillframe-watchdog"))?;
        watchdog.started(&self.plan)?;
        drop(all);
        self.await_socket()?;
        self.ctr.run(&["version"])?;
        Ok(())
    }

    /// The start of a container of this name.
    pub fn container(&self, name: &str) -> ContainerSpec<'_> {
        ContainerSpec::new(self, name)
    }

    /// What there is of containers now: nothing, when all have been removed.
    pub fn residue(&self) -> Residue {
        let mut residue = Residue::of(&self.plan, self.watchdog);
        residue.files.extend(self.shim_sockets().iter().map(|path| path.display().to_string()));
        residue
    }

    /// Sockets of shims, of the containers that got their ids here.
    pub fn shim_sockets(&self) -> Vec<PathBuf> {
        let ids = self.ids.lock().expect("nobody panics while holding it");
        let sockets = ids.iter().map(|id| residue::shim_socket(&self.ctr.address, self.namespace(), id));
        sockets.filter(|path| path.exists()).collect()
    }

    /// As [`Self::residue`], after waiting for it to become empty: the last process of a container may end
    /// a moment after the command that removed it, and there is no event for it that reaches us.
    pub fn settled_residue(&self) -> Residue {
        let deadline = Instant::now() + SETTLE;
        loop {
            let residue = self.residue();
            if residue.is_empty() || Instant::now() > deadline {
                return residue;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Nothing is left of any container: see [`Self::settled_residue`].
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let residue = self.settled_residue();
        assert!(residue.is_empty(), "left behind:\n{residue}");
    }

    /// The processes of shims (not of their containers), by the name of their program.
    pub fn shims(&self) -> Vec<residue::Process> {
        let mut all = descendants(self.watchdog);
        all.retain(|process| {
            // Those that load restored files are the same program.
            process.exe.file_name().is_some_and(|name| name.to_string_lossy().starts_with("containerd-shim-"))
                && process.command.split_whitespace().nth(1) != Some("load")
        });
        all
    }

    /// The end of containerd's log, where the shims' messages are, too.
    pub fn log(&self) -> String {
        tail(&self.plan.log, 60)
    }

    /// Runs `stillframe ARGUMENTS`.
    pub fn stillframe(&self, arguments: &[&str]) -> Result<crate::ctr::Said, CtrError> {
        run(crate::ctr::with_deadline(&binaries::program("stillframe")).args(arguments))
    }

    /// Ends it and removes everything. An error is what couldn't be removed, as one text.
    pub fn stop(mut self) -> Result<(), String> {
        self.stopped = true;
        release(self.watchdog)
    }

    /// containerd's own process. Panics when it has ended, which no test survives.
    pub fn pid(&self) -> nix::unistd::Pid {
        let daemon = self.daemon().unwrap_or_else(|| panic!("containerd has ended:\n{}", self.log()));
        nix::unistd::Pid::from_raw(daemon.pid)
    }

    /// How many descriptors containerd's own process has.
    pub fn descriptors(&self) -> usize {
        let directory = format!("/proc/{}/fd", self.pid());
        fs::read_dir(&directory).unwrap_or_else(|error| panic!("{directory}: {error}")).count()
    }

    fn daemon(&self) -> Option<residue::Process> {
        descendants(self.watchdog).into_iter().find(|process| process.exe == self.plan.containerd)
    }

    fn await_socket(&self) -> Result<(), StartError> {
        let deadline = Instant::now() + START;
        let not_ready = |reason: String| StartError::NotReady { reason, log: self.log() };
        loop {
            match UnixStream::connect(&self.ctr.address) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(not_ready(format!("no answer within {START:?}: {error}")));
                }
                Err(_) => {}
            }
            if self.daemon().is_none() {
                return Err(not_ready("it has ended".to_owned()));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if self.stopped {
            return;
        }
        if thread::panicking() {
            eprintln!("the end of containerd's log ({}):\n{}", self.namespace(), self.log());
        }
        if let Err(left) = release(self.watchdog) {
            eprintln!("{left}");
            assert!(thread::panicking(), "{} has left something behind", self.namespace());
        }
    }
}

fn plan(version: &ContainerdVersion, services: Services, dir: &Path, name: &str) -> Result<Plan, StartError> {
    let write = |name: &str, text: &str, mode| {
        let file = dir.join(name);
        fs::write(&file, text).map_err(at(&file))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).map_err(at(&file))?;
        Ok::<_, StartError>(file)
    };
    let config = write("config.toml", &config::config(version.numbers().0, services, dir), 0o644)?;
    for name in ["tmp", "bin", "cni"] {
        let path = dir.join(name);
        fs::create_dir(&path).map_err(at(&path))?;
    }
    write("bin/criu", include_str!("criu-version.bash"), 0o755)?;
    if let Some(runc) = &version.runc {
        let link = dir.join("bin/runc");
        std::os::unix::fs::symlink(runc, &link).map_err(at(&link))?;
    }
    for plugin in ["cni/loopback", "cni/nothing"] {
        write(plugin, include_str!("cni-nothing.bash"), 0o755)?;
    }
    let network = r#"{"cniVersion":"0.4.0","name":"none","plugins":[{"type":"nothing"}]}"#;
    write("cni/10-nothing.conflist", network, 0o644)?;
    let containerd = version.containerd.canonicalize().map_err(at(&version.containerd))?;
    let system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let inherited = std::env::var("PATH").unwrap_or_default();
    let (built, own) = (binaries::directory(), containerd.parent().expect("it is a file"));
    // Its own shim of runc's before any other's.
    let path = [built.as_path(), own, &dir.join("bin")].map(|path| path.display().to_string()).join(":");
    let path = format!("{path}:{inherited}:{system}");
    let (shared, namespace) = match services {
        Services::Tasks => (false, name),
        Services::Cri => (true, CRI_NAMESPACE),
    };
    let (dir, namespace, cgroup) = (dir.to_owned(), namespace.to_owned(), name.to_owned());
    let log = dir.join("containerd.log");
    Ok(Plan { dir, namespace, cgroup, shared, containerd, config, log, path })
}

fn at(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> StartError {
    let path = path.into();
    move |source| StartError::Io { path, source }
}

fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// A watchdog that lives.
#[derive(Debug)]
struct Watchdog {
    child: Child,
    /// Its end is the sign to clean up.
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

static WATCHDOGS: Mutex<Vec<Watchdog>> = Mutex::new(Vec::new());

impl Watchdog {
    /// Waits until it says that it has started containerd.
    fn started(&mut self, plan: &Plan) -> Result<(), StartError> {
        let mut line = String::new();
        self.stdout.read_line(&mut line).map_err(at("stillframe-watchdog"))?;
        if line.trim().parse::<u32>().is_err() {
            let log = tail(&plan.log, 60);
            return Err(StartError::NotReady { reason: "the watchdog couldn't start it".to_owned(), log });
        }
        Ok(())
    }
}

/// Gives the watchdog's process id, when containerd is started.
fn start_watchdog(plan: &Plan) -> Result<u32, StartError> {
    let program = binaries::program("stillframe-watchdog");
    let json = serde_json::to_string(plan).expect("paths here are UTF-8: we made them");
    let mut child = Command::new(&program)
        .arg(json)
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(at(&program))?;
    let stdin = child.stdin.take().expect("it was piped");
    let stdout = BufReader::new(child.stdout.take().expect("it was piped"));
    let id = child.id();
    let mut all = WATCHDOGS.lock().expect("nobody panics while holding it");
    all.push(Watchdog { child, stdin, stdout });
    all.last_mut().expect("it was pushed").started(plan)?;
    Ok(id)
}

/// Lets one watchdog do its work, and waits for it.
fn release(id: u32) -> Result<(), String> {
    let mut all = WATCHDOGS.lock().expect("nobody panics while holding it");
    let Some(index) = all.iter().position(|one| one.child.id() == id) else { return Ok(()) };
    let watchdog = all.swap_remove(index);
    drop(all);
    wait_for(watchdog)
}

fn wait_for(Watchdog { mut child, stdin, stdout: _stdout }: Watchdog) -> Result<(), String> {
    drop(stdin);
    match child.wait() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("the watchdog's end: {}", watchdog::ended(status))),
        Err(error) => Err(format!("the watchdog can't be waited for: {error}")),
    }
}

/// An interrupted process ends only after everything is removed. Killed outright it can't wait, but the
/// watchdogs do the same.
fn clean_up_on_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])
            .expect("these signals can be handled");
        thread::spawn(move || {
            let signal = signals.forever().next().expect("forever");
            let all = std::mem::take(&mut *WATCHDOGS.lock().expect("nobody panics while holding it"));
            eprintln!("interrupted: removing containers, mounts and files");
            let failed = all
                .into_iter()
                .map(wait_for)
                .filter_map(Result::err)
                .inspect(|left| eprintln!("{left}"))
                .count();
            std::process::exit(if failed > 0 { 1 } else { 128 + signal });
        });
    });
}
