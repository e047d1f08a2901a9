//! runc is the oracle: a tmpfs that runc mounts itself and one of ours that it bind-mounts look the
//! same from inside the container. Needs root, runc and a static busybox.
//!
//! `STILLFRAME_TEST_RUNC` names other runc binaries to compare with, separated by colons.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use stillframe_tmpfs::copy_up::{copy_up, open_in_root};
use stillframe_tmpfs::mount::{self, DefaultMode, TmpfsMount, mount_tmpfs};
use stillframe_tmpfs::options::TmpfsOptions;
use stillframe_tmpfs::{IdMap, IdMapping};

/// What the container tells of the mount at $D. Not told: ids of mounts, devices and filesystems.
const PROBE: &str = r#"
grep " $D[ /]" /proc/self/mountinfo | cut -d' ' -f4- | sed 's/shared:[0-9]*/shared:N/'
grep " $D[ /]" /proc/mounts
stat -f -c 'magic %t block %s blocks %b %f %a inodes %c %d name %l' $D
find $D | sort | while read f; do stat -c '%n: mode %f owner %u %g size %s device %t %T' $f; done
touch $D/new; echo touch $?
ln -s /proc/version $D/link; cat $D/link >$D/out; echo link $?
mknod $D/null c 1 3; cat $D/null; echo device $?
printf '#!/bin/busybox true' >$D/script; chmod 755 $D/script; $D/script; echo exec $?
"#;

struct Runc {
    path: PathBuf,
    /// What it does with the mode of a directory that exists.
    mode: fn(u32) -> DefaultMode,
}

impl Runc {
    fn find() -> Vec<Self> {
        let paths = std::env::var_os("STILLFRAME_TEST_RUNC").unwrap_or_else(|| "runc".into());
        std::env::split_paths(&paths).map(Self::at).collect()
    }

    fn at(path: PathBuf) -> Self {
        let output = Command::new(&path).arg("--version").output().expect("runc is installed");
        let version = String::from_utf8(output.stdout).expect("UTF-8");
        let number = version.split_whitespace().nth(2).expect("runc version NUMBER");
        let number = number.split(['+', '-']).next().expect("number");
        let parts: Vec<u32> = number.split('.').map(|part| part.parse().expect("number")).collect();
        let mode = if parts < vec![1, 1, 8] { DefaultMode::Chmod } else { DefaultMode::Option };
        Self { path, mode }
    }
}

/// A bundle with busybox in it, and a place for our mount that only root can enter.
struct Bundle {
    dir: tempfile::TempDir,
    ours: tempfile::TempDir,
}

impl Bundle {
    fn new() -> Self {
        let bundle =
            Self { dir: tempfile::tempdir().expect("tempdir"), ours: tempfile::tempdir().expect("tempdir") };
        fs::set_permissions(bundle.dir.path(), Permissions::from_mode(0o755)).expect("chmod");
        mount::make_private_mountpoint(bundle.ours.path()).expect("private mountpoint");
        for dir in ["bin", "proc", "dev", "have/sub"] {
            fs::create_dir_all(bundle.rootfs().join(dir)).expect("mkdir");
        }
        fs::copy("/bin/busybox", bundle.rootfs().join("bin/busybox")).expect("busybox-static is installed");
        let have = bundle.rootfs().join("have");
        fs::write(have.join("file"), "content").expect("written");
        fs::set_permissions(have.join("file"), Permissions::from_mode(0o640)).expect("chmod");
        chown(have.join("file"), Some(100_003), Some(100_004)).expect("chown");
        symlink("file", have.join("symlink")).expect("symlink");
        fs::set_permissions(&have, Permissions::from_mode(0o2751)).expect("chmod");
        chown(&have, Some(100_012), Some(100_013)).expect("chown");
        fs::set_permissions(&have, Permissions::from_mode(0o2751)).expect("chmod");
        bundle
    }

