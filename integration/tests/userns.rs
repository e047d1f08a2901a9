//! Containers with a user namespace: the tmpfs belongs to the container's root, whatever that is outside.

use stillframe_integration::{Container, Containerd, RUNC, STILLFRAME, compare};

/// Whether the installed `ctr` can set one up, and containerd can remap the image's files.
fn spec<'a>(
    containerd: &'a Containerd,
    name: &str,
    runtime: &str,
) -> stillframe_integration::ContainerSpec<'a> {
    containerd
        .container(name)
        .runtime(runtime)
        .option("--uidmap=0:200000:65536")
        .option("--gidmap=0:300000:65536")
        .tmpfs("/scratch", "size=16m:mode=1750:uid=1000:gid=5")
}

fn start<'a>(containerd: &'a Containerd, name: &str, runtime: &str) -> Container<'a> {
    // Paths up to the private containerd's directory must be searchable for the mapped root.
    spec(containerd, name, runtime).start().unwrap()
}

#[test]
fn mounts_and_owners_are_as_with_runc() {
    let containerd = Containerd::start().unwrap();
    let mut seen = Vec::new();
    for (name, runtime) in [("theirs", RUNC), ("ours", STILLFRAME)] {
        let container = start(&containerd, name, runtime);
        let mounts = container.exec(&["probe", "mounts"]).unwrap().stdout;
        container.shell("id -u > /scratch/id; mkdir /scratch/d; chown 7:8 /scratch/d").unwrap();
        let listing = container.list("/scratch").unwrap().without("mtime").without("atime");
        seen.push((stillframe_integration::Listing::parse_mounts(&mounts).unwrap(), listing));
        container.remove().unwrap();
    }
    let [(theirs, their_files), (ours, our_files)] = seen.as_slice() else { unreachable!("two runtimes") };
    assert_eq!(compare(theirs, ours), []);
    assert_eq!(compare(their_files, our_files), []);
    assert_eq!(our_files.get("./d", "uid"), Some("7"));
    assert_eq!(our_files.get("./id", "uid"), Some("0"));
    assert_eq!(our_files.get(".", "uid"), Some("1000"));
}
