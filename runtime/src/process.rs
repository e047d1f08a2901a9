//! Processes by pid and start time, so that a pid that came again isn't taken for the old process.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, Signal};

use crate::freezer::{Cgroup, FreezeError};
use crate::state::InitRecord;

/// Describes the running process `pid` for a record.
pub fn describe(pid: i32) -> Result<InitRecord, FreezeError> {
    let start_time = start_time(pid).map_err(|source| FreezeError::File {
        operation: "read",
        path: format!("/proc/{pid}/stat").into(),
        source,
    })?;
    Ok(InitRecord { pid, start_time, cgroup: Cgroup::of_process(pid)? })
}

/// The running process `pid` for a record, without its cgroup.
pub fn identify(pid: i32) -> io::Result<InitRecord> {
    Ok(InitRecord { pid, start_time: start_time(pid)?, cgroup: None })
}

/// Whether the recorded process still is; a zombie isn't.
pub fn is_alive(init: &InitRecord) -> bool {
    start_time(init.pid).is_ok_and(|start_time| start_time == init.start_time)
}

/// Kills the recorded process (SIGKILL); one that is gone is fine. A pidfd is opened before the start
/// time is compared, so no other process can be hit.
pub fn kill(init: &InitRecord) -> io::Result<()> {
    open(init)?.map_or(Ok(()), |pidfd| kill_open(&pidfd))
}

/// The same, and waits until it is gone, or a zombie.
pub fn kill_and_wait(init: &InitRecord) -> io::Result<()> {
    let Some(pidfd) = open(init)? else { return Ok(()) };
    kill_open(&pidfd)?;
    let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, None))?;
    Ok(())
}

fn kill_open(pidfd: &OwnedFd) -> io::Result<()> {
    match rustix::process::pidfd_send_signal(pidfd, Signal::KILL) {
        Err(rustix::io::Errno::SRCH) => Ok(()),
        other => Ok(other?),
    }
}

/// A pidfd of the recorded process, readable once that has ended; `None` if it is gone.
pub fn open(init: &InitRecord) -> io::Result<Option<OwnedFd>> {
    let pid = Pid::from_raw(init.pid).filter(|_| init.pid > 0);
    let pid = pid.ok_or(io::ErrorKind::InvalidData)?;
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        other => other?,
    };
    Ok(is_alive(init).then_some(pidfd))
}

/// Start time of a process that isn't a zombie, in clock ticks since boot.
fn start_time(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold spaces and parentheses; field 3 comes after the last one.
    let after_name = stat.rsplit_once(") ").map(|(_, rest)| rest).unwrap_or_default();
    let mut fields = after_name.split(' ');
    if matches!(fields.next(), Some("Z" | "X")) {
        return Err(io::ErrorKind::NotFound.into());
    }
    let start_time = fields.nth(18).and_then(|field| field.parse().ok());
    start_time.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_alive_until_it_is_a_zombie() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let init = describe(child.id().cast_signed()).unwrap();
        assert!(is_alive(&init));
        assert!(!is_alive(&InitRecord { start_time: init.start_time + 1, ..init.clone() }));
        kill(&InitRecord { start_time: init.start_time + 1, ..init.clone() }).unwrap();
        assert!(is_alive(&init), "another process of that pid is not hit");
        kill(&init).unwrap();
        let exited = nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT;
        nix::sys::wait::waitid(nix::sys::wait::Id::Pid(nix::unistd::Pid::from_raw(init.pid)), exited)
            .unwrap();
        assert!(!is_alive(&init), "a zombie");
        child.wait().unwrap();
        assert!(!is_alive(&init), "gone");
    }
}
