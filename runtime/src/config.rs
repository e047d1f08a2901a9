//! The node's configuration: `/etc/stillframe/config.json`, which need not be there.
//!
//! ```json
//! {"filestore_dir": "/var/lib/stillframe/filestore", "checkpoint_mode": "filesystem", "criu": "/usr/sbin/criu"}
//! ```
//!
//! The environment variables `STILLFRAME_FILESTORE_DIR` and `STILLFRAME_CRIU` count before the file. A file that can't be understood is an
//! error: nobody should find out later that half of it was ignored.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where the file is.
pub const CONFIG_FILE: &str = "/etc/stillframe/config.json";
/// The variable that counts before the file's `filestore_dir`.
pub const FILESTORE_VARIABLE: &str = "STILLFRAME_FILESTORE_DIR";
/// The variable that counts before the file's `criu`.
pub const CRIU_VARIABLE: &str = "STILLFRAME_CRIU";
/// Where filestores are when nothing says otherwise.
pub const FILESTORE_DIR: &str = "/var/lib/stillframe/filestore";

/// The configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Directory of the files that hold filesystems on disk, and of unpacked images; made when it is needed.
    pub filestore_dir: PathBuf,
    /// What a checkpoint through containerd saves where the container's annotations don't say.
    pub checkpoint_mode: CheckpointMode,
    /// The CRIU to use; none is the one in PATH.
    pub criu: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        let filestore_dir = FILESTORE_DIR.into();
        Self { filestore_dir, checkpoint_mode: CheckpointMode::default(), criu: None }
    }
}

/// What a checkpoint saves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointMode {
    /// The container's filesystems.
    #[default]
    Filesystem,
    /// Its processes besides, by CRIU, at the same instant.
    Full,
}

impl std::str::FromStr for CheckpointMode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        match text {
            "filesystem" => Ok(Self::Filesystem),
            "full" => Ok(Self::Full),
            other => Err(UnknownMode(other.to_owned())),
        }
    }
}

/// A mode that isn't one.
#[derive(Debug, thiserror::Error)]
#[error("the checkpoint mode \"{0}\" is unknown: there are filesystem and full")]
pub struct UnknownMode(String);

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("read the configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file isn't what it should be.
    #[error("the configuration {path} can't be understood")]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A directory by a relative path, which would depend on who asks.
    #[error("{origin}: {field} {directory:?} must be an absolute path")]
    Relative {
        /// Where it is said.
        origin: String,
        /// Which.
        field: &'static str,
        /// The path.
        directory: PathBuf,
    },
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    filestore_dir: Option<PathBuf>,
    #[serde(default)]
    checkpoint_mode: CheckpointMode,
    criu: Option<PathBuf>,
}

impl Config {
    /// The node's.
    pub fn load() -> Result<Self, ConfigError> {
        let variable = std::env::var_os;
        Self::from(Path::new(CONFIG_FILE), variable(FILESTORE_VARIABLE), variable(CRIU_VARIABLE))
    }

    fn from(path: &Path, filestores: Option<OsString>, criu: Option<OsString>) -> Result<Self, ConfigError> {
        let fields = match std::fs::read(path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|source| ConfigError::Json { path: path.to_owned(), source })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Fields::default(),
            Err(source) => return Err(ConfigError::Read { path: path.to_owned(), source }),
        };
        let choose = |field, name: &str, variable: Option<OsString>, inside: Option<PathBuf>| {
            let variable = variable.filter(|value| !value.is_empty()).map(PathBuf::from);
            let (origin, chosen) = match (variable, inside) {
                (Some(chosen), _) => (name.to_owned(), chosen),
                (None, Some(chosen)) => (path.display().to_string(), chosen),
                (None, None) => return Ok(None),
            };
            if chosen.is_absolute() {
                return Ok(Some(chosen));
            }
            Err(ConfigError::Relative { origin, field, directory: chosen })
        };
        let directory = choose("filestore_dir", FILESTORE_VARIABLE, filestores, fields.filestore_dir)?;
        Ok(Self {
            filestore_dir: directory.unwrap_or_else(|| FILESTORE_DIR.into()),
            checkpoint_mode: fields.checkpoint_mode,
            criu: choose("criu", CRIU_VARIABLE, criu, fields.criu)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_counts_before_the_file_and_the_file_before_the_default() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let directory = |text: Option<&str>, variable: Option<&str>| {
            match text {
                Some(text) => std::fs::write(&path, text).unwrap(),
                None => drop(std::fs::remove_file(&path)),
            }
            Config::from(&path, variable.map(OsString::from), None).map(|config| config.filestore_dir)
        };
        let set = r#"{"filestore_dir": "/file"}"#;
        for (text, variable, want) in [
            (None, None, FILESTORE_DIR),
            (Some("{}"), None, FILESTORE_DIR),
            (Some(set), None, "/file"),
            (Some(set), Some(""), "/file"),
            (Some(set), Some("/variable"), "/variable"),
            (None, Some("/variable"), "/variable"),
        ] {
            assert_eq!(directory(text, variable).unwrap(), Path::new(want), "{text:?} {variable:?}");
        }
        for (text, variable, want) in [
            (Some("{"), None, "config.json can't be understood"),
            (Some(r#"{"filestore": "/x"}"#), None, "config.json can't be understood"),
            (Some(r#"{"filestore_dir": "x"}"#), None, "filestore_dir \"x\" must be an absolute path"),
            (Some(r#"{"criu": "criu"}"#), None, "config.json: criu \"criu\" must be an absolute path"),
            (Some(r#"{"checkpoint_mode": "all"}"#), None, "config.json can't be understood"),
            (None, Some("x/y"), "STILLFRAME_FILESTORE_DIR: filestore_dir \"x/y\" must be"),
            (Some("{"), Some("/variable"), "config.json can't be understood"),
        ] {
            let error = directory(text, variable).unwrap_err();
            assert!(error.to_string().contains(want), "{error}");
        }
        std::fs::write(&path, r#"{"checkpoint_mode": "full", "criu": "/opt/criu"}"#).unwrap();
        let config = Config::from(&path, None, None).unwrap();
        assert_eq!((config.checkpoint_mode, config.criu), (CheckpointMode::Full, Some("/opt/criu".into())));
        let config = Config::from(&path, None, Some("/bin/criu".into())).unwrap();
        assert_eq!(config.criu, Some("/bin/criu".into()));
        let error = Config::from(dir.path(), None, None).unwrap_err();
        assert!(matches!(error, ConfigError::Read { .. }), "{error}");
    }
}
