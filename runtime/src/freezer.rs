//! The cgroup freezer, v1 and v2: all processes of a container are stopped, or none.
//!
//! *Freeze* is the cgroup's word, *pause* the OCI runtime's; runc pauses by freezing, so a paused
//! container is a frozen one. States: thawed -> freezing -> frozen -> thawed. A cgroup that was frozen
//! before is left frozen. [`Frozen`] thaws when dropped; if freezing fails or takes too long, the cgroup
//! is thawed at once and the error names the process that doesn't stop.
//!
//! v1 has no event for the end of freezing (`freezer.state` must be read again, and writing FROZEN again
//! helps processes that fork meanwhile, as libcontainer does it); v2 has: `cgroup.events` polls.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::cgroup::{Membership, mountpoint};

/// How long freezing may take. Measured: 7 ms for 200 busy processes.
pub const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a container couldn't be frozen or thawed.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// A file of /proc or the cgroup filesystem couldn't be read or written.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A process didn't stop in time.
    #[error("{cgroup} didn't freeze within {seconds} s because of {culprit}; it is thawed again")]
    Timeout {
        /// The cgroup's directory.
        cgroup: PathBuf,
        /// How long was waited.
        seconds: u64,
        /// The first process that isn't frozen, as far as can be seen.
        culprit: String,
    },
    /// Freezing would stop this program itself.
    #[error("this process is itself in {0}, so it can't freeze it; run the command outside the container")]
    Self_(PathBuf),
}

/// A cgroup that can be frozen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cgroup {
    /// A directory of the v1 freezer hierarchy.
    V1(PathBuf),
    /// A directory of the v2 hierarchy.
    V2(PathBuf),
}

impl Cgroup {
    /// The cgroup by which process `pid` is frozen: in the v1 freezer hierarchy where there is one,
    /// else in v2. `None` where it has no cgroup of its own (it is in the hierarchy's root).
    pub fn of_process(pid: i32) -> Result<Option<Self>, FreezeError> {
        let membership = read(&PathBuf::from(format!("/proc/{pid}/cgroup")))?;
        let mounts = read(Path::new("/proc/self/mountinfo"))?;
        Ok(find(&membership, &mounts))
    }

    fn path(&self) -> &Path {
        let (Self::V1(path) | Self::V2(path)) = self;
        path
    }

    /// Whether it was removed, with its last process.
    pub fn is_gone(&self) -> bool {
        !self.path().exists()
    }

    /// Whether everything in it is frozen.
    pub fn is_frozen(&self) -> Result<bool, FreezeError> {
        match self {
            Self::V1(path) => Ok(read(&path.join("freezer.state"))?.trim() == "FROZEN"),
            Self::V2(path) => Ok(read(&path.join("cgroup.events"))?.lines().any(|line| line == "frozen 1")),
        }
    }

    /// The processes in it and in the cgroups below.
    pub fn processes(&self) -> Vec<i32> {
        let mut processes = Vec::new();
        let mut directories = vec![self.path().to_owned()];
        // What goes away meanwhile has no processes.
        while let Some(directory) = directories.pop() {
            let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            processes.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
            let below = fs::read_dir(&directory).into_iter().flatten().flatten();
            let is_directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
            directories.extend(below.filter(is_directory).map(|entry| entry.path()));
        }
        processes
    }

    /// Freezes it and everything below, and waits until it is frozen.
    pub fn freeze(&self, timeout: Duration) -> Result<Frozen, FreezeError> {
        if self.is_frozen()? {
            return Ok(Frozen { thaw: None });
        }
        let me = Self::of_process(std::process::id().cast_signed())?;
        if me.is_some_and(|me| me.path().starts_with(self.path())) {
            return Err(FreezeError::Self_(self.path().to_owned()));
        }
        let frozen = Frozen { thaw: Some(self.clone()) }; // thaws on every error below
        let deadline = Instant::now() + timeout;
        match self {
            Self::V1(_) => self.wait_v1(deadline),
            Self::V2(path) => self.wait_v2(path, deadline),
        }?;
        if !self.is_frozen()? {
            let (cgroup, seconds) = (self.path().to_owned(), timeout.as_secs());
            // What is frozen looks the same (v1).
            let asleep: Vec<i32> =
                self.processes().into_iter().filter(|pid| uninterruptible(*pid).is_some()).collect();
            frozen.thaw()?;
            let culprit = asleep.into_iter().find_map(|pid| Some((pid, uninterruptible(pid)?)));
            let culprit = culprit.map_or_else(
                || "a process that can't be told".to_owned(),
                |(pid, name)| format!("process {pid} ({name}), which is in uninterruptible sleep"),
            );
            return Err(FreezeError::Timeout { cgroup, seconds, culprit });
        }
        Ok(frozen)
    }

