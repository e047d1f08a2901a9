//! A container's terminal: the socket over which runc hands over the pty's master (docs/terminals.md of runc).

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim::io::Pty;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

/// How long runc, which has reported success, may take to have sent the terminal: it sends first.
const HANDOVER: Duration = Duration::from_secs(5);

/// A socket in a directory of its own, both gone with the value.
#[derive(Debug)]
pub struct ConsoleSocket {
    listener: UnixListener,
    directory: PathBuf,
}

impl ConsoleSocket {
    /// Binds a socket with a short path (a bundle's may exceed the 108 bytes of sockaddr_un), mode 0700.
    pub fn bind() -> io::Result<Self> {
        let base = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let directory = nix::unistd::mkdtemp(&base.join("stillframe-pty-XXXXXX"))?;
        match UnixListener::bind(directory.join("pty.sock")) {
            Ok(listener) => Ok(Self { listener, directory }),
            Err(error) => {
                drop(std::fs::remove_dir(&directory));
                Err(error)
            }
        }
    }

    /// For `--console-socket`.
    pub fn path(&self) -> PathBuf {
        self.directory.join("pty.sock")
    }

    /// Receives the terminal that runc has sent.
    pub async fn receive(&self) -> io::Result<Pty> {
        let handover = async {
            let (stream, _) = self.listener.accept().await?;
            receive_master(&stream).await
        };
        let master = tokio::time::timeout(HANDOVER, handover)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "runc did not send the terminal"))??;
        Pty::new(master).map_err(io::Error::other)
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        remove(&self.directory);
    }
}

fn remove(directory: &Path) {
    if let Err(error) = std::fs::remove_dir_all(directory) {
        tracing::warn!(path = %directory.display(), %error, "a console socket stays behind");
    }
}

async fn receive_master(stream: &UnixStream) -> io::Result<File> {
    let master: OwnedFd = stream
        .async_io(Interest::READABLE, || {
            // The payload is the terminal's name.
            let mut name = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            recvmsg(stream, &mut [IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
            control
                .drain()
                .find_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
                    _ => None,
                })
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "runc sent no terminal"))
        })
        .await?;
    Ok(File::from(master))
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::AsFd;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;

    #[tokio::test]
    async fn a_terminal_comes_over_the_socket_and_the_socket_goes() {
        let socket = ConsoleSocket::bind().unwrap();
        let path = socket.path();
        let pair = nix::pty::openpty(None, None).unwrap();
        let sender = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let descriptors = [pair.master.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        sendmsg(&sender, &[IoSlice::new(b"/dev/pts/0")], &mut control, SendFlags::empty()).unwrap();

        let pty = socket.receive().await.unwrap();
        let size = rustix::termios::Winsize { ws_row: 33, ws_col: 44, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&pty, size).unwrap();
        assert_eq!(rustix::termios::tcgetwinsize(&pair.slave).unwrap().ws_row, 33);
        drop(socket);
        assert!(!path.parent().unwrap().exists());
    }

    #[tokio::test]
    async fn a_message_without_a_terminal_is_an_error() {
        let socket = ConsoleSocket::bind().unwrap();
        let sender = std::os::unix::net::UnixStream::connect(socket.path()).unwrap();
        std::io::Write::write_all(&mut &sender, b"x").unwrap();
        assert_eq!(socket.receive().await.err().unwrap().kind(), io::ErrorKind::InvalidData);
    }
}
