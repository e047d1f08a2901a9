//! `hold DIR`: a file that is open, written and unlinked: memory that no name leads to.

use std::fs::{File, remove_file};
use std::io::{self, Write};
use std::path::Path;

/// Makes the file, says `ready` and keeps it until the process is killed.
pub fn hold(dir: &Path) -> io::Result<()> {
    let path = dir.join("open-but-unlinked");
    let mut file = File::options().read(true).write(true).create_new(true).open(&path)?;
    file.write_all(&[b'u'; 100_000])?;
    remove_file(&path)?;
    println!("ready");
    idle()
}

/// Waits to be killed.
pub fn idle() -> ! {
    loop {
        std::thread::park();
    }
}
