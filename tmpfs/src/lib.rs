//! Filesystems: tmpfs mount options, mounting, ResourceIDs, walking, `tree.tar`.
//!
//! Knows pages (`stillframe-pgalloc`), the kernel's tmpfs, and ext4 on a file of the host; knows no container, no OCI spec and no
//! containerd, and must never learn of them. Nothing here is async.

pub mod acl;
pub mod archive;
pub mod build;
pub mod copy_up;
pub mod decode;
pub mod encode;
pub mod entry;
pub mod filestore;
mod first_names;
mod huge;
pub mod id_map;
pub mod lazy;
pub mod live;
mod member_name;
mod members;
pub mod mount;
pub mod mountpoint;
pub mod options;
pub mod pax;
pub mod private;
mod record;
pub mod resource;
pub mod save;
mod scan;
mod small;
mod stat;
mod sys;
mod walk;
mod xattr;

pub use id_map::{IdMap, IdMapping, Ids};
pub use resource::ResourceId;
