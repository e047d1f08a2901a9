//! containerd's task service: one call at a time, and its answer or the code of its refusal.

use std::fmt;
use std::time::Duration;

use stillframe_integration::Containerd;
use stillframe_integration::ctr::CtrError;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use crate::containerd::services::tasks::v1 as api;
use crate::containerd::services::tasks::v1::tasks_client::TasksClient;
use crate::containerd::types::Mount;

/// How long one call may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a call came to.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// It was done; what it said that is worth comparing.
    Done(String),
    /// It was refused.
    Refused(Code, String),
}

/// The message is the runtime's own affair, and doesn't count.
impl PartialEq for Outcome {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Done(one), Self::Done(two)) => one == two,
            (Self::Refused(one, _), Self::Refused(two, _)) => one == two,
            _ => false,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done(said) if said.is_empty() => f.write_str("done"),
            Self::Done(said) => write!(f, "done: {said}"),
            Self::Refused(code, message) => write!(f, "{code:?}: {message}"),
        }
    }
}

/// A connection to the task service of one containerd.
#[derive(Debug)]
pub struct Tasks<'a> {
    containerd: &'a Containerd,
    tokio: tokio::runtime::Runtime,
    channel: Channel,
    lease: Option<&'static str>,
}

impl<'a> Tasks<'a> {
    /// Connects, with the first call.
    pub fn new(containerd: &'a Containerd) -> Self {
        let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let tokio = tokio.expect("a thread's event loop needs two file descriptors");
        let endpoint = Endpoint::from_shared(format!("unix://{}", containerd.ctr().address.display()));
        let endpoint = endpoint.expect("the path of the socket was made here, of letters");
        let channel = tokio.block_on(async { endpoint.connect_lazy() });
        Self { containerd, tokio, channel, lease: None }
    }

    /// The same with a lease: what its calls put into containerd's store stays there.
    pub fn keeping(self) -> Result<Self, CtrError> {
        const LEASE: &str = "tasks";
        self.containerd.ctr().run(&["leases", "create", "--id", LEASE])?;
        Ok(Self { lease: Some(LEASE), ..self })
    }

    /// Makes one call with this message; `told` picks from the answer what is worth comparing.
    pub fn call<M, T, F>(
        &self,
        message: M,
        call: impl FnOnce(TasksClient<Channel>, Request<M>) -> F,
        told: impl FnOnce(T) -> String,
    ) -> Outcome
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut request = Request::new(message);
        let namespace = self.containerd.namespace().parse().expect("namespaces are ASCII");
        request.metadata_mut().insert("containerd-namespace", namespace);
        if let Some(lease) = self.lease {
            request.metadata_mut().insert("containerd-lease", MetadataValue::from_static(lease));
        }
        let call = call(TasksClient::new(self.channel.clone()), request);
        match self.tokio.block_on(async { tokio::time::timeout(DEADLINE, call).await }) {
            Ok(Ok(answer)) => Outcome::Done(told(answer.into_inner())),
            Ok(Err(status)) => Outcome::Refused(status.code(), status.message().to_owned()),
            Err(_) => Outcome::Refused(Code::DeadlineExceeded, format!("no answer within {DEADLINE:?}")),
        }
    }

    /// Creates the task of a container that `ctr containers create` has made. It isn't started.
    pub fn create(&self, id: &str) -> Result<Outcome, CtrError> {
        let said = self.containerd.ctr().run(&["snapshots", "mounts", "/nowhere", id])?.stdout;
        let rootfs = said.lines().map(mount).collect();
        let request = api::CreateTaskRequest { container_id: id.to_owned(), rootfs, ..Default::default() };
        Ok(self.call(
            request,
            |mut client, request| async move { client.create(request).await },
            |_| String::new(),
        ))
    }
}

/// `mount -t TYPE SOURCE TARGET -o OPTIONS`, as `ctr` prints it.
fn mount(line: &str) -> Mount {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, _, kind, source, _, _, options] = words[..] else { panic!("not a mount command: {line}") };
    Mount {
        r#type: kind.to_owned(),
        source: source.to_owned(),
        options: options.split(',').map(str::to_owned).collect(),
        ..Default::default()
    }
}
