//! A pod without containerd or runc: bundles, processes in cgroups of their own, real filesystems.
#![allow(dead_code, reason = "each test program uses some of it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use stillframe_runtime::cli::chain;
use stillframe_runtime::config::Config;
use stillframe_runtime::sandbox::{
    CheckpointRequest, CheckpointResult, Load, PrepareRequest, Prepared, Sandbox,
};
use stillframe_runtime::state::STATE_ROOT;

/// A sandbox with any number of containers, of which only the filesystems and sleeping processes are real.
pub struct Pod {
    pub namespace: String,
    pub sandbox: Sandbox,
    pub dir: tempfile::TempDir,
    /// Whether containers are in cgroups of v2 even where there is a v1 freezer.
    pub unified: bool,
    /// When restored files are loaded.
    pub load: Load,
    pub containers: Vec<&'static str>,
    pub processes: Vec<(Child, PathBuf)>,
}

/// See [`Pod::charge`].
pub struct MemoryCgroup {
    pub path: PathBuf,
    usage: &'static str,
}

impl MemoryCgroup {
    /// Bytes that are charged to it.
    pub fn usage(&self) -> u64 {
        fs::read_to_string(self.path.join(self.usage)).unwrap().trim().parse().unwrap()
    }

    /// What they are.
    pub fn statistics(&self) -> String {
        fs::read_to_string(self.path.join("memory.stat")).unwrap()
    }
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

impl Pod {
    pub fn new() -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("pod-{}-{number}", std::process::id());
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let config = Config { filestore_dir: dir.path().join("filestore"), ..Config::default() };
        let sandbox = Sandbox::new(&namespace, "s").unwrap().with_config(config);
        Self {
            namespace,
            sandbox,
            dir,
            unified: false,
            load: Load::InPrepare,
            containers: Vec::new(),
            processes: Vec::new(),
        }
    }

    /// Makes a bundle of members of config.json, and prepares the container.
    pub fn prepare(
        &mut self,
        id: &'static str,
        config: &str,
        image: Option<&Path>,
    ) -> Result<Prepared, String> {
        let bundle = self.dir.path().join(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::write(bundle.join("config.json"), format!("{{{config}}}")).unwrap();
        let request = PrepareRequest {
            container_id: id.to_owned(),
            rootfs: bundle.join("rootfs"),
            bundle,
            runtime: "runc".into(),
            restore_from: image.map(Path::to_owned),
            load: self.load.clone(),
        };
        let prepared = self.sandbox.prepare(&request).map_err(|error| chain(&error));
        if prepared.is_ok() {
            self.containers.push(id);
        }
        prepared
    }

    /// Starts a container's process, in a cgroup of the v1 freezer or else of v2.
    pub fn start(&mut self, id: &str, command: &mut Command) {
        self.start_reading(id, command.stdout(Stdio::inherit()));
    }

    /// The same; gives what it prints, if that is piped.
    pub fn start_reading(&mut self, id: &str, command: &mut Command) -> Option<ChildStdout> {
        let pid = self.spawn(id, command);
        self.sandbox.set_init_pid(id, pid).unwrap();
        self.processes.last_mut().unwrap().0.stdout.take()
    }

    /// Starts the process only; its pid.
    pub fn spawn(&mut self, id: &str, command: &mut Command) -> i32 {
        let v1 = Path::new("/sys/fs/cgroup/freezer");
        let v2 = [Path::new("/sys/fs/cgroup/unified"), Path::new("/sys/fs/cgroup")];
        let v2 = v2.into_iter().find(|path| path.join("cgroup.subtree_control").exists());
        let root = if v1.is_dir() && !self.unified { v1 } else { v2.expect("a cgroup hierarchy") };
        let cgroup = root.join(format!("{}-{id}", self.namespace));
        fs::create_dir(&cgroup).unwrap();
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let pid = child.id();
        fs::write(cgroup.join("cgroup.procs"), pid.to_string()).unwrap();
        self.processes.push((child, cgroup));
        pid.cast_signed()
    }

    /// A cgroup that the memory of `process`, which was spawned, is charged to: one of its own in the v1 hierarchy of memory, else that
    /// of v2. `None` where neither counts memory.
    pub fn charge(&self, process: i32) -> Option<MemoryCgroup> {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        if v1.join("memory.usage_in_bytes").exists() {
            let path = v1.join(&self.namespace);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("cgroup.procs"), process.to_string()).unwrap();
            return Some(MemoryCgroup { path, usage: "memory.usage_in_bytes" });
        }
        let path = &self.processes.iter().find(|(child, _)| child.id().cast_signed() == process)?.1;
        let usage = "memory.current";
        path.join(usage).exists().then(|| MemoryCgroup { path: path.clone(), usage })
    }

