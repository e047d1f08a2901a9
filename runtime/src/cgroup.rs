//! Where a process's cgroups are: the texts of /proc/PID/cgroup and /proc/self/mountinfo.
//!
//! Pure. Which hierarchy counts for what, and whether its root does, is for the callers to say.

use std::path::PathBuf;

/// Paths of a process's cgroups in their hierarchies.
pub(crate) struct Membership<'a> {
    /// In the v1 hierarchy of the controller that was asked for.
    pub(crate) v1: Option<&'a str>,
    /// In the v2 hierarchy.
    pub(crate) v2: Option<&'a str>,
}

impl<'a> Membership<'a> {
    /// By the text of /proc/PID/cgroup.
    pub(crate) fn parse(text: &'a str, controller: &str) -> Self {
        let mut found = Self { v1: None, v2: None };
        for line in text.lines() {
            let mut fields = line.splitn(3, ':');
            let (Some(number), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            if controllers.split(',').any(|own| own == controller) {
                found.v1 = Some(path);
            } else if number == "0" && controllers.is_empty() {
                found.v2 = Some(path);
            }
        }
        found
    }
}

/// Where a hierarchy is mounted whole (root `/`), by its type and one of its super options.
pub(crate) fn mountpoint(mountinfo: &str, kind: &str, option: Option<&str>) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, superblock) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, target) = (mount.next()?, mount.next()?);
        let mut superblock = superblock.split(' ');
        let (fstype, options) = (superblock.next()?, superblock.nth(1)?);
        let fits = option.is_none_or(|wanted| options.split(',').any(|option| option == wanted));
        (root == "/" && fstype == kind && fits).then(|| PathBuf::from(target))
    })
}
