//! The nftables table of an installation, as pure text; `kernel.rs` applies it. All traffic from, to and between
//! tenants' bridges is denied, except the elements of three sets: instance to instance, instance to a service,
//! instance to the outside. Every key begins with bridge and source address, so that each rule belongs to one app.
//!
//! All denied packets get the same answer, whether the target exists or not, before the machine's routes could
//! reveal it. Replies pass only through the mirrored key of the rule that allowed the request. Removing a rule
//! therefore cuts its running connections.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::Ipv4Addr;

use crate::policy::never::{self, Range};
use crate::policy::proof::ExpectedFacts;
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
    /// Number of the source network.
    pub network: u32,
    /// Source address.
    pub source: Ipv4Addr,
    /// Target.
    pub target: Cidr,
    /// Protocol.
    pub protocol: Protocol,
    /// Port at the target.
    pub port: u16,
}

/// Contents of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Settings that differ between installations.
    pub shell: Shell,
    /// Ranges that no tenant reaches.
    pub never: BTreeSet<Cidr>,
    /// Addresses of a network's instances.
    pub sources: BTreeSet<(u32, Ipv4Addr)>,
    /// Flows between instances.
    pub pairs: BTreeSet<Allowed>,
    /// Flows to single addresses of services.
    pub services: BTreeSet<Allowed>,
    /// Addresses of bridges, where apps reach the resolver.
    pub gateways: BTreeSet<(u32, Ipv4Addr)>,
    /// Networks in audit mode: their packets to the outside are allowed and recorded.
    pub trial: BTreeSet<u32>,
    /// Flows to addresses of domains, each with its end in [`seconds`].
    pub resolved: BTreeMap<Allowed, u64>,
    /// Flows to ranges.
    pub outside: Ranges,
    /// Flows that are about to close, and are counted.
    pub watched: Ranges,
}

/// Returns the MAC address that belongs to an IP address. It is always the same one: otherwise a peer of the
/// previous instance would keep sending to the old MAC address for half a minute.
#[must_use]
pub fn card(own: Ipv4Addr) -> String {
    let [a, b, c, d] = own.octets();
    format!("0a:58:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// Returns the seconds since the machine started, sleep included. This clock never goes back.
#[must_use]
pub fn seconds() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0)
}

/// Maximum number of elements of a change; beyond it the whole table is replaced. One more long line costs as much
/// as the table.
const SMALL: usize = 5_000;

impl Rules {
    /// Creates a table that allows nothing.
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

    /// Returns the sets by name, with each element as text.
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

    /// Returns the commands that turn the previous table into this one, if they are short: elements only, deletions
    /// first.
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

    /// Adds the same commands for addresses of domains. An element may have expired by now, and then it cannot be
    /// deleted: it is added first. An element whose time has changed is deleted and added again.
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

    /// Returns the connections that were allowed before and no longer are.
    #[must_use]
    pub fn withdrawn(&self, before: &Self) -> Vec<Allowed> {
        let exact = before.pairs.difference(&self.pairs).chain(before.services.difference(&self.services));
        let resolved = before.resolved.keys().filter(|to| !self.resolved.contains_key(to));
        exact.chain(resolved).cloned().chain(before.outside.without(&self.outside)).collect()
    }

    /// Whether a flow was counted before and no longer is.
    #[must_use]
    pub fn stops_counting(&self, before: &Self) -> bool {
        !before.watched.without(&self.watched).is_empty()
    }

    /// Whether any flow is counted.
    #[must_use]
    pub fn is_counting(&self) -> bool {
        self.watched.iter().next().is_some()
    }

    /// Returns the networks that were in audit mode before and no longer are.
    pub fn untried<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = u32> + 'a {
        before.trial.difference(&self.trial).copied()
    }

    /// Whether a connection to a single address is allowed, by any of the sets.
    #[must_use]
    pub fn permits(&self, to: &Allowed) -> bool {
        self.pairs.contains(to)
            || self.services.contains(to)
            || self.resolved.contains_key(to)
            || self.outside.covers(to)
            || self.trial.contains(&to.network) && !self.never.iter().any(|range| range.overlaps(to.target))
    }
}

/// Compiles the rules of a [`ExpectedFacts`].
#[must_use]
pub fn compile(shell: Shell, never: &[Range], standing: &ExpectedFacts) -> Rules {
    let mut rules = Rules::new(shell, never::outermost(never).collect());
    // Collected first and turned into a set once: with many elements, that is several times as fast.
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
