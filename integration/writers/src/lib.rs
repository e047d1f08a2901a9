//! Writers whose every state is known, which run inside containers while checkpoints are taken: after step `s` each has a
//! directory that holds exactly what its `expect` says.
//!
//! A step is one change by one system call (or what else makes a change visible at once), and then the step's number is
//! written to the file `counter`. So an image that has `s` there has the state of step `s`, or, if it was taken between
//! the two, of step `s + 1`. [`ALL`] are the writers, [`Log`] is when each step began and ended; the program
//! `stillframe-writers` runs them, `tests/cut.rs` compares images with them. Like the probe they know Linux and nothing of Stillframe.

mod attributes;
mod contents;
mod database;
mod log;
mod mapped;
mod names;
mod sys;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::path::Path;

pub use database::{SQLITE, steps_of_database};
pub use log::Log;

const PAGE: u64 = 4096;
/// Files of most writers.
const FILES: u64 = 12;
/// Pages of a large file, more than are copied at once.
const PAGES: u64 = 400;

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A directory.
    Directory,
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A regular file.
    File {
        /// Its bytes.
        content: Vec<u8>,
        /// Its permissions.
        mode: u32,
        /// The value of its one extended attribute.
        xattr: Option<Vec<u8>>,
        /// How many names it has.
        names: u32,
    },
}

/// What is below a directory, by path.
pub type Tree = BTreeMap<String, Seen>;
/// Does the step of a number.
pub type Step = Box<dyn FnMut(u64) + Send>;

/// One of the writers.
#[derive(Debug)]
pub struct Writer {
    /// Its name, and that of its directory.
    pub name: &'static str,
    /// Makes the state of step 0 in an empty directory, and gives what does a step.
    pub start: fn(&Path) -> Step,
    /// The state after a step, without `counter`.
    pub expect: fn(u64) -> Tree,
}

/// All of them.
pub const ALL: &[Writer] = &[
    Writer { name: "pwrite", start: contents::pwrite, expect: contents::whole_files },
    Writer { name: "pwritev", start: contents::pwritev, expect: contents::whole_files },
    Writer { name: "io_uring", start: contents::io_uring, expect: contents::whole_files },
    Writer { name: "splice", start: contents::splice, expect: contents::pages },
    Writer { name: "copy_file_range", start: contents::copy_range, expect: contents::copied_pages },
    Writer { name: "pages", start: contents::write_pages, expect: contents::pages },
    Writer { name: "append", start: contents::append, expect: contents::appended },
    Writer { name: "resize", start: contents::resize, expect: contents::resized },
    Writer { name: "punch", start: contents::punch, expect: contents::punched },
    Writer { name: "rename", start: names::rename, expect: names::renamed },
    Writer { name: "exchange", start: names::exchange, expect: names::exchanged },
    Writer { name: "link", start: names::link, expect: names::linked },
    Writer { name: "tmpfile", start: names::tmpfile, expect: names::tmpfiles },
    Writer { name: "replace", start: contents::replace, expect: contents::whole_files },
    Writer { name: "xattr", start: attributes::xattr, expect: attributes::xattrs },
    Writer { name: "mode", start: attributes::mode, expect: attributes::modes },
    Writer { name: "mapped", start: mapped::mapped, expect: mapped::stored },
    Writer { name: "mapped-once", start: mapped::mapped_once, expect: mapped::stored_once },
    Writer { name: "mapped-later", start: mapped::mapped_later, expect: mapped::stored_later },
    Writer { name: "mapped-held", start: mapped::mapped_held, expect: mapped::stored },
    Writer { name: "directory", start: names::directory, expect: names::directories },
    Writer { name: "move", start: names::move_directory, expect: names::moved },
    Writer { name: "symlink", start: names::symbolic, expect: names::symbolics },
    Writer { name: "loop", start: contents::loop_device, expect: contents::pages },
    Writer { name: SQLITE, start: database::sqlite, expect: |_| Tree::new() },
];

/// Bytes that only step `s` writes.
fn pattern(s: u64, length: u64) -> Vec<u8> {
    // Never zero, so that what isn't written is told from it.
    (s.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1).to_le_bytes().repeat(length.div_ceil(8) as usize)
        [..length as usize]
        .to_vec()
}

/// The last step up to `s` that had number `k` among `of`; 0 if none had.
fn last(s: u64, k: u64, of: u64) -> u64 {
    if s < k { 0 } else { s - (s - k) % of }
}

/// How many steps from 1 to `s` had number `k` among `of`.
fn count(s: u64, k: u64, of: u64) -> u64 {
    if k == 0 {
        s / of
    } else if s < k {
        0
    } else {
        (s - k) / of + 1
    }
}

fn plain(content: Vec<u8>) -> Seen {
    Seen::File { content, mode: 0o644, xattr: None, names: 1 }
}

fn writable(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

fn make(path: &Path, content: &[u8]) {
    fs::write(path, content).unwrap();
}

/// Makes `f0`, `f1`, ... of 100 bytes each, whose contents stay.
fn make_small(dir: &Path) {
    (0..FILES).for_each(|k| make(&dir.join(format!("f{k}")), &pattern(k, 100)));
}
