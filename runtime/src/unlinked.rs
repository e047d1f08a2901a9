//! Files that have no name any more but are open or mapped: what a checkpoint can't keep.
//!
//! Nothing could reach such a file after a restore, since the processes that hold it aren't saved; so they are
//! counted and reported, once each, however many descriptors and mappings hold them. Looked for in /proc
//! before the freeze, which it would lengthen: the count is of that moment.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;

/// How many there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Unlinked {
    /// Files.
    pub files: u64,
    /// Sum of their sizes, in bytes.
    pub bytes: u64,
}

/// Counts the files without a name on the filesystems with these device numbers that the processes hold.
/// A process or descriptor that goes away meanwhile holds nothing.
pub fn count(processes: &[i32], devices: &[u64]) -> Unlinked {
    let mut sizes = BTreeMap::new();
    for pid in processes {
        for held in descriptors(*pid).into_iter().chain(mappings(*pid)) {
            // Following the link leads to the file itself, whatever became of its name.
            let Ok(file) = fs::metadata(&held) else { continue };
            if file.is_file() && file.nlink() == 0 && devices.contains(&file.dev()) {
                sizes.insert((file.dev(), file.ino()), file.size());
            }
        }
    }
    Unlinked {
        files: sizes.len() as u64,
        bytes: sizes.values().fold(0, |sum, size| sum.saturating_add(*size)),
    }
}

fn descriptors(pid: i32) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"));
    entries.map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

/// The mappings of files whose name is gone, as their links in map_files.
fn mappings(pid: i32) -> Vec<std::path::PathBuf> {
    let maps = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    let directory = format!("/proc/{pid}/map_files");
    let deleted = maps.split(|b| *b == b'\n').filter(|line| line.ends_with(b" (deleted)"));
    let range = |line: &[u8]| {
        let range = std::str::from_utf8(line.split(|b| *b == b' ').next()?).ok()?;
        // maps writes leading zeros, the links' names don't.
        let (start, end) = range.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some(Path::new(&directory).join(format!("{:x}-{:x}", number(start)?, number(end)?)))
    };
    deleted.filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::fs::FileExt;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn files_without_a_name_are_counted_once() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let device = fs::metadata(dir.path()).unwrap().dev();
        let make = |name: &str, size| {
            let path = dir.path().join(name);
            let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
            file.write_all_at(&vec![1; size], 0).unwrap();
            (file, path)
        };
        let me = [std::process::id().cast_signed()];
        // Other tests of this process may hold such files too, so changes are looked at.
        let (named, _) = make("named", 10);
        let before = count(&me, &[device]);
        let (gone, path) = make("gone", 1000);
        let twice = gone.try_clone().unwrap();
        fs::remove_file(&path).unwrap();
        let held = count(&me, &[device]);
        assert_eq!((held.files - before.files, held.bytes - before.bytes), (1, 1000));
        assert_eq!(count(&me, &[device + 12_345]), Unlinked::default());
        drop((gone, twice));
        assert_eq!(count(&me, &[device]), before);

        drop(named);
    }

    #[test]
    fn a_running_program_without_a_name_is_counted_by_its_mapping() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("cat");
        let size = fs::copy("/bin/cat", &program).unwrap();
        let device = fs::metadata(&program).unwrap().dev();
        let mut child = Command::new(&program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // What it says shows that it runs: spawn returns before its program is mapped.
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let pid = [child.id().cast_signed()];
        fs::remove_file(&program).unwrap();
        let held = count(&pid, &[device]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(held, Unlinked { files: 1, bytes: size });
        assert_eq!(count(&pid, &[device]), Unlinked::default(), "a process that is gone holds nothing");
    }
}
