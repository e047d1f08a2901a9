//! A sandbox without containerd and runc: its filesystem and a sleeping process in a cgroup are real, so that what
//! is measured is Stillframe's own part of a checkpoint and a restore, freezing included.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use stillframe_runtime::freezer::{Cgroup, FREEZE_TIMEOUT};
use stillframe_runtime::sandbox::{CheckpointRequest, CheckpointResult, Load, PrepareRequest, Sandbox};
use stillframe_runtime::state::STATE_ROOT;

use crate::Result;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A sandbox with one tmpfs; gone with all it had when it is dropped.
pub struct Bench {
    sandbox: Sandbox,
    namespace: String,
    bundle: tempfile::TempDir,
    process: Option<(Child, PathBuf)>,
}

impl Bench {
    /// A sandbox whose tmpfs may hold 12 GiB, restored from `image` if there is one.
    pub fn prepare(image: Option<&Path>) -> Result<Self> {
        Self::prepare_with(image, Load::InPrepare)
    }

    /// The same, of which large files are loaded behind the start.
    pub fn restore(image: &Path) -> Result<Self> {
        let program = stillframe_integration::binaries::program("stillframe");
        Self::prepare_with(Some(image), Load::Apart { program, eager: false })
    }

    /// Waits until all is loaded.
    pub fn await_load(&self) -> Result<()> {
        let status = self.sandbox.await_load("c")?;
        let complete = status.iter().all(|(_, status)| status.loaded_files == status.files);
        if complete { Ok(()) } else { Err(format!("not all is loaded: {status:?}").into()) }
    }

    fn prepare_with(image: Option<&Path>, load: Load) -> Result<Self> {
        let namespace = format!("bench-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let bundle = tempfile::tempdir()?;
        fs::create_dir(bundle.path().join("rootfs"))?;
        let mount = r#"{"destination":"/scratch","type":"tmpfs","options":["size=12g"]}"#;
        fs::write(
            bundle.path().join("config.json"),
            format!(r#"{{"ociVersion":"1.0.2","mounts":[{mount}]}}"#),
        )?;
        let bench = Self { sandbox: Sandbox::new(&namespace, "c")?, namespace, bundle, process: None };
        bench.sandbox.prepare(&PrepareRequest {
            container_id: "c".to_owned(),
            bundle: bench.bundle.path().to_owned(),
            rootfs: bench.bundle.path().join("rootfs"),
            runtime: "runc".into(),
            restore_from: image.map(Path::to_owned),
            load,
        })?;
        Ok(bench)
    }

    /// Where its tmpfs is mounted.
    pub fn mount(&self) -> PathBuf {
        Path::new(STATE_ROOT).join(&self.namespace).join("c/filesystems/c.0/mnt")
    }

    /// Starts its process, which sleeps.
    pub fn start(self) -> Result<Self> {
        Ok(self.start_with(Command::new("sleep").arg("100000").stdout(Stdio::null()))?.0)
    }

    /// Starts its process; gives what it prints, if that is piped.
    pub fn start_with(mut self, command: &mut Command) -> Result<(Self, Option<ChildStdout>)> {
        let roots = ["/sys/fs/cgroup/freezer", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
        let root = roots.iter().map(Path::new).find(|root| root.join("cgroup.procs").exists());
        let cgroup = root.ok_or("no cgroup hierarchy with a freezer is mounted")?.join(&self.namespace);
        fs::create_dir(&cgroup)?;
        let mut child = command.stdin(Stdio::null()).spawn()?;
        let output = child.stdout.take();
        fs::write(cgroup.join("cgroup.procs"), child.id().to_string())?;
        self.sandbox.set_init_pid("c", child.id().cast_signed())?;
        self.process = Some((child, cgroup));
        Ok((self, output))
    }

    /// Takes a checkpoint in the way that is done first, with all copying under the freeze.
    pub fn checkpoint(&self, image: &Path) -> Result<CheckpointResult> {
        let request = CheckpointRequest { precopy: false, ..CheckpointRequest::new("c", image) };
        Ok(self.sandbox.checkpoint(&request)?)
    }

    /// Takes a checkpoint with all that can be copied before copied, and throws it away.
    pub fn live_checkpoint(&self, image: &Path) -> Result<CheckpointResult> {
        let result = self.sandbox.checkpoint(&CheckpointRequest::new("c", image))?;
        fs::remove_dir_all(image)?;
        Ok(result)
    }

    /// Does something while its process is frozen; for how long it was, in seconds.
    pub fn frozen(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let (_, cgroup) = self.process.as_ref().ok_or("no process was started")?;
        let cgroup = match cgroup.join("freezer.state").exists() {
            true => Cgroup::V1(cgroup.clone()),
            false => Cgroup::V2(cgroup.clone()),
        };
        let begun = Instant::now();
        let frozen = cgroup.freeze(FREEZE_TIMEOUT)?;
        work()?;
        drop(frozen);
        Ok(begun.elapsed().as_secs_f64())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some((child, cgroup)) = &mut self.process {
            let _ = child.kill();
            let _ = child.wait();
            let _ = fs::remove_dir(cgroup);
        }
        if let Err(error) = self.sandbox.remove("c") {
            eprintln!("bench: {error}");
        }
    }
}
