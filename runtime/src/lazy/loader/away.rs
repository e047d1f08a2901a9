//! Being out of the container's cgroup while that is frozen (cgroup v2), and coming back.
//!
//! ```text
//! in -> asked to leave: out -> (what was being loaded is loaded) answered -> all who asked are gone, and it is thawed -> in
//! ```
//!
//! Answered only then, since whoever waits for a file that is being loaded keeps the freeze from completing. Who has asked stays
//! connected for as long as something may be frozen; one that dies is gone, too. Pages that are loaded meanwhile are
//! charged where the keeper is.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags};

use super::main_thread::Main;
use super::{Loader, Stage};
use crate::freezer::Cgroup;
use crate::lazy::control::{self, Reply};
use crate::lazy::files;

/// See the module.
#[derive(Default)]
pub(super) struct Away {
    /// Those who have asked, and the files that they still wait for; `None` once they were answered.
    asked: Vec<(UnixStream, Option<Vec<usize>>)>,
    /// `cgroup.events` of the container, once nobody is left but it is frozen still.
    thaw: Option<File>,
}

impl Away {
    pub(super) fn fds(&self) -> Vec<PollFd<'_>> {
        let asked = self.asked.iter().map(|(stream, _)| PollFd::new(stream.as_fd(), PollFlags::POLLIN));
        let thaw = self.thaw.iter().map(|events| PollFd::new(events.as_fd(), PollFlags::POLLPRI));
        asked.chain(thaw).collect()
    }

    pub(super) fn ask(&mut self, stream: UnixStream, loader: &Loader) {
        let state = loader.lock();
        let loading = |index: &usize| matches!(state.stages[*index], Stage::Loading);
        let loading = (0..state.stages.len()).filter(loading).collect();
        drop(state);
        self.thaw = None;
        self.asked.push((stream, Some(loading)));
        self.answer(loader);
    }

    /// Answers those who wait for nothing any more.
    pub(super) fn answer(&mut self, loader: &Loader) {
        let mut state = loader.lock();
        for (stream, awaits) in &mut self.asked {
            let Some(files) = awaits else { continue };
            files.retain(|index| matches!(state.stages[*index], Stage::Loading));
            if files.is_empty() {
                // Who has asked may be gone, which is found out below.
                let _ = control::send(stream, &Reply::Done);
                *awaits = None;
            }
        }
        state.awaited = self.asked.iter().any(|(_, awaits)| awaits.is_some());
    }
}

impl Main<'_> {
    /// Looks at those whose descriptors are ready, and comes back if nobody is left.
    pub(super) fn look_at_absence(&mut self, ready: &[bool]) {
        if !ready.contains(&true) {
            return;
        }
        let mut ready = ready.iter();
        // Nobody says anything more: what can be read is the end.
        self.away.asked.retain_mut(|(stream, _)| {
            ready.next() != Some(&true) || stream.read(&mut [0]).is_ok_and(|read| read > 0)
        });
        self.come_back();
    }

    /// Unless somebody has something frozen still.
    fn come_back(&mut self) {
        self.away.thaw = None;
        if !self.away.asked.is_empty() {
            return;
        }
        let Ok(Some(init)) = files::joined(&self.loader.directory) else { return };
        if let Some(Cgroup::V2(path)) = &init.cgroup {
            // Opened, and read, before it is asked: a change since then is told.
            let events = File::open(path.join("cgroup.events")).and_then(|mut events| {
                let mut text = String::new();
                events.read_to_string(&mut text).map(|_| (events, text))
            });
            match events {
                Ok((events, text)) if text.lines().any(|line| line == "frozen 1") => {
                    self.away.thaw = Some(events);
                    return;
                }
                Ok(_) => {}
                // It is gone.
                Err(_) => return,
            }
        }
        self.join_cgroup(&init);
    }
}
