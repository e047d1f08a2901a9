//! Who waits at the gate: reads its events, and answers each when its file is settled.
//!
//! A file is *closed* until it is loaded (*open*) or can't be (*broken*: EIO). Events are read by [`READERS`] threads, since
//! reading one waits for its file's lease: as many files can be waited for without one having to wait for another.
//!
//! Done by the keeper, because a process that is killed while it reads an event denies it (the opener gets EPERM); by the loader,
//! when the keeper is dead.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use stillframe_tmpfs::lazy::gate::{Answer, Gate};

/// Threads that read events.
const READERS: usize = 16;
/// They do next to nothing.
const STACK: usize = 128 * 1024;

/// What a file is to who opens it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Door {
    Closed,
    Open,
    Broken,
}

#[derive(Debug)]
struct State {
    doors: Vec<Door>,
    stopping: bool,
    /// Events that were read and aren't answered.
    waiting: usize,
}

/// The gate with all its files.
#[derive(Debug)]
pub(super) struct Doors {
    gate: Gate,
    by_inode: HashMap<u64, usize>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Doors {
    /// `inodes` has the number of each file's inode.
    pub(super) fn new(gate: Gate, inodes: impl Iterator<Item = u64>, doors: Vec<Door>) -> Arc<Self> {
        let by_inode = inodes.enumerate().map(|(index, inode)| (inode, index)).collect();
        let state = Mutex::new(State { doors, stopping: false, waiting: 0 });
        Arc::new(Self { gate, by_inode, state, changed: Condvar::new() })
    }

    pub(super) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Begins to read events, in threads that don't end.
    pub(super) fn attend(self: &Arc<Self>) -> io::Result<()> {
        for _ in 0..READERS {
            let doors = self.clone();
            thread::Builder::new().name("gate".into()).stack_size(STACK).spawn(move || doors.read())?;
        }
        Ok(())
    }

    /// Whoever waits for file `index` is told.
    pub(super) fn settle(&self, index: usize, door: Door) {
        self.lock().doors[index] = door;
        self.changed.notify_all();
    }

    /// Answers those whose events another process has read and not answered: it had read them since their files were settled.
    pub(super) fn answer_for_the_dead(&self) {
        let broken = self.lock().doors.contains(&Door::Broken);
        let answer = if broken { Answer::IoError } else { Answer::Allow };
        let highest = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(65536);
        for descriptor in 0..i32::try_from(highest).unwrap_or(65536) {
            self.gate.answer_for(descriptor, answer);
        }
    }

    /// From here on nobody is let in to what isn't there. Returns when all who wait have been told; no lease must be
    /// held any more.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        state.stopping = true;
        self.changed.notify_all();
        loop {
            while state.waiting > 0 {
                state = self.wait(state);
            }
            let mut fds = [PollFd::new(self.gate.as_fd(), PollFlags::POLLIN)];
            if !poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
                return;
            }
            // A reader is about to take it.
            drop(state);
            thread::yield_now();
            state = self.lock();
        }
    }

    fn read(&self) {
        loop {
            // On an error the opener was refused: the kernel couldn't open its file for us.
            let Ok(opener) = self.gate.next() else { continue };
            let mut state = self.lock();
            state.waiting += 1;
            let answer = loop {
                let door = self.by_inode.get(&opener.inode).map_or(Door::Open, |index| state.doors[*index]);
                match door {
                    Door::Open => break Answer::Allow,
                    Door::Broken => break Answer::IoError,
                    Door::Closed if state.stopping => break Answer::IoError,
                    Door::Closed => state = self.wait(state),
                }
            };
            drop(state);
            // It fails only if the opener is gone.
            let _ = opener.answer(answer);
            self.lock().waiting -= 1;
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}
