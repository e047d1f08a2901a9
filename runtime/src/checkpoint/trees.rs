//! Writing the archives of the filesystems: after the thaw, unless there are none that were read while the containers ran.
//!
//! They are compressed where the pages are kept apart: such an image is meant to be carried by somebody who copies it while the
//! containers are paused (containerd), and an archive of small files is mostly zeros (measured: 104 MB to 0.7 MB, at
//! 3 GB/s). What was prepared before the freeze is used then.

use std::io::{self, Write};

use stillframe_tmpfs::live::{Compressed, Live};
use stillframe_tmpfs::save::TreeSummary;

use crate::checkpoint::error::CheckpointCause;
use crate::checkpoint::save_failed;
use crate::image::{self, ImageWriter, PartWriter};
use crate::manifest::COMPRESSED_MAX;
use crate::selected::Selected;

/// Bytes that are compressed at once.
const PIECE: usize = 256 << 10;
/// zstd's fastest without a loss worth speaking of; it is used while somebody waits.
const LEVEL: i32 = 1;

/// Where a filesystem's archive is.
pub(crate) enum Archive {
    /// Written, from there on.
    Written(u64),
    /// To be written after those before it.
    Kept(Vec<u8>),
}

/// An archive that was written.
pub(crate) struct Described {
    /// From where to where.
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Its length uncompressed, if it is compressed.
    pub(crate) length: Option<u64>,
    pub(crate) summary: TreeSummary,
}

/// All archives, written to one part of the image.
pub(crate) struct Written {
    pub(crate) part: PartWriter,
    /// Its name.
    pub(crate) name: &'static str,
    /// One for each filesystem.
    pub(crate) archives: Vec<Described>,
}

/// A filesystem whose archive is to be written.
pub(crate) struct ToWrite<'a> {
    pub(crate) selected: &'a Selected,
    /// `None` while it is in memory, in `live`.
    pub(crate) archive: Option<(Archive, TreeSummary)>,
    pub(crate) live: Option<&'a mut Live>,
}

/// Compresses archives in pieces; one after the other they are what zstd(1) takes for one file.
pub(crate) struct Compressor(zstd::bulk::Compressor<'static>);

impl Compressor {
    pub(crate) fn new() -> io::Result<Self> {
        zstd::bulk::Compressor::new(LEVEL).map(Self)
    }

    pub(crate) fn compress(&mut self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        self.0.compress(bytes)
    }
}

/// Writes the archives; `begun` is the part that those which were written at once are in.
pub(crate) fn write(
    begun: Option<PartWriter>,
    mut filesystems: Vec<ToWrite<'_>>,
    image: &ImageWriter,
) -> Result<Written, CheckpointCause> {
    if begun.is_none()
        && image.pages_apart().is_some()
        && let Some(written) = write_compressed(&mut filesystems, image)?
    {
        return Ok(written);
    }
    let failed = |source| image.failed("write", image::TREE, source);
    let mut part = match begun {
        Some(part) => part,
        None => PartWriter::new(image.file(image::TREE)?),
    };
    let (mut starts, mut summaries) = (Vec::new(), Vec::new());
    for ToWrite { selected, archive, live } in filesystems {
        let mut start = part.position();
        let summary = match (archive, live) {
            (Some((Archive::Written(at), summary)), _) => {
                start = at;
                summary
            }
            (Some((Archive::Kept(archive), summary)), _) => {
                part.write_all(&archive).map_err(failed)?;
                summary
            }
            (None, Some(live)) => {
                let written = live.write(&selected.ids, part);
                let written = written.map_err(|source| {
                    save_failed(&selected.record.resource_id, &image.pages_path(), source)
                })?;
                part = written.0;
                written.1
            }
            (None, None) => unreachable!("what has no archive is in memory"),
        };
        starts.push(start);
        summaries.push(summary);
    }
    let ends: Vec<u64> = starts.iter().skip(1).copied().chain([part.position()]).collect();
    let described = starts.into_iter().zip(ends).zip(summaries);
    let described = described.map(|((start, end), summary)| Described { start, end, length: None, summary });
    Ok(Written { part, name: image::TREE, archives: described.collect() })
}

/// `None` if they are too large for that.
fn write_compressed(
    filesystems: &mut [ToWrite<'_>],
    image: &ImageWriter,
) -> Result<Option<Written>, CheckpointCause> {
    let failed = |source| image.failed("write", image::TREE_ZSTD, source);
    let mut compressor = Compressor::new().map_err(failed)?;
    let mut compress = |bytes: &[u8]| compressor.compress(bytes);
    let mut archives = Vec::new();
    for ToWrite { selected, archive, live } in filesystems.iter_mut() {
        archives.push(match (archive, live) {
            (Some((Archive::Kept(archive), summary)), _) => {
                let pieces = archive.chunks(PIECE).map(&mut compress).collect::<io::Result<_>>();
                let (pieces, length) = (pieces.map_err(failed)?, archive.len() as u64);
                Compressed { pieces, length, summary: *summary }
            }
            (None, Some(live)) => live
                .compressed(&selected.ids, &mut compress)
                .map_err(|source| save_failed(&selected.record.resource_id, &image.pages_path(), source))?,
            (Some((Archive::Written(_), _)) | None, _) => unreachable!("nothing was written at once"),
        });
    }
    if archives.iter().map(|archive| archive.length).fold(0, u64::saturating_add) > COMPRESSED_MAX {
        return Ok(None);
    }
    let mut part = PartWriter::new(image.file(image::TREE_ZSTD)?);
    let mut described = Vec::new();
    for Compressed { pieces, length, summary } in archives {
        let start = part.position();
        pieces.iter().try_for_each(|piece| part.write_all(piece)).map_err(failed)?;
        described.push(Described { start, end: part.position(), length: Some(length), summary });
    }
    Ok(Some(Written { part, name: image::TREE_ZSTD, archives: described }))
}
