//! The kernel interfaces that no safe crate offers. The only place of this crate where `unsafe` stands.
pub(crate) mod descriptor;
pub(crate) mod filesystem;
pub(crate) mod handle;
pub(crate) mod lease;
pub(crate) mod loop_device;
pub(crate) mod mount;
