//! What the low-level runtime (runc) does differently from version to version.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use stillframe_tmpfs::mount::DefaultMode;

/// The first runc whose tmpfs takes the mode of the directory below as its `mode=` option.
const MODE_IS_AN_OPTION: (u64, u64, u64) = (1, 1, 8);

/// How the directory below a tmpfs (of this mode, if there is one) decides about the tmpfs's mode. The
/// runtime is asked for its version only when that matters; if it doesn't tell, it is taken for a new one.
pub fn default_mode(runtime: &Path, below: Option<u32>) -> DefaultMode {
    let Some(mode) = below else { return DefaultMode::Absent };
    if version(runtime).is_some_and(|version| version < MODE_IS_AN_OPTION) {
        DefaultMode::Chmod(mode)
    } else {
        DefaultMode::Option(mode)
    }
}

fn version(runtime: &Path) -> Option<(u64, u64, u64)> {
    let mut output = String::new();
    let mut command = Command::new(runtime);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let ran = command.spawn().and_then(|mut child| {
        let read = child.stdout.take().expect("piped").read_to_string(&mut output);
        // In a process that reaps all its children the exit status may be gone already.
        let _ = child.wait();
        read
    });
    if let Err(error) = ran {
        tracing::warn!(runtime = %runtime.display(), %error, "the runtime doesn't tell its version");
    }
    parse(&output)
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
}
