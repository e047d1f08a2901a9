//! The one consumer of SIGCHLD: collects every dead child and hands its exit to whoever claimed the pid.
//!
//! The shim is a subreaper, so besides the commands it spawns it inherits each container's init (whose
//! parent, `runc create`, is gone by then), exec'd processes and orphans. wait4(2) with pid -1 collects
//! them all; a second waiter (such as tokio's `Child::wait`) would find ECHILD.
//!
//! An exit is delivered exactly once:
//! - a child spawned here is claimed under the table's lock, before it can be collected;
//! - a container process is claimed when runc has written its pid file, by which time it may be dead
//!   already. So while a [`Birth`] exists, exits that nobody claimed yet are kept; [`Birth::claim`] looks there first.
//!   With the last birth's end they are forgotten: they were orphans.
//!
//! Exits are read as raw wait statuses: nix's `WaitStatus` fails to decode a death by a real-time signal, *after*
//! having collected the child, which would leave its task running forever.
//!
//! The table's lock is held for wait4 and for fork, never across an await.

use std::collections::HashMap;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use rustix::process::{WaitOptions, wait};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::sys;

/// A dead child: its wait status and when it was collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// What wait4(2) reported.
    pub status: ExitStatus,
    /// The time of collection: never zero, CRI takes a zero for "still running".
    pub at: SystemTime,
}

impl Exit {
    /// An exit of now with a wait status as exit(2) makes it.
    pub fn now(code: u8) -> Self {
        Self { status: ExitStatus::from_raw(i32::from(code) << 8), at: SystemTime::now() }
    }

    /// The status as shells and containerd count it: the exit code, or 128 plus the signal.
    pub fn code(&self) -> u32 {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => code as u32,
            (None, Some(signal)) => 128 + signal as u32,
            (None, None) => unreachable!("a stopped child was collected: {:?}", self.status),
        }
    }
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Reaper {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    claims: HashMap<i32, oneshot::Sender<Exit>>,
    early: HashMap<i32, Exit>,
    births: usize,
}

impl Reaper {
    /// Installs the SIGCHLD handler and starts collecting. Must run inside the tokio runtime, once a process.
    pub fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let children = signal(SignalKind::child())?;
        tokio::spawn(reaper.clone().run(children));
        Ok(reaper)
    }

    async fn run(self: Arc<Self>, mut children: Signal) {
        // The first pass is for children that died before the handler was there.
        loop {
            self.collect();
            if children.recv().await.is_none() {
                return;
            }
        }
    }

    fn collect(&self) {
        let mut table = self.table();
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let status = ExitStatus::from_raw(status.as_raw());
                    table.exited(pid.as_raw_nonzero().get(), Exit { status, at: SystemTime::now() });
                }
                Ok(None) | Err(rustix::io::Errno::CHILD) => return,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => panic!("wait4(-1, WNOHANG) failed: {error}"),
            }
        }
    }

    /// Spawns `command` and claims its exit.
    ///
    /// The lock also keeps [`Reaper::collect`] out while std itself waits for a child whose exec failed.
    pub fn spawn(&self, command: &mut Command) -> io::Result<(Child, oneshot::Receiver<Exit>)> {
        let mut table = self.table();
        let child = command.spawn()?;
        let (sender, receiver) = oneshot::channel();
        table.claims.insert(child.id() as i32, sender);
        Ok((child, receiver))
    }

    /// Announces that processes are about to be born whose pids aren't known yet.
    pub fn birth(self: &Arc<Self>) -> Birth {
        self.table().births += 1;
        Birth { reaper: self.clone() }
    }

    /// Signals a claimed process that hasn't been collected. Its pid can't have been given to another process: the
    /// zombie keeps it until [`Reaper::collect`], which waits for the same lock.
    ///
    /// ESRCH when the process is gone.
    pub fn kill(&self, pid: i32, signal: i32) -> io::Result<()> {
        let table = self.table();
        if !table.claims.contains_key(&pid) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        sys::kill(pid, signal)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("the reaper's table is never left half-changed")
    }
}

