//! The options that containerd attaches to a task: how runc is to be run.
//!
//! They come as a protobuf `Any` of three kinds (see `pkg/shim` and `internal/cri/config` in containerd):
//! - `containerd.runc.v1.Options` from `ctr`, from clients and from CRI where our binary stands behind the name
//!   `io.containerd.runc.v2`;
//! - `runtimeoptions.v1.Options` from CRI where the runtime has our own name, and from `ctr --runtime-config-path`: a
//!   TOML table with the same fields by their Go names, inline or in a file;
//! - an empty `Any` (`ctr containers restore`) or one of a type that isn't ours: defaults.

use std::path::PathBuf;

use containerd_shim::api::Options;
use containerd_shim::bootstrap::any_is;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::protobuf::well_known_types::empty::Empty;
use containerd_shim::protos::protobuf::{self, Message, UnknownValueRef};
use containerd_shim::protos::shim::oci::CheckpointOptions;
use serde::Deserialize;

/// Why options can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// Not the message its type URL says.
    #[error("options of type {type_url} can't be decoded")]
    Decode {
        /// What the message claims to be.
        type_url: String,
        /// What protobuf says.
        #[source]
        source: protobuf::Error,
    },
    /// The runtime's TOML table.
    #[error(
        "the runtime's option table is not valid, check the options of the runtime in containerd's configuration"
    )]
    Table(#[source] toml::de::Error),
    /// The runtime's TOML file.
    #[error("the runtime's option file {path} can't be read")]
    File {
        /// As containerd gave it.
        path: PathBuf,
        /// What open(2) or read(2) said.
        #[source]
        source: std::io::Error,
    },
}

/// The fields of `containerd.runc.v1.Options` as they are spelt in containerd's configuration.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Table {
    no_pivot_root: bool,
    no_new_keyring: bool,
    shim_cgroup: String,
    io_uid: u32,
    io_gid: u32,
    binary_name: String,
    root: String,
    systemd_cgroup: bool,
}

/// The name that containerd's typeurl gives `runtimeoptions.v1.Options`, and those before it.
const RUNTIME_OPTIONS: [&str; 2] = ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"];
/// Field numbers of `runtimeoptions.v1.Options`, which containerd-shim-protos doesn't have.
const CONFIG_PATH: u32 = 2;
const CONFIG_BODY: u32 = 3;

/// Reads a task's options; `None` and types that aren't ours give the defaults.
pub fn decode(any: Option<&Any>) -> Result<Options, OptionsError> {
    let Some(any) = any else { return Ok(Options::default()) };
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    if any_is::<Options>(any) {
        Options::parse_from_bytes(&any.value).map_err(|source| not_decoded(any, source))
    } else if RUNTIME_OPTIONS.contains(&name) {
        runtime_options(any)
    } else {
        if !name.is_empty() {
            tracing::debug!(type_url = any.type_url, "options of an unknown type are ignored");
        }
        Ok(Options::default())
    }
}

fn runtime_options(any: &Any) -> Result<Options, OptionsError> {
    let fields = Empty::parse_from_bytes(&any.value).map_err(|source| not_decoded(any, source))?;
    let field = |number| match fields.special_fields.unknown_fields().get(number) {
        Some(UnknownValueRef::LengthDelimited(bytes)) if !bytes.is_empty() => {
            Some(String::from_utf8_lossy(bytes).into_owned())
        }
        _ => None,
    };
    let table = match (field(CONFIG_BODY), field(CONFIG_PATH).map(PathBuf::from)) {
        (Some(body), _) => body,
        (None, Some(path)) => {
            std::fs::read_to_string(&path).map_err(|source| OptionsError::File { path, source })?
        }
        (None, None) => return Ok(Options::default()),
    };
    let table: Table = toml::from_str(&table).map_err(OptionsError::Table)?;
    Ok(Options {
        no_pivot_root: table.no_pivot_root,
        no_new_keyring: table.no_new_keyring,
        shim_cgroup: table.shim_cgroup,
        io_uid: table.io_uid,
        io_gid: table.io_gid,
        binary_name: table.binary_name,
        root: table.root,
        systemd_cgroup: table.systemd_cgroup,
        ..Default::default()
    })
}

