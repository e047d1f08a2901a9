//! Writing POSIX (PAX) archives: a header block, before it an extended header where one is needed, the trailer.
//!
//! By hand, since the tar crate formats each number through a `String`, copies each name and body, and takes only
//! UTF-8 keys for its extended headers, where an xattr's name may be any bytes. Fields are those of POSIX.1-2017, pax,
//! "ustar Interchange Format"; a value that its field can't hold goes into a record, and the field holds what fits.

use std::io::Write as _;

use crate::entry::Timestamp;

/// Bytes of a block.
pub const BLOCK: usize = 512;
/// An archive ends with two zero blocks.
pub const TRAILER: [u8; 2 * BLOCK] = [0; 2 * BLOCK];
/// Largest number that an octal field of 7 digits and one of 11 hold.
const MAX_7: u64 = 0o777_7777;
const MAX_11: u64 = 0o777_7777_7777;
/// Bytes of the fields name and linkname.
const NAME_FIELD: usize = 100;

/// One member of an archive.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// Type flag.
    pub kind: u8,
    /// Name, of any bytes but NUL.
    pub name: &'a [u8],
    /// Name of what it links to; empty for none.
    pub linkname: &'a [u8],
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of its body.
    pub size: u64,
    /// Modification time; the field has whole seconds from 1970 on.
    pub mtime: Timestamp,
    /// Major and minor number of a device.
    pub device: (u32, u32),
}

/// The records of one extended header; kept from member to member for its memory.
#[derive(Debug, Default)]
pub struct Records {
    bytes: Vec<u8>,
}

impl Records {
    /// Forgets all records.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// Adds a record, whose key is made of parts; a key holds no `=`.
    pub fn push(&mut self, key: &[&[u8]], value: &[u8]) {
        // What stands behind the length: " KEY=VALUE\n".
        let rest = key.iter().map(|part| part.len()).sum::<usize>() + value.len() + 3;
        let mut length = rest + 1;
        while rest + decimal_digits(length) != length {
            length = rest + decimal_digits(length);
        }
        write!(self.bytes, "{length} ").expect("a Vec takes everything");
        for part in key {
            self.bytes.extend_from_slice(part);
        }
        self.bytes.push(b'=');
        self.bytes.extend_from_slice(value);
        self.bytes.push(b'\n');
    }
}

fn decimal_digits(number: usize) -> usize {
    number.checked_ilog10().map_or(1, |log| log as usize + 1)
}

/// Appends to `out` the headers of `member`: with `records`, and with records for what its fields can't hold, an
/// extended header comes first. The body, filled up by [`pad`], must follow.
pub fn append_headers(out: &mut Vec<u8>, member: &Member<'_>, records: &mut Records) {
    for (key, id) in [(&b"uid"[..], member.uid), (b"gid", member.gid)] {
        if u64::from(id) > MAX_7 {
            records.push(&[key], id.to_string().as_bytes());
        }
    }
    if member.size > MAX_11 {
        records.push(&[b"size"], member.size.to_string().as_bytes());
    }
    for (key, name) in [(&b"path"[..], member.name), (b"linkpath", member.linkname)] {
        if name.len() > NAME_FIELD {
            records.push(&[key], name);
        }
    }
    if !records.bytes.is_empty() {
        let size = records.bytes.len() as u64;
        let mode = 0o644;
        let extended = Member {
            kind: b'x',
            name: b"././@PaxHeader",
            linkname: b"",
            mode,
            uid: 0,
            gid: 0,
            size,
            mtime: Timestamp::default(),
            device: (0, 0),
        };
        append_header(out, &extended);
        out.extend_from_slice(&records.bytes);
        pad(out, size);
    }
    append_header(out, member);
}

/// Fills up a body of `length` bytes, which `out` ends with, to whole blocks.
pub fn pad(out: &mut Vec<u8>, length: u64) {
    let rest = (length % BLOCK as u64) as usize;
    if rest != 0 {
        out.resize(out.len() + BLOCK - rest, 0);
    }
}

