//! Mounting on a real kernel: each option takes effect, refusals name the option, views show the
//! filesystem and nothing else, copy-up copies what runc copies. Needs root.

use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::sys::stat::{SFlag, major, makedev, minor};
use stillframe_tmpfs::copy_up::{self, CopyUpError, copy_up, open_in_root};
use stillframe_tmpfs::mount::{self, DefaultMode, MountError, TmpfsMount, mount_tmpfs};
use stillframe_tmpfs::options::TmpfsOptions;
use stillframe_tmpfs::{IdMap, IdMapping};

/// A private directory to mount in; what is mounted at its entries is unmounted at the end.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        mount::make_private_mountpoint(dir.path()).expect("private mountpoint");
        Self(dir)
    }

    fn dir(&self, name: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(&path).expect("mkdir");
        path
    }

    fn mount(&self, name: &str, options: &[&str]) -> PathBuf {
        let path = self.dir(name);
        mount_at(&path, options).expect("mounted");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.0.path()).expect("readable").flatten() {
            mount::unmount(&entry.path()).expect("unmounted");
        }
        mount::unmount(self.0.path()).expect("unmounted");
    }
}

fn options(list: &[&str]) -> TmpfsOptions {
    let list: Vec<String> = list.iter().map(ToString::to_string).collect();
    TmpfsOptions::parse(&list).expect("valid options")
}

fn mount_at(path: &Path, list: &[&str]) -> Result<(), MountError> {
    mount_tmpfs(&request(&options(list)), path)
}

fn request(options: &TmpfsOptions) -> TmpfsMount<'_> {
    const IDENTITY: &IdMap = &IdMap(Vec::new());
    TmpfsMount {
        options,
        source: Some("tmpfs"),
        default_mode: DefaultMode::Absent,
        uid_map: IDENTITY,
        gid_map: IDENTITY,
        label: None,
    }
}

/// The line of mountinfo of the mount at `path`, from the mount options on.
fn mountinfo(path: &Path) -> String {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let path = path.to_str().expect("UTF-8");
    let line = mounts.lines().rfind(|line| line.split(' ').nth(4) == Some(path)).expect("is mounted");
    line.splitn(6, ' ').nth(5).expect("fields").to_owned()
}

#[test]
fn each_option_takes_effect() {
    let scratch = Scratch::new();
    for (list, want) in [
        (&[][..], "rw,relatime - tmpfs tmpfs rw"),
        (&["size=1m"], "rw,relatime - tmpfs tmpfs rw,size=1024k"),
        (&["size=1m", "nr_blocks=1k"], "rw,relatime - tmpfs tmpfs rw,size=4096k"),
        (&["nr_inodes=1k"], "rw,relatime - tmpfs tmpfs rw,nr_inodes=1024"),
        (&["mode=2750"], "rw,relatime - tmpfs tmpfs rw,mode=2750"),
        (&["uid=0x10", "gid=6"], "rw,relatime - tmpfs tmpfs rw,uid=16,gid=6"),
        (&["huge=within_size"], "rw,relatime - tmpfs tmpfs rw,huge=within_size"),
        (&["mpol=interleave:0"], "rw,relatime - tmpfs tmpfs rw,mpol=interleave:0"),
        (&["noswap"], "rw,relatime - tmpfs tmpfs rw,noswap"),
        (&["inode32", "inode64"], "rw,relatime - tmpfs tmpfs rw,inode64"),
        (&["sync", "dirsync", "lazytime"], "rw,relatime - tmpfs tmpfs rw,sync,dirsync,lazytime"),
        (&["ro"], "rw,relatime - tmpfs tmpfs rw"),
        (&["nosuid", "nodev", "noexec"], "rw,nosuid,nodev,noexec,relatime - tmpfs tmpfs rw"),
        (&["noatime"], "rw,noatime - tmpfs tmpfs rw"),
        (&["noatime", "strictatime"], "rw - tmpfs tmpfs rw"),
        (&["nodiratime", "nosymfollow"], "rw,nodiratime,relatime,nosymfollow - tmpfs tmpfs rw"),
        (&["shared"], "rw,relatime - tmpfs tmpfs rw"),
    ] {
        let path = scratch.mount("fs", list);
        // CONFIG_TMPFS_INODE64 decides which of the two is shown when neither was asked for.
        let shown = mountinfo(&path).replace(",inode32", "");
        let shown = if list.contains(&"inode64") { shown } else { shown.replace(",inode64", "") };
        assert_eq!(shown, want, "{list:?}");
        mount::unmount(&path).expect("unmounted");
    }
}

