//! An image registry on the loopback interface, with one image, which a containerd already has in its content store.
//!
//! containerd pulls an image that it makes a container of from an archive, even one that it has. Three paths of the
//! distribution API are enough, too few for a server crate: `/v2/`, `/v2/NAME/manifests/REF`, `/v2/NAME/blobs/DIGEST`. Serves one
//! connection after the other until it is dropped.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use stillframe_integration::{Containerd, ContainerdVersion, LookError, image, skip};

use crate::Cri;

/// The image's name in the registry.
const NAME: &str = "probe";
/// How long a client may take with its request.
const PATIENCE: Duration = Duration::from_secs(10);

/// First byte of a client's greeting in TLS.
const TLS_HANDSHAKE: u8 = 22;

/// Why there is no registry.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The image.
    #[error(transparent)]
    Image(#[from] LookError),
    /// The socket.
    #[error("listening on the loopback interface: {0}")]
    Listen(#[from] io::Error),
}

/// The registry; it ends when this is dropped.
#[derive(Debug)]
pub struct Registry {
    address: SocketAddr,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A containerd that makes a container of an archive that is given as its image, and a registry with the base image, which it has to
/// pull again by its digest. Only 2.1 does so unless told to; where there is none, that is printed.
pub fn with_archives(test: &str) -> Option<(Cri, Registry)> {
    let version = ContainerdVersion::or_skip("2", test)?;
    if version.numbers() != (2, 1) {
        skip::skipped(test, &format!("containerd {:?} doesn't do it unless told to", version.numbers()));
        return None;
    }
    let cri = Cri::start(&version).unwrap_or_else(|error| panic!("{error}"));
    let registry = Registry::start(cri.containerd(), image::NAME);
    let registry = registry.unwrap_or_else(|error| panic!("{error}"));
    cri.pull(&registry.name()).unwrap_or_else(|error| panic!("{error}"));
    Some((cri, registry))
}

/// What it serves.
struct Content {
    /// Digest of the manifest.
    manifest: String,
    /// The content store's directory of blobs.
    blobs: PathBuf,
}

impl Registry {
    /// Serves the image that containerd knows as `image`.
    pub fn start(containerd: &Containerd, image: &str) -> Result<Self, RegistryError> {
        let manifest = containerd.image_digest(image)?;
        let content = Content { manifest, blobs: containerd.blob("") };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let ended = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ended);
        let thread = thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if seen.load(Ordering::Relaxed) {
                    return;
                }
                // Who hangs up has seen enough.
                let _ = content.answer(&stream);
            }
        });
        Ok(Self { address, ended, thread: Some(thread) })
    }

    /// The name to pull the image by.
    pub fn name(&self) -> String {
        format!("localhost:{}/{NAME}:latest", self.address.port())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // One more connection, so that it looks; if there is none, the thread has ended.
        let _ = TcpStream::connect(self.address);
        let thread = self.thread.take().expect("only drop takes it");
        assert!(thread.join().is_ok() || thread::panicking(), "the registry's thread has panicked");
    }
}

impl Content {
    fn answer(&self, mut stream: &TcpStream) -> io::Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut reader = BufReader::new(stream);
        if reader.fill_buf()?.first() == Some(&TLS_HANDSHAKE) {
            // By this answer containerd knows that it has to do without TLS.
            return stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
        }
        let mut lines = reader.lines();
        let request = lines.next().transpose()?.unwrap_or_default();
        // The headers end with an empty line.
        for line in lines {
            if line?.is_empty() {
                break;
            }
        }
        let mut words = request.split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (status, kind, digest, body) = match self.find(path) {
            Some((kind, digest, body)) => ("200 OK", kind, digest, body),
            None => ("404 Not Found", "text/plain".to_owned(), String::new(), Vec::new()),
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nDocker-Content-Digest: {digest}\r\n\
             Connection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        if method == "GET" {
            stream.write_all(&body)?;
        }
        Ok(())
    }

    /// Media type, digest and bytes of what a path is the name of.
    fn find(&self, path: &str) -> Option<(String, String, Vec<u8>)> {
        let path = path.split('?').next()?.strip_prefix("/v2/")?;
        if path.is_empty() {
            return Some(("application/json".to_owned(), String::new(), Vec::new()));
        }
        let (what, name) = path.strip_prefix(NAME)?.strip_prefix('/')?.split_once('/')?;
        let manifest = what == "manifests";
        let digest = if manifest && name == "latest" { &self.manifest } else { name };
        let hex =
            digest.strip_prefix("sha256:").filter(|hex| hex.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
        let kind =
            if manifest { "application/vnd.oci.image.manifest.v1+json" } else { "application/octet-stream" };
        Some((kind.to_owned(), digest.to_owned(), fs::read(self.blobs.join(hex)).ok()?))
    }
}
