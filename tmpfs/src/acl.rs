//! POSIX ACLs: the kernel's binary form in xattrs, and the text that tar archives hold.
//!
//! `system.posix_acl_access` and `system.posix_acl_default` have a value of a version and 8 bytes an entry
//! (`struct posix_acl_xattr_header`, linux/posix_acl_xattr.h). Archives have `SCHILY.acl.access` and
//! `SCHILY.acl.default` with the short text form of acl(5), which star, GNU tar and libarchive read:
//! `user::rw-,user:1000:r--,group::r--,mask::r--,other::---`, ids as numbers.
//!
//! Both directions are exact: a value has one text and a text one value. What isn't *canonical* has no text and stays
//! an xattr: entries in the kernel's order (`posix_acl_valid`: owner, users, owning group, groups, mask, others), the
//! three that must be there and the mask that named entries need, ids only where they mean something.

use std::fmt::Write as _;

/// Version of the binary form (POSIX_ACL_XATTR_VERSION).
pub(crate) const VERSION: u32 = 2;
/// Tags of the entries that have an id.
pub(crate) const USER: u16 = 0x02;
/// As [`USER`], for groups.
pub(crate) const GROUP: u16 = 0x08;
const USER_OBJ: u16 = 0x01;
const GROUP_OBJ: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
/// Id of an entry that has none (ACL_UNDEFINED_ID).
const NO_ID: u32 = u32::MAX;
/// XATTR_SIZE_MAX of linux/limits.h.
const VALUE_MAX: usize = 65536;

/// The xattrs that hold ACLs, and the keys of their PAX records.
const NAMES: [(&[u8], &[u8]); 2] = [
    (b"system.posix_acl_access", b"SCHILY.acl.access"),
    (b"system.posix_acl_default", b"SCHILY.acl.default"),
];

/// Why a text isn't an ACL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AclError {
    /// An entry isn't written as it must be.
    #[error("entry {0} isn't TAG:ID:PERMISSIONS, with an id in decimal digits and permissions such as r-x")]
    Entry(usize),
    /// An entry comes before one that it must follow, or twice.
    #[error("entry {0} is out of order: owner, users, owning group, groups, mask, others")]
    Order(usize),
    /// There is no entry for the owner, the owning group, others, or the mask that named entries need.
    #[error("an entry that every ACL has, or the mask that named entries need, is missing")]
    Incomplete,
    /// It has more entries than an xattr can hold.
    #[error("more entries than an xattr holds")]
    Size,
}

/// The key of the PAX record for the xattr `name`, if it is one of an ACL.
pub fn record_key(name: &[u8]) -> Option<&'static [u8]> {
    NAMES.iter().find(|(xattr, _)| *xattr == name).map(|(_, key)| *key)
}

/// The xattr that the PAX record `key` stands for, if it is one of an ACL.
pub fn xattr_name(key: &[u8]) -> Option<&'static [u8]> {
    NAMES.iter().find(|(_, record)| *record == key).map(|(name, _)| *name)
}

/// The text of a value in the kernel's form, or `None` where it isn't canonical.
pub fn to_text(value: &[u8]) -> Option<String> {
    let (version, entries) = value.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*version) != VERSION || entries.len() % 8 != 0 || value.len() > VALUE_MAX {
        return None;
    }
    let mut text = String::new();
    let mut order = Order::default();
    for entry in entries.chunks_exact(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        let permissions = u16::from_le_bytes([entry[2], entry[3]]);
        let id = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
        let named = matches!(tag, USER | GROUP);
        if permissions > 7 || (id == NO_ID) == named || !order.follows(tag) {
            return None;
        }
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(match tag {
            USER | USER_OBJ => "user:",
            GROUP | GROUP_OBJ => "group:",
            MASK => "mask:",
            _ => "other:",
        });
        if named {
            write!(text, "{id}").expect("a String takes everything");
        }
        text.push(':');
        for (bit, letter) in [(4, 'r'), (2, 'w'), (1, 'x')] {
            text.push(if permissions & bit != 0 { letter } else { '-' });
        }
    }
    order.is_complete().then_some(text)
}

