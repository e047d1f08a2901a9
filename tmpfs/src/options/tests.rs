use super::*;

fn parse(options: &[&str]) -> Result<TmpfsOptions, OptionsError> {
    TmpfsOptions::parse(&options.iter().map(ToString::to_string).collect::<Vec<_>>())
}

/// "a=b,c" as data options.
fn data(options: &[(&str, Option<&str>)]) -> Vec<DataOption> {
    options
        .iter()
        .map(|(key, value)| DataOption { key: key.to_string(), value: value.map(Into::into) })
        .collect()
}

#[test]
fn data_options_are_kept_in_order_and_the_last_of_a_key_wins() {
    for (options, want) in [
        (&[][..], data(&[])),
        (&["size=64m"], data(&[("size", Some("64m"))])),
        (&["size=64m", "huge=never", "size=50%"], data(&[("huge", Some("never")), ("size", Some("50%"))])),
        (&["nr_blocks=1k", "size=1M"], data(&[("nr_blocks", Some("1k")), ("size", Some("1M"))])),
        (&["size=0x10e", "nr_inodes=010"], data(&[("size", Some("0x10e")), ("nr_inodes", Some("010"))])),
        (&["size=1m,noswap,,inode32"], data(&[("size", Some("1m")), ("noswap", None), ("inode32", None)])),
        (&["mpol=bind:0,1-2", "noswap"], data(&[("mpol", Some("bind:0,1-2")), ("noswap", None)])),
        (&["mpol=bind:0", "1"], data(&[("mpol", Some("bind:0,1"))])),
        (
            &["context=\"a:b:c:s0:c1,c2\"", "inode64"],
            data(&[("context", Some("a:b:c:s0:c1,c2")), ("inode64", None)]),
        ),
        (&["casefold", "strict_encoding"], data(&[("casefold", None), ("strict_encoding", None)])),
        (&["casefold=utf8-12.1.0"], data(&[("casefold", Some("utf8-12.1.0"))])),
        (
            &["usrquota", "usrquota_block_hardlimit=1g"],
            data(&[("usrquota", None), ("usrquota_block_hardlimit", Some("1g"))]),
        ),
        (&["sync", "lazytime", "dirsync"], data(&[("sync", None), ("lazytime", None), ("dirsync", None)])),
        (&["sync", "mand", "async", "nomand"], data(&[])),
        (&["size=1m,sync"], data(&[("size", Some("1m")), ("sync", None)])),
        (&["", "defaults", "silent", "loud", "acl", "iversion", "rro", "rnosuid"], data(&[])),
    ] {
        assert_eq!(parse(options).expect("valid").data, want, "{options:?}");
    }
}

#[test]
fn mode_and_owner_are_numbers_apart_from_the_data() {
    for (options, mode, uid, gid) in [
        (&[][..], None, None, None),
        (&["mode=0755"], Some(0o755), None, None),
        (&["mode=1777", "mode=700"], Some(0o700), None, None),
        (&["mode=12345670"], Some(0o5670), None, None),
        (&["uid=5", "gid=0x10"], None, Some(5), Some(16)),
        (&["gid=010,uid=0"], None, Some(0), Some(8)),
    ] {
        let parsed = parse(options).expect("valid");
        assert_eq!((parsed.mode, parsed.uid, parsed.gid), (mode, uid, gid), "{options:?}");
        assert_eq!(parsed.data, [], "{options:?}");
    }
    let parsed = parse(&["size=1g", "nr_inodes=7k", "size=2g"]).expect("valid");
    assert_eq!((parsed.size.as_deref(), parsed.nr_inodes.as_deref()), (Some("2g"), Some("7k")));
}

#[test]
fn the_bind_mount_gets_the_flags_and_the_propagation_and_nothing_else() {
    for (options, want) in [
        (&[][..], &["bind"][..]),
        (&["size=1m", "mode=700", "sync", "tmpcopyup", "rro", "defaults"], &["bind"]),
        (&["noexec", "ro", "nosuid", "nodev"], &["bind", "ro", "nosuid", "nodev", "noexec"]),
        (&["ro", "rw", "noexec", "exec", "nosuid", "suid", "nodev", "dev"], &["bind"]),
        (&["noatime", "strictatime"], &["bind", "noatime", "strictatime"]),
        (&["noatime", "atime", "relatime", "norelatime", "strictatime", "nostrictatime"], &["bind"]),
        (&["nodiratime", "nosymfollow", "relatime"], &["bind", "nodiratime", "relatime", "nosymfollow"]),
        (&["diratime", "nosymfollow", "symfollow"], &["bind"]),
        (&["rslave", "shared"], &["bind", "rslave", "shared"]),
        (
            &["private", "rprivate", "slave", "rshared", "unbindable", "runbindable"],
            &["bind", "private", "rprivate", "slave", "rshared", "unbindable", "runbindable"],
        ),
    ] {
        let parsed = parse(options).expect("valid");
        assert_eq!(parsed.bind_options(), want, "{options:?}");
        assert_eq!(parsed.copy_up, options.contains(&"tmpcopyup"), "{options:?}");
    }
}

