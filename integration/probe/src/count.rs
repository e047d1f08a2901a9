//! Counts, in its own memory, in a file that it keeps open and in a mapping, so that a copy of it can be seen to go on exactly
//! where it was.
//!
//! Each line of the file is `TOKEN COUNT MAPPED`: a number that only this process has, its count, and what the mapping held
//! before the count was stored there, which is one less. Aloud, the same goes to standard output, which
//! somebody has to read.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime};

use crate::sys::Counter;

/// Never returns but with an error.
pub fn count(log: &Path, segment: &Path, aloud: bool) -> io::Result<()> {
    let since = SystemTime::UNIX_EPOCH.elapsed().map_err(io::Error::other)?;
    let token = since.as_nanos() as u64 ^ u64::from(std::process::id());
    let mut log = File::options().create(true).append(true).open(log)?;
    let options = File::options().read(true).write(true).create(true).truncate(true).open(segment)?;
    options.set_len(4096)?;
    let mut mapped = Counter::map(&options)?;
    let mut count = 0;
    loop {
        let before = mapped.load();
        count += 1;
        mapped.store(count);
        let line = format!("{token:x} {count} {before}\n");
        log.write_all(line.as_bytes())?;
        if aloud {
            // Who listens may be gone.
            let _ = io::stdout().write_all(line.as_bytes());
        }
        thread::sleep(Duration::from_millis(10));
    }
}
