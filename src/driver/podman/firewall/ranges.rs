//! Targets that may be ranges, by sender, protocol and port.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use super::Allowed;
use crate::policy::{Cidr, Protocol};

/// Ranges of which none lies within another: the kernel accepts no overlapping ranges.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(BTreeMap<(u32, Ipv4Addr, Protocol, u16), BTreeSet<Cidr>>);

impl Ranges {
    /// Adds a range. A range that lies within another one of the same sender, protocol and port is left out.
    pub fn insert(&mut self, to: Allowed) {
        let ranges = self.0.entry((to.network, to.source, to.protocol, to.port)).or_default();
        if !ranges.iter().any(|open| open.holds(to.target)) {
            ranges.retain(|open| !to.target.holds(*open));
            ranges.insert(to.target);
        }
    }

    /// Whether one of the ranges contains this target entirely.
    #[must_use]
    pub fn covers(&self, to: &Allowed) -> bool {
        let ranges = self.0.get(&(to.network, to.source, to.protocol, to.port));
        ranges.is_some_and(|ranges| ranges.iter().any(|range| range.holds(to.target)))
    }

    /// Iterates over all ranges.
    pub fn iter(&self) -> impl Iterator<Item = Allowed> + '_ {
        self.0.iter().flat_map(|(key, ranges)| ranges.iter().map(|target| one(*key, *target)))
    }

    /// Returns the ranges that are here and not in `other`.
    #[must_use]
    pub fn without(&self, other: &Self) -> Vec<Allowed> {
        let mut out = Vec::new();
        for (key, ranges) in &self.0 {
            let there = other.0.get(key);
            let left = ranges.iter().filter(|range| there.is_none_or(|there| !there.contains(range)));
            out.extend(left.map(|target| one(*key, *target)));
        }
        out
    }
}

fn one((network, source, protocol, port): (u32, Ipv4Addr, Protocol, u16), target: Cidr) -> Allowed {
    Allowed { network, source, target, protocol, port }
}