#[test]
fn what_tmpfs_does_not_know_is_refused_by_name() {
    for (options, name) in [
        (&["size=1m", "x-mine=3"][..], "x-mine=3"),
        (&["user"], "user"),
        (&["size=1m,noexec"], "noexec"),
        (&["size=1m,ro"], "ro"),
        (&["source=foo"], "source=foo"),
        (&["SIZE=1m"], "SIZE=1m"),
        (&["=1"], "=1"),
        (&["1"], "1"),
        (&["sync=1"], "sync=1"),
    ] {
        assert_eq!(parse(options), Err(OptionsError::Unknown { option: name.into() }), "{options:?}");
    }
    for option in ["bind", "rbind", "remount", "idmap", "ridmap"] {
        let error = parse(&["size=1m", option]).expect_err("refused");
        assert!(matches!(&error, OptionsError::Refused { option: named, .. } if named == option), "{error}");
        assert!(error.to_string().contains(&format!("{option:?}")), "{error}");
    }
}

#[test]
fn a_malformed_value_is_refused_by_name() {
    for option in [
        "size",
        "size=",
        "size=k",
        "size=%",
        "size=1x",
        "size=-1",
        "size=+1",
        "size=1mk",
        "size=1 ",
        "size=08",
        "size=0x",
        "size=1m,2",
        "size=0xg",
        "nr_inodes=10%",
        "nr_inodes=",
        "nr_blocks=many",
        "size=99999999999999999999",
        "mode",
        "mode=",
        "mode=8",
        "mode=0x1f",
        "mode=+7",
        "mode=u+x",
        "uid=",
        "uid=root",
        "uid=-1",
        "uid=4294967295",
        "gid=4294967296",
        "gid=1k",
        "huge",
        "huge=deny",
        "huge=force",
        "huge=sometimes",
        "mpol",
        "mpol=",
        "inode64=1",
        "noswap=yes",
        "usrquota_inode_hardlimit=x",
        "size=1\0",
    ] {
        let error = parse(&["noexec", option]).expect_err(option);
        assert!(
            matches!(&error, OptionsError::Malformed { option: named, .. } if named == option),
            "{error}"
        );
        assert!(error.to_string().contains(&format!("{option:?}")), "{error}");
    }
}

#[test]
fn sizes_are_evaluated_as_memparse_does() {
    for (text, want) in [
        ("4096", Some(4096)),
        ("64k", Some(65536)),
        ("0x10M", Some(16 << 20)),
        ("010k", Some(8192)),
        ("2G", Some(2 << 30)),
        ("50%", Some(500)),
        ("150%", Some(1500)),
        ("0", Some(0)),
        ("15e", Some(15 << 60)),
        ("16e", None),
        ("", None),
        ("k", None),
        ("\u{e9}", None),
    ] {
        assert_eq!(bytes(text, 1000), want, "{text}");
    }
}

#[test]
fn options_on_top_count_before_those_below() {
    let overlaid = |below: &[&str], over: &[&str]| parse(below).unwrap().overlaid(&parse(over).unwrap());
    let both = overlaid(
        &["size=1m", "mode=700", "uid=1", "ro", "huge=never"],
        &["nr_blocks=5", "uid=2", "nodev", "rw"],
    );
    assert_eq!(both.data, data(&[("huge", Some("never")), ("nr_blocks", Some("5"))]));
    assert_eq!((both.size, both.mode, both.uid), (None, Some(0o700), Some(2)));
    assert!(both.flags.ro && both.flags.nodev, "a restriction is never taken away");
    let both = overlaid(&["nr_blocks=5", "nr_inodes=7", "rslave"], &["size=2m", "private"]);
    assert_eq!(both.data, data(&[("nr_inodes", Some("7")), ("size", Some("2m"))]));
    assert_eq!((both.size.as_deref(), both.nr_inodes.as_deref()), (Some("2m"), Some("7")));
    assert_eq!(both.propagation, [Propagation::Rslave]);
    let same = parse(&["size=1m", "noexec"]).unwrap();
    assert_eq!(same.clone().overlaid(&TmpfsOptions::default()), same);
}
