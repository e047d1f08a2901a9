//! Writing a filesystem's part of `tree.tar`: a valid PAX archive, which a standard tool can list.
//!
//! Names are `./` for the root and `./a/b` below it, a directory's ending in `/`; see [`crate::member_name`] for long
//! ones. A regular file's body is its [record](crate::record): the data is in `pages.img`. A header is preceded by an extended header only
//! when it needs one, so a plain file takes 1 KiB.

use std::io::{self, Write};

use crate::acl;
use crate::archive::{self, Member, Records, TRAILER};
use crate::entry::{Attributes, Kind, Xattr};
use crate::member_name;
use crate::pax;
use crate::record;

/// Appends entries to one archive. An entry is written by one call.
#[derive(Debug)]
pub struct TreeWriter<W> {
    out: W,
    entry: Vec<u8>,
    records: Records,
    name: Vec<u8>,
    linkname: Vec<u8>,
}

impl<W: Write> TreeWriter<W> {
    /// Begins an archive.
    pub fn new(out: W) -> Self {
        Self { out, entry: Vec::new(), records: Records::default(), name: Vec::new(), linkname: Vec::new() }
    }

    /// Appends the object at `path` (relative to the root, empty for the root itself), whose parent is the `parent`th
    /// that was appended, counted from 0, the root.
    ///
    /// For [`Kind::HardLink`] `link` is the path of the target, its first name; if that is empty, the archive
    /// names it by its number.
    pub fn append(
        &mut self,
        path: &[u8],
        parent: usize,
        kind: &Kind,
        attributes: &Attributes,
        link: &[u8],
    ) -> io::Result<()> {
        member_name::write(&mut self.name, path, parent, *kind == Kind::Directory);
        self.linkname.clear();
        self.entry.clear();
        self.records.clear();
        let (mut size, mut device) = (0, (0, 0));
        let type_flag = match kind {
            Kind::Directory => b'5',
            Kind::File { extents, .. } => {
                size = record::encoded_len(extents.len());
                b'0'
            }
            Kind::Symlink { target } => {
                self.linkname.extend_from_slice(target);
                b'2'
            }
            Kind::Fifo => b'6',
            Kind::Socket => {
                self.records.push(&[pax::TYPE.as_bytes()], pax::SOCKET.as_bytes());
                b'0'
            }
            Kind::CharDevice { major, minor } => {
                device = (*major, *minor);
                b'3'
            }
            Kind::BlockDevice { major, minor } => {
                device = (*major, *minor);
                b'4'
            }
            Kind::HardLink { target } => {
                member_name::write_target(&mut self.linkname, link, *target);
                b'1'
            }
        };
        let is_link = matches!(kind, Kind::HardLink { .. });
        if !is_link {
            if !matches!(kind, Kind::File { .. }) {
                self.records.push(&[b"mtime"], pax::format_time(attributes.mtime).as_bytes());
                self.records.push(&[b"atime"], pax::format_time(attributes.atime).as_bytes());
                if attributes.flags != 0 {
                    self.records.push(&[pax::FLAGS.as_bytes()], attributes.flags.to_string().as_bytes());
                }
            }
            attributes.xattrs.iter().for_each(|xattr| push_xattr(&mut self.records, xattr));
        }
        let member = Member {
            kind: type_flag,
            name: &self.name,
            linkname: &self.linkname,
            mode: attributes.mode,
            uid: attributes.uid,
            gid: attributes.gid,
            size,
            mtime: attributes.mtime,
            device,
        };
        archive::append_headers(&mut self.entry, &member, &mut self.records);
        if let Kind::File { size: file_size, extents } = kind {
            let times = (attributes.mtime, attributes.atime);
            record::encode(&mut self.entry, *file_size, times, attributes.flags, extents);
            archive::pad(&mut self.entry, size);
        }
        self.out.write_all(&self.entry)
    }

    /// What it writes to.
    pub(crate) fn out(&mut self) -> &mut W {
        &mut self.out
    }

    /// Ends the archive with its trailer and hands the writer back.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&TRAILER)?;
        Ok(self.out)
    }
}

/// Adds an xattr's record: text where it is an ACL that has one, else its bytes.
pub fn push_xattr(records: &mut Records, xattr: &Xattr) {
    let text = acl::record_key(&xattr.name).zip(acl::to_text(&xattr.value));
    match text {
        Some((key, text)) => records.push(&[key], text.as_bytes()),
        None => records.push(&[pax::XATTR.as_bytes(), &pax::xattr_key(&xattr.name)], &xattr.value),
    }
}