    fn rootfs(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    fn target(&self, name: &str) -> PathBuf {
        self.ours.path().join(name)
    }

    /// What the container prints, or what runc says instead of running it.
    fn run(&self, runc: &Path, case: &Case, mounts: &[Value]) -> Result<String, String> {
        let dir = self.dir.path();
        let _ = fs::remove_file(dir.join("config.json"));
        let made = Command::new(runc).args(["spec", "-b"]).arg(dir).status().expect("runc spec");
        assert!(made.success());
        let text = fs::read(dir.join("config.json")).expect("spec");
        let mut spec: Value = serde_json::from_slice(&text).expect("JSON");
        spec["process"]["terminal"] = json!(false);
        spec["process"]["args"] = json!(["/bin/busybox", "sh", "-c", PROBE]);
        spec["process"]["env"] = json!(["PATH=/bin", format!("D={}", case.destination)]);
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = json!(["CAP_MKNOD", "CAP_DAC_OVERRIDE"]);
        }
        for set in ["inheritable", "ambient"] {
            spec["process"]["capabilities"][set] = json!([]);
        }
        spec["root"]["readonly"] = json!(false);
        spec.as_object_mut().expect("object").remove("hostname");
        spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "pid"}]);
        if case.user_namespace {
            let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
            spec["linux"]["uidMappings"] = map.clone();
            spec["linux"]["gidMappings"] = map;
            spec["linux"]["namespaces"].as_array_mut().expect("array").push(json!({"type": "user"}));
        }
        spec["linux"]["rootfsPropagation"] = json!(case.rootfs_propagation);
        let all = spec["mounts"].as_array_mut().expect("array");
        all.retain(|mount| mount["destination"] == "/proc" || mount["destination"] == "/dev");
        all.extend_from_slice(mounts);
        fs::write(dir.join("config.json"), spec.to_string()).expect("written");
        let id = dir.file_name().and_then(OsStr::to_str).expect("UTF-8").trim_start_matches('.');
        let output = Command::new(runc)
            .arg("--root")
            .arg(dir.join("state"))
            .args(["run", "-b"])
            .arg(dir)
            .arg(format!("stillframe-{id}"))
            .stdin(Stdio::null())
            .output()
            .expect("runc run");
        // runc makes a mountpoint that is missing; the next run is to find it missing again.
        let _ = fs::remove_dir(self.rootfs().join("missing"));
        if output.stdout.is_empty() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        Ok(String::from_utf8(output.stdout).expect("UTF-8"))
    }

    fn plain(&self, runc: &Runc, case: &Case) -> Result<String, String> {
        let mut mount = json!({"destination": case.destination, "type": "tmpfs", "options": case.options});
        if let Some(source) = case.source {
            mount["source"] = json!(source);
        }
        let mut mounts = vec![mount];
        if case.nested {
            mounts
                .push(json!({"destination": case.nested_destination(), "type": "tmpfs", "source": "inner"}));
        }
        self.run(&runc.path, case, &mounts)
    }

    fn ours(&self, runc: &Runc, case: &Case) -> Result<String, String> {
        let map = match case.user_namespace {
            true => IdMap(vec![IdMapping { container: 0, host: 100_000, size: 65536 }]),
            false => IdMap::default(),
        };
        let options: Vec<String> = case.options.iter().map(ToString::to_string).collect();
        let options = TmpfsOptions::parse(&options).map_err(|error| error.to_string())?;
        let below = open_in_root(&self.rootfs(), case.destination).expect("looked up");
        let mode = below.as_ref().map(|dir| dir.metadata().expect("stat").permissions().mode() & 0o7777);
        let request = TmpfsMount {
            options: &options,
            source: case.source,
            default_mode: mode.map_or(DefaultMode::Absent, runc.mode),
            uid_map: &map,
            gid_map: &map,
            label: None,
        };
        let target = self.target("outer");
        fs::create_dir_all(&target).expect("mkdir");
        mount_tmpfs(&request, &target).map_err(|error| error.to_string())?;
        let root = mount::open_root(&target).expect("root");
        if let (true, Some(below)) = (options.copy_up, &below) {
            copy_up(below, &root).expect("copied");
        }
        let bind = |destination: &str, source: &Path, options: Vec<String>| json!({"destination": destination, "type": "bind", "source": source, "options": options});
        let mut mounts = vec![bind(case.destination, &target, options.bind_options())];
        if case.nested {
            // runc mounts it while its own tmpfs is still writable; a bind mount is read-only at once,
            // so its mountpoint has to be there. It counts as missing all the same: the mode is 1777.
            let mode = nix::sys::stat::Mode::from_bits_truncate(0o755);
            nix::sys::stat::mkdirat(&root, "nested", mode).expect("mkdir");
            let options = TmpfsOptions::default();
            let inner = self.target("inner");
            fs::create_dir_all(&inner).expect("mkdir");
            let request = TmpfsMount {
                options: &options,
                source: Some("inner"),
                default_mode: DefaultMode::Absent,
                ..request
            };
            mount_tmpfs(&request, &inner).map_err(|error| error.to_string())?;
            mounts.push(bind(&case.nested_destination(), &inner, options.bind_options()));
        }
        let result = self.run(&runc.path, case, &mounts);
        mount::unmount(&target).expect("unmounted");
        mount::unmount(&self.target("inner")).expect("unmounted");
        result
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        for name in ["outer", "inner"] {
            mount::unmount(&self.target(name)).expect("unmounted");
        }
        mount::unmount(self.ours.path()).expect("unmounted");
    }
}

