//! Where the programs under test are: beside the running one, in cargo's target directory.

use std::env;
use std::path::{Path, PathBuf};

/// The directory of the built programs: `target/debug` or `target/release`, of the running test's own profile.
/// `STILLFRAME_BIN` overrides it, to test what is installed.
pub fn directory() -> PathBuf {
    if let Some(dir) = env::var_os("STILLFRAME_BIN") {
        return PathBuf::from(dir);
    }
    let exe = env::current_exe().expect("Linux always knows the running program");
    let dir = exe.parent().expect("a program is in a directory");
    // Test programs are one level deeper than the others.
    let dir = if dir.ends_with("deps") { dir.parent().expect("deps is in a directory") } else { dir };
    dir.to_owned()
}

/// One of the workspace's programs. Panics when it hasn't been built: cargo doesn't build the programs of
/// other packages for a test, `make` does.
pub fn program(name: &str) -> PathBuf {
    existing(directory().join(name), name)
}

/// The probe, which is built for a target of its own because it's linked statically.
pub fn probe() -> PathBuf {
    env::var_os("STILLFRAME_PROBE").map_or_else(|| in_image("stillframe-probe"), PathBuf::from)
}

/// The writers, which are linked statically, too.
pub fn writers() -> PathBuf {
    in_image("stillframe-writers")
}

fn in_image(name: &str) -> PathBuf {
    let target = directory().parent().expect("a profile's directory is in the target directory").to_owned();
    let triple = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    existing(target.join(triple).join("release").join(name), name)
}

/// A program of the system, by its name, as a shell would find it; also in `sbin`, where runc is on Debian.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    env::split_paths(&path)
        .chain(system.map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

fn existing(path: PathBuf, name: &str) -> PathBuf {
    assert!(
        Path::new(&path).is_file(),
        "{} isn't there: `make build` builds {name} and the others",
        path.display()
    );
    path
}
