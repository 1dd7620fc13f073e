//! Verifies that a table allows exactly the flows that were decided. This checker is written apart from the
//! compiler of the table and runs on the very text that will be applied. It is the only source of a
//! [`Proven`], and nothing is applied without one.
//!
//! It checks each element of each set against the regions that the element's target touches. Then it looks
//! for every required flow among the elements. Each fault names a packet that demonstrates it.

use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use super::never::Range;
use super::read::{self, Rule, Set, Shell, Table, Unreadable};
use super::space::{Region, Space};
use super::{Cidr, Flow, Packet, Protocol, Target};
use crate::ids::{AppId, DomainName, TenantName};

mod liveness;

use liveness::{Wide, reaches};

/// Maximum number of faults that are reported in detail. Their count is always exact.
const TOLD: usize = 20;

/// The facts that the agent holds itself and accepts from no other process.
#[derive(Debug, Clone)]
pub struct MachineFacts {
    /// The table's shape.
    pub shell: Shell,
    never: Vec<Range>,
    homes: FxHashMap<u32, Cidr>,
    space: Space,
}

impl MachineFacts {
    /// Builds them from the shape, the reserved ranges, and the subnet of each network.
    #[must_use]
    pub fn new(shell: Shell, never: Vec<Range>, subnets: Vec<(u32, Cidr)>) -> Self {
        let space = Space::cut(&never, shell.pool, &subnets);
        Self { shell, never, homes: subnets.into_iter().collect(), space }
    }
}

/// The place of an app, from the agent's own records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppAddress {
    /// Its tenant.
    pub tenant: TenantName,
    /// Number of the tenant's network.
    pub network: u32,
    /// Address of its bridge.
    pub gateway: Ipv4Addr,
    /// Addresses of its instances.
    pub addresses: Vec<Ipv4Addr>,
}

/// The facts that a table must match: the addresses of the apps and their allowed flows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExpectedFacts {
    /// Apps.
    pub apps: FxHashMap<AppId, AppAddress>,
    /// Allowed flows by app.
    pub flows: FxHashMap<AppId, Vec<Flow>>,
    /// Addresses that DNS returned for the domains of an app. Each is valid until a second of the monotonic
    /// clock.
    pub resolved: FxHashMap<(AppId, DomainName), BTreeMap<Ipv4Addr, u64>>,
    /// Networks in audit mode.
    pub trial: BTreeSet<u32>,
    /// The flows of each app that are counted.
    pub watched: FxHashMap<AppId, Vec<Flow>>,
}

/// A fault of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Breach {
    /// A packet that the table wrongly allows or wrongly denies.
    pub witness: Packet,
    /// The fault.
    pub why: String,
}

/// Why a text failed verification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VerificationError {
    /// The text differs from the only shape that can be verified.
    Unreadable(Unreadable),
    /// The reserved ranges in the table differ from the agent's.
    Never,
    /// The table allows too much or too little: the number of faults, and the first ones.
    Breached(usize, Vec<Breach>),
}

impl std::fmt::Display for VerificationError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreadable(error) => write!(f, "the table cannot be parsed: {error}"),
            Self::Never => f.write_str("the reserved ranges in the table differ from the agent's"),
            Self::Breached(count, told) => {
                write!(f, "{count} fault(s)")?;
                told.iter().take(3).try_for_each(|breach| write!(f, "; {}: {}", breach.witness, breach.why))
            }
        }
    }
}

/// A verified text, with the table that results from it.
#[derive(Debug)]
pub struct Proven {
    text: String,
    table: Table,
}

impl Proven {
    /// Returns the text to apply.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }
    /// Returns the table that results.
    #[must_use]
    pub fn into_table(self) -> Table {
        self.table
    }
}

/// Verifies a whole table.
pub fn prove(
    text: String,
    walls: &MachineFacts,
    standing: &ExpectedFacts,
) -> Result<Proven, VerificationError> {
    let table = read::table(&text, &walls.shell).map_err(VerificationError::Unreadable)?;
    judge(text, table, walls, standing)
}

/// Verifies a change of a verified table: the table that results is verified as a whole.
pub fn prove_change(
    text: String,
    before: &Table,
    walls: &MachineFacts,
    standing: &ExpectedFacts,
) -> Result<Proven, VerificationError> {
    let table = read::change(&text, before, &walls.shell).map_err(VerificationError::Unreadable)?;
    judge(text, table, walls, standing)
}

