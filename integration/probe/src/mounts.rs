//! `mounts`: what a process can see of each tmpfs: mountinfo(5), statfs(2), stat(2).
//!
//! One line a mount, in the words of a listing; numbers that differ between any two containers (mount and device
//! numbers, peer groups) are left out, so that two runtimes can be compared line by line.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;

use rustix::fs::statfs;

use crate::escape::escape;

/// Lists the mounts of filesystem type `tmpfs`, in the order of the kernel's list.
pub fn mounts(out: &mut dyn Write) -> io::Result<()> {
    for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let before: Vec<&str> = before.split(' ').collect();
        let after: Vec<&str> = after.split(' ').collect();
        let ([_, _, _, root, point, options, peers @ ..], [kind, source, superblock]) =
            (&before[..], &after[..])
        else {
            return Err(io::Error::other(format!("not a line of mountinfo: {line}")));
        };
        if *kind != "tmpfs" {
            continue;
        }
        let peers: Vec<&str> = peers.iter().map(|peer| peer.split(':').next().unwrap_or(peer)).collect();
        let path = unescape(point);
        let (fs, meta) = (statfs(path.as_slice())?, fs::metadata(std::ffi::OsStr::from_bytes(&path))?);
        writeln!(
            out,
            "mount={} root={root} source={source} options={options} propagation={} superblock={superblock} \
             magic={:x} block-size={} blocks={} files={} name-length={} statfs-flags={:x} \
             mode={:04o} uid={} gid={} size={}",
            escape(&path),
            peers.join(","),
            fs.f_type,
            fs.f_bsize,
            fs.f_blocks,
            fs.f_files,
            fs.f_namelen,
            fs.f_flags,
            meta.mode() & 0o7777,
            meta.uid(),
            meta.gid(),
            meta.size(),
        )?;
    }
    out.flush()
}

use std::os::unix::ffi::OsStrExt;

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(word: &str) -> Vec<u8> {
    let bytes = word.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        match octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    out
}
