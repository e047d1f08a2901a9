//! PAX extended header records: `"%d %s=%s\n"`, the length counting itself (POSIX.1-2001, pax).
//!
//! Reading is ours, because the tar crate splits a header at newlines, and the values here (xattrs, names) may hold
//! any byte; writing is in [`crate::archive`]. Keys of ours begin with `STILLFRAME.`; xattrs use
//! `SCHILY.xattr.`, which star, GNU tar and libarchive read, with GNU tar's escapes for `=` and `%`.

use std::borrow::Cow;

use crate::entry::Timestamp;

/// Prefix of an extended attribute's key.
pub const XATTR: &str = "SCHILY.xattr.";
/// What the entry is where tar has no type for it; the only value is [`SOCKET`].
pub(crate) const TYPE: &str = "STILLFRAME.type";
/// Value of [`TYPE`].
pub(crate) const SOCKET: &str = "socket";
/// Inode flags, decimal, of an entry that isn't a regular file.
pub(crate) const FLAGS: &str = "STILLFRAME.flags";

/// Key and value of the records of one extended header, or `None` where it isn't well-formed.
pub fn parse(mut data: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let mut records = Vec::new();
    while !data.is_empty() {
        let space = data.iter().take(20).position(|b| *b == b' ')?;
        let length: usize = decimal(&data[..space])?;
        let record = data.get(..length)?.get(space + 1..)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|b| *b == b'=')?;
        records.push((&record[..equals], &record[equals + 1..]));
        data = &data[length..];
    }
    Some(records)
}

/// A decimal number of digits alone.
pub(crate) fn decimal<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A time as PAX writes it: a decimal number of seconds, `-0.5` for half a second before 1970.
pub fn format_time(time: Timestamp) -> String {
    if time.sec < 0 && time.nsec > 0 {
        // -(whole + fraction): the kernel's nanoseconds count forward, the decimal fraction backward.
        format!("-{}.{:09}", (time.sec + 1).unsigned_abs(), 1_000_000_000 - time.nsec)
    } else {
        format!("{}.{:09}", time.sec, time.nsec)
    }
}

/// The inverse of [`format_time`], for any number of decimals; further ones than nine are dropped.
pub(crate) fn parse_time(text: &[u8]) -> Option<Timestamp> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = match text.iter().position(|b| *b == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &b""[..]),
    };
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let whole: u64 = decimal(whole)?;
    let nsec = (0..9).fold(0u32, |n, i| n * 10 + u32::from(fraction.get(i).map_or(0, |b| b - b'0')));
    if !negative {
        return Some(Timestamp { sec: i64::try_from(whole).ok()?, nsec });
    }
    if nsec == 0 {
        return Some(Timestamp { sec: 0i64.checked_sub_unsigned(whole)?, nsec });
    }
    Some(Timestamp { sec: 0i64.checked_sub_unsigned(whole)?.checked_sub(1)?, nsec: 1_000_000_000 - nsec })
}

/// What follows [`XATTR`] in the key of an xattr: its name, with `%` and `=` escaped, since `=` ends a key.
pub fn xattr_key(name: &[u8]) -> Cow<'_, [u8]> {
    if !name.iter().any(|b| matches!(b, b'%' | b'=')) {
        return Cow::Borrowed(name);
    }
    let mut key = Vec::with_capacity(name.len() + 2);
    for byte in name {
        match byte {
            b'%' => key.extend_from_slice(b"%25"),
            b'=' => key.extend_from_slice(b"%3D"),
            other => key.push(*other),
        }
    }
    Cow::Owned(key)
}

/// The inverse of [`xattr_key`].
pub fn xattr_name(key: &[u8]) -> Vec<u8> {
    let mut name = Vec::with_capacity(key.len());
    let mut rest = key;
    while let Some((first, tail)) = rest.split_first() {
        rest = if let Some(after) = rest.strip_prefix(b"%25") {
            name.push(b'%');
            after
        } else if let Some(after) = rest.strip_prefix(b"%3D") {
            name.push(b'=');
            after
        } else {
            name.push(*first);
            tail
        };
    }
    name
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_malformed_header_is_refused() {
        for bad in [
            &b"x a=b\n"[..],
            b"6 a=b",
            b"5 a=b\n",
            b"7 a=b\n",
            b"99 a=b\n",
            b"6 a:b\n",
            b"18446744073709551616 a=b\n",
            b"0 ",
            b" a=b\n",
            b"+6 a=b\n",
        ] {
            assert_eq!(parse(bad), None, "{}", bad.escape_ascii());
        }
        assert_eq!(parse(b"6 a=b\n5 c=\n"), Some(vec![(&b"a"[..], &b"b"[..]), (b"c", b"")]));
    }

    #[test]
    fn times_are_decimal_numbers() {
        for (sec, nsec, text) in [
            (0, 0, "0.000000000"),
            (1, 5, "1.000000005"),
            (-1, 0, "-1.000000000"),
            (-1, 500_000_000, "-0.500000000"),
            (-2, 999_999_999, "-1.000000001"),
            (i64::MAX, 1, "9223372036854775807.000000001"),
            (i64::MIN, 1, "-9223372036854775807.999999999"),
        ] {
            assert_eq!(format_time(Timestamp { sec, nsec }), text);
        }
        assert_eq!(parse_time(b"12"), Some(Timestamp { sec: 12, nsec: 0 }));
        assert_eq!(parse_time(b"1.5"), Some(Timestamp { sec: 1, nsec: 500_000_000 }));
        for bad in [&b""[..], b"-", b"1.x", b".5", b"9223372036854775808", b"--1", b"1e3"] {
            assert_eq!(parse_time(bad), None, "{}", bad.escape_ascii());
        }
    }

    proptest! {
        #[test]
        fn any_time_round_trips(sec: i64, nsec in 0u32..1_000_000_000) {
            let time = Timestamp { sec, nsec };
            prop_assert_eq!(parse_time(format_time(time).as_bytes()), Some(time));
        }

        #[test]
        fn any_xattr_name_round_trips(name in prop_oneof!["[a-z%=.0-9]{1,40}".prop_map(String::into_bytes), any::<Vec<u8>>()]) {
            let key = xattr_key(&name);
            prop_assert!(!key.contains(&b'='));
            prop_assert_eq!(xattr_name(&key), name);
        }

        #[test]
        fn any_bytes_parse_or_are_refused(data: Vec<u8>) {
            let _ = parse(&data);
            let _ = parse_time(&data);
        }
    }
}
