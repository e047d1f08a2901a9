//! Pods whose restored files are loaded behind the start.
#![allow(dead_code, reason = "each test program uses some of it")]

use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use stillframe_runtime::sandbox::Load;

use crate::pod::Pod;

/// Contents by name: no two files have a page in common.
pub fn contents(name: &str, size: usize) -> Vec<u8> {
    let mut seed =
        name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(seed ^ seed >> 29).to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

pub fn lazy_pod() -> Pod {
    pod_with(env!("CARGO_BIN_EXE_stillframe"), false)
}

pub fn pod_with(program: &str, eager: bool) -> Pod {
    let mut pod = Pod::new();
    pod.load = Load::Apart { program: program.into(), eager };
    pod
}

pub fn sleep() -> Command {
    let mut command = Command::new("sleep");
    command.arg("1000");
    command
}

/// Does it in a thread of its own.
pub fn begin<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (done, result) = mpsc::channel();
    thread::spawn(move || done.send(work()));
    result
}

/// What has come of it.
pub fn end<T>(result: &Receiver<T>) -> T {
    result.recv_timeout(Duration::from_secs(60)).expect("it goes on")
}