#[derive(Clone, Debug)]
struct Case {
    destination: &'static str,
    options: &'static [&'static str],
    source: Option<&'static str>,
    user_namespace: bool,
    nested: bool,
    rootfs_propagation: &'static str,
}

impl Case {
    fn of(options: &'static [&'static str]) -> Self {
        Self {
            destination: "/have",
            options,
            source: Some("tmpfs"),
            user_namespace: false,
            nested: false,
            rootfs_propagation: "",
        }
    }

    fn nested_destination(&self) -> String {
        format!("{}/nested", self.destination)
    }
}

const OPTIONS: &[&[&str]] = &[
    &[],
    &["size=1m"],
    &["size=10%", "nr_inodes=1k"],
    &["size=0", "nr_inodes=0"],
    &["nr_blocks=1k", "size=1m"],
    &["size=1m", "nr_blocks=1k"],
    &["size=1m,mode=700", "", "uid=5"],
    &["mode=700"],
    &["mode=1777"],
    &["mode=12345670"],
    &["uid=5", "gid=0x10"],
    &["huge=always"],
    &["huge=within_size", "huge=advise"],
    &["mpol=interleave:0"],
    &["inode64"],
    &["inode64", "inode32"],
    &["nosuid", "nodev", "noexec"],
    &["nosuid", "suid", "nodev", "dev", "noexec", "exec"],
    &["rw"],
    &["ro"],
    &["ro", "size=1m", "nosuid", "mode=755"],
    &["noatime"],
    &["nodiratime"],
    &["nodiratime", "norelatime"],
    &["relatime"],
    &["norelatime"],
    &["strictatime"],
    &["strictatime", "nostrictatime"],
    &["strictatime", "nodiratime", "ro"],
    &["noatime", "strictatime"],
    &["noatime", "relatime"],
    &["noatime", "atime"],
    &["nosymfollow"],
    &["nosymfollow", "symfollow"],
    &["sync"],
    &["sync", "async"],
    &["dirsync", "ro"],
    &["mand"],
    &["lazytime"],
    &["silent", "iversion"],
    &["rro", "rnosuid", "rnoexec", "rnoatime"],
    &["private"],
    &["rprivate"],
    &["slave"],
    &["rslave"],
    &["shared"],
    &["rshared", "ro"],
    &["unbindable"],
    &["runbindable", "private"],
    &["slave", "shared"],
];

