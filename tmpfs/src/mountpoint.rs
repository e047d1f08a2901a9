//! Making a mountpoint inside a filesystem, for a mount that lies on it.
//!
//! runc makes missing mountpoints itself, but it can't do so on a bind mount that is read-only from
//! the start, which a read-only tmpfs is when we hand it over. Mirrors runc's createMountpoint: missing
//! directories get mode 0755 and belong to the container's root, and a file is mounted over a file.

use std::fs::File;
use std::io;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

/// Makes `path` below `root` (a writable directory descriptor) with its parents, as a directory or else
/// an empty file, owned by `owner` (uid and gid of the host). What is there already is left as it is; a
/// symbolic link on the way is an error (ELOOP or ENOTDIR), since it could lead elsewhere.
pub fn make_mountpoint(root: &File, path: &str, directory: bool, owner: (u32, u32)) -> io::Result<()> {
    let names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
    let mut dir = root.try_clone()?;
    for (index, name) in names.iter().enumerate() {
        let last = index + 1 == names.len();
        if last && rustix::fs::statat(&dir, *name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            return Ok(());
        }
        if last && !directory {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&dir, *name, flags, Mode::from_raw_mode(0o755))?;
            return own(&File::from(file), owner);
        }
        let made = match rustix::fs::mkdirat(&dir, *name, Mode::from_raw_mode(0o755)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(error.into()),
        };
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        dir = File::from(rustix::fs::openat(&dir, *name, flags, Mode::empty())?);
        if made {
            own(&dir, owner)?;
        }
    }
    Ok(())
}

fn own(file: &File, (uid, gid): (u32, u32)) -> io::Result<()> {
    Ok(rustix::fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn what_is_missing_is_made_and_what_is_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("there")).unwrap();
        fs::write(dir.path().join("there/file"), "kept").unwrap();
        let root = File::open(dir.path()).unwrap();
        make_mountpoint(&root, "/there/a/b", true, (5, 6)).unwrap();
        make_mountpoint(&root, "there/new", false, (5, 6)).unwrap();
        make_mountpoint(&root, "/there/file", false, (5, 6)).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("there/file")).unwrap(), "kept");
        for (path, owner) in
            [("there", (0, 0)), ("there/a", (5, 6)), ("there/a/b", (5, 6)), ("there/new", (5, 6))]
        {
            let metadata = fs::metadata(dir.path().join(path)).unwrap();
            assert_eq!((metadata.uid(), metadata.gid()), owner, "{path}");
        }
        assert!(dir.path().join("there/new").is_file());
    }

    #[test]
    fn a_symbolic_link_is_not_followed() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        symlink(elsewhere.path(), dir.path().join("link")).unwrap();
        let root = File::open(dir.path()).unwrap();
        make_mountpoint(&root, "/link/x", true, (0, 0)).unwrap_err();
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    }
}
