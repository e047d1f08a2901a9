//! Events to containerd: a queue that keeps their order, whatever happens on the way.
//!
//! containerd wants TaskCreate < TaskStart < TaskExit < TaskDelete, and the same of exec'd processes (docs/runtime-v2.md). Who
//! publishes holds the process's lock, so the queue's order is the right one; here one task forwards its head until it is
//! accepted, connecting again where containerd was restarted, and gives up on events older than [`KEEP`]: a containerd that
//! was away longer asks for each task's state when it comes back.
//!
//! containerd-shim's `RemotePublisher` puts an event that failed back at the *end* of the queue, behind its successors, and
//! can't be drained before the process exits; this is why it isn't used.

use std::time::{Duration, Instant};

use containerd_shim::event::Event;
use containerd_shim::protos::api::ForwardRequest;
use containerd_shim::protos::shim::event::Envelope;
use containerd_shim::protos::shim_async::{Client, EventsClient};
use containerd_shim::protos::ttrpc;
use containerd_shim::util::{convert_to_any, timestamp};
use tokio::sync::{mpsc, oneshot};

/// How long an event is worth delivering.
const KEEP: Duration = Duration::from_secs(15);
/// How long containerd may take over one event.
const ANSWER: Duration = Duration::from_secs(5);
/// Pause between attempts.
const RETRY: Duration = Duration::from_millis(200);

/// The sending end. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Publisher {
    namespace: String,
    queue: mpsc::UnboundedSender<Item>,
}

#[derive(Debug)]
enum Item {
    Event { envelope: Box<Envelope>, born: Instant },
    Flush(oneshot::Sender<()>),
}

impl Publisher {
    /// Starts forwarding to the ttrpc socket at `address`; events belong to `namespace`.
    pub fn start(address: String, namespace: String) -> Self {
        let (queue, items) = mpsc::unbounded_channel();
        tokio::spawn(forward(address, items));
        Self { namespace, queue }
    }

    /// Queues `event`. Never waits and never fails: whether containerd hears of it is not the caller's business.
    pub fn publish(&self, event: impl Event) {
        let topic = event.topic();
        let (Ok(event), Ok(timestamp)) = (convert_to_any(Box::new(event)), timestamp()) else {
            tracing::error!(topic, "an event can't be encoded");
            return;
        };
        let mut envelope = Envelope::new();
        envelope.set_topic(topic);
        envelope.set_namespace(self.namespace.clone());
        envelope.set_timestamp(timestamp);
        envelope.set_event(event);
        // The forwarding task ends with the process only.
        drop(self.queue.send(Item::Event { envelope: Box::new(envelope), born: Instant::now() }));
    }

    /// Waits until all events queued so far are delivered or given up, `limit` at most.
    pub async fn flush(&self, limit: Duration) {
        let (sender, done) = oneshot::channel();
        drop(self.queue.send(Item::Flush(sender)));
        drop(tokio::time::timeout(limit, done).await);
    }
}

async fn forward(address: String, mut items: mpsc::UnboundedReceiver<Item>) {
    let mut client = None;
    while let Some(item) = items.recv().await {
        match item {
            Item::Flush(done) => drop(done.send(())),
            Item::Event { envelope, born } => {
                let mut request = ForwardRequest::new();
                let topic = envelope.topic().to_string();
                request.set_envelope(*envelope);
                while let Err(error) = send(&mut client, &address, &request).await {
                    if born.elapsed() > KEEP {
                        tracing::warn!(topic, %error, "an event could not be delivered");
                        break;
                    }
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }
}

async fn send(
    client: &mut Option<EventsClient>,
    address: &str,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let connected = match client.take() {
        Some(connected) => connected,
        None => EventsClient::new(Client::connect(&url(address)).await?),
    };
    match connected.forward(ttrpc::context::with_duration(ANSWER), request).await {
        Ok(_) => {
            *client = Some(connected);
            Ok(())
        }
        // containerd has looked at the event and doesn't want it. Asking again won't help.
        Err(ttrpc::Error::RpcStatus(status)) if status.code() != ttrpc::Code::DEADLINE_EXCEEDED => {
            tracing::error!(topic = request.envelope().topic(), ?status, "containerd refused an event");
            *client = Some(connected);
            Ok(())
        }
        Err(error) => Err(error),
    }
}

fn url(address: &str) -> String {
    if address.contains("://") { address.to_string() } else { format!("unix://{address}") }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use async_trait::async_trait;
    use containerd_shim::api::Empty;
    use containerd_shim::protos::events::task::{TaskExit, TaskStart};
    use containerd_shim::protos::protobuf::Message;
    use containerd_shim::protos::shim_async::{Events, create_events};
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    struct Containerd(mpsc::UnboundedSender<u32>);

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let envelope = request.envelope();
            assert_eq!(envelope.namespace(), "tests");
            let exit = TaskExit::parse_from_bytes(&envelope.event().value).unwrap();
            self.0.send(exit.pid).unwrap();
            Ok(Empty::new())
        }
    }

    async fn serve(socket: &Path, seen: &mpsc::UnboundedSender<u32>) -> Server {
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .unwrap()
            .register_service(create_events(Arc::new(Containerd(seen.clone()))));
        server.start().await.unwrap();
        server
    }

    fn exit(pid: u32) -> TaskExit {
        TaskExit { pid, ..Default::default() }
    }

    #[tokio::test]
    async fn order_survives_a_restart_of_containerd() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("ttrpc");
        let (sender, mut seen) = mpsc::unbounded_channel();
        let publisher = Publisher::start(socket.display().to_string(), "tests".into());
        publisher.publish(exit(1));
        // Nobody listens yet.
        let mut server = serve(&socket, &sender).await;
        publisher.flush(Duration::from_secs(10)).await;
        assert_eq!(seen.try_recv(), Ok(1), "flush came back before the event was delivered");
        server.shutdown().await.unwrap();
        std::fs::remove_file(&socket).unwrap();
        for pid in 2..100 {
            publisher.publish(exit(pid));
        }
        let _server = serve(&socket, &sender).await;
        for pid in 2..100 {
            assert_eq!(seen.recv().await, Some(pid));
        }
    }

    #[tokio::test]
    async fn flush_doesn_t_wait_for_a_containerd_that_is_gone() {
        let publisher = Publisher::start("/nonexistent/ttrpc".into(), "tests".into());
        publisher.publish(TaskStart::new());
        publisher.flush(Duration::from_millis(50)).await;
    }
}
