//! mount_setattr(2), which neither rustix nor nix has.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::mount::{MountAttrFlags, MountPropagationFlags};

/// `struct mount_attr` of linux/mount.h, in its first version (Linux 5.12).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

impl MountAttr {
    /// Makes a mount private and sets `flags` on it. The access time setting is an enumeration
    /// inside the flags, so it is replaced as a whole.
    pub(crate) fn private(flags: MountAttrFlags) -> Self {
        let clear = if flags.intersects(MountAttrFlags::MOUNT_ATTR__ATIME) {
            MountAttrFlags::MOUNT_ATTR__ATIME.bits()
        } else {
            0
        };
        Self {
            set: flags.bits().into(),
            clear: clear.into(),
            propagation: MountPropagationFlags::PRIVATE.bits().into(),
            userns_fd: 0,
        }
    }

    /// The same, and takes `flags` away.
    pub(crate) fn without(self, flags: MountAttrFlags) -> Self {
        Self { clear: self.clear | u64::from(flags.bits()), ..self }
    }

    /// Applies it to the mount that `mount` is the root of, not to what is mounted below.
    pub(crate) fn apply(&self, mount: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: the path is an empty C string, `self` is a `struct mount_attr` of the size given,
        // both live through the call, and the kernel only reads them.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                mount.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                std::ptr::from_ref(self),
                size_of::<Self>(),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}
