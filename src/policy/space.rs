//! The address space, cut into disjoint regions by owner. Nested ranges are resolved once, so that each
//! lookup is a search in a sorted list.

use super::Cidr;
use super::never::{Range, ReservedKind};

/// The owner of a stretch of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region {
    /// Reserved: no tenant reaches it.
    Never(&'static str),
    /// A private range: single addresses may belong to a service.
    Private(&'static str),
    /// A tenant's subnet, with the number of its network.
    Tenant(u32),
    /// A part of the pool of subnets that no tenant has.
    Unused,
    /// Everything else.
    Outside,
}

/// The whole address space. Each stretch ends one address before the next begins.
#[derive(Debug, Clone)]
pub struct Space {
    starts: Vec<u32>,
    regions: Vec<Region>,
}

struct SpaceLayer {
    first: u32,
    last: u32,
    region: Region,
}

impl Space {
    /// Builds the space from the reserved ranges, the pool and the subnets in it. Where they overlap, a
    /// closed range wins over the pool, and the pool over a private range.
    #[must_use]
    pub fn cut(ranges: &[Range], pool: Cidr, tenants: &[(u32, Cidr)]) -> Self {
        let of = |network: Cidr, region| SpaceLayer { first: network.first(), last: network.last(), region };
        // From the weakest to the strongest.
        let mut layers: Vec<SpaceLayer> = Vec::new();
        let wall = |wanted: ReservedKind| ranges.iter().filter(move |range| range.wall == wanted);
        layers
            .extend(wall(ReservedKind::Private).map(|range| of(range.network, Region::Private(range.words))));
        layers.push(of(pool, Region::Unused));
        layers.extend(tenants.iter().map(|(number, subnet)| of(*subnet, Region::Tenant(*number))));
        layers.extend(wall(ReservedKind::Closed).map(|range| of(range.network, Region::Never(range.words))));
        let mut edges: Vec<(u64, bool, usize)> = Vec::with_capacity(layers.len() * 2);
        for (n, layer) in layers.iter().enumerate() {
            edges.push((u64::from(layer.first), true, n));
            edges.push((u64::from(layer.last) + 1, false, n));
        }
        edges.sort_unstable();
        let (mut starts, mut regions) = (vec![0], vec![Region::Outside]);
        let mut open = std::collections::BTreeSet::new();
        let mut at = 0;
        while at < edges.len() {
            let place = edges[at].0;
            while at < edges.len() && edges[at].0 == place {
                let (_, begins, layer) = edges[at];
                if begins {
                    open.insert(layer)
                } else {
                    open.remove(&layer)
                };
                at += 1;
            }
            let Ok(start) = u32::try_from(place) else { break };
            let region = open.last().map_or(Region::Outside, |layer| layers[*layer].region);
            if starts.last() == Some(&start) {
                regions.pop();
                starts.pop();
            }
            if regions.last() != Some(&region) {
                starts.push(start);
                regions.push(region);
            }
        }
        Self { starts, regions }
    }

    /// Returns the owner of an address.
    #[must_use]
    pub fn region(&self, address: u32) -> Region {
        let after = self.starts.partition_point(|start| *start <= address);
        self.regions.get(after.wrapping_sub(1)).copied().unwrap_or(Region::Never("outside of the space"))
    }

    /// Returns the regions that a range touches, each with its first address in the range.
    pub fn walk(&self, first: u32, last: u32) -> impl Iterator<Item = (u32, Region)> + '_ {
        let from = self.starts.partition_point(|start| *start <= first).saturating_sub(1);
        self.starts[from..]
            .iter()
            .zip(&self.regions[from..])
            .take_while(move |(start, _)| **start <= last)
            .map(move |(start, region)| ((*start).max(first), *region))
    }

    /// Returns the number of stretches.
    #[must_use]
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Reports whether there are no stretches. There is always at least one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::never::BUILT_IN;
    use proptest::prelude::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    fn space() -> Space {
        Space::cut(BUILT_IN, cidr("10.64.0.0/12"), &[(0, cidr("10.64.0.0/22")), (1, cidr("10.64.4.0/22"))])
    }

    fn at(address: &str) -> Region {
        space().region(address.parse::<std::net::Ipv4Addr>().unwrap().to_bits())
    }

    #[test]
    fn every_address_has_one_owner() {
        assert_eq!(at("10.64.0.2"), Region::Tenant(0));
        assert_eq!(at("10.64.3.255"), Region::Tenant(0));
        assert_eq!(at("10.64.4.0"), Region::Tenant(1));
        assert_eq!(at("10.64.8.0"), Region::Unused);
        assert_eq!(at("10.63.255.255"), Region::Private("a private range"));
        assert_eq!(at("10.80.0.0"), Region::Private("a private range"));
        assert!(matches!(at("169.254.169.254"), Region::Never(_)));
        assert!(matches!(at("100.100.100.200"), Region::Never(_)));
        assert!(matches!(at("100.100.100.201"), Region::Private(_)));
        assert_eq!(at("1.1.1.1"), Region::Outside);
        assert!(matches!(at("255.255.255.255"), Region::Never(_)));
        assert!(matches!(at("0.0.0.0"), Region::Never(_)));
    }

    fn naive(address: u32) -> Region {
        let inside = |network: Cidr| network.first() <= address && address <= network.last();
        if let Some(range) = BUILT_IN.iter().find(|r| r.wall == ReservedKind::Closed && inside(r.network)) {
            return Region::Never(range.words);
        }
        for (number, subnet) in [(0, "10.64.0.0/22"), (1, "10.64.4.0/22")] {
            if inside(cidr(subnet)) {
                return Region::Tenant(number);
            }
        }
        if inside(cidr("10.64.0.0/12")) {
            return Region::Unused;
        }
        BUILT_IN
            .iter()
            .find(|r| inside(r.network))
            .map_or(Region::Outside, |range| Region::Private(range.words))
    }

    proptest! {
        #[test]
        fn the_cut_says_what_a_look_at_each_range_says(near in 0..BUILT_IN.len(), off in -3_i64..4, end in any::<bool>(), any in any::<u32>()) {
            let edge = BUILT_IN[near].network;
            let edge = i64::from(if end { edge.last() } else { edge.first() });
            for address in [any, u32::try_from(edge + off).unwrap_or(any)] {
                prop_assert_eq!(space().region(address), naive(address));
            }
        }

        #[test]
        fn a_walk_covers_a_range_without_a_gap(first in any::<u32>(), length in 0..1_u32 << 28) {
            let last = first.saturating_add(length);
            let space = space();
            let steps: Vec<_> = space.walk(first, last).collect();
            prop_assert_eq!(steps[0].0, first);
            for (n, (start, region)) in steps.iter().enumerate() {
                prop_assert_eq!(space.region(*start), *region);
                let end = steps.get(n + 1).map_or(last, |next| next.0 - 1);
                prop_assert_eq!(space.region(end), *region);
            }
        }
    }
}
