//! The options of an OCI tmpfs mount, read the way runc and the kernel read them.
//!
//! runc (`parseMountOptions` in libcontainer/specconv) sorts a list into four kinds: flags of
//! mount(2), propagation changes, its own extensions, and everything else, which it joins with commas
//! and hands to the kernel. The kernel takes that string apart again (`shmem_parse_monolithic`,
//! `shmem_parse_one` in mm/shmem.c). Here both happen before anything is mounted, so that a bad option
//! is an error that names it instead of the EINVAL for the whole list that runc reports.
//!
//! What runc makes of each kind on a tmpfs, found with runc 1.1.5, 1.1.15 and 1.3.6 on Linux 6.18:
//!
//! - `ro` is a flag of the mount; the superblock stays writable. `sync`, `dirsync`, `mand` and
//!   `lazytime` belong to the superblock and show among its options.
//! - `strictatime` beats `noatime`; `relatime`, `norelatime` and `nostrictatime` change nothing, since
//!   relatime is what mount(2) gives anyway.
//! - Recursive attributes (`rro`, `rnosuid`, ...) have no effect on a tmpfs.
//! - `silent`, `loud`, `iversion`, `acl` and their opposites leave no trace (runc 1.3 refuses `acl`).
//! - `defaults` is the one that differs on purpose: runc passes it to the kernel, which refuses it;
//!   here it does nothing, as with mount(8).
//!
//! A repeated option overrides the earlier one, also where two options set one thing (`size` and
//! `nr_blocks`), which is why the order is kept.

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
    /// `mode=`: permission bits of the root directory, within 07777.
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

