//! Gets the checkpoint in an image of containerd's, for the annotation that names one instead of a path.
//!
//! A short-lived process of its own (this program, with the action `fetch`): what it takes to talk gRPC isn't resident in the
//! shim of every pod. It unpacks into a directory of the sandbox's, once for all its containers, says on stdout which, and on stderr why it
//! can't.

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use runc::Spawner;
use stillframe_runtime::images::{self, Images, UnpackError};

use crate::container::Shim;
use crate::driver::ReaperSpawner;
use crate::image::{self, ImageError};
use crate::store::Store;

/// The action's name, the first argument.
pub const ACTION: &str = "fetch";

/// Why an image can't be had.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The process.
    #[error("the process that fetches the image can't be run")]
    Spawn(#[source] runc::error::Error),
    /// It couldn't.
    #[error("{0}")]
    Failed(String),
}

/// Unpacks the checkpoint in an image into one of `images`, if it isn't there yet: its directory.
pub async fn fetch(shim: &Shim, name: &str, images: &Images) -> Result<PathBuf, FetchError> {
    let mut command = tokio::process::Command::new("/proc/self/exe");
    command.arg(ACTION).arg(&shim.address).args([&shim.namespace, name]).arg(images.directory());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let spawner = ReaperSpawner(shim.reaper.clone());
    let (status, _, path, said) = spawner.execute(command).await.map_err(FetchError::Spawn)?;
    match (status.success(), said.trim()) {
        (true, _) => Ok(PathBuf::from(path)),
        (false, "") => Err(FetchError::Failed(format!(
            "the process that fetches the image {name:?} ended with {status}"
        ))),
        (false, said) => Err(FetchError::Failed(said.to_owned())),
    }
}

/// What the process does: socket, namespace, name, directory of the sandbox's images. Gives that of the image.
pub fn run(arguments: &[OsString]) -> Result<PathBuf, UnpackError<ImageError>> {
    let [socket, namespace, name, directory] = arguments else {
        panic!("{ACTION} is called by the shim only, with four arguments, not {arguments:?}")
    };
    // Nobody wants it any more when the shim is dead, which has the other end.
    std::thread::spawn(|| {
        drop(std::io::stdin().read(&mut [0]));
        std::process::exit(1);
    });
    let (namespace, name) = (namespace.to_string_lossy(), name.to_string_lossy());
    let found = || -> Result<_, ImageError> {
        let store = Store::new(Path::new(socket), &namespace)?;
        let target = image::find(&store, &name, &namespace)?;
        Ok((store, target))
    };
    let (store, target) = found().map_err(UnpackError::Unpack)?;
    // What a name means may change while the pod lives.
    let key = target.digest.clone();
    images::get(Path::new(directory), &key, |directory| image::unpack(&store, &name, target, directory))
}
