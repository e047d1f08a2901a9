//! `stillframe doctor`: whether this node has what Stillframe needs, and what won't work where it hasn't.
//!
//! Each check tries the thing itself where that leaves nothing behind, and looks for it elsewhere.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// It is there; perhaps with a remark.
    Good(String),
    /// It isn't, and that matters only to some.
    Missing {
        /// What was found instead.
        found: String,
        /// What won't work.
        lost: &'static str,
    },
    /// It isn't, and nothing works without it.
    Fatal {
        /// What was found instead.
        found: String,
        /// What to do.
        remedy: &'static str,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Good(remark) => write!(f, "ok       {remark}"),
            Self::Missing { found, lost } => write!(f, "missing  {found}; without it: {lost}"),
            Self::Fatal { found, remedy } => write!(f, "FAILS    {found}; {remedy}"),
        }
    }
}

/// Looks at the node: name and finding of each check.
pub fn examine() -> Vec<(&'static str, Finding)> {
    vec![
        ("root", root()),
        ("mount API", mount_api()),
        ("freezer", freezer()),
        (
            "runc",
            program(
                "runc",
                "--version",
                "nothing can be run; install runc, or name another runtime in containerd's options",
            ),
        ),
        ("shim", shim()),
        ("containerd", containerd()),
        ("io_uring", io_uring()),
        ("disk-backed scratch", disk()),
        ("CRIU", criu()),
    ]
}

fn root() -> Finding {
    if rustix::process::geteuid().is_root() {
        return Finding::Good("running as root".to_owned());
    }
    Finding::Fatal {
        found: "not running as root".to_owned(),
        remedy: "run it as root, as containerd runs the shim",
    }
}

/// Makes a tmpfs with the calls that the runtime uses; it is never attached, so it goes with its descriptor.
fn mount_api() -> Finding {
    let made = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).and_then(|context| {
        rustix::mount::fsconfig_create(&context)?;
        rustix::mount::fsmount(
            &context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW,
        )
    });
    match made {
        Ok(_) => Finding::Good(format!("Linux {}", kernel())),
        Err(error) => Finding::Fatal {
            found: format!("fsopen, fsconfig, fsmount on Linux {}: {error}", kernel()),
            remedy: "Linux 5.14 or newer with tmpfs is needed, and CAP_SYS_ADMIN",
        },
    }
}

fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn freezer() -> Finding {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let has = |kind: &str, option: &str| {
        mounts.lines().any(|line| {
            line.split_once(" - ").is_some_and(|(_, fs)| {
                fs.starts_with(kind)
                    && (option.is_empty() || fs.split([',', ' ']).any(|found| found == option))
            })
        })
    };
    if has("cgroup ", "freezer") {
        return Finding::Good("cgroup v1".to_owned());
    }
    if has("cgroup2 ", "") {
        return Finding::Good("cgroup v2".to_owned());
    }
    Finding::Fatal {
        found: "neither a cgroup v1 freezer nor cgroup v2 is mounted".to_owned(),
        remedy: "no container can be frozen; mount one, as systemd does",
    }
}

/// A program that tells its version.
fn program(name: &'static str, argument: &str, remedy: &'static str) -> Finding {
    match version(name, argument) {
        Some(version) => Finding::Good(version),
        None => Finding::Fatal { found: format!("{name} isn't in PATH"), remedy },
    }
}

/// The first line that a program says.
fn version(name: &str, argument: &str) -> Option<String> {
    let output = Command::new(find(name)?).arg(argument).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Some(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// Where a program is: in PATH or where a distribution puts what only root runs.
fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    std::env::split_paths(&path)
        .chain(system.map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
}

fn shim() -> Finding {
    match find("containerd-shim-stillframe-v1") {
        Some(path) => Finding::Good(path.display().to_string()),
        None => Finding::Fatal {
            found: "containerd-shim-stillframe-v1 isn't in PATH".to_owned(),
            remedy: "`make install` puts it into /usr/local/bin; containerd looks for it in its own PATH",
        },
    }
}

fn containerd() -> Finding {
    let Some(version) = version("containerd", "--version") else {
        return Finding::Missing {
            found: "containerd isn't in PATH".to_owned(),
            lost: "nothing starts the shim (it may be elsewhere)",
        };
    };
    let number = version.split_whitespace().find_map(|word| {
        let word = word.trim_start_matches('v');
        word.starts_with(|c: char| c.is_ascii_digit()).then(|| word.to_owned())
    });
    let old = number.as_deref().is_some_and(|number| number.starts_with("1."));
    let remark = if old { " (a second checkpoint of a container needs the first image removed)" } else { "" };
    Finding::Good(version + remark)
}

fn io_uring() -> Finding {
    let disabled =
        fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_else(|_| "0".to_owned());
    if disabled.trim() == "2" {
        return Finding::Missing {
            found: "kernel.io_uring_disabled is 2".to_owned(),
            lost: "large files are written with one request at a time",
        };
    }
    Finding::Good("allowed".to_owned())
}

fn disk() -> Finding {
    let missing = ["mkfs.ext4", "e2fsck", "resize2fs"].into_iter().find(|name| find(name).is_none());
    let found = match missing {
        Some(name) => format!("{name} isn't in PATH (e2fsprogs)"),
        None if !Path::new("/dev/loop-control").exists() => "/dev/loop-control isn't there".to_owned(),
        None => return Finding::Good("loop devices and e2fsprogs".to_owned()),
    };
    Finding::Missing { found, lost: "mounts with medium=disk can't be made" }
}

fn criu() -> Finding {
    match version("criu", "--version") {
        Some(version) => {
            Finding::Good(format!("{version} (only containerd's CRI asks for it, on a checkpoint request)"))
        }
        None => Finding::Missing {
            found: "criu isn't in PATH".to_owned(),
            lost: "containerd 2.x refuses checkpoint requests of the CRI; ctr and `stillframe fscheckpoint` don't need it",
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_says_something() {
        for (name, finding) in examine() {
            assert!(finding.to_string().len() > 9, "{name}: {finding}");
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_named_with_what_to_do() {
        let finding = program("no-such-program", "--version", "install it");
        assert_eq!(finding.to_string(), "FAILS    no-such-program isn't in PATH; install it");
        assert!(matches!(program("sh", "-c", ""), Finding::Good(_)));
    }
}
