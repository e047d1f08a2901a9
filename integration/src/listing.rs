//! What the probe saw, and what is different between two times it looked.

use std::collections::BTreeMap;
use std::fmt;

/// Path to attribute to value, all as the probe escaped them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    objects: BTreeMap<String, BTreeMap<String, String>>,
}

/// A line that isn't one of the probe's.
#[derive(Debug, thiserror::Error)]
#[error("line {number} isn't of a listing (words name=value, the first one {key}=): {line:?}")]
pub struct ParseError {
    number: usize,
    key: &'static str,
    line: String,
}

impl Listing {
    /// Takes the output of `stillframe-probe list`.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        Self::parse_keyed(text, "path")
    }

    /// Takes the output of `stillframe-probe mounts`.
    pub fn parse_mounts(text: &str) -> Result<Self, ParseError> {
        Self::parse_keyed(text, "mount")
    }

    fn parse_keyed(text: &str, key: &'static str) -> Result<Self, ParseError> {
        let mut objects = BTreeMap::new();
        for (index, line) in text.lines().enumerate() {
            let bad = || ParseError { number: index + 1, key, line: line.to_owned() };
            let mut words = line.split(' ').map(|word| word.split_once('=').ok_or_else(bad));
            let (name, path) = words.next().ok_or_else(bad)??;
            if name != key {
                return Err(bad());
            }
            let attributes = words
                .map(|word| word.map(|(name, value)| (name.to_owned(), value.to_owned())))
                .collect::<Result<_, _>>()?;
            objects.insert(path.to_owned(), attributes);
        }
        Ok(Self { objects })
    }

    /// Number of objects.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Whether there is nothing, not even the root.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// One attribute of one object.
    pub fn get(&self, path: &str, attribute: &str) -> Option<&str> {
        self.objects.get(path)?.get(attribute).map(String::as_str)
    }

    /// Whether the path is there.
    pub fn contains(&self, path: &str) -> bool {
        self.objects.contains_key(path)
    }

    /// How many objects are of the kind (`file`, `dir`, `symlink`, `fifo`, `socket`, `char`, `block`).
    pub fn count(&self, kind: &str) -> usize {
        self.objects.values().filter(|object| object.get("type").is_some_and(|value| value == kind)).count()
    }

    /// How many attributes are listed in all.
    pub fn attributes(&self) -> usize {
        self.objects.values().map(BTreeMap::len).sum()
    }

    /// How many objects have an attribute whose name begins so.
    pub fn with_attribute(&self, prefix: &str) -> usize {
        self.objects.values().filter(|object| object.keys().any(|name| name.starts_with(prefix))).count()
    }

    /// The same without one attribute.
    pub fn without(mut self, attribute: &str) -> Self {
        for object in self.objects.values_mut() {
            object.remove(attribute);
        }
        self
    }

    /// The same without the objects that `remove` names.
    pub fn without_objects(mut self, remove: impl Fn(&str) -> bool) -> Self {
        self.objects.retain(|path, _| !remove(path));
        self
    }
}

/// One attribute of one object that isn't what it was; `None`: it wasn't, or isn't, there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The object.
    pub path: String,
    /// The attribute; `existence` when the whole object is missing or new.
    pub attribute: String,
    /// What it was.
    pub before: Option<String>,
    /// What it is.
    pub after: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |value: &Option<String>| match value {
            Some(value) if value.len() > 200 => format!("{}... ({} characters)", &value[..200], value.len()),
            Some(value) => value.clone(),
            None => "(none)".to_owned(),
        };
        write!(
            f,
            "{}: {}: before {}, after {}",
            self.path,
            self.attribute,
            word(&self.before),
            word(&self.after)
        )
    }
}

/// There is no difference; else the first ones are shown.
#[track_caller]
pub fn assert_same(what: &str, before: &Listing, after: &Listing) {
    let differences: Vec<_> = compare(before, after).iter().map(ToString::to_string).collect();
    let shown = differences.iter().take(40).cloned().collect::<Vec<_>>().join("\n");
    assert!(differences.is_empty(), "{what}: {} differences\n{shown}", differences.len());
}

/// All differences, by path.
pub fn compare(before: &Listing, after: &Listing) -> Vec<Difference> {
    let mut differences = Vec::new();
    let paths: std::collections::BTreeSet<_> = before.objects.keys().chain(after.objects.keys()).collect();
    for path in paths {
        match (before.objects.get(path), after.objects.get(path)) {
            (Some(before), Some(after)) => compare_object(path, before, after, &mut differences),
            (before, after) => differences.push(Difference {
                path: path.clone(),
                attribute: "existence".to_owned(),
                before: before.and_then(|object| object.get("type").cloned()),
                after: after.and_then(|object| object.get("type").cloned()),
            }),
        }
    }
    differences
}

fn compare_object(
    path: &str,
    before: &BTreeMap<String, String>,
    after: &BTreeMap<String, String>,
    differences: &mut Vec<Difference>,
) {
    let names: std::collections::BTreeSet<_> = before.keys().chain(after.keys()).collect();
    for name in names {
        let (before, after) = (before.get(name), after.get(name));
        if before != after {
            differences.push(Difference {
                path: path.to_owned(),
                attribute: name.clone(),
                before: before.cloned(),
                after: after.cloned(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_name_path_and_attribute() {
        let before =
            Listing::parse("path=. type=dir mode=0755\npath=./a type=file size=1\npath=./b type=fifo\n")
                .unwrap();
        let after = Listing::parse(
            "path=. type=dir mode=0700\npath=./a type=file size=1 xattr.user.x=00\npath=./c type=file\n",
        );
        let found: Vec<_> = compare(&before, &after.unwrap()).iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                ".: mode: before 0755, after 0700",
                "./a: xattr.user.x: before (none), after 00",
                "./b: existence: before fifo, after (none)",
                "./c: existence: before (none), after file",
            ]
        );
        assert_eq!(compare(&before, &before), []);
    }

    #[test]
    fn what_is_not_a_listing_is_an_error() {
        assert!(Listing::parse("exec: not found\n").is_err());
        assert!(Listing::parse("mode=0755 path=.\n").is_err());
    }
}