#[test]
fn usage_tells_limits_and_use() {
    let scratch = Scratch::new();
    let path = scratch.mount("limited", &["size=1m", "nr_inodes=10"]);
    fs::write(path.join("file"), [1; 5000]).expect("written");
    let usage = mount::usage(&path).expect("usage");
    assert_eq!(
        usage,
        mount::Usage {
            size_bytes: Some(1 << 20),
            used_bytes: Some(8192),
            inodes: Some(10),
            used_inodes: Some(2),
        }
    );
    let error = fs::write(path.join("big"), vec![1; 2 << 20]).expect_err("over the limit");
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);

    let path = scratch.mount("unlimited", &["size=0", "nr_inodes=0"]);
    let none = mount::Usage { size_bytes: None, used_bytes: None, inodes: None, used_inodes: None };
    assert_eq!(mount::usage(&path).expect("usage"), none);
}

#[test]
fn the_mode_of_the_directory_below_becomes_the_roots() {
    let scratch = Scratch::new();
    for (list, default_mode, mode, shown) in [
        (&[][..], DefaultMode::Absent, 0o1777, ""),
        (&["mode=700"], DefaultMode::Absent, 0o700, ",mode=700"),
        (&[], DefaultMode::Chmod(0o2750), 0o2750, ""),
        (&["mode=700"], DefaultMode::Chmod(0o2750), 0o2750, ",mode=700"),
        (&[], DefaultMode::Option(0o2750), 0o2750, ",mode=2750"),
        (&["mode=700"], DefaultMode::Option(0o2750), 0o700, ",mode=700"),
    ] {
        let path = scratch.dir("fs");
        let options = options(list);
        mount_tmpfs(&TmpfsMount { default_mode, ..request(&options) }, &path).expect("mounted");
        assert_eq!(fs::metadata(&path).expect("stat").mode() & 0o7777, mode, "{list:?} {default_mode:?}");
        let info = mountinfo(&path);
        let option = info.split_once("tmpfs tmpfs rw").expect("super options").1;
        assert_eq!(option.split(",inode").next(), Some(shown), "{list:?} {default_mode:?}");
        mount::unmount(&path).expect("unmounted");
    }
}

#[test]
fn owners_are_ids_of_the_container() {
    let scratch = Scratch::new();
    let map = IdMap(vec![IdMapping { container: 0, host: 100_000, size: 10 }]);
    for (list, owner) in [(&[][..], (100_000, 100_000)), (&["uid=5", "gid=9"], (100_005, 100_009))] {
        let path = scratch.dir("fs");
        let options = options(list);
        let request = TmpfsMount { uid_map: &map, gid_map: &map, ..request(&options) };
        mount_tmpfs(&request, &path).expect("mounted");
        let stat = fs::metadata(&path).expect("stat");
        assert_eq!((stat.uid(), stat.gid()), owner, "{list:?}");
        mount::unmount(&path).expect("unmounted");
    }
    let path = scratch.dir("fs");
    for (list, message) in [
        (&["uid=10"][..], "uid=10 is not mapped"),
        (&["gid=4000"], "gid=4000 is not mapped"),
        (&["noswap"], "\"noswap\" is not allowed in a user namespace"),
    ] {
        let options = options(list);
        let error = mount_tmpfs(&TmpfsMount { uid_map: &map, gid_map: &map, ..request(&options) }, &path)
            .expect_err("refused");
        assert!(error.to_string().contains(message), "{error}");
    }
}

#[test]
fn what_the_kernel_refuses_is_named_with_its_own_words() {
    let scratch = Scratch::new();
    let path = scratch.dir("fs");
    for (list, option, log) in [
        (
            &["size=1m", "nr_inodes=99999999999999999"][..],
            "nr_inodes=99999999999999999",
            "Bad value for 'nr_inodes'",
        ),
        (&["mpol=bind:4095"], "mpol=bind:4095", "Bad value for 'mpol'"),
        (&["context=no_such_label"], "context=no_such_label", "context"),
    ] {
        let error = mount_at(&path, list).expect_err("refused");
        let message = error.to_string();
        let MountError::Refused { option: named, .. } = error else { panic!("{message}") };
        assert_eq!(named, option);
        assert!(message.contains(log), "{message}");
    }
    assert_eq!(fs::metadata(&path).expect("stat").dev(), fs::metadata(scratch.0.path()).expect("stat").dev());
}

