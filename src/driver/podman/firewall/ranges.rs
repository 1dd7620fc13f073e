//! Targets that may be ranges, by who sends how.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use super::Allowed;
use crate::policy::{Cidr, Protocol};

/// Ranges of which none lies within another: the kernel takes no two that overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(BTreeMap<(u32, Ipv4Addr, Protocol, u16), BTreeSet<Cidr>>);

impl Ranges {
    /// Puts one in. What lies within a range that is there in the same way is left out.
    pub fn insert(&mut self, to: Allowed) {
        let ranges = self.0.entry((to.network, to.source, to.protocol, to.port)).or_default();
        if !ranges.iter().any(|open| open.holds(to.target)) {
            ranges.retain(|open| !to.target.holds(*open));
            ranges.insert(to.target);
        }
    }

    /// Whether one that is here holds all of this.
    #[must_use]
    pub fn covers(&self, to: &Allowed) -> bool {
        let ranges = self.0.get(&(to.network, to.source, to.protocol, to.port));
        ranges.is_some_and(|ranges| ranges.iter().any(|range| range.holds(to.target)))
    }

    /// All.
    pub fn iter(&self) -> impl Iterator<Item = Allowed> + '_ {
        self.0.iter().flat_map(|(key, ranges)| ranges.iter().map(|target| one(*key, *target)))
    }

    /// Those that are here and not there.
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
