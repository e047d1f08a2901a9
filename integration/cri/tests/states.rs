//! Each call of the task API in each state of a task comes to the same as with runc's own shim: it is done, or refused with
//! the same code. Through containerd, which is the one that reads the codes.

use stillframe_cri::Tasks;
use stillframe_cri::containerd::services::tasks::v1 as api;
use stillframe_cri::tasks::Outcome;
use stillframe_integration::{Containerd, ContainerdVersion, RUNC, STILLFRAME, image};

stillframe_integration::with_every_containerd!(calls_are_answered_as_by_runcs_shim);

/// Where we answer otherwise on purpose: state, call, and why.
const ON_PURPOSE: [(&str, &str, &str); 4] = [
    ("created", "delete", "it was killed, and we wait for its exit status instead of giving 0"),
    ("stopped", "metrics", "a dead container has none; they would be those of an empty cgroup"),
    (
        "processes",
        "get four",
        "an exec that couldn't be started is over, not still to be started: who waits for it is told",
    ),
    ("processes", "delete four", "and its exit status says that it failed"),
];

/// What a call did, by its name.
type Answers = Vec<(String, Outcome)>;

struct Subject<'a> {
    tasks: &'a Tasks<'a>,
    id: String,
    answers: Answers,
}

macro_rules! call {
    ($subject:expr, $what:expr, $method:ident, $message:expr, $told:expr) => {{
        let message = $message;
        let call = |mut client: api::tasks_client::TasksClient<_>, request| async move {
            client.$method(request).await
        };
        let outcome = $subject.tasks.call(message, call, $told);
        $subject.answers.push(($what.to_owned(), outcome));
    }};
}

