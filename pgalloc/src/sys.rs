//! The unsafe operations: mapping files, installing pages in them, and the io_uring.
//!
//! Two rules carry the safety. A mapping is owned by who reads it and unmapped when the last owner drops it; and a
//! write that the kernel has been given owns the memory it writes until its completion has been taken.

pub(crate) mod install;
pub(crate) mod mapping;
pub(crate) mod ring;
