//! Filesystems on disk that can't be made or restored: the container is refused, and nothing is left.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};

use stillframe_runtime::manifest::{Manifest, Offsets, Part};

#[path = "../../tmpfs/tests/support/filesystem.rs"]
mod filesystem;

#[path = "support/pod.rs"]
mod pod;

#[path = "support/disk.rs"]
mod disk;

use disk::{config, refused, scratch};
use filesystem::noise;
use pod::Pod;

#[test]
fn what_does_not_fit_is_refused_with_both_numbers() {
    let mut pod = Pod::new();
    pod.running("c", &scratch("disk", "container", "size=64m"));
    fs::write(pod.mount("c.0").join("large"), noise(20 << 20, 1)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    pod.checkpoint("c", &image, &[]).unwrap();
    for medium in ["disk", "memory"] {
        let error = refused(&image, &scratch(medium, "container", "size=16m"));
        assert!(error.contains("holds 20971520 bytes"), "{error}");
        assert!(error.contains("size= allows 1"), "{error}");
    }
}

#[test]
fn a_container_that_can_not_be_prepared_leaves_nothing() {
    let good = ("/good", "tmpfs", "good", "");
    let hint = ("vol", "scratch", "disk", "container", "");
    let with = |options| {
        config(
            &[hint, ("good", "good", "disk", "pod", "size=16m")],
            &[good, ("/bad", "tmpfs", "scratch", options)],
        )
    };
    for (config, want) in [
        (with("size=100k"), "make c:/bad on disk: mkfs.ext4"),
        (with("size=16m,usrquota"), "option \"usrquota\" can't be used with a filesystem on disk"),
        (with("size=16m,context=nosuchlabel"), "the kernel made no filesystem"),
        (with("size=16m,uid=7,gid=4294967295"), "gid=4294967295"),
        (scratch("tape", "pod", ""), "dev.stillframe.mount.vol.medium=\"tape\": expected disk or memory"),
    ] {
        let mut pod = Pod::new();
        let error = pod.prepare("c", &config, None).map(|_| ()).unwrap_err();
        assert!(error.contains(want), "{error}");
        pod.assert_nothing_is_left();
    }
}

#[test]
fn damaged_and_made_up_images_are_refused() {
    let mut pod = Pod::new();
    let config = scratch("disk", "container", "size=32m");
    pod.running("c", &config);
    fs::write(pod.mount("c.0").join("data"), noise(200_000, 1)).unwrap();
    fs::write(pod.mount("c.0").join("twin"), noise(4096, 2)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    pod.checkpoint("c", &image, &[]).unwrap();
    let memory = scratch("memory", "container", "");
    let (manifest, tree) = (image.join("manifest.json"), image.join("tree.tar"));
    let (whole_manifest, whole_tree) = (fs::read(&manifest).unwrap(), fs::read(&tree).unwrap());

    // A flipped bit in the middle of the pages.
    let pages = fs::OpenOptions::new().read(true).write(true).open(image.join("pages.img")).unwrap();
    let middle = pages.metadata().unwrap().len() / 2;
    let mut byte = [0];
    pages.read_exact_at(&mut byte, middle).unwrap();
    pages.write_all_at(&[byte[0] ^ 1], middle).unwrap();
    let error = refused(&image, &config);
    assert!(
        error.contains(&format!(
            "pages.img: the pages file is damaged at offset {:#x}",
            middle / 65536 * 65536
        )),
        "{error}"
    );
    pages.write_all_at(&byte, middle).unwrap();

    let change = |change: &dyn Fn(&mut Manifest)| {
        let mut changed = Manifest::decode(&whole_manifest).unwrap();
        change(&mut changed);
        fs::write(&manifest, changed.encode()).unwrap();
    };
    let set_index = |new: u32| {
        move |m: &mut Manifest| {
            let Offsets::PrivateFile { index, .. } = &mut m.filesystems[0].offsets else {
                panic!("not on disk")
            };
            *index = new;
        }
    };
    change(&set_index(9));
    let error = refused(&image, &config);
    assert!(
        error.contains("the filesystem c:/data is in the private MemoryFile 9, which isn't there"),
        "{error}"
    );
    // As if its extents were offsets in pages.img, which is shorter.
    change(&|m| m.filesystems[0].offsets = Offsets::PagesFile);
    let error = refused(&image, &memory);
    assert!(error.contains("reaches behind the pages file's end"), "{error}");

    // A tree that says something else than the filestore holds: the mode of its file.
    let mut changed = whole_tree.clone();
    let header = changed.chunks(512).position(|block| block.starts_with(b"./data\0")).unwrap() * 512;
    let sum = |header: &[u8]| -> u64 {
        header
            .iter()
            .enumerate()
            .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u64::from(*byte) })
            .sum()
    };
    changed[header + 100..header + 107].copy_from_slice(b"0004755");
    let checksum = format!("{:06o}\0 ", sum(&changed[header..header + 512]));
    changed[header + 148..header + 156].copy_from_slice(checksum.as_bytes());
    let use_tree = |changed: &[u8]| {
        fs::write(&tree, changed).unwrap();
        change(&|m| m.tree = Part::of(changed));
    };
    use_tree(&changed);
    let error = refused(&image, &config);
    assert!(error.contains("\"/data\" is not the same in the saved filestore and in its tree"), "{error}");
    // Through the tree alone it is what the tree says.
    let mut pod = Pod::new();
    pod.prepare("c", &memory, Some(&image)).unwrap();
    assert_eq!(fs::metadata(pod.mount("c.0").join("data")).unwrap().permissions().mode() & 0o7777, 0o4755);

    // A page that two files have, whichever way it would be restored.
    let mut changed = whole_tree.clone();
    let twin = changed.chunks(512).position(|block| block.starts_with(b"./twin\0")).unwrap() * 512 + 512;
    let offset = changed[header + 512 + 56..header + 512 + 64].to_vec();
    changed[twin + 56..twin + 64].copy_from_slice(&offset);
    use_tree(&changed);
    for config in [&memory, &config] {
        let error = refused(&image, config);
        assert!(error.contains("of the private MemoryFile, which another part of a file has too"), "{error}");
    }

    // An extent behind the private file's end.
    let mut changed = whole_tree.clone();
    let record = header + 512;
    changed[record + 40 + 16..record + 40 + 24].copy_from_slice(&(32u64 << 20).to_le_bytes());
    use_tree(&changed);
    let error = refused(&image, &memory);
    assert!(error.contains("entry \"./data\"") && error.contains("reaches behind"), "{error}");

    fs::write(&tree, &whole_tree).unwrap();
    fs::write(&manifest, &whole_manifest).unwrap();
    let mut pod = Pod::new();
    pod.prepare("c", &config, Some(&image)).unwrap();
    assert_eq!(fs::read(pod.mount("c.0").join("data")).unwrap(), noise(200_000, 1));
}
