//! The pages file as a destination: direct I/O where it is worth it, growth ahead of the writes, synchronous writes.
//!
//! Direct I/O is a flag of the open file (fcntl(2) F_SETFL), so that falling back to the page cache is clearing the
//! flag: a filesystem may accept the flag and refuse the write (EINVAL). Memory filesystems take direct I/O since
//! Linux 6.6 and gain nothing by it; `Direct::Auto` leaves them alone.
//!
//! Before writing, the file is extended by fallocate(2), since a direct write that extends the file waits for itself
//! (`ext4_dio_write_checks`). The last step too far is cut off at the end.

use std::fs::File;
use std::io::{self, IoSlice};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::sys::uio::pwritev;

use crate::Direct;
use crate::page::PagesOffset;
use crate::save::error::SaveError;

/// Least and most bytes by which the file is extended ahead of the writes.
const EXTEND: (u64, u64) = (16 << 20, 1 << 30);

/// The pages file; see the module.
#[derive(Debug)]
pub(crate) struct PagesFile {
    file: File,
    direct: bool,
    /// Whether a refused direct write may be done through the page cache.
    may_fall_back: bool,
    /// Length that the file has been given ahead of the writes.
    extended: u64,
}

impl PagesFile {
    pub(crate) fn new(file: File, direct: Direct) -> Result<Self, SaveError> {
        let length = file.metadata().map_err(|source| SaveError::Examine { source: Arc::new(source) })?.len();
        if length != 0 {
            return Err(SaveError::NotEmpty { length });
        }
        let wanted = match direct {
            Direct::Never => false,
            Direct::Always => true,
            Direct::Auto => !in_memory(&file),
        };
        let mut pages_file =
            Self { file, direct: false, may_fall_back: direct != Direct::Always, extended: 0 };
        if wanted {
            match pages_file.set_direct(true) {
                Ok(()) => {}
                Err(source) if direct == Direct::Always => {
                    return Err(SaveError::Direct { source: Arc::new(source) });
                }
                Err(error) => tracing::debug!(%error, "the pages file is written through the page cache"),
            }
        }
        Ok(pages_file)
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Whether writes go past the page cache, so that it is worth to have several in flight.
    pub(crate) fn is_direct(&self) -> bool {
        self.direct
    }

    fn set_direct(&mut self, direct: bool) -> io::Result<()> {
        let mut flags = OFlag::from_bits_retain(fcntl(&self.file, FcntlArg::F_GETFL)?);
        flags.set(OFlag::O_DIRECT, direct);
        fcntl(&self.file, FcntlArg::F_SETFL(flags))?;
        self.direct = direct;
        Ok(())
    }

    /// Makes room up to `length`, and as far ahead as there is space. Only for direct I/O.
    pub(crate) fn extend_to(&mut self, length: u64) -> Result<(), SaveError> {
        if !self.direct || length <= self.extended {
            return Ok(());
        }
        let mut step = self.extended.clamp(EXTEND.0, EXTEND.1).max(length - self.extended);
        loop {
            match fallocate(&self.file, FallocateFlags::empty(), self.extended as i64, step as i64) {
                Ok(()) => {
                    self.extended += step;
                    return Ok(());
                }
                Err(Errno::EINTR) => {}
                Err(Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG) if self.extended + step > length => {
                    step = (step / 2).max(length - self.extended);
                }
                // It can't preallocate: the writes extend the file.
                Err(Errno::EOPNOTSUPP) => {
                    self.extended = u64::MAX;
                    return Ok(());
                }
                Err(errno) => {
                    return Err(SaveError::Extend { length, source: Arc::new(errno.into()) });
                }
            }
        }
    }

    /// Writes all of `buffers` at `offset`, and waits for it.
    pub(crate) fn write(
        &mut self,
        mut buffers: &mut [IoSlice<'_>],
        mut offset: u64,
    ) -> Result<(), SaveError> {
        while !buffers.is_empty() {
            match pwritev(&self.file, buffers, offset as i64) {
                Ok(0) => return Err(write_error(offset, io::ErrorKind::WriteZero.into())),
                Ok(written) => {
                    offset += written as u64;
                    IoSlice::advance_slices(&mut buffers, written);
                }
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                // Refused as direct I/O, or the last write ended inside a block.
                Err(Errno::EINVAL) if self.direct && self.may_fall_back => {
                    tracing::debug!(offset, "direct write refused: falling back to the page cache");
                    self.set_direct(false).map_err(|error| write_error(offset, error))?;
                }
                Err(errno) => return Err(write_error(offset, errno.into())),
            }
        }
        Ok(())
    }

    /// Sets the final length and makes everything durable.
    pub(crate) fn finish(self, length: u64) -> Result<(), SaveError> {
        self.file
            .set_len(length)
            .map_err(|source| SaveError::Extend { length, source: Arc::new(source) })
            .and_then(|()| {
                self.file.sync_all().map_err(|source| SaveError::Sync { length, source: Arc::new(source) })
            })
    }
}

/// An error of writing the pages file at `offset`.
pub(crate) fn write_error(offset: u64, source: io::Error) -> SaveError {
    SaveError::Write { offset: PagesOffset(offset), source: Arc::new(source) }
}

/// Whether the file lives in memory.
fn in_memory(file: &File) -> bool {
    fstatfs(file).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC)
}
