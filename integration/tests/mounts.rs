//! A tmpfs made by Stillframe looks as one made by runc: mountinfo, statfs and stat from inside the container,
//! for a table of options. The oracle is runc.

use stillframe_integration::{Containerd, Listing, RUNC, STILLFRAME, compare};

/// Options in `ctr`'s notation, that is, separated by colons; one mount each.
const OPTIONS: &[&str] = &[
    "",
    "size=64m",
    "size=10%",
    "size=65536k:mode=1777",
    "size=1g:mode=0700:uid=1000:gid=2000",
    "nr_blocks=100",
    "nr_inodes=50",
    "nr_inodes=0:size=0",
    "mode=755",
    "uid=4000000000",
    "huge=within_size",
    "huge=always:size=32m",
    "huge=never",
    "ro",
    "ro:size=4m",
    "rw:size=4m",
    "nosuid",
    "nodev:noexec",
    "nosuid:noexec:nodev:size=8m:mode=1777",
    "suid:exec:dev",
    "noatime",
    "relatime",
    "strictatime",
    "nodiratime",
    "noatime:nodiratime",
    "sync",
    "dirsync",
    "rprivate:size=4m",
    "rshared:size=4m",
    "rslave:size=4m",
    "nosymfollow",
    "noswap",
    "inode64",
    "mpol=local",
];

fn mounts_of(containerd: &Containerd, name: &str, runtime: &str, mounts: &[(&str, &str)]) -> Listing {
    let mut spec = containerd.container(name).runtime(runtime).arguments(&["probe", "mounts"]);
    for (path, options) in mounts {
        spec = spec.tmpfs(path, options);
    }
    let said = spec.run().unwrap();
    Listing::parse_mounts(&said.stdout).unwrap()
}

#[track_caller]
fn same(containerd: &Containerd, mounts: &[(&str, &str)]) -> Listing {
    let ours = mounts_of(containerd, "ours", STILLFRAME, mounts);
    let theirs = mounts_of(containerd, "theirs", RUNC, mounts);
    let differences: Vec<_> = compare(&theirs, &ours).iter().map(ToString::to_string).collect();
    assert!(
        differences.is_empty(),
        "before: runc, after: stillframe\n{}\nfor {mounts:?}",
        differences.join("\n")
    );
    ours
}

/// Some options a given kernel or runc doesn't know; then both runtimes have to refuse them, and this table
/// gets the rest.
fn understood_by_runc(containerd: &Containerd) -> Vec<(String, &'static str)> {
    let probe = |options: &'static str| {
        let spec = containerd.container("probe").runtime(RUNC).tmpfs("/m", options).arguments(&["true"]);
        spec.run().map(|_| ()).map_err(|error| error.to_string())
    };
    let mut known = Vec::new();
    for (index, options) in OPTIONS.iter().enumerate() {
        match probe(options) {
            Ok(()) => known.push((format!("/m/{index}"), *options)),
            Err(error) => println!(
                "runc refuses {options:?}: {}",
                error.lines().find(|line| line.starts_with("stderr")).unwrap_or_default()
            ),
        }
    }
    known
}

#[test]
fn every_option_looks_as_with_runc() {
    let containerd = Containerd::start().unwrap();
    let known = understood_by_runc(&containerd);
    assert!(known.len() > 25, "runc knows only {known:?}");
    let mounts: Vec<(&str, &str)> = known.iter().map(|(path, options)| (path.as_str(), *options)).collect();
    let ours = same(&containerd, &mounts);
    // The defaults of the spec are in it, too: /dev, /dev/shm, /run.
    assert!(ours.len() >= mounts.len() + 3, "{} of {}", ours.len(), mounts.len());
}

#[test]
fn mounts_below_and_above_each_other() {
    let containerd = Containerd::start().unwrap();
    same(
        &containerd,
        &[("/a", "size=1m"), ("/a/b", "size=2m"), ("/a/b/c/d", "size=3m"), ("/dev/shm", "size=4m:mode=0700")],
    );
}

#[test]
fn the_mount_point_may_be_missing_deep_or_a_symlink() {
    let containerd = Containerd::start().unwrap();
    // /var/run is a link in many images; here it isn't even a directory.
    same(
        &containerd,
        &[("/not/yet/there", "size=1m"), ("/tmp", "size=1m:mode=1777"), ("/etc/passwd.d/", "size=1m")],
    );
}

#[test]
fn tmpcopyup_copies_what_was_there() {
    let containerd = Containerd::start().unwrap();
    let listing = |runtime: &str, name: &str| {
        let spec = containerd.container(name).runtime(runtime).tmpfs("/etc", "size=4m:tmpcopyup");
        let container = spec.start().unwrap();
        let listing = container.list("/etc").unwrap();
        container.remove().unwrap();
        // runc doesn't keep times.
        listing.without("mtime").without("atime")
    };
    let (ours, theirs) = (listing(STILLFRAME, "ours"), listing(RUNC, "theirs"));
    assert!(theirs.contains("./passwd"));
    let differences: Vec<_> = compare(&theirs, &ours).iter().map(ToString::to_string).collect();
    assert!(differences.is_empty(), "before: runc, after: stillframe\n{}", differences.join("\n"));
}

#[test]
fn an_unknown_option_is_refused_by_name() {
    let containerd = Containerd::start().unwrap();
    let spec = containerd.container("c").tmpfs("/scratch", "size=1m:no-such-option=1").arguments(&["true"]);
    let error = spec.run().unwrap_err();
    assert!(error.stderr.contains("no-such-option"), "{error}");
    let residue = containerd.settled_residue();
    assert!(residue.is_empty(), "{residue}");
    // A value that isn't one, too.
    let error =
        containerd.container("c").tmpfs("/scratch", "size=many").arguments(&["true"]).run().unwrap_err();
    assert!(error.stderr.contains("size"), "{error}");
    let residue = containerd.settled_residue();
    assert!(residue.is_empty(), "{residue}");
}

#[test]
fn df_and_mount_say_the_same() {
    let containerd = Containerd::start().unwrap();
    let output = |runtime: &str, name: &str| {
        let line =
            "mount | grep tmpfs; df -k | grep tmpfs; df -i | grep tmpfs; stat -f /scratch | grep -v ID:";
        let spec =
            containerd.container(name).runtime(runtime).tmpfs("/scratch", "size=5m:nr_inodes=77:mode=1770");
        spec.arguments(&["sh", "-c", line]).run().unwrap().stdout
    };
    let (ours, theirs) = (output(STILLFRAME, "ours"), output(RUNC, "theirs"));
    assert!(theirs.contains("/scratch"), "{theirs}");
    assert_eq!(ours, theirs);
}
