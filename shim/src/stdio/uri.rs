//! Where a process's output goes: containerd's fifo paths and log URIs.
//!
//! containerd-shim-runc-v2's rules (process/io.go): no scheme means a path, a fifo as a rule; `file://` a file to append to;
//! `binary://` a logging binary whose query is its arguments. The URI of stdout decides for both streams.

use std::path::PathBuf;

use percent_encoding::percent_decode_str;

/// Where a stream goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A path that containerd made: a fifo, or else a file to append to.
    Path(PathBuf),
    /// A file to append to, made if missing.
    File(PathBuf),
    /// A binary that reads the streams.
    Binary(Binary),
}

/// A logging binary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binary {
    /// What to execute.
    pub path: PathBuf,
    /// With which arguments: each key of the query and its value, where it has one.
    pub arguments: Vec<String>,
}

/// A scheme nobody knows.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown STDIO scheme {scheme} in {uri}: use a path, file:// or binary://")]
pub struct UnknownScheme {
    scheme: String,
    uri: String,
}

/// Takes an output path or URI apart.
pub fn parse(uri: &str) -> Result<Target, UnknownScheme> {
    let Some((scheme, rest)) = uri.split_once("://") else { return Ok(Target::Path(uri.into())) };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    // An authority is allowed and means nothing: `file://localhost/x` is /x.
    let path = path.find('/').map_or(path, |slash| &path[slash..]);
    let path = PathBuf::from(percent_decode_str(path).decode_utf8_lossy().into_owned());
    match scheme {
        "fifo" => Ok(Target::Path(path)),
        "file" => Ok(Target::File(path)),
        "binary" => Ok(Target::Binary(Binary { path, arguments: arguments(query) })),
        _ => Err(UnknownScheme { scheme: scheme.into(), uri: uri.into() }),
    }
}

/// Go's `url.Values` has a value for each key, if an empty one, and each is an argument (NewBinaryCmd). The first value of a key
/// counts.
fn arguments(query: &str) -> Vec<String> {
    let mut arguments: Vec<String> = Vec::new();
    let mut keys = Vec::new();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        if !keys.contains(&key) {
            arguments.extend([key.clone().into_owned(), value.into_owned()]);
            keys.push(key);
        }
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_paths_files_and_binaries() {
        let binary = |path: &str, arguments: &[&str]| {
            Target::Binary(Binary {
                path: path.into(),
                arguments: arguments.iter().map(ToString::to_string).collect(),
            })
        };
        for (uri, target) in [
            ("/run/containerd/fifo/1/x-stdout", Target::Path("/run/containerd/fifo/1/x-stdout".into())),
            ("fifo:///run/f", Target::Path("/run/f".into())),
            ("file:///var/log/a%20b.log", Target::File("/var/log/a b.log".into())),
            ("file://localhost/x?y", Target::File("/x".into())),
            ("binary:///bin/log", binary("/bin/log", &[])),
            ("binary:///bin/log?_NERDCTL=/var/lib", binary("/bin/log", &["_NERDCTL", "/var/lib"])),
            ("binary:///bin/log?b=1&a&b=2&c=%3D+x", binary("/bin/log", &["b", "1", "a", "", "c", "= x"])),
        ] {
            assert_eq!(parse(uri), Ok(target), "{uri}");
        }
    }

    #[test]
    fn an_unknown_scheme_is_named() {
        let error = parse("npipe:////./pipe/x").unwrap_err().to_string();
        assert!(error.contains("unknown STDIO scheme npipe"), "{error}");
    }
}
