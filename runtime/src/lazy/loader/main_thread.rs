//! The main thread of a loader: who waits for a file, what is asked, and whether container and keeper still are.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use stillframe_pgalloc::AsyncPagesFileLoad;
use stillframe_tmpfs::lazy::gate;

use super::away::Away;
use super::{Keeper, Loader, Stage};
use crate::cli::chain;
use crate::lazy::channel::{self, Message};
use crate::lazy::control::{self, Reply, Request};
use crate::lazy::{LoadPhase, files, memory};
use crate::process;
use crate::state::InitRecord;

/// The main thread, which alone gets the leases' signals.
pub(super) struct Main<'a> {
    pub(super) loader: &'a Arc<Loader>,
    pub(super) large: &'a AsyncPagesFileLoad,
    pub(super) by_descriptor: HashMap<RawFd, usize>,
    pub(super) signals: File,
    pub(super) listener: UnixListener,
    pub(super) woken: UnixStream,
    /// Of `load.progress`.
    pub(super) lock: OwnedFd,
    /// The keeper's, while that lives.
    pub(super) channel: Option<UnixStream>,
    /// The container's init process, in whose cgroup this process is.
    pub(super) init: Option<OwnedFd>,
    pub(super) away: Away,
}

impl Main<'_> {
    /// Returns when nothing is left to do.
    pub(super) fn run(&mut self) -> io::Result<()> {
        // Who came before the signals did.
        self.look_at_leases()?;
        if let Ok(Some(init)) = files::joined(&self.loader.directory) {
            self.join(&init);
        }
        loop {
            let mut fds = vec![
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.woken.as_fd(), PollFlags::POLLIN),
            ];
            // Its answers are for who has sent a message; here it only matters whether it lives.
            let keeper =
                self.channel.as_ref().map(|channel| PollFd::new(channel.as_fd(), PollFlags::empty()));
            let keeper_at = keeper.map(|keeper| {
                fds.push(keeper);
                fds.len() - 1
            });
            let init_at = self.init.as_ref().map(|init| {
                fds.push(PollFd::new(init.as_fd(), PollFlags::POLLIN));
                fds.len() - 1
            });
            let away_at = fds.len();
            fds.extend(self.away.fds());
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other?,
            };
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
            if ready[0] {
                self.wanted()?;
            }
            if ready[1] && self.serve()? {
                return Ok(());
            }
            if ready[2] {
                let _ = self.woken.read(&mut [0; 16])?;
                self.away.answer(self.loader);
                let state = self.loader.lock();
                if state.header.phase() == Some(LoadPhase::Done) {
                    if state.header.failed_files == 0 {
                        return Ok(());
                    }
                    // Those who open what failed are still to be told; but nobody has to wait for more.
                    rustix::fs::flock(&self.lock, rustix::fs::FlockOperation::Unlock)?;
                }
            }
            self.look_at_absence(&ready[away_at..]);
            if keeper_at.is_some_and(|at| ready[at]) {
                self.channel = None;
                self.loader.replace_keeper();
            }
            if init_at.is_some_and(|at| ready[at]) {
                // Its cgroup couldn't be removed with this process in it.
                self.init = None;
                self.leave();
            }
        }
    }

    /// Loads the files whose leases somebody wants broken.
    fn wanted(&mut self) -> io::Result<()> {
        for descriptor in gate::broken(&self.signals)? {
            match descriptor {
                Some(descriptor) => {
                    if let Some(index) = self.by_descriptor.get(&descriptor) {
                        self.load_next(*index);
                    }
                }
                None => self.look_at_leases()?,
            }
        }
        Ok(())
    }

    fn look_at_leases(&mut self) -> io::Result<()> {
        let mut wanted = Vec::new();
        for (index, stage) in self.loader.lock().stages.iter().enumerate() {
            if let Stage::Pending(file) = stage
                && !gate::is_unbroken(file)?
            {
                wanted.push(index);
            }
        }
        wanted.into_iter().for_each(|index| self.load_next(index));
        Ok(())
    }

    fn load_next(&self, index: usize) {
        // Its descriptor's number may stand for another one by now: then one is loaded early.
        let mut state = self.loader.lock();
        if state.schedule.take(index) {
            drop(state);
            self.loader.load(index, self.large, true);
        } else if matches!(state.stages[index], Stage::Loading) {
            self.loader.want(index, &mut state);
        }
    }

    /// Answers a request; true if this process is to end.
    fn serve(&mut self) -> io::Result<bool> {
        let (mut stream, _) = self.listener.accept()?;
        match control::receive(&stream) {
            Ok(Some(Request::Join { init, all })) => {
                // Another container that shares the filesystem waits only.
                if self.init.is_none() {
                    if let Err(error) = files::put_joined(&self.loader.directory, &init) {
                        let _ = control::send(&mut stream, &Reply::Failed { error: chain(&error) });
                        return Ok(false);
                    }
                    self.join(&init);
                }
                let mut state = self.loader.lock();
                state.asked.push((stream, all));
                self.loader.reply(&mut state);
                self.loader.prioritise(&mut state);
                Ok(false)
            }
            Ok(Some(Request::Leave)) => {
                self.init = None;
                self.leave();
                self.look_at_leases()?;
                self.away.ask(stream, self.loader);
                Ok(false)
            }
            Ok(Some(Request::Stop)) => {
                self.stop();
                let _ = control::send(&mut stream, &Reply::Done);
                Ok(true)
            }
            // Nobody else has access to the socket.
            Ok(None) | Err(_) => Ok(false),
        }
    }

    fn join(&mut self, init: &InitRecord) {
        self.join_cgroup(init);
        self.loader.lock().joined = true;
        self.loader.changed.notify_all();
    }

    pub(super) fn join_cgroup(&mut self, init: &InitRecord) {
        // Opened before the cgroup is joined: what has ended since is noticed.
        if let Ok(Some(pidfd)) = process::open(init) {
            self.init = Some(pidfd);
            let joined = memory::procs_of(init.pid)
                .and_then(|procs| procs.map_or(Ok(()), |procs| memory::join(&procs, std::process::id())));
            if let Err(error) = joined {
                let what = format!("the memory isn't charged to the container: join its cgroup: {error}");
                files::put_error(&self.loader.directory, 0, &what);
            }
        }
    }

    /// Goes back to the cgroup that the keeper is in.
    fn leave(&self) {
        let keeper = files::processes(&self.loader.directory).ok().flatten().map(|record| record.keeper.pid);
        let home = keeper.and_then(|pid| memory::procs_of(pid).ok().flatten());
        if let Some(home) = home {
            let _ = memory::join(&home, std::process::id());
        }
    }

    /// Lets nobody in any more; returns when all who wait have been told.
    fn stop(&self) {
        let mut state = self.loader.lock();
        state.stopping = true;
        self.loader.changed.notify_all();
        // What is being loaded holds its lease, and so whoever reads an event of it.
        while state.stages.iter().any(|stage| matches!(stage, Stage::Loading)) {
            state = self.loader.wait(state);
        }
        for stage in &state.stages {
            if let Stage::Pending(file) = stage {
                let _ = gate::release(file);
            }
        }
        drop(state);
        match &*self.loader.keeper.lock().unwrap_or_else(PoisonError::into_inner) {
            Keeper::Alive(channel, _) => {
                // If it is dead, they wait until this process ends, as the container has.
                let _ = channel::call(channel, Message::Stop);
            }
            Keeper::Dead(doors) => doors.iter().for_each(|doors| doors.stop()),
        }
    }
}
