//! `fill DIR`: a small tree with everything that a filesystem may hold and a backup may forget.
//!
//! The same seed makes the same tree: names, contents, owners, modes, times. What the kernel refuses for lack of
//! a capability (device nodes, `trusted.*`) is left out and named in the output, not silently.

mod copy;
mod objects;
mod tree;

use std::io::{self, Write};
use std::path::PathBuf;

pub use copy::copy_tree;
use tree::Tree;

/// What to put into the directory besides the small tree.
#[derive(Debug, Default)]
pub struct Options {
    /// Everything random comes from it.
    pub seed: u64,
    /// Bytes of one file of random data, `big`.
    pub big: u64,
    /// A directory whose contents are copied to `copy`, with modes, owners, times and links.
    pub copy: Option<PathBuf>,
    /// Also a chain of directories whose path is longer than PATH_MAX.
    pub beyond_path_max: bool,
    /// Also files with inode flags (immutable, append only, no dump).
    pub inode_flags: bool,
}

/// Fills `dir`, which exists, and says on `out` what it made and what it couldn't make.
pub fn fill(dir: &std::path::Path, options: &Options, out: &mut dyn Write) -> io::Result<()> {
    let mut tree = Tree::open(dir, options.seed)?;
    objects::contents(&mut tree)?;
    objects::names(&mut tree)?;
    objects::directories(&mut tree)?;
    objects::kinds(&mut tree)?;
    objects::links(&mut tree)?;
    objects::attributes(&mut tree)?;
    objects::times(&mut tree)?;
    if options.beyond_path_max {
        objects::beyond_path_max(&mut tree)?;
    }
    if options.big > 0 {
        objects::big(&mut tree, options.big)?;
    }
    if let Some(source) = &options.copy {
        let target = tree.dir(b"copy")?;
        let copied = copy_tree(source, &target)?;
        tree.count(copied);
    }
    let mut report = tree.finish()?;
    if options.inode_flags {
        report.left_out.extend(objects::inode_flags(dir)?);
    }
    for what in &report.left_out {
        writeln!(out, "left out: {what}")?;
    }
    writeln!(out, "filled {} objects", report.objects)?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::list::list;

    /// A tmpfs is what it is for; /dev/shm is one on every Linux.
    fn scratch(name: &str) -> PathBuf {
        let dir = PathBuf::from(format!("/dev/shm/stillframe-probe-{}-{name}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        dir
    }

    fn listing(dir: &std::path::Path) -> Vec<String> {
        let mut out = Vec::new();
        list(dir, false, &mut out).unwrap();
        String::from_utf8(out).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn the_same_seed_makes_the_same_tree_and_looking_changes_nothing() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: the_same_seed_makes_the_same_tree: owners and device nodes need root");
            return;
        }
        let options = Options { seed: 7, big: 100_000, beyond_path_max: true, ..Options::default() };
        let (one, two, other) = (scratch("one"), scratch("two"), scratch("other"));
        fill(&one, &options, &mut io::sink()).unwrap();
        fill(&two, &options, &mut io::sink()).unwrap();
        fill(&other, &Options { seed: 8, ..options }, &mut io::sink()).unwrap();
        let first = listing(&one);
        let again = listing(&one);
        let second = listing(&two);
        let different = listing(&other);
        for dir in [one, two, other] {
            std::process::Command::new("rm").arg("-rf").arg(dir).status().unwrap();
        }
        assert_eq!(first, again);
        assert_eq!(first, second);
        assert_ne!(first, different);
        assert!(first.len() > 100, "{}", first.len());
        for sign in [
            "type=symlink",
            "type=fifo",
            "type=socket",
            "type=char",
            "rdev=0:0",
            "uid=4000000000",
            "linked-with=",
            "mode=0000",
            "mtime=-",
            "xattr.trusted.",
            "size=1099511627776",
        ] {
            assert!(first.iter().any(|line| line.contains(sign)), "nothing with {sign}");
        }
    }
}
