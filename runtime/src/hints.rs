//! Hints: annotations of a pod that say where a mount's contents are kept and who shares them.
//!
//! `dev.stillframe.mount.NAME.{source,medium,share,options}`, strict: whatever can't be understood is an error that
//! names it. And gVisor's `dev.gvisor.spec.mount.NAME.{source,type,share,options}`, as lenient as gVisor: a hint that is
//! incomplete or bad is dropped with a warning, only a malformed key or a source named twice is an error. A hint
//! is for the mounts whose OCI `source` is the hint's. Where both kinds have a source, ours counts.
//!
//! NAME has no dots, so it can't be taken for a filesystem of a container's ([`crate::state`]). Pure.

use std::collections::BTreeMap;

use stillframe_tmpfs::options::{OptionsError, TmpfsOptions};

/// What our annotations begin with.
pub const PREFIX: &str = "dev.stillframe.mount.";
/// What gVisor's annotations begin with.
pub const GVISOR_PREFIX: &str = "dev.gvisor.spec.mount.";
/// Longest NAME.
const NAME_MAX: usize = 128;

/// Where a filesystem's contents are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// In memory: a tmpfs.
    Memory,
    /// On disk: a filestore.
    Disk,
}

/// Who has the same filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// The mounts of one container that have the source.
    Container,
    /// Those of all containers of the sandbox.
    Pod,
}

/// A complete hint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hint {
    /// NAME.
    pub name: String,
    /// Source of the mounts that it is for.
    pub source: String,
    /// `None`: on disk for a bind mount, in memory for a tmpfs (gVisor's way to say it).
    pub medium: Option<Medium>,
    /// Who shares it.
    pub share: Share,
    /// Options of the filesystem and its mounts, over those of the OCI mount.
    pub options: TmpfsOptions,
}

impl Hint {
    /// The medium for a mount that is a bind mount, or else a tmpfs.
    pub fn medium_for(&self, bind: bool) -> Medium {
        self.medium.unwrap_or(if bind { Medium::Disk } else { Medium::Memory })
    }
}

/// Why hints can't be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HintError {
    /// A key of the wrong shape.
    #[error("annotation {key}: expected {prefix}NAME.FIELD, NAME of letters, digits, - and _ (no dots)")]
    Key {
        /// The annotation's key.
        key: String,
        /// What it begins with.
        prefix: &'static str,
    },
    /// A field that there isn't.
    #[error("annotation {key}: there is no field {field:?}; there are source, medium, share and options")]
    Field {
        /// The annotation's key.
        key: String,
        /// Its last part.
        field: String,
    },
    /// A value that a field can't have.
    #[error("annotation {key}={value:?}: expected {expected}")]
    Value {
        /// The annotation's key.
        key: String,
        /// Its value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Options that can't be honoured.
    #[error("annotation {key}")]
    Options {
        /// The annotation's key.
        key: String,
        /// Which, and why.
        #[source]
        source: OptionsError,
    },
    /// Fields that must be there aren't.
    #[error("the hint {PREFIX}{name} is incomplete: add {missing}")]
    Incomplete {
        /// NAME.
        name: String,
        /// The missing fields.
        missing: String,
    },
    /// Two hints for one source.
    #[error("the hints {prefix}{first} and {prefix}{second} have the same source {source_path}")]
    Duplicate {
        /// What their keys begin with.
        prefix: &'static str,
        /// NAME of one.
        first: String,
        /// NAME of the other.
        second: String,
        /// The source.
        source_path: String,
    },
}

/// The hints of a spec.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    hints: Vec<Hint>,
}

type Fields<'a> = BTreeMap<&'a str, BTreeMap<&'a str, &'a str>>;

impl Hints {
    /// The hints among a spec's annotations.
    pub fn parse<'a>(annotations: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, HintError> {
        let (mut ours, mut gvisors) = (Fields::new(), Fields::new());
        for (key, value) in annotations {
            for (prefix, fields) in [(PREFIX, &mut ours), (GVISOR_PREFIX, &mut gvisors)] {
                let Some(rest) = key.strip_prefix(prefix) else { continue };
                let parts =
                    rest.split_once('.').filter(|(name, field)| is_name(name) && !field.contains('.'));
                let (name, field) = parts.ok_or_else(|| HintError::Key { key: key.to_owned(), prefix })?;
                fields.entry(name).or_default().insert(field, value);
            }
        }
        let mut hints = Vec::new();
        for (name, fields) in &ours {
            hints.push(parse_ours(name, fields)?);
        }
        unique(&hints, PREFIX)?;
        let theirs: Vec<Hint> =
            gvisors.iter().filter_map(|(name, fields)| parse_gvisors(name, fields)).collect();
        unique(&theirs, GVISOR_PREFIX)?;
        for hint in theirs {
            if hints.iter().all(|ours| ours.source != hint.source && ours.name != hint.name) {
                hints.push(hint);
            }
        }
        Ok(Self { hints })
    }

    /// The hint for mounts of this source.
    pub fn find(&self, source: &str) -> Option<&Hint> {
        self.hints.iter().find(|hint| hint.source == source)
    }
}

fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    !name.is_empty() && name.len() <= NAME_MAX && name.bytes().all(plain)
}

fn unique(hints: &[Hint], prefix: &'static str) -> Result<(), HintError> {
    for (index, hint) in hints.iter().enumerate() {
        if let Some(before) = hints[..index].iter().find(|before| before.source == hint.source) {
            return Err(HintError::Duplicate {
                prefix,
                first: before.name.clone(),
                second: hint.name.clone(),
                source_path: hint.source.clone(),
            });
        }
    }
    Ok(())
}

fn parse_ours(name: &str, fields: &BTreeMap<&str, &str>) -> Result<Hint, HintError> {
    let key = |field: &str| format!("{PREFIX}{name}.{field}");
    let (mut source, mut medium, mut share, mut options) = (None, None, None, TmpfsOptions::default());
    for (field, value) in fields {
        let bad = |expected| HintError::Value { key: key(field), value: (*value).to_owned(), expected };
        match *field {
            "source" if value.is_empty() => return Err(bad("the source of a mount")),
            "source" => source = Some((*value).to_owned()),
            "medium" => medium = Some(parse_medium(value).ok_or_else(|| bad("disk or memory"))?),
            "share" => share = Some(parse_share(value).ok_or_else(|| bad("container or pod"))?),
            "options" => {
                options =
                    parse_options(value).map_err(|source| HintError::Options { key: key(field), source })?;
            }
            other => return Err(HintError::Field { key: key(other), field: other.to_owned() }),
        }
    }
    match (source, medium, share) {
        (Some(source), Some(medium), Some(share)) => {
            Ok(Hint { name: name.to_owned(), source, medium: Some(medium), share, options })
        }
        (source, medium, share) => {
            let there =
                [("source", source.is_some()), ("medium", medium.is_some()), ("share", share.is_some())];
            let missing: Vec<&str> =
                there.iter().filter(|(_, there)| !there).map(|(field, _)| *field).collect();
            Err(HintError::Incomplete { name: name.to_owned(), missing: missing.join(", ") })
        }
    }
}

/// `None` where gVisor would drop it, or where it changes nothing here.
fn parse_gvisors(name: &str, fields: &BTreeMap<&str, &str>) -> Option<Hint> {
    let drop = |why: &str| {
        tracing::warn!(hint = %format_args!("{GVISOR_PREFIX}{name}"), why, "a hint is ignored");
        None
    };
    let mut options = TmpfsOptions::default();
    for (field, value) in fields {
        match *field {
            "source" | "type" | "share" | "directfs" => {}
            "options" => match parse_options(value) {
                Ok(parsed) => options = parsed,
                Err(error) => return drop(&error.to_string()),
            },
            other => tracing::warn!(hint = name, field = other, value, "a field of a hint is ignored"),
        }
    }
    let get = |field: &str| fields.get(field).copied().filter(|value| !value.is_empty());
    let (Some(source), Some(kind), Some(share)) = (get("source"), get("type"), get("share")) else {
        return drop("source, type or share is missing");
    };
    if kind == "bind" {
        tracing::info!(hint = name, "a hint of type bind changes nothing");
        return None;
    }
    let share = match share {
        "shared" => return drop("it is shared with others than the pod"),
        share => parse_share(share),
    };
    match (kind, share) {
        ("tmpfs", Some(share)) => {
            // Propagation to others is what such a mount never has.
            options.propagation.clear();
            Some(Hint { name: name.to_owned(), source: source.to_owned(), medium: None, share, options })
        }
        ("tmpfs", None) => drop("share is neither container nor pod"),
        _ => drop("type is neither tmpfs nor bind"),
    }
}

fn parse_medium(value: &str) -> Option<Medium> {
    match value {
        "disk" => Some(Medium::Disk),
        "memory" => Some(Medium::Memory),
        _ => None,
    }
}

fn parse_share(value: &str) -> Option<Share> {
    match value {
        "container" => Some(Share::Container),
        "pod" => Some(Share::Pod),
        _ => None,
    }
}

