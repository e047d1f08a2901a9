//! containerd's configuration file, for each major version.
//!
//! What isn't named here is as containerd has it when nothing is configured: so is most of a node.

use std::path::Path;

use crate::{binaries, image};

/// What of containerd runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Services {
    /// What `ctr` needs.
    Tasks,
    /// The kubelet's interface besides, with Stillframe as the runtime handlers `stillframe` and `stillframe-as-runc`.
    Cri,
}

/// Plugins that would reach out of the directory or complain about kernel modules; what a version doesn't know it ignores.
const DISABLED: &str = r#"
  "io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs",
"#;
const CRI: &str = r#"
  "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
  "io.containerd.nri.v1.nri",
"#;

/// The file for a containerd of this major version with everything of its below `dir`.
pub fn config(major: u32, services: Services, dir: &Path) -> String {
    let disabled = match services {
        Services::Tasks => format!("{DISABLED}{CRI}"),
        Services::Cri => DISABLED.to_owned(),
    };
    let dir = dir.display();
    // Version 2 is understood by 1.6 and all later ones; but the CRI plugin has other names in 2.x, and its
    // documentation has version 3.
    let version = if services == Services::Cri && major >= 2 { 3 } else { 2 };
    let common = format!(
        r#"version = {version}
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = [{disabled}]

[debug]
  level = "debug"

[grpc]
  address = "{dir}/c.sock"

[ttrpc]
  address = "{dir}/c.sock.ttrpc"

"#
    );
    match (services, version) {
        (Services::Tasks, _) => common,
        (Services::Cri, 2) => common + &cri_2(&dir.to_string()),
        (Services::Cri, _) => common + &cri_3(&dir.to_string()),
    }
}

/// The runtime handlers: Stillframe under its own name, and under that of runc's shim, for which containerd does more.
/// `plugin` is the table that handlers are in.
fn handlers(plugin: &str) -> String {
    let (runc, stillframe) = (crate::RUNC, crate::STILLFRAME);
    let shim = binaries::program("containerd-shim-stillframe-v1");
    let shim = shim.display();
    format!(
        r#"
[{plugin}.containerd]
  default_runtime_name = "runc"

[{plugin}.containerd.runtimes.runc]
  runtime_type = "{runc}"

[{plugin}.containerd.runtimes.stillframe]
  runtime_type = "{stillframe}"
  pod_annotations = ["dev.stillframe.*"]
  container_annotations = ["dev.stillframe.*"]

[{plugin}.containerd.runtimes.stillframe-as-runc]
  runtime_type = "{runc}"
  runtime_path = "{shim}"
  pod_annotations = ["dev.stillframe.*"]
  container_annotations = ["dev.stillframe.*"]
"#
    )
}

/// Without the right to lower a score below its own (CAP_SYS_RESOURCE), and without the host's AppArmor.
const RESTRICTED: &str = r#"
  restrict_oom_score_adj = true
  disable_apparmor = true
"#;

fn cri_2(dir: &str) -> String {
    let plugin = r#"plugins."io.containerd.grpc.v1.cri""#;
    let (handlers, pause) = (handlers(plugin), image::PAUSE);
    format!(
        r#"[plugins."io.containerd.nri.v1.nri"]
  disable = true

[{plugin}]
  sandbox_image = "{pause}"
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
{RESTRICTED}
[{plugin}.cni]
  bin_dir = "{dir}/cni"
  conf_dir = "{dir}/cni"
{handlers}"#
    )
}

fn cri_3(dir: &str) -> String {
    let (runtime, images) =
        (r#"plugins."io.containerd.cri.v1.runtime""#, r#"plugins."io.containerd.cri.v1.images""#);
    let (handlers, pause) = (handlers(runtime), image::PAUSE);
    format!(
        r#"[plugins."io.containerd.nri.v1.nri"]
  disable = true

[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"

[{images}.pinned_images]
  sandbox = "{pause}"

[{runtime}]
{RESTRICTED}
[{runtime}.cni]
  bin_dirs = ["{dir}/cni"]
  conf_dir = "{dir}/cni"
{handlers}"#
    )
}
