//! `stillframe doctor`: whether this node has what Stillframe needs, and what won't work where it hasn't.
//!
//! Each check tries the thing itself where that leaves nothing behind, and looks for it elsewhere.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::AT_FDCWD;
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
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
        ("containerd config", configuration()),
        ("fanotify", fanotify()),
        ("userfaultfd", userfaultfd()),
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

/// Whether CRIU finds all that it needs.
fn works(name: &str) -> bool {
    let checked = find(name).map(|path| Command::new(path).arg("check").output());
    matches!(checked, Some(Ok(output)) if output.status.success())
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

/// What containerd itself makes of its configuration, imports and defaults included.
fn configuration() -> Finding {
    let output = find("containerd").map(|path| Command::new(path).args(["config", "dump"]).output());
    let text = match output {
        Some(Ok(output)) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        _ => {
            let found = "`containerd config dump` doesn't work here".to_owned();
            return Finding::Missing { found, lost: "whether pods can use Stillframe can't be said" };
        }
    };
    judge_configuration(&text)
}

fn judge_configuration(text: &str) -> Finding {
    let has =
        |word: &str| text.lines().any(|line| line.contains(word) && !line.trim_start().starts_with('#'));
    if !has("io.containerd.stillframe.v1") && !has("containerd-shim-stillframe-v1") {
        return Finding::Missing {
            found: "no runtime of the CRI plugin is Stillframe".to_owned(),
            lost: "no pod can use it, only ctr can (examples/kubernetes has the lines)",
        };
    }
    if !has("dev.stillframe") {
        return Finding::Missing {
            found: "pod_annotations of the runtime don't allow dev.stillframe.*".to_owned(),
            lost: "annotations of pods, dev.stillframe.restore-from among them, don't reach it",
        };
    }
    Finding::Good("a runtime of the CRI plugin is Stillframe, and pods' annotations reach it".to_owned())
}

/// Watches a file of its own, as a checkpoint watches a filesystem, and holds its opening back, as a restore does.
fn fanotify() -> Finding {
    let watched = tempfile::NamedTempFile::new().map_err(|error| error.to_string()).and_then(|file| {
        let group =
            Fanotify::init(InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC, EventFFlags::O_RDONLY);
        let mark = |group: Fanotify| {
            group.mark(MarkFlags::FAN_MARK_ADD, MaskFlags::FAN_OPEN_PERM, AT_FDCWD, Some(file.path()))
        };
        group.and_then(mark).map_err(|error| error.to_string())
    });
    match watched {
        Ok(()) => Finding::Good("with permission events".to_owned()),
        Err(error) => Finding::Missing {
            found: format!("permission events: {error}"),
            lost: "a restored container waits until all its data is back, and a saved one is frozen until all is read",
        },
    }
}

fn userfaultfd() -> Finding {
    if stillframe_pgalloc::can_install() {
        return Finding::Good("gives files their pages".to_owned());
    }
    Finding::Missing {
        found: "not there, or the host's pages aren't of 4 KiB".to_owned(),
        lost: "while a file is loaded behind a container's start, its mtime is the present",
    }
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
        Some(version) if works("criu") => Finding::Good(version),
        Some(version) => Finding::Missing {
            found: format!("{version}, but `criu check` fails on this kernel"),
            lost: "mode full doesn't work; containerd's CRI is content with it",
        },
        None => Finding::Missing {
            found: "criu isn't in PATH".to_owned(),
            lost: "mode full doesn't work, and containerd 2.x refuses checkpoint requests of the CRI; ctr and `stillframe fscheckpoint` \
                   don't need it",
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
    fn a_configuration_is_judged_by_what_pods_need() {
        let runtime = "runtime_type = 'io.containerd.stillframe.v1'";
        for (text, want) in [
            (String::new(), "missing  no runtime"),
            (format!("# {runtime}"), "missing  no runtime"),
            (runtime.to_owned(), "missing  pod_annotations"),
            (format!("{runtime}\npod_annotations = ['dev.stillframe.*']"), "ok "),
            ("runtime_path = '/x/containerd-shim-stillframe-v1'\n  dev.stillframe.*".to_owned(), "ok "),
        ] {
            let finding = judge_configuration(&text).to_string();
            assert!(finding.starts_with(want), "{text}: {finding}");
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_named_with_what_to_do() {
        let finding = program("no-such-program", "--version", "install it");
        assert_eq!(finding.to_string(), "FAILS    no-such-program isn't in PATH; install it");
        assert!(matches!(program("sh", "-c", ""), Finding::Good(_)));
    }
}
