//! The harness itself, against runc's own shim: what it starts works, what it leaves is nothing.

use stillframe_integration::{Containerd, RUNC, compare};

#[test]
fn a_container_runs_and_leaves_nothing() {
    let containerd = Containerd::start().unwrap();
    let said = containerd.container("once").runtime(RUNC).arguments(&["echo", "hello"]).run().unwrap();
    assert_eq!(said.stdout, "hello\n");
    let container = containerd.container("c").runtime(RUNC).tmpfs("/scratch", "size=64m").start().unwrap();
    let filled = container.exec(&["probe", "fill", "/scratch", "--seed", "1", "--beyond-path-max"]).unwrap();
    println!("{}", filled.stdout);
    let before = container.list("/scratch").unwrap();
    let after = container.list("/scratch").unwrap();
    assert_eq!(compare(&before, &after), []);
    assert!(before.len() > 400, "{}", before.len());
    assert!(!containerd.residue().is_empty());
    assert_eq!(container.status().unwrap().as_deref(), Some("RUNNING"));
    container.remove().unwrap();
    let residue = containerd.settled_residue();
    assert!(residue.is_empty(), "{residue}");
    containerd.stop().unwrap();
}