impl Subject<'_> {
    fn start(&mut self, exec_id: &str) {
        let (container_id, exec_id) = (self.id.clone(), exec_id.to_owned());
        let what = format!("start {exec_id}");
        call!(
            self,
            what,
            start,
            api::StartRequest { container_id, exec_id },
            |answer: api::StartResponse| { format!("a process: {}", answer.pid > 0) }
        );
    }

    fn get(&mut self, exec_id: &str) {
        let (container_id, exec_id) = (self.id.clone(), exec_id.to_owned());
        let what = format!("get {exec_id}");
        call!(self, what, get, api::GetRequest { container_id, exec_id }, |answer: api::GetResponse| {
            let process = answer.process.unwrap_or_default();
            format!(
                "{:?}, exit status {}, at {}",
                process.status(),
                process.exit_status,
                process.exited_at.is_some()
            )
        });
    }

    fn pids(&mut self) {
        let container_id = self.id.clone();
        call!(
            self,
            "pids",
            list_pids,
            api::ListPidsRequest { container_id },
            |answer: api::ListPidsResponse| { format!("{}", answer.processes.len()) }
        );
    }

    fn pause(&mut self) {
        let container_id = self.id.clone();
        call!(self, "pause", pause, api::PauseTaskRequest { container_id }, |()| String::new());
    }

    fn resume(&mut self) {
        let container_id = self.id.clone();
        call!(self, "resume", resume, api::ResumeTaskRequest { container_id }, |()| String::new());
    }

    fn kill(&mut self, exec_id: &str, signal: u32, all: bool) {
        let what = format!("kill {exec_id} {signal} {all}");
        let (container_id, exec_id) = (self.id.clone(), exec_id.to_owned());
        call!(self, what, kill, api::KillRequest { container_id, exec_id, signal, all }, |()| String::new());
    }

    fn exec(&mut self, exec_id: &str, arguments: &[&str]) {
        let process = serde_json::json!({
            "args": arguments, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
        });
        let spec = prost_types::Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: process.to_string().into_bytes(),
        };
        let what = format!("exec {exec_id}");
        let message = api::ExecProcessRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            spec: Some(spec),
            ..Default::default()
        };
        call!(self, what, exec, message, |()| String::new());
    }

    fn resize(&mut self, exec_id: &str) {
        let what = format!("resize {exec_id}");
        let (container_id, exec_id) = (self.id.clone(), exec_id.to_owned());
        let message = api::ResizePtyRequest { container_id, exec_id, width: 80, height: 25 };
        call!(self, what, resize_pty, message, |()| String::new());
    }

    fn close(&mut self, exec_id: &str) {
        let what = format!("close {exec_id}");
        let (container_id, exec_id) = (self.id.clone(), exec_id.to_owned());
        call!(self, what, close_io, api::CloseIoRequest { container_id, exec_id, stdin: true }, |()| {
            String::new()
        });
    }

    fn update(&mut self) {
        let resources = prost_types::Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: br#"{"memory":{"limit":50000000}}"#.to_vec(),
        };
        let message = api::UpdateTaskRequest {
            container_id: self.id.clone(),
            resources: Some(resources),
            ..Default::default()
        };
        call!(self, "update", update, message, |()| String::new());
    }

    fn metrics(&mut self) {
        let filters = vec![format!("id=={}", self.id)];
        call!(self, "metrics", metrics, api::MetricsRequest { filters }, |answer: api::MetricsResponse| {
            format!("{}", answer.metrics.len())
        });
    }

    fn wait(&mut self, exec_id: &str) {
        let what = format!("wait {exec_id}");
        let (container_id, exec_id) = (self.id.clone(), exec_id.to_owned());
        call!(self, what, wait, api::WaitRequest { container_id, exec_id }, |answer: api::WaitResponse| {
            format!("exit status {}, at {}", answer.exit_status, answer.exited_at.is_some())
        });
    }

    fn delete_process(&mut self, exec_id: &str) {
        let what = format!("delete {exec_id}");
        let (container_id, exec_id) = (self.id.clone(), exec_id.to_owned());
        call!(
            self,
            what,
            delete_process,
            api::DeleteProcessRequest { container_id, exec_id },
            |answer: api::DeleteResponse| format!(
                "exit status {}, at {}",
                answer.exit_status,
                answer.exited_at.is_some()
            )
        );
    }

    fn delete(&mut self) {
        let container_id = self.id.clone();
        call!(
            self,
            "delete",
            delete,
            api::DeleteTaskRequest { container_id },
            |answer: api::DeleteResponse| {
                format!("exit status {}, at {}", answer.exit_status, answer.exited_at.is_some())
            }
        );
    }

    /// Calls that leave the state as it is, or should.
    fn look(&mut self) {
        self.get("");
        self.get("unknown");
        self.pids();
        self.metrics();
        self.update();
        self.resize("");
        self.resize("unknown");
        self.close("");
        self.close("unknown");
        self.start("unknown");
        self.kill("unknown", 15, false);
        self.delete_process("unknown");
        self.wait("unknown");
    }

    fn create(&mut self) {
        let outcome = self.tasks.create(&self.id).unwrap();
        self.answers.push(("create".to_owned(), outcome));
    }
}

