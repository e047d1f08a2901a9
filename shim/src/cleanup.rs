//! `delete`: what containerd calls when the shim is dead. Ends the container and takes away everything that it had.
//!
//! containerd waits for five seconds, then gives up and removes the bundle; so no step waits for long, and a step that fails
//! doesn't keep the others from being tried.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim::Flags;
use containerd_shim::api::{DeleteResponse, Options};
use containerd_shim::util::{read_options, read_pid_from_file};

use crate::bundle::Spec;
use crate::driver::Runc;
use crate::launch::socket_path;
use crate::process::timestamp;
use crate::reaper::{Exit, Reaper};
use crate::sandbox::Filesystems;
use crate::{error, rootfs, sys};

/// For runc, of the five seconds.
const RUNC: Duration = Duration::from_secs(3);

/// Cleans up after the container `flags.id` whose bundle is `-bundle` or the current directory.
pub async fn delete(flags: &Flags) -> std::io::Result<DeleteResponse> {
    let bundle = match flags.bundle.as_str() {
        "" => std::env::current_dir()?,
        bundle => PathBuf::from(bundle),
    };
    let id = &flags.id;
    let pid = read_pid_from_file(&bundle.join("init.pid")).await.unwrap_or(0);
    let options = read_options(&bundle).await.unwrap_or_else(|error| {
        complain("reading the runtime's options", &error);
        Options::default()
    });
    let reaper = Reaper::start()?;
    let runc = Runc::new(&flags.namespace, &bundle, &options, reaper);
    let deleted = tokio::time::timeout(RUNC, runc.delete(id, true)).await;
    match &deleted {
        Ok(Ok(())) => {}
        Ok(Err(error)) => complain("runc delete --force", error),
        Err(_) => eprintln!("runc delete --force takes more than {RUNC:?}"),
    }
    if !matches!(deleted, Ok(Ok(()))) && is_init_of(pid, id) {
        drop(sys::kill(pid, libc::SIGKILL));
    }
    if let Err(error) = rootfs::unmount(&rootfs::directory(&bundle)).await {
        complain("unmounting", &error);
    }
    remove_filesystems(flags, &bundle).await;
    remove_socket(&bundle);
    let exit = Exit::now(0);
    Ok(DeleteResponse {
        pid: pid.unsigned_abs(),
        exit_status: 128 + libc::SIGKILL as u32,
        exited_at: Some(timestamp(exit.at)).into(),
        ..Default::default()
    })
}

/// Whether the process that init.pid names is still the container's, and not one that got its pid since: its cgroup, which both
/// `ctr` and CRI name after the container.
fn is_init_of(pid: i32, id: &str) -> bool {
    let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    cgroups.lines().any(|line| line.rsplit('/').next().is_some_and(|name| name.contains(id)))
}

async fn remove_filesystems(flags: &Flags, bundle: &Path) {
    let (namespace, id) = (&flags.namespace, &flags.id);
    let mut found = Filesystems::find(namespace, id).await;
    // The shim may have died before the sandbox knew the container, with an image unpacked for it.
    if let Ok(None) = found
        && let Ok(spec) = Spec::read(bundle)
    {
        found = Filesystems::new(namespace, spec.sandbox_id(id), id).map(Some);
    }
    let removed = match found {
        Ok(Some(filesystems)) => filesystems.remove().await,
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = removed {
        complain("removing the container's filesystems", &error);
    }
}

/// The dead shim's socket. One that somebody listens on belongs to a shim that serves other containers.
fn remove_socket(bundle: &Path) {
    let Ok(address) = std::fs::read_to_string(bundle.join("address")) else { return };
    let path = socket_path(&address);
    if UnixStream::connect(&path).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused) {
        drop(std::fs::remove_file(&path));
    }
}

/// containerd logs what `delete` writes to stderr.
fn complain(what: &str, error: &dyn std::error::Error) {
    eprintln!("{what}: {}", error::chain(error));
}
