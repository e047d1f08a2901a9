//! Root filesystems of user namespaces: mounts whose ids are translated (`uidmap=`, `gidmap=` among a mount's options), which
//! containerd from 2.0 on sends instead of changing every file's owner in the snapshot.
//!
//! As containerd's own `mount_linux.go` (PrepareIDMappedOverlay): overlayfs can't be mounted with a translation itself, so each of its lower
//! directories is, at a place of its own, for as long as it takes to mount the overlay, which holds them from then on. The upper
//! directory belongs to the container's root already. Anything else gets a translated copy of its mount over it.
//!
//! The kernel takes a translation from a user namespace. It is made with a process of this program that does nothing, and that is
//! gone when this is done.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::mount::{MntFlags, umount2};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::reaper::Reaper;
use crate::sys;

/// The action of the process that does nothing.
pub const ACTION: &str = "hold";
/// Where the lower directories are mounted meanwhile: not in the bundle, which containerd removes with all that is in it.
const DIRECTORY: &str = "/run/stillframe";

/// Mappings of a root filesystem, one `CONTAINER:HOST:SIZE` a line, as uid_map(5) has them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mappings {
    uids: String,
    gids: String,
}

impl Mappings {
    /// Takes the mappings out of a mount's options; `None` where there are none.
    pub fn take(options: &mut Vec<String>) -> io::Result<Option<Self>> {
        let mut mappings = Self::default();
        let mut found = false;
        options.retain(|option| {
            let (lines, value) = match option.split_once('=') {
                Some(("uidmap", value)) => (&mut mappings.uids, value),
                Some(("gidmap", value)) => (&mut mappings.gids, value),
                _ => return true,
            };
            found = true;
            *lines = value.split(',').map(|one| one.replace(':', " ") + "\n").collect();
            false
        });
        if found && (mappings.uids.is_empty() || mappings.gids.is_empty()) {
            return Err(io::Error::other("of uidmap and gidmap only one is given"));
        }
        Ok(found.then_some(mappings))
    }

    /// A user namespace with them.
    fn namespace(&self, reaper: &Reaper) -> io::Result<OwnedFd> {
        let mut command = Command::new("/proc/self/exe");
        command.arg(ACTION).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        sys::in_a_user_namespace(&mut command);
        // It ends with its stdin, when `child` is dropped.
        let (child, _exit) = reaper.spawn(&mut command)?;
        let process = PathBuf::from(format!("/proc/{}", child.id()));
        fs::write(process.join("uid_map"), &self.uids)?;
        fs::write(process.join("gid_map"), &self.gids)?;
        Ok(fs::File::open(process.join("ns/user"))?.into())
    }
}

/// What the process does: nothing, until its stdin ends.
pub fn hold() {
    drop(io::copy(&mut io::stdin().lock(), &mut io::sink()));
}

/// The lower directories of an overlay, translated, while it is mounted.
#[derive(Debug)]
pub struct Lowers {
    directories: Vec<PathBuf>,
}

impl Lowers {
    /// Mounts the lower directories that `options` names, translated, and names those instead. Blocking.
    pub fn prepare(options: &mut [String], mappings: &Mappings, reaper: &Arc<Reaper>) -> io::Result<Self> {
        let mut lowers = Self { directories: Vec::new() };
        let lower = options.iter_mut().find_map(|option| {
            option.strip_prefix("lowerdir=").map(str::to_owned).map(|value| (option, value))
        });
        let Some((option, value)) = lower else { return Ok(lowers) };
        let namespace = mappings.namespace(reaper)?;
        for directory in value.split(':') {
            let place = lowers.place()?;
            translated(Path::new(directory), &place, &namespace)?;
        }
        let places: Vec<_> = lowers.directories.iter().map(|place| place.display().to_string()).collect();
        *option = format!("lowerdir={}", places.join(":"));
        Ok(lowers)
    }

    fn place(&mut self) -> io::Result<PathBuf> {
        static PLACES: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(DIRECTORY)?;
        let number = PLACES.fetch_add(1, Ordering::Relaxed);
        let place = Path::new(DIRECTORY).join(format!("lower-{}-{number}", std::process::id()));
        fs::create_dir(&place)?;
        self.directories.push(place.clone());
        Ok(place)
    }
}

/// Never removes more than a directory that is empty: what is mounted there is the image's.
impl Drop for Lowers {
    fn drop(&mut self) {
        for place in &self.directories {
            let _ = umount2(place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            if let Err(error) = fs::remove_dir(place) {
                tracing::warn!(place = %place.display(), %error, "a place for a lower directory can't be removed");
            }
        }
    }
}

/// Covers the mount at `target` with a translated copy of it. Blocking.
pub fn cover(target: &Path, mappings: &Mappings, reaper: &Arc<Reaper>) -> io::Result<()> {
    translated(target, target, &mappings.namespace(reaper)?)
}

fn translated(source: &Path, target: &Path, namespace: &OwnedFd) -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let copy = open_tree(CWD, source, flags)?;
    sys::translate_ids(copy.as_fd(), namespace.as_fd())?;
    Ok(move_mount(copy, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::reaper::tests::shared;

    #[test]
    fn mappings_are_taken_out_of_the_options() {
        let options = |all: &[&str]| all.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>();
        let mut mapped = options(&["lowerdir=/a", "uidmap=0:100:5,9:1:1", "ro", "gidmap=0:200:5"]);
        let mappings = Mappings::take(&mut mapped).unwrap();
        assert_eq!(mappings, Some(Mappings { uids: "0 100 5\n9 1 1\n".into(), gids: "0 200 5\n".into() }));
        assert_eq!(mapped, ["lowerdir=/a", "ro"]);
        assert_eq!(Mappings::take(&mut mapped).unwrap(), None);
        assert!(Mappings::take(&mut options(&["uidmap=0:1:1"])).is_err());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn lower_directories_are_seen_with_the_host_s_ids_and_go_again() {
        let reaper = shared();
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "text").unwrap();
        std::os::unix::fs::chown(&file, Some(3), Some(4)).unwrap();
        let lowerdir = format!("lowerdir={}:{0}", directory.path().display());
        let mut options = vec!["ro".to_owned(), lowerdir];
        let mappings = Mappings { uids: "0 1000 10\n".into(), gids: "0 2000 10\n".into() };
        let lowers = Lowers::prepare(&mut options, &mappings, &reaper).unwrap();
        let places: Vec<_> =
            options[1].strip_prefix("lowerdir=").unwrap().split(':').map(PathBuf::from).collect();
        assert_eq!(places, lowers.directories);
        assert_eq!(places.len(), 2);
        for place in &places {
            let seen = place.join("file").metadata().unwrap();
            assert_eq!((seen.uid(), seen.gid()), (1003, 2004));
        }
        drop(lowers);
        assert!(places.iter().all(|place| !place.exists()));
        assert_eq!(fs::read_to_string(&file).unwrap(), "text");
    }
}
