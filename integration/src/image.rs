//! The images that the tests run: busybox and the probe, as an OCI image layout in one tar file.
//!
//! Built here because no image registry is needed for two programs, and the same bytes come out each time:
//! names in order, no times, no owners. One uncompressed layer, with two names: that of the tests' containers, and that
//! of what holds a pod's namespaces, whose command waits to be killed.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;

use serde_json::json;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::binaries;

/// The name that containerd knows the image by.
pub const NAME: &str = "stillframe.test/probe:latest";

/// The name of the image that a pod's sandbox runs.
pub const PAUSE: &str = "stillframe.test/pause:latest";

/// Why the image can't be built.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A program isn't installed.
    #[error("{0} isn't installed: scripts/setup installs it")]
    Missing(&'static str),
    /// Reading the programs or writing the image.
    #[error("building the image: {0}")]
    Io(#[from] io::Error),
}

/// Writes the images to `path`.
pub fn build(path: &Path) -> Result<(), ImageError> {
    let busybox = binaries::find("busybox").ok_or(ImageError::Missing("busybox"))?;
    let layer = layer(&busybox, &binaries::probe())?;
    let commands = [(NAME, &["/bin/sh"][..]), (PAUSE, &["/bin/probe", "idle"])];
    write(path, &layer, "application/vnd.oci.image.layer.v1.tar", &commands)
}

/// Writes an image whose one layer is a file, compressed with gzip or not at all, to `path`. It can't be run.
pub fn of_layer(path: &Path, name: &str, layer: &Path) -> Result<(), ImageError> {
    let layer = fs::read(layer)?;
    let gzip = if layer.starts_with(&[0x1f, 0x8b]) { "+gzip" } else { "" };
    write(path, &layer, &format!("application/vnd.oci.image.layer.v1.tar{gzip}"), &[(name, &[][..])])
}

/// Images of one layer, by name and command.
fn write(
    path: &Path,
    layer: &[u8],
    layer_type: &str,
    commands: &[(&str, &[&str])],
) -> Result<(), ImageError> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let mut entries = Vec::new();
    let mut blobs = Vec::new();
    for (name, command) in commands {
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": command, "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [digest(layer)]},
            "history": [{"created_by": "stillframe-integration"}],
        })
        .to_string();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", config.as_bytes()),
            "layers": [descriptor(layer_type, layer)],
        })
        .to_string();
        let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", manifest.as_bytes());
        entry["platform"] = json!({"architecture": architecture, "os": "linux"});
        entry["annotations"] =
            json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "latest"});
        entries.push(entry);
        blobs.extend([manifest, config]);
    }
    let index = json!({"schemaVersion": 2, "manifests": entries}).to_string();

    let mut tar = Builder::new(io::BufWriter::new(fs::File::create(path)?));
    let layout = r#"{"imageLayoutVersion":"1.0.0"}"#;
    append_file(&mut tar, "oci-layout", 0o644, layout.as_bytes())?;
    append_file(&mut tar, "index.json", 0o644, index.as_bytes())?;
    for blob in blobs.iter().map(String::as_bytes).chain([layer]) {
        append_file(&mut tar, &format!("blobs/sha256/{}", &digest(blob)["sha256:".len()..]), 0o644, blob)?;
    }
    tar.into_inner()?.flush()?;
    Ok(())
}

fn layer(busybox: &Path, probe: &Path) -> Result<Vec<u8>, ImageError> {
    let list = Command::new(busybox).arg("--list").output()?;
    let mut applets: Vec<_> = String::from_utf8_lossy(&list.stdout).lines().map(str::to_owned).collect();
    applets.sort();
    applets.retain(|applet| applet != "busybox");
    let mut tar = Builder::new(Vec::new());
    for dir in ["bin", "dev", "etc", "proc", "sys", "tmp", "run", "root"] {
        append(
            &mut tar,
            &format!("{dir}/"),
            EntryType::Directory,
            if dir == "tmp" { 0o1777 } else { 0o755 },
            None,
            b"",
        )?;
    }
    append_file(
        &mut tar,
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n",
    )?;
    append_file(&mut tar, "etc/group", 0o644, b"root:x:0:\nuser:x:1000:\n")?;
    append_file(&mut tar, "bin/busybox", 0o755, &fs::read(busybox)?)?;
    append_file(&mut tar, "bin/probe", 0o755, &fs::read(probe)?)?;
    for applet in applets {
        append(&mut tar, &format!("bin/{applet}"), EntryType::Symlink, 0o777, Some("busybox"), b"")?;
    }
    Ok(tar.into_inner()?)
}

fn append_file<W: Write>(tar: &mut Builder<W>, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
    append(tar, name, EntryType::Regular, mode, None, content)
}

fn append<W: Write>(
    tar: &mut Builder<W>,
    name: &str,
    kind: EntryType,
    mode: u32,
    target: Option<&str>,
    content: &[u8],
) -> io::Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(content.len() as u64);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    match target {
        Some(target) => tar.append_link(&mut header, name, target),
        None => tar.append_data(&mut header, name, content),
    }
}

fn descriptor(media_type: &str, blob: &[u8]) -> serde_json::Value {
    json!({"mediaType": media_type, "digest": digest(blob), "size": blob.len()})
}

fn digest(blob: &[u8]) -> String {
    let mut text = String::from("sha256:");
    for byte in Sha256::digest(blob) {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}
