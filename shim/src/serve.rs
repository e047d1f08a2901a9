//! The process that serves a sandbox: from the inherited socket to the last container's end.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use containerd_shim::protos::shim_async::create_task;
use containerd_shim::protos::ttrpc;
use containerd_shim::protos::ttrpc::r#async::Server;
use containerd_shim::protos::ttrpc::r#async::transport::Listener;
use containerd_shim::{ExitSignal, Flags};
use tokio::signal::unix::{SignalKind, signal};

use crate::container::Shim;
use crate::events::Publisher;
use crate::launch::socket_path;
use crate::logging;
use crate::reaper::Reaper;
use crate::service::TaskService;

/// How long the last events may take.
const LAST_EVENTS: Duration = Duration::from_secs(5);

/// Why the shim can't serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A descriptor, a signal, the log.
    #[error("{what} failed")]
    Io {
        /// What was done.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The server.
    #[error("the task service can't be served")]
    Server(#[source] ttrpc::Error),
}

/// Serves until containerd shuts the shim down. stdin is the listening socket, stdout is closed once it serves.
pub async fn serve(flags: &Flags) -> Result<(), ServeError> {
    let failed = |what| move |source| ServeError::Io { what, source };
    // containerd's log goes on without us where it gives none.
    if let Err(error) = logging::start(Path::new("log"), flags.debug) {
        eprintln!("the shim has no log: {error}");
    }
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|errno| failed("becoming a subreaper")(errno.into()))?;
    let reaper = Reaper::start().map_err(failed("watching children"))?;
    // Systemd stops a service's whole cgroup; containers outlive a restart of containerd. A handler, not SIG_IGN: that would be
    // inherited by the containers.
    let _ignored = [SignalKind::terminate(), SignalKind::interrupt()]
        .map(|kind| signal(kind).map_err(failed("catching SIGTERM and SIGINT")));

    let listener = take_listener().map_err(failed("taking over the socket"))?;
    let address = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let publisher = Publisher::start(address, flags.namespace.clone());
    let shim = Arc::new(Shim {
        namespace: flags.namespace.clone(),
        address: flags.address.clone().into(),
        reaper,
        publisher: publisher.clone(),
        restored: Mutex::default(),
        gates: Mutex::default(),
    });
    let exit = Arc::new(ExitSignal::default());
    let mut server = server(TaskService::new(shim, exit.clone()), listener)?;
    server.start().await.map_err(ServeError::Server)?;
    close_stdout().map_err(failed("telling that the shim serves"))?;
    tracing::info!(
        id = flags.id,
        namespace = flags.namespace,
        version = env!("CARGO_PKG_VERSION"),
        "shim started"
    );

    exit.wait().await;
    publisher.flush(LAST_EVENTS).await;
    drop(std::fs::remove_file(socket_path(&flags.socket)));
    drop(server.shutdown().await);
    tracing::info!(id = flags.id, "shim ends");
    Ok(())
}

/// The same service under both names of the task API: their messages are the same on the wire.
fn server(service: TaskService, listener: UnixListener) -> Result<Server, ServeError> {
    let listener =
        Listener::try_from(listener).map_err(|source| ServeError::Io { what: "listening", source })?;
    let service = Arc::new(service);
    let older = create_task(service.clone())
        .into_iter()
        .map(|(name, service)| (name.replace("containerd.task.v3.", "containerd.task.v2."), service))
        .collect();
    Ok(Server::new().add_listener(listener).register_service(create_task(service)).register_service(older))
}

fn take_listener() -> io::Result<UnixListener> {
    let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    // Something else wouldn't have a local socket address.
    listener.local_addr()?;
    let null = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(listener)
}

fn close_stdout() -> io::Result<()> {
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null")?;
    Ok(rustix::stdio::dup2_stdout(&null)?)
}