impl Table {
    fn exited(&mut self, pid: i32, exit: Exit) {
        match self.claims.remove(&pid) {
            // Nobody listens any more: the claimant was cancelled.
            Some(claim) => drop(claim.send(exit)),
            None if self.births > 0 => drop(self.early.insert(pid, exit)),
            None => tracing::debug!(pid, status = ?exit.status, "reaped an orphan"),
        }
    }
}

/// While it lives, no exit is forgotten.
#[derive(Debug)]
pub struct Birth {
    reaper: Arc<Reaper>,
}

impl Birth {
    /// Claims `pid`'s exit, which may have happened already.
    pub fn claim(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.reaper.table();
        match table.early.remove(&pid) {
            Some(exit) => drop(sender.send(exit)),
            None => drop(table.claims.insert(pid, sender)),
        }
        receiver
    }
}

impl Drop for Birth {
    fn drop(&mut self) {
        let mut table = self.reaper.table();
        table.births -= 1;
        if table.births == 0 {
            table.early.clear();
        }
    }
}

#[cfg(test)]
pub mod tests {
    use std::sync::OnceLock;

    use super::*;

    /// The one reaper of the test process: two would collect each other's children. It has a runtime of its own, since a
    /// test's ends with the test.
    pub fn shared() -> Arc<Reaper> {
        static SHARED: OnceLock<Arc<Reaper>> = OnceLock::new();
        let start = || {
            let (sender, reaper) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    sender.send(Reaper::start().unwrap()).unwrap();
                    std::future::pending::<()>().await
                })
            });
            reaper.recv().unwrap()
        };
        SHARED.get_or_init(start).clone()
    }

    fn exit(code: u8) -> Exit {
        Exit::now(code)
    }

    #[test]
    fn an_exit_before_its_claim_is_kept_while_a_birth_lasts() {
        let reaper = Arc::new(Reaper::default());
        let birth = reaper.birth();
        let other = reaper.birth();
        reaper.table().exited(7, exit(3));
        drop(other);
        assert_eq!(birth.claim(7).try_recv().unwrap().code(), 3);
        drop(birth);
        assert!(reaper.table().early.is_empty());
    }

    #[test]
    fn an_orphan_is_forgotten_with_the_last_birth() {
        let reaper = Arc::new(Reaper::default());
        reaper.table().exited(7, exit(3));
        assert!(reaper.table().early.is_empty(), "nobody was being born");
        let birth = reaper.birth();
        reaper.table().exited(8, exit(3));
        drop(birth);
        assert!(reaper.birth().claim(8).try_recv().is_err(), "the exit of an earlier pid 8 was delivered");
    }

    #[test]
    fn a_process_that_nobody_claimed_is_not_signalled() {
        let reaper = Reaper::default();
        let error = reaper.kill(std::process::id() as i32, libc::SIGKILL).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    fn codes_are_those_of_shells() {
        let at = SystemTime::now();
        assert_eq!(Exit { status: ExitStatus::from_raw(5 << 8), at }.code(), 5);
        assert_eq!(Exit { status: ExitStatus::from_raw(9), at }.code(), 137);
        // SIGRTMIN with a core dump.
        assert_eq!(Exit { status: ExitStatus::from_raw(34 | 0x80), at }.code(), 162);
    }

    #[tokio::test]
    async fn children_are_collected_whatever_kills_them() {
        let reaper = shared();
        let mut command = Command::new("sh");
        let (_, exit) = reaper.spawn(command.args(["-c", "exit 7"])).unwrap();
        assert_eq!(exit.await.unwrap().code(), 7);

        let mut command = Command::new("sleep");
        let (child, exit) = reaper.spawn(command.arg("60")).unwrap();
        reaper.kill(child.id() as i32, 34).unwrap();
        assert_eq!(exit.await.unwrap().code(), 128 + 34, "a real-time signal");

        let error = reaper.spawn(&mut Command::new("/nonexistent")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
