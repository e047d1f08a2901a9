//! Writers of attributes.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::XattrFlags;

use crate::{FILES, Seen, Step, Tree, last, make_small, pattern};

fn small(dir: &Path) -> impl Fn(u64) -> PathBuf + use<> {
    let dir = dir.to_owned();
    make_small(&dir);
    move |s| dir.join(format!("f{}", s % FILES))
}

pub(crate) fn xattr(dir: &Path) -> Step {
    let path = small(dir);
    Box::new(move |s| {
        rustix::fs::setxattr(path(s), "user.step", &s.to_le_bytes(), XattrFlags::empty()).unwrap();
    })
}

pub(crate) fn xattrs(s: u64) -> Tree {
    let file = |k| {
        let xattr = Some(last(s, k, FILES)).filter(|s| *s > 0).map(|s| s.to_le_bytes().to_vec());
        (format!("f{k}"), Seen::File { content: pattern(k, 100), mode: 0o644, xattr, names: 1 })
    };
    (0..FILES).map(file).collect()
}

pub(crate) fn mode(dir: &Path) -> Step {
    let path = small(dir);
    Box::new(move |s| fs::set_permissions(path(s), Permissions::from_mode(s as u32 % 0o1000)).unwrap())
}

pub(crate) fn modes(s: u64) -> Tree {
    let file = |k| {
        let mode = match last(s, k, FILES) {
            0 => 0o644,
            s => s as u32 % 0o1000,
        };
        (format!("f{k}"), Seen::File { content: pattern(k, 100), mode, xattr: None, names: 1 })
    };
    (0..FILES).map(file).collect()
}
