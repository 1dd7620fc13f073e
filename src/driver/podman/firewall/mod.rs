//! The one nftables table of an installation, as pure text; `kernel.rs` puts it in force. Everything from, to and
//! between tenants' bridges is closed but for the elements of three sets: instance to instance, instance
//! to a service, instance to the outside. Every key begins with bridge and source address, so that each
//! rule is one app's. What is refused is refused alike, whether anybody is there or not, before the machine's
//! routes could tell. Replies pass only through the mirrored key of the rule that allowed the question:
//! taking a rule away cuts what runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::Ipv4Addr;

use crate::policy::never::{self, Range};
use crate::policy::proof::Standing;
use crate::policy::read::{Set, Shell};
use crate::policy::{Cidr, Protocol, Target};

pub mod kernel;
mod ranges;
mod text;
pub mod watch;

pub use ranges::Ranges;

/// One allowed connection: an element of a set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Allowed {
    /// Number of the network that it comes from.
    pub network: u32,
    /// From.
    pub source: Ipv4Addr,
    /// To.
    pub target: Cidr,
    /// Protocol.
    pub protocol: Protocol,
    /// Port at the target.
    pub port: u16,
}

/// What the table is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// What differs between installations.
    pub shell: Shell,
    /// What nobody reaches.
    pub never: BTreeSet<Cidr>,
    /// Addresses that a network's instances have.
    pub sources: BTreeSet<(u32, Ipv4Addr)>,
    /// Between instances.
    pub pairs: BTreeSet<Allowed>,
    /// To single addresses of services.
    pub services: BTreeSet<Allowed>,
    /// Addresses of bridges, where names are asked for.
    pub gateways: BTreeSet<(u32, Ipv4Addr)>,
    /// Networks whose packets outside are let through and written down.
    pub trial: BTreeSet<u32>,
    /// To addresses of domains, each until a second of the clock that never goes back.
    pub resolved: BTreeMap<Allowed, u64>,
    /// To ranges.
    pub outside: Ranges,
    /// What is about to close, and is counted.
    pub watched: Ranges,
}

/// The hardware address that belongs to an address. It is always the same one, so that whoever knew
/// the last instance there does not go on sending to that one's card for half a minute.
#[must_use]
pub fn card(own: Ipv4Addr) -> String {
    let [a, b, c, d] = own.octets();
    format!("0a:58:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// Seconds of a clock that never goes back: since the machine started, sleep included.
#[must_use]
pub fn seconds() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0)
}

/// Elements beyond which a change is a replacement: one long line more costs as much as all of it.
const SMALL: usize = 5_000;

impl Rules {
    /// A table that allows nothing.
    #[must_use]
    pub fn new(shell: Shell, never: BTreeSet<Cidr>) -> Self {
        let (sources, pairs, services, gateways, trial, resolved, outside, watched) = Default::default();
        Self { shell, never, sources, pairs, services, gateways, trial, resolved, outside, watched }
    }

    fn bridge(&self, network: u32) -> String {
        format!("\"{}{network}\"", self.shell.prefix)
    }

    fn source(&self, (network, address): (u32, Ipv4Addr)) -> String {
        format!("\"{}{network}\" . {address}", self.shell.prefix)
    }

    fn sender(&self, (network, address): (u32, Ipv4Addr)) -> String {
        format!("\"{}{network}\" . {} . {address}", self.shell.prefix, card(address))
    }

    fn allowed(&self, to: &Allowed) -> String {
        let Allowed { network, source, target, protocol, port } = to;
        format!("\"{}{network}\" . {source} . {target} . {protocol} . {port}", self.shell.prefix)
    }

    fn timed(&self, to: &Allowed, seconds: u64) -> String {
        format!("{} timeout {seconds}s", self.allowed(to))
    }

