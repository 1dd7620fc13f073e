//! Checks that every required flow is open: a table that denies everything would pass every other check.

use rustc_hash::FxHashMap;

use super::{Verifier, about, packet};
use crate::policy::read::Rule;
use crate::policy::{Cidr, Flow, Protocol, Target};

/// Open ranges, by source, protocol and port.
pub(super) type Wide = FxHashMap<(u32, Protocol, u16), Vec<(u32, u32)>>;

/// Reports whether one of the ranges contains all of `to`.
pub(super) fn reaches(wide: &Wide, from: (u32, Protocol, u16), to: Cidr) -> bool {
    wide.get(&from)
        .is_some_and(|ranges| ranges.iter().any(|(first, last)| *first <= to.first() && to.last() <= *last))
}

impl Verifier<'_> {
    /// Checks that every required flow is open.
    pub(super) fn required(&mut self) {
        let mut wide = Wide::default();
        for rule in &self.table.outside {
            wide.entry((rule.source, rule.protocol, rule.port)).or_default().push((rule.first, rule.last));
        }
        let standing = self.standing;
        for (app, place) in &standing.apps {
            for source in place.addresses.iter().map(|address| address.to_bits()) {
                if !self.table.sources.contains(&(place.network, source)) {
                    let witness = about(place.network, source);
                    self.breach(witness, "an instance is not allowed to send".to_owned());
                }
                let gateway =
                    self.walls.homes.get(&place.network).map(|home| (place.network, home.first() + 1));
                if !gateway.is_some_and(|gateway| self.table.gateways.contains(&gateway)) {
                    let witness = about(place.network, source);
                    self.breach(witness, "an instance cannot send DNS queries".to_owned());
                }
                for flow in self.flows(*app) {
                    self.covered(place.network, source, flow, &wide);
                }
            }
        }
    }

    fn covered(&mut self, network: u32, source: u32, flow: &Flow, wide: &Wide) {
        let (protocol, port) = (flow.protocol, flow.port);
        let exact = |target: u32| Rule { network, source, first: target, last: target, protocol, port };
        let table = self.table;
        let missing: Vec<u32> = match &flow.target {
            Target::App { app, .. } => {
                let place = self.standing.apps.get(app);
                let targets = place.map_or(&[][..], |place| place.addresses.as_slice()).iter();
                targets.map(|to| to.to_bits()).filter(|to| !table.pairs.contains(&exact(*to))).collect()
            }
            Target::Service { network: to } if to.prefix() == 32 => {
                Some(to.first()).filter(|to| !table.services.contains(&exact(*to))).into_iter().collect()
            }
            // Open only after a DNS query of the app: nothing is required.
            Target::Domain { .. } => Vec::new(),
            Target::Service { network: to } | Target::Outside { network: to } => {
                let open = reaches(wide, (source, protocol, port), *to);
                Some(to.first()).filter(|_| !open).into_iter().collect()
            }
        };
        for target in missing {
            self.breach(
                packet(&exact(target), target),
                format!("{} must be allowed and is denied", flow.name),
            );
        }
    }
}