#[test]
fn the_source_is_what_mountinfo_shows() {
    let scratch = Scratch::new();
    for (source, shown) in
        [(None, "  "), (Some(""), "  "), (Some("shm"), " shm "), (Some("my vol"), " my\\040vol ")]
    {
        let path = scratch.dir("fs");
        let options = options(&[]);
        mount_tmpfs(&TmpfsMount { source, ..request(&options) }, &path).expect("mounted");
        let info = mountinfo(&path);
        assert!(info.contains(&format!(" - tmpfs{shown}rw")), "{source:?}: {info}");
        mount::unmount(&path).expect("unmounted");
    }
}

#[test]
fn a_mount_below_a_shared_one_is_private_all_the_same() {
    let scratch = Scratch::new();
    let shared = scratch.mount("shared", &[]);
    nix::mount::mount(None::<&str>, &shared, None::<&str>, nix::mount::MsFlags::MS_SHARED, None::<&str>)
        .expect("made shared");
    let path = shared.join("fs");
    fs::create_dir(&path).expect("mkdir");
    mount_at(&path, &[]).expect("mounted");
    assert!(mountinfo(&shared).contains("shared:"), "the test needs a shared parent");
    assert!(!mountinfo(&path).contains("shared:"), "{}", mountinfo(&path));
    mount::unmount(&path).expect("unmounted");

    mount::make_private_mountpoint(&path).expect("made a mountpoint");
    mount::make_private_mountpoint(&path).expect("idempotent");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let shown = path.to_str().expect("UTF-8");
    assert_eq!(mounts.lines().filter(|line| line.split(' ').nth(4) == Some(shown)).count(), 1);
    assert!(!mountinfo(&path).contains("shared:"), "{}", mountinfo(&path));
}

#[test]
fn a_view_is_not_shadowed_by_a_mount_and_cannot_be_written() {
    let scratch = Scratch::new();
    let path = scratch.mount("fs", &[]);
    fs::create_dir(path.join("sub")).expect("mkdir");
    fs::write(path.join("sub/file"), "below").expect("written");
    mount_at(&path.join("sub"), &[]).expect("mounted over");
    assert!(!path.join("sub/file").exists());

    let view = mount::open_view(&path).expect("view");
    let at = |name: &str| PathBuf::from(format!("/proc/self/fd/{}/{name}", view.as_raw_fd()));
    assert_eq!(fs::read_to_string(at("sub/file")).expect("visible"), "below");
    let error = File::create(at("sub/file")).expect_err("read-only");
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);

    // One that comes later doesn't shadow it either, nor does unmounting end it.
    mount::unmount(&path.join("sub")).expect("unmounted");
    mount_at(&path.join("sub"), &[]).expect("mounted over");
    assert_eq!(fs::read_to_string(at("sub/file")).expect("visible"), "below");
    mount::unmount(&path).expect("unmounted");
    assert_eq!(fs::read_to_string(at("sub/file")).expect("visible"), "below");
}

#[test]
fn reading_through_a_view_or_a_root_changes_no_access_time() {
    let scratch = Scratch::new();
    let path = scratch.mount("fs", &["strictatime"]);
    fs::create_dir(path.join("dir")).expect("mkdir");
    fs::write(path.join("dir/file"), "data").expect("written");
    symlink("dir/file", path.join("link")).expect("symlink");
    let times = || {
        ["dir", "dir/file", "link"].map(|name| {
            let stat = fs::symlink_metadata(path.join(name)).expect("stat");
            (stat.atime(), stat.atime_nsec())
        })
    };
    let read = |root: &Path| {
        assert_eq!(fs::read_dir(root.join("dir")).expect("readable").count(), 1);
        assert_eq!(fs::read(root.join("dir/file")).expect("readable"), b"data");
        assert_eq!(fs::read_link(root.join("link")).expect("readable"), Path::new("dir/file"));
    };
    let before = times();
    for root in [mount::open_view(&path).expect("view"), mount::open_root(&path).expect("root")] {
        read(Path::new(&format!("/proc/self/fd/{}", root.as_raw_fd())));
        assert_eq!(times(), before);
    }
    // Through the mount itself all of them change, once the kernel's coarse clock has ticked.
    let start = std::time::Instant::now();
    while times().iter().zip(&before).any(|(now, before)| now == before) {
        assert!(start.elapsed().as_secs() < 10, "reading must change access times here");
        read(&path);
    }
}

