//! Room for what is still to be loaded.
//!
//! A file that isn't loaded yet takes nothing of its filesystem's `size=`, so who writes meanwhile can take what it will need. tmpfs
//! reserves nothing but by allocating it; and with a smaller `size=` for that time, every program that asks how large its
//! filesystem is would be told something else than ever. So the filesystem is made larger when a file finds no room in it,
//! by no more in all than the files have bytes; and at the end as large as it was, if so much of it is free by then.

use std::fs::File;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::mount::{reconfigure, tmpfs_usage};

/// Bytes that are given besides: the kernel takes a page before it sees that there is one at its place already.
const SPARE: u64 = 64 * 4096;
/// How often it is tried again where no more may be given, in all. The kernel may be unable just then to take back what huge pages don't
/// need, and nothing tells when it can.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(1);

/// The room of a filesystem whose files are being loaded.
#[derive(Debug)]
pub struct Room {
    root: File,
    /// What it has by its options; `None`: nothing is to be done about it.
    size: Option<u64>,
    /// To which size it may be made larger.
    most: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The size that it was given last.
    given: Option<u64>,
    tries: u32,
}

/// Bytes that a tmpfs has and that are free; `None` if it isn't one with a size.
fn space(root: &File) -> io::Result<Option<(u64, u64)>> {
    let usage = tmpfs_usage(root)?;
    Ok(usage.and_then(|usage| Some((usage.size_bytes?, usage.size_bytes? - usage.used_bytes?))))
}

impl Room {
    /// The size of the filesystem whose root is `root` before anything is loaded; `None` if it isn't a tmpfs with a size.
    ///
    /// # Errors
    ///
    /// It can't be told.
    pub fn size(root: &File) -> io::Result<Option<u64>> {
        Ok(space(root)?.map(|(size, _)| size))
    }

    /// Of the filesystem which had `size` before files with pages of `bytes` bytes in all were to be loaded.
    pub fn new(root: File, size: Option<u64>, bytes: u64) -> Self {
        let most = size.unwrap_or(0).saturating_add(bytes).saturating_add(SPARE);
        Self { root, size, most, state: Mutex::default() }
    }

    /// Makes room for `bytes` more, of which a file found none, `again` times before; false if there can't be any.
    pub fn make(&self, bytes: u64, again: u32) -> bool {
        if self.size.is_none() {
            return false;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(Some((size, free))) = space(&self.root) else { return false };
        let needed = bytes.next_multiple_of(rustix::param::page_size() as u64);
        // What is free may be meant for another file: the next time it isn't counted on.
        let missing = if again == 0 { needed.saturating_sub(free) } else { needed };
        if missing == 0 {
            return true;
        }
        let larger = size.saturating_add(missing);
        if larger <= self.most && reconfigure(&self.root, "size", &larger.to_string()).is_ok() {
            state.given = Some(larger);
            return true;
        }
        state.tries += 1;
        let more = state.tries <= TRIES;
        drop(state);
        if more {
            thread::sleep(PAUSE);
        }
        more
    }

    /// When all is loaded: gives it the size that it had, or as much as is used. Not if somebody else has changed it.
    ///
    /// # Errors
    ///
    /// It can't be changed.
    pub fn restore(&self) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some(size), Some(given)) = (self.size, state.given.take()) else { return Ok(()) };
        match space(&self.root)? {
            // The kernel refuses less than is used by now.
            Some((now, free)) if now == given => {
                reconfigure(&self.root, "size", &size.max(now - free).to_string())
            }
            _ => Ok(()),
        }
    }
}
