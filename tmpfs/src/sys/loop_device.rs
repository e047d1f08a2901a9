//! Loop devices (drivers/block/loop.c): a regular file as a block device.
//!
//! The crates that do this build their bindings with libclang, which a node's build doesn't have.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Requests of linux/loop.h; loop.c defines them as plain numbers, the same on every architecture.
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// Attempts to get a device that somebody else takes first.
const ATTEMPTS: usize = 64;

/// `struct loop_info64`.
#[derive(Clone, Copy)]
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` (Linux 5.8).
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// Attaches `backing` (open for reading and writing) to a free device of blocks of `block_size` bytes, past
/// the host's page cache where its filesystem can. Gives the device's path and the device, which is detached
/// by the kernel when nothing has it open or mounted any more.
pub(crate) fn attach(backing: BorrowedFd<'_>, block_size: u32) -> io::Result<(String, File)> {
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    let config = LoopConfig {
        fd: backing.as_raw_fd().cast_unsigned(),
        block_size,
        info: LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    let mut taken = io::Error::from_raw_os_error(libc::EBUSY);
    for _ in 0..ATTEMPTS {
        // SAFETY: the request takes no argument and returns a number.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = format!("/dev/loop{number}");
        let device = OpenOptions::new().read(true).write(true).open(&path)?;
        // SAFETY: `config` is a `struct loop_config` that lives through the call, and the kernel only reads it.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
        if result == 0 {
            return Ok((path, device));
        }
        taken = io::Error::last_os_error();
        // Another program got the number too and was faster.
        if taken.raw_os_error() != Some(libc::EBUSY) {
            break;
        }
    }
    Err(taken)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::path::Path;

    use super::*;

    #[test]
    fn a_device_lives_as_long_as_it_is_open() {
        let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let (path, device) = attach(file.as_file().as_fd(), 4096).unwrap();
        let backing =
            Path::new("/sys/block").join(path.strip_prefix("/dev/").unwrap()).join("loop/backing_file");
        let shown = || std::fs::read_to_string(&backing).unwrap_or_default();
        assert_eq!(shown().trim(), file.path().to_str().unwrap());
        drop(device);
        assert_ne!(shown().trim(), file.path().to_str().unwrap());
    }
}