fn judge(
    text: String,
    table: Table,
    walls: &MachineFacts,
    standing: &ExpectedFacts,
) -> Result<Proven, VerificationError> {
    // A kernel set takes no range inside another: a reserved range is an element itself, or lies inside one.
    let known = |range: &(u32, u32)| {
        walls.never.iter().any(|wall| (wall.network.first(), wall.network.last()) == *range)
    };
    let held = |wall: &Range| {
        let (first, last) = (wall.network.first(), wall.network.last());
        table.never.iter().any(|range| range.0 <= first && last <= range.1)
    };
    if !table.never.iter().all(known) || !walls.never.iter().all(held) {
        return Err(VerificationError::Never);
    }
    let mut safety = Verifier::new(&table, walls, standing);
    let mut liveness = Verifier { told: Vec::new(), count: 0, owners: FxHashMap::default(), ..safety };
    // Two independent halves: no flow is open that must be closed, and no flow is closed that must be open.
    std::thread::scope(|scope| {
        scope.spawn(|| liveness.required());
        safety.allowed();
    });
    let count = safety.count + liveness.count;
    if count == 0 {
        return Ok(Proven { text, table });
    }
    let mut told = safety.told;
    told.extend(liveness.told);
    told.truncate(TOLD);
    Err(VerificationError::Breached(count, told))
}

struct Verifier<'a> {
    table: &'a Table,
    walls: &'a MachineFacts,
    standing: &'a ExpectedFacts,
    /// The app at each address.
    owners: FxHashMap<u32, AppId>,
    count: usize,
    told: Vec<Breach>,
}

fn packet(rule: &Rule, target: u32) -> Packet {
    Packet {
        network: rule.network,
        source: Ipv4Addr::from_bits(rule.source),
        target: Ipv4Addr::from_bits(target),
        protocol: rule.protocol,
        port: rule.port,
    }
}

/// A packet from an address whose destination does not matter.
fn about(network: u32, source: u32) -> Packet {
    Packet {
        network,
        source: Ipv4Addr::from_bits(source),
        target: Ipv4Addr::UNSPECIFIED,
        protocol: Protocol::Tcp,
        port: 1,
    }
}

impl<'a> Verifier<'a> {
    fn new(table: &'a Table, walls: &'a MachineFacts, standing: &'a ExpectedFacts) -> Self {
        let mut court =
            Self { table, walls, standing, owners: FxHashMap::default(), count: 0, told: Vec::new() };
        for (app, place) in &standing.apps {
            for address in &place.addresses {
                if court.owners.insert(address.to_bits(), *app).is_some() {
                    let witness = about(place.network, address.to_bits());
                    court.breach(witness, "two apps have the same address".to_owned());
                }
            }
        }
        court
    }

    fn breach(&mut self, witness: Packet, why: String) {
        self.count += 1;
        if self.told.len() < TOLD {
            self.told.push(Breach { witness, why });
        }
    }

    /// Returns the app that sends from an address of a network, if the address may send at all.
    fn sender(&self, network: u32, source: u32) -> Option<AppId> {
        let app = *self.owners.get(&source)?;
        (self.standing.apps.get(&app)?.network == network).then_some(app)
    }

    /// Checks that no flow is open that must be closed.
    fn allowed(&mut self) {
        self.sources();
        self.gateways();
        self.trials();
        self.counted();
        for set in [Set::Pairs, Set::Services, Set::Outside, Set::Resolved] {
            for rule in self.table.set(set) {
                self.rule(set, rule);
            }
        }
    }

    /// Checks that each source is an instance's address in its own tenant's subnet.
    fn sources(&mut self) {
        for (network, source) in &self.table.sources {
            let home = self.walls.homes.get(network);
            // Excludes the network address, the gateway and the broadcast address.
            let fits = home.is_some_and(|home| *source > home.first() + 1 && *source < home.last());
            if !fits || self.sender(*network, *source).is_none() {
                let witness = about(*network, *source);
                self.breach(witness, "the source is not an instance of this network".to_owned());
            }
        }
    }

