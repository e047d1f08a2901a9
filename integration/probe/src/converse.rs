//! A conversation over TCP with itself, so that a copy of the process can be seen to go on with the connection that it had.
//!
//! Each line of the file is `TOKEN COUNT`: a number that only this process has, and what it got back of what it sent.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime};

/// Never returns but with an error.
pub fn converse(log: &Path) -> io::Result<()> {
    let since = SystemTime::UNIX_EPOCH.elapsed().map_err(io::Error::other)?;
    let token = since.as_nanos() as u64 ^ u64::from(std::process::id());
    let mut log = File::options().create(true).append(true).open(log)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut here = TcpStream::connect(listener.local_addr()?)?;
    let (mut there, _) = listener.accept()?;
    drop(listener);
    let mut count = 0u64;
    let mut message = [0; 8];
    loop {
        here.write_all(&(count + 1).to_le_bytes())?;
        there.read_exact(&mut message)?;
        there.write_all(&message)?;
        here.read_exact(&mut message)?;
        count += 1;
        if u64::from_le_bytes(message) != count {
            return Err(io::Error::other(format!("{message:?} came back of {count}")));
        }
        log.write_all(format!("{token:x} {count}\n").as_bytes())?;
        thread::sleep(Duration::from_millis(10));
    }
}
