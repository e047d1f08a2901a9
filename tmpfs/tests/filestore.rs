//! Real filestores: ext4 in a file, loop-mounted; saved verbatim, loaded verbatim, and converted both ways.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stillframe_pgalloc::{
    AsyncPagesFileLoad, AsyncPagesFileSave, DigestTable, LoadOptions, MemoryFile, PrivateMemoryFileMeta,
    SaveOptions,
};
use stillframe_tmpfs::build::{build_tree, check_tree};
use stillframe_tmpfs::decode::decode_tree;
use stillframe_tmpfs::entry::Tree;
use stillframe_tmpfs::filestore::{self, FilestoreError, Root};
use stillframe_tmpfs::mount::{DefaultMode, TmpfsMount, open_root, open_view, unmount, usage};
use stillframe_tmpfs::options::TmpfsOptions;
use stillframe_tmpfs::private::{PrivateError, translate, verify};
use stillframe_tmpfs::save::save_private_tree;
use stillframe_tmpfs::{IdMap, IdMapping, Ids};

#[path = "support/filesystem.rs"]
mod filesystem;

use filesystem::{DEVICES, EXT4_LARGEST, Tmpfs, describe_directory, fill_up_to, noise, save};

/// A filestore and where it is mounted; gone when it is dropped.
struct Disk {
    dir: tempfile::TempDir,
    options: TmpfsOptions,
    map: IdMap,
}

