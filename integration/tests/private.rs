//! Filesystems on disk and filesystems that a pod shares, through containerd: as seen from inside, before and after.

use std::path::PathBuf;

use stillframe_integration::{Container, ContainerSpec, Containerd, compare};

const CHECKPOINT: &str = "stillframe.test/checkpoint:1";
const FILESTORE: &str = "/var/lib/stillframe/filestore";

#[track_caller]
fn nothing_left(containerd: &Containerd) {
    containerd.assert_nothing_left();
    let files = PathBuf::from(FILESTORE).join(containerd.namespace());
    assert!(!files.exists(), "{}", files.display());
}

/// With a hint for the mounts whose source is `source`.
fn hinted<'a>(
    spec: ContainerSpec<'a>,
    source: &str,
    medium: &str,
    share: &str,
    options: &str,
) -> ContainerSpec<'a> {
    [("source", source), ("medium", medium), ("share", share), ("options", options)]
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .fold(spec, |spec, (field, value)| {
            spec.annotation(&format!("dev.stillframe.mount.vol.{field}"), value)
        })
}

#[track_caller]
fn same(containerd: &Containerd, container: &Container<'_>, before: &stillframe_integration::Listing) {
    let differences: Vec<_> =
        compare(before, &container.list("/data").unwrap()).iter().map(ToString::to_string).collect();
    assert!(differences.is_empty(), "{}\n{}", differences.join("\n"), containerd.log());
}

#[test]
fn a_disk_backed_volume_survives_its_container() {
    let containerd = Containerd::start().unwrap();
    let spec =
        containerd.container("c").option("--cap-add=CAP_SYS_ADMIN").option("--cap-add=CAP_LINUX_IMMUTABLE");
    let spec = hinted(spec, "/nosuch/emptydir", "disk", "container", "size=256m");
    let spec = spec.option("--mount=type=bind,src=/nosuch/emptydir,dst=/data,options=rbind:rw");
    let container = spec.start().unwrap();
    assert!(container.shell("grep -q ' /data .* ext4 ' /proc/self/mountinfo").is_ok());
    assert_eq!(container.shell("ls -A /data; stat -c %a /data").unwrap().stdout, "1777\n");
    let script = "cd /data && mkdir -p a/b && echo x > a/b/file && ln a/b/file hard && ln -s nowhere link && \
                  mkfifo fifo && dd if=/dev/urandom of=large bs=1M count=20 && truncate -s 1G sparse && chmod 4711 large";
    container.shell(script).unwrap();
    let before = container.list("/data").unwrap();
    containerd.checkpoint(container.id(), CHECKPOINT).unwrap();
    // It runs on, thawed.
    container.shell("echo more > /data/more && rm /data/more && sync").unwrap();
    let full = container.shell("dd if=/dev/zero of=/data/full bs=1M count=400").unwrap_err();
    assert!(full.stderr.contains("No space left on device"), "{full}");
    container.remove().unwrap();
    nothing_left(&containerd);

    let container = Container::restore(&containerd, "restored", CHECKPOINT).unwrap();
    same(&containerd, &container, &before);
    container.shell("echo more > /data/more").unwrap();
    container.remove().unwrap();
    nothing_left(&containerd);
    containerd.stop().unwrap();
}

#[test]
fn containers_of_a_pod_share_a_volume() {
    let containerd = Containerd::start().unwrap();
    for medium in ["disk", "memory"] {
        let sandbox = containerd.id(&format!("{medium}-a"));
        let spec = |name: &str| {
            let spec = containerd.container(&format!("{medium}-{name}"));
            let spec = spec.annotation("io.kubernetes.cri.sandbox-id", &sandbox);
            hinted(spec, "/nosuch/shared", medium, "pod", "size=64m")
                .option("--mount=type=bind,src=/nosuch/shared,dst=/data,options=rbind:rw")
        };
        let (first, second) = (spec("a").start().unwrap(), spec("b").start().unwrap());
        first.shell("echo from a > /data/file").unwrap();
        assert_eq!(second.shell("cat /data/file").unwrap().stdout, "from a\n");
        let checkpoint = format!("stillframe.test/{medium}:1");
        containerd.checkpoint(second.id(), &checkpoint).unwrap();
        second.shell("echo from b > /data/file").unwrap();
        assert_eq!(first.shell("cat /data/file").unwrap().stdout, "from b\n");
        second.remove().unwrap();
        assert_eq!(first.shell("cat /data/file").unwrap().stdout, "from b\n");
        first.remove().unwrap();
        nothing_left(&containerd);
        // Alone in a sandbox that is the first one's by name, it brings the volume back.
        let container = Container::restore(&containerd, &format!("{medium}-restored"), &checkpoint).unwrap();
        assert_eq!(container.shell("cat /data/file").unwrap().stdout, "from a\n");
        container.remove().unwrap();
        nothing_left(&containerd);
    }
    containerd.stop().unwrap();
}

#[test]
fn a_bad_hint_is_an_error_that_names_it() {
    let containerd = Containerd::start().unwrap();
    let spec = hinted(containerd.container("c"), "/nosuch", "tape", "pod", "");
    let error = spec.run().unwrap_err();
    assert!(
        error.stderr.contains("dev.stillframe.mount.vol.medium=\"tape\": expected disk or memory"),
        "{error}"
    );
    containerd.ctr().run(&["containers", "delete", spec.id()]).ok();
    nothing_left(&containerd);
    containerd.stop().unwrap();
}
