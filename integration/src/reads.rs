//! Holding what others read of a file: fanotify's FAN_ACCESS_PERM. What is held is an event that can be awaited.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::fanotify::{
    EventFFlags, Fanotify, FanotifyEvent, FanotifyResponse, InitFlags, MarkFlags, MaskFlags, Response,
};

#[derive(Default)]
struct State {
    held: Vec<FanotifyEvent>,
    /// How many reads may pass still.
    pass: usize,
}

/// Reads of a file by other processes; they go on when this is dropped. Panics where fanotify can't be had.
pub struct Reads {
    shared: Arc<(Fanotify, Mutex<State>, Condvar)>,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Reads {
    /// Holds them whenever `hold` says so of the process that reads. Whoever reads has to open the file after this.
    pub fn of(file: &Path, hold: impl Fn(i32) -> bool + Send + 'static) -> Self {
        let flags = InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK;
        let group = Fanotify::init(flags, EventFFlags::O_RDONLY | EventFFlags::O_CLOEXEC).unwrap();
        group
            .mark(MarkFlags::FAN_MARK_ADD, MaskFlags::FAN_ACCESS_PERM, nix::fcntl::AT_FDCWD, Some(file))
            .unwrap();
        let shared = Arc::new((group, Mutex::new(State::default()), Condvar::new()));
        let (wake, woken) = UnixStream::pair().unwrap();
        let attending = shared.clone();
        let thread = thread::spawn(move || {
            let (group, state, changed) = &*attending;
            loop {
                let mut fds = [
                    PollFd::new(group.as_fd(), PollFlags::POLLIN),
                    PollFd::new(woken.as_fd(), PollFlags::POLLIN),
                ];
                poll(&mut fds, PollTimeout::NONE).unwrap();
                if fds[1].any().unwrap() {
                    return;
                }
                for event in group.read_events().unwrap_or_default() {
                    let mine = event.pid() == std::process::id().cast_signed();
                    let hold = !mine && hold(event.pid());
                    let mut state = state.lock().unwrap();
                    if hold && state.pass == 0 {
                        state.held.push(event);
                        changed.notify_all();
                        continue;
                    }
                    state.pass = state.pass.saturating_sub(hold.into());
                    allow(group, &event);
                }
            }
        });
        Self { shared, wake, thread: Some(thread) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.1.lock().unwrap()
    }

    /// Waits until somebody is held.
    pub fn await_held(&self) {
        let some =
            self.shared.2.wait_timeout_while(self.lock(), Duration::from_secs(60), |s| s.held.is_empty());
        assert!(!some.unwrap().0.held.is_empty(), "nobody reads");
    }

    /// Lets `count` reads pass, those first that are held.
    pub fn pass(&self, count: usize) {
        let mut state = self.lock();
        state.pass = count;
        while state.pass > 0 && !state.held.is_empty() {
            allow(&self.shared.0, &state.held.remove(0));
            state.pass -= 1;
        }
    }
}

impl Drop for Reads {
    fn drop(&mut self) {
        // Without the group everybody goes on.
        let _ = self.wake.write(&[0]);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn allow(group: &Fanotify, event: &FanotifyEvent) {
    let Some(fd) = event.fd() else { return };
    // It fails only if the reader is gone.
    let _ = group.write_response(FanotifyResponse::new(fd, Response::FAN_ALLOW));
}
