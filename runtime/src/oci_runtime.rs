//! What the low-level runtime (runc) does differently from version to version.
//!
//! Running it to ask takes as long as much of a container's start, so the answer is kept, for as long as the program is the
//! same file with the same time and size, in [`KEPT`] of the state's root directory, which lives as long as the machine
//! runs. What can't be kept or read is asked again.

use std::env;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use stillframe_tmpfs::mount::DefaultMode;

/// The first runc whose tmpfs takes the mode of the directory below as its `mode=` option.
const MODE_IS_AN_OPTION: (u64, u64, u64) = (1, 1, 8);

/// File of what the runtime said. No namespace of containerd's begins with a dot.
const KEPT: &str = ".runtime-version";

/// How the directory below a tmpfs (of this mode, if there is one) decides about the tmpfs's mode. The
/// runtime is asked for its version only when that matters; if it doesn't tell, it is taken for a new one.
pub fn default_mode(state_root: &Path, runtime: &Path, below: Option<u32>) -> DefaultMode {
    let Some(mode) = below else { return DefaultMode::Absent };
    if version(state_root, runtime).is_some_and(|version| version < MODE_IS_AN_OPTION) {
        DefaultMode::Chmod(mode)
    } else {
        DefaultMode::Option(mode)
    }
}

fn version(state_root: &Path, runtime: &Path) -> Option<(u64, u64, u64)> {
    let (kept, identity) = (state_root.join(KEPT), identity(runtime));
    let text = fs::read_to_string(&kept).unwrap_or_default();
    if let Some((of, output)) = text.split_once('\n')
        && Some(of) == identity.as_deref()
    {
        return parse(output);
    }
    let output = ask(runtime)?;
    if let Some(identity) = identity
        && let Err(error) = keep(state_root, &format!("{identity}\n{output}"))
    {
        tracing::debug!(path = %kept.display(), %error, "the runtime's version isn't kept");
    }
    parse(&output)
}

/// What changes when another program takes its place; `None` if it isn't found.
fn identity(runtime: &Path) -> Option<String> {
    let program: PathBuf = if runtime.as_os_str().as_encoded_bytes().contains(&b'/') {
        runtime.to_owned()
    } else {
        let path = env::var_os("PATH")?;
        env::split_paths(&path).map(|dir| dir.join(runtime)).find(|program| program.is_file())?
    };
    let file = program.metadata().ok()?;
    let path = program.as_os_str().as_encoded_bytes().escape_ascii();
    let (device, inode, size) = (file.dev(), file.ino(), file.size());
    Some(format!("{path} {device} {inode} {size} {}.{:09}", file.mtime(), file.mtime_nsec()))
}

fn keep(state_root: &Path, text: &str) -> std::io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(state_root)?;
    file.write_all(text.as_bytes())?;
    file.persist(state_root.join(KEPT)).map(drop).map_err(|error| error.error)
}

fn ask(runtime: &Path) -> Option<String> {
    let mut output = String::new();
    let mut command = Command::new(runtime);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let ran = command.spawn().and_then(|mut child| {
        let read = child.stdout.take().expect("piped").read_to_string(&mut output);
        // In a process that reaps all its children the exit status may be gone already.
        let _ = child.wait();
        read
    });
    match ran {
        // Without an answer: another time there may be one.
        Ok(_) => Some(output).filter(|output| !output.is_empty()),
        Err(error) => {
            tracing::warn!(runtime = %runtime.display(), %error, "the runtime doesn't tell its version");
            None
        }
    }
}

/// The version in the output of `runc --version`; other runtimes (crun, youki) name themselves there.
fn parse(output: &str) -> Option<(u64, u64, u64)> {
    let version = output.lines().next()?.strip_prefix("runc version ")?;
    let numbers = version.split(['-', '+', ' ']).next()?;
    let mut numbers = numbers.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_parsed() {
        for (output, want) in [
            ("runc version 1.1.5+ds1\ncommit: x\n", Some((1, 1, 5))),
            ("runc version 1.3.0-rc.1\n", Some((1, 3, 0))),
            ("runc version 1.2\n", None),
            ("crun version 1.14.1\n", None),
            ("", None),
        ] {
            assert_eq!(parse(output), want, "{output}");
        }
    }

    #[test]
    fn a_program_is_asked_once_as_long_as_it_is_the_same() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (program, asked) = (dir.path().join("runc"), dir.path().join("asked"));
        let install = |version: &str| {
            let new = dir.path().join("new");
            let script = format!("#!/bin/sh\necho >> {}\necho runc version {version}\n", asked.display());
            fs::write(&new, script).unwrap();
            fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
            fs::rename(&new, &program).unwrap();
        };
        let mode = || default_mode(dir.path(), &program, Some(0o700));
        let count = || fs::read_to_string(&asked).unwrap().lines().count();
        install("1.1.5");
        for _ in 0..3 {
            assert_eq!(mode(), DefaultMode::Chmod(0o700));
        }
        assert_eq!(count(), 1);
        install("1.2.0");
        for _ in 0..3 {
            assert_eq!(mode(), DefaultMode::Option(0o700));
        }
        assert_eq!(count(), 2);
        // Whatever is in the file, and where there can't be one.
        fs::write(dir.path().join(KEPT), b"\xff").unwrap();
        assert_eq!(mode(), DefaultMode::Option(0o700));
        assert_eq!(count(), 3);
        assert_eq!(
            default_mode(Path::new("/nonexistent"), &program, Some(0o700)),
            DefaultMode::Option(0o700)
        );
        assert_eq!(default_mode(dir.path(), Path::new("/nonexistent"), Some(1)), DefaultMode::Option(1));
    }
}