fn compare(runc: &Runc, bundle: &Bundle, case: &Case) {
    let plain = bundle.plain(runc, case);
    let plain = plain.unwrap_or_else(|error| panic!("{case:?}: {} fails: {error}", runc.path.display()));
    assert!(plain.contains(&format!(" {} ", case.destination)), "{case:?}: {plain}");
    let ours = bundle.ours(runc, case).unwrap_or_else(|error| panic!("{case:?}: ours fails: {error}"));
    assert_eq!(ours, plain, "{case:?} with {}: ours, runc's", runc.path.display());
}

#[test]
fn a_container_cannot_tell_our_mount_from_runcs() {
    let bundle = Bundle::new();
    for runc in &Runc::find() {
        for options in OPTIONS {
            compare(runc, &bundle, &Case::of(options));
            compare(runc, &bundle, &Case { destination: "/missing", ..Case::of(options) });
            compare(runc, &bundle, &Case { user_namespace: true, ..Case::of(options) });
        }
        compare(runc, &bundle, &Case::of(&["noswap"]));
        compare(runc, &bundle, &Case::of(&["tmpcopyup"]));
        compare(runc, &bundle, &Case::of(&["tmpcopyup", "mode=700", "ro"]));
        compare(runc, &bundle, &Case { user_namespace: true, ..Case::of(&["tmpcopyup"]) });
        for rootfs_propagation in ["shared", "slave", "private"] {
            for options in [&[][..], &["rslave"], &["rshared"], &["private"]] {
                compare(runc, &bundle, &Case { rootfs_propagation, ..Case::of(options) });
            }
        }
        for source in [None, Some(""), Some("none"), Some("my vol")] {
            compare(runc, &bundle, &Case { source, ..Case::of(&[]) });
        }
    }
}

#[test]
fn a_mount_below_a_read_only_one_looks_the_same_once_its_directory_is_there() {
    let bundle = Bundle::new();
    for runc in &Runc::find() {
        for options in [&[][..], &["ro"], &["rshared"], &["tmpcopyup", "ro"]] {
            compare(runc, &bundle, &Case { nested: true, ..Case::of(options) });
        }
    }
}

#[test]
fn what_runc_refuses_is_refused() {
    let bundle = Bundle::new();
    let refused: &[&[&str]] = &[
        &["size"],
        &["size="],
        &["size=1x"],
        &["size=08"],
        &["size=-1"],
        &["nr_inodes=10%"],
        &["nr_inodes=99999999999999999"],
        &["nr_blocks=x"],
        &["mode=0x1f"],
        &["mode=8"],
        &["uid=-1"],
        &["uid=4294967295"],
        &["gid=root"],
        &["huge=deny"],
        &["huge=force"],
        &["huge="],
        &["mpol=bind:4095"],
        &["mpol=nonsense"],
        &["inode64=1"],
        &["size=1m,noexec"],
        &["source=x"],
        &["x-mine"],
        &["context=no_such_label"],
    ];
    for runc in &Runc::find() {
        for options in refused {
            let case = Case::of(options);
            bundle.plain(runc, &case).expect_err(&format!("runc refuses {options:?}"));
            let error = bundle.ours(runc, &case).expect_err(&format!("we refuse {options:?}"));
            let name = options[0].rsplit_once(',').map_or(options[0], |(_, last)| last);
            assert!(error.contains(name), "{options:?}: {error}");
        }
        let case = Case { user_namespace: true, ..Case::of(&["noswap"]) };
        bundle.plain(runc, &case).expect_err("runc refuses noswap in a user namespace");
        let error = bundle.ours(runc, &case).expect_err("we refuse it");
        assert!(error.contains("\"noswap\""), "{error}");
    }
}
