//! `pause-meter`: how long this process, as one of its container's, was stopped.
//!
//! One thread ticks as often as the timer lets it and keeps the longest time between two ticks of the
//! monotonic clock, which runs on while a cgroup is frozen. A line on standard input asks for it and starts
//! anew. What the scheduler adds on a busy machine is in the figure, too; an asking without a
//! checkpoint in between shows how much that is.

use std::io::{self, BufRead, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const TICK: Duration = Duration::from_micros(200);

static LONGEST_NS: AtomicU64 = AtomicU64::new(0);
static TICKS: AtomicU64 = AtomicU64::new(0);

/// Answers each line of `input` with `pause_ms=X ticks=N` on `out`, until it ends.
pub fn meter(input: &mut dyn BufRead, out: &mut dyn Write) -> io::Result<()> {
    thread::spawn(tick);
    writeln!(out, "ready")?;
    out.flush()?;
    let mut line = String::new();
    while input.read_line(&mut line)? > 0 {
        line.clear();
        // One tick after the question: a pause that ends in this moment is counted.
        let now = TICKS.load(Ordering::Acquire);
        while TICKS.load(Ordering::Acquire) < now + 2 {
            thread::sleep(TICK);
        }
        let ticks = TICKS.swap(0, Ordering::AcqRel);
        let longest = LONGEST_NS.swap(0, Ordering::AcqRel);
        writeln!(out, "pause_ms={:.3} ticks={ticks}", longest as f64 / 1e6)?;
        out.flush()?;
    }
    Ok(())
}

fn tick() {
    let mut last = Instant::now();
    loop {
        thread::sleep(TICK);
        let now = Instant::now();
        LONGEST_NS.fetch_max((now - last).as_nanos() as u64, Ordering::AcqRel);
        TICKS.fetch_add(1, Ordering::AcqRel);
        last = now;
    }
}