/// What an option of runc's tables does.
enum Known {
    Flag(fn(&mut MountFlags) -> &mut bool, bool),
    Superblock(&'static str, bool),
    Propagation(Propagation),
    CopyUp,
    Nothing,
    Refused(&'static str),
}

fn known(option: &str) -> Option<Known> {
    use Known::{CopyUp, Flag, Nothing, Propagation as Propagate, Refused, Superblock};
    Some(match option {
        "ro" => Flag(|f| &mut f.ro, true),
        "rw" => Flag(|f| &mut f.ro, false),
        "nosuid" => Flag(|f| &mut f.nosuid, true),
        "suid" => Flag(|f| &mut f.nosuid, false),
        "nodev" => Flag(|f| &mut f.nodev, true),
        "dev" => Flag(|f| &mut f.nodev, false),
        "noexec" => Flag(|f| &mut f.noexec, true),
        "exec" => Flag(|f| &mut f.noexec, false),
        "noatime" => Flag(|f| &mut f.noatime, true),
        "atime" => Flag(|f| &mut f.noatime, false),
        "nodiratime" => Flag(|f| &mut f.nodiratime, true),
        "diratime" => Flag(|f| &mut f.nodiratime, false),
        "relatime" => Flag(|f| &mut f.relatime, true),
        "norelatime" => Flag(|f| &mut f.relatime, false),
        "strictatime" => Flag(|f| &mut f.strictatime, true),
        "nostrictatime" => Flag(|f| &mut f.strictatime, false),
        "nosymfollow" => Flag(|f| &mut f.nosymfollow, true),
        "symfollow" => Flag(|f| &mut f.nosymfollow, false),
        "sync" => Superblock("sync", true),
        "async" => Superblock("sync", false),
        "dirsync" => Superblock("dirsync", true),
        "mand" => Superblock("mand", true),
        "nomand" => Superblock("mand", false),
        "lazytime" => Superblock("lazytime", true),
        "nolazytime" => Superblock("lazytime", false),
        "private" => Propagate(Propagation::Private),
        "rprivate" => Propagate(Propagation::Rprivate),
        "slave" => Propagate(Propagation::Slave),
        "rslave" => Propagate(Propagation::Rslave),
        "shared" => Propagate(Propagation::Shared),
        "rshared" => Propagate(Propagation::Rshared),
        "unbindable" => Propagate(Propagation::Unbindable),
        "runbindable" => Propagate(Propagation::Runbindable),
        "tmpcopyup" => CopyUp,
        "" | "defaults" | "silent" | "loud" | "iversion" | "noiversion" | "acl" | "noacl" => Nothing,
        "rro" | "rrw" | "rnosuid" | "rsuid" | "rnodev" | "rdev" | "rnoexec" | "rexec" | "rnodiratime"
        | "rdiratime" | "rrelatime" | "rnorelatime" | "rnoatime" | "ratime" | "rstrictatime"
        | "rnostrictatime" | "rnosymfollow" | "rsymfollow" => Nothing,
        "bind" | "rbind" => Refused("it makes this a bind mount; give the mount the type \"bind\""),
        "remount" => Refused("there is nothing mounted yet that it could change"),
        "idmap" | "ridmap" => Refused("runc maps the ids of bind mounts only"),
        _ => return None,
    })
}

/// What the kernel's tmpfs expects after `key=`.
enum Value {
    Absent,
    Number,
    NumberOrPercent,
    Octal,
    Id,
    OneOf(&'static [&'static str], &'static str),
    Text,
    OptionalText,
}

fn value_of(key: &str) -> Option<Value> {
    Some(match key {
        "size" => Value::NumberOrPercent,
        "nr_blocks" | "nr_inodes" => Value::Number,
        "usrquota_block_hardlimit"
        | "usrquota_inode_hardlimit"
        | "grpquota_block_hardlimit"
        | "grpquota_inode_hardlimit" => Value::Number,
        "mode" => Value::Octal,
        "uid" | "gid" => Value::Id,
        "huge" => Value::OneOf(
            &["never", "always", "within_size", "advise"],
            "huge=never, always, within_size or advise",
        ),
        "mpol" | "context" | "fscontext" | "defcontext" | "rootcontext" => Value::Text,
        "inode32" | "inode64" | "noswap" | "quota" | "usrquota" | "grpquota" | "strict_encoding" => {
            Value::Absent
        }
        "casefold" => Value::OptionalText,
        _ => return None,
    })
}

impl TmpfsOptions {
    /// Parses the options list of an OCI mount of type tmpfs; the first bad one is the error.
    pub fn parse(options: &[String]) -> Result<Self, OptionsError> {
        let mut parsed = Self::default();
        let mut data = Vec::new();
        for option in options {
            match known(option) {
                Some(Known::Flag(flag, value)) => *flag(&mut parsed.flags) = value,
                Some(Known::Superblock(key, value)) => parsed.superblock_flag(key, value),
                Some(Known::Propagation(propagation)) => parsed.propagation.push(propagation),
                Some(Known::CopyUp) => parsed.copy_up = true,
                Some(Known::Nothing) => {}
                Some(Known::Refused(reason)) => {
                    return Err(OptionsError::Refused { option: option.clone(), reason });
                }
                None => data.push(option.as_str()),
            }
        }
        for option in split(&data.join(",")) {
            parsed.data_option(option)?;
        }
        Ok(parsed)
    }

    /// The options of the bind mount that hands the filesystem to runc, so that the container sees
    /// the mount it would have had: the mount's flags and propagation; the superblock has the rest.
    pub fn bind_options(&self) -> Vec<String> {
        let MountFlags { ro, nosuid, nodev, noexec, noatime, nodiratime, relatime, strictatime, nosymfollow } =
            self.flags;
        let flags = [
            ("ro", ro),
            ("nosuid", nosuid),
            ("nodev", nodev),
            ("noexec", noexec),
            ("noatime", noatime),
            ("nodiratime", nodiratime),
            ("relatime", relatime),
            ("strictatime", strictatime),
            ("nosymfollow", nosymfollow),
        ];
        let flags = flags.into_iter().filter(|(_, set)| *set).map(|(name, _)| name);
        let propagation = self.propagation.iter().map(|propagation| propagation.name());
        std::iter::once("bind").chain(flags).chain(propagation).map(String::from).collect()
    }

    /// These options with `over` on top: its superblock options count before these; restrictions of the mount
    /// add up; its propagation counts if these have none.
    pub fn overlaid(mut self, over: &Self) -> Self {
        let sizes = ["size", "nr_blocks"];
        let resized = over.data.iter().any(|option| sizes.contains(&option.key.as_str()));
        if resized {
            self.size.clone_from(&over.size);
        }
        self.data.retain(|option| {
            let replaced = over.data.iter().any(|other| other.key == option.key);
            !(replaced || resized && sizes.contains(&option.key.as_str()))
        });
        self.data.extend(over.data.iter().cloned());
        let (own, more) = (self.flags, over.flags);
        self.flags = MountFlags {
            ro: own.ro || more.ro,
            nosuid: own.nosuid || more.nosuid,
            nodev: own.nodev || more.nodev,
            noexec: own.noexec || more.noexec,
            noatime: own.noatime || more.noatime,
            nodiratime: own.nodiratime || more.nodiratime,
            relatime: own.relatime || more.relatime,
            strictatime: own.strictatime || more.strictatime,
            nosymfollow: own.nosymfollow || more.nosymfollow,
        };
        if self.propagation.is_empty() {
            self.propagation.clone_from(&over.propagation);
        }
        Self {
            nr_inodes: over.nr_inodes.clone().or(self.nr_inodes),
            mode: over.mode.or(self.mode),
            uid: over.uid.or(self.uid),
            gid: over.gid.or(self.gid),
            copy_up: self.copy_up || over.copy_up,
            ..self
        }
    }

    fn superblock_flag(&mut self, key: &str, value: bool) {
        self.data.retain(|option| option.key != key);
        if value {
            self.data.push(DataOption { key: key.into(), value: None });
        }
    }

    /// One piece of the string that runc would hand to the kernel.
    fn data_option(&mut self, option: &str) -> Result<(), OptionsError> {
        let (key, value) = match option.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (option, None),
        };
        let Some(kind) = value_of(key) else {
            // The kernel takes a superblock's flags from that string too.
            if let Some(Known::Superblock(key, value)) = known(option) {
                self.superblock_flag(key, value);
                return Ok(());
            }
            return Err(OptionsError::Unknown { option: option.into() });
        };
        let malformed = |expected| OptionsError::Malformed { option: option.into(), expected };
        let text = value.unwrap_or_default();
        if text.contains('\0') {
            return Err(malformed("no NUL character"));
        }
        match kind {
            Value::Absent if value.is_some() => return Err(malformed("no value")),
            Value::Absent | Value::OptionalText => {}
            Value::Number if is_number(text) => {}
            Value::NumberOrPercent if is_number(text.strip_suffix('%').unwrap_or(text)) => {}
            Value::Number => return Err(malformed("a number with an optional suffix k, m, g, t, p or e")),
            Value::NumberOrPercent => {
                return Err(malformed("a number with an optional suffix k, m, g, t, p, e or %"));
            }
            Value::Octal => {
                let digits = text.bytes().all(|b| b.is_ascii_digit());
                let mode = u32::from_str_radix(text, 8).ok().filter(|_| digits);
                // The kernel masks it in the same way.
                self.mode = Some(mode.ok_or_else(|| malformed("an octal number"))? & 0o7777);
                return Ok(());
            }
            Value::Id => {
                let id = id(text).ok_or_else(|| malformed("an id below 4294967295"))?;
                *(if key == "uid" { &mut self.uid } else { &mut self.gid }) = Some(id);
                return Ok(());
            }
            Value::OneOf(values, _) if values.contains(&text) => {}
            Value::OneOf(_, expected) => return Err(malformed(expected)),
            Value::Text if text.is_empty() => return Err(malformed("a value")),
            Value::Text => {}
        }
        match key {
            "size" => self.size = Some(text.into()),
            "nr_inodes" => self.nr_inodes = Some(text.into()),
            _ => {}
        }
        let value = value.map(|text| text.trim_matches('"').to_owned());
        self.data.retain(|option| option.key != key);
        self.data.push(DataOption { key: key.into(), value });
        Ok(())
    }
}

impl Propagation {
    /// As in the options of an OCI mount.
    pub fn name(self) -> &'static str {
        match self {
            Self::Private => "private",
            Self::Rprivate => "rprivate",
            Self::Slave => "slave",
            Self::Rslave => "rslave",
            Self::Shared => "shared",
            Self::Rshared => "rshared",
            Self::Unbindable => "unbindable",
            Self::Runbindable => "runbindable",
        }
    }
}

