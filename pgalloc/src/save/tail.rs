//! The tail of the pages file: gives pages their offsets, in order, and hands them to the writer in that order.
//!
//! One lock orders the producers: what is appended under it is contiguous in the pages file. Small pieces are copied
//! into a *gather buffer*, which goes to the writer when it is full, when memory appended by reference must follow
//! it, or at the end. The writer never takes this lock, so it may be held while waiting for a gather buffer.

use std::ops::Range;
use std::sync::mpsc::{SendError, Sender, channel};
use std::sync::{Arc, Mutex};

use crate::buffer::{BufferPool, PageBuffer, Permit, lock};
use crate::page::{PAGE_SIZE, PageExtent, PagesOffset, page_ceil};
use crate::save::error::SaveError;
use crate::sys::mapping::FileMapping;

/// Memory that holds pages to be written, kept until they are.
#[derive(Clone, Debug)]
pub(crate) enum PageMemory {
    /// A part of a source file, with the mapped bytes it takes out of the budget.
    Mapped(Arc<(FileMapping, Permit)>),
    /// A buffer.
    Buffered(Arc<PageBuffer>),
}

impl PageMemory {
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(mapped) => mapped.0.bytes(),
            Self::Buffered(buffer) => buffer,
        }
    }
}

/// Whole pages to be written: a piece of some memory.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) memory: PageMemory,
    pub(crate) start: usize,
    pub(crate) length: usize,
}

impl Segment {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.memory.bytes()[self.start..self.start + self.length]
    }
}

/// What the writer is to do next.
#[derive(Debug)]
pub(crate) enum Order {
    Write(Vec<Segment>),
    /// Wait for all writes, then tell.
    Drain(Sender<()>),
}

/// Segments that are contiguous in the pages file, to be written at once.
#[derive(Debug, Default)]
pub(crate) struct Write {
    /// Where in the pages file.
    pub(crate) offset: u64,
    /// Bytes of all segments.
    pub(crate) length: usize,
    pub(crate) segments: Vec<Segment>,
}

/// The order of appending; see the module.
#[derive(Debug)]
pub(crate) struct Tail {
    state: Mutex<TailState>,
    gather_buffers: Arc<BufferPool>,
}

#[derive(Debug)]
struct TailState {
    /// Where the next page goes.
    next: u64,
    gather: Option<PageBuffer>,
    /// Bytes in `gather`.
    gathered: usize,
    /// `None` once the save is finished.
    writer: Option<Sender<Order>>,
}

impl Tail {
    pub(crate) fn new(gather_buffers: Arc<BufferPool>, writer: Sender<Order>) -> Self {
        let state = TailState { next: 0, gather: None, gathered: 0, writer: Some(writer) };
        Self { state: Mutex::new(state), gather_buffers }
    }

    /// Appends copies of `pieces`, each with its offset in its file. A piece's last page is filled up with zeros.
    pub(crate) fn append_copies<'a>(
        &self,
        pieces: impl Iterator<Item = (u64, &'a [u8])>,
        extents: &mut Vec<PageExtent>,
    ) -> Result<(), SaveError> {
        let mut state = lock(&self.state);
        for (file_offset, piece) in pieces {
            let pages_offset = PagesOffset(state.next);
            state.copy(piece, &self.gather_buffers)?;
            push_extent(extents, PageExtent { file_offset, length: piece.len() as u64, pages_offset });
        }
        Ok(())
    }

    /// Appends pieces of `memory` by reference, each with its offset in its file. They are whole pages, the last bytes of
    /// which may be zeros that aren't the file's.
    pub(crate) fn append_pages(
        &self,
        memory: &PageMemory,
        pieces: &[(u64, Range<usize>)],
        extents: &mut Vec<PageExtent>,
    ) {
        let mut state = lock(&self.state);
        state.send_gathered();
        let mut segments: Vec<Segment> = Vec::new();
        for (file_offset, piece) in pieces {
            let pages_offset = PagesOffset(state.next);
            push_extent(
                extents,
                PageExtent { file_offset: *file_offset, length: piece.len() as u64, pages_offset },
            );
            let length = piece.len().next_multiple_of(PAGE_SIZE as usize);
            state.next += length as u64;
            match segments.last_mut() {
                Some(last) if last.start + last.length == piece.start => last.length += length,
                _ => segments.push(Segment { memory: memory.clone(), start: piece.start, length }),
            }
        }
        state.send(segments);
    }

    /// Waits until all that was appended by reference is written, or dropped after a failure.
    pub(crate) fn drain(&self) {
        let (done, written) = channel();
        lock(&self.state).order(Order::Drain(done));
        // An error says that the writer is gone, which `finish` passes on.
        let _ = written.recv();
    }

    /// Hands over what is gathered and tells the writer that this was all. Returns the pages file's length.
    pub(crate) fn close(&self) -> u64 {
        let mut state = lock(&self.state);
        state.send_gathered();
        state.writer = None;
        state.next
    }
}

