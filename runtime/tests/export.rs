//! `stillframe export`, extracted by the tars there are.

#[path = "../../tmpfs/tests/support/filesystem.rs"]
mod filesystem;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nix::poll::{PollFd, PollFlags, poll};

use filesystem::{Tmpfs, describe, fill, noise, set_times};
use stillframe_pgalloc::{AsyncPagesFileSave, MemoryFile, PagesMeta, SaveOptions};
use stillframe_runtime::image::{ImageWriter, META, PAGES, PartWriter, TREE};
use stillframe_runtime::manifest::{Manifest, Offsets, Part, SavedContainer, SavedFilesystem};
use stillframe_tmpfs::mount::open_view;
use stillframe_tmpfs::save::save_tree;
use stillframe_tmpfs::{Ids, ResourceId};

/// An image of these filesystems, whose ResourceIDs are c:/0, c:/1 and so on.
fn image_of(filesystems: &[&Tmpfs]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let image = ImageWriter::create(dir.path(), &[]).unwrap();
    let pages = AsyncPagesFileSave::new(image.file(PAGES).unwrap(), SaveOptions::default()).unwrap();
    let memory = pages.register_memory_file(&MemoryFile::main()).unwrap();
    let mut tree = PartWriter::new(image.file(TREE).unwrap());
    let mut saved = Vec::new();
    for (index, filesystem) in filesystems.iter().enumerate() {
        let tree_start = tree.position();
        let view = open_view(filesystem.path()).unwrap();
        let (out, summary) = save_tree(&view, &Ids::default(), &memory, tree).unwrap();
        tree = out;
        saved.push(SavedFilesystem {
            resource_id: ResourceId::new("c", &format!("/{index}")),
            aliases: Vec::new(),
            offsets: Offsets::PagesFile,
            tree_start,
            tree_end: tree.position(),
            tree_length: None,
            options: String::new(),
            files: summary.files,
            entries: summary.entries,
            logical_bytes: summary.logical_bytes,
            data_bytes: summary.data_bytes,
        });
    }
    let summary = pages.finish().unwrap();
    let meta =
        PagesMeta { pages_length: summary.length, digests: summary.digests, private: Vec::new() }.encode();
    image.write(META, &meta).unwrap();
    let manifest = Manifest {
        stillframe: String::new(),
        created: 0,
        tree: tree.finish().unwrap(),
        meta: Part::of(&meta),
        pages_length: summary.length,
        pages_path: None,
        containers: vec![SavedContainer { name: "c".to_owned(), named: true }],
        pod: None,
        filesystems: saved,
        processes: Vec::new(),
    };
    image.commit(&manifest).unwrap();
    dir
}