fn append_header(out: &mut Vec<u8>, member: &Member<'_>) {
    let mut block = [0; BLOCK];
    let mut text = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    text(0, &member.name[..member.name.len().min(NAME_FIELD)]);
    text(157, &member.linkname[..member.linkname.len().min(NAME_FIELD)]);
    text(257, b"ustar\x0000");
    text(148, b"        ");
    block[156] = member.kind;
    let seconds = u64::try_from(member.mtime.sec).unwrap_or(0);
    octal(&mut block[100..107], member.mode.into());
    octal(&mut block[108..115], u64::from(member.uid).min(MAX_7));
    octal(&mut block[116..123], u64::from(member.gid).min(MAX_7));
    octal(&mut block[124..135], member.size.min(MAX_11));
    octal(&mut block[136..147], seconds.min(MAX_11));
    if matches!(member.kind, b'3' | b'4') {
        octal(&mut block[329..336], member.device.0.into());
        octal(&mut block[337..344], member.device.1.into());
    }
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    octal(&mut block[148..154], sum.into());
    block[154] = 0;
    out.extend_from_slice(&block);
}

/// Fills `field` with the octal digits of a number that it can hold.
fn octal(field: &mut [u8], mut number: u64) {
    for digit in field.iter_mut().rev() {
        *digit = b'0' + (number & 7) as u8;
        number >>= 3;
    }
    debug_assert_eq!(number, 0, "the caller has seen to it");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MEMBER: Member<'_> = Member {
        kind: b'0',
        name: b"n",
        linkname: b"",
        mode: 0o7777,
        uid: 5,
        gid: 6,
        size: 7,
        mtime: Timestamp { sec: 8, nsec: 9 },
        device: (0, 0),
    };

    #[test]
    fn the_tar_crate_reads_the_same() {
        let (mut out, mut records) = (Vec::new(), Records::default());
        let member = Member { kind: b'3', linkname: b"l", device: (4095, 1_048_575), ..MEMBER };
        append_headers(&mut out, &member, &mut records);
        let header = tar::Header::from_byte_slice(&out);
        assert_eq!(out.len(), BLOCK);
        let sum: u32 =
            (0..BLOCK).map(|at| if (148..156).contains(&at) { 32 } else { u32::from(out[at]) }).sum();
        assert_eq!(header.cksum().unwrap(), sum);
        assert!(header.as_ustar().is_some());
        assert_eq!((&*header.path_bytes(), &*header.link_name_bytes().unwrap()), (&b"n"[..], &b"l"[..]));
        assert_eq!((header.mode().unwrap(), header.entry_type()), (0o7777, tar::EntryType::Char));
        assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (5, 6));
        assert_eq!((header.size().unwrap(), header.mtime().unwrap()), (7, 8));
        let device = (header.device_major().unwrap(), header.device_minor().unwrap());
        assert_eq!(device, (Some(4095), Some(1_048_575)));
    }

    #[test]
    fn what_a_field_cannot_hold_is_a_record() {
        let (mut out, mut records) = (Vec::new(), Records::default());
        let name = [b'n'; 101];
        let mtime = Timestamp { sec: -1, nsec: 0 };
        let member = Member { name: &name, linkname: &name, uid: u32::MAX, size: u64::MAX, mtime, ..MEMBER };
        append_headers(&mut out, &member, &mut records);
        assert_eq!(out.len(), 3 * BLOCK);
        let length = tar::Header::from_byte_slice(&out[..BLOCK]).size().unwrap() as usize;
        let records = crate::pax::parse(&out[BLOCK..BLOCK + length]).unwrap();
        let want: [(&[u8], &[u8]); 4] = [
            (b"uid", b"4294967295"),
            (b"size", b"18446744073709551615"),
            (b"path", &name),
            (b"linkpath", &name),
        ];
        assert_eq!(records, want);
        let header = tar::Header::from_byte_slice(&out[2 * BLOCK..]);
        assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (MAX_7, 6));
        assert_eq!((header.size().unwrap(), header.mtime().unwrap()), (MAX_11, 0));
    }

    proptest! {
        #[test]
        fn any_records_are_read_back(all in prop::collection::vec(("[a-zA-Z.]{1,100}", prop::collection::vec(any::<u8>(), 0..1100)), 0..5)) {
            let mut records = Records::default();
            for (key, value) in &all {
                let (head, tail) = key.as_bytes().split_at(key.len() / 2);
                records.push(&[head, tail], value);
            }
            let want: Vec<(&[u8], &[u8])> = all.iter().map(|(key, value)| (key.as_bytes(), value.as_slice())).collect();
            prop_assert_eq!(crate::pax::parse(&records.bytes).unwrap(), want);
        }
    }
}
