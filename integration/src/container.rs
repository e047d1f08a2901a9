//! A container, run through `ctr`.

use std::cell::Cell;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::ctr::{Background, CtrError, DEADLINE, Said};
use crate::listing::Listing;
use crate::{Containerd, STILLFRAME, image};

/// A container about to be run.
#[derive(Debug, Clone)]
pub struct ContainerSpec<'a> {
    containerd: &'a Containerd,
    id: String,
    runtime: String,
    options: Vec<String>,
    arguments: Vec<String>,
}

impl<'a> ContainerSpec<'a> {
    pub(crate) fn new(containerd: &'a Containerd, name: &str) -> Self {
        Self {
            containerd,
            id: containerd.id(name),
            runtime: STILLFRAME.to_owned(),
            options: Vec::new(),
            arguments: vec!["probe".to_owned(), "idle".to_owned()],
        }
    }

    /// Another runtime than Stillframe.
    pub fn runtime(mut self, runtime: &str) -> Self {
        self.runtime = runtime.to_owned();
        self
    }

    /// An option of `ctr run`.
    pub fn option(mut self, option: &str) -> Self {
        self.options.push(option.to_owned());
        self
    }

    /// One more tmpfs; options separated by colons, as `ctr` wants them.
    pub fn tmpfs(self, path: &str, options: &str) -> Self {
        let options = if options.is_empty() { String::new() } else { format!(",options={options}") };
        self.option(&format!("--mount=type=tmpfs,src=tmpfs,dst={path}{options}"))
    }

    /// A directory of the host, read-only.
    pub fn bind(self, source: &str, path: &str) -> Self {
        self.option(&format!("--mount=type=bind,src={source},dst={path},options=rbind:ro"))
    }

    /// An OCI annotation.
    pub fn annotation(self, name: &str, value: &str) -> Self {
        self.option(&format!("--annotation={name}={value}"))
    }

    /// What it runs; the default waits to be killed.
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        self
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The command `ctr run`, with more options.
    pub fn command(&self, more: &[&str]) -> Command {
        // In our directory, so that what a killed client leaves of it goes with the directory.
        let fifos = self.containerd.dir().join("fifo");
        let fifos = fifos.to_string_lossy();
        let mut words: Vec<&str> = vec!["run", "--runtime", &self.runtime, "--fifo-dir", &fifos];
        words.extend(more);
        words.extend(self.options.iter().map(String::as_str));
        words.extend([image::NAME, &self.id]);
        words.extend(self.arguments.iter().map(String::as_str));
        self.containerd.ctr().command(&words)
    }

    /// Runs it to its end and removes it: `ctr run --rm`.
    pub fn run(&self) -> Result<Said, CtrError> {
        crate::ctr::run(&mut self.command(&["--rm"]))
    }

    /// Starts it detached: `ctr run --detach`.
    pub fn start(self) -> Result<Container<'a>, CtrError> {
        crate::ctr::run(&mut self.command(&["--detach"]))?;
        Ok(Container::attach(self.containerd, self.id))
    }
}

/// A container that has been started.
#[derive(Debug)]
pub struct Container<'a> {
    containerd: &'a Containerd,
    id: String,
    execs: Cell<u32>,
}

impl<'a> Container<'a> {
    /// The container of this id, however it came to be.
    pub fn attach(containerd: &'a Containerd, id: String) -> Self {
        Self { containerd, id, execs: Cell::new(0) }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The command `ctr tasks exec`, with more options.
    pub fn exec_command(&self, more: &[&str], arguments: &[&str]) -> Command {
        self.execs.set(self.execs.get() + 1);
        let exec = format!("{}-exec-{}", self.id, self.execs.get());
        let fifos = self.containerd.dir().join("fifo");
        let fifos = fifos.to_string_lossy();
        let mut words = vec!["tasks", "exec", "--exec-id", &exec, "--fifo-dir", &fifos];
        words.extend(more);
        words.push(&self.id);
        words.extend(arguments);
        self.containerd.ctr().command(&words)
    }

    /// Runs a command in it to its end.
    pub fn exec(&self, arguments: &[&str]) -> Result<Said, CtrError> {
        crate::ctr::run(&mut self.exec_command(&[], arguments))
    }

    /// Starts a command in it that runs on.
    pub fn exec_background(&self, arguments: &[&str]) -> Result<Background, CtrError> {
        Background::start(&mut self.exec_command(&[], arguments))
    }

    /// Runs a shell command line in it.
    pub fn shell(&self, line: &str) -> Result<Said, CtrError> {
        self.exec(&["sh", "-c", line])
    }

    /// What the probe sees below a directory.
    pub fn list(&self, dir: &str) -> Result<Listing, CtrError> {
        let said = self.exec(&["probe", "list", dir])?;
        Listing::parse(&said.stdout).map_err(|error| CtrError {
            command: format!("probe list {dir}"),
            status: error.to_string(),
            code: None,
            stdout: String::new(),
            stderr: said.stderr,
        })
    }

    /// The state of its task in containerd's words (`RUNNING`, `STOPPED`, `PAUSED`), `None` without a task.
    pub fn status(&self) -> Result<Option<String>, CtrError> {
        let said = self.containerd.ctr().run(&["tasks", "list"])?;
        let line = said.stdout.lines().find(|line| line.split_whitespace().next() == Some(&self.id));
        Ok(line.and_then(|line| line.split_whitespace().nth(2)).map(str::to_owned))
    }

    /// The process id of its first process on the host, of a task that isn't stopped.
    pub fn pid(&self) -> Result<Option<i32>, CtrError> {
        let said = self.containerd.ctr().run(&["tasks", "list"])?;
        let line = said.stdout.lines().find(|line| line.split_whitespace().next() == Some(&self.id));
        Ok(line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()))
    }

    /// Waits until its task has the state. containerd's list is asked again and again: `ctr` can't wait
    /// for a task that it hasn't started.
    pub fn await_status(&self, wanted: &str) -> Result<(), CtrError> {
        let end = Instant::now() + DEADLINE / 4;
        loop {
            let status = self.status()?;
            if status.as_deref() == Some(wanted) {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(CtrError {
                    command: format!("waiting for {} to be {wanted}", self.id),
                    status: format!("it is {status:?}"),
                    code: None,
                    stdout: String::new(),
                    stderr: String::new(),
                });
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Restores a checkpoint as a new container: `ctr containers restore --live`. The container has been started
    /// when it comes back.
    pub fn restore(containerd: &'a Containerd, name: &str, image: &str) -> Result<Self, CtrError> {
        let id = containerd.id(name);
        containerd.ctr().run(&["containers", "restore", "--live", &id, image])?;
        Ok(Self::attach(containerd, id))
    }

    /// Kills it, and removes task and container.
    pub fn remove(self) -> Result<(), CtrError> {
        let ctr = self.containerd.ctr();
        if self.status()?.is_some() {
            ctr.run(&["tasks", "delete", "--force", &self.id])?;
        }
        ctr.run(&["containers", "delete", &self.id])?;
        Ok(())
    }
}
