//! Mappings that several processes write to, and writes by an io_uring.

use std::fs::File;

use memmap2::MmapMut;

/// Maps the whole of `file`, shared and writable.
pub(crate) fn map_shared(file: &File) -> std::io::Result<MmapMut> {
    // SAFETY: files that are mapped are truncated by nobody.
    unsafe { MmapMut::map_mut(file) }
}

/// Stores a number to eight aligned bytes at once.
pub(crate) fn store(bytes: &mut [u8], value: u64) {
    // SAFETY: any bytes are integers, and what isn't aligned is left out.
    let (before, aligned, _) = unsafe { bytes.align_to_mut::<std::sync::atomic::AtomicU64>() };
    assert!(before.is_empty());
    aligned[0].store(value.to_le(), std::sync::atomic::Ordering::SeqCst);
}

/// A shared mapping as numbers that several processes change.
pub(crate) fn atomics(map: &MmapMut) -> &[std::sync::atomic::AtomicU64] {
    // SAFETY: any bytes are integers, a mapping is aligned to a page, and atomics may be changed by others.
    let (before, numbers, _) = unsafe { map.align_to::<std::sync::atomic::AtomicU64>() };
    assert!(before.is_empty());
    numbers
}

/// Writes all of `bytes` to the start of `file` by an io_uring, and waits for it.
pub(crate) fn ring_write(ring: &mut io_uring::IoUring, file: &File, bytes: &[u8]) {
    use std::os::fd::AsRawFd;
    let fd = io_uring::types::Fd(file.as_raw_fd());
    // Through a worker thread of the kernel's, which must be frozen, too.
    let entry = io_uring::opcode::Write::new(fd, bytes.as_ptr(), bytes.len() as u32).offset(0).build();
    let entry = entry.flags(io_uring::squeue::Flags::ASYNC);
    // SAFETY: the bytes and the file live until the write has been waited for, below.
    unsafe { ring.submission().push(&entry) }.unwrap();
    // Being frozen ends the waiting early.
    let done = loop {
        match ring.submit_and_wait(1) {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => panic!("{error}"),
            _ => {}
        }
        if let Some(done) = ring.completion().next() {
            break done;
        }
    };
    assert_eq!(done.result(), bytes.len() as i32);
}
