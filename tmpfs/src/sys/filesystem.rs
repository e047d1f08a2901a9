//! ioctl(2) requests on a filesystem and its files: freeze, thaw, trim, and the map of a file's extents.

use std::ffi::c_int;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::ioctl::opcode;

const FIFREEZE: rustix::ioctl::Opcode = opcode::read_write::<c_int>(b'X', 119);
const FITHAW: rustix::ioctl::Opcode = opcode::read_write::<c_int>(b'X', 120);
const FITRIM: rustix::ioctl::Opcode = opcode::read_write::<TrimRange>(b'X', 121);
const FS_IOC_FIEMAP: rustix::ioctl::Opcode = opcode::read_write::<MapHeader>(b'f', 11);
const FIEMAP_FLAG_SYNC: u32 = 1;
const FIEMAP_EXTENT_LAST: u32 = 1;
/// Extents that one call reports.
const BATCH: usize = 64;

/// `struct fstrim_range`.
#[repr(C)]
struct TrimRange {
    start: u64,
    length: u64,
    least: u64,
}

/// `struct fiemap` without its extents.
#[repr(C)]
struct MapHeader {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
}

/// `struct fiemap_extent`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct MapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Map {
    header: MapHeader,
    extents: [MapExtent; BATCH],
}

/// Where a part of a file lies on its device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MappedExtent {
    pub(crate) logical: u64,
    pub(crate) physical: u64,
    pub(crate) length: u64,
    /// `FIEMAP_EXTENT_*` of linux/fiemap.h.
    pub(crate) flags: u32,
}

/// Stops all writing to the filesystem that `on` is open on and makes it consistent on its device; writers
/// sleep until [`thaw`]. EBUSY if it is frozen already.
pub(crate) fn freeze(on: &File) -> io::Result<()> {
    // SAFETY: the kernel ignores the argument of this request.
    let result = unsafe { libc::ioctl(on.as_raw_fd(), FIFREEZE as libc::c_ulong, 0) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Undoes [`freeze`]; EINVAL if it isn't frozen.
pub(crate) fn thaw(on: &File) -> io::Result<()> {
    // SAFETY: the kernel ignores the argument of this request.
    let result = unsafe { libc::ioctl(on.as_raw_fd(), FITHAW as libc::c_ulong, 0) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives the filesystem's free space back to its device.
pub(crate) fn trim(on: &File) -> io::Result<()> {
    let mut range = TrimRange { start: 0, length: u64::MAX, least: 0 };
    // SAFETY: `range` is a `struct fstrim_range` that lives through the call.
    let result = unsafe { libc::ioctl(on.as_raw_fd(), FITRIM as libc::c_ulong, &raw mut range) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// All extents of a file, ascending, written back before.
pub(crate) fn extents(file: &File) -> io::Result<Vec<MappedExtent>> {
    let mut all: Vec<MappedExtent> = Vec::new();
    loop {
        let start = all.last().map_or(0, |last| last.logical.saturating_add(last.length));
        let header = MapHeader {
            start,
            length: u64::MAX - start,
            flags: FIEMAP_FLAG_SYNC,
            mapped: 0,
            count: BATCH as u32,
            reserved: 0,
        };
        let mut map = Map { header, extents: [MapExtent::default(); BATCH] };
        // SAFETY: `map` is a `struct fiemap` followed by as many extents as its count says, and lives through
        // the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as libc::c_ulong, &raw mut map) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let mapped = &map.extents[..(map.header.mapped as usize).min(BATCH)];
        all.extend(mapped.iter().map(|extent| MappedExtent {
            logical: extent.logical,
            physical: extent.physical,
            length: extent.length,
            flags: extent.flags,
        }));
        if mapped.last().is_none_or(|last| last.flags & FIEMAP_EXTENT_LAST != 0 || last.length == 0) {
            return Ok(all);
        }
    }
}
