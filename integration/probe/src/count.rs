//! Counts, in its own memory, in a file that it keeps open and in a mapping, so that a copy of it can be seen to go on exactly
//! where it was.
//!
//! Each line of the file is `TOKEN COUNT MAPPED`: a number that only this process has, its count, and what the mapping held
//! before the count was stored there, which is one less.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime};

use crate::sys::Counter;

/// Never returns but with an error.
pub fn count(log: &Path, segment: &Path) -> io::Result<()> {
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
        log.write_all(format!("{token:x} {count} {before}\n").as_bytes())?;
        thread::sleep(Duration::from_millis(10));
    }
}
