//! The proof: whether a table allows exactly what stands behind it. Written apart from what compiles the
//! table, and run on the very text that will be applied; the only way to a [`Proven`], without which
//! nothing is applied.
//!
//! Each element of each set is held against the regions that its target touches; every required flow is
//! then looked for among them. A fault comes with a packet that shows it.

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

/// Most breaches that are told; their number is told in any case.
const TOLD: usize = 20;

/// What whoever applies a table holds by itself and takes from nobody.
#[derive(Debug, Clone)]
pub struct Walls {
    /// The table's shape.
    pub shell: Shell,
    never: Vec<Range>,
    homes: FxHashMap<u32, Cidr>,
    space: Space,
}

impl Walls {
    /// From the shape, the closed and private ranges, and the subnet of each network.
    #[must_use]
    pub fn new(shell: Shell, never: Vec<Range>, subnets: Vec<(u32, Cidr)>) -> Self {
        let space = Space::cut(&never, shell.pool, &subnets);
        Self { shell, never, homes: subnets.into_iter().collect(), space }
    }
}

/// Where an app is, by the records of whoever applies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its tenant.
    pub tenant: TenantName,
    /// Number of the tenant's network.
    pub network: u32,
    /// Address of its bridge.
    pub gateway: Ipv4Addr,
    /// Addresses of its instances.
    pub addresses: Vec<Ipv4Addr>,
}

/// What stands behind a table: who is where, and who may begin to talk to whom.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// Apps.
    pub apps: FxHashMap<AppId, Place>,
    /// What each may begin to talk to.
    pub flows: FxHashMap<AppId, Vec<Flow>>,
    /// What was found for the domains that an app may talk to: each address until a second of the clock that
    /// never goes back.
    pub resolved: FxHashMap<(AppId, DomainName), BTreeMap<Ipv4Addr, u64>>,
    /// Networks whose packets outside are let through and written down.
    pub trial: BTreeSet<u32>,
    /// Of what each may begin to talk to, what is counted.
    pub watched: FxHashMap<AppId, Vec<Flow>>,
}

/// A fault of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Breach {
    /// A packet that it lets through, or does not let through.
    pub witness: Packet,
    /// What is wrong.
    pub why: String,
}

/// Why a text was not proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// It has another shape than the one that can be proven.
    Unreadable(Unreadable),
    /// The ranges that nobody reaches are not those of the wall.
    Never,
    /// It allows too much or too little: how often, and the first ones.
    Breached(usize, Vec<Breach>),
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreadable(error) => write!(f, "it cannot be read: {error}"),
            Self::Never => f.write_str("the ranges that nobody reaches are not those of the wall"),
            Self::Breached(count, told) => {
                write!(f, "{count} fault(s)")?;
                told.iter().take(3).try_for_each(|breach| write!(f, "; {}: {}", breach.witness, breach.why))
            }
        }
    }
}

/// A text that was proven, with what it makes of the table.
#[derive(Debug)]
pub struct Proven {
    text: String,
    table: Table,
}

impl Proven {
    /// What is applied.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }
    /// What the table is then.
    #[must_use]
    pub fn into_table(self) -> Table {
        self.table
    }
}

/// Proves a whole table.
pub fn prove(text: String, walls: &Walls, standing: &Standing) -> Result<Proven, Refused> {
    let table = read::table(&text, &walls.shell).map_err(Refused::Unreadable)?;
    judge(text, table, walls, standing)
}

/// Proves a change of a table that was proven: what it is afterwards is judged as a whole.
pub fn prove_change(
    text: String,
    before: &Table,
    walls: &Walls,
    standing: &Standing,
) -> Result<Proven, Refused> {
    let table = read::change(&text, before, &walls.shell).map_err(Refused::Unreadable)?;
    judge(text, table, walls, standing)
}

fn judge(text: String, table: Table, walls: &Walls, standing: &Standing) -> Result<Proven, Refused> {
    // The kernel's set takes no range within another: each of the wall's is there, or is within one that is.
    let known = |range: &(u32, u32)| {
        walls.never.iter().any(|wall| (wall.network.first(), wall.network.last()) == *range)
    };
    let held = |wall: &Range| {
        let (first, last) = (wall.network.first(), wall.network.last());
        table.never.iter().any(|range| range.0 <= first && last <= range.1)
    };
    if !table.never.iter().all(known) || !walls.never.iter().all(held) {
        return Err(Refused::Never);
    }
    let mut safety = Court::new(&table, walls, standing);
    let mut liveness = Court { told: Vec::new(), count: 0, owners: FxHashMap::default(), ..safety };
    // Two halves that know nothing of each other: nothing that is open must not be, nothing is closed that must be
    // open.
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
    Err(Refused::Breached(count, told))
}

struct Court<'a> {
    table: &'a Table,
    walls: &'a Walls,
    standing: &'a Standing,
    /// Whose an address is.
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

