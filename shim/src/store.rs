//! containerd's images and their contents, by its own API (the services `images` and `content`, the same in all versions).
//!
//! Blocking, with an event loop of its own: for a process that does nothing else (see [`crate::fetch`]).

use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

use api::services::content::v1::content_client::ContentClient;
use api::services::content::v1::{ReadContentRequest, ReadContentResponse};
use api::services::images::v1::GetImageRequest;
use api::services::images::v1::images_client::ImagesClient;

/// Generated; the nesting is that of the packages.
#[allow(clippy::all, reason = "generated")]
mod api {
    pub mod services {
        pub mod content {
            pub mod v1 {
                tonic::include_proto!("containerd.services.content.v1");
            }
        }
        pub mod images {
            pub mod v1 {
                tonic::include_proto!("containerd.services.images.v1");
            }
        }
    }
    pub mod types {
        tonic::include_proto!("containerd.types");
    }
}

/// How long an answer, or the next part of one, may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why nothing is to be had from containerd.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The event loop, or a socket's path that is no address.
    #[error("containerd can't be asked at {address:?}")]
    Connect {
        /// Its socket.
        address: String,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// A call that failed.
    #[error("containerd can't give {what}: {:?}: {}", status.code(), status.message())]
    Call {
        /// An image or a blob.
        what: String,
        /// Its answer.
        status: Box<Status>,
    },
}

/// What an image or a part of one is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its media type.
    pub media_type: String,
    /// Digest of its blob.
    pub digest: String,
}

/// One namespace of one containerd.
#[derive(Debug)]
pub struct Store {
    runtime: Runtime,
    channel: Channel,
    namespace: MetadataValue<Ascii>,
}

impl Store {
    /// The namespace of the containerd that listens at a socket, which the first call connects to.
    pub fn new(socket: &Path, namespace: &str) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Connect { address: socket.display().to_string(), source };
        let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()));
        let endpoint = endpoint.map_err(|error| failed(io::Error::other(error)))?.connect_timeout(PATIENCE);
        let namespace = namespace.parse().map_err(|error| failed(io::Error::other(error)))?;
        let channel = runtime.block_on(async { endpoint.connect_lazy() });
        Ok(Self { runtime, channel, namespace })
    }

    /// What the image of a name is; `None` if there is none.
    pub fn image(&self, name: &str) -> Result<Option<Target>, StoreError> {
        let request = self.request(GetImageRequest { name: name.to_owned() });
        let mut client = ImagesClient::new(self.channel.clone());
        match self.runtime.block_on(within(async { client.get(request).await })) {
            Ok(answer) => Ok(answer
                .into_inner()
                .image
                .and_then(|image| image.target)
                .map(|target| Target { media_type: target.media_type, digest: target.digest })),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => {
                Err(StoreError::Call { what: format!("the image {name:?}"), status: Box::new(status) })
            }
        }
    }

    /// The bytes of a blob. containerd has verified its digest when it took it in.
    pub fn blob(&self, digest: &str) -> Result<Blob<'_>, StoreError> {
        let request = self.request(ReadContentRequest { digest: digest.to_owned(), ..Default::default() });
        let mut client = ContentClient::new(self.channel.clone());
        let stream = self.runtime.block_on(within(async { client.read(request).await }));
        match stream {
            Ok(stream) => {
                Ok(Blob { runtime: &self.runtime, stream: stream.into_inner(), part: Vec::new(), read: 0 })
            }
            Err(status) => {
                Err(StoreError::Call { what: format!("the blob {digest}"), status: Box::new(status) })
            }
        }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        request
    }
}

/// A blob that is being read.
pub struct Blob<'a> {
    runtime: &'a Runtime,
    stream: Streaming<ReadContentResponse>,
    part: Vec<u8>,
    /// Bytes of `part` that were given out.
    read: usize,
}

impl Read for Blob<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.read == self.part.len() {
            let next = self.runtime.block_on(within(self.stream.message()));
            match next.map_err(io::Error::other)? {
                Some(next) => (self.part, self.read) = (next.data, 0),
                None => return Ok(0),
            }
        }
        let given = (self.part.len() - self.read).min(into.len());
        into[..given].copy_from_slice(&self.part[self.read..self.read + given]);
        self.read += given;
        Ok(given)
    }
}

async fn within<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = || Status::deadline_exceeded(format!("no answer within {PATIENCE:?}"));
    tokio::time::timeout(PATIENCE, call).await.unwrap_or_else(|_| Err(late()))
}
