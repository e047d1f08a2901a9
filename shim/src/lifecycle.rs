//! The states of one process (a container's init or an exec'd one) and what may be asked of it in each.
//!
//! ```text
//!               start              pause            paused
//!   Created ------------> Running -------> Pausing --------> Paused
//!      |                   ^  |              |                 |
//!      |                   |  |        (pause failed)          |
//!      |                   +--|--------------+                 |
//!      |                   +--|------------- resume -----------+
//!      |                      v                                |
//!      +------ exit ------> Stopped <--------- exit -----------+
//!      |                      | delete
//!      |        delete        v
//!      +------------------> Deleted
//! ```
//!
//! Only an init is paused. The table and the messages are those of containerd-shim-runc-v2
//! (cmd/containerd-shim-runc-v2/process/{init,exec}_state.go), and so are the codes: UNKNOWN, and NOT_FOUND for a deleted
//! process.
//!
//! Pure: no locks, no I/O.

use std::fmt;

use containerd_shim::api::Status;

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// `runc create` has made it (an exec: it was announced), its program doesn't run yet.
    Created,
    /// Its program runs.
    Running,
    /// `runc pause` is at work.
    Pausing,
    /// Its cgroup is frozen.
    Paused,
    /// It has died; its exit status is known.
    Stopped,
    /// It is gone, only a caller that found it just before can still see it.
    Deleted,
}

/// What is asked of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Run its program.
    Start,
    /// Freeze the container.
    Pause,
    /// Thaw the container.
    Resume,
    /// Add a process to the container.
    Exec,
    /// Save the container's filesystems.
    Checkpoint,
    /// Change the container's limits.
    Update,
    /// Forget it.
    Delete,
    /// Signal it.
    Kill,
    /// Tell its terminal's size.
    Resize,
}

/// An operation that the process's state doesn't allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What was asked.
    pub operation: Operation,
    /// The state that forbids it.
    pub state: State,
}

impl State {
    /// Whether `operation` may begin in this state.
    pub fn admit(self, operation: Operation) -> Result<(), Refused> {
        use Operation::*;
        let allowed = match self {
            State::Created => !matches!(operation, Pause | Resume | Checkpoint),
            State::Running => !matches!(operation, Start | Resume | Delete),
            State::Pausing | State::Paused => !matches!(operation, Start | Pause | Exec | Delete),
            State::Stopped => matches!(operation, Delete | Kill),
            State::Deleted => false,
        };
        if allowed { Ok(()) } else { Err(Refused { operation, state: self }) }
    }

    /// containerd's name of the state.
    pub fn status(self) -> Status {
        match self {
            State::Created => Status::CREATED,
            State::Running => Status::RUNNING,
            State::Pausing => Status::PAUSING,
            State::Paused => Status::PAUSED,
            State::Stopped | State::Deleted => Status::STOPPED,
        }
    }
}

impl Refused {
    /// Whether the caller should be told that there is no such process rather than that it's in the wrong state.
    pub fn is_gone(&self) -> bool {
        self.state == State::Deleted
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Operation::*;
        let verb = match self.operation {
            Start => "start",
            Pause => "pause",
            Resume => "resume",
            Exec => return write!(f, "cannot exec in a {} state", self.state.name()),
            Checkpoint => "checkpoint",
            Update => "update",
            Delete => "delete",
            Kill => "kill",
            Resize => "resize",
        };
        match (self.state, self.operation) {
            (State::Created, Checkpoint) => write!(f, "cannot checkpoint a task in created state"),
            (State::Created, _) => write!(f, "cannot {verb} task in created state"),
            (State::Pausing | State::Paused, Pause)
            | (State::Stopped, Pause | Resume | Checkpoint | Update | Resize) => {
                write!(f, "cannot {verb} a {} container", self.state.name())
            }
            (state, _) => write!(f, "cannot {verb} a {} process", state.name()),
        }
    }
}

impl std::error::Error for Refused {}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::Created => "created",
            State::Running => "running",
            State::Pausing => "pausing",
            State::Paused => "paused",
            State::Stopped => "stopped",
            State::Deleted => "deleted",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Operation::*;
    use super::State::*;
    use super::*;

    const OPERATIONS: [Operation; 9] = [Start, Pause, Resume, Exec, Checkpoint, Update, Delete, Kill, Resize];

    #[test]
    fn every_state_admits_what_containerd_shim_runc_v2_admits() {
        let table: [(State, &[Operation]); 6] = [
            (Created, &[Start, Exec, Update, Delete, Kill, Resize]),
            (Running, &[Pause, Exec, Checkpoint, Update, Kill, Resize]),
            (Pausing, &[Resume, Checkpoint, Update, Kill, Resize]),
            (Paused, &[Resume, Checkpoint, Update, Kill, Resize]),
            (Stopped, &[Delete, Kill]),
            (Deleted, &[]),
        ];
        for (state, admitted) in table {
            for operation in OPERATIONS {
                assert_eq!(
                    state.admit(operation).is_ok(),
                    admitted.contains(&operation),
                    "{operation:?} in {state:?}"
                );
            }
        }
    }

    #[test]
    fn refusals_read_as_those_of_containerd_shim_runc_v2() {
        for (state, operation, message) in [
            (Created, Pause, "cannot pause task in created state"),
            (Created, Checkpoint, "cannot checkpoint a task in created state"),
            (Running, Start, "cannot start a running process"),
            (Running, Delete, "cannot delete a running process"),
            (Running, Resume, "cannot resume a running process"),
            (Paused, Pause, "cannot pause a paused container"),
            (Paused, Exec, "cannot exec in a paused state"),
            (Paused, Delete, "cannot delete a paused process"),
            (Stopped, Checkpoint, "cannot checkpoint a stopped container"),
            (Stopped, Exec, "cannot exec in a stopped state"),
            (Stopped, Start, "cannot start a stopped process"),
            (Deleted, Kill, "cannot kill a deleted process"),
        ] {
            assert_eq!(state.admit(operation).unwrap_err().to_string(), message);
        }
    }
}