#[test]
fn a_root_is_writable_and_acts_on_nothing_it_holds() {
    let scratch = Scratch::new();
    let path = scratch.mount("fs", &[]);
    nix::mount::mount(
        None::<&str>,
        &path,
        None::<&str>,
        nix::mount::MsFlags::MS_REMOUNT | nix::mount::MsFlags::MS_BIND | nix::mount::MsFlags::MS_RDONLY,
        None::<&str>,
    )
    .expect("remounted read-only");
    let root = mount::open_root(&path).expect("root");
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o4755);
    nix::sys::stat::mknodat(&root, "null", SFlag::S_IFCHR, mode, makedev(1, 3)).expect("mknod");
    let stat = fs::metadata(path.join("null")).expect("stat");
    assert!(stat.file_type().is_char_device());
    let at = |name: &str| format!("/proc/self/fd/{}/{name}", root.as_raw_fd());
    let error = File::open(at("null")).expect_err("nodev");
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    symlink("/etc/passwd", at("link")).expect("symlink");
    assert_eq!(File::open(at("link")).expect_err("nosymfollow").raw_os_error(), Some(nix::libc::ELOOP));
}

#[test]
fn only_the_root_of_a_tmpfs_is_opened() {
    let scratch = Scratch::new();
    let path = scratch.mount("fs", &[]);
    let inside = path.join("sub");
    fs::create_dir(&inside).expect("mkdir");
    symlink(&path, scratch.0.path().join("link")).expect("symlink");
    let bind = scratch.dir("bind");
    nix::mount::mount(Some(&inside), &bind, None::<&str>, nix::mount::MsFlags::MS_BIND, None::<&str>)
        .expect("bound");
    for (path, what) in [
        (Path::new("/proc"), "on another filesystem"),
        (&inside, "a directory inside a mount"),
        (&bind, "a bind mount of a subdirectory"),
    ] {
        for error in [
            mount::open_view(path).map(drop).expect_err("refused"),
            mount::open_root(path).map(drop).expect_err("refused"),
            mount::usage(path).map(drop).expect_err("refused"),
        ] {
            assert!(matches!(error, MountError::NotOurs { what: named, .. } if named == what), "{error}");
        }
    }
    for name in ["link", "missing"] {
        let error = mount::open_view(&scratch.0.path().join(name)).expect_err("refused");
        assert!(matches!(error, MountError::System { call: "open", .. }), "{error}");
    }
    fs::remove_file(scratch.0.path().join("link")).expect("removed");
}

#[test]
fn unmounting_is_idempotent() {
    let scratch = Scratch::new();
    let path = scratch.mount("fs", &[]);
    let open = File::create(path.join("busy")).expect("created");
    mount::unmount(&path).expect("unmounted though busy");
    assert!(!path.join("busy").exists());
    mount::unmount(&path).expect("not mounted");
    mount::unmount(&path.join("missing")).expect("missing");
    drop(open);
}

#[test]
fn copy_up_copies_what_is_there() {
    let scratch = Scratch::new();
    let source = scratch.mount("source", &[]);
    let target = scratch.mount("target", &["mode=711"]);
    fs::create_dir_all(source.join("dir/sub")).expect("mkdir");
    fs::write(source.join("dir/file"), "content").expect("written");
    fs::write(source.join("empty"), "").expect("written");
    symlink("/etc/passwd", source.join("link")).expect("symlink");
    symlink("missing", source.join("dir/dangling")).expect("symlink");
    let device = makedev(7, 300);
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
    for (name, kind, device) in [
        ("char", SFlag::S_IFCHR, device),
        ("block", SFlag::S_IFBLK, device),
        ("fifo", SFlag::S_IFIFO, 0),
        ("socket", SFlag::S_IFSOCK, 0),
    ] {
        nix::sys::stat::mknod(&source.join(name), kind, mode, device).expect("mknod");
    }
    let mut sparse = File::create(source.join("sparse")).expect("created");
    sparse.set_len(1 << 40).expect("extended");
    std::io::Seek::seek(&mut sparse, std::io::SeekFrom::Start(1 << 30)).expect("seek");
    sparse.write_all(b"island").expect("written");
    let names = [
        "dir",
        "dir/sub",
        "dir/file",
        "dir/dangling",
        "empty",
        "link",
        "char",
        "block",
        "fifo",
        "socket",
        "sparse",
    ];
    for (at, name) in names.iter().enumerate() {
        let path = source.join(name);
        let id = u32::try_from(at).expect("small");
        std::os::unix::fs::lchown(&path, Some(1000 + id), Some(2000 + id)).expect("chown");
        if !path.is_symlink() {
            let bits = [0o2775, 0o1777, 0o4751, 0, 0o2640][at % 5];
            fs::set_permissions(&path, Permissions::from_mode(bits)).expect("chmod");
        }
    }

    copy_up(&File::open(&source).expect("open"), &File::open(&target).expect("open")).expect("copied");

    for name in names {
        let want = fs::symlink_metadata(source.join(name)).expect("stat");
        let got = fs::symlink_metadata(target.join(name)).expect("copied");
        let facts = |stat: &fs::Metadata| (stat.mode(), stat.uid(), stat.gid(), stat.rdev());
        assert_eq!(facts(&got), facts(&want), "{name}");
        if want.is_file() || want.is_symlink() {
            assert_eq!((got.len(), got.blocks()), (want.len(), want.blocks()), "{name}");
        }
    }
    assert_eq!((major(device), minor(device)), (7, 300));
    assert_eq!(fs::read_link(target.join("link")).expect("link"), Path::new("/etc/passwd"));
    assert_eq!(fs::read_link(target.join("dir/dangling")).expect("link"), Path::new("missing"));
    assert_eq!(fs::read(target.join("dir/file")).expect("read"), b"content");
    let mut island = [0; 8];
    let copy = File::open(target.join("sparse")).expect("open");
    std::os::unix::fs::FileExt::read_exact_at(&copy, &mut island, (1 << 30) - 1).expect("read");
    assert_eq!(&island, b"\0island\0");
    assert_eq!(
        fs::read_dir(&target).expect("readable").count(),
        fs::read_dir(&source).expect("readable").count()
    );
    assert_eq!(fs::metadata(&target).expect("stat").mode() & 0o7777, 0o711, "the root keeps its mode");
}

