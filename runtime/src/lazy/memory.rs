//! Which cgroup a process's memory is charged to, and joining it.
//!
//! v1: the memory hierarchy's cgroup, which has nothing to do with the freezer's. v2: the one cgroup of the process, in
//! which it is frozen, too.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::cgroup::{Membership, mountpoint};

/// File to write a pid to, so that the process is charged like process `pid`; `None` where the hierarchy can't be found.
pub(crate) fn procs_of(pid: i32) -> io::Result<Option<PathBuf>> {
    let membership = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(find(&membership, &mounts).map(|directory| directory.join("cgroup.procs")))
}

/// Puts the process `pid` where `procs` says.
pub(crate) fn join(procs: &Path, pid: u32) -> io::Result<()> {
    fs::write(procs, pid.to_string())
}

/// The directory of the cgroup by what /proc/PID/cgroup and /proc/self/mountinfo say.
fn find(membership: &str, mounts: &str) -> Option<PathBuf> {
    let Membership { v1, v2 } = Membership::parse(membership, "memory");
    let (mount, path) = match v1 {
        Some(path) => (mountpoint(mounts, "cgroup", Some("memory"))?, path),
        // In a hybrid setup without the v1 hierarchy of memory, or a v2-only one.
        None => (mountpoint(mounts, "cgroup2", None)?, v2?),
    };
    Some(mount.join(path.strip_prefix('/')?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_charged_by_the_v1_hierarchy_of_memory_or_else_by_v2() {
        let v1 = "33 26 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let freezer = "34 26 0:30 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n";
        let v2 = "27 26 0:24 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        for (membership, mounts, want) in [
            (
                "5:freezer:/a\n4:memory:/b/c\n0::/d\n",
                [freezer, v1, v2].concat(),
                Some("/sys/fs/cgroup/memory/b/c"),
            ),
            ("5:freezer:/a\n0::/d\n", [freezer, v2].concat(), Some("/sys/fs/cgroup/unified/d")),
            ("4:memory:/\n0::/d\n", [v1, v2].concat(), Some("/sys/fs/cgroup/memory")),
            ("0::/\n", v2.to_owned(), Some("/sys/fs/cgroup/unified")),
            ("0::/d\n", freezer.to_owned(), None),
            ("garbage", v2.to_owned(), None),
        ] {
            assert_eq!(find(membership, &mounts), want.map(PathBuf::from), "{membership}");
        }
    }
}
