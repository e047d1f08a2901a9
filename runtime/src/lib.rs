//! Sandboxes: OCI spec to mount plan, freezer, checkpoint, restore, image; the `stillframe` command.
//!
//! Knows filesystems (`stillframe-tmpfs`), the OCI spec and the image directory; knows no ttrpc and no
//! containerd, and must never learn of them. Nothing here is async: callers that are give it a thread.

pub mod sandbox;
