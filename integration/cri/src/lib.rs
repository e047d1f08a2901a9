//! A kubelet for tests: what it asks of containerd's CRI plugin, and how it lays out a pod's memory-backed volumes. And
//! a client of containerd's task service, for what `ctr` can't ask.
//!
//! [`Cri`] is the client of one private containerd, [`Pod`] and [`PodContainer`] are what it runs, [`MemoryVolume`] is an
//! `emptyDir` of medium Memory,
//! [`Registry`] is what images are pulled from, [`Tasks`] is the task service. Calls block. Like the rest of the tests it knows Stillframe from outside only.

pub mod client;
pub mod pod;
pub mod registry;
pub mod tasks;
pub mod volume;

/// The CRI API, `runtime.v1`, generated from `proto/runtime.proto`.
#[expect(missing_docs, clippy::all, reason = "generated")]
pub mod api {
    tonic::include_proto!("runtime.v1");
}

/// containerd's task service, `containerd.services.tasks.v1`, with the types that it uses. Generated; the nesting is that of
/// the packages.
#[expect(missing_docs, reason = "generated")]
#[allow(clippy::all, reason = "generated")]
pub mod containerd {
    pub mod services {
        pub mod tasks {
            pub mod v1 {
                tonic::include_proto!("containerd.services.tasks.v1");
            }
        }
    }
    pub mod types {
        tonic::include_proto!("containerd.types");
    }
    pub mod v1 {
        pub mod types {
            tonic::include_proto!("containerd.v1.types");
        }
    }
}

pub use client::{Cri, CriError};
pub use pod::{Pod, PodContainer, PodContainerSpec, PodSpec, State};
pub use registry::Registry;
pub use tasks::Tasks;
pub use volume::MemoryVolume;
