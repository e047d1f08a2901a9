//! The `stillframe` command: works on the state that the shims keep, without containerd's help.

use std::process::ExitCode;

fn main() -> ExitCode {
    stillframe_runtime::cli::main()
}