/// Splits as `shmem_parse_monolithic` does: a comma before a digit belongs to the nodes of `mpol`;
/// and as SELinux does: one between double quotes belongs to a label.
fn split(data: &str) -> impl Iterator<Item = &str> {
    let bytes = data.as_bytes();
    let mut quoted = false;
    let mut start = 0;
    let mut pieces = Vec::new();
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            b'"' => quoted = !quoted,
            b',' if !quoted && !bytes.get(at + 1).is_some_and(u8::is_ascii_digit) => {
                pieces.push(&data[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    pieces.push(&data[start..]);
    pieces.into_iter().filter(|piece| !piece.is_empty())
}

/// What `memparse` reads to its end. It takes a missing number for 0, which is "unlimited"; here that
/// is malformed.
fn is_number(text: &str) -> bool {
    let digits = text.strip_suffix(['k', 'K', 'm', 'M', 'g', 'G', 't', 'T', 'p', 'P', 'e', 'E']);
    // In base 16 a last `e` is a digit, not a suffix.
    c_number(text).is_some() || digits.is_some_and(|digits| c_number(digits).is_some())
}

/// The bytes that a `size=` means where 100 % are `whole`, as `memparse` has them; `None` if that is no number
/// or too large.
pub(crate) fn bytes(text: &str, whole: u64) -> Option<u64> {
    if let Some(percent) = text.strip_suffix('%') {
        return u64::try_from(u128::from(c_number(percent)?) * u128::from(whole) / 100).ok();
    }
    if let Some(number) = c_number(text) {
        return Some(number);
    }
    let (digits, suffix) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let power = "kmgtpe".find(&suffix.to_ascii_lowercase())? as u32 + 1;
    c_number(digits)?.checked_mul(1u64 << (10 * power))
}

fn id(text: &str) -> Option<u32> {
    c_number(text).and_then(|id| u32::try_from(id).ok()).filter(|id| *id != u32::MAX)
}

/// A number as `simple_strtoull` with base 0 reads it: 0x for 16, 0 for 8.
fn c_number(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    let (digits, radix) = match lower.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None if lower.starts_with('0') => (lower.as_str(), 8),
        None => (lower.as_str(), 10),
    };
    let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    if plain { u64::from_str_radix(digits, radix).ok() } else { None }
}

#[cfg(test)]
mod tests;
