//! Trees as large as they get, and how much memory saving one takes.

#[path = "support/filesystem.rs"]
mod filesystem;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::process::Command;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use stillframe_pgalloc::{AsyncPagesFileSave, MemoryFile, SaveOptions};
use stillframe_tmpfs::Ids;
use stillframe_tmpfs::mount::{open_view, usage};
use stillframe_tmpfs::save::{SaveTreeError, save_tree};

use filesystem::{DEVICES, Tmpfs, noise, save};

/// The names of a directory in the order in which it lists them.
fn listing(dir: impl AsFd) -> Vec<Vec<u8>> {
    let entries = rustix::fs::Dir::read_from(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().to_bytes().to_vec()).collect()
}

/// Saves and restores a directory of so many names.
fn one_directory(count: u32) {
    let (old, new) = (Tmpfs::new(&["nr_inodes=0"]), Tmpfs::new(&["nr_inodes=0"]));
    let dir = File::open(old.path()).unwrap();
    for index in 0..count {
        // Not in any order that a listing could have by chance.
        let name = format!("{:08x}", index.wrapping_mul(0x9e37_79b1));
        match index % 1000 {
            0 => rustix::fs::mkdirat(&dir, name, Mode::RWXU).unwrap(),
            1 => rustix::fs::symlinkat(&*name, &dir, &*name).unwrap(),
            _ => rustix::fs::mknodat(&dir, name, FileType::RegularFile, Mode::RUSR, 0).unwrap(),
        }
    }
    let saved = save(&old);
    assert_eq!(saved.summary.entries, count.into());
    saved.restore(&new, &DEVICES()).unwrap();
    assert!(listing(File::open(new.path()).unwrap()) == listing(&dir), "the same names in the same order");
}

#[test]
fn a_directory_of_100_000_names_comes_back_in_order() {
    one_directory(100_000);
}

#[test]
#[ignore = "takes 2 GB of memory and half a minute in a debug build"]
fn a_directory_of_a_million_names_comes_back_in_order() {
    one_directory(1_000_000);
}

const DEPTH: usize = 10_000;
const LONG: [u8; 255] = [b'n'; 255];

/// The innermost of [`DEPTH`] directories with the longest names there are.
fn innermost(root: &File, make: bool) -> File {
    let mut dir = root.try_clone().unwrap();
    for _ in 0..DEPTH {
        if make {
            rustix::fs::mkdirat(&dir, LONG.as_slice(), Mode::RWXU).unwrap();
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW;
        dir = File::from(rustix::fs::openat(&dir, LONG.as_slice(), flags, Mode::empty()).unwrap());
    }
    dir
}

#[test]
fn directories_10_000_deep_come_back_and_the_archive_grows_with_their_names_only() {
    let (old, new) = (Tmpfs::new(&[]), Tmpfs::new(&[]));
    let root = File::open(old.path()).unwrap();
    let dir = innermost(&root, true);
    let file = rustix::fs::openat(&dir, "f", OFlags::WRONLY | OFlags::CREATE, Mode::RUSR).unwrap();
    File::from(file).write_all_at(b"deep", 0).unwrap();
    // Hard links between up here and down there, whichever comes first.
    rustix::fs::linkat(&dir, "f", &root, "link", AtFlags::empty()).unwrap();
    let file = rustix::fs::openat(&root, "g", OFlags::WRONLY | OFlags::CREATE, Mode::RUSR).unwrap();
    drop(file);
    rustix::fs::linkat(&root, "g", &dir, "g", AtFlags::empty()).unwrap();
    rustix::fs::linkat(&dir, "g", &dir, "h", AtFlags::empty()).unwrap();

    let saved = save(&old);
    assert_eq!((saved.summary.entries as usize, saved.summary.files), (DEPTH + 5, 2));
    // Three blocks an object and one for its times; paths of up to 4 KiB for the first sixteen.
    let (size, most) = (saved.archive.len(), (DEPTH + 5) * 4 * 512 + 16 * 4096);
    assert!(size <= most, "{size} bytes, where {most} are enough");
    let mut archive = tempfile::tempfile().unwrap();
    archive.write_all(&saved.archive).unwrap();
    archive.rewind().unwrap();
    let tar =
        Command::new("tar").args(["--quoting-style=escape", "-tf", "-"]).stdin(archive).output().unwrap();
    let listed: Vec<&[u8]> = tar.stdout.split_inclusive(|byte| *byte == b'\n').collect();
    assert!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
    assert_eq!(listed.len(), DEPTH + 6);
    assert!(listed.contains(&&[b"@500/", &LONG[..], b"/\n"].concat()[..]));
    saved.restore(&new, &DEVICES()).unwrap();
    let root = File::open(new.path()).unwrap();
    let dir = innermost(&root, false);
    let of = |dir: &File, name: &str| {
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        (stat.st_ino, stat.st_nlink, stat.st_size)
    };
    assert_eq!((of(&dir, "f").1, of(&dir, "f").2), (2, 4));
    assert_eq!(of(&dir, "f"), of(&root, "link"));
    assert_eq!((of(&dir, "g").1, of(&dir, "g")), (3, of(&root, "g")));
    assert_eq!(of(&dir, "h"), of(&root, "g"));
    assert!(save(&new).archive == saved.archive);
}

#[test]
fn a_file_or_directory_that_vanishes_meanwhile_is_a_change_with_its_path() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let old = Tmpfs::new(&[]);
    let dir = old.path().join("directory");
    fs::create_dir(&dir).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Whichever it is that the walk meets, each is there when its directory is listed most of the time, and gone
        // shortly after.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for index in 0..300 {
                    fs::write(dir.join(format!("f{index}")), b"x").unwrap();
                    fs::create_dir(dir.join(format!("d{index}"))).unwrap();
                }
                for index in (0..300).rev() {
                    fs::remove_dir(dir.join(format!("d{index}"))).unwrap();
                    fs::remove_file(dir.join(format!("f{index}"))).unwrap();
                }
            }
        });
        let mut changed = 0;
        for _ in 0..100_000 {
            match filesystem::try_save(&old, &Ids::default()) {
                Ok(_) => {}
                Err(error @ SaveTreeError::Changed { .. }) => {
                    assert!(error.to_string().starts_with("\"/directory"), "{error}");
                    changed += 1;
                }
                Err(error) => {
                    stop.store(true, Ordering::Relaxed);
                    panic!("{error:?}");
                }
            }
            if changed == 5 {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(changed, 5);
    });
}

