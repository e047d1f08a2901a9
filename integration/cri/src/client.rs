//! The CRI client: blocking calls, with a deadline, to the CRI plugin of one private containerd.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use stillframe_integration::containerd::StartError;
use stillframe_integration::{Containerd, ContainerdVersion, Services, image};
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::api::image_service_client::ImageServiceClient;
use crate::api::runtime_service_client::RuntimeServiceClient;
use crate::api::{ImageSpec, ImageStatusRequest, PullImageRequest, StatusRequest, VersionRequest};
use crate::pod::PodSpec;

/// How long one call may take.
const DEADLINE: Duration = Duration::from_secs(120);
/// How long the plugin may take to become ready after containerd's socket is there.
const READY: Duration = Duration::from_secs(60);

/// The client of the runtime service.
pub type Service = RuntimeServiceClient<Channel>;

/// A call that failed.
#[derive(thiserror::Error)]
pub enum CriError {
    /// There is no containerd.
    #[error(transparent)]
    Start(#[from] StartError),
    /// containerd's socket.
    #[error("containerd's socket can't be used")]
    Connect(#[from] tonic::transport::Error),
    /// containerd said no.
    #[error("{call}: {:?}: {}", status.code(), status.message())]
    Call {
        /// Name of the call.
        call: &'static str,
        /// Its answer.
        status: Box<Status>,
    },
    /// No answer.
    #[error("{0}: no answer within {DEADLINE:?}")]
    Deadline(&'static str),
    /// An image that was imported doesn't come to the plugin's knowledge.
    #[error("containerd's CRI plugin doesn't know the image {0} that was imported")]
    NoImage(&'static str),
    /// Something of the test's own.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}

/// As `Display`: it's what `unwrap` in a test prints.
impl fmt::Debug for CriError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A private containerd with the CRI plugin, and a connection to it.
#[derive(Debug)]
pub struct Cri {
    // Before containerd, so that the connection goes first.
    channel: Channel,
    tokio: tokio::runtime::Runtime,
    containerd: Containerd,
    pods: Cell<u32>,
}

impl Cri {
    /// Starts a containerd and waits until its CRI plugin is ready.
    pub fn start(version: &ContainerdVersion) -> Result<Self, CriError> {
        let containerd = Containerd::start_with(version, Services::Cri)?;
        let tokio = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| CriError::Io { what: "starting the client's event loop".to_owned(), source })?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", containerd.ctr().address.display()))?;
        // Connected by the first call, and again after containerd was restarted.
        let channel = tokio.block_on(async { endpoint.connect_lazy() });
        let cri = Self { channel, tokio, containerd, pods: Cell::new(0) };
        cri.await_ready()?;
        for name in [image::NAME, image::PAUSE] {
            cri.await_image(name)?;
        }
        Ok(cri)
    }

    /// The containerd.
    pub fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// A pod about to be run; its name is made unique.
    pub fn pod(&self, name: &str) -> PodSpec<'_> {
        self.pods.set(self.pods.get() + 1);
        PodSpec::new(self, format!("{name}-{}", self.pods.get()))
    }

    /// Makes one call. `name` is for messages.
    pub fn call<T, F>(&self, name: &'static str, call: impl FnOnce(Service) -> F) -> Result<T, CriError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        // A command's output may be longer than the usual limit for an answer.
        self.answer(name, call(Service::new(self.channel.clone()).max_decoding_message_size(64 << 20)))
    }

    fn answer<T>(
        &self,
        name: &'static str,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, CriError> {
        match self.tokio.block_on(async { tokio::time::timeout(DEADLINE, call).await }) {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(CriError::Call { call: name, status: Box::new(status) }),
            Err(_) => Err(CriError::Deadline(name)),
        }
    }

    /// The answer to Version: name and version of the runtime.
    pub fn version(&self) -> Result<(String, String), CriError> {
        let request = VersionRequest { version: "v1".to_owned() };
        let version = self.call("Version", |mut service| async move { service.version(request).await })?;
        Ok((version.runtime_name, version.runtime_version))
    }

    /// Waits until calls are answered: containerd's socket is there before the plugin is. The condition is polled, as kubelet does.
    pub fn await_ready(&self) -> Result<(), CriError> {
        let end = Instant::now() + READY;
        loop {
            let request = StatusRequest { verbose: false };
            match self.call("Status", |mut service| async move { service.status(request).await }) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > end => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Waits until the plugin knows an image that `ctr` has imported: it hears of it by an event.
    fn await_image(&self, name: &'static str) -> Result<(), CriError> {
        let end = Instant::now() + READY;
        loop {
            let image = ImageSpec { image: name.to_owned(), ..Default::default() };
            let request = ImageStatusRequest { image: Some(image), verbose: false };
            let mut service = ImageServiceClient::new(self.channel.clone());
            let status = self.answer("ImageStatus", service.image_status(request))?;
            if status.image.is_some() {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(CriError::NoImage(name));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Pulls an image.
    pub fn pull(&self, name: &str) -> Result<(), CriError> {
        let image = ImageSpec { image: name.to_owned(), ..Default::default() };
        let request = PullImageRequest { image: Some(image), ..Default::default() };
        let mut service = ImageServiceClient::new(self.channel.clone());
        self.answer("PullImage", service.pull_image(request))?;
        Ok(())
    }

    /// Ends containerd and everything of it. An error is what couldn't be removed.
    pub fn stop(self) -> Result<(), String> {
        let Self { channel, tokio, containerd, .. } = self;
        drop((channel, tokio));
        containerd.stop()
    }
}
