//! Compiles, verifies and applies the firewall table. `seen.rs` reads denied and counted packets from the kernel;
//! `bridges.rs` maintains the bridges.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::Ipv4Addr;
use std::sync::Arc;

use time::OffsetDateTime;

use super::app::AgentApp;
use super::core::{Agent, lock};
use super::flows;
use crate::driver::podman::firewall::kernel;
use crate::driver::podman::firewall::{Allowed, Rules, compile};
use crate::driver::podman::ports;
use crate::driver::{Denied, Error};
use crate::ids::{AppId, TenantName};
use crate::policy::never::{self, BUILT_IN, Range};
use crate::policy::proof::{self, AppAddress, ExpectedFacts, MachineFacts, Proven};
use crate::policy::read::{Shell, Table};
use crate::policy::{Cidr, Target, TenantFlows};

mod bridges;
mod seen;

pub(super) use bridges::minding;
pub(super) use seen::Counts;

/// Maximum number of set elements derived from one tenant's flows.
const ELEMENTS: usize = 20_000;
/// Maximum number of connections of one change that are closed one by one. The packets of all are dropped in any
/// case.
const CUTS: usize = 1_000;
/// Error of a request with flows of an unknown tenant: the tenant must be created first.
pub(crate) const UNKNOWN_TENANT: &str = "this tenant is not in the journal";

/// A snapshot of everything from which a table is compiled.
#[derive(Clone)]
struct Moment {
    walls: MachineFacts,
    never: Vec<Range>,
    standing: ExpectedFacts,
}

/// The applied table and the state it was compiled from.
pub(super) struct InForce {
    rules: Rules,
    table: Table,
    moment: Moment,
    /// The table's shape as the kernel prints it.
    shape: String,
}

/// Something that is no longer allowed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Gone {
    /// A rule.
    Rule(Allowed),
    /// The outside traffic of a network in audit mode.
    Trial(u32),
}

/// Denied connections by tenant, the newest last.
pub(super) type DeniedConnections = HashMap<TenantName, VecDeque<(AppId, Denied)>>;

/// How much of the table is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    /// The chains and the heads of the sets.
    Shape,
    /// The elements of the sets too.
    Whole,
}

impl Agent {
    fn shell(&self) -> Shell {
        Shell {
            table: self.config.table(),
            prefix: self.config.bridge_prefix(),
            prober: self.config.prober_uid,
            pool: self.config.pool(),
            pace: self.config.new_connections_per_second,
        }
    }

    /// Takes a snapshot of everything from which the table is compiled.
    fn moment(&self) -> Moment {
        let own = lock(&self.own).clone();
        let never: Vec<Range> = BUILT_IN.iter().copied().chain(own.iter().copied()).collect();
        let subnets = lock(&self.journal).subnets();
        let of = |subnet: crate::driver::workload::Subnet| Cidr::new(subnet.address(), subnet.prefix());
        let subnets =
            subnets.into_iter().filter_map(|(number, subnet)| Some((number, of(subnet)?))).collect();
        let standing = self.standing(&own);
        Moment { walls: MachineFacts::new(self.shell(), never.clone(), subnets), never, standing }
    }

    /// Collects the inputs of the table: the address of each instance, and the flows of each app.
    fn standing(&self, own: &[Range]) -> ExpectedFacts {
        let mut standing = ExpectedFacts::default();
        let mut apps: Vec<Arc<AgentApp>> = lock(&self.apps).values().cloned().collect();
        // Sorted by age: if two apps claim one address, the older app keeps it.
        apps.sort_by_key(|app| app.id);
        let mut tenants = HashMap::new();
        let mut taken = HashSet::new();
        for app in apps {
            let recorded =
                lock(&self.journal).ever(&app.tenant).map(|own| (own.network, own.subnet.gateway()));
            let Some((network, gateway)) = recorded else { continue };
            let mut addresses = lock(&app.kept).in_use();
            let all = addresses.len();
            addresses.retain(|address| taken.insert(*address));
            if addresses.len() < all {
                tracing::error!(tenant = %app.tenant, app = %app.name, "an address belongs to another app; it stays closed");
            }
            tenants.insert(app.id, app.tenant.clone());
            let tenant = app.tenant.clone();
            standing.apps.insert(app.id, AppAddress { tenant, network, gateway, addresses });
        }
        let pool = self.config.pool();
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let flows = lock(&self.flows);
        for plan in flows.all() {
            if plan.trial_until.is_some_and(|until| until > now) {
                let network = lock(&self.journal).tenant(&plan.tenant).map(|recorded| recorded.network);
                standing.trial.extend(network);
            }
            let mut room = ELEMENTS;
            for app in plan.apps.iter().filter(|app| tenants.get(&app.app) == Some(&plan.tenant)) {
                let sources = standing.apps.get(&app.app).map_or(0, |place| place.addresses.len());
                let mut meant = Vec::new();
                for flow in app.flows.iter().filter(|flow| flow.until.is_none_or(|until| until > now)) {
                    let targets = match &flow.target {
                        // Ignored until the target app exists, and never applied to another app of the same name.
                        Target::App { tenant, app } if tenants.get(app) == Some(tenant) => {
                            standing.apps.get(app).map_or(0, |place| place.addresses.len())
                        }
                        Target::App { .. } => continue,
                        _ if flows::obstacle(flow, pool, own).is_some() => continue,
                        _ => 1,
                    };
                    // The flows of one tenant must not burden all others: flows beyond the limit stay closed.
                    let Some(left) = room.checked_sub(sources * targets) else { continue };
                    room = left;
                    meant.push(flow.clone());
                }
                let counted = plan.watched.iter().find(|own| own.app == app.app);
                let counted = counted.into_iter().flat_map(|own| &own.flows);
                let counted: Vec<_> = counted.filter(|flow| meant.contains(flow)).cloned().collect();
                if !counted.is_empty() {
                    standing.watched.insert(app.app, counted);
                }
                standing.flows.insert(app.app, meant);
            }
        }
        drop(flows);
        // An address may have been resolved for a name before it became the machine's own address.
        let outside = |address: &Ipv4Addr| never::against_outside(Cidr::of(*address), own).is_none();
        standing.resolved = self
            .resolved()
            .into_iter()
            .map(|(name, addresses)| {
                (name, addresses.into_iter().filter(|(address, _)| outside(address)).collect())
            })
            .collect();
        standing
    }

