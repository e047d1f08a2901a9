//! The container's root filesystem: mounted as containerd says before `runc create`, unmounted at delete.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim::api::CreateTaskRequest;
use containerd_shim::{mount, util};
use containerd_shim_protos::api::Mount;
use nix::mount::MntFlags;

use crate::idmapped::{self, Lowers, Mappings};
use crate::reaper::Reaper;

/// Why the root filesystem could not be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// Mount `index` of the request.
    #[error("mount {index} of the root filesystem ({kind} from {device:?} to {target}) failed")]
    Mount {
        /// Counted from 0.
        index: usize,
        /// The filesystem's type.
        kind: String,
        /// Its device or directory.
        device: String,
        /// Where it should have been.
        target: PathBuf,
        /// What mount(2) said. In a box: the variant would make every error here a large one.
        #[source]
        source: Box<containerd_shim::Error>,
    },
    /// The directory for it.
    #[error("the directory {path} for the root filesystem can't be made")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What mkdir(2) said.
        #[source]
        source: containerd_shim::Error,
    },
    /// At delete.
    #[error("the root filesystem at {path} can't be unmounted")]
    Unmount {
        /// Where it is.
        path: PathBuf,
        /// What umount2(2) said.
        #[source]
        source: containerd_shim::Error,
    },
}

/// Where containerd's mounts go.
pub fn directory(bundle: &Path) -> PathBuf {
    bundle.join("rootfs")
}

/// Mounts the request's root filesystem at `bundle/rootfs`; without mounts there is nothing to do. On error nothing
/// stays mounted.
pub async fn mount(request: &CreateTaskRequest, reaper: &Arc<Reaper>) -> Result<(), RootfsError> {
    if request.rootfs.is_empty() {
        return Ok(());
    }
    let directory = directory(Path::new(&request.bundle));
    util::mkdir(&directory, 0o711)
        .await
        .map_err(|source| RootfsError::Directory { path: directory.clone(), source })?;
    for (index, mount) in request.rootfs.iter().enumerate() {
        let mounted = mount_one(mount.clone(), target(&directory, mount), reaper.clone()).await;
        if let Err(source) = mounted {
            if let Err(error) = unmount(&directory).await {
                tracing::warn!(%error, "undoing a failed mount");
            }
            return Err(RootfsError::Mount {
                index,
                kind: mount.type_.clone(),
                device: mount.source.clone(),
                target: target(&directory, mount),
                source: Box::new(source),
            });
        }
    }
    Ok(())
}

/// A mount's `target` is a path below the root filesystem (containerd 1.7 and later).
fn target(directory: &Path, mount: &Mount) -> PathBuf {
    directory.join(mount.target.trim_start_matches('/'))
}

/// containerd-shim changes the *thread's* working directory where overlay's options are longer than a page, so the thread
/// must not go back to a pool.
async fn mount_one(mount: Mount, target: PathBuf, reaper: Arc<Reaper>) -> containerd_shim::Result<()> {
    let (sender, done) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || drop(sender.send(mount_now(mount, &target, &reaper))));
    done.await.unwrap_or_else(|_| Err(containerd_shim::Error::Other("the mounting thread panicked".into())))
}

fn mount_now(mut mount: Mount, target: &Path, reaper: &Arc<Reaper>) -> containerd_shim::Result<()> {
    let failed = |source| containerd_shim::Error::IoError { context: "translating ids".into(), err: source };
    let mappings = Mappings::take(&mut mount.options).map_err(failed)?;
    let overlay = mount.type_ == "overlay";
    let lowers = match &mappings {
        Some(mappings) if overlay => {
            Some(Lowers::prepare(&mut mount.options, mappings, reaper).map_err(failed)?)
        }
        _ => None,
    };
    let kind = Some(mount.type_.as_str()).filter(|kind| !kind.is_empty());
    let device = Some(mount.source.as_str()).filter(|device| !device.is_empty());
    mount::mount_rootfs(kind, device, &mount.options, target)?;
    drop(lowers);
    match mappings {
        Some(mappings) if !overlay => idmapped::cover(target, &mappings, reaper).map_err(failed),
        _ => Ok(()),
    }
}

/// Unmounts everything at and below `directory`. Lazily, so that a process that still dies doesn't keep it: the
/// container is gone, and containerd removes the snapshot only when the kernel lets go of it. Nothing mounted is fine.
pub async fn unmount(directory: &Path) -> Result<(), RootfsError> {
    let path = directory.to_path_buf();
    let target = directory.display().to_string();
    let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
    util::asyncify(move || mount::umount_recursive(Some(&target), flags.bits()))
        .await
        .map_err(|source| RootfsError::Unmount { path, source })
}
