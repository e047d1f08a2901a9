//! Containers with a user namespace: the tmpfs belongs to the container's root, whatever that is outside.

use stillframe_integration::{
    Container, ContainerSpec, Containerd, ContainerdVersion, Listing, RUNC, STILLFRAME, compare,
};

fn mapped<'a>(containerd: &'a Containerd, name: &str, runtime: &str) -> ContainerSpec<'a> {
    let spec = containerd.container(name).runtime(runtime);
    spec.option("--uidmap=0:200000:65536").option("--gidmap=0:300000:65536")
}

#[test]
fn mounts_and_owners_are_as_with_runc() {
    let containerd = Containerd::start().unwrap();
    let mut seen = Vec::new();
    for (name, runtime) in [("theirs", RUNC), ("ours", STILLFRAME)] {
        let container = mapped(&containerd, name, runtime)
            .tmpfs("/scratch", "size=16m:mode=1750:uid=1000:gid=5")
            .start()
            .unwrap();
        let mounts = container.exec(&["probe", "mounts"]).unwrap().stdout;
        container.shell("id -u > /scratch/id; mkdir /scratch/d; chown 7:8 /scratch/d").unwrap();
        let listing = container.list("/scratch").unwrap().without("mtime").without("atime");
        seen.push((Listing::parse_mounts(&mounts).unwrap(), listing));
        container.remove().unwrap();
    }
    let [(theirs, their_files), (ours, our_files)] = seen.as_slice() else { unreachable!("two runtimes") };
    assert_eq!(compare(theirs, ours), []);
    assert_eq!(compare(their_files, our_files), []);
    assert_eq!(our_files.get("./d", "uid"), Some("7"));
    assert_eq!(our_files.get("./id", "uid"), Some("0"));
    assert_eq!(our_files.get(".", "uid"), Some("1000"));
}

/// containerd 2 needn't change the owners of all files of an image: the shim mounts it with mapped ids.
#[test]
fn a_root_filesystem_with_mapped_ids_is_as_with_runc() {
    const TEST: &str = "a_root_filesystem_with_mapped_ids_is_as_with_runc";
    let Some(version) = ContainerdVersion::or_skip("2", TEST) else { return };
    let containerd = Containerd::start_version(&version).unwrap();
    let mut seen = Vec::new();
    for (name, runtime) in [("theirs", RUNC), ("ours", STILLFRAME)] {
        let container = mapped(&containerd, name, runtime).option("--remap-labels").start().unwrap();
        let lines = "cat /proc/self/uid_map; stat -c '%n %u %g %a' / /bin /bin/probe /etc/passwd; echo x > /etc/new; \
            chown 5:6 /etc/passwd; stat -c '%n %u %g' /etc/*; grep -c ' / overlay' /proc/mounts";
        seen.push(container.shell(lines).unwrap().stdout);
        container.remove().unwrap();
    }
    assert!(seen[0].contains("/bin/probe 0 0 755") && seen[0].contains("/etc/passwd 5 6"), "{}", seen[0]);
    assert_eq!(seen[0], seen[1]);
    let left =
        std::fs::read_dir("/run/stillframe").into_iter().flatten().flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with("lower-")).collect();
    assert!(left.is_empty(), "{left:?}");
    let residue = containerd.settled_residue();
    assert!(residue.is_empty(), "{residue}");
}

#[test]
fn owners_are_the_containers_own_after_a_restore() {
    let containerd = Containerd::start().unwrap();
    // The mount point is in the image: containerd's restore doesn't map the owners of the new root filesystem, so
    // nothing can be created in it.
    let container = mapped(&containerd, "c", STILLFRAME).tmpfs("/tmp", "size=16m").start().unwrap();
    let said = container.exec(&["probe", "fill", "/tmp", "--seed", "9"]).unwrap();
    // Devices, trusted.*, and ids that the namespace doesn't have.
    assert!(said.stdout.contains("left out") && said.stdout.contains("filled"), "{said:?}");
    let before = container.list("/tmp").unwrap();
    containerd.checkpoint(container.id(), "stillframe.test/checkpoint:userns").unwrap();
    container.remove().unwrap();
    let container = Container::restore(&containerd, "r", "stillframe.test/checkpoint:userns").unwrap();
    assert_eq!(compare(&before, &container.list("/tmp").unwrap()), []);
    assert_eq!(before.get("./attributes/owner-1-2", "uid"), Some("1"));
    container.remove().unwrap();
    let residue = containerd.settled_residue();
    assert!(residue.is_empty(), "{residue}");
}
