//! One process of a container: its init, or one that was exec'd.
//!
//! Two locks, and an exit that is waited for without either:
//! - `turn` orders what is done to the process with the events about it: start and exit hold it until their event is queued,
//!   so that TaskStart precedes TaskExit however fast the program dies. It is held across runc.
//! - the record's lock guards state, pid and exit status, and is never held across an await.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use containerd_shim::api::{StateResponse, WaitResponse};
use containerd_shim::io::Stdio;
use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

use crate::lifecycle::{Operation, Refused, State};
use crate::reaper::Exit;
use crate::stdio::ProcessIo;

/// See the module's documentation.
#[derive(Debug)]
pub struct Process {
    /// The exec's id; empty for the init.
    pub exec_id: String,
    /// What containerd asked for.
    pub stdio: Stdio,
    /// What an exec runs; `None` for the init, which is in config.json.
    pub spec: Option<oci_spec::runtime::Process>,
    /// See the module's documentation.
    pub turn: tokio::sync::Mutex<()>,
    record: Mutex<Record>,
    exit: watch::Sender<Option<Exit>>,
}

#[derive(Debug)]
struct Record {
    state: State,
    pid: i32,
    io: Option<Arc<ProcessIo>>,
    /// CloseIO came.
    input_closed: bool,
}

impl Process {
    /// A process in state Created that has no pid yet.
    pub fn new(exec_id: String, stdio: Stdio, spec: Option<oci_spec::runtime::Process>) -> Self {
        Self {
            exec_id,
            stdio,
            spec,
            turn: tokio::sync::Mutex::default(),
            record: Mutex::new(Record { state: State::Created, pid: 0, io: None, input_closed: false }),
            exit: watch::Sender::new(None),
        }
    }

    /// Its pid, 0 before it has one.
    pub fn pid(&self) -> i32 {
        self.record().pid
    }

    /// Its state.
    pub fn state(&self) -> State {
        self.record().state
    }

    /// Its stdio, once runc was called for it.
    pub fn io(&self) -> Option<Arc<ProcessIo>> {
        self.record().io.clone()
    }

    /// Whether `operation` may begin now.
    pub fn admit(&self, operation: Operation) -> Result<(), Refused> {
        self.record().state.admit(operation)
    }

    /// runc has made it: it has a pid and stdio.
    pub fn born(&self, pid: i32, io: Arc<ProcessIo>) {
        let mut record = self.record();
        record.pid = pid;
        if record.input_closed {
            io.close_input();
        }
        record.io = Some(io);
    }

    /// It gets no more input; one that isn't born yet will find its stdin at the end.
    pub fn close_input(&self) {
        let mut record = self.record();
        record.input_closed = true;
        if let Some(io) = &record.io {
            io.close_input();
        }
    }

    /// Moves from one state to another, if it still is in the first: it may have died meanwhile.
    pub fn step(&self, from: State, to: State) -> bool {
        let mut record = self.record();
        let still = record.state == from;
        if still {
            record.state = to;
        }
        still
    }

    /// As [`Process::step`], where the first state is any that admits `operation`.
    pub fn begin(&self, operation: Operation, to: State) -> Result<(), Refused> {
        let mut record = self.record();
        record.state.admit(operation)?;
        record.state = to;
        Ok(())
    }

    /// It is dead. Wakes everybody in [`Process::wait`].
    pub fn finish(&self, exit: Exit) {
        self.record().state = State::Stopped;
        self.exit.send_replace(Some(exit));
    }

    /// It is forgotten.
    pub fn delete(&self) {
        self.record().state = State::Deleted;
    }

    /// How it died, if it has.
    pub fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its death.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        let seen = exit.wait_for(Option::is_some).await.expect("the sender lives in self");
        seen.expect("it was waited for")
    }

    /// containerd's view of the process.
    pub fn describe(&self, container_id: &str, bundle: &str) -> StateResponse {
        let (state, pid) = {
            let record = self.record();
            (record.state, record.pid)
        };
        let mut response = StateResponse {
            id: if self.exec_id.is_empty() { container_id.into() } else { self.exec_id.clone() },
            exec_id: self.exec_id.clone(),
            bundle: bundle.into(),
            pid: pid.unsigned_abs(),
            status: state.status().into(),
            stdin: self.stdio.stdin.clone(),
            stdout: self.stdio.stdout.clone(),
            stderr: self.stdio.stderr.clone(),
            terminal: self.stdio.terminal,
            ..Default::default()
        };
        if let Some(exit) = self.exited() {
            response.exit_status = exit.code();
            response.exited_at = Some(timestamp(exit.at)).into();
        }
        response
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().expect("a record is never left half-changed")
    }
}

/// An exit as the reply to Wait.
pub fn wait_response(exit: &Exit) -> WaitResponse {
    WaitResponse {
        exit_status: exit.code(),
        exited_at: Some(timestamp(exit.at)).into(),
        ..Default::default()
    }
}

/// A time as protobuf has it.
pub fn timestamp(at: SystemTime) -> Timestamp {
    // A clock before 1970 gives the epoch's first second: zero would mean "not exited".
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(std::time::Duration::from_secs(1));
    Timestamp { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() as i32, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> Process {
        Process::new(String::new(), Stdio::default(), None)
    }

    #[tokio::test]
    async fn waiting_before_and_after_the_exit_tells_the_same() {
        let process = Arc::new(process());
        let waiter = tokio::spawn({
            let process = process.clone();
            async move { process.wait().await }
        });
        tokio::task::yield_now().await;
        let exit = Exit::now(3);
        process.finish(exit);
        assert_eq!(waiter.await.unwrap(), exit);
        process.delete();
        assert_eq!(process.wait().await, exit);
        assert_ne!(wait_response(&exit).exited_at.seconds, 0);
    }

    #[test]
    fn a_pause_that_comes_back_to_a_dead_process_changes_nothing() {
        let process = process();
        process.begin(Operation::Start, State::Running).unwrap();
        process.begin(Operation::Pause, State::Pausing).unwrap();
        process.finish(Exit::now(0));
        assert!(!process.step(State::Pausing, State::Paused));
        assert_eq!(process.state(), State::Stopped);
        assert!(process.begin(Operation::Start, State::Running).is_err());
    }

    #[test]
    fn a_live_process_has_no_exit_time() {
        let process = process();
        assert!(process.describe("c", "/b").exited_at.is_none());
        process.finish(Exit::now(9));
        let response = process.describe("c", "/b");
        assert_eq!((response.id.as_str(), response.exit_status), ("c", 9));
        assert!(response.exited_at.seconds > 0);
    }
}
