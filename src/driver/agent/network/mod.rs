//! The firewall as the root half keeps it: what stands behind it, what follows from that, the proof. `seen.rs`
//! reads from the kernel what was refused and counted, `bridges.rs` keeps what it stands on.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::Ipv4Addr;
use std::sync::Arc;

use time::OffsetDateTime;

use super::app::App;
use super::core::{Agent, lock};
use super::flows;
use crate::driver::podman::firewall::kernel;
use crate::driver::podman::firewall::{Allowed, Rules, compile};
use crate::driver::podman::ports;
use crate::driver::{Denied, Error};
use crate::ids::{AppId, TenantName};
use crate::policy::never::{self, BUILT_IN, Range};
use crate::policy::proof::{self, Place, Proven, Standing, Walls};
use crate::policy::read::{Shell, Table};
use crate::policy::{Cidr, Target, TenantFlows};

mod bridges;
mod seen;

pub(super) use bridges::minding;
pub(super) use seen::Counts;

/// Most elements that follow from one tenant's flows.
const ELEMENTS: usize = 20_000;
/// Most connections of one change that are ended one by one; the packets of all are dropped in any case.
const CUTS: usize = 1_000;
/// Why flows are not taken: their tenant has to be told first.
pub(crate) const UNKNOWN_TENANT: &str = "this tenant is not in the journal";

/// Everything that a table follows from, as it was at one moment.
#[derive(Clone)]
struct Moment {
    walls: Walls,
    never: Vec<Range>,
    standing: Standing,
}

/// What is in force.
pub(super) struct InForce {
    rules: Rules,
    table: Table,
    moment: Moment,
    /// The table's shape as the kernel prints it.
    shape: String,
}

/// What is not allowed any more.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Gone {
    /// This rule.
    Rule(Allowed),
    /// Whatever a network sent outside while it was on trial.
    Trial(u32),
}

/// What was refused, by tenant, the newest last.
pub(super) type Denials = HashMap<TenantName, VecDeque<(AppId, Denied)>>;