/// The value in the kernel's form of a text, which must be as [`to_text`] writes it.
pub fn from_text(text: &[u8]) -> Result<Vec<u8>, AclError> {
    let mut value = VERSION.to_le_bytes().to_vec();
    let mut order = Order::default();
    for (index, entry) in text.split(|b| *b == b',').enumerate() {
        let (tag, permissions, id) = parse_entry(entry).ok_or(AclError::Entry(index))?;
        if !order.follows(tag) {
            return Err(AclError::Order(index));
        }
        if value.len() + 8 > VALUE_MAX {
            return Err(AclError::Size);
        }
        value.extend_from_slice(&tag.to_le_bytes());
        value.extend_from_slice(&permissions.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    if order.is_complete() { Ok(value) } else { Err(AclError::Incomplete) }
}

fn parse_entry(entry: &[u8]) -> Option<(u16, u16, u32)> {
    let mut fields = entry.split(|b| *b == b':');
    let (name, id, letters) = (fields.next()?, fields.next()?, fields.next()?);
    let tag = match (name, id.is_empty()) {
        (b"user", true) => USER_OBJ,
        (b"user", false) => USER,
        (b"group", true) => GROUP_OBJ,
        (b"group", false) => GROUP,
        (b"mask", true) => MASK,
        (b"other", true) => OTHER,
        _ => return None,
    };
    let id = if id.is_empty() {
        NO_ID
    } else {
        // One text a value: no leading zeros.
        let plain = id.len() == 1 || id[0] != b'0';
        crate::pax::decimal(id).filter(|id| plain && *id != NO_ID)?
    };
    let letters: [u8; 3] = letters.try_into().ok()?;
    let mut permissions = 0;
    for (have, (bit, letter)) in letters.into_iter().zip([(4, b'r'), (2, b'w'), (1, b'x')]) {
        match have {
            b'-' => {}
            have if have == letter => permissions |= bit,
            _ => return None,
        }
    }
    fields.next().is_none().then_some((tag, permissions, id))
}

/// How far a list of entries has come.
#[derive(Default)]
struct Order {
    last: u16,
    named: bool,
    mask: bool,
}

impl Order {
    /// Takes the next entry's tag; false where it can't come here. The kernel's tags ascend in its order.
    fn follows(&mut self, tag: u16) -> bool {
        let named = matches!(tag, USER | GROUP);
        let may = match tag {
            USER_OBJ => self.last == 0,
            USER => matches!(self.last, USER_OBJ | USER),
            GROUP_OBJ => matches!(self.last, USER_OBJ | USER),
            GROUP => matches!(self.last, GROUP_OBJ | GROUP),
            MASK => matches!(self.last, GROUP_OBJ | GROUP),
            OTHER => matches!(self.last, GROUP_OBJ | GROUP | MASK),
            _ => false,
        };
        self.last = tag;
        self.named |= named;
        self.mask |= tag == MASK;
        may
    }

    fn is_complete(&self) -> bool {
        self.last == OTHER && (self.mask || !self.named)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut value = VERSION.to_le_bytes().to_vec();
        for (tag, permissions, id) in entries {
            value.extend_from_slice(&tag.to_le_bytes());
            value.extend_from_slice(&permissions.to_le_bytes());
            value.extend_from_slice(&id.to_le_bytes());
        }
        value
    }

    #[test]
    fn the_text_is_that_of_acl_5() {
        let full = value(&[
            (USER_OBJ, 6, NO_ID),
            (USER, 4, 1000),
            (USER, 0, 0),
            (GROUP_OBJ, 4, NO_ID),
            (GROUP, 7, 4_294_967_294),
            (MASK, 5, NO_ID),
            (OTHER, 0, NO_ID),
        ]);
        let text = "user::rw-,user:1000:r--,user:0:---,group::r--,group:4294967294:rwx,mask::r-x,other::---";
        assert_eq!(to_text(&full).as_deref(), Some(text));
        assert_eq!(from_text(text.as_bytes()), Ok(full));
        let least = value(&[(USER_OBJ, 7, NO_ID), (GROUP_OBJ, 1, NO_ID), (OTHER, 2, NO_ID)]);
        assert_eq!(to_text(&least).as_deref(), Some("user::rwx,group::--x,other::-w-"));
    }

    #[test]
    fn what_is_not_canonical_has_no_text() {
        let least = [(USER_OBJ, 7, NO_ID), (GROUP_OBJ, 1, NO_ID), (OTHER, 2, NO_ID)];
        let mut old = value(&least);
        old[0] = 1;
        let mut long = value(&least);
        long.push(0);
        let with = |at: usize, entry: (u16, u16, u32)| {
            let mut entries = least.to_vec();
            entries.insert(at, entry);
            value(&entries)
        };
        for bad in [
            old,
            long,
            Vec::new(),
            value(&[]),
            value(&least[..2]),
            with(1, (USER, 7, 5)),
            with(1, (USER, 7, NO_ID)),
            with(2, (USER, 7, 5)),
            with(2, (MASK, 7, 5)),
            with(3, (MASK, 7, NO_ID)),
            with(1, (USER_OBJ, 7, NO_ID)),
            with(2, (MASK, 8, NO_ID)),
            with(2, (0x40, 7, NO_ID)),
        ] {
            assert_eq!(to_text(&bad), None, "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for (bad, why) in [
            ("", AclError::Entry(0)),
            ("user::rwx,,other::---", AclError::Entry(1)),
            ("user::rwx,group::r-x,other::---,", AclError::Entry(3)),
            ("user::rwx,user:01:r--,group::r-x,mask::r--,other::---", AclError::Entry(1)),
            ("user::rwx,user:4294967295:r--,group::r-x,mask::r--,other::---", AclError::Entry(1)),
            ("user::rwx,user:+1:r--,group::r-x,mask::r--,other::---", AclError::Entry(1)),
            ("user::rwx,user:root:r--,group::r-x,mask::r--,other::---", AclError::Entry(1)),
            ("user::rwx,user:1:r--:1,group::r-x,mask::r--,other::---", AclError::Entry(1)),
            ("user::xwr,group::r-x,other::---", AclError::Entry(0)),
            ("user::rw,group::r-x,other::---", AclError::Entry(0)),
            ("user::rwx,group::r-x,mask:1:---,other::---", AclError::Entry(2)),
            ("user::rwx\ngroup::r-x\nother::---", AclError::Entry(0)),
            ("group::r-x,user::rwx,other::---", AclError::Order(0)),
            ("user::rwx,group::r-x,other::---,other::---", AclError::Order(3)),
            ("user::rwx,group::r-x", AclError::Incomplete),
            ("user::rwx,user:1:r--,group::r-x,other::---", AclError::Incomplete),
        ] {
            assert_eq!(from_text(bad.as_bytes()), Err(why), "{bad}");
        }
        let many = format!("user::rwx,{}group::r-x,mask::r-x,other::---", "user:1:r--,".repeat(9000));
        assert_eq!(from_text(many.as_bytes()), Err(AclError::Size));
    }

    fn entries() -> impl Strategy<Value = Vec<(u16, u16, u32)>> {
        let named = prop::collection::vec((0..8u16, 0..NO_ID), 0..5);
        (named.clone(), named, prop::array::uniform4(0..8u16)).prop_map(|(users, groups, four)| {
            let mut all = vec![(USER_OBJ, four[0], NO_ID)];
            all.extend(users.iter().map(|(permissions, id)| (USER, *permissions, *id)));
            all.push((GROUP_OBJ, four[1], NO_ID));
            all.extend(groups.iter().map(|(permissions, id)| (GROUP, *permissions, *id)));
            all.push((MASK, four[2], NO_ID));
            all.push((OTHER, four[3], NO_ID));
            all
        })
    }

    proptest! {
        #[test]
        fn any_acl_round_trips(entries in entries()) {
            let value = value(&entries);
            prop_assert_eq!(from_text(to_text(&value).unwrap().as_bytes()), Ok(value));
        }

        #[test]
        fn any_value_has_its_own_text_or_none(value: Vec<u8>) {
            if let Some(text) = to_text(&value) {
                prop_assert_eq!(from_text(text.as_bytes()), Ok(value));
            }
        }

        #[test]
        fn any_text_has_its_own_value_or_none(text in "((user|group|mask|other):[0-9]{0,2}:[r-][w-][x-],?){0,6}") {
            if let Ok(value) = from_text(text.as_bytes()) {
                prop_assert_eq!(to_text(&value), Some(text));
            }
        }
    }
}
