//! The uid and gid mappings of a user namespace, between the ids a container sees and the host's.
//!
//! Images hold the container's ids, so that a filesystem saved from one user namespace can be
//! restored into another. The empty mapping is the identity: no user namespace.

use serde::{Deserialize, Serialize};

/// One line of uid_map(5): `size` ids from `container` on are `size` ids from `host` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    /// First id inside the user namespace.
    pub container: u32,
    /// First id on the host.
    pub host: u32,
    /// Number of ids.
    pub size: u32,
}

/// What an id that a user namespace doesn't map looks like inside (/proc/sys/kernel/overflowuid).
pub const OVERFLOW_ID: u32 = 65534;

/// The mappings of one kind of id; no mapping at all is the identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap(pub Vec<IdMapping>);

impl IdMap {
    /// The host's id of a container's id, or `None` where it isn't mapped.
    pub fn to_host(&self, id: u32) -> Option<u32> {
        self.translate(id, |m| (m.container, m.host))
    }

    /// The container's id of a host's id, or `None` where it isn't mapped.
    pub fn to_container(&self, id: u32) -> Option<u32> {
        self.translate(id, |m| (m.host, m.container))
    }

    fn translate(&self, id: u32, ends: impl Fn(&IdMapping) -> (u32, u32)) -> Option<u32> {
        if self.0.is_empty() {
            return Some(id);
        }
        self.0.iter().find_map(|mapping| {
            let (from, to) = ends(mapping);
            let distance = id.checked_sub(from)?;
            if distance < mapping.size { to.checked_add(distance) } else { None }
        })
    }
}

/// The mappings of both kinds of id of one user namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ids {
    /// Of users.
    pub uid: IdMap,
    /// Of groups.
    pub gid: IdMap,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_translated_both_ways() {
        let map = IdMap(vec![
            IdMapping { container: 0, host: 100_000, size: 1000 },
            IdMapping { container: 5000, host: 7, size: 1 },
        ]);
        assert_eq!(map.to_host(0), Some(100_000));
        assert_eq!(map.to_host(999), Some(100_999));
        assert_eq!(map.to_host(1000), None);
        assert_eq!(map.to_host(5000), Some(7));
        assert_eq!(map.to_container(100_999), Some(999));
        assert_eq!(map.to_container(7), Some(5000));
        assert_eq!(map.to_container(0), None);
        assert_eq!(IdMap::default().to_host(42), Some(42));
    }

    #[test]
    fn a_mapping_at_the_end_of_the_range_does_not_overflow() {
        let map = IdMap(vec![IdMapping { container: 0, host: u32::MAX, size: 10 }]);
        assert_eq!(map.to_host(0), Some(u32::MAX));
        assert_eq!(map.to_host(1), None);
    }
}
