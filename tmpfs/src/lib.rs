//! Filesystems: tmpfs mount options, mounting, ResourceIDs, walking, `tree.tar`.
//!
//! Knows pages (`stillframe-pgalloc`) and the kernel's tmpfs; knows no container, no OCI spec and no
//! containerd, and must never learn of them. Nothing here is async.

pub mod copy_up;
pub mod id_map;
pub mod mount;
pub mod options;
pub mod resource;
mod sys;

pub use id_map::{IdMap, IdMapping};
pub use resource::ResourceId;
