//! Real tmpfs, real pages file: what is saved from one filesystem is built on another.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use stillframe_tmpfs::build::BuildOptions;
use stillframe_tmpfs::entry::Kind;
use stillframe_tmpfs::{IdMap, IdMapping, Ids};

#[path = "support/filesystem.rs"]
mod filesystem;

use filesystem::{DEVICES, Tmpfs, describe, fill, noise, save, try_save};

#[test]
fn everything_that_a_tmpfs_holds_comes_back() {
    let (old, new, again) = (Tmpfs::new(&[]), Tmpfs::new(&[]), Tmpfs::new(&[]));
    fill(old.path());
    let before = describe(&old);
    let saved = save(&old);
    assert_eq!(describe(&old), before, "saving changes nothing, access times neither");
    saved.restore(&new, &DEVICES()).unwrap();
    let after = describe(&new);
    for (path, want) in &before {
        assert_eq!(after.get(path), Some(want), "{path:?}");
    }
    assert_eq!(after.len(), before.len());
    // And what was restored is saved the same.
    let second = save(&new);
    assert_eq!(second.summary, saved.summary);
    second.restore(&again, &DEVICES()).unwrap();
    assert_eq!(describe(&again), before);
}

#[test]
fn zeros_and_holes_take_no_pages() {
    let filesystem = Tmpfs::new(&[]);
    fs::write(filesystem.path().join("zeros"), vec![0; 1 << 20]).unwrap();
    let sparse = File::create(filesystem.path().join("sparse")).unwrap();
    sparse.set_len(1 << 40).unwrap();
    sparse.write_all_at(b"x", 1 << 30).unwrap();
    let saved = save(&filesystem);
    assert_eq!(saved.digests.pages_length(), 4096);
    assert_eq!((saved.summary.files, saved.summary.data_bytes), (2, 4096));
    assert_eq!(saved.summary.logical_bytes, (1 << 20) + (1 << 40));
    let new = Tmpfs::new(&["size=8k"]);
    saved.restore(&new, &DEVICES()).unwrap();
    assert_eq!(describe(&new), describe(&filesystem));
}

#[test]
fn directories_deeper_than_the_descriptors_come_back() {
    let (old, new) = (Tmpfs::new(&[]), Tmpfs::new(&[]));
    let mut dir = File::open(old.path()).unwrap();
    for depth in 0..1500 {
        rustix::fs::mkdirat(&dir, "directory", Mode::RWXU).unwrap();
        let flags = OFlags::WRONLY | OFlags::CREATE;
        let file = rustix::fs::openat(&dir, "zz", flags, Mode::RUSR).unwrap();
        File::from(file).write_all(format!("{depth}").as_bytes()).unwrap();
        dir = File::from(rustix::fs::openat(&dir, "directory", OFlags::DIRECTORY, Mode::empty()).unwrap());
    }
    let saved = save(&old);
    saved.restore(&new, &DEVICES()).unwrap();
    // A path of 15,000 bytes is beyond PATH_MAX, so the trees are compared as they are saved.
    assert!(save(&new).tree() == saved.tree());
    assert_eq!(saved.summary.entries, 3000);
}

#[test]
fn a_tree_that_does_not_fit_is_refused_with_both_numbers_before_anything_is_made() {
    let old = Tmpfs::new(&[]);
    for name in ["a", "b", "c"] {
        fs::write(old.path().join(name), noise(10_000, 1)).unwrap();
    }
    let saved = save(&old);
    for (option, want) in [
        ("size=32k", "36864 bytes of pages, but the new filesystem's size= allows 32768 bytes"),
        ("nr_inodes=3", "3 inodes, but the new filesystem's nr_inodes= allows 2"),
    ] {
        let new = Tmpfs::new(&[option]);
        let error = saved.restore(&new, &DEVICES()).unwrap_err();
        assert!(error.to_string().contains(want), "{error}");
        assert_eq!(describe(&new).len(), 1, "nothing but the root");
    }
    for option in ["size=36k", "nr_inodes=4"] {
        let new = Tmpfs::new(&[option]);
        saved.restore(&new, &DEVICES()).unwrap();
        assert_eq!(describe(&new).len(), 4);
    }
}

#[test]
fn devices_need_the_right_to_make_them_and_whiteouts_do_not() {
    let old = Tmpfs::new(&[]);
    let mknod = |name: &str, minor| {
        let device = rustix::fs::makedev(0, minor);
        rustix::fs::mknodat(CWD, old.path().join(name), FileType::CharacterDevice, Mode::RUSR, device)
            .unwrap();
    };
    mknod("whiteout", 0);
    save(&old).restore(&Tmpfs::new(&[]), &BuildOptions::default()).unwrap();
    mknod("device", 1);
    let new = Tmpfs::new(&[]);
    let error = save(&old).restore(&new, &BuildOptions::default()).unwrap_err();
    assert!(error.to_string().contains("\"/device\" is the device node 0:1"), "{error}");
    assert_eq!(describe(&new).len(), 1, "nothing but the root");
}

