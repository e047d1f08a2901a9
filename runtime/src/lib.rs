//! Sandboxes: OCI spec to mount plan, freezer, checkpoint, restore, image; the `stillframe` command.
//!
//! Knows filesystems (`stillframe-tmpfs`), the OCI spec and the image directory; knows no ttrpc and no
//! containerd, and must never learn of them. Nothing here is async: callers that are give it a thread.

mod cgroup;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod doctor;
pub mod export;
pub mod filestores;
mod filesystems;
pub mod freezer;
pub mod hints;
pub mod image;
pub mod image_source;
pub mod images;
pub mod lazy;
pub mod manifest;
mod oci_runtime;
pub mod plan;
mod process;
pub mod processes;
pub mod restore;
pub mod sandbox;
mod selected;
pub mod selector;
pub mod spec;
pub mod state;
pub mod unlinked;
pub mod volumes;