impl Disk {
    fn unformatted(options: &[&str]) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::create_dir(dir.path().join("mnt")).unwrap();
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        Self { dir, options: TmpfsOptions::parse(&options).unwrap(), map: IdMap::default() }
    }

    fn new(options: &[&str]) -> Self {
        let disk = Self::unformatted(options);
        disk.make().unwrap();
        disk
    }

    fn make(&self) -> Result<(), FilestoreError> {
        filestore::create(&self.file(), filestore::size(&self.options, self.dir.path())?)?;
        filestore::format(&self.file(), &self.options)?;
        self.mount(Root::New)
    }

    fn mount(&self, root: Root<'_>) -> Result<(), FilestoreError> {
        let request = TmpfsMount {
            options: &self.options,
            source: None,
            default_mode: DefaultMode::Absent,
            uid_map: &self.map,
            gid_map: &self.map,
            label: None,
        };
        filestore::mount(&self.file(), &request, root, &self.path())
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("store.img")
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// Whether a loop device has the file, also after a while: a process that another test is just starting may
    /// have our descriptors until it executes its program.
    fn stays_attached(&self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(10);
        while is_attached(&self.file()) {
            if Instant::now() > deadline {
                return true;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        false
    }
}

fn is_attached(file: &Path) -> bool {
    let devices = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
    devices
        .map(|device| fs::read_to_string(device.join("loop/backing_file")).unwrap_or_default())
        .any(|backing| Path::new(backing.trim().trim_end_matches(" (deleted)")) == file)
}

impl Drop for Disk {
    fn drop(&mut self) {
        unmount(&self.path()).unwrap();
        if !std::thread::panicking() {
            assert!(!self.stays_attached(), "the loop device goes with its last user");
        }
    }
}

struct Saved {
    archive: Vec<u8>,
    pages: File,
    digests: DigestTable,
    private: PrivateMemoryFileMeta,
}

fn save_disk(disk: &Disk) -> Saved {
    let pages = tempfile::tempfile().unwrap();
    let saving = AsyncPagesFileSave::new(pages.try_clone().unwrap(), SaveOptions::default()).unwrap();
    filestore::settle(&disk.path()).unwrap();
    let frozen = filestore::freeze(&disk.path()).unwrap();
    let private = MemoryFile::private(File::open(disk.file()).unwrap()).save_to(&saving).unwrap();
    let view = open_view(&disk.path()).unwrap();
    let (archive, _) = save_private_tree(&view, &Ids::default(), Vec::new()).unwrap();
    let digests = saving.finish().unwrap().digests;
    drop(frozen);
    Saved { archive, pages, digests, private }
}

impl Saved {
    fn tree(&self) -> Tree {
        decode_tree(&self.archive, self.private.size).unwrap()
    }

    fn loader(&self) -> AsyncPagesFileLoad {
        load(&self.pages, &self.digests)
    }

    /// Makes `disk` a copy of what was saved.
    fn adopt(&self, disk: &Disk) -> Result<(), FilestoreError> {
        let size = filestore::size(&disk.options, disk.dir.path()).unwrap();
        filestore::create(&disk.file(), 0).unwrap();
        let loader = self.loader();
        let file = File::options().read(true).write(true).open(disk.file()).unwrap();
        MemoryFile::private(file).load_from(&loader, &self.private).unwrap();
        loader.finish().unwrap();
        filestore::adopt(&disk.file(), size)?;
        disk.mount(Root::Saved(&self.tree()))
    }
}

fn load(pages: &File, digests: &DigestTable) -> AsyncPagesFileLoad {
    let pages = pages.try_clone().unwrap();
    AsyncPagesFileLoad::new(pages, digests.clone(), LoadOptions::default()).unwrap()
}

fn build(tree: &Tree, loader: AsyncPagesFileLoad, path: &Path) {
    check_tree(tree, &DEVICES(), &usage(path).unwrap()).unwrap();
    let root = open_root(path).unwrap();
    let options = DEVICES();
    let built = build_tree(&root, tree, &options, &loader).unwrap();
    loader.finish().unwrap();
    built.finish().unwrap();
}

/// What must be the same on ext4 and tmpfs: all but the sizes of directories.
fn describe(path: &Path) -> BTreeMap<PathBuf, String> {
    let view = open_view(path).unwrap();
    let mut all = BTreeMap::new();
    describe_directory(&view, Path::new("/"), &mut all, &mut BTreeMap::new());
    for text in all.values_mut().filter(|text| text.starts_with('4')) {
        let (before, after) = text.split_once(" size ").unwrap();
        *text = format!("{before}{}", &after[after.find(' ').unwrap()..]);
    }
    all
}

fn assert_same(found: &BTreeMap<PathBuf, String>, want: &BTreeMap<PathBuf, String>) {
    for (path, want) in want {
        assert_eq!(found.get(path), Some(want), "{path:?}");
    }
    assert_eq!(found.len(), want.len(), "{:?}", found.keys());
}

#[test]
fn everything_comes_back_from_memory_to_disk_to_disk_to_memory() {
    let memory = Tmpfs::new(&[]);
    fill_up_to(memory.path(), EXT4_LARGEST);
    let want = describe(memory.path());
    let saved = save(&memory);

    let disk = Disk::new(&["size=256m"]);
    build(&saved.tree(), load(&saved.pages, &saved.digests), &disk.path());
    assert_same(&describe(&disk.path()), &want);

    let saved = save_disk(&disk);
    assert_same(&describe(&disk.path()), &want);
    let copy = Disk::unformatted(&["size=256m"]);
    saved.adopt(&copy).unwrap();
    assert_same(&describe(&copy.path()), &want);
    verify(&open_view(&copy.path()).unwrap(), &Ids::default(), &saved.tree()).unwrap();

    let larger = Disk::unformatted(&["size=3g"]);
    saved.adopt(&larger).unwrap();
    assert_same(&describe(&larger.path()), &want);
    assert!(usage(&larger.path()).unwrap().size_bytes.unwrap() > 2 << 30);

    let again = Tmpfs::new(&[]);
    build(&translate(saved.tree(), &saved.private).unwrap(), saved.loader(), again.path());
    assert_same(&describe(again.path()), &want);
}

#[test]
fn a_new_filestore_looks_as_a_new_tmpfs_and_is_sparse() {
    let disk = Disk::new(&["size=1g", "nosuid", "noexec"]);
    let root = fs::metadata(disk.path()).unwrap();
    assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0o1777, 0, 0));
    assert_eq!(fs::read_dir(disk.path()).unwrap().count(), 0);
    let file = fs::metadata(disk.file()).unwrap();
    assert_eq!((file.len(), file.mode() & 0o7777), (1 << 30, 0o600));
    assert!(file.blocks() * 512 < 8 << 20, "{} blocks", file.blocks());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mounts.lines().find(|line| line.contains(disk.path().to_str().unwrap())).unwrap();
    assert!(line.contains("nosuid,noexec") && line.contains(" ext4 "), "{line}");

    let mut mapped = Disk::unformatted(&["size=16m", "mode=750", "uid=7", "gid=8", "nr_inodes=100"]);
    mapped.map = IdMap(vec![IdMapping { container: 0, host: 100_000, size: 1000 }]);
    mapped.make().unwrap();
    let root = fs::metadata(mapped.path()).unwrap();
    assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0o750, 100_007, 100_008));
    let usage = usage(&mapped.path()).unwrap();
    let free = usage.inodes.unwrap() - usage.used_inodes.unwrap();
    assert!((100..150).contains(&free), "{usage:?}");
}

#[test]
fn a_filestore_is_full_at_its_size() {
    let disk = Disk::new(&["size=16m"]);
    let mut file = File::create(disk.path().join("f")).unwrap();
    let mut written = 0;
    let error = loop {
        match file.write(&noise(1 << 20, 1)) {
            Ok(length) => written += length,
            Err(error) => break error,
        }
    };
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert!((14 << 20..16 << 20).contains(&written), "{written}");
}

