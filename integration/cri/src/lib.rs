//! A kubelet for tests: what it asks of containerd's CRI plugin, and how it lays out a pod's memory-backed volumes.
//!
//! [`Cri`] is the client of one private containerd, [`Pod`] and [`PodContainer`] are what it runs, [`MemoryVolume`] is an
//! `emptyDir` of medium Memory,
//! [`Registry`] is what images are pulled from. Calls block. Like the rest of the tests it knows Stillframe from outside only.

pub mod client;
pub mod pod;
pub mod registry;
pub mod volume;

/// The CRI API, `runtime.v1`, generated from `proto/runtime.proto`.
#[expect(missing_docs, clippy::all, reason = "generated")]
pub mod api {
    tonic::include_proto!("runtime.v1");
}

pub use client::{Cri, CriError};
pub use pod::{Pod, PodContainer, PodSpec, State};
pub use registry::Registry;
pub use volume::MemoryVolume;
