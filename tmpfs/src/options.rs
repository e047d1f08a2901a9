//! The options of an OCI tmpfs mount, read the way runc and the kernel read them.

use serde::{Deserialize, Serialize};

/// A tmpfs mount's options, parsed: what goes to the superblock, what to the mount, what runc does itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TmpfsOptions {
    /// Options of the superblock other than `mode`, `uid` and `gid`, in the order given, each key once.
    pub data: Vec<DataOption>,
    /// `size=` as given ("64m", "50%"); also in `data`.
    pub size: Option<String>,
    /// `nr_inodes=` as given; also in `data`.
    pub nr_inodes: Option<String>,
    /// `mode=`: permission bits of the root directory.
    pub mode: Option<u32>,
    /// `uid=`, an id of the container's user namespace.
    pub uid: Option<u32>,
    /// `gid=`, an id of the container's user namespace.
    pub gid: Option<u32>,
    /// Flags of the mount, not of the superblock.
    pub flags: MountFlags,
    /// `tmpcopyup`: starts as a copy of the directory it is mounted over.
    pub copy_up: bool,
    /// Propagation changes, in the order given.
    pub propagation: Vec<Propagation>,
}

/// One option of the superblock, as fsconfig(2) takes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataOption {
    /// Name, before the `=`.
    pub key: String,
    /// Text after the `=`; `None` for an option that is a flag.
    pub value: Option<String>,
}

/// The flags of one mount; all false is `rw,suid,dev,exec,relatime`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named after mount(8)'s options")]
pub struct MountFlags {
    pub ro: bool,
    pub nosuid: bool,
    pub nodev: bool,
    pub noexec: bool,
    pub noatime: bool,
    pub nodiratime: bool,
    pub relatime: bool,
    pub strictatime: bool,
    pub nosymfollow: bool,
}

/// A propagation type of mount_namespaces(7), `R`: of everything mounted below it too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "named after mount(8)'s options")]
pub enum Propagation {
    Private,
    Rprivate,
    Slave,
    Rslave,
    Shared,
    Rshared,
    Unbindable,
    Runbindable,
}

/// An option that can't be honoured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// Neither runc nor the kernel's tmpfs knows it.
    #[error("tmpfs option {option:?} is unknown; remove it from the mount's options")]
    Unknown {
        /// As given.
        option: String,
    },
    /// Known, with a value that it can't have.
    #[error("tmpfs option {option:?} is malformed: expected {expected}")]
    Malformed {
        /// As given.
        option: String,
        /// What it should look like.
        expected: &'static str,
    },
    /// Known, but without meaning for a tmpfs.
    #[error("option {option:?} cannot be used with a tmpfs mount: {reason}")]
    Refused {
        /// As given.
        option: String,
        /// Why.
        reason: &'static str,
    },
}

impl TmpfsOptions {
    /// Parses the options list of an OCI mount of type tmpfs; the first bad one is the error.
    pub fn parse(_options: &[String]) -> Result<Self, OptionsError> {
        todo!()
    }

    /// The options of the bind mount that hands the filesystem to runc, so that the container sees
    /// the mount it would have had.
    pub fn bind_options(&self) -> Vec<String> {
        todo!()
    }
}