fn stillframe(arguments: &[&str], image: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stillframe"));
    command.arg("export").args(arguments).arg(image);
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Extracts the image's one filesystem, through a pipe to `tar` and its arguments; returns what either complained of.
fn extract(image: &Path, to: &Tmpfs, tar: &[&str]) -> String {
    let mut export = stillframe(&[], image).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let archive = export.stdout.take().unwrap();
    let extracted =
        Command::new(tar[0]).args(&tar[1..]).current_dir(to.path()).stdin(archive).output().unwrap();
    let exported = export.wait_with_output().unwrap();
    assert!(
        exported.status.success() && extracted.status.success(),
        "{}{}",
        stderr(&exported),
        stderr(&extracted)
    );
    stderr(&exported) + &stderr(&extracted)
}

/// Everything, but for what this tar can't bring back: access times if not `atime`, inode flags if not `flags`.
fn kept(filesystem: &Tmpfs, atime: bool, flags: bool) -> BTreeMap<PathBuf, String> {
    let mut all = describe(filesystem);
    for text in all.values_mut() {
        let (at, attr) = (text.find(" a ").unwrap(), text.find(" attr ").unwrap());
        let end = attr + 6 + text[attr + 6..].find(' ').unwrap();
        let times = &text[..if atime { attr } else { at }];
        *text = format!("{times}{}{}", if flags { &text[attr..end] } else { "" }, &text[end..]);
    }
    all
}

fn assert_same(after: &BTreeMap<PathBuf, String>, before: &BTreeMap<PathBuf, String>) {
    let differ = before.iter().filter(|(path, want)| after.get(*path) != Some(want));
    let head = |text: &str| text.chars().take(300).collect::<String>();
    let differ = differ.map(|(path, want)| (path, head(want), after.get(path).map(|text| head(text))));
    let differ: Vec<_> = differ.collect();
    assert!(differ.is_empty(), "{differ:#?}");
    assert_eq!(after.len(), before.len());
}

#[test]
fn gnu_tar_brings_everything_back() {
    let (old, new) = (Tmpfs::new(&[]), Tmpfs::new(&[]));
    fill(old.path());
    let image = image_of(&[&old]);
    let tar = ["tar", "--xattrs", "--xattrs-include=*", "--acls", "--sparse", "--numeric-owner", "-xpf", "-"];
    let said = extract(image.path(), &new, &tar);
    assert!(said.contains("\"/socket\" is a socket"), "{said}");
    // What tar has no word for.
    fs::remove_file(old.path().join("socket")).unwrap();
    set_times(old.path(), (111, 222), (333, 444));
    assert_same(&kept(&new, false, false), &kept(&old, false, false));
}

/// Of what libarchive 3.6 does differently by itself there is nothing here: it leaves `%3D` in names of xattrs, takes
/// -1.5 for -1 + 0.5, gives directories below one with nodump that flag, and sets the time of the root too early.
#[test]
fn libarchive_brings_access_times_and_inode_flags_back_too() {
    let (old, new) = (Tmpfs::new(&[]), Tmpfs::new(&[]));
    let at = |name: &str| old.path().join(name);
    let sparse = File::create(at("sparse")).unwrap();
    sparse.set_len(i64::MAX as u64).unwrap();
    sparse.write_all_at(&noise(70_000, 1), 1 << 40).unwrap();
    sparse.write_all_at(b"end", i64::MAX as u64 - 3).unwrap();
    fs::write(at("immutable"), noise(5000, 2)).unwrap();
    fs::hard_link(at("sparse"), at("link")).unwrap();
    fs::write(at("acl"), noise(10, 2)).unwrap();
    let acl = ["-m", "u:1000:r,g:5:rwx,u:7:-"];
    assert!(Command::new("setfacl").args(acl).arg(at("acl")).status().unwrap().success());
    for (index, name) in ["acl", "immutable", "sparse"].iter().enumerate() {
        let index = index as i64;
        set_times(&at(name), (1_700_000_000, 1 + index), (1_600_000_000, 5 + index));
    }
    let flags = rustix::fs::IFlags::IMMUTABLE | rustix::fs::IFlags::NODUMP;
    rustix::fs::ioctl_setflags(File::open(at("immutable")).unwrap(), flags).unwrap();
    let image = image_of(&[&old]);
    let said = extract(image.path(), &new, &["bsdtar", "--acls", "--fflags", "--numeric-owner", "-xpf", "-"]);
    assert_eq!(said, "");
    let (mut before, mut after) = (kept(&old, true, true), kept(&new, true, true));
    before.remove(Path::new("/"));
    after.remove(Path::new("/"));
    assert_same(&after, &before);
}

#[test]
fn one_filesystem_is_chosen_or_the_choice_is_told() {
    let (one, two, new) = (Tmpfs::new(&[]), Tmpfs::new(&[]), Tmpfs::new(&[]));
    fs::write(one.path().join("one"), b"1").unwrap();
    fs::write(two.path().join("two"), b"2").unwrap();
    let image = image_of(&[&one, &two]);
    let failed = |arguments: &[&str]| {
        let output = stillframe(arguments, image.path()).output().unwrap();
        assert!(!output.status.success() && output.stdout.is_empty());
        stderr(&output)
    };
    let all = "c:/0 c:/1";
    let several = failed(&[]);
    assert!(several.contains("Give one of them by --path") && several.contains(all), "{several}");
    let none = failed(&["--path", "/2"]);
    assert!(none.contains("no filesystem \"/2\"") && none.contains(all), "{none}");

    let archive = new.path().join("archive.tar");
    let output =
        stillframe(&["--path", "c:/1", "-o", archive.to_str().unwrap()], image.path()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let listed = Command::new("tar").arg("-tf").arg(&archive).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&listed.stdout), "./\n./two\n");
}

