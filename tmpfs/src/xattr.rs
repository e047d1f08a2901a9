//! Extended attributes of an open inode, and the ids inside their values.
//!
//! Two kinds of value hold ids: POSIX ACLs (`struct posix_acl_xattr_header`) and file capabilities of
//! version 3 (`struct vfs_ns_cap_data`). The kernel shows the host's ids to us; images hold the
//! container's, so these are translated like owners.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{OFlags, XattrFlags};

use crate::acl;
use crate::entry::Xattr;
use crate::id_map::{IdMap, Ids};

/// XATTR_SIZE_MAX and XATTR_LIST_MAX of linux/limits.h.
const MAX: usize = 65536;
const CAP_REVISION_MASK: u32 = 0xff00_0000;
const CAP_REVISION_3: u32 = 0x0300_0000;
const CAP_V3_BYTES: usize = 24;

/// An open inode, by whatever kind of descriptor it could be opened: xattrs of symlinks, fifos,
/// sockets and devices are reached through an O_PATH descriptor's entry in /proc.
pub(crate) enum Inode<'a> {
    Open(&'a File),
    PathOnly(&'a File),
}

impl Inode<'_> {
    fn proc_path(file: &File) -> String {
        format!("/proc/self/fd/{}", file.as_raw_fd())
    }

    fn list(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Inode::Open(file) => rustix::fs::flistxattr(file, buffer),
            Inode::PathOnly(file) => rustix::fs::listxattr(Self::proc_path(file), buffer),
        }
    }

    fn get(&self, name: &[u8], buffer: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Inode::Open(file) => rustix::fs::fgetxattr(file, name, buffer),
            Inode::PathOnly(file) => rustix::fs::getxattr(Self::proc_path(file), name, buffer),
        }
    }

    fn set(&self, name: &[u8], value: &[u8]) -> rustix::io::Result<()> {
        match self {
            Inode::Open(file) => rustix::fs::fsetxattr(file, name, value, XattrFlags::empty()),
            Inode::PathOnly(file) => {
                rustix::fs::setxattr(Self::proc_path(file), name, value, XattrFlags::empty())
            }
        }
    }
}

/// Opens `name` in `dir` without following it and without opening what it stands for (a device, a fifo).
pub(crate) fn open_path(dir: impl AsFd, name: &[u8]) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(dir, name, flags, rustix::fs::Mode::empty())?))
}

/// All xattrs, sorted by name, as the host sees them.
pub(crate) fn read(inode: &Inode<'_>) -> io::Result<Vec<Xattr>> {
    let names = match sized(|buffer| inode.list(buffer)) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Vec::new(),
        other => other?,
    };
    let mut xattrs = Vec::new();
    for name in names.split(|b| *b == 0).filter(|name| !name.is_empty()) {
        let value = sized(|buffer| inode.get(name, buffer))?;
        xattrs.push(Xattr { name: name.to_vec(), value });
    }
    xattrs.sort();
    Ok(xattrs)
}

/// Sets all of `xattrs`.
pub(crate) fn write(inode: &Inode<'_>, xattrs: &[Xattr]) -> io::Result<()> {
    for xattr in xattrs {
        inode.set(&xattr.name, &xattr.value)?;
    }
    Ok(())
}

