//! Tests that can't run here say so.

/// Prints `SKIPPED: name: reason`, the line that `make test` shows and counts. The test then returns.
pub fn skipped(name: &str, reason: &str) {
    println!("SKIPPED: {name}: {reason}");
}