    fn wait_v1(&self, deadline: Instant) -> Result<(), FreezeError> {
        let mut pause = Duration::from_micros(50);
        self.write_state(true)?;
        while !self.is_frozen()? && Instant::now() < deadline {
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
            self.write_state(true)?;
        }
        Ok(())
    }

    fn wait_v2(&self, path: &Path, deadline: Instant) -> Result<(), FreezeError> {
        let events = path.join("cgroup.events");
        let fail =
            |source: io::Error| FreezeError::File { operation: "wait for", path: events.clone(), source };
        let mut file = File::open(&events).map_err(fail)?;
        self.write_state(true)?;
        loop {
            // Reading arms the poll: it reports changes since the last read.
            let mut text = String::new();
            file.rewind().map_err(fail)?;
            file.read_to_string(&mut text).map_err(fail)?;
            let left = deadline.saturating_duration_since(Instant::now());
            if text.lines().any(|line| line == "frozen 1") || left.is_zero() {
                return Ok(());
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], timeout)
                .map_err(|e| fail(e.into()))?;
        }
    }

    fn write_state(&self, frozen: bool) -> Result<(), FreezeError> {
        let (path, text) = match self {
            Self::V1(path) => (path.join("freezer.state"), if frozen { "FROZEN" } else { "THAWED" }),
            Self::V2(path) => (path.join("cgroup.freeze"), if frozen { "1" } else { "0" }),
        };
        fs::write(&path, text).map_err(|source| FreezeError::File { operation: "write", path, source })
    }

    /// Thaws it.
    pub fn thaw(&self) -> Result<(), FreezeError> {
        self.write_state(false)
    }

    /// Thaws it; one that is gone, with all its processes, is fine.
    pub fn thaw_if_there(&self) -> Result<(), FreezeError> {
        self.thaw().or_else(|error| if self.is_gone() { Ok(()) } else { Err(error) })
    }
}

/// The name of a process, if it is in uninterruptible sleep.
fn uninterruptible(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may have any bytes in it, also a parenthesis.
    let (name, rest) = stat.rsplit_once(") ")?;
    rest.starts_with('D').then(|| name.split_once('(').map_or(name, |(_, name)| name).to_owned())
}

/// A frozen cgroup; thawed when this is dropped, unless it was frozen before.
#[derive(Debug)]
pub struct Frozen {
    thaw: Option<Cgroup>,
}

impl Frozen {
    /// Whether it was frozen by us, and so will be thawed.
    pub fn is_ours(&self) -> bool {
        self.thaw.is_some()
    }

    /// Thaws it, if it was frozen by us. One that is gone is thawed.
    pub fn thaw(mut self) -> Result<(), FreezeError> {
        self.thaw.take().map_or(Ok(()), |cgroup| cgroup.thaw_if_there())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Some(cgroup) = &self.thaw
            && let Err(error) = cgroup.thaw_if_there()
        {
            tracing::error!(cgroup = %cgroup.path().display(), %error, "the cgroup couldn't be thawed");
        }
    }
}

fn read(path: &Path) -> Result<String, FreezeError> {
    fs::read_to_string(path).map_err(|source| FreezeError::File {
        operation: "read",
        path: path.to_owned(),
        source,
    })
}