/// Calls `get` with a small buffer, and once more with one that holds any list or value there can be.
/// (Asking for the size with an empty buffer doesn't work through rustix, which answers 0.)
fn sized(get: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> io::Result<Vec<u8>> {
    let mut small = [0; 256];
    match get(&mut small) {
        Ok(length) => Ok(small[..length].to_vec()),
        Err(rustix::io::Errno::RANGE) => {
            let mut large = vec![0; MAX];
            let length = get(&mut large)?;
            large.truncate(length);
            Ok(large)
        }
        Err(error) => Err(error.into()),
    }
}

/// Translates the ids in one value; `Err(id)` is an id that isn't mapped. Values that aren't what
/// their name promises are left as they are: the kernel judges them when they are set.
pub(crate) fn translate(xattr: &mut Xattr, ids: &Ids, to: fn(&IdMap, u32) -> Option<u32>) -> Result<(), u32> {
    match xattr.name.as_slice() {
        b"system.posix_acl_access" | b"system.posix_acl_default" => translate_acl(&mut xattr.value, ids, to),
        b"security.capability" => translate_capability(&mut xattr.value, ids, to),
        _ => Ok(()),
    }
}

fn translate_acl(value: &mut [u8], ids: &Ids, to: fn(&IdMap, u32) -> Option<u32>) -> Result<(), u32> {
    let Some((version, entries)) = value.split_first_chunk_mut::<4>() else { return Ok(()) };
    if u32::from_le_bytes(*version) != acl::VERSION {
        return Ok(());
    }
    for entry in entries.chunks_exact_mut(8) {
        let map = match u16::from_le_bytes([entry[0], entry[1]]) {
            acl::USER => &ids.uid,
            acl::GROUP => &ids.gid,
            _ => continue,
        };
        translate_id(&mut entry[4..8], map, to)?;
    }
    Ok(())
}

fn translate_capability(value: &mut [u8], ids: &Ids, to: fn(&IdMap, u32) -> Option<u32>) -> Result<(), u32> {
    let revision = value.first_chunk::<4>().map(|magic| u32::from_le_bytes(*magic) & CAP_REVISION_MASK);
    if revision == Some(CAP_REVISION_3) && value.len() == CAP_V3_BYTES {
        translate_id(&mut value[20..24], &ids.uid, to)?;
    }
    Ok(())
}

fn translate_id(bytes: &mut [u8], map: &IdMap, to: fn(&IdMap, u32) -> Option<u32>) -> Result<(), u32> {
    let id = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    bytes.copy_from_slice(&to(map, id).ok_or(id)?.to_le_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id_map::IdMapping;

    fn ids() -> Ids {
        let map = |host| IdMap(vec![IdMapping { container: 0, host, size: 10 }]);
        Ids { uid: map(1000), gid: map(2000) }
    }

    #[test]
    fn ids_in_acls_are_translated() {
        let entry =
            |tag: u16, id: u32| [&tag.to_le_bytes()[..], &7u16.to_le_bytes(), &id.to_le_bytes()].concat();
        let acl = |user: u32, group: u32| {
            [acl::VERSION.to_le_bytes().to_vec(), entry(1, u32::MAX), entry(2, user), entry(8, group)]
                .concat()
        };
        let mut xattr = Xattr { name: b"system.posix_acl_access".to_vec(), value: acl(1003, 2004) };
        translate(&mut xattr, &ids(), IdMap::to_container).unwrap();
        assert_eq!(xattr.value, acl(3, 4));
        translate(&mut xattr, &ids(), IdMap::to_host).unwrap();
        assert_eq!(xattr.value, acl(1003, 2004));
        xattr.value = acl(5, 2004);
        assert_eq!(translate(&mut xattr, &ids(), IdMap::to_container), Err(5));
    }

    #[test]
    fn the_root_id_of_a_capability_is_translated() {
        let capability = |root: u32| {
            let mut value = CAP_REVISION_3.to_le_bytes().to_vec();
            value.extend_from_slice(&[0; 16]);
            value.extend_from_slice(&root.to_le_bytes());
            Xattr { name: b"security.capability".to_vec(), value }
        };
        let mut xattr = capability(1000);
        translate(&mut xattr, &ids(), IdMap::to_container).unwrap();
        assert_eq!(xattr, capability(0));
    }

    #[test]
    fn other_values_stay_as_they_are() {
        for name in ["user.x", "system.posix_acl_access", "security.capability"] {
            for value in [&b""[..], b"\x02", b"\x02\0\0\0\x02\0\x07", b"\0\0\0\x03"] {
                let before = Xattr { name: name.into(), value: value.into() };
                let mut after = before.clone();
                translate(&mut after, &ids(), IdMap::to_container).unwrap();
                assert_eq!(after, before);
            }
        }
    }
}
