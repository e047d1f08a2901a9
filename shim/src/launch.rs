//! `start`: brings up the process that serves, or finds the one that does already.
//!
//! The socket is bound here and handed down as the server's stdin, so containerd can connect at once and binding decides
//! between two `start`s of one sandbox. The server's stdout is a pipe: it says nothing and closes it when it serves, or says why it
//! can't. A socket that nobody listens on is a dead shim's and is replaced. containerd-shim's `spawn` doesn't learn of a server
//! that fails.

use std::fs::Permissions;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use containerd_shim::{StartOpts, cgroup};

use crate::bundle::{BundleError, Spec};
use crate::options::{self, OptionsError};

/// Why no shim serves.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The runtime's options.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// A file, a socket, a process.
    #[error("{what} failed")]
    Io {
        /// What was done.
        what: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The ShimCgroup option.
    #[error("the shim can't be put into its cgroup")]
    Cgroup(#[source] containerd_shim::Error),
    /// The server.
    #[error("the shim did not start: {0}")]
    Server(String),
}

/// Returns the address at which the sandbox of the bundle in the current directory is served.
pub fn start(start: &StartOpts) -> Result<String, LaunchError> {
    let bundle = std::env::current_dir().map_err(failed("finding the bundle"))?;
    let spec = Spec::read(&bundle)?;
    let address = start.socket_address(spec.sandbox_id(&start.id));
    let path = socket_path(&address);
    if let Some(listener) = bind(&path)? {
        let served = serve(start, &address, listener);
        if served.is_err() {
            drop(std::fs::remove_file(&path));
        }
        served?;
    }
    // Where a restarted containerd before 2.0 looks for us.
    std::fs::write(bundle.join("address"), &address).map_err(failed("writing the bundle's address file"))?;
    Ok(address)
}

/// The path in a `unix://` address.
pub fn socket_path(address: &str) -> PathBuf {
    PathBuf::from(address.strip_prefix("unix://").unwrap_or(address))
}

/// `None` where a live shim listens already.
fn bind(path: &Path) -> Result<Option<UnixListener>, LaunchError> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(failed(&format!("making {}", directory.display())))?;
    }
    let binding = format!("binding {}", path.display());
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            std::fs::remove_file(path).map_err(failed(&format!("removing {}", path.display())))?;
            UnixListener::bind(path)
        }
        bound => bound,
    }
    .map_err(failed(&binding))?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed(&binding))?;
    Ok(Some(listener))
}

fn serve(start: &StartOpts, address: &str, listener: UnixListener) -> Result<(), LaunchError> {
    let binary = std::env::current_exe().map_err(failed("finding the shim's binary"))?;
    let mut command = Command::new(binary);
    command
        .args([
            "-namespace",
            &start.namespace,
            "-id",
            &start.id,
            "-address",
            &start.address,
            "-socket",
            address,
        ])
        .args(start.debug.then_some("-debug"))
        .arg("serve")
        .env("TTRPC_ADDRESS", &start.ttrpc_address)
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // Nobody who signals containerd's process group means the shim.
        .process_group(0);
    let mut child = command.spawn().map_err(failed("starting the shim"))?;
    let confined = confine(start, child.id());
    if let Err(error) = confined {
        drop(child.kill());
        drop(child.wait());
        return Err(error);
    }
    let mut complaint = String::new();
    let output = child.stdout.as_mut().expect("stdout is piped");
    output.read_to_string(&mut complaint).map_err(failed("waiting for the shim"))?;
    // A server that crashed has said nothing.
    match child.try_wait() {
        Ok(Some(status)) => Err(LaunchError::Server(format!("{} ({status})", complaint.trim()))),
        _ if !complaint.is_empty() => Err(LaunchError::Server(complaint.trim().to_string())),
        _ => Ok(()),
    }
}

/// Puts the server into the cgroup that the options ask for, and lets the OOM killer prefer it to containerd.
fn confine(start: &StartOpts, pid: u32) -> Result<(), LaunchError> {
    let options = start
        .extensions
        .iter()
        .map(|any| options::decode(Some(any)))
        .find(|options| !matches!(options, Ok(options) if *options == Default::default()));
    let options = options.transpose()?.unwrap_or_default();
    cgroup::set_cgroup_and_oom_score(pid, &options.shim_cgroup).map_err(LaunchError::Cgroup)
}

fn failed(what: &str) -> impl FnOnce(io::Error) -> LaunchError {
    let what = what.to_string();
    move |source| LaunchError::Io { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_shim_s_socket_is_replaced_and_a_live_one_s_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s/socket");
        let first = bind(&path).unwrap().expect("nobody was there");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(bind(&path).unwrap().is_none(), "the first listens");
        drop(first);
        assert!(bind(&path).unwrap().is_some(), "the first is gone");
    }
}