/// A packet from an address, where no target matters.
fn about(network: u32, source: u32) -> Packet {
    Packet {
        network,
        source: Ipv4Addr::from_bits(source),
        target: Ipv4Addr::UNSPECIFIED,
        protocol: Protocol::Tcp,
        port: 1,
    }
}

impl<'a> Court<'a> {
    fn new(table: &'a Table, walls: &'a Walls, standing: &'a Standing) -> Self {
        let mut court =
            Self { table, walls, standing, owners: FxHashMap::default(), count: 0, told: Vec::new() };
        for (app, place) in &standing.apps {
            for address in &place.addresses {
                if court.owners.insert(address.to_bits(), *app).is_some() {
                    let witness = about(place.network, address.to_bits());
                    court.breach(witness, "two apps have one address".to_owned());
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

    /// The app that sends from an address of a network, if it may be there at all.
    fn sender(&self, network: u32, source: u32) -> Option<AppId> {
        let app = *self.owners.get(&source)?;
        (self.standing.apps.get(&app)?.network == network).then_some(app)
    }

    /// Nothing is open that must not be.
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

    /// No address passes that is not an instance's, in its own tenant's subnet.
    fn sources(&mut self) {
        for (network, source) in &self.table.sources {
            let home = self.walls.homes.get(network);
            // Neither the network itself, nor its gateway, nor what all of it hears.
            let fits = home.is_some_and(|home| *source > home.first() + 1 && *source < home.last());
            if !fits || self.sender(*network, *source).is_none() {
                let witness = about(*network, *source);
                self.breach(witness, "the source is no instance of this network".to_owned());
            }
        }
    }

    fn flows(&self, app: AppId) -> &'a [Flow] {
        self.standing.flows.get(&app).map_or(&[], Vec::as_slice)
    }

    /// Whether one element is justified, over all that it allows.
    fn rule(&mut self, set: Set, rule: &Rule) {
        let sender = self.sender(rule.network, rule.source);
        let Some(sender) = sender.filter(|_| self.table.sources.contains(&(rule.network, rule.source)))
        else {
            self.breach(packet(rule, rule.first), "the source is no instance of this network".to_owned());
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
            (Set::Watched, _) => Err("what is counted is judged by itself".to_owned()),
            (_, Region::Never(what)) => Err(format!("the target is {what}: nothing opens it")),
            (_, Region::Unused) => {
                Err("the target is an address of the pool that belongs to no tenant".to_owned())
            }
            (Set::Outside | Set::Resolved, Region::Private(what)) => {
                Err(format!("the target is {what}: only a single address of a service opens it"))
            }
            (Set::Services | Set::Outside | Set::Resolved, Region::Tenant(_)) => {
                Err("the target is an instance, and the set is not the one for instances".to_owned())
            }
            (Set::Pairs, Region::Private(_) | Region::Outside) => Err("the target is no instance".to_owned()),
            (Set::Pairs, Region::Tenant(network)) => {
                let receiver =
                    self.owners.get(&at).and_then(|app| Some((*app, self.standing.apps.get(app)?)));
                let Some((app, place)) = receiver.filter(|(_, place)| place.network == network) else {
                    return Err("the target is no instance of this network".to_owned());
                };
                let meant = |flow: &&Flow| matches!(&flow.target, Target::App { tenant, app: own } if *own == app && *tenant == place.tenant);
                if self.flows(sender).iter().filter(same).any(|flow| meant(&flow)) {
                    Ok(())
                } else {
                    Err("the app does not name this app and port, or is not granted them".to_owned())
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
                    Err("the address was not found for a domain that the app names on this port".to_owned())
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
                    Err("the app does not name a target that holds all of this range".to_owned())
                }
            }
        }
    }

    /// Names are asked for at the own bridge alone.
    fn gateways(&mut self) {
        for (network, address) in &self.table.gateways {
            if self.walls.homes.get(network).is_none_or(|home| *address != home.first() + 1) {
                let witness = about(*network, *address);
                self.breach(witness, "this is not the address of the network's bridge".to_owned());
            }
        }
    }

    /// Only who is on trial is let out on trial; how far, the shape says: outside, and never behind a wall.
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
                "this network is let out on trial, or is not, otherwise than meant".to_owned(),
            );
        }
    }

    /// Only what is meant to be counted is. That it opens nothing, the shape says.
    fn counted(&mut self) {
        for rule in &self.table.watched {
            let meant =
                self.sender(rule.network, rule.source).and_then(|app| self.standing.watched.get(&app));
            let is = |flow: &Flow| {
                matches!(flow.target, Target::Service { network } if network.first() == rule.first && network.last() == rule.last)
                    && (flow.protocol, flow.port) == (rule.protocol, rule.port)
            };
            if !meant.is_some_and(|flows| flows.iter().any(is)) {
                self.breach(packet(rule, rule.first), "this is counted and not meant to be".to_owned());
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
                    self.breach(packet(&rule, first), format!("{} is to be counted and is not", flow.name));
                }
            }
        }
    }
}
