//! The CRIU for the tests of mode `full`: the one that `scripts/criu` has found or unpacked.

use std::fs;
use std::path::PathBuf;

use crate::version::cache;

/// Where it is, or why there is none.
pub fn find() -> Result<PathBuf, String> {
    let missing = fs::read_to_string(cache().join("criu.missing"));
    if let Ok(reason) = missing {
        return Err(reason.trim().to_owned());
    }
    let program = cache().join("criu/bin/criu");
    if program.exists() { Ok(program) } else { Err("no CRIU is there: scripts/criu fetches one".to_owned()) }
}

/// As [`find`], and what it is that keeps a test from running is printed.
pub fn or_skip(test: &str) -> Option<PathBuf> {
    find().map_err(|reason| crate::skip::skipped(test, &reason)).ok()
}
