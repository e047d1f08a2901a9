//! What the loader has the keeper do: a message of three numbers, answered by one when it is done.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// The loader has closed large file `index`: close it, take it off the gate, and let in who waits, or tell them
    /// that it can't be loaded.
    Settle { index: u64, loaded: bool },
    /// Read `length` bytes of the pages file from `offset` into the page cache: what the loader reads itself is charged to
    /// the container.
    ReadAhead { offset: u64, length: u64 },
    /// Let nobody in any more.
    Stop,
}

const LENGTH: usize = 24;

impl Message {
    fn encode(self) -> [u8; LENGTH] {
        let numbers = match self {
            Self::Settle { index, loaded } => [1, index, loaded.into()],
            Self::ReadAhead { offset, length } => [2, offset, length],
            Self::Stop => [3, 0, 0],
        };
        let mut bytes = [0; LENGTH];
        for (field, number) in bytes.chunks_exact_mut(8).zip(numbers) {
            field.copy_from_slice(&u64::to_le_bytes(number));
        }
        bytes
    }

    fn decode(bytes: &[u8; LENGTH]) -> Option<Self> {
        let mut numbers =
            bytes.chunks_exact(8).map(|field| u64::from_le_bytes(field.try_into().expect("eight bytes")));
        let (kind, first, second) = (numbers.next()?, numbers.next()?, numbers.next()?);
        match kind {
            1 => Some(Self::Settle { index: first, loaded: second != 0 }),
            2 => Some(Self::ReadAhead { offset: first, length: second }),
            3 => Some(Self::Stop),
            _ => None,
        }
    }
}

/// Sends it, and waits until it is done.
pub(super) fn call(mut channel: &UnixStream, message: Message) -> io::Result<()> {
    channel.write_all(&message.encode())?;
    channel.read_exact(&mut [0])
}

/// The next message.
pub(super) fn receive(mut channel: &UnixStream) -> io::Result<Message> {
    let mut bytes = [0; LENGTH];
    channel.read_exact(&mut bytes)?;
    Message::decode(&bytes).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Says that it is done.
pub(super) fn done(mut channel: &UnixStream) -> io::Result<()> {
    channel.write_all(&[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_received_as_it_was_sent() {
        let (here, there) = UnixStream::pair().unwrap();
        for message in [
            Message::Settle { index: 7, loaded: true },
            Message::Settle { index: u64::MAX, loaded: false },
            Message::ReadAhead { offset: 1 << 40, length: 5 },
            Message::Stop,
        ] {
            std::thread::scope(|scope| {
                let answer = scope.spawn(|| {
                    let received = receive(&there).unwrap();
                    done(&there).unwrap();
                    received
                });
                call(&here, message).unwrap();
                assert_eq!(answer.join().unwrap(), message);
            });
        }
    }
}
