//! Containers with filesystems on disk: their config.json, and what is in them.
#![allow(dead_code, reason = "each test program uses some of it")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use stillframe_tmpfs::mount::open_view;

use crate::filesystem::describe_directory;
use crate::pod::Pod;

/// Members of a config.json: one tmpfs at /data whose source is "scratch", and a hint for it.
pub fn scratch(medium: &str, share: &str, options: &str) -> String {
    config(&[("vol", "scratch", medium, share, options)], &[("/data", "tmpfs", "scratch", "")])
}

/// Members of a config.json: hints (name, source, medium, share, options), mounts (destination, type, source, options).
pub fn config(hints: &[(&str, &str, &str, &str, &str)], mounts: &[(&str, &str, &str, &str)]) -> String {
    let hint = |(name, source, medium, share, options): &(&str, &str, &str, &str, &str)| {
        [("source", source), ("medium", medium), ("share", share), ("options", options)]
            .map(|(field, value)| format!(r#""dev.stillframe.mount.{name}.{field}":"{value}""#))
            .join(",")
    };
    let mount = |(destination, kind, source, options): &(&str, &str, &str, &str)| {
        let options: Vec<&str> = options.split(',').filter(|option| !option.is_empty()).collect();
        serde_json::json!({
            "destination": destination, "type": kind, "source": source, "options": options
        })
        .to_string()
    };
    let hints = hints.iter().map(hint).collect::<Vec<_>>().join(",");
    let mounts = mounts.iter().map(mount).collect::<Vec<_>>().join(",");
    let process = r#""process":{"capabilities":{"bounding":["CAP_MKNOD"]}}"#;
    format!(r#""annotations":{{{hints}}},"mounts":[{mounts}],{process}"#)
}

/// What must be the same on ext4 and tmpfs: all but the sizes of directories.
pub fn describe(path: &Path) -> BTreeMap<PathBuf, String> {
    let view = open_view(path).unwrap();
    let mut all = BTreeMap::new();
    describe_directory(&view, Path::new("/"), &mut all, &mut BTreeMap::new());
    for text in all.values_mut().filter(|text| text.starts_with('4')) {
        let (before, after) = text.split_once(" size ").unwrap();
        *text = format!("{before}{}", &after[after.find(' ').unwrap()..]);
    }
    all
}

pub fn assert_same(found: &BTreeMap<PathBuf, String>, want: &BTreeMap<PathBuf, String>) {
    for (path, want) in want {
        assert_eq!(found.get(path), Some(want), "{path:?}");
    }
    assert_eq!(found.len(), want.len(), "{:?}", found.keys());
}

/// Prepares a container that can't be; everything that was begun must be gone.
pub fn refused(image: &Path, config: &str) -> String {
    let mut pod = Pod::new();
    let error = pod.prepare("c", config, Some(image)).map(|_| ()).unwrap_err();
    pod.assert_nothing_is_left();
    error
}