/// How a checkpoint is to be made. Only whether the task has to die once it is saved (`exit`) isn't about CRIU.
pub fn checkpoint(any: Option<&Any>) -> Result<CheckpointOptions, OptionsError> {
    match any {
        Some(any) if any_is::<CheckpointOptions>(any) => {
            CheckpointOptions::parse_from_bytes(&any.value).map_err(|source| not_decoded(any, source))
        }
        _ => Ok(CheckpointOptions::default()),
    }
}

fn not_decoded(any: &Any, source: protobuf::Error) -> OptionsError {
    OptionsError::Decode { type_url: any.type_url.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any { type_url: type_url.into(), value: value.into(), ..Default::default() }
    }

    /// A protobuf field of wire type 2 shorter than 128 bytes.
    fn field(number: u8, text: &str) -> Vec<u8> {
        [&[number << 3 | 2, text.len() as u8], text.as_bytes()].concat()
    }

    #[test]
    fn runc_options_are_taken_as_they_are() {
        let sent = Options { binary_name: "crun".into(), systemd_cgroup: true, ..Default::default() };
        for prefix in ["", "type.googleapis.com/"] {
            let url = format!("{prefix}containerd.runc.v1.Options");
            assert_eq!(decode(Some(&any(&url, &sent.write_to_bytes().unwrap()))).unwrap(), sent);
        }
    }

    #[test]
    fn a_table_has_the_names_of_containerd_s_configuration() {
        let body = field(3, "SystemdCgroup = true\nBinaryName = \"crun\"\nIoUid = 7\nOther = 1\n");
        for url in ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"] {
            let options = decode(Some(&any(url, &body))).unwrap();
            assert!(options.systemd_cgroup);
            assert_eq!((options.binary_name.as_str(), options.io_uid), ("crun", 7));
        }
    }

    #[test]
    fn a_table_may_be_in_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "Root = \"/run/other\"\n").unwrap();
        let path = field(2, file.path().to_str().unwrap());
        assert_eq!(decode(Some(&any("runtimeoptions.v1.Options", &path))).unwrap().root, "/run/other");
        let missing = any("runtimeoptions.v1.Options", &field(2, "/nonexistent"));
        assert!(decode(Some(&missing)).unwrap_err().to_string().contains("/nonexistent"));
    }

    #[test]
    fn empty_and_foreign_options_are_defaults() {
        for foreign in
            [any("", b""), any("containerd.linux.runc.CreateOptions", b"\x0a\x01x"), any("x", b"\xff")]
        {
            assert_eq!(decode(Some(&foreign)).unwrap(), Options::default());
        }
        assert_eq!(decode(None).unwrap(), Options::default());
        assert_eq!(decode(Some(&any("runtimeoptions.v1.Options", b""))).unwrap(), Options::default());
    }

    #[test]
    fn broken_options_are_errors() {
        assert!(decode(Some(&any("containerd.runc.v1.Options", b"\xff"))).is_err());
        assert!(decode(Some(&any("runtimeoptions.v1.Options", b"\xff"))).is_err());
        assert!(decode(Some(&any("runtimeoptions.v1.Options", &field(3, "SystemdCgroup = 3")))).is_err());
    }

    #[test]
    fn only_exit_is_read_from_checkpoint_options() {
        let exit = CheckpointOptions { exit: true, ..Default::default() }.write_to_bytes().unwrap();
        let url = "containerd.runc.v1.CheckpointOptions";
        let exits = |any: Option<&Any>| checkpoint(any).unwrap().exit;
        assert!(exits(Some(&any(url, &exit))));
        // `ctr containers checkpoint` sends file_locks and nothing else.
        assert!(!exits(Some(&any(url, &[40, 1]))));
        assert!(!exits(Some(&any(url, &[]))));
        assert!(!exits(Some(&any("containerd.linux.runc.CheckpointOptions", &exit))));
        assert!(!exits(None));
        assert!(checkpoint(Some(&any(url, &[0xff]))).is_err());
    }
}
