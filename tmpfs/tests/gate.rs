//! What a gate holds back, and what happens when it is opened: on the kernel's tmpfs.

#[path = "support/kernel.rs"]
mod kernel;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use kernel::denial;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use stillframe_tmpfs::lazy::gate::{self, Answer, Gate};
use tempfile::TempDir;

struct Held {
    path: PathBuf,
    gate: Gate,
    watch: File,
    file: Option<File>,
}

impl Held {
    fn new(dir: &TempDir) -> Self {
        let path = dir.path().join("file");
        let watch = Gate::watch().unwrap();
        let gate = Gate::new().unwrap();
        let file = File::options().read(true).write(true).create_new(true).mode(0o755).open(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        gate.hold(&file).unwrap();
        Self { path, gate, watch, file: Some(file) }
    }

    /// Waits until somebody waits for the file.
    fn await_waiting(&self) {
        let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&self.watch), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(10_000u16)).unwrap(), 1, "nobody is held back");
        let file = self.file.as_ref().unwrap();
        assert_eq!(gate::broken(&self.watch).unwrap(), [Some(file.as_raw_fd())]);
        assert!(!gate::is_unbroken(file).unwrap());
    }

    /// Opens the gate as a loader does.
    fn open_up(&mut self, contents: &[u8]) {
        use std::os::unix::fs::FileExt;
        let file = self.file.take().unwrap();
        file.write_all_at(contents, 0).unwrap();
        gate::release(&file).unwrap();
        drop(file);
        let path = File::options().read(true).custom_flags(libc::O_PATH).open(&self.path).unwrap();
        self.gate.forget(&path).unwrap();
    }
}

/// Does it on a thread of its own.
fn begin<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (done, result) = mpsc::channel();
    thread::spawn(move || done.send(work()));
    result
}

fn wait<T>(result: &Receiver<T>) -> T {
    result.recv_timeout(Duration::from_secs(10)).expect("it goes on")
}

fn assert_waits<T>(result: &Receiver<T>) {
    assert!(matches!(result.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout)), "it waits");
}

fn directory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// Whoever does `work` with the file waits until it is loaded; `event` says whether he is let in by an answer.
fn check<T: Send + 'static>(event: bool, work: impl FnOnce(&Path) -> T + Send + 'static) -> T {
    check_in(&directory(), event, work)
}

fn check_in<T: Send + 'static>(
    dir: &TempDir,
    event: bool,
    work: impl FnOnce(&Path) -> T + Send + 'static,
) -> T {
    let mut held = Held::new(dir);
    let path = held.path.clone();
    thread::scope(|scope| {
        let gate = Gate::from_descriptor(std::os::fd::AsFd::as_fd(&held.gate).try_clone_to_owned().unwrap());
        let inode = held.path.metadata().unwrap().ino();
        // As a loader does: reading an event returns when the lease is released, but the answer comes last.
        let (opened_up, is_open) = mpsc::channel();
        let reader = scope.spawn(move || {
            if event {
                let waiting = gate.next().unwrap();
                assert_eq!(waiting.inode, inode);
                is_open.recv().unwrap();
                waiting.answer(Answer::Allow).unwrap();
            }
        });
        let result = begin(move || work(&path));
        held.await_waiting();
        assert_waits(&result);
        held.open_up(b"#!/bin/sh\nexit 7\n");
        // Nobody is there to be told where no event is expected.
        let _ = opened_up.send(());
        reader.join().unwrap();
        wait(&result)
    })
}

#[test]
fn whoever_opens_or_truncates_a_held_file_waits_for_its_contents() {
    let text = check(true, |path| fs::read(path).unwrap());
    assert!(text.starts_with(b"#!/bin/sh"), "{:?}", &text[..20]);
    let written = check(true, |path| {
        let file = File::options().append(true).open(path).unwrap();
        file.metadata().unwrap().len()
    });
    assert_eq!(written, 1 << 20);
    let truncated = check(true, |path| File::create(path).unwrap().metadata().unwrap().len());
    assert_eq!(truncated, 0, "O_TRUNC");
    let dir = directory();
    check_in(&dir, false, |path| nix::unistd::truncate(path, 3).unwrap());
    assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"#!/");
}

#[test]
fn a_program_that_was_held_can_be_executed() {
    let dir = directory();
    // Forked before there is a descriptor that it would inherit.
    let mut shell = Command::new("sh")
        .args(["-c", "read go && exec \"$0\""])
        .arg(dir.path().join("file"))
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let status = check_in(&dir, true, move |_| {
        writeln!(shell.stdin.take().unwrap(), "go").unwrap();
        shell.wait().unwrap()
    });
    assert_eq!(status.code(), Some(7));
}

#[test]
fn an_answer_can_be_an_input_output_error() {
    let dir = directory();
    let held = Held::new(&dir);
    let path = held.path.clone();
    thread::scope(|scope| {
        let reader = scope.spawn(|| held.gate.next().unwrap().answer(Answer::IoError).unwrap());
        let opened = begin(move || File::open(path).map(drop).map_err(|error| error.raw_os_error()));
        held.await_waiting();
        gate::release(held.file.as_ref().unwrap()).unwrap();
        reader.join().unwrap();
        assert_eq!(wait(&opened), Err(Some(denial())));
    });
}

#[test]
fn only_what_opens_is_held() {
    let dir = directory();
    let held = Held::new(&dir);
    let other = held.path.with_file_name("other");
    let done = begin({
        let path = held.path.clone();
        move || -> io::Result<u64> {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            fs::hard_link(&path, path.with_file_name("link"))?;
            fs::rename(&path, &other)?;
            let size = other.metadata()?.len();
            fs::remove_file(&other)?;
            Ok(size)
        }
    });
    assert_eq!(wait(&done).unwrap(), 1 << 20);
    assert!(gate::is_unbroken(held.file.as_ref().unwrap()).unwrap());
}
