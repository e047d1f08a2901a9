//! The containerds to test with: the installed one, and those that `scripts/containerd-versions` has unpacked; and another runc for them.
//!
//! A test for each is made by [`crate::with_every_containerd`]. Where there is none of a series, the test says SKIPPED and
//! the reason that the script gave.

use std::env;
use std::fs;
use std::path::PathBuf;

use crate::binaries;
use crate::containerd::StartError;
use crate::ctr;

/// A containerd that can be started.
#[derive(Debug, Clone)]
pub struct ContainerdVersion {
    /// What to call it in messages.
    pub name: String,
    /// The daemon.
    pub containerd: PathBuf,
    /// Its client.
    pub ctr: PathBuf,
    /// The runc that it and its shims find, if not the installed one.
    pub runc: Option<PathBuf>,
}

impl ContainerdVersion {
    /// The one that is installed.
    pub fn installed() -> Result<Self, StartError> {
        let containerd = binaries::find("containerd").ok_or(StartError::Missing("containerd"))?;
        let ctr = binaries::find("ctr").ok_or(StartError::Missing("ctr"))?;
        Ok(Self { name: "installed".to_owned(), containerd, ctr, runc: None })
    }

    /// The unpacked one of a series, such as `1.7` or `2`; or why there is none.
    pub fn of_series(series: &str) -> Result<Self, String> {
        let cache = cache().join("containerd");
        let dir = cache.join(series).join("usr/bin");
        let (containerd, ctr) = (dir.join("containerd"), dir.join("ctr"));
        if containerd.is_file() && ctr.is_file() {
            return Ok(Self { name: format!("containerd {series}"), containerd, ctr, runc: None });
        }
        let reason = fs::read_to_string(cache.join(format!("{series}.missing")));
        Err(reason.map_or_else(
            |_| {
                format!(
                    "no containerd {series} in {}: scripts/containerd-versions fetches it",
                    cache.display()
                )
            },
            |reason| reason.trim().to_owned(),
        ))
    }

    /// As [`Self::of_series`], and what it is that keeps a test from running is printed.
    pub fn or_skip(series: &str, test: &str) -> Option<Self> {
        Self::of_series(series).map_err(|reason| crate::skip::skipped(test, &reason)).ok()
    }

    /// The same with the runc that `scripts/runc` has found or unpacked, which can map mounts; or why there is none.
    pub fn with_mapping_runc(&self) -> Result<Self, String> {
        let reason = fs::read_to_string(cache().join("runc.missing"));
        if let Ok(reason) = reason {
            return Err(reason.trim().to_owned());
        }
        let runc = cache().join("runc/bin/runc");
        let none = || "no runc that maps mounts is there: scripts/runc fetches one".to_owned();
        if runc.exists() { Ok(Self { runc: Some(runc), ..self.clone() }) } else { Err(none()) }
    }

    /// Major and minor number, as the program itself says.
    pub fn numbers(&self) -> (u32, u32) {
        let said = ctr::run(ctr::with_deadline(&self.containerd).arg("--version"));
        let text = said.unwrap_or_else(|error| panic!("{}: {error}", self.name)).stdout;
        // containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3
        let numbers = text.split_whitespace().nth(2).and_then(|word| {
            let mut parts = word.trim_start_matches('v').split('.').map(str::parse::<u32>);
            Some((parts.next()?.ok()?, parts.next()?.ok()?))
        });
        numbers.unwrap_or_else(|| panic!("{} says of its version: {text}", self.name))
    }
}

/// Where the scripts that fetch something for the tests unpack it.
pub(crate) fn cache() -> PathBuf {
    let cache = env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || env::home_dir().expect("the user has a home directory");
    cache.unwrap_or_else(|| home().join(".cache")).join("stillframe")
}

/// Makes three tests of each function that takes a [`ContainerdVersion`]: with the installed containerd, 1.7 and 2.
#[macro_export]
macro_rules! with_every_containerd {
    ($($name:ident),* $(,)?) => {
        mod installed {
            $(#[test] fn $name() { super::$name(&$crate::ContainerdVersion::installed().unwrap()) })*
        }
        $crate::with_every_containerd!(containerd_1_7 "1.7" $($name)*);
        $crate::with_every_containerd!(containerd_2 "2" $($name)*);
    };
    ($module:ident $series:literal $($name:ident)*) => {
        mod $module {
            $(#[test] fn $name() {
                let test = concat!(stringify!($module), "::", stringify!($name));
                if let Some(version) = $crate::ContainerdVersion::or_skip($series, test) {
                    super::$name(&version);
                }
            })*
        }
    };
}
