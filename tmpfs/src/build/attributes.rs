//! Giving what was made its owner, mode, xattrs and times, with the host's ids.

use std::fs::File;
use std::io;

use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, Uid};

use crate::entry::{Attributes, Entry, Kind, Timestamp};
use crate::id_map::{IdMap, Ids, OVERFLOW_ID};
use crate::xattr::{self, Inode};

/// Owner, mode, xattrs and times of an open file or directory, in the order in which none undoes
/// another: chown drops setuid and capabilities; an ACL must not be narrowed by a later chmod.
pub(super) fn set_open(file: &File, attributes: &Attributes) -> io::Result<()> {
    // One call that asks costs less than two that change nothing.
    let now = rustix::fs::fstat(file)?;
    let chown = (now.st_uid, now.st_gid) != (attributes.uid, attributes.gid);
    if chown {
        let (uid, gid) = owner(attributes);
        rustix::fs::fchown(file, Some(uid), Some(gid))?;
    }
    if chown || now.st_mode & 0o7777 != attributes.mode {
        rustix::fs::fchmod(file, Mode::from_raw_mode(attributes.mode))?;
    }
    xattr::write(&Inode::Open(file), &attributes.xattrs)?;
    Ok(rustix::fs::futimens(file, &times(attributes.atime, attributes.mtime))?)
}

/// The same for what can't be opened.
pub(super) fn set_node(parent: &File, entry: &Entry, node: &File, attributes: &Attributes) -> io::Result<()> {
    let (uid, gid) = owner(attributes);
    let name = entry.name.as_slice();
    rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if !matches!(entry.kind, Kind::Symlink { .. }) {
        rustix::fs::chmodat(parent, name, Mode::from_raw_mode(attributes.mode), AtFlags::empty())?;
    }
    xattr::write(&Inode::PathOnly(node), &attributes.xattrs)?;
    set_times(parent, name, attributes)
}

/// Times of what is called `name`.
pub(super) fn set_times(parent: &File, name: &[u8], attributes: &Attributes) -> io::Result<()> {
    let times = times(attributes.atime, attributes.mtime);
    Ok(rustix::fs::utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn owner(attributes: &Attributes) -> (Uid, Gid) {
    (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid))
}

pub(crate) fn times(atime: Timestamp, mtime: Timestamp) -> Timestamps {
    let time = |t: Timestamp| Timespec { tv_sec: t.sec, tv_nsec: t.nsec.into() };
    Timestamps { last_access: time(atime), last_modification: time(mtime) }
}

/// The attributes with the host's ids. [`super::check_tree`] has found all of them mapped.
pub(super) fn on_host(attributes: &Attributes, ids: &Ids) -> Attributes {
    let mut attributes = attributes.clone();
    to_host(&mut attributes, ids).unwrap_or_else(|id| panic!("id {id} was not checked before building"));
    attributes
}

/// The same of the root. Where it belongs to nobody and somebody outside has made the new one, too, its owner stays.
pub(super) fn root_on_host(attributes: &Attributes, ids: &Ids, root: &File) -> io::Result<Attributes> {
    let there = rustix::fs::fstat(root)?;
    let mut inside = attributes.clone();
    let kept = |id: &mut u32, map: &IdMap, there: u32| {
        let outside = map.to_container(there).is_none() || map.to_host(*id).is_none();
        let kept = (*id == OVERFLOW_ID && outside).then_some(there);
        *id = if kept.is_some() { some_id(map) } else { *id };
        kept
    };
    let uid = kept(&mut inside.uid, &ids.uid, there.st_uid);
    let gid = kept(&mut inside.gid, &ids.gid, there.st_gid);
    let outside = on_host(&inside, ids);
    Ok(Attributes { uid: uid.unwrap_or(outside.uid), gid: gid.unwrap_or(outside.gid), ..outside })
}

/// Any id that is mapped.
pub(super) fn some_id(map: &IdMap) -> u32 {
    map.0.first().map_or(0, |mapping| mapping.container)
}

pub(super) fn to_host(attributes: &mut Attributes, ids: &Ids) -> Result<(), u32> {
    attributes.uid = ids.uid.to_host(attributes.uid).ok_or(attributes.uid)?;
    attributes.gid = ids.gid.to_host(attributes.gid).ok_or(attributes.gid)?;
    attributes.xattrs.iter_mut().try_for_each(|xattr| xattr::translate(xattr, ids, IdMap::to_host))
}
