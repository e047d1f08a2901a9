//! What a request can fail with, and containerd's code and text for it.
//!
//! The text carries the whole chain of causes: it is all that a user of `ctr` or a kubelet's event gets to see.

use std::error::Error;
use std::io;

use containerd_shim::protos::protobuf;
use containerd_shim::protos::ttrpc::{self, Code};
use stillframe_runtime::config::{ConfigError, UnknownMode};
use stillframe_runtime::spec::{MODE_ANNOTATION, RESTORE_FROM_ANNOTATION};

use crate::bundle::BundleError;
use crate::driver::RuncError;
use crate::fetch::FetchError;
use crate::lifecycle::Refused;
use crate::metrics::MetricsError;
use crate::options::OptionsError;
use crate::rootfs::RootfsError;
use crate::stdio::StdioError;

/// A failed request.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// No such container; containerd-shim-runc-v2's text.
    #[error("container not created")]
    NoContainer,
    /// No such exec; containerd-shim-runc-v2's text.
    #[error("process does not exist {exec_id}")]
    NoProcess {
        /// As asked.
        exec_id: String,
    },
    /// A second container with the id.
    #[error("container {id} exists")]
    ContainerExists {
        /// As asked.
        id: String,
    },
    /// Shutdown was asked for while it was created.
    #[error("container {id} was created while the shim was shut down")]
    Unwanted {
        /// The container.
        id: String,
    },
    /// A second exec with the id; containerd-shim-runc-v2's text.
    #[error("id {exec_id}")]
    ExecExists {
        /// As asked.
        exec_id: String,
    },
    /// Not in this state.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// An exec when the init has died.
    #[error("container {id} init process is not running")]
    InitGone {
        /// The container.
        id: String,
    },
    /// Signalling something dead; containerd-shim-runc-v2's text.
    #[error("process already finished")]
    Finished,
    /// Signalling something that has no process yet.
    #[error("process not created")]
    NotStarted,
    /// A second checkpoint at the same time.
    #[error("a checkpoint of container {id} is running already")]
    CheckpointRuns {
        /// The container.
        id: String,
    },
    /// runc.
    #[error(transparent)]
    Runc(#[from] RuncError),
    /// Options of the request.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The root filesystem.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// Stdio.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// Statistics.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The container's filesystems.
    #[error("{action} the filesystems of container {id} failed")]
    Sandbox {
        /// "preparing", "checkpointing", ...
        action: &'static str,
        /// The container.
        id: String,
        /// The runtime's error.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The node's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The annotation for it.
    #[error("annotation {MODE_ANNOTATION}")]
    Mode(#[from] UnknownMode),
    /// The image to restore from.
    #[error("annotation {RESTORE_FROM_ANNOTATION} of container {id}")]
    Fetch {
        /// The container.
        id: String,
        /// Why it isn't to be had.
        #[source]
        source: FetchError,
    },
    /// JSON in the request.
    #[error("the request's {what} is not valid")]
    Json {
        /// Which part.
        what: &'static str,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// Something that containerd-shim does for us.
    #[error("{what} failed")]
    Shim {
        /// What was done.
        what: &'static str,
        /// What failed.
        #[source]
        source: containerd_shim::Error,
    },
    /// A signal or a terminal.
    #[error("{what} failed")]
    Io {
        /// What was done.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A reply.
    #[error("the reply can't be encoded")]
    Encode(#[from] protobuf::Error),
    /// A handler that panicked; its message is in the log.
    #[error("{request} of container {id} ended in a panic, see the shim's log in containerd's")]
    Panicked {
        /// The method.
        request: &'static str,
        /// The container.
        id: String,
    },
}

impl TaskError {
    /// containerd-shim-runc-v2's code for the error: clients know how to live with those, also where a better one exists. What
    /// only we have has a code of its own.
    pub fn code(&self) -> Code {
        match self {
            TaskError::NoContainer | TaskError::NoProcess { .. } | TaskError::Finished => Code::NOT_FOUND,
            TaskError::ContainerExists { .. } | TaskError::ExecExists { .. } => Code::ALREADY_EXISTS,
            TaskError::Refused(refused) if refused.is_gone() => Code::NOT_FOUND,
            TaskError::InitGone { .. } | TaskError::NotStarted | TaskError::CheckpointRuns { .. } => {
                Code::FAILED_PRECONDITION
            }
            TaskError::Options(_)
            | TaskError::Mode(_)
            | TaskError::Json { .. }
            | TaskError::Stdio(StdioError::Scheme(_)) => Code::INVALID_ARGUMENT,
            TaskError::Unwanted { .. } => Code::ABORTED,
            TaskError::Metrics(MetricsError::Gone { .. }) => Code::NOT_FOUND,
            TaskError::Panicked { .. } => Code::INTERNAL,
            TaskError::Refused(_)
            | TaskError::Runc(_)
            | TaskError::Bundle(_)
            | TaskError::Rootfs(_)
            | TaskError::Stdio(_)
            | TaskError::Metrics(_)
            | TaskError::Sandbox { .. }
            | TaskError::Fetch { .. }
            | TaskError::Config(_)
            | TaskError::Shim { .. }
            | TaskError::Io { .. }
            | TaskError::Encode(_) => Code::UNKNOWN,
        }
    }

    /// The error and its causes, joined by colons.
    pub fn text(&self) -> String {
        match self {
            // runc's own words say it all; what follows is its exit status and its output once more.
            TaskError::Runc(error) if error.tells_all() => error.to_string(),
            error => chain(error),
        }
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error.text()))
    }
}

/// `error` and its causes, joined by colons. A cause that its effect's text ends with already isn't repeated: some
/// libraries print the causes they also report.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::{Operation, State};

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        #[source]
        source: Option<Box<Layer>>,
    }

    fn layers(texts: &[&'static str]) -> Option<Box<Layer>> {
        let (text, rest) = texts.split_first()?;
        Some(Box::new(Layer { text, source: layers(rest) }))
    }

    #[test]
    fn a_text_has_every_cause_once() {
        assert_eq!(chain(&*layers(&["a", "b", "c"]).unwrap()), "a: b: c");
        assert_eq!(chain(&*layers(&["a error: b", "b", "c"]).unwrap()), "a error: b: c");
        let error =
            TaskError::Sandbox { action: "preparing", id: "x".into(), source: layers(&["a", "b"]).unwrap() };
        assert_eq!(error.text(), "preparing the filesystems of container x failed: a: b");
    }

    #[test]
    fn runc_s_words_stand_alone() {
        let error = |message: &str| {
            TaskError::from(RuncError {
                command: "start",
                message: message.into(),
                source: runc::error::Error::NotFound,
            })
        };
        assert_eq!(error("no such thing").text(), "OCI runtime start failed: no such thing");
        assert_eq!(error("").text(), "OCI runtime start failed: Unable to locate the runc");
    }

    #[test]
    fn codes_are_containerd_s() {
        let refused = |state: State| TaskError::from(state.admit(Operation::Delete).unwrap_err());
        assert_eq!(refused(State::Running).code(), Code::UNKNOWN);
        assert_eq!(refused(State::Deleted).code(), Code::NOT_FOUND);
        assert_eq!(TaskError::NoContainer.code(), Code::NOT_FOUND);
        assert_eq!(TaskError::ExecExists { exec_id: "e".into() }.code(), Code::ALREADY_EXISTS);
    }
}
