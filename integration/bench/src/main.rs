//! `make bench`: how Stillframe compares with what there is today, measured side by side.
//!
//! Machines are noisy and shared, so absolute figures mean little: whatever is compared is measured in the same
//! run, in turns (A B C A B C ...), and what counts is the ratio of the medians. Prints a table and writes
//! `target/bench/results.json`: name -> {value, unit, of, n}, `of` being the two medians that a ratio is made of.
//!
//! `stillframe-bench [NAME]...` measures only what has a name beginning so; BENCH_ROUNDS sets the number of turns.

mod behind;
mod containers;
mod data;
mod engine;
mod pause;
mod sandbox;
mod series;
mod sys;

use std::error::Error;
use std::process::ExitCode;

use series::Results;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    if let Some(writer) = pause::writer() {
        return writer;
    }
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn bench() -> Result<()> {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let rounds = std::env::var("BENCH_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(5);
    let mut results = Results::new(rounds);
    let all = || engine::ALL.iter().chain(pause::ALL).chain(containers::ALL).chain(behind::ALL);
    // A name of a result stands for the benchmark that it comes from, which has the longest name that it begins with.
    let from = |name: &str| {
        let prefixes = all().map(|(prefix, _)| *prefix).filter(|prefix| name.starts_with(prefix));
        prefixes.max_by_key(|prefix| prefix.len())
    };
    let wanted = |prefix: &str| {
        names.is_empty()
            || names.iter().any(|name| prefix.starts_with(name.as_str()) || from(name) == Some(prefix))
    };
    for (prefix, measure) in all() {
        if wanted(prefix) {
            eprintln!("bench: {prefix} ...");
            measure(&mut results)?;
        }
    }
    results.print();
    results.write()
}