    fn flows(&self, app: AppId) -> &'a [Flow] {
        self.standing.flows.get(&app).map_or(&[], Vec::as_slice)
    }

    /// Checks one element over every address that it allows.
    fn rule(&mut self, set: Set, rule: &Rule) {
        let sender = self.sender(rule.network, rule.source);
        let Some(sender) = sender.filter(|_| self.table.sources.contains(&(rule.network, rule.source)))
        else {
            self.breach(packet(rule, rule.first), "the source is not an instance of this network".to_owned());
            return;
        };
        let walls = self.walls;
        for (at, region) in walls.space.walk(rule.first, rule.last) {
            if let Err(why) = self.justify(set, rule, sender, at, region) {
                self.breach(packet(rule, at), why);
            }
        }
    }

    fn justify(&self, set: Set, rule: &Rule, sender: AppId, at: u32, region: Region) -> Result<(), String> {
        let same = |flow: &&Flow| flow.protocol == rule.protocol && flow.port == rule.port;
        match (set, region) {
            (Set::Watched, _) => Err("counted flows are verified separately".to_owned()),
            (_, Region::Never(what)) => Err(format!("the target is {what}: always denied")),
            (_, Region::Unused) => {
                Err("the target is in the pool of subnets, and no tenant has it".to_owned())
            }
            (Set::Outside | Set::Resolved, Region::Private(what)) => {
                Err(format!("the target is {what}: only a single address of a service may be allowed there"))
            }
            (Set::Services | Set::Outside | Set::Resolved, Region::Tenant(_)) => {
                Err("the target is an instance, and this set is not for instances".to_owned())
            }
            (Set::Pairs, Region::Private(_) | Region::Outside) => {
                Err("the target is not an instance".to_owned())
            }
            (Set::Pairs, Region::Tenant(network)) => {
                let receiver =
                    self.owners.get(&at).and_then(|app| Some((*app, self.standing.apps.get(app)?)));
                let Some((app, place)) = receiver.filter(|(_, place)| place.network == network) else {
                    return Err("the target is not an instance of this network".to_owned());
                };
                let meant = |flow: &&Flow| matches!(&flow.target, Target::App { tenant, app: own } if *own == app && *tenant == place.tenant);
                if self.flows(sender).iter().filter(same).any(|flow| meant(&flow)) {
                    Ok(())
                } else {
                    Err("the app does not name this app and port, or has no grant for them".to_owned())
                }
            }
            (Set::Services, Region::Private(_) | Region::Outside) => {
                let meant = |flow: &&Flow| matches!(&flow.target, Target::Service { network } if network.prefix() == 32 && network.first() == at);
                if self.flows(sender).iter().filter(same).any(|flow| meant(&flow)) {
                    Ok(())
                } else {
                    Err("the app does not name a service with this endpoint".to_owned())
                }
            }
            (Set::Resolved, Region::Outside) => {
                let at = Ipv4Addr::from_bits(at);
                let meant = |flow: &&Flow| match &flow.target {
                    Target::Domain { domain } => {
                        let found = self.standing.resolved.get(&(sender, domain.clone()));
                        found.is_some_and(|addresses| addresses.contains_key(&at))
                    }
                    _ => false,
                };
                if self.flows(sender).iter().filter(same).any(|flow| meant(&flow)) {
                    Ok(())
                } else {
                    Err("the address does not belong to a domain that the app names on this port".to_owned())
                }
            }
            (Set::Outside, Region::Outside) => {
                let meant = |flow: &&Flow| match &flow.target {
                    Target::Service { network } | Target::Outside { network } => {
                        network.first() <= rule.first && rule.last <= network.last()
                    }
                    Target::App { .. } | Target::Domain { .. } => false,
                };
                if self.flows(sender).iter().filter(same).any(|flow| meant(&flow)) {
                    Ok(())
                } else {
                    Err("the app does not name a target that contains all of this range".to_owned())
                }
            }
        }
    }

    /// Checks that each network accepts DNS queries only at its own bridge.
    fn gateways(&mut self) {
        for (network, address) in &self.table.gateways {
            if self.walls.homes.get(network).is_none_or(|home| *address != home.first() + 1) {
                let witness = about(*network, *address);
                self.breach(witness, "the address is not the one of the network's bridge".to_owned());
            }
        }
    }

    /// Checks that exactly the tenants in audit mode are in the set. The shape limits audit mode to the
    /// outside, and excludes the reserved ranges.
    fn trials(&mut self) {
        let (there, meant) = (&self.table.trial, &self.standing.trial);
        let wrong: Vec<u32> = there
            .iter()
            .filter(|network| !meant.contains(network))
            .chain(meant.iter().filter(|network| !there.contains(network)))
            .copied()
            .collect();
        for network in wrong {
            self.breach(
                about(network, 0),
                "this network is in audit mode and must not be, or must be and is not".to_owned(),
            );
        }
    }

    /// Checks that exactly the flows to be counted are counted. The shape ensures that counting allows
    /// nothing.
    fn counted(&mut self) {
        for rule in &self.table.watched {
            let meant =
                self.sender(rule.network, rule.source).and_then(|app| self.standing.watched.get(&app));
            let is = |flow: &Flow| {
                matches!(flow.target, Target::Service { network } if network.first() == rule.first && network.last() == rule.last)
                    && (flow.protocol, flow.port) == (rule.protocol, rule.port)
            };
            if !meant.is_some_and(|flows| flows.iter().any(is)) {
                self.breach(packet(rule, rule.first), "the flow is counted and must not be".to_owned());
            }
        }
        let mut wide = Wide::default();
        for rule in &self.table.watched {
            wide.entry((rule.source, rule.protocol, rule.port)).or_default().push((rule.first, rule.last));
        }
        let standing = self.standing;
        for (app, flows) in &standing.watched {
            let Some(place) = standing.apps.get(app) else { continue };
            for (source, flow) in
                place.addresses.iter().flat_map(|at| flows.iter().map(move |f| (at.to_bits(), f)))
            {
                let Target::Service { network: to } = flow.target else { continue };
                let (protocol, port) = (flow.protocol, flow.port);
                if !reaches(&wide, (source, protocol, port), to) {
                    let (first, last) = (to.first(), to.last());
                    let rule = Rule { network: place.network, source, first, last, protocol, port };
                    self.breach(packet(&rule, first), format!("{} must be counted and is not", flow.name));
                }
            }
        }
    }
}