impl TailState {
    fn copy(&mut self, mut piece: &[u8], buffers: &Arc<BufferPool>) -> Result<(), SaveError> {
        while !piece.is_empty() {
            let gather = match &mut self.gather {
                Some(gather) => gather,
                empty => empty.insert(buffers.take().map_err(|source| SaveError::Buffer {
                    length: buffers.length(),
                    source: Arc::new(source),
                })?),
            };
            let room = &mut gather[self.gathered..];
            let (copied, rest) = piece.split_at(piece.len().min(room.len()));
            // Only the last part of a piece isn't made of whole pages.
            let padded = copied.len().next_multiple_of(PAGE_SIZE as usize);
            room[..copied.len()].copy_from_slice(copied);
            room[copied.len()..padded].fill(0);
            self.gathered += padded;
            self.next += padded as u64;
            piece = rest;
            if self.gathered == buffers.length() {
                self.send_gathered();
            }
        }
        Ok(())
    }

    fn send_gathered(&mut self) {
        if let Some(gather) = self.gather.take() {
            let length = std::mem::take(&mut self.gathered);
            self.send(vec![Segment { memory: PageMemory::Buffered(Arc::new(gather)), start: 0, length }]);
        }
    }

    fn send(&self, segments: Vec<Segment>) {
        self.order(Order::Write(segments));
    }

    fn order(&self, order: Order) {
        let writer = self.writer.as_ref().expect("nothing is appended to a finished pages file");
        // The writer takes segments, if only to drop them, until it is told that there are no more. It can't be gone
        // unless it panicked, which `finish` passes on.
        if let Err(SendError(order)) = writer.send(order) {
            drop(order);
        }
    }
}

/// Adds an extent, merged with the last one if it continues it both in the file and in the pages file.
pub(crate) fn push_extent(extents: &mut Vec<PageExtent>, extent: PageExtent) {
    if let Some(last) = extents.last_mut()
        && last.file_offset + last.length == extent.file_offset
        && page_ceil(last.length).is_some_and(|length| last.pages_offset.0 + length == extent.pages_offset.0)
    {
        last.length += extent.length;
        return;
    }
    extents.push(extent);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(file_offset: u64, length: u64, pages_offset: u64) -> PageExtent {
        PageExtent { file_offset, length, pages_offset: PagesOffset(pages_offset) }
    }

    #[test]
    fn extents_merge_only_when_contiguous_in_both_files() {
        let mut extents = vec![];
        for (next, count) in [
            (extent(0, 4096, 0), 1),
            (extent(4096, 4096, 4096), 1),
            (extent(12288, 4096, 8192), 2),
            (extent(16384, 4096, 16384), 3),
            (extent(20480, 100, 20480), 3),
        ] {
            push_extent(&mut extents, next);
            assert_eq!(extents.len(), count, "{extents:?}");
        }
        assert_eq!(extents, [extent(0, 8192, 0), extent(12288, 4096, 8192), extent(16384, 4196, 16384)]);
    }

    #[test]
    fn order_of_sending_is_order_of_offsets() {
        let (sender, receiver) = channel();
        let gather_buffers = BufferPool::new(8192, 8);
        gather_buffers.take().unwrap().fill(0xee);
        let tail = Tail::new(gather_buffers, sender);
        let buffer = BufferPool::new(32768, 1).take().unwrap();
        let memory = PageMemory::Buffered(Arc::new(buffer));
        let mut extents = vec![];
        tail.append_copies([(0, &[1u8; 5000][..]), (16384, &[2; 4096])].into_iter(), &mut extents).unwrap();
        // The first two touch in memory, not in their file.
        let pieces = [(0, 4096..8192), (40960, 8192..12288), (45056, 20480..20490)];
        tail.append_pages(&memory, &pieces, &mut extents);
        tail.append_copies([(0, &[3u8; 1][..])].into_iter(), &mut extents).unwrap();
        assert_eq!(tail.close(), 7 * 4096);
        let orders = receiver.iter().map(|order| match order {
            Order::Write(segments) => segments,
            Order::Drain(_) => panic!("nobody asked for it"),
        });
        let segments: Vec<Segment> = orders.flatten().collect();
        let lengths: Vec<usize> = segments.iter().map(|segment| segment.length).collect();
        assert_eq!(lengths, [8192, 4096, 8192, 4096, 4096]);
        assert!(
            segments[0].bytes()[5000..].iter().all(|&byte| byte == 0),
            "a last page isn't filled up with zeros"
        );
        assert_eq!(
            extents,
            [
                extent(0, 5000, 0),
                extent(16384, 4096, 8192),
                extent(0, 4096, 12288),
                extent(40960, 4106, 16384),
                extent(0, 1, 24576)
            ]
        );
    }
}
