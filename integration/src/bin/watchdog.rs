//! `stillframe-watchdog PLAN`: starts a containerd and removes every trace of it when standard input ends.
//!
//! Not for people: the tests and the demo start it. The module of the library says how and why.

use std::process::ExitCode;

use stillframe_integration::watchdog::{self, Plan};

fn main() -> ExitCode {
    let Some(plan) = std::env::args().nth(1).and_then(|text| serde_json::from_str::<Plan>(&text).ok()) else {
        eprintln!("stillframe-watchdog is started by the tests, with a plan of theirs as its argument");
        return ExitCode::from(2);
    };
    match watchdog::run(&plan) {
        Ok(residue) if residue.is_empty() => ExitCode::SUCCESS,
        Ok(residue) => {
            eprintln!("stillframe-watchdog: these couldn't be removed:\n{residue}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("stillframe-watchdog: {error}");
            ExitCode::FAILURE
        }
    }
}
