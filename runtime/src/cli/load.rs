//! `stillframe status` and `stillframe wait`: what of a restored container is loaded.

use std::error::Error;
use std::fmt::Write as _;

use serde::Serialize;
use stillframe_tmpfs::ResourceId;

use super::NoContainer;
use crate::sandbox::{LoadPhase, LoadStatus, Sandbox};

#[derive(Debug, clap::Args)]
pub(super) struct Status {
    #[command(flatten)]
    container: Container,
}

#[derive(Debug, clap::Args)]
pub(super) struct Wait {
    /// Until all of its restored files are loaded. The exit status is 1 if some can't be.
    #[arg(long, required = true)]
    restored: bool,
    #[command(flatten)]
    container: Container,
}

#[derive(Debug, clap::Args)]
struct Container {
    /// containerd's namespace.
    #[arg(long, short, env = "CONTAINERD_NAMESPACE", default_value = "default")]
    namespace: String,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    /// The container's id.
    container: String,
}

impl Container {
    fn sandbox(&self) -> Result<Sandbox, Box<dyn Error>> {
        let (id, namespace) = (self.container.clone(), self.namespace.clone());
        let sandbox = Sandbox::of_container(&namespace, &id)?;
        Ok(sandbox.ok_or(NoContainer { id, namespace })?)
    }

    fn show(&self, statuses: &[(ResourceId, LoadStatus)]) -> Result<String, Box<dyn Error>> {
        #[derive(Serialize)]
        struct Loaded<'a> {
            filesystem: &'a ResourceId,
            #[serde(flatten)]
            status: &'a LoadStatus,
        }
        if self.json {
            let loaded: Vec<_> =
                statuses.iter().map(|(filesystem, status)| Loaded { filesystem, status }).collect();
            return Ok(serde_json::to_string(&loaded)? + "\n");
        }
        let mut text = String::new();
        if statuses.is_empty() {
            writeln!(text, "nothing of {} is loaded behind its start", self.container)?;
        }
        for (id, status) in statuses {
            let LoadStatus { files, bytes, loaded_files, loaded_bytes, failed_files, waiting_files, .. } =
                status;
            let phase = match status.phase {
                LoadPhase::Held => "waits for the container",
                LoadPhase::Small => "loads what the container needs to start",
                LoadPhase::Large => "loads behind the container",
                LoadPhase::Done => "done",
            };
            writeln!(
                text,
                "filesystem   {id}\n  {phase}\n  loaded     {loaded_files} of {files} files, {loaded_bytes} of {bytes} bytes\n  \
                 waited for {waiting_files} files\n  failed     {failed_files} files"
            )?;
            status.errors.iter().try_for_each(|error| writeln!(text, "  error      {error}"))?;
        }
        Ok(text)
    }
}

pub(super) fn status(arguments: &Status) -> Result<String, Box<dyn Error>> {
    let Status { container } = arguments;
    container.show(&container.sandbox()?.load_status(&container.container)?)
}

/// Not all files could be loaded.
#[derive(Debug, thiserror::Error)]
#[error(
    "not all restored files of container {id} could be loaded: who opens one gets an input/output error\n{status}"
)]
struct Incomplete {
    id: String,
    status: String,
}

pub(super) fn wait(arguments: &Wait) -> Result<String, Box<dyn Error>> {
    let Wait { container, .. } = arguments;
    let statuses = container.sandbox()?.await_load(&container.container)?;
    let status = container.show(&statuses)?;
    let complete = |status: &LoadStatus| status.phase == LoadPhase::Done && status.failed_files == 0;
    if statuses.iter().all(|(_, status)| complete(status)) {
        return Ok(status);
    }
    Err(Incomplete { id: container.container.clone(), status }.into())
}