    /// Returns the machine's own addresses and the blocked ranges, which no tenant reaches beside the reserved
    /// ranges.
    pub(super) fn walls(&self) -> crate::driver::BlockedRanges {
        let own = lock(&self.own);
        let own = own.iter().filter(|range| range.is_own()).filter_map(|range| range.network.single());
        crate::driver::BlockedRanges { own: own.collect(), closed: self.config.closed.clone() }
    }

    /// Stores a tenant's flows and applies them. Returns the number of the applied plan.
    pub(super) async fn ensure_flows(&self, flows: TenantFlows) -> Result<i64, Error> {
        if lock(&self.journal).tenant(&flows.tenant).is_none() {
            return Err(Error::Rejected(UNKNOWN_TENANT.into()));
        }
        flows::check(&flows).map_err(Error::Rejected)?;
        let own = lock(&self.own).clone();
        let mut all = flows.apps.iter().flat_map(|app| &app.flows);
        let told = all.find_map(|flow| flows::obstacle(flow, self.config.pool(), &own));
        let tenant = flows.tenant.clone();
        let (wanted, number) = (flows.plan, lock(&self.flows).take(flows)?);
        if let Some(told) = told.filter(|_| wanted == number) {
            self.machine_event(
                "flow_left_out",
                format!("a flow of {tenant} cannot be applied and stays closed: {told}"),
            );
        }
        self.refresh_firewall().await?;
        Ok(number)
    }

    /// Applies the table compiled from the recorded state, and closes connections that are no longer allowed. Only
    /// verified tables go to the kernel.
    pub(super) async fn refresh_firewall(&self) -> Result<(), Error> {
        let mut firewall = self.firewall.lock().await;
        let moment = self.moment();
        // With many tenants this takes milliseconds: other tasks must not wait for it on this thread.
        let rules = tokio::task::block_in_place(|| compile(self.shell(), &moment.never, &moment.standing));
        if firewall.as_ref().is_some_and(|applied| applied.rules == rules) {
            return Ok(());
        }
        let change =
            firewall.as_ref().and_then(|applied| Some((rules.change(&applied.rules)?, &applied.table)));
        // Reads the counters that this change removes, or all counters if the whole table is replaced.
        let losing = |applied: &InForce| {
            applied.rules.is_counting() && (change.is_none() || rules.stops_counting(&applied.rules))
        };
        if let Some(applied) = firewall.as_ref().filter(|applied| losing(applied)) {
            self.note_counts(&applied.moment.standing).await;
        }
        let by_change = match change {
            Some((text, before)) => {
                let proven = tokio::task::block_in_place(|| {
                    proof::prove_change(text, before, &moment.walls, &moment.standing)
                });
                let proven = self.proven(proven)?;
                // If the kernel rejects the change because its sets were modified from outside, the whole table is
                // replaced.
                kernel::apply(&proven).await.ok().map(|()| proven.into_table())
            }
            None => None,
        };
        let (table, shape) = match (by_change, firewall.as_ref()) {
            (Some(table), Some(applied)) => {
                fail::fail_point!("agent::firewall_changed", |_| Err(Error::Transient("failpoint".into())));
                (table, applied.shape.clone())
            }
            _ => self.replace(&rules, &moment).await?,
        };
        let mut gone = Vec::new();
        if let Some(before) = firewall.as_ref() {
            gone.extend(rules.untried(&before.rules).map(Gone::Trial));
            gone.extend(rules.withdrawn(&before.rules).into_iter().map(Gone::Rule));
        }
        *firewall = Some(InForce { rules, table, moment, shape });
        drop(firewall);
        // Their packets are already dropped; the tracked connections are closed in another task.
        if !gone.is_empty() {
            lock(&self.gone).extend(gone.into_iter().take(CUTS));
            self.cut.notify_one();
        }
        Ok(())
    }