    /// Waits until the first container's process has died.
    pub fn await_death(&mut self) {
        self.processes[0].0.wait().unwrap();
    }

    /// A running container.
    pub fn running(&mut self, id: &'static str, config: &str) -> Prepared {
        let prepared = self.prepare(id, config, None).unwrap();
        self.start(id, Command::new("sleep").arg("1000"));
        prepared
    }

    pub fn state(&self) -> PathBuf {
        Path::new(STATE_ROOT).join(&self.namespace)
    }

    /// Where a filesystem is mounted, by the name of its directory.
    pub fn mount(&self, name: &str) -> PathBuf {
        self.state().join(format!("s/filesystems/{name}/mnt"))
    }

    /// The file of a filesystem on disk.
    pub fn file(&self, name: &str) -> PathBuf {
        self.file_in(&self.dir.path().join("filestore"), name)
    }

    /// The same with another directory of filestores.
    pub fn file_in(&self, filestore: &Path, name: &str) -> PathBuf {
        filestore.join(format!("{}/s/{name}.img", self.namespace))
    }

    /// What config.json says of the container's mounts now.
    pub fn mounts(&self, id: &str) -> Vec<serde_json::Value> {
        let config = fs::read(self.dir.path().join(id).join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        config["mounts"].as_array().unwrap().clone()
    }

    pub fn checkpoint(&self, id: &str, image: &Path, paths: &[&str]) -> Result<CheckpointResult, String> {
        let request = CheckpointRequest {
            paths: paths.iter().map(|path| path.parse().unwrap()).collect(),
            ..CheckpointRequest::new(id, image)
        };
        self.sandbox.checkpoint(&request).map_err(|error| chain(&error))
    }

    pub fn remove(&mut self, id: &str) {
        self.sandbox.remove(id).unwrap();
        self.containers.retain(|other| *other != id);
    }

    /// Neither mount nor loop device nor file nor state is left.
    pub fn assert_nothing_is_left(&self) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        // With a slash: the number of another pod may begin with this one's.
        assert!(!mounts.contains(&format!("{}/", self.state().display())), "{mounts}");
        assert!(!self.state().exists());
        let filestore = self.dir.path().join("filestore");
        let left = fs::read_dir(&filestore).map_or(0, |entries| entries.count());
        assert_eq!(left, 0, "files in {filestore:?}");
        // A process that another test is just starting may have our descriptors until it executes its program.
        let deadline = Instant::now() + Duration::from_secs(10);
        while is_attached(&filestore) {
            assert!(Instant::now() < deadline, "a loop device of {filestore:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        for (child, cgroup) in &mut self.processes {
            let _ = fs::write(cgroup.join("freezer.state"), "THAWED");
            let _ = fs::write(cgroup.join("cgroup.freeze"), "0");
            let _ = child.kill();
            let _ = child.wait();
            // What it had started itself may be a moment away from its end.
            let deadline = Instant::now() + Duration::from_secs(10);
            while fs::remove_dir(&*cgroup).is_err() && cgroup.exists() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        for id in std::mem::take(&mut self.containers) {
            self.sandbox.remove(id).unwrap();
        }
        if !std::thread::panicking() {
            self.assert_nothing_is_left();
        }
    }
}

/// Whether a loop device has a file below `directory`.
pub fn is_attached(directory: &Path) -> bool {
    let devices = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
    let mut backing =
        devices.map(|device| fs::read_to_string(device.join("loop/backing_file")).unwrap_or_default());
    backing.any(|backing| Path::new(backing.trim()).starts_with(directory))
}
