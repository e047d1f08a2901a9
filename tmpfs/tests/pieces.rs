//! The archive of a tree that is made in pieces before the freeze.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use stillframe_pgalloc::{AsyncMemoryFileSave, AsyncPagesFileSave, MemoryFile, SaveOptions};
use stillframe_tmpfs::Ids;
use stillframe_tmpfs::live::{Live, coarse_now};
use stillframe_tmpfs::mount::open_view;

#[path = "support/filesystem.rs"]
mod filesystem;

use filesystem::Tmpfs;

/// Makes nothing smaller, and counts what it is given.
fn plain(bytes: &[u8], given: &mut usize) -> io::Result<Vec<u8>> {
    *given += bytes.len();
    Ok(bytes.to_vec())
}

/// What is made of the archive at the end: how many bytes were made again, and whether it is the one that is made
/// at once.
fn finish(live: &mut Live, memory: &AsyncMemoryFileSave<'_>) -> usize {
    live.settle(memory).unwrap();
    // What was changed in the tick of the thaw isn't told from what is changed after it.
    let tick = coarse_now();
    while coarse_now() == tick {
        std::thread::yield_now();
    }
    live.verify(coarse_now()).unwrap();
    let (archive, summary) = live.write(&Ids::default(), Vec::new()).unwrap();
    let mut again = 0;
    let found = live.compressed(&Ids::default(), &mut |bytes| plain(bytes, &mut again)).unwrap();
    assert_eq!(found.length, archive.len() as u64);
    assert_eq!(found.summary, summary);
    assert!(found.pieces.concat() == archive, "the archive differs");
    again
}

#[test]
fn only_pieces_in_which_something_has_changed_are_made_again() {
    let filesystem = Tmpfs::new(&[]);
    let dir = filesystem.path();
    let path = |number: usize| dir.join(format!("{}/{number:04}", number % 7));
    (0..7).for_each(|number| fs::create_dir(dir.join(number.to_string())).unwrap());
    (0..2000).for_each(|number| fs::write(path(number), [number as u8; 100]).unwrap());
    fs::hard_link(path(0), path(1999).with_file_name("link")).unwrap();
    let pages = tempfile::tempfile().unwrap();
    let save = AsyncPagesFileSave::new(pages, SaveOptions::default()).unwrap();
    let main = MemoryFile::main();
    let memory = save.register_memory_file(&main).unwrap();
    let prepared = || {
        let mut live = Live::begin(&open_view(dir).unwrap(), None).unwrap();
        assert!(live.copy(&memory).unwrap());
        let mut made = 0;
        live.prepare(&Ids::default(), &mut |bytes| plain(bytes, &mut made));
        assert!(made > 2000 * 1024);
        (live, made)
    };
    // Two blocks.
    let trailer = 1024;

    let (mut live, _) = prepared();
    assert_eq!(finish(&mut live, &memory), trailer, "nothing has changed");

    // Contents, attributes and, of what nobody tells, an access time.
    let access =
        |path: &Path| File::open(path)?.set_times(fs::FileTimes::new().set_accessed(std::time::UNIX_EPOCH));
    let alterations: [fn(&Path) -> io::Result<()>; 3] = [
        |path| fs::write(path, "longer than it was before, and other bytes"),
        |path| fs::set_permissions(path, fs::Permissions::from_mode(0o600)),
        access,
    ];
    for (number, alter) in alterations.into_iter().enumerate() {
        let (mut live, _) = prepared();
        alter(&path(1000)).unwrap();
        let again = finish(&mut live, &memory) - trailer;
        assert!((1024..=(256 << 10) + 1024).contains(&again), "{number}: {again}");
    }

    // A name, and an inode with two of them.
    let changes: [fn(&Path) -> io::Result<()>; 2] =
        [|path| fs::rename(path, path.with_extension("new")), |path| fs::write(path, "y")];
    for change in changes {
        let (mut live, made) = prepared();
        change(&path(0)).unwrap();
        assert_eq!(finish(&mut live, &memory), made + trailer);
        if path(0).with_extension("new").exists() {
            fs::rename(path(0).with_extension("new"), path(0)).unwrap();
        }
    }
    assert_eq!(fs::metadata(path(0)).unwrap().nlink(), 2);
}