/// Finds the cgroup in the texts of /proc/PID/cgroup and /proc/self/mountinfo.
fn find(membership: &str, mountinfo: &str) -> Option<Cgroup> {
    let Membership { v1, v2 } = Membership::parse(membership, "freezer");
    let below =
        |mount: PathBuf, path: &str| Some(mount.join(path.strip_prefix('/').filter(|p| !p.is_empty())?));
    let in_v1 = v1.zip(mountpoint(mountinfo, "cgroup", Some("freezer")));
    if let Some(cgroup) = in_v1.and_then(|(path, mount)| below(mount, path)) {
        return Some(Cgroup::V1(cgroup));
    }
    below(mountpoint(mountinfo, "cgroup2", None)?, v2?).map(Cgroup::V2)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    const MOUNTS: &str = "\
30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
32 30 0:28 / /sys/fs/cgroup/freezer rw,nosuid shared:7 - cgroup cgroup rw,freezer\n";

    #[test]
    fn the_v1_freezer_goes_before_v2() {
        let hybrid = "5:cpu,cpuacct:/k8s/x\n4:freezer:/k8s/x\n0::/y\n";
        let want = Cgroup::V1("/sys/fs/cgroup/freezer/k8s/x".into());
        assert_eq!(find(hybrid, MOUNTS), Some(want));
        let want = Cgroup::V2("/sys/fs/cgroup/unified/y".into());
        assert_eq!(find("0::/y\n", MOUNTS), Some(want));
        assert_eq!(find("4:freezer:/\n0::/y\n", MOUNTS), find("0::/y\n", MOUNTS));
        assert_eq!(find("4:freezer:/\n0::/\n", MOUNTS), None, "the root is no cgroup of its own");
        assert_eq!(find("garbage\n", MOUNTS), None);
        assert_eq!(find("0::/y\n", ""), None);
    }

    /// A cgroup with a process in it, in the hierarchy given; both are gone when it is dropped.
    struct Group {
        cgroup: Cgroup,
        child: Child,
    }

    impl Group {
        fn new(hierarchy: &str, make: fn(PathBuf) -> Cgroup) -> Option<Self> {
            let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
            let (kind, option) =
                if hierarchy == "v1" { ("cgroup", Some("freezer")) } else { ("cgroup2", None) };
            let Some(mount) = mountpoint(&mounts, kind, option) else {
                println!("SKIPPED: freezer_{hierarchy}: no such cgroup hierarchy is mounted");
                return None;
            };
            let path = mount.join(format!("stillframe-test-{}-{hierarchy}", std::process::id()));
            fs::create_dir(&path).unwrap();
            let child = Command::new("sleep").arg("1000").spawn().unwrap();
            let group = Self { cgroup: make(path.clone()), child };
            fs::write(path.join("cgroup.procs"), group.child.id().to_string()).unwrap();
            Some(group)
        }
    }

    impl Drop for Group {
        fn drop(&mut self) {
            let _ = self.cgroup.thaw();
            let _ = self.child.kill();
            let _ = self.child.wait();
            let _ = fs::remove_dir(self.cgroup.path());
        }
    }

    fn freeze_and_thaw(hierarchy: &str, make: fn(PathBuf) -> Cgroup) {
        let Some(group) = Group::new(hierarchy, make) else { return };
        let cgroup = &group.cgroup;
        assert_eq!(Cgroup::of_process(group.child.id().cast_signed()).unwrap().as_ref(), Some(cgroup));
        assert_eq!(cgroup.processes(), [group.child.id().cast_signed()]);
        assert!(!cgroup.is_frozen().unwrap());
        let frozen = cgroup.freeze(FREEZE_TIMEOUT).unwrap();
        assert!(frozen.is_ours() && cgroup.is_frozen().unwrap());
        let again = cgroup.freeze(FREEZE_TIMEOUT).unwrap();
        assert!(!again.is_ours());
        drop(again);
        assert!(cgroup.is_frozen().unwrap(), "what was frozen before stays frozen");
        drop(frozen);
        assert!(!cgroup.is_frozen().unwrap());
    }

    #[test]
    fn a_v1_cgroup_is_frozen_and_thawed() {
        freeze_and_thaw("v1", Cgroup::V1);
    }

    #[test]
    fn a_v2_cgroup_is_frozen_and_thawed() {
        freeze_and_thaw("v2", Cgroup::V2);
    }

    #[test]
    fn a_missing_cgroup_is_named() {
        let error = Cgroup::V1("/nonexistent/x".into()).freeze(FREEZE_TIMEOUT).unwrap_err();
        assert_eq!(error.to_string(), "read /nonexistent/x/freezer.state");
    }
}