    /// The sets by name, each element as it is written.
    pub(super) fn elements(&self) -> [(&'static str, BTreeSet<String>); 7] {
        [
            ("sources", self.sources.iter().map(|source| self.sender(*source)).collect()),
            ("trial", self.trial.iter().map(|network| self.bridge(*network)).collect()),
            ("gateways", self.gateways.iter().map(|gateway| self.source(*gateway)).collect()),
            (Set::Pairs.name(), self.pairs.iter().map(|to| self.allowed(to)).collect()),
            (Set::Services.name(), self.services.iter().map(|to| self.allowed(to)).collect()),
            (Set::Outside.name(), self.outside.iter().map(|to| self.allowed(&to)).collect()),
            (Set::Watched.name(), self.watched.iter().map(|to| self.allowed(&to)).collect()),
        ]
    }

    /// What makes this table of the one before, if that is short: elements alone, first those that go.
    #[must_use]
    pub fn change(&self, before: &Self) -> Option<String> {
        if self.shell != before.shell || self.never != before.never {
            return None;
        }
        let mut out = String::new();
        let mut count = 0;
        for (verb, from, minus) in [("delete", before, self), ("add", self, before)] {
            let sources =
                from.sources.difference(&minus.sources).map(|source| self.sender(*source)).collect();
            let list = |set: Vec<Allowed>| set.iter().map(|to| self.allowed(to)).collect();
            let gone = |left: &BTreeSet<Allowed>, right| left.difference(right).cloned().collect();
            let gateways =
                from.gateways.difference(&minus.gateways).map(|gateway| self.source(*gateway)).collect();
            let trial = from.trial.difference(&minus.trial).map(|network| self.bridge(*network)).collect();
            let sets: [(&str, Vec<String>); 7] = [
                ("trial", trial),
                ("sources", sources),
                ("gateways", gateways),
                (Set::Pairs.name(), list(gone(&from.pairs, &minus.pairs))),
                (Set::Services.name(), list(gone(&from.services, &minus.services))),
                (Set::Outside.name(), list(from.outside.without(&minus.outside))),
                (Set::Watched.name(), list(from.watched.without(&minus.watched))),
            ];
            for (set, elements) in sets.into_iter().filter(|(_, elements)| !elements.is_empty()) {
                count += elements.len();
                let table = &self.shell.table;
                let _ = writeln!(out, "{verb} element inet {table} {set} {{ {} }}", elements.join(", "));
            }
        }
        count += self.change_resolved(before, &mut out);
        (count <= SMALL).then_some(out)
    }

    /// The same for addresses of domains. An element may have ended by itself by now, and then cannot be taken
    /// away: so it is put in first. One whose time has changed is put in anew.
    fn change_resolved(&self, before: &Self, out: &mut String) -> usize {
        let now = seconds();
        let mut gone = Vec::new();
        let mut come = Vec::new();
        for to in before.resolved.keys().chain(self.resolved.keys()).collect::<BTreeSet<_>>() {
            let (old, new) = (before.resolved.get(to), self.resolved.get(to).filter(|end| **end > now));
            if old == new {
                continue;
            }
            gone.push(to);
            come.extend(new.map(|end| self.timed(to, end - now)));
        }
        if gone.is_empty() {
            return 0;
        }
        let table = &self.shell.table;
        let again: Vec<String> = gone.iter().map(|to| self.timed(to, 1)).collect();
        let bare: Vec<String> = gone.iter().map(|to| self.allowed(to)).collect();
        let _ = writeln!(out, "add element inet {table} resolved {{ {} }}", again.join(", "));
        let _ = writeln!(out, "delete element inet {table} resolved {{ {} }}", bare.join(", "));
        if !come.is_empty() {
            let _ = writeln!(out, "add element inet {table} resolved {{ {} }}", come.join(", "));
        }
        gone.len() * 2 + come.len()
    }

    /// Connections that were allowed before and are not any more.
    #[must_use]
    pub fn withdrawn(&self, before: &Self) -> Vec<Allowed> {
        let exact = before.pairs.difference(&self.pairs).chain(before.services.difference(&self.services));
        let resolved = before.resolved.keys().filter(|to| !self.resolved.contains_key(to));
        exact.chain(resolved).cloned().chain(before.outside.without(&self.outside)).collect()
    }

    /// Whether something was counted before and is not any more.
    #[must_use]
    pub fn stops_counting(&self, before: &Self) -> bool {
        !before.watched.without(&self.watched).is_empty()
    }

    /// Whether something is counted.
    #[must_use]
    pub fn is_counting(&self) -> bool {
        self.watched.iter().next().is_some()
    }

    /// Networks that were on trial before and are not any more.
    pub fn untried<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = u32> + 'a {
        before.trial.difference(&self.trial).copied()
    }

    /// Whether a connection to a single address is allowed, in whatever form.
    #[must_use]
    pub fn permits(&self, to: &Allowed) -> bool {
        self.pairs.contains(to)
            || self.services.contains(to)
            || self.resolved.contains_key(to)
            || self.outside.covers(to)
            || self.trial.contains(&to.network) && !self.never.iter().any(|range| range.overlaps(to.target))
    }
}

/// What follows from what stands behind it.
#[must_use]
pub fn compile(shell: Shell, never: &[Range], standing: &Standing) -> Rules {
    let mut rules = Rules::new(shell, never::outermost(never).collect());
    // Gathered first and made a set once: with many, that is several times as fast.
    let (mut sources, mut pairs, mut services) = (Vec::new(), Vec::new(), Vec::new());
    for (app, place) in &standing.apps {
        let network = place.network;
        if !place.addresses.is_empty() {
            rules.gateways.insert((network, place.gateway));
        }
        sources.extend(place.addresses.iter().map(|address| (network, *address)));
        for flow in standing.flows.get(app).into_iter().flatten() {
            let (protocol, port) = (flow.protocol, flow.port);
            for source in place.addresses.iter().copied() {
                let to = |target: Cidr| Allowed { network, source, target, protocol, port };
                match &flow.target {
                    Target::App { app: peer, .. } => {
                        let targets = standing.apps.get(peer).into_iter().flat_map(|place| &place.addresses);
                        pairs.extend(targets.map(|target| to(Cidr::of(*target))));
                    }
                    Target::Service { network } if network.prefix() == 32 => {
                        services.push(to(*network));
                    }
                    Target::Service { network } | Target::Outside { network } => {
                        rules.outside.insert(to(*network));
                    }

                    Target::Domain { domain } => {
                        let found = standing.resolved.get(&(*app, domain.clone())).into_iter().flatten();
                        for (address, end) in found {
                            let until = rules.resolved.entry(to(Cidr::of(*address))).or_default();
                            *until = (*until).max(*end);
                        }
                    }
                }
            }
        }
        for flow in standing.watched.get(app).into_iter().flatten() {
            let Target::Service { network: target } = flow.target else { continue };
            for source in place.addresses.iter().copied() {
                let (protocol, port) = (flow.protocol, flow.port);
                rules.watched.insert(Allowed { network, source, target, protocol, port });
            }
        }
    }
    rules.trial.clone_from(&standing.trial);
    rules.sources = sources.into_iter().collect();
    rules.pairs = pairs.into_iter().collect();
    rules.services = services.into_iter().collect();
    rules
}
