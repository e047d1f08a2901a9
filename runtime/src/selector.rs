//! Which filesystems a checkpoint takes: `PATH`, `CONTAINER:PATH`, `all-tmpfs`, `CONTAINER:all-tmpfs`.
//!
//! gVisor's `--path` syntax. A `PATH` begins with `/`, so what stands before `:/` is a container's name
//! and a path may hold colons itself. Paths are compared in their clean form.

use std::fmt;
use std::str::FromStr;

use stillframe_tmpfs::ResourceId;
use stillframe_tmpfs::resource::clean;

/// Selects every filesystem.
pub const ALL: &str = "all-tmpfs";

/// One selection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector {
    container: Option<String>,
    /// `None`: all.
    path: Option<String>,
}

/// A selection that can't be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" selects no filesystem: give a mount's absolute path, CONTAINER:PATH, or all-tmpfs")]
pub struct SelectorError(String);

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        let text = text.trim();
        let (container, path) = match text.split_once(':') {
            Some((container, path)) if !text.starts_with('/') => (Some(container.to_owned()), path),
            _ => (None, text),
        };
        let path = match path {
            ALL => None,
            path if path.starts_with('/') => Some(clean(path)),
            _ => return Err(SelectorError(text.to_owned())),
        };
        Ok(Self { container, path })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(container) = &self.container {
            write!(f, "{container}:")?;
        }
        write!(f, "{}", self.path.as_deref().unwrap_or(ALL))
    }
}

impl Selector {
    /// Whether it selects a filesystem of that ResourceID.
    pub fn matches(&self, id: &ResourceId) -> bool {
        self.container.as_ref().is_none_or(|container| *container == id.container)
            && self.path.as_ref().is_none_or(|path| *path == id.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selections_are_understood_or_refused() {
        let web = ResourceId::new("web", "/data");
        let colon = ResourceId::new("web", "/a:b");
        for (text, selects_web, selects_colon) in [
            ("/data", true, false),
            (" /data/ ", true, false),
            ("web:/data", true, false),
            ("db:/data", false, false),
            ("/a:b", false, true),
            ("web:/a:b", false, true),
            ("all-tmpfs", true, true),
            ("web:all-tmpfs", true, true),
            ("db:all-tmpfs", false, false),
        ] {
            let selector: Selector = text.parse().unwrap();
            assert_eq!(
                (selector.matches(&web), selector.matches(&colon)),
                (selects_web, selects_colon),
                "{text}"
            );
        }
        for text in ["", "data", "web:", "web:data", ":"] {
            assert!(text.parse::<Selector>().is_err(), "{text}");
        }
        assert_eq!("web:/x/".parse::<Selector>().unwrap().to_string(), "web:/x");
    }
}
