//! Tests against the real thing: a private containerd, real runc, the kernel's own tmpfs.
//!
//! [`Containerd`] is one private containerd with root, state, socket and namespace of its own; [`Ctr`] and
//! [`Container`] drive it; [`image`] makes what it runs, [`Listing`] says what a container sees, [`Residue`]
//! what is left. Whatever ends the process, [`watchdog`] cleans up: the one place that does.
//!
//! Knows containerd, runc and Linux from outside only: nothing here links Stillframe's own crates, so
//! what these tests prove is proved of the programs that get installed.

pub mod alter;
pub mod binaries;
pub mod checkpoint;
pub mod config;
pub mod container;
pub mod containerd;
pub mod criu;
pub mod ctr;
pub mod image;
pub mod listing;
pub mod reads;
pub mod residue;
pub mod skip;
pub mod version;
pub mod watchdog;

pub use checkpoint::{LastCheckpoint, LookError};
pub use config::Services;
pub use container::{Container, ContainerSpec};
pub use containerd::Containerd;
pub use ctr::{Background, Ctr, CtrError};
pub use listing::{Difference, Listing, assert_same, compare};
pub use residue::Residue;
pub use version::ContainerdVersion;

/// The runtime under test.
pub const STILLFRAME: &str = "io.containerd.stillframe.v1";

/// The runtime that it has to behave like.
pub const RUNC: &str = "io.containerd.runc.v2";

/// Makes two tests of each function that takes a runtime's name: one with runc's own shim, one with ours.
#[macro_export]
macro_rules! with_both_runtimes {
    ($($name:ident),* $(,)?) => {
        mod runc {
            $(#[test] fn $name() { super::$name($crate::RUNC) })*
        }
        mod stillframe {
            $(#[test] fn $name() { super::$name($crate::STILLFRAME) })*
        }
    };
}