#[test]
fn deleted_contents_and_files_without_a_name_are_not_saved() {
    let disk = Disk::new(&["size=64m"]);
    fs::write(disk.path().join("deleted"), noise(8 << 20, 1)).unwrap();
    fs::write(disk.path().join("kept"), noise(1 << 20, 2)).unwrap();
    let held = File::create(disk.path().join("held")).unwrap();
    held.write_all_at(&noise(1000, 3), 0).unwrap();
    // All of it has been on disk.
    rustix::fs::syncfs(&held).unwrap();
    fs::remove_file(disk.path().join("deleted")).unwrap();
    fs::remove_file(disk.path().join("held")).unwrap();
    let saved = save_disk(&disk);
    assert!(saved.digests.pages_length() < 2 << 20, "{}", saved.digests.pages_length());
    let copy = Disk::unformatted(&["size=64m"]);
    saved.adopt(&copy).unwrap();
    assert_same(&describe(&copy.path()), &describe(&disk.path()));
    let free = |disk: &Disk| usage(&disk.path()).unwrap().used_bytes.unwrap();
    assert_eq!(free(&disk) - free(&copy), 4096, "the file without a name is gone from the copy");
}

#[test]
fn a_freeze_ends_with_its_guard_and_what_a_dead_process_left_is_thawed() {
    let disk = Disk::new(&["size=16m"]);
    let writable = |name: &str| fs::write(disk.path().join(name), "x");
    let frozen = filestore::freeze(&disk.path()).unwrap();
    let error = filestore::freeze(&disk.path()).unwrap_err();
    assert!(error.to_string().contains("freeze "), "{error}");
    drop(frozen);
    writable("after the guard").unwrap();
    let status = std::process::Command::new("fsfreeze").arg("-f").arg(disk.path()).status().unwrap();
    assert!(status.success());
    filestore::thaw(&disk.path()).unwrap();
    writable("after the thaw").unwrap();
    filestore::thaw(&disk.path()).unwrap();
}

#[test]
fn a_failure_at_any_step_leaves_no_device() {
    for (options, want) in [
        (&["size=100k"][..], "mkfs.ext4"),
        (&["size=16m", "usrquota"], "option \"usrquota\" can't be used"),
        (&["size=16m", "context=nosuchlabel"], "the kernel made no filesystem"),
        (&["size=16e"], "more than a file can have"),
    ] {
        let disk = Disk::unformatted(options);
        let error = disk.make().unwrap_err();
        assert!(error.to_string().contains(want), "{options:?}: {error}");
        assert!(!disk.stays_attached(), "{options:?}");
    }
    let disk = Disk::new(&["size=16m"]);
    let other = Disk::unformatted(&["size=16m"]);
    fs::write(other.file(), "not a filesystem").unwrap();
    assert!(matches!(other.mount(Root::New), Err(FilestoreError::Kernel { .. })));
    fs::copy(disk.file(), other.file()).unwrap();
    fs::remove_dir(other.path()).unwrap();
    assert!(matches!(other.mount(Root::New), Err(FilestoreError::Mount(_))));
}

#[test]
fn a_filestore_that_was_made_up_is_refused() {
    let disk = Disk::new(&["size=16m"]);
    fs::write(disk.path().join("file"), "contents").unwrap();
    let saved = save_disk(&disk);
    let file = File::options().read(true).write(true).open(disk.file()).unwrap();
    unmount(&disk.path()).unwrap();
    for (offset, value, want) in [
        (0x38, 0u8, "no superblock"),
        (0x18, 1, "another size"),
        (0x5c, 0x3c, "features"),
        (0x60, 0xc6, "features"),
        (0x06, 0xff, "larger than its file"),
        (0x150, 1, "larger than its file"),
        // Found by e2fsck: the number of inodes in a group.
        (0x28, 0x13, "e2fsck"),
    ] {
        let offset = 1024 + offset;
        let mut before = [0];
        file.read_exact_at(&mut before, offset).unwrap();
        file.write_all_at(&[value], offset).unwrap();
        let error = filestore::adopt(&disk.file(), 16 << 20).unwrap_err();
        assert!(error.to_string().contains(want), "{offset:#x}: {error}");
        file.write_all_at(&before, offset).unwrap();
    }
    filestore::adopt(&disk.file(), 16 << 20).unwrap();
    disk.mount(Root::Saved(&saved.tree())).unwrap();

    // A sound filesystem that isn't what the tree says.
    let check = || verify(&open_view(&disk.path()).unwrap(), &Ids::default(), &saved.tree());
    check().unwrap();
    fs::set_permissions(disk.path().join("file"), fs::Permissions::from_mode(0o4755)).unwrap();
    let error = check().unwrap_err();
    assert!(matches!(&error, PrivateError::Differs { path } if path.to_string() == "/file"), "{error}");
    fs::set_permissions(disk.path().join("file"), fs::Permissions::from_mode(0o644)).unwrap();
    check().unwrap();
    fs::write(disk.path().join("more"), "").unwrap();
    check().unwrap_err();
}
