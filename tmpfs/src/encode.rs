//! Writing a filesystem's part of `tree.tar`: a valid PAX archive, which a standard tool can list.
//!
//! Names are `./` for the root and `./a/b` below it, a directory's ending in `/`. A regular file's body
//! is its [`FileRecord`]: the data is in `pages.img`. A header is preceded by an extended header only
//! when it needs one, so a plain file takes 1 KiB.

use std::io::{self, Write};

use tar::{Builder, EntryType, Header};

use crate::entry::{Attributes, Kind};
use crate::pax;
use crate::record::FileRecord;

/// Largest uid or gid that seven octal digits hold.
const MAX_OCTAL_ID: u32 = 0o777_7777;
/// Largest time that eleven octal digits hold.
const MAX_OCTAL_TIME: i64 = 0o777_7777_7777;
/// Bytes of ustar's name and linkname fields.
const NAME_FIELD: usize = 100;

/// Appends entries to one archive.
pub struct TreeWriter<W: Write> {
    builder: Builder<W>,
}

impl<W: Write> TreeWriter<W> {
    /// Begins an archive.
    pub fn new(out: W) -> Self {
        Self { builder: Builder::new(out) }
    }

    /// Appends the object at `path` (relative to the root, empty for the root itself).
    ///
    /// For [`Kind::HardLink`] the target is given by `link`, the path of its first name; the index in
    /// the kind is ignored, since an archive knows paths only.
    pub fn append(
        &mut self,
        path: &[u8],
        kind: &Kind,
        attributes: &Attributes,
        link: &[u8],
    ) -> io::Result<()> {
        let mut header = Header::new_ustar();
        let mut records: Vec<(String, Vec<u8>)> = Vec::new();
        let mut body = Vec::new();
        let mut name = [b"./", path].concat();
        let mut linkname: Vec<u8> = Vec::new();

        let is_link = matches!(kind, Kind::HardLink { .. });
        let entry_type = match kind {
            Kind::Directory => {
                if !path.is_empty() {
                    name.push(b'/');
                }
                EntryType::Directory
            }
            Kind::File { size, extents } => {
                body = FileRecord {
                    size: *size,
                    mtime: attributes.mtime,
                    atime: attributes.atime,
                    flags: attributes.flags,
                    extents: extents.clone(),
                }
                .encode();
                EntryType::Regular
            }
            Kind::Symlink { target } => {
                linkname.clone_from(target);
                EntryType::Symlink
            }
            Kind::Fifo => EntryType::Fifo,
            Kind::Socket => {
                records.push((pax::TYPE.to_owned(), pax::SOCKET.into()));
                EntryType::Regular
            }
            Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                header.set_device_major(*major)?;
                header.set_device_minor(*minor)?;
                if matches!(kind, Kind::CharDevice { .. }) { EntryType::Char } else { EntryType::Block }
            }
            Kind::HardLink { .. } => {
                linkname = [b"./", link].concat();
                EntryType::Link
            }
        };
        header.set_entry_type(entry_type);
        header.set_mode(attributes.mode);
        header.set_mtime(attributes.mtime.sec.clamp(0, MAX_OCTAL_TIME).unsigned_abs());
        header.set_uid(attributes.uid.min(MAX_OCTAL_ID).into());
        header.set_gid(attributes.gid.min(MAX_OCTAL_ID).into());
        header.set_size(body.len() as u64);
        let ustar = header.as_ustar_mut().expect("made by new_ustar");
        put_name(&mut ustar.name, &name, "path", &mut records);
        put_name(&mut ustar.linkname, &linkname, "linkpath", &mut records);

        if !is_link {
            for (key, id) in [("uid", attributes.uid), ("gid", attributes.gid)] {
                if id > MAX_OCTAL_ID {
                    records.push((key.to_owned(), id.to_string().into_bytes()));
                }
            }
            if !matches!(kind, Kind::File { .. }) {
                records.push(("mtime".to_owned(), pax::format_time(attributes.mtime).into_bytes()));
                records.push(("atime".to_owned(), pax::format_time(attributes.atime).into_bytes()));
                if attributes.flags != 0 {
                    records.push((pax::FLAGS.to_owned(), attributes.flags.to_string().into_bytes()));
                }
            }
            for xattr in &attributes.xattrs {
                let key = pax::xattr_key(&xattr.name).ok_or_else(|| {
                    let name = xattr.name.escape_ascii();
                    io::Error::new(io::ErrorKind::InvalidData, format!("the xattr name {name} is not UTF-8"))
                })?;
                records.push((key, xattr.value.clone()));
            }
        }
        self.builder
            .append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), value.as_slice())))?;
        header.set_cksum();
        self.builder.append(&header, body.as_slice())
    }

    /// Ends the archive with its trailer and hands the writer back.
    pub fn finish(self) -> io::Result<W> {
        self.builder.into_inner()
    }
}

/// Puts a name into its header field, and into a record as well where the field is too short.
fn put_name(field: &mut [u8; NAME_FIELD], name: &[u8], key: &str, records: &mut Vec<(String, Vec<u8>)>) {
    let kept = name.len().min(field.len());
    field[..kept].copy_from_slice(&name[..kept]);
    if kept < name.len() {
        records.push((key.to_owned(), name.to_vec()));
    }
}
