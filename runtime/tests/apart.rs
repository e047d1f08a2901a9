//! Images whose pages are kept apart, and whose archives are compressed therefore.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use stillframe_runtime::manifest::{Manifest, Part};
use stillframe_runtime::sandbox::CheckpointRequest;

#[path = "support/pod.rs"]
mod pod;

use pod::Pod;

const MOUNTS: &str = r#""mounts":[{"destination":"/scratch","type":"tmpfs","options":["size=64m"]},
    {"destination":"/dev/shm","type":"tmpfs","options":["size=64m"]}]"#;
const FILES: usize = 3000;

/// A pod with two filesystems, and an image of it with the directory of its pages.
struct Saved {
    pod: Pod,
    dir: tempfile::TempDir,
}

impl Saved {
    fn new(precopy: bool) -> Self {
        let mut pod = Pod::new();
        pod.running("c", MOUNTS);
        for number in 0..FILES {
            fs::write(pod.mount("c.0").join(format!("file-{number}")), number.to_string()).unwrap();
        }
        fs::write(pod.mount("c.1").join("data"), vec![b'1'; 200_000]).unwrap();
        let saved = Self { pod, dir: tempfile::tempdir().unwrap() };
        let pages_dir = Some(saved.apart());
        let request = CheckpointRequest { pages_dir, precopy, ..CheckpointRequest::new("c", saved.image()) };
        saved.pod.sandbox.checkpoint(&request).unwrap();
        saved
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn apart(&self) -> PathBuf {
        self.dir.path().join("made/apart")
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.image()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn manifest(&self) -> Manifest {
        Manifest::decode(&fs::read(self.image().join("manifest.json")).unwrap()).unwrap()
    }
}

/// Restores an image, and compares what is in it.
fn assert_restores(image: &Path) {
    let mut new = Pod::new();
    new.prepare("c", MOUNTS, Some(image)).unwrap();
    assert_eq!(fs::read(new.mount("c.1").join("data")).unwrap(), vec![b'1'; 200_000]);
    for number in 0..FILES {
        let path = new.mount("c.0").join(format!("file-{number}"));
        assert_eq!(fs::read_to_string(path).unwrap(), number.to_string());
    }
}

fn refused(image: &Path) -> String {
    let mut new = Pod::new();
    let error = new.prepare("c", MOUNTS, Some(image)).map(|_| ()).unwrap_err();
    new.assert_nothing_is_left();
    error
}

#[test]
fn pages_that_are_kept_apart_are_found_and_verified_before_anything_is_restored() {
    let saved = Saved::new(true);
    let image = saved.image();
    assert!(!image.join("pages.img").exists());
    assert_restores(&image);
    let pages = fs::read_dir(saved.apart()).unwrap().next().unwrap().unwrap().path();

    let mut damaged = fs::read(&pages).unwrap();
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(&pages, damaged).unwrap();
    assert!(refused(&image).contains(pages.to_str().unwrap()));
    fs::remove_file(&pages).unwrap();
    assert!(refused(&image).contains(pages.to_str().unwrap()));

    // A checkpoint that fails leaves nothing there either.
    let request = CheckpointRequest { pages_dir: Some(saved.apart()), ..CheckpointRequest::new("c", &image) };
    saved.pod.sandbox.checkpoint(&request).unwrap_err();
    assert_eq!(fs::read_dir(saved.apart()).unwrap().count(), 0);
}

#[test]
fn archives_beside_pages_that_are_kept_apart_are_compressed_and_standard_tools_list_them() {
    let saved = Saved::new(true);
    assert_eq!(saved.names(), ["manifest.json", "pages.meta", "tree.tar.zst"]);
    let manifest = saved.manifest();
    let length: u64 = manifest.filesystems.iter().map(|filesystem| filesystem.tree_length.unwrap()).sum();
    assert!(length > FILES as u64 * 1024 && manifest.tree.length < length / 10, "{manifest:?}");
    let tree = fs::read(saved.image().join("tree.tar.zst")).unwrap();
    for (filesystem, want) in manifest.filesystems.iter().zip([FILES + 1, 2]) {
        let archive = saved.dir.path().join("archive.tar.zst");
        let range = filesystem.tree_start as usize..filesystem.tree_end as usize;
        fs::write(&archive, &tree[range]).unwrap();
        let output = Command::new("tar").args(["--zstd", "-tvf"]).arg(&archive).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        assert_eq!(output.stdout.iter().filter(|byte| **byte == b'\n').count(), want);
    }
}

#[test]
fn archives_of_what_was_not_copied_ahead_are_not_compressed() {
    let saved = Saved::new(false);
    assert_eq!(saved.names(), ["manifest.json", "pages.meta", "tree.tar"]);
    assert!(saved.manifest().filesystems.iter().all(|filesystem| filesystem.tree_length.is_none()));
    assert_restores(&saved.image());
}

#[test]
fn compressed_archives_that_are_none_are_refused() {
    let saved = Saved::new(true);
    let (image, whole) = (saved.image(), saved.manifest());
    let tree = fs::read(image.join("tree.tar.zst")).unwrap();
    let write = |change: &dyn Fn(&mut Manifest), tree: &[u8]| {
        let mut changed = whole.clone();
        changed.tree = Part::of(tree);
        change(&mut changed);
        fs::write(image.join("tree.tar.zst"), tree).unwrap();
        fs::write(image.join("manifest.json"), changed.encode()).unwrap();
    };
    let mut damaged = tree.clone();
    let end = whole.filesystems[0].tree_end;
    damaged[end as usize / 2] ^= 0x40;
    fs::write(image.join("tree.tar.zst"), &damaged).unwrap();
    let error = refused(&image);
    assert!(error.contains("tree.tar.zst is damaged between offsets 0 and "), "{error}");

    // What the manifest covers is wrong all the same.
    write(&|_| {}, &vec![0x5a; tree.len()]);
    let error = refused(&image);
    assert!(error.contains(&format!("can't be uncompressed between offsets 0 and {end}")), "{error}");
    let mut cut = tree.clone();
    cut.truncate(tree.len() - 5);
    write(&|changed| changed.filesystems[1].tree_end -= 5, &cut);
    let error = refused(&image);
    assert!(error.contains("can't be uncompressed between offsets"), "{error}");

    // More than it says, of which no more is read, and less.
    for wrong in [-512, 512] {
        write(
            &|changed| {
                let length = changed.filesystems[0].tree_length.as_mut().unwrap();
                *length = length.saturating_add_signed(wrong);
            },
            &tree,
        );
        let error = refused(&image);
        assert!(
            error.contains("the tree of c:/scratch hasn't ") && error.contains("uncompressed"),
            "{error}"
        );
    }
    write(&|_| {}, &tree);
    assert_restores(&image);
    fs::remove_file(image.join("tree.tar.zst")).unwrap();
    assert!(refused(&image).contains("tree.tar.zst"));
}