/// A line of /proc/self/status, in KiB.
fn status(key: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

const CHILD: &str = "STILLFRAME_TEST_SAVES";

/// In a process of its own, so that no other test's memory is measured.
#[test]
fn a_save_takes_less_than_64_mib_for_a_tree_of_any_size() {
    if let Some(path) = std::env::var_os(CHILD) {
        return measure(path.as_ref());
    }
    let old = Tmpfs::new(&[]);
    let large = noise(200 << 20, 1);
    fs::write(old.path().join("large"), &large).unwrap();
    for directory in 0..20 {
        let directory = old.path().join(format!("d{directory}"));
        fs::create_dir(&directory).unwrap();
        for file in 0..1000 {
            fs::write(directory.join(format!("f{file}")), &large[..8192]).unwrap();
        }
    }
    for file in 0..40 {
        fs::write(old.path().join(format!("m{file}")), &large[..1 << 20]).unwrap();
    }
    // Attributes too are handed from thread to thread.
    for file in 0..200 {
        let path = old.path().join(format!("m{}", file % 40));
        let name = format!("user.{file}");
        rustix::fs::setxattr(path, name, &large[..8000], rustix::fs::XattrFlags::empty()).unwrap();
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "a_save_takes_less_than_64_mib_for_a_tree_of_any_size", "--nocapture"]);
    let output = child.env(CHILD, old.path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    assert!(
        output.status.success() && text.contains("data 415 MB"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn measure(path: &OsStr) {
    let pages = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let tree = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    fs::write("/proc/self/clear_refs", "5").unwrap(); // VmHWM begins anew
    let idle = status("VmHWM:");
    let save = AsyncPagesFileSave::new(pages, SaveOptions::default()).unwrap();
    let memory = save.register_memory_file(&MemoryFile::main()).unwrap();
    let view = open_view(path.as_ref()).unwrap();
    let (_, summary) = save_tree(&view, &Ids::default(), &memory, tree).unwrap();
    save.finish().unwrap();
    let peak = status("VmHWM:");
    println!("data {} MB, idle {idle} KiB, peak {peak} KiB", summary.data_bytes / 1_000_000);
    assert!(peak - idle < 64 << 10, "{} KiB above idle", peak - idle);
}

/// How often the kernel tried to allocate a huge page for a tmpfs, since it was booted.
fn huge_pages_tried() -> Option<u64> {
    let count = |name: &str| {
        let text =
            fs::read_to_string(format!("/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/stats/{name}"));
        text.ok()?.trim().parse::<u64>().ok()
    };
    Some(count("shmem_alloc")? + count("shmem_fallback")?)
}

/// With within_size a huge page is only taken where it lies within the file's size, so the size must be set before
/// the contents; with always, whatever the writes are like.
#[test]
fn huge_pages_are_huge_again() {
    let contents = noise(32 << 20, 1);
    for option in ["huge=within_size", "huge=always"] {
        let (old, new) = (Tmpfs::new(&[option]), Tmpfs::new(&[option]));
        let file = File::create(old.path().join("f")).unwrap();
        file.set_len(32 << 20).unwrap();
        file.write_all_at(&contents, 0).unwrap();
        let saved = save(&old);
        let Some(before) = huge_pages_tried() else {
            println!("SKIPPED: huge_pages_are_huge_again: this kernel doesn't count huge pages of tmpfs");
            return;
        };
        saved.restore(&new, &DEVICES()).unwrap();
        let tried = huge_pages_tried().unwrap() - before;
        assert!(tried >= 16, "{option}: {tried} huge pages for 32 MiB");
        assert_eq!(filesystem::describe(&new), filesystem::describe(&old));
    }
}

fn huge_option(filesystem: &Tmpfs) -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mounts.lines().find(|line| line.contains(filesystem.path().to_str().unwrap())).unwrap();
    let mut options = line.rsplit(' ').next().unwrap().split(',');
    options.find(|option| option.starts_with("huge=")).map(str::to_owned)
}

/// What the kernel would take back behind the ends of files isn't taken in the first place.
#[test]
fn small_files_take_no_huge_pages_where_not_all_have_room_for_one() {
    let old = Tmpfs::new(&[]);
    for number in 0..40 {
        fs::write(old.path().join(format!("f{number}")), noise(5000, number)).unwrap();
    }
    fs::write(old.path().join("large"), noise(5 << 20, 40)).unwrap();
    let saved = save(&old);
    let small = 40 * 2 * 4096 + (5 << 20);
    // Three huge pages for the large one.
    for (size, used) in [(64 << 20, small), (86 << 20, 43 << 21)] {
        let new = Tmpfs::new(&["huge=always", &format!("size={size}")]);
        saved.restore(&new, &DEVICES()).unwrap();
        assert_eq!(usage(new.path()).unwrap().used_bytes, Some(used), "size={size}");
        assert_eq!(filesystem::describe(&new), filesystem::describe(&old));
        assert_eq!(huge_option(&new).as_deref(), Some("huge=always"));
    }
}

/// Scattered data, for which huge pages would take all of the file's size.
#[test]
fn what_fits_with_small_pages_is_restored_where_huge_pages_would_not_fit() {
    const PAGES: u64 = 800;
    let old = Tmpfs::new(&[]);
    let data = noise(4096, 1);
    let sparse = File::create(old.path().join("sparse")).unwrap();
    for page in 0..PAGES {
        sparse.write_all_at(&data, page << 21).unwrap();
    }
    let saved = save(&old);
    for huge in ["always", "within_size"] {
        for size in [PAGES * 4096, 16 << 20] {
            let option = format!("huge={huge}");
            let new = Tmpfs::new(&[&option, &format!("size={size}")]);
            saved.restore(&new, &DEVICES()).unwrap();
            assert_eq!(usage(new.path()).unwrap().used_bytes, Some(PAGES * 4096), "{option} size={size}");
            let file = File::open(new.path().join("sparse")).unwrap();
            let mut page = [0; 4096];
            for number in 0..PAGES {
                file.read_exact_at(&mut page, number << 21).unwrap();
                assert!(page == *data);
            }
            // Only for the time of the restore.
            assert_eq!(huge_option(&new), Some(option));
        }
    }
    let new = Tmpfs::new(&["huge=always", &format!("size={}", (PAGES - 1) * 4096)]);
    let error = saved.restore(&new, &DEVICES()).unwrap_err().to_string();
    assert!(error.contains(&format!("holds {} bytes of pages", PAGES * 4096)), "{error}");
}
