//! The processes that are exec'd into a container.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use containerd_shim::api::{DeleteResponse, ExecProcessRequest};
use containerd_shim::io::Stdio;
use containerd_shim::protos::events::task::{TaskExecAdded, TaskExecStarted};
use containerd_shim::util::read_pid_from_file;
use runc::options::ExecOpts;
use tokio::sync::oneshot;

use crate::container::{Container, deleted};
use crate::error::TaskError;
use crate::lifecycle::{Operation, State};
use crate::process::Process;
use crate::reaper::Exit;
use crate::stdio::{Owner, ProcessIo};

/// A container's exec'd processes by id.
///
/// Once the init is dead it is closed: no exec starts any more. An exec that was starting has the process's turn, so whoever
/// closes first and then takes each turn sees them all.
#[derive(Debug, Default)]
pub struct Execs(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    processes: HashMap<String, Arc<Process>>,
    closed: bool,
}

impl Execs {
    /// The process with the id.
    pub fn get(&self, exec_id: &str) -> Result<Arc<Process>, TaskError> {
        let process = self.table().processes.get(exec_id).cloned();
        process.ok_or_else(|| TaskError::NoProcess { exec_id: exec_id.into() })
    }

    /// The id of the exec whose process has `pid`.
    pub fn by_pid(&self, pid: u32) -> Option<String> {
        let table = self.table();
        let found = table.processes.values().find(|process| process.pid().unsigned_abs() == pid)?;
        Some(found.exec_id.clone())
    }

    /// Lets no exec start any more and waits for the exits of those that did.
    pub async fn wind_up(&self) {
        let processes: Vec<_> = {
            let mut table = self.table();
            table.closed = true;
            table.processes.values().cloned().collect()
        };
        for process in processes {
            // A start that is under way ends first.
            drop(process.turn.lock().await);
            if process.state() == State::Running {
                process.wait().await;
            }
        }
    }

    fn add(&self, process: Process) -> Result<(), TaskError> {
        let mut table = self.table();
        let exec_id = process.exec_id.clone();
        if table.processes.contains_key(&exec_id) {
            return Err(TaskError::ExecExists { exec_id });
        }
        table.processes.insert(exec_id, Arc::new(process));
        Ok(())
    }

    fn remove(&self, exec_id: &str) {
        self.table().processes.remove(exec_id);
    }

    fn is_closed(&self) -> bool {
        self.table().closed
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().expect("the table is never left half-changed")
    }
}

impl Container {
    /// Announces a process.
    pub fn add_exec(&self, request: &ExecProcessRequest) -> Result<(), TaskError> {
        self.init.admit(Operation::Exec)?;
        let mut spec: oci_spec::runtime::Process = serde_json::from_slice(&request.spec.value)
            .map_err(|source| TaskError::Json { what: "process", source })?;
        spec.set_terminal(Some(request.terminal));
        let stdio = Stdio::new(&request.stdin, &request.stdout, &request.stderr, request.terminal);
        self.execs.add(Process::new(request.exec_id.clone(), stdio, Some(spec)))?;
        self.shim.publisher.publish(TaskExecAdded {
            container_id: self.id.clone(),
            exec_id: request.exec_id.clone(),
            ..Default::default()
        });
        Ok(())
    }

    /// Runs an announced process. Returns its pid. Where that fails, the process counts as dead.
    pub async fn start_exec(self: &Arc<Self>, exec_id: &str) -> Result<i32, TaskError> {
        let process = self.execs.get(exec_id)?;
        let _turn = process.turn.lock().await;
        process.admit(Operation::Start)?;
        self.init.admit(Operation::Exec)?;
        if self.execs.is_closed() {
            return Err(TaskError::InitGone { id: self.id.clone() });
        }
        match self.run_exec(&process).await {
            Ok(exit) => {
                process.begin(Operation::Start, State::Running)?;
                let pid = process.pid();
                self.shim.publisher.publish(TaskExecStarted {
                    container_id: self.id.clone(),
                    exec_id: exec_id.into(),
                    pid: pid.unsigned_abs(),
                    ..Default::default()
                });
                tokio::spawn(self.clone().attend_exec(process.clone(), exit));
                Ok(pid)
            }
            Err(error) => {
                // Whoever waits for it has to hear of it; no event, it never started.
                process.finish(Exit::now(255));
                Err(error)
            }
        }
    }

    async fn run_exec(&self, process: &Process) -> Result<oneshot::Receiver<Exit>, TaskError> {
        let spec = process.spec.as_ref().expect("an exec has a spec");
        let owner = Owner {
            id: &process.exec_id,
            namespace: &self.shim.namespace,
            uid: self.options.io_uid,
            gid: self.options.io_gid,
        };
        let io = Arc::new(ProcessIo::open(&process.stdio, &owner, &self.shim.reaper).await?);
        let pid_file = self.pid_file(&process.exec_id);
        let mut options = ExecOpts::new().pid_file(&pid_file).detach(true);
        options.console_socket = io.console_socket();
        options.io = io.driver();
        let birth = self.shim.reaper.birth();
        let executed = self.runc.exec(&self.id, spec, &options).await;
        drop(options);
        if let Err(error) = executed {
            io.abort().await;
            return Err(error.into());
        }
        let pid = match read_pid_from_file(&pid_file).await {
            Ok(pid) => pid,
            Err(source) => {
                io.abort().await;
                return Err(TaskError::Shim { what: "reading the exec's pid", source });
            }
        };
        let exit = birth.claim(pid);
        process.born(pid, io.clone());
        if let Err(error) = io.attach().await {
            drop(self.shim.reaper.kill(pid, libc::SIGKILL));
            io.abort().await;
            return Err(error.into());
        }
        Ok(exit)
    }

    async fn attend_exec(self: Arc<Self>, process: Arc<Process>, exit: oneshot::Receiver<Exit>) {
        let Ok(exit) = exit.await else { return };
        let _turn = process.turn.lock().await;
        self.tell_exit(&process, &exit);
        process.finish(exit);
    }

    pub(crate) fn kill_exec(&self, process: &Process, signal: u32) -> Result<(), TaskError> {
        match process.state() {
            State::Created => return Err(TaskError::NotStarted),
            State::Stopped => return Err(TaskError::Finished),
            _ => {}
        }
        match self.shim.reaper.kill(process.pid(), signal as i32) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(TaskError::Finished),
            result => result.map_err(|source| TaskError::Io { what: "signalling the process", source }),
        }
    }

    /// Forgets an exec'd process that is dead or never started.
    pub async fn delete_exec(&self, exec_id: &str) -> Result<DeleteResponse, TaskError> {
        let process = self.execs.get(exec_id)?;
        let _turn = process.turn.lock().await;
        process.admit(Operation::Delete)?;
        if let Some(io) = process.io() {
            io.shutdown().await;
        }
        // Missing where it never started.
        drop(tokio::fs::remove_file(self.pid_file(exec_id)).await);
        if process.exited().is_none() {
            process.finish(Exit::now(0));
        }
        process.delete();
        self.execs.remove(exec_id);
        Ok(deleted(&process))
    }

    fn pid_file(&self, exec_id: &str) -> PathBuf {
        self.bundle.join(format!("{exec_id}.pid"))
    }
}