/// A volume's root is somebody else's, whom the container sees as nobody; so it is in the image, and so it stays elsewhere.
#[test]
fn a_root_that_belongs_to_nobody_stays_what_it_is() {
    let map = |host| IdMap(vec![IdMapping { container: 0, host, size: 1000 }]);
    let ids = |host| Ids { uid: map(host), gid: map(host) };
    let old = Tmpfs::new(&["uid=5", "gid=6", "mode=1777"]);
    let saved = try_save(&old, &ids(100_000)).unwrap();
    let root = &saved.tree().entries[0].attributes;
    assert_eq!((root.uid, root.gid), (65534, 65534));
    let owner = |tmpfs: &Tmpfs| {
        let there = fs::metadata(tmpfs.path()).unwrap();
        (there.uid(), there.gid(), there.mode() & 0o7777)
    };
    for (options, host, want) in [
        (["uid=7", "gid=8"], 100_000, (7, 8, 0o1777)),
        // These mappings have no nobody.
        (["uid=100000", "gid=8"], 100_000, (100_000, 8, 0o1777)),
    ] {
        let new = Tmpfs::new(&options);
        saved.restore(&new, &BuildOptions { ids: ids(host), devices: false }).unwrap();
        assert_eq!(owner(&new), want, "{options:?}");
    }
    let new = Tmpfs::new(&["uid=7", "gid=8"]);
    saved.restore(&new, &BuildOptions::default()).unwrap();
    assert_eq!(owner(&new), (65534, 65534, 0o1777));
}

#[test]
fn ids_are_the_containers_and_unmapped_ones_are_named() {
    let map = |host| IdMap(vec![IdMapping { container: 0, host, size: 1000 }]);
    let ids = |host| Ids { uid: map(host), gid: map(host) };
    let old = Tmpfs::new(&["uid=100000", "gid=100000"]);
    fs::write(old.path().join("f"), b"x").unwrap();
    std::os::unix::fs::chown(old.path().join("f"), Some(100_007), Some(100_008)).unwrap();
    let saved = try_save(&old, &ids(100_000)).unwrap();
    assert_eq!(saved.tree().entries[1].attributes.uid, 7);
    let new = Tmpfs::new(&[]);
    saved.restore(&new, &BuildOptions { ids: ids(200_000), devices: false }).unwrap();
    let there = fs::metadata(new.path().join("f")).unwrap();
    assert_eq!((there.uid(), there.gid()), (200_007, 200_008));

    let error = try_save(&old, &ids(300_000)).err().unwrap();
    assert!(error.to_string().contains("\"/f\" belongs to id 100007 of the host"), "{error}");
    let narrow = Ids { uid: IdMap(vec![IdMapping { container: 0, host: 0, size: 5 }]), gid: map(0) };
    let error = saved.restore(&Tmpfs::new(&[]), &BuildOptions { ids: narrow, devices: false }).unwrap_err();
    assert!(error.to_string().contains("\"/f\" belongs to the container's id 7"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Any directories with any files of any extents.
    #[test]
    fn any_tree_with_any_extents_round_trips(
        files in prop::collection::vec(
            ("[a-d](/[a-d]){0,4}", prop::collection::vec((0..200u64, 1..40_000usize, any::<u8>()), 0..6)),
            0..40,
        )
    ) {
        let (old, new) = (Tmpfs::new(&[]), Tmpfs::new(&[]));
        for (path, writes) in files {
            let path = old.path().join(path);
            if fs::create_dir_all(path.parent().unwrap()).is_err() || path.is_dir() {
                continue; // a file is in the way
            }
            let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).unwrap();
            for (page, length, seed) in writes {
                // Every seventh write is of zeros.
                let data = if seed % 7 == 0 { vec![0; length] } else { noise(length, seed) };
                file.write_all_at(&data, page * 4096 + u64::from(seed % 3)).unwrap();
            }
        }
        let saved = save(&old);
        saved.restore(&new, &DEVICES()).unwrap();
        prop_assert_eq!(describe(&new), describe(&old));
        let pages: u64 = saved.tree().entries.iter().map(|entry| match &entry.kind {
            Kind::File { extents, .. } => extents.iter().map(|extent| extent.length.next_multiple_of(4096)).sum(),
            _ => 0,
        }).sum();
        prop_assert_eq!(saved.digests.pages_length(), pages, "the pages file holds nothing else");
    }
}
