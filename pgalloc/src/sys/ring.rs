//! Writes in flight, by io_uring(7).
//!
//! Invariant: what the kernel has been given (the vector of buffers, and through its segments the memory) stays in
//! its slot until its completion has been taken. A ring that is dropped waits for its writes; if it can't, it leaks
//! them.
//!
//! io_uring may be refused: EPERM by seccomp or `kernel.io_uring_disabled`, ENOSYS by an old kernel, ENOMEM by a
//! limit. Then there is no ring, and the caller writes without.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};

use crate::save::Write;

/// Writes that are in flight, up to a number.
pub(crate) struct WriteRing {
    ring: IoUring,
    slots: Vec<Option<InFlight>>,
    in_flight: usize,
}

/// A write that the kernel has.
struct InFlight {
    write: Write,
    /// Points into the memory of `write`'s segments, whose place doesn't change while they live.
    buffers: Vec<libc::iovec>,
}

/// A write that the kernel has done with: how many bytes it wrote, or why not.
pub(crate) type Completed = (Write, io::Result<usize>);

impl WriteRing {
    /// A ring for `depth` writes at once.
    pub(crate) fn new(depth: u32) -> io::Result<Self> {
        let ring = IoUring::new(depth)?;
        Ok(Self { ring, slots: (0..depth).map(|_| None).collect(), in_flight: 0 })
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(crate) fn is_full(&self) -> bool {
        self.in_flight == self.slots.len()
    }

    /// Begins to write `write` to `file`. The ring isn't full.
    pub(crate) fn submit(&mut self, file: &File, write: Write) -> io::Result<()> {
        let index =
            self.slots.iter().position(Option::is_none).expect("a ring that isn't full has a free slot");
        let buffers = write.segments.iter().map(|segment| {
            let bytes = segment.bytes();
            libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
        });
        let in_flight = InFlight { buffers: buffers.collect(), write };
        let entry = opcode::Writev::new(
            types::Fd(file.as_raw_fd()),
            in_flight.buffers.as_ptr(),
            in_flight.buffers.len() as u32,
        )
        .offset(in_flight.write.offset)
        .build()
        .user_data(index as u64);
        self.slots[index] = Some(in_flight);
        self.in_flight += 1;
        // SAFETY: the buffers and the memory they point to are kept in the slot until the completion has been taken
        // (by `wait`, or by `drop`), and nothing writes to that memory.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("there are as many entries as slots");
        match self.enter(0) {
            // Short of something now: it is still in the queue, which `wait` passes on.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => Ok(()),
            result => result,
        }
    }

    /// Waits for a completion. `None` if nothing is in flight.
    pub(crate) fn wait(&mut self) -> io::Result<Option<Completed>> {
        while self.in_flight > 0 {
            if let Some(completion) = self.ring.completion().next() {
                let index = completion.user_data() as usize;
                let done = self.slots[index].take().expect("a completion has its write in its slot");
                self.in_flight -= 1;
                let result = match completion.result() {
                    written @ 0.. => Ok(written as usize),
                    errno => Err(io::Error::from_raw_os_error(-errno)),
                };
                return Ok(Some((done.write, result)));
            }
            self.enter(1)?;
        }
        Ok(None)
    }

    /// Passes on what has been submitted and waits for `want` completions, io_uring_enter(2).
    fn enter(&mut self, want: usize) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for WriteRing {
    fn drop(&mut self) {
        while let Ok(Some(_)) = self.wait() {}
        if self.in_flight > 0 {
            // The kernel may still read this memory.
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::BufferPool;
    use crate::save::{PageMemory, Segment};
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    fn write(pool: &Arc<BufferPool>, offset: u64, byte: u8) -> Write {
        let mut buffer = pool.take().unwrap();
        buffer.fill(byte);
        let length = buffer.len();
        let memory = PageMemory::Buffered(Arc::new(buffer));
        let segments = vec![
            Segment { memory: memory.clone(), start: 0, length: 4096 },
            Segment { memory, start: 4096, length: length - 4096 },
        ];
        Write { offset, length, segments }
    }

    #[test]
    fn writes_complete_and_give_their_memory_back() {
        let mut ring = match WriteRing::new(2) {
            Ok(ring) => ring,
            Err(error) => {
                println!("SKIPPED: writes_complete_and_give_their_memory_back: no io_uring: {error}");
                return;
            }
        };
        let pool = BufferPool::new(16384, 2);
        let file = tempfile::tempfile().unwrap();
        for round in 0..20u8 {
            let offset = u64::from(round) * 32768;
            ring.submit(&file, write(&pool, offset, round)).unwrap();
            ring.submit(&file, write(&pool, offset + 16384, round + 100)).unwrap();
            assert!(ring.is_full());
            while let Some((write, written)) = ring.wait().unwrap() {
                assert_eq!(written.unwrap(), write.length);
            }
            let mut bytes = [0; 32768];
            file.read_exact_at(&mut bytes, offset).unwrap();
            assert!(bytes[..16384] == [round; 16384] && bytes[16384..] == [round + 100; 16384]);
        }
    }

    #[test]
    fn a_failing_write_completes_with_its_error_and_drop_waits() {
        let Ok(mut ring) = WriteRing::new(4) else {
            println!("SKIPPED: a_failing_write_completes_with_its_error_and_drop_waits: no io_uring");
            return;
        };
        let pool = BufferPool::new(8192, 2);
        let file = File::open("/dev/null").unwrap();
        ring.submit(&file, write(&pool, 0, 1)).unwrap();
        let (_, written) = ring.wait().unwrap().unwrap();
        assert_eq!(written.unwrap_err().raw_os_error(), Some(libc::EBADF));
        let file = tempfile::tempfile().unwrap();
        ring.submit(&file, write(&pool, 4096, 1)).unwrap();
        drop(ring);
        assert_eq!(file.metadata().unwrap().len(), 4096 + 8192);
    }
}
