//! Read leases: fcntl(2) F_SETLEASE.

use std::ffi::c_int;
use std::fs::File;
use std::os::fd::AsRawFd;

/// Which signal tells the holder of a lease that it is to be given up. libc has it for few targets.
const F_SETSIG: c_int = 10;

/// Whether anybody has the file open for writing, by a descriptor anywhere or by a mapping: then the kernel refuses a read
/// lease (`inode_is_open_for_write`). So it is asked for one, which is given up at once. Where there are no leases, it may
/// be open.
///
/// `file` is open for reading only. An open(2) for writing in between waits for the lease to be given up, or fails with
/// EWOULDBLOCK if it is O_NONBLOCK.
pub(crate) fn may_be_open_for_writing(file: &File) -> bool {
    // By default it would be SIGIO, which kills; SIGURG is ignored.
    fcntl(file, F_SETSIG, libc::SIGURG) != 0
        || fcntl(file, libc::F_SETLEASE, libc::F_RDLCK) != 0
        || fcntl(file, libc::F_SETLEASE, libc::F_UNLCK) != 0
}

fn fcntl(file: &File, command: c_int, argument: c_int) -> c_int {
    // SAFETY: both commands take an int and touch no memory of this process.
    unsafe { libc::fcntl(file.as_raw_fd(), command, argument) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_is_found_however_it_has_the_file() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, [1; 4096]).unwrap();
        let reader = File::open(&path).unwrap();
        assert!(!may_be_open_for_writing(&reader), "it is only read");
        let writer = File::options().read(true).write(true).open(&path).unwrap();
        assert!(may_be_open_for_writing(&reader));
        let (sender, _receiver) = std::os::unix::net::UnixStream::pair().unwrap();
        let bytes = [std::io::IoSlice::new(b"x")];
        let descriptors = [writer.as_raw_fd()];
        let rights = [nix::sys::socket::ControlMessage::ScmRights(&descriptors)];
        let flags = nix::sys::socket::MsgFlags::empty();
        nix::sys::socket::sendmsg::<()>(sender.as_raw_fd(), &bytes, &rights, flags, None).unwrap();
        drop(writer);
        assert!(may_be_open_for_writing(&reader), "a descriptor on its way to somebody");
        drop((sender, _receiver));
        assert!(!may_be_open_for_writing(&reader));
    }
}