#[test]
fn copy_up_is_bounded_and_names_where_it_stopped() {
    let scratch = Scratch::new();
    let source = scratch.mount("source", &[]);
    let nest = |levels: usize| {
        let mut path = source.clone();
        path.extend(std::iter::repeat_n("d", levels));
        fs::create_dir_all(&path).expect("mkdir");
    };
    let copy = |name: &str, list: &[&str]| {
        let target = scratch.mount(name, list);
        copy_up(&File::open(&source).expect("open"), &File::open(&target).expect("open"))
    };
    nest(copy_up::MAX_DEPTH - 1);
    copy("fits", &[]).expect("copied");
    nest(copy_up::MAX_DEPTH);
    let error = copy("deep", &[]).expect_err("too deep");
    assert!(matches!(error, CopyUpError::TooDeep { limit: copy_up::MAX_DEPTH, .. }), "{error}");

    fs::remove_dir_all(source.join("d")).expect("removed");
    fs::write(source.join("big"), vec![1; 1 << 20]).expect("written");
    let error = copy("small", &["size=64k"]).expect_err("full");
    let CopyUpError::System { path, source: errno, .. } = error else { panic!("{error}") };
    assert_eq!((path.as_path(), errno.kind()), (Path::new("./big"), std::io::ErrorKind::StorageFull));
}

#[test]
fn a_path_in_a_root_stays_in_it() {
    let dir = tempfile::tempdir().expect("tempdir");
    let root = dir.path().join("rootfs");
    fs::create_dir_all(root.join("etc/inner")).expect("mkdir");
    fs::write(root.join("etc/marker"), "inside").expect("written");
    fs::write(root.join("file"), "").expect("written");
    symlink("/etc", root.join("absolute")).expect("symlink");
    symlink("../../../../../../../../etc", root.join("dots")).expect("symlink");
    symlink("/nowhere", root.join("dangling")).expect("symlink");
    symlink("loop", root.join("loop")).expect("symlink");
    for path in ["/etc", "etc", "//etc/inner/..", "/absolute", "/dots", "/../../etc", "/absolute/inner/../."]
    {
        let found = open_in_root(&root, path).expect("no error").expect("found");
        let mut marker = String::new();
        File::open(format!("/proc/self/fd/{}/marker", found.as_raw_fd()))
            .and_then(|mut file| file.read_to_string(&mut marker))
            .expect("the root's own");
        assert_eq!(marker, "inside", "{path}");
    }
    for path in ["", "/", "/.."] {
        let found = open_in_root(&root, path).expect("no error").expect("found");
        assert_eq!(
            found.metadata().expect("stat").ino(),
            fs::metadata(&root).expect("stat").ino(),
            "{path:?}"
        );
    }
    for path in ["/missing", "/missing/deeper", "/dangling", "/absolute/missing"] {
        assert!(open_in_root(&root, path).expect("no error").is_none(), "{path}");
    }
    for (path, errno) in
        [("/file", nix::libc::ENOTDIR), ("/file/x", nix::libc::ENOTDIR), ("/loop", nix::libc::ELOOP)]
    {
        assert_eq!(open_in_root(&root, path).expect_err("refused").raw_os_error(), Some(errno), "{path}");
    }
    assert!(open_in_root(&root, "/a\0b").is_err());
}
