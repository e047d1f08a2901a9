//! Gets the checkpoint in an image of containerd's, for the annotation that names one instead of a path.
//!
//! A short-lived process of its own (this program, with the action `fetch`): what it takes to talk gRPC isn't resident in the
//! shim of every pod. It unpacks into a directory that is the shim's, and says on stderr why it can't.

use std::ffi::OsString;
use std::path::Path;
use std::process::Stdio;

use runc::Spawner;
use tempfile::TempDir;

use crate::container::Shim;
use crate::driver::ReaperSpawner;
use crate::image::{self, ImageError};
use crate::store::Store;

/// The action's name, the first argument.
pub const ACTION: &str = "fetch";

/// Why an image can't be had.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The directory.
    #[error("a temporary directory for the image can't be made")]
    Directory(#[source] std::io::Error),
    /// The process.
    #[error("the process that fetches the image can't be run")]
    Spawn(#[source] runc::error::Error),
    /// It couldn't.
    #[error("{0}")]
    Failed(String),
}

/// Unpacks the checkpoint in an image; the directory lives as long as what is returned.
pub async fn fetch(shim: &Shim, name: &str) -> Result<TempDir, FetchError> {
    let directory = tempfile::Builder::new().prefix("stillframe-image-").tempdir();
    let directory = directory.map_err(FetchError::Directory)?;
    let mut command = tokio::process::Command::new("/proc/self/exe");
    command.arg(ACTION).arg(&shim.address).args([&shim.namespace, name]).arg(directory.path());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let spawner = ReaperSpawner(shim.reaper.clone());
    let (status, _, _, said) = spawner.execute(command).await.map_err(FetchError::Spawn)?;
    match (status.success(), said.trim()) {
        (true, _) => Ok(directory),
        (false, "") => Err(FetchError::Failed(format!(
            "the process that fetches the image {name:?} ended with {status}"
        ))),
        (false, said) => Err(FetchError::Failed(said.to_owned())),
    }
}

/// What the process does: socket, namespace, name, directory.
pub fn run(arguments: &[OsString]) -> Result<(), ImageError> {
    let [socket, namespace, name, directory] = arguments else {
        panic!("{ACTION} is called by the shim only, with four arguments, not {arguments:?}")
    };
    let (namespace, name) = (namespace.to_string_lossy(), name.to_string_lossy());
    let store = Store::new(Path::new(socket), &namespace)?;
    image::unpack(&store, &name, &namespace, Path::new(directory))
}
