//! The contents of a regular file as one digest, read only where the file has data.
//!
//! The digest is over (page number, page) of every page that isn't all zeros, so a hole, an allocated page of
//! zeros and a page nobody ever wrote are the same, as they are to read(2); and a sparse file of a tebibyte
//! costs as little as the pages it has. It says nothing of the size, which is listed by itself.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, pread};
use sha2::{Digest, Sha256};

use crate::escape::hex;

/// The unit of the digest, whatever pages the machine has.
const UNIT: usize = 4096;

/// SHA-256 of `file`'s contents, in hexadecimal.
pub fn digest(file: BorrowedFd<'_>) -> io::Result<String> {
    let mut sum = Sha256::new();
    let mut buffer = vec![0u8; 64 * UNIT];
    let mut at = 0u64;
    while let Some((start, end)) = next_data(file, at)? {
        let mut offset = start / UNIT as u64 * UNIT as u64;
        while offset < end {
            let got = read_full(file, &mut buffer, offset)?;
            if got == 0 {
                break;
            }
            for (index, unit) in buffer[..got].chunks(UNIT).enumerate() {
                let page = offset / UNIT as u64 + index as u64;
                // What follows the extent in the buffer is a hole or the next extent; both may be digested
                // now, if the next round doesn't do it again: so it starts where this one has ended.
                if unit.iter().any(|&byte| byte != 0) {
                    sum.update(page.to_le_bytes());
                    sum.update(unit);
                }
            }
            offset += got as u64;
        }
        at = offset.max(end);
    }
    Ok(hex(&sum.finalize()))
}

/// The next extent with data at or behind `from`, or `None` behind the last one.
fn next_data(file: BorrowedFd<'_>, from: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match seek(file.as_fd(), SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let end = seek(file, SeekFrom::Hole(start))?;
    Ok(Some((start, end)))
}

/// As many bytes as there are, up to `buffer`'s length: read(2) may give fewer, which would split a unit.
fn read_full(file: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match pread(file, &mut buffer[got..], offset + got as u64)? {
            0 => break,
            n => got += n,
        }
    }
    Ok(got)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn file(size: u64, writes: &[(u64, &[u8])]) -> File {
        let fd = rustix::fs::memfd_create("digest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(size).unwrap();
        for (offset, bytes) in writes {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file
    }

    #[test]
    fn holes_and_zeros_are_the_same() {
        let holes = file(1 << 20, &[(5000, b"x")]);
        let zeros = file(1 << 20, &[(0, &[0; 1 << 20]), (5000, b"x")]);
        assert_eq!(digest(holes.as_fd()).unwrap(), digest(zeros.as_fd()).unwrap());
    }

    #[test]
    fn content_and_place_both_count() {
        let sums: Vec<_> = [
            file(1 << 20, &[(5000, b"x")]),
            file(1 << 20, &[(5000, b"y")]),
            file(1 << 20, &[(5001, b"x")]),
            file(1 << 20, &[(5000 + 4096, b"x")]),
            file(1 << 20, &[]),
            file(1 << 20, &[(0, &[1; 1 << 20])]),
        ]
        .iter()
        .map(|file| digest(file.as_fd()).unwrap())
        .collect();
        let mut distinct = sums.clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), sums.len());
    }

    #[test]
    fn a_tebibyte_of_holes_is_quick() {
        let huge = file(1 << 40, &[(0, b"first"), (1 << 39, b"middle"), ((1 << 40) - 4, b"last")]);
        let same = file(1 << 40, &[((1 << 40) - 4, b"last"), (1 << 39, b"middle"), (0, b"first")]);
        assert_eq!(digest(huge.as_fd()).unwrap(), digest(same.as_fd()).unwrap());
    }
}