    /// Closes the tracked connections of removed rules that have not come back. It closes them one by one, so that
    /// connections allowed for another reason continue.
    pub(super) async fn cut_gone(&self) {
        loop {
            let next = lock(&self.gone).pop_first();
            let Some(gone) = next else { return };
            let gone = match gone {
                Gone::Rule(gone) if gone.target.single().is_some() => vec![gone],
                Gone::Rule(gone) => {
                    let same = |to: &Allowed| {
                        gone.target.holds(to.target) && (to.protocol, to.port) == (gone.protocol, gone.port)
                    };
                    let all = tracked(gone.network, Cidr::of(gone.source)).await;
                    all.into_iter().filter(same).collect()
                }
                Gone::Trial(network) => {
                    let home = lock(&self.journal).subnets().into_iter().find(|(own, _)| *own == network);
                    let home = home.and_then(|(_, home)| Cidr::new(home.address(), home.prefix()));
                    match home {
                        Some(home) => tracked(network, home).await,
                        None => Vec::new(),
                    }
                }
            };
            for gone in gone.into_iter().take(CUTS) {
                if !self.permits(&gone).await {
                    kernel::cut(&gone).await;
                }
            }
        }
    }

    /// Returns whether the applied rules allow a connection.
    pub(super) async fn permits(&self, to: &Allowed) -> bool {
        self.firewall.lock().await.as_ref().is_some_and(|applied| applied.rules.permits(to))
    }

    fn proven(&self, outcome: Result<Proven, proof::VerificationError>) -> Result<Proven, Error> {
        outcome.map_err(|refused| {
            self.machine_event(
                "plan_refused",
                format!("verification of the next firewall table failed: {refused}"),
            );
            Error::Transient("verification of the next firewall table failed; the applied table stays".into())
        })
    }

    async fn replace(&self, rules: &Rules, moment: &Moment) -> Result<(Table, String), Error> {
        let proven =
            tokio::task::block_in_place(|| proof::prove(rules.text(), &moment.walls, &moment.standing));
        let proven = self.proven(proven)?;
        kernel::apply(&proven).await?;
        let shape = kernel::shape(&rules.shell.table).await.unwrap_or_default();
        Ok((proven.into_table(), shape))
    }

    /// Returns whether the table exists. No instance starts without it.
    pub(super) async fn table_is_there(&self) -> bool {
        let firewall = self.firewall.lock().await;
        firewall.is_some() && kernel::shape(&self.config.table()).await.is_some()
    }

    /// Compares the table with the expected one, and loads it again if it was changed from outside.
    pub(super) async fn repair_firewall(&self, depth: Depth) {
        let mut firewall = self.firewall.lock().await;
        let Some(applied) = firewall.as_ref() else { return };
        let seen = kernel::shape(&applied.rules.shell.table).await;
        let same = seen.as_deref() == Some(applied.shape.as_str());
        if same && (depth == Depth::Shape || kernel::holds(&applied.rules).await) {
            return;
        }
        let what = if seen.is_none() { "was deleted" } else { "was changed" };
        // The recorded state may have changed since. If its table cannot be verified, the last verified table is
        // loaded: without a table everything would be open.
        let moment = self.moment();
        let now = tokio::task::block_in_place(|| compile(self.shell(), &moment.never, &moment.standing));
        let loaded = match self.replace(&now, &moment).await {
            Ok(loaded) => Ok((now, moment, loaded)),
            Err(error) => {
                tracing::error!(%error, "the current table cannot be loaded; the last verified one is loaded");
                let (rules, moment) = (applied.rules.clone(), applied.moment.clone());
                self.replace(&rules, &moment).await.map(|loaded| (rules, moment, loaded))
            }
        };
        match loaded {
            Ok((rules, moment, (table, shape))) => {
                *firewall = Some(InForce { rules, table, moment, shape });
                self.machine_event(
                    "firewall_repaired",
                    format!("the nftables table {what} from outside and was loaded again"),
                );
            }
            Err(error) => tracing::error!(%error, "the nftables table cannot be loaded"),
        }
    }

    /// Reads the machine's own addresses and adds the blocked ranges of the configuration. If they cannot be read,
    /// the known addresses stay.
    pub(super) async fn note_own_addresses(&self) {
        let pool = self.config.pool();
        match ports::own_addresses(|address| pool.contains(*address)).await {
            Ok(mut own) => {
                own.extend(self.config.closed.iter().map(|network| never::configured(*network)));
                *lock(&self.own) = own;
            }
            Err(error) => {
                tracing::warn!(%error, "the machine's own addresses cannot be read; the known ones stay");
            }
        }
    }
}

/// Returns the tracked connections that started from these addresses of a network.
async fn tracked(network: u32, from: Cidr) -> Vec<Allowed> {
    let one = |(protocol, source, target, port)| Allowed {
        network,
        source,
        target: Cidr::of(target),
        protocol,
        port,
    };
    kernel::tracked(from).await.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests;
