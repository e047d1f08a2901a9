//! Tells containerd when the kernel's OOM killer strikes in a container's memory cgroup.
//!
//! - cgroup v1: an eventfd registered in `cgroup.event_control` for `memory.oom_control` (memory.rst, 10). It also fires when the
//!   cgroup is removed.
//! - cgroup v2: inotify on `memory.events`; a TaskOOM for each rise of its `oom_kill`.
//!
//! A watch ends with the cgroup or when it is dropped.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use containerd_shim::protos::events::task::TaskOOM;
use nix::sys::eventfd::{EfdFlags, EventFd};
use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::events::Publisher;
use crate::sys;

/// A running watch.
#[derive(Debug)]
pub struct Watch(JoinHandle<()>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Watches the memory cgroup of `pid`, container `id`'s init.
pub fn watch(id: &str, pid: i32, publisher: &Publisher) -> io::Result<Watch> {
    let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let directory = memory_cgroup(&cgroups, &mounts)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no memory cgroup"))?;
    let id = id.to_string();
    let publisher = publisher.clone();
    let oom = move || publisher.publish(TaskOOM { container_id: id.clone(), ..Default::default() });
    let task = match directory {
        Directory::V1(directory) => {
            let event = register(&directory)?;
            tokio::spawn(async move { watch_v1(&event, &directory, oom).await })
        }
        Directory::V2(directory) => {
            let events = directory.join("memory.events");
            let (changes, seen) = changes(&events)?;
            tokio::spawn(async move { watch_v2(&changes, &events, seen, oom).await })
        }
    };
    Ok(Watch(task))
}

#[derive(Debug, PartialEq, Eq)]
enum Directory {
    V1(PathBuf),
    V2(PathBuf),
}

/// The directory of a process's memory cgroup, from its /proc/PID/cgroup and our mountinfo. A mount that shows only a part
/// of the hierarchy that the process isn't in doesn't count.
fn memory_cgroup(cgroups: &str, mountinfo: &str) -> Option<Directory> {
    let path_of = |controller: &str| {
        cgroups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            controllers.split(',').any(|name| name == controller).then_some(path)
        })
    };
    let directory_of = |kind: &str, option: &str, path: &str| {
        mountinfo.lines().find_map(|line| {
            let (mount, filesystem) = line.split_once(" - ")?;
            let (mut mount, mut filesystem) = (mount.split(' ').skip(3), filesystem.split(' '));
            let (root, point) = (mount.next()?, mount.next()?);
            let (this_kind, options) = (filesystem.next()?, filesystem.nth(1)?);
            if this_kind != kind || !(option.is_empty() || options.split(',').any(|name| name == option)) {
                return None;
            }
            let below = Path::new(path).strip_prefix(root).ok()?;
            Some(Path::new(point).join(below))
        })
    };
    match path_of("memory") {
        Some(path) => directory_of("cgroup", "memory", path).map(Directory::V1),
        None => directory_of("cgroup2", "", path_of("")?).map(Directory::V2),
    }
}

fn register(directory: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
    let control = std::fs::File::open(directory.join("memory.oom_control"))?;
    let registration = format!("{} {}", event.as_fd().as_raw_fd(), control.as_raw_fd());
    std::fs::write(directory.join("cgroup.event_control"), registration)?;
    sys::watch(OwnedFd::from(event))
}

async fn watch_v1(event: &AsyncFd<OwnedFd>, directory: &Path, oom: impl Fn()) {
    while let Ok(mut ready) = event.readable().await {
        let mut count = [0; 8];
        let read = ready.try_io(|event| Ok(rustix::io::read(event.get_ref(), &mut count)?));
        match read {
            Ok(Ok(_)) if directory.join("memory.oom_control").exists() => oom(),
            Ok(_) => return,
            Err(_would_block) => {}
        }
    }
}

/// Watches `file`; also its `oom_kill` now.
fn changes(file: &Path) -> io::Result<(AsyncFd<OwnedFd>, u64)> {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&watch, file, inotify::WatchFlags::MODIFY)?;
    Ok((sys::watch(watch)?, kills(file).unwrap_or(0)))
}

async fn watch_v2(changes: &AsyncFd<OwnedFd>, events: &Path, mut seen: u64, oom: impl Fn()) {
    while let Ok(mut ready) = changes.readable().await {
        let mut buffer = [0; 4096];
        if ready.try_io(|watch| Ok(rustix::io::read(watch.get_ref(), &mut buffer)?)).is_err() {
            continue;
        }
        match kills(events) {
            Some(now) if now > seen => {
                seen = now;
                oom();
            }
            Some(_) => {}
            None => return,
        }
    }
}

/// `oom_kill` of memory.events; `None` where the file is gone.
fn kills(events: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(events).ok()?;
    let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    Some(kills.and_then(|kills| kills.trim().parse().ok()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    const V1: &str = "36 24 0:33 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n\
                      37 24 0:34 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      25 24 0:22 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n";
    const V2: &str = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn the_memory_cgroup_is_found_in_either_hierarchy() {
        let v1 = "11:memory:/default/x\n4:cpu,cpuacct:/default/x\n0::/default/x\n";
        let expected = Directory::V1("/sys/fs/cgroup/memory/default/x".into());
        assert_eq!(memory_cgroup(v1, V1), Some(expected));
        let v2 = "0::/kubepods.slice/cri-containerd-x.scope\n";
        let expected = Directory::V2("/sys/fs/cgroup/kubepods.slice/cri-containerd-x.scope".into());
        assert_eq!(memory_cgroup(v2, V2), Some(expected));
    }

    #[test]
    fn a_mount_of_a_part_of_the_hierarchy_is_no_root() {
        let part = "36 24 0:33 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let inside = Directory::V1("/sys/fs/cgroup/memory/x".into());
        assert_eq!(memory_cgroup("11:memory:/docker/abc/x\n", part), Some(inside));
        assert_eq!(memory_cgroup("11:memory:/other/x\n", part), None);
        assert_eq!(memory_cgroup("garbage", "garbage"), None);
    }

    #[tokio::test]
    async fn each_rise_of_oom_kill_is_told_once() {
        let directory = tempfile::tempdir().unwrap();
        let events = directory.path().join("memory.events");
        std::fs::write(&events, "low 0\noom 0\noom_kill 1\n").unwrap();
        let (sender, mut told) = mpsc::unbounded_channel();
        let (changes, seen) = changes(&events).unwrap();
        let path = events.clone();
        let watch =
            tokio::spawn(async move { watch_v2(&changes, &path, seen, || sender.send(()).unwrap()).await });
        // Written in place and at once, as a cgroup file changes.
        let rewrite = |text: &str| {
            let file = std::fs::OpenOptions::new().write(true).open(&events).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, text.as_bytes(), 0).unwrap();
        };
        rewrite("low 0\noom 0\noom_kill 2\n");
        told.recv().await.unwrap();
        rewrite("low 1\noom 0\noom_kill 2\n");
        rewrite("low 1\noom 0\noom_kill 4\n");
        told.recv().await.unwrap();
        assert!(told.is_empty());
        std::fs::remove_file(&events).unwrap();
        watch.abort();
    }
}
