//! `containerd-shim-stillframe-v1`: the containerd shim.
fn main() {}