/// How much of the table is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    /// The chains and the heads of the sets.
    Shape,
    /// The sets' elements too.
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

    /// Everything that the table follows from, as it is at one moment.
    fn moment(&self) -> Moment {
        let own = lock(&self.own).clone();
        let never: Vec<Range> = BUILT_IN.iter().copied().chain(own.iter().copied()).collect();
        let subnets = lock(&self.journal).subnets();
        let of = |subnet: crate::driver::workload::Subnet| Cidr::new(subnet.address(), subnet.prefix());
        let subnets =
            subnets.into_iter().filter_map(|(number, subnet)| Some((number, of(subnet)?))).collect();
        let standing = self.standing(&own);
        Moment { walls: Walls::new(self.shell(), never.clone(), subnets), never, standing }
    }

    /// What stands behind the table: who is where, and which flows are meant for them.
    fn standing(&self, own: &[Range]) -> Standing {
        let mut standing = Standing::default();
        let mut apps: Vec<Arc<App>> = lock(&self.apps).values().cloned().collect();
        // The elder first: it keeps an address that two of them claim.
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
                tracing::error!(tenant = %app.tenant, app = %app.name, "an address is another app's: it stays closed");
            }
            tenants.insert(app.id, app.tenant.clone());
            let tenant = app.tenant.clone();
            standing.apps.insert(app.id, Place { tenant, network, gateway, addresses });
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
                        // Of no avail until the other app is here, and never for another of its name.
                        Target::App { tenant, app } if tenants.get(app) == Some(tenant) => {
                            standing.apps.get(app).map_or(0, |place| place.addresses.len())
                        }
                        Target::App { .. } => continue,
                        _ if flows::obstacle(flow, pool, own).is_some() => continue,
                        _ => 1,
                    };
                    // One tenant's rules do not become everybody's burden: what goes beyond stays closed.
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
        // A machine's own address may have been found for a name before it was the machine's own.
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

    /// What nobody reaches beside the built-in ranges.
    pub(super) fn walls(&self) -> crate::driver::Walls {
        let own = lock(&self.own);
        let own = own.iter().filter(|range| range.is_own()).filter_map(|range| range.network.single());
        crate::driver::Walls { own: own.collect(), closed: self.config.closed.clone() }
    }

    /// Takes over a tenant's flows and puts them in force. Returns the number of the plan that is held then.
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
            self.machine_event("flow_left_out", format!("a flow of {tenant} stays closed: {told}"));
        }
        self.refresh_firewall().await?;
        Ok(number)
    }

    /// Puts in force what follows from everything on record; connections that are no longer allowed are
    /// cut. Nothing goes to the kernel unproven.
    pub(super) async fn refresh_firewall(&self) -> Result<(), Error> {
        let mut firewall = self.firewall.lock().await;
        let moment = self.moment();
        // With many tenants this is work for milliseconds: others do not wait for it on this thread.
        let rules = tokio::task::block_in_place(|| compile(self.shell(), &moment.never, &moment.standing));
        if firewall.as_ref().is_some_and(|applied| applied.rules == rules) {
            return Ok(());
        }
        let change =
            firewall.as_ref().and_then(|applied| Some((rules.change(&applied.rules)?, &applied.table)));
        // What counters say that go with it, or with the whole table.
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
                // A change that the kernel does not take, because somebody has been at its sets, is made whole.
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
        // Their packets are dropped already; what is tracked of them is tidied up beside.
        if !gone.is_empty() {
            lock(&self.gone).extend(gone.into_iter().take(CUTS));
            self.cut.notify_one();
        }
        Ok(())
    }

    /// Ends the tracked connections of what is gone and has not come back: one by one, so that what is allowed for
    /// another reason goes on.
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

    /// Whether the rules that are in force let a connection through.
    pub(super) async fn permits(&self, to: &Allowed) -> bool {
        self.firewall.lock().await.as_ref().is_some_and(|applied| applied.rules.permits(to))
    }

    fn proven(&self, outcome: Result<Proven, proof::Refused>) -> Result<Proven, Error> {
        outcome.map_err(|refused| {
            self.machine_event("plan_refused", format!("the firewall's next table is not proven: {refused}"));
            Error::Transient("the firewall's next table is not proven; what is in force stays".into())
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

    /// Whether the table is there: without it nothing starts.
    pub(super) async fn table_is_there(&self) -> bool {
        let firewall = self.firewall.lock().await;
        firewall.is_some() && kernel::shape(&self.config.table()).await.is_some()
    }

    /// Holds the table against what it must be, and loads it again if somebody has been at it.
    pub(super) async fn repair_firewall(&self, depth: Depth) {
        let mut firewall = self.firewall.lock().await;
        let Some(applied) = firewall.as_ref() else { return };
        let seen = kernel::shape(&applied.rules.shell.table).await;
        let same = seen.as_deref() == Some(applied.shape.as_str());
        if same && (depth == Depth::Shape || kernel::holds(&applied.rules).await) {
            return;
        }
        let what = if seen.is_none() { "was gone" } else { "had been changed" };
        // What is on record may have moved on since; if that cannot be proven, what was proven last comes back: a
        // table that is away would be everything open.
        let moment = self.moment();
        let now = tokio::task::block_in_place(|| compile(self.shell(), &moment.never, &moment.standing));
        let loaded = match self.replace(&now, &moment).await {
            Ok(loaded) => Ok((now, moment, loaded)),
            Err(error) => {
                tracing::error!(%error, "the table of this moment is not loaded; the last one is");
                let (rules, moment) = (applied.rules.clone(), applied.moment.clone());
                self.replace(&rules, &moment).await.map(|loaded| (rules, moment, loaded))
            }
        };
        match loaded {
            Ok((rules, moment, (table, shape))) => {
                *firewall = Some(InForce { rules, table, moment, shape });
                self.machine_event(
                    "firewall_repaired",
                    format!("the nftables table {what} and was loaded again"),
                );
            }
            Err(error) => tracing::error!(%error, "the nftables table cannot be loaded"),
        }
    }

    /// Takes note of the machine's own addresses, and of what its configuration closes. If they cannot be read, those
    /// that are known stay.
    pub(super) async fn note_own_addresses(&self) {
        let pool = self.config.pool();
        match ports::own_addresses(|address| pool.contains(*address)).await {
            Ok(mut own) => {
                own.extend(self.config.closed.iter().map(|network| never::configured(*network)));
                *lock(&self.own) = own;
            }
            Err(error) => tracing::warn!(%error, "the machine's own addresses are not known anew"),
        }
    }
}

/// Connections that were begun from these addresses of a network.
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
