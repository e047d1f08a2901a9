//! The node's configuration: `/etc/stillframe/config.json`, which need not be there.
//!
//! ```json
//! {"filestore_dir": "/var/lib/stillframe/filestore"}
//! ```
//!
//! The environment variable `STILLFRAME_FILESTORE_DIR` counts before the file. A file that can't be understood is an
//! error: nobody should find out later that half of it was ignored.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where the file is.
pub const CONFIG_FILE: &str = "/etc/stillframe/config.json";
/// The variable that counts before the file's `filestore_dir`.
pub const FILESTORE_VARIABLE: &str = "STILLFRAME_FILESTORE_DIR";
/// Where filestores are when nothing says otherwise.
pub const FILESTORE_DIR: &str = "/var/lib/stillframe/filestore";

/// The configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Directory of the files that hold filesystems on disk; made when it is needed.
    pub filestore_dir: PathBuf,
}

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
    #[error("{origin}: filestore_dir {directory:?} must be an absolute path")]
    Relative {
        /// Where it is said.
        origin: String,
        /// The path.
        directory: PathBuf,
    },
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    filestore_dir: Option<PathBuf>,
}

impl Config {
    /// The node's.
    pub fn load() -> Result<Self, ConfigError> {
        Self::from(Path::new(CONFIG_FILE), std::env::var_os(FILESTORE_VARIABLE))
    }

    fn from(path: &Path, variable: Option<OsString>) -> Result<Self, ConfigError> {
        let fields = match std::fs::read(path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|source| ConfigError::Json { path: path.to_owned(), source })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Fields::default(),
            Err(source) => return Err(ConfigError::Read { path: path.to_owned(), source }),
        };
        let variable = variable.filter(|value| !value.is_empty()).map(PathBuf::from);
        let (origin, directory) = match (variable, fields.filestore_dir) {
            (Some(directory), _) => (FILESTORE_VARIABLE.to_owned(), directory),
            (None, Some(directory)) => (path.display().to_string(), directory),
            (None, None) => (String::new(), PathBuf::from(FILESTORE_DIR)),
        };
        if !directory.is_absolute() {
            return Err(ConfigError::Relative { origin, directory });
        }
        Ok(Self { filestore_dir: directory })
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
            Config::from(&path, variable.map(OsString::from)).map(|config| config.filestore_dir)
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
            (None, Some("x/y"), "STILLFRAME_FILESTORE_DIR: filestore_dir \"x/y\" must be"),
            (Some("{"), Some("/variable"), "config.json can't be understood"),
        ] {
            let error = directory(text, variable).unwrap_err();
            assert!(error.to_string().contains(want), "{error}");
        }
        let error = Config::from(dir.path(), None).unwrap_err();
        assert!(matches!(error, ConfigError::Read { .. }), "{error}");
    }
}
