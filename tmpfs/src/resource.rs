//! ResourceID: the name under which a filesystem is saved and found again.
//!
//! A ResourceID is stored on the filesystem, not on its MemoryFile, so that filesystems which share
//! the main MemoryFile can be told apart. Every tmpfs made from the OCI spec has one; a tmpfs that
//! the application mounts with mount(2) has none and is never saved.

use std::fmt;

use serde::{Deserialize, Serialize};

/// (container name, path): what a filesystem is called in an image.
///
/// `path` is the mount's destination in the container, absolute and without `.`, `..`, doubled or
/// trailing slashes. The container name may be empty (a filesystem that belongs to the pod).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ResourceId {
    /// Name of the container, as matched at restore.
    pub container: String,
    /// Destination of the mount in the container.
    pub path: String,
}

impl ResourceId {
    /// Makes the ResourceID of the mount at `path` of `container`; `path` is normalised lexically.
    pub fn new(container: impl Into<String>, path: &str) -> Self {
        Self { container: container.into(), path: clean(path) }
    }
}

impl fmt::Display for ResourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.container, self.path)
    }
}

/// Lexical normalisation of an absolute path, as Go's `filepath.Clean` does it: containers' mount
/// destinations are compared in this form.
pub fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            name => parts.push(name),
        }
    }
    format!("/{}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_compared_in_its_clean_form() {
        for (given, want) in [
            ("/data", "/data"),
            ("/data/", "/data"),
            ("//data///x/./y", "/data/x/y"),
            ("/data/../dev/shm", "/dev/shm"),
            ("data", "/data"),
            ("/..", "/"),
        ] {
            assert_eq!(ResourceId::new("c", given).path, want, "{given}");
        }
    }
}
