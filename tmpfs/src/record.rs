//! The body of a regular file's entry in `tree.tar`: its size, times and where its pages are.
//!
//! Little-endian, fixed, so that a file with few extents costs two tar blocks (1 KiB):
//!
//! | offset | bytes | field |
//! | --- | --- | --- |
//! | 0 | 8 | size of the file in bytes, at most 2^63 - 1 |
//! | 8 | 8 | mtime, seconds, signed |
//! | 16 | 8 | atime, seconds, signed |
//! | 24 | 4 | mtime, nanoseconds |
//! | 28 | 4 | atime, nanoseconds |
//! | 32 | 4 | inode flags |
//! | 36 | 4 | number of extents |
//! | 40 | 24 each | offset in the file, length, offset in `pages.img`, all in bytes |

use stillframe_pgalloc::{PageExtent, PagesOffset};

use crate::entry::Timestamp;

const FIXED: usize = 40;
const EXTENT: usize = 24;

/// Bytes of the record of a file with so many extents.
pub(crate) fn encoded_len(extents: usize) -> u64 {
    (FIXED + extents * EXTENT) as u64
}

/// Appends a record to `out`; `times` are of modification and access.
pub(crate) fn encode(
    out: &mut Vec<u8>,
    size: u64,
    times: (Timestamp, Timestamp),
    flags: u32,
    extents: &[PageExtent],
) {
    let (mtime, atime) = times;
    out.extend_from_slice(&size.to_le_bytes());
    out.extend_from_slice(&mtime.sec.to_le_bytes());
    out.extend_from_slice(&atime.sec.to_le_bytes());
    out.extend_from_slice(&mtime.nsec.to_le_bytes());
    out.extend_from_slice(&atime.nsec.to_le_bytes());
    out.extend_from_slice(&flags.to_le_bytes());
    let count = u32::try_from(extents.len()).expect("a file of at most 2^51 pages whose table fits memory");
    out.extend_from_slice(&count.to_le_bytes());
    for extent in extents {
        out.extend_from_slice(&extent.file_offset.to_le_bytes());
        out.extend_from_slice(&extent.length.to_le_bytes());
        out.extend_from_slice(&extent.pages_offset.0.to_le_bytes());
    }
}

/// A regular file's record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileRecord {
    pub(crate) size: u64,
    pub(crate) mtime: Timestamp,
    pub(crate) atime: Timestamp,
    pub(crate) flags: u32,
    pub(crate) extents: Vec<PageExtent>,
}

impl FileRecord {
    #[cfg(test)]
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        encode(&mut out, self.size, (self.mtime, self.atime), self.flags, &self.extents);
        out
    }
    /// `None` where the body isn't such a record; ranges are not judged here.
    pub(crate) fn decode(body: &[u8]) -> Option<Self> {
        let (fixed, table) = body.split_at_checked(FIXED)?;
        let u64_at =
            |bytes: &[u8], at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let u32_at = |at: usize| Some(u32::from_le_bytes(fixed.get(at..at + 4)?.try_into().ok()?));
        let time = |sec: usize, nsec: usize| {
            let nsec = u32_at(nsec)?;
            (nsec < 1_000_000_000).then_some(Timestamp { sec: u64_at(fixed, sec)?.cast_signed(), nsec })
        };
        let count = u32_at(36)? as usize;
        if table.len() != count.checked_mul(EXTENT)? {
            return None;
        }
        let extents = table
            .chunks_exact(EXTENT)
            .map(|extent| {
                Some(PageExtent {
                    file_offset: u64_at(extent, 0)?,
                    length: u64_at(extent, 8)?,
                    pages_offset: PagesOffset(u64_at(extent, 16)?),
                })
            })
            .collect::<Option<_>>()?;
        Some(Self {
            size: u64_at(fixed, 0)?,
            mtime: time(8, 24)?,
            atime: time(16, 28)?,
            flags: u32_at(32)?,
            extents,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_layout_is_the_documented_one() {
        let record = FileRecord {
            size: 0x0102,
            mtime: Timestamp { sec: -1, nsec: 3 },
            atime: Timestamp { sec: 4, nsec: 5 },
            flags: 0x40,
            extents: vec![PageExtent { file_offset: 0x1000, length: 6, pages_offset: PagesOffset(0x2000) }],
        };
        let bytes = record.encode();
        assert_eq!(bytes.len(), 64);
        assert_eq!(bytes[..8], [2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[8..16], [0xff; 8]);
        assert_eq!((bytes[16], bytes[24], bytes[28], bytes[32], bytes[36]), (4, 3, 5, 0x40, 1));
        assert_eq!(bytes[40..64], [0, 16, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0]);
        assert_eq!(FileRecord::decode(&bytes), Some(record));
    }

    #[test]
    fn a_wrong_length_or_nanosecond_is_refused() {
        let bytes = FileRecord {
            size: 1,
            mtime: Timestamp::default(),
            atime: Timestamp::default(),
            flags: 0,
            extents: vec![PageExtent { file_offset: 0, length: 1, pages_offset: PagesOffset(0) }],
        }
        .encode();
        for cut in 0..bytes.len() {
            assert_eq!(FileRecord::decode(&bytes[..cut]), None, "{cut}");
        }
        let mut long = bytes.clone();
        long.push(0);
        assert_eq!(FileRecord::decode(&long), None);
        let mut nsec = bytes;
        nsec[24..28].copy_from_slice(&1_000_000_000u32.to_le_bytes());
        assert_eq!(FileRecord::decode(&nsec), None);
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(body: Vec<u8>) {
            if let Some(record) = FileRecord::decode(&body) {
                prop_assert_eq!(record.encode(), body);
            }
        }
    }
}