fn parse_options(value: &str) -> Result<TmpfsOptions, OptionsError> {
    TmpfsOptions::parse(&value.split(',').map(|option| option.trim().to_owned()).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(prefix: &str, fields: &[(&str, &str)]) -> Result<Hints, HintError> {
        let annotations: Vec<(String, &str)> =
            fields.iter().map(|(key, value)| (format!("{prefix}{key}"), *value)).collect();
        Hints::parse(annotations.iter().map(|(key, value)| (key.as_str(), *value)))
    }

    const WHOLE: [(&str, &str); 3] = [("v.source", "/s"), ("v.medium", "disk"), ("v.share", "pod")];

    #[test]
    fn a_hint_is_found_by_its_source() {
        let mut fields = WHOLE.to_vec();
        fields.push(("v.options", "size=1m, noexec,mode=700"));
        let hints = parse(PREFIX, &fields).unwrap();
        let hint = hints.find("/s").unwrap();
        assert_eq!((hint.name.as_str(), hint.share), ("v", Share::Pod));
        assert_eq!((hint.medium_for(true), hint.medium_for(false)), (Medium::Disk, Medium::Disk));
        assert_eq!(hint.options.size.as_deref(), Some("1m"));
        assert_eq!((hint.options.mode, hint.options.flags.noexec), (Some(0o700), true));
        assert!(hints.find("/other").is_none());
        assert_eq!(parse("other.", &fields).unwrap(), Hints::default());
    }

    #[test]
    fn ours_are_strict() {
        for (fields, want) in [
            (
                &[("v", "x")][..],
                "annotation dev.stillframe.mount.v: expected dev.stillframe.mount.NAME.FIELD",
            ),
            (&[("a.b.source", "x")], "dev.stillframe.mount.a.b.source: expected"),
            (&[(".source", "x")], "dev.stillframe.mount..source: expected"),
            (&[("a/b.source", "x")], "dev.stillframe.mount.a/b.source: expected"),
            (&[("v.sourc", "x")], "dev.stillframe.mount.v.sourc: there is no field \"sourc\""),
            (&[("v.source", "")], "dev.stillframe.mount.v.source=\"\": expected the source"),
            (&[("v.medium", "tape")], "dev.stillframe.mount.v.medium=\"tape\": expected disk or memory"),
            (&[("v.share", "all")], "dev.stillframe.mount.v.share=\"all\": expected container or pod"),
            (&[("v.options", "size")], "annotation dev.stillframe.mount.v.options"),
            (&[("v.source", "/s")], "dev.stillframe.mount.v is incomplete: add medium, share"),
            (&[("v.share", "pod")], "dev.stillframe.mount.v is incomplete: add source, medium"),
        ] {
            let error = parse(PREFIX, fields).unwrap_err();
            assert!(error.to_string().contains(want), "{fields:?}: {error}");
        }
        let mut twice = WHOLE.to_vec();
        twice.extend([("w.source", "/s"), ("w.medium", "memory"), ("w.share", "pod")]);
        let error = parse(PREFIX, &twice).unwrap_err().to_string();
        let want = "the hints dev.stillframe.mount.v and dev.stillframe.mount.w have the same source /s";
        assert_eq!(error, want);
    }

    #[test]
    fn gvisors_are_lenient() {
        let whole = [("v.source", "/s"), ("v.type", "tmpfs"), ("v.share", "container")];
        let hints = parse(GVISOR_PREFIX, &whole).unwrap();
        let hint = hints.find("/s").unwrap();
        assert_eq!((hint.medium_for(true), hint.medium_for(false)), (Medium::Disk, Medium::Memory));
        assert_eq!(hint.share, Share::Container);
        for change in [
            ("v.type", "bind"),
            ("v.type", "overlay"),
            ("v.type", ""),
            ("v.share", "shared"),
            ("v.share", "x"),
            ("v.source", ""),
            ("v.options", "sizze=1"),
        ] {
            let mut fields = whole.to_vec();
            fields.push(change);
            assert_eq!(parse(GVISOR_PREFIX, &fields).unwrap(), Hints::default(), "{change:?}");
        }
        for more in [("v.directfs", "off"), ("v.unknown", "x"), ("v.options", "rw,size=1m,shared")] {
            let mut fields = whole.to_vec();
            fields.push(more);
            assert!(parse(GVISOR_PREFIX, &fields).unwrap().find("/s").is_some(), "{more:?}");
        }
        assert!(matches!(parse(GVISOR_PREFIX, &[("a.b.type", "tmpfs")]), Err(HintError::Key { .. })));
        let mut twice = whole.to_vec();
        twice.extend([("w.source", "/s"), ("w.type", "tmpfs"), ("w.share", "pod")]);
        assert!(matches!(parse(GVISOR_PREFIX, &twice), Err(HintError::Duplicate { .. })));
    }

    #[test]
    fn ours_count_before_gvisors() {
        let ours = WHOLE.map(|(key, value)| (format!("{PREFIX}{key}"), value));
        let theirs = [("g.source", "/s"), ("g.type", "tmpfs"), ("g.share", "container")];
        let theirs = theirs.map(|(key, value)| (format!("{GVISOR_PREFIX}{key}"), value));
        let all = ours.iter().chain(&theirs).map(|(key, value)| (key.as_str(), *value));
        let hints = Hints::parse(all).unwrap();
        assert_eq!(hints.find("/s").unwrap().name, "v");
    }
}
