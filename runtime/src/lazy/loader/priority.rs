//! Who goes first: the loading of what nobody waits for goes behind everything else on the machine, so that many sandboxes that are
//! restored at once start before any of them is loaded. As soon as somebody waits for a file, it is as urgent as anything.

use std::fs;
use std::io;

use rustix::process::{Pid, getpriority_process, setpriority_process};

use super::{Loader, State};

/// So much nicer are the threads that load then: a tenth of what others get.
const NICER: i32 = 10;
/// The nicest there is.
const NICEST: i32 = 19;
/// Name of the threads that load pages.
const THREADS: &str = "pages-load";

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Priority {
    /// Those who load in the background, and their nice value otherwise; none before the container's program may run, nor if it
    /// waits for all.
    threads: Vec<(Pid, i32)>,
    lowered: bool,
}

impl Priority {
    /// From now on files are loaded of which most are waited for by nobody.
    pub(super) fn begin_background(&mut self) {
        self.threads = threads().unwrap_or_default();
    }
}

impl Loader {
    /// After what somebody waits for has changed: a file, or all of them.
    pub(super) fn prioritise(&self, state: &mut State) {
        let lower = state.header.waiting_files == 0 && state.asked.is_empty();
        let Priority { threads, lowered } = &mut state.priority;
        if threads.is_empty() || *lowered == lower {
            return;
        }
        *lowered = lower;
        for (thread, nice) in threads {
            let nice = if lower { (*nice + NICER).min(NICEST) } else { *nice };
            // Only without privilege is it refused: then it stays as it was.
            let _ = setpriority_process(Some(*thread), nice);
        }
    }
}

fn threads() -> io::Result<Vec<(Pid, i32)>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir("/proc/self/task")? {
        let entry = entry?;
        // What has ended meanwhile doesn't count.
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let id = entry.file_name().to_str().and_then(|id| id.parse().ok()).and_then(Pid::from_raw);
        if let Some(id) = id.filter(|_| name.trim_end() == THREADS) {
            threads.push((id, getpriority_process(Some(id))?));
        }
    }
    Ok(threads)
}