#[test]
fn damage_is_found_before_it_is_written_and_the_file_is_removed() {
    let (old, new) = (Tmpfs::new(&[]), Tmpfs::new(&[]));
    fs::write(old.path().join("f"), noise(3 << 20, 3)).unwrap();
    let image = image_of(&[&old]);
    let pages = File::options().read(true).write(true).open(image.path().join(PAGES)).unwrap();
    let mut byte = [0];
    pages.read_exact_at(&mut byte, 2_200_000).unwrap();
    pages.write_all_at(&[byte[0] ^ 1], 2_200_000).unwrap();
    let archive = new.path().join("archive.tar");
    let output = stillframe(&["-o", archive.to_str().unwrap()], image.path()).output().unwrap();
    assert!(!output.status.success());
    assert!(stderr(&output).contains("between offsets 2162688 and 2228224"), "{}", stderr(&output));
    assert!(!archive.exists());
    let piped = stillframe(&[], image.path()).output().unwrap();
    let right = fs::read(old.path().join("f")).unwrap();
    let begin = piped.stdout.windows(4096).position(|window| *window == right[..4096]).unwrap();
    assert!(right.starts_with(&piped.stdout[begin..]), "nothing but what was saved came out");
}

#[test]
fn a_terminal_is_refused() {
    let filesystem = Tmpfs::new(&[]);
    let image = image_of(&[&filesystem]);
    let terminal = nix::pty::openpty(None, None).unwrap();
    let output = stillframe(&[], image.path()).stdout(terminal.slave).stderr(Stdio::piped()).spawn().unwrap();
    let output = output.wait_with_output().unwrap();
    assert!(!output.status.success());
    assert!(stderr(&output).contains("isn't written to a terminal"), "{}", stderr(&output));
    let mut master = File::from(terminal.master);
    // The other end is closed: what was written comes, and then EIO.
    let mut written = Vec::new();
    let _ = master.read_to_end(&mut written);
    assert_eq!(written, b"");
}

#[test]
fn progress_is_shown_on_a_terminal_and_wiped_at_the_end() {
    let old = Tmpfs::new(&[]);
    fs::write(old.path().join("f"), noise(3 << 20, 1)).unwrap();
    let image = image_of(&[&old]);
    let size = nix::pty::Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    let terminal = nix::pty::openpty(Some(&size), None).unwrap();
    let mut command = stillframe(&[], image.path());
    let mut export =
        command.stdout(Stdio::piped()).stderr(terminal.slave).env("TERM", "xterm").spawn().unwrap();
    // Only the export has the other end now.
    drop(command);
    let mut master = File::from(terminal.master);
    let mut shown = String::new();
    let mut read = || {
        let mut bytes = [0; 4096];
        let mut ready = [PollFd::new(master.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ready, 20_000u16), Ok(1), "nothing is shown any more: {shown:?}");
        // EIO: the other end is closed.
        let length = master.read(&mut bytes).unwrap_or(0);
        shown.push_str(&String::from_utf8_lossy(&bytes[..length]));
        (length > 0, shown.clone())
    };
    // It waits for us to read more of the archive, of which a pipe doesn't hold much.
    let mut stdout = export.stdout.take().unwrap();
    let mut archive = vec![0; 3 << 19];
    stdout.read_exact(&mut archive).unwrap();
    while let (more, shown) = read()
        && !shown.contains("/3.00 MiB")
    {
        assert!(more, "{shown:?}");
    }
    stdout.read_to_end(&mut archive).unwrap();
    assert!(export.wait().unwrap().success());
    assert!(archive.len() > 3 << 20);
    while read().0 {}
    let (_, shown) = read();
    let end = shown.rsplit("MiB").next().unwrap();
    assert!(end.contains("\u{1b}[2K"), "the line is erased after the last: {shown:?}");
}

#[test]
fn a_tree_with_paths_of_megabytes_is_refused_before_anything_is_written() {
    let old = Tmpfs::new(&[]);
    let mut dir = File::open(old.path()).unwrap();
    for _ in 0..4200 {
        rustix::fs::mkdirat(&dir, [b'd'; 250].as_slice(), rustix::fs::Mode::RWXU).unwrap();
        let flags = rustix::fs::OFlags::DIRECTORY;
        let opened = rustix::fs::openat(&dir, [b'd'; 250].as_slice(), flags, rustix::fs::Mode::empty());
        dir = File::from(opened.unwrap());
    }
    let image = image_of(&[&old]);
    let output = stillframe(&[], image.path()).output().unwrap();
    assert!(!output.status.success());
    assert_eq!(output.stdout, b"");
    let message = stderr(&output);
    // The 4178th directory is the first one: 1 + 4178 * 251.
    assert!(message.contains("its path has 1048679 bytes") && message.contains("up to 1048576"), "{message}");
}