type Act = fn(&mut Subject<'_>);

/// What to do with a container that has no task yet.
const STATES: [(&str, Act); 7] = [
    ("no task", |subject| {
        subject.look();
        subject.start("");
        subject.pause();
        subject.kill("", 9, false);
        subject.delete();
    }),
    ("created", |subject| {
        subject.create();
        subject.create();
        subject.look();
        subject.resume();
        subject.delete();
        subject.get("");
    }),
    ("created, killed", |subject| {
        subject.create();
        subject.kill("", 9, false);
        subject.wait("");
        subject.start("");
        subject.get("");
        subject.delete();
    }),
    ("running", |subject| {
        subject.create();
        subject.start("");
        subject.start("");
        subject.look();
        subject.resume();
        subject.delete();
        // Nothing that can be sent.
        subject.kill("", 200, false);
        subject.kill("", 0, false);
        subject.get("");
        subject.kill("", 9, true);
        subject.wait("");
        subject.delete();
    }),
    ("paused", |subject| {
        subject.create();
        subject.start("");
        subject.pause();
        subject.look();
        subject.pause();
        subject.exec("one", &["true"]);
        subject.start("one");
        subject.delete();
        subject.get("");
        subject.resume();
        subject.resume();
        subject.get("");
        subject.kill("", 9, false);
        subject.wait("");
        subject.delete();
    }),
    ("stopped", |subject| {
        subject.create();
        subject.start("");
        subject.kill("", 9, false);
        subject.wait("");
        subject.look();
        subject.start("");
        subject.pause();
        subject.resume();
        subject.kill("", 15, false);
        subject.kill("", 15, true);
        subject.exec("one", &["true"]);
        subject.start("one");
        subject.delete();
        subject.delete();
        subject.create();
        subject.start("");
        // SIGWINCH: most others would end runc's init, if that hasn't become the program yet.
        subject.kill("", 28, false);
        subject.kill("", 9, false);
        subject.wait("");
        subject.delete();
    }),
    ("processes", |subject| {
        subject.create();
        subject.exec("early", &["true"]);
        subject.start("early");
        subject.start("");
        subject.exec("one", &["sh", "-c", "exit 3"]);
        subject.exec("one", &["true"]);
        subject.get("one");
        subject.start("one");
        subject.wait("one");
        subject.get("one");
        subject.start("one");
        subject.kill("one", 9, false);
        subject.resize("one");
        subject.delete_process("one");
        subject.delete_process("one");
        subject.exec("two", &["probe", "idle"]);
        subject.kill("two", 9, false);
        subject.start("two");
        subject.delete_process("two");
        subject.kill("two", 9, false);
        subject.wait("two");
        subject.delete_process("two");
        subject.exec("three", &["true"]);
        subject.delete_process("three");
        subject.exec("four", &["no-such-command"]);
        subject.start("four");
        subject.get("four");
        subject.delete_process("four");
        // It ends with its container.
        subject.exec("five", &["probe", "idle"]);
        subject.start("five");
        subject.kill("", 9, false);
        subject.wait("");
        subject.wait("five");
        subject.delete_process("five");
        subject.delete();
    }),
];

fn calls_are_answered_as_by_runcs_shim(version: &ContainerdVersion) {
    let containerd = Containerd::start_version(version).unwrap();
    let tasks = Tasks::new(&containerd);
    let mut different = Vec::new();
    for (number, (state, act)) in STATES.iter().enumerate() {
        let answers = [("theirs", RUNC), ("ours", STILLFRAME)].map(|(name, runtime)| {
            let id = containerd.id(&format!("{name}-{number}"));
            let create = ["containers", "create", "--runtime", runtime, image::NAME, &id, "probe", "idle"];
            containerd.ctr().run(&create).unwrap();
            let mut subject = Subject { tasks: &tasks, id, answers: Answers::new() };
            act(&mut subject);
            containerd.ctr().run(&["containers", "delete", &subject.id]).unwrap();
            subject.answers
        });
        let [theirs, ours] = answers;
        assert_eq!(theirs.len(), ours.len());
        for (index, ((call, theirs), (_, ours))) in theirs.iter().zip(&ours).enumerate() {
            let on_purpose = ON_PURPOSE.iter().any(|(one, another, _)| one == state && another == call);
            if on_purpose {
                assert_ne!(theirs, ours, "{state}, {call}: it isn't different any more");
            } else if theirs != ours {
                different
                    .push(format!("{state}, call {index}: {call}\n  theirs  {theirs}\n  ours    {ours}"));
            }
        }
    }
    assert!(
        different.is_empty(),
        "{} calls are answered otherwise:\n{}",
        different.len(),
        different.join("\n")
    );
    containerd.assert_nothing_left();
}
