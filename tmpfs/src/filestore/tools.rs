//! Running the programs of e2fsprogs.
//!
//! Through a shell that prints the exit status: the process that we are in may collect all its children itself (a
//! containerd shim does), and then nobody else learns how one ended.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use super::FilestoreError;

const SCRIPT: &str = r#"PATH="$PATH:/usr/sbin:/sbin"; "$@" 2>&1; printf '\n%s' "$?""#;
/// A shell's status where it finds no program.
const NOT_FOUND: &str = "127";

/// Runs `program` on the filestore `path`; its status must be one of `good`.
pub(super) fn run(
    program: &'static str,
    arguments: &[String],
    path: &Path,
    good: &[&str],
) -> Result<(), FilestoreError> {
    let no_tool = |source| FilestoreError::NoTool { program, source };
    let mut command = Command::new("/bin/sh");
    command.args(["-c", SCRIPT, "sh", program]).args(arguments).arg(path);
    command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(no_tool)?;
    let mut output = Vec::new();
    let read = child.stdout.take().expect("piped").read_to_end(&mut output);
    // Collected by somebody else perhaps.
    let _ = child.wait();
    read.map_err(no_tool)?;
    let output = String::from_utf8_lossy(&output);
    let (output, status) = output.rsplit_once('\n').unwrap_or(("", "unknown"));
    tracing::debug!(program, path = %path.display(), status, output, "ran");
    if status == NOT_FOUND {
        return Err(no_tool(std::io::ErrorKind::NotFound.into()));
    }
    if !good.contains(&status) {
        let words: Vec<&str> = output.split_whitespace().collect();
        return Err(FilestoreError::Tool {
            program,
            path: path.to_owned(),
            status: status.to_owned(),
            output: words.join(" "),
        });
    }
    Ok(())
}
