//! The firewall as the root half keeps it: what stands behind it, what follows from that, the proof, and
//! what packets were refused.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::Ipv4Addr;
use std::sync::Arc;

use time::OffsetDateTime;

use super::app::App;
use super::core::{Agent, lock};
use super::flows;
use crate::driver::podman::firewall::kernel::{self, Refusal};
use crate::driver::podman::firewall::{Rules, compile};
use crate::driver::podman::ports;
use crate::driver::{Denied, Error, Used};
use crate::ids::{AppId, TenantName};
use crate::policy::never::{self, BUILT_IN, Range};
use crate::policy::proof::{self, Place, Proven, Standing, Walls};
use crate::policy::read::{Shell, Table};
use crate::policy::{Cidr, Target, TenantFlows};

/// How long after the platform has tried something itself a refusal of it is still its own.
const OWN_TRY: std::time::Duration = std::time::Duration::from_secs(3);
/// Most refusals that are remembered of a tenant.
const REMEMBERED: usize = 500;

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

    /// The addresses that the machine has.
    pub(super) fn own_list(&self) -> Vec<Ipv4Addr> {
        lock(&self.own).iter().filter_map(|range| range.network.single()).collect()
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
        let gone = firewall.as_ref().map_or_else(Vec::new, |before| rules.withdrawn(&before.rules));
        *firewall = Some(InForce { rules, table, moment, shape });
        drop(firewall);
        // Their packets are dropped already; what is tracked of them is tidied up beside.
        if !gone.is_empty() {
            lock(&self.gone).extend(gone.into_iter().take(CUTS));
            self.cut.notify_one();
        }
        Ok(())
    }

    /// Ends the tracked connections of rules that are gone and have not come back.
    pub(super) async fn cut_gone(&self) {
        loop {
            let next = lock(&self.gone).pop_first();
            let Some(gone) = next else { return };
            let back = self.firewall.lock().await.as_ref().is_some_and(|applied| applied.rules.allows(&gone));
            if !back {
                kernel::cut(&gone).await;
            }
        }
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

    /// Takes note of the machine's own addresses. If they cannot be read, those that are known stay.
    pub(super) async fn note_own_addresses(&self) {
        let pool = self.config.pool();
        match ports::own_addresses(|address| pool.contains(*address)).await {
            Ok(own) => *lock(&self.own) = own,
            Err(error) => tracing::warn!(%error, "the machine's own addresses are not known anew"),
        }
    }

    /// Reads from the kernel what was refused, and remembers it by tenant.
    pub(super) async fn note_denials(&self) {
        let seen = kernel::denied(&self.config.table()).await;
        if seen.is_empty() {
            return;
        }
        let tenants = lock(&self.journal).bridges(&self.config);
        let standing = self.standing(&lock(&self.own).clone());
        let tried = lock(&self.tried).clone();
        let owners = owners(&standing);
        let now = OffsetDateTime::now_utc();
        let mut denials = lock(&self.denials);
        for Refusal { bridge, source, target, protocol, port, ago, let_through } in seen {
            let Some((tenant, network)) = tenants.get(&bridge) else { continue };
            // What the platform tried by itself is not the app's doing, and not for the tenant to learn from.
            let last = std::time::Instant::now().checked_sub(std::time::Duration::from_secs(ago));
            let ours = tried
                .get(&(source, target, port))
                .is_some_and(|at| last.is_none_or(|last| last <= *at + OWN_TRY));
            if ours {
                continue;
            }
            // An address that is no instance's is told to nobody but the record: whoever forged it is unknown.
            let app = owners.get(&(*network, source)).copied().unwrap_or(AppId(0));
            let at = now - time::Duration::seconds(i64::try_from(ago).unwrap_or(0));
            let list = denials.entry(tenant.clone()).or_default();
            let same = |(own, known): &(AppId, Denied)| {
                (*own, known.source, known.target, known.protocol, known.port, known.let_through)
                    == (app, source, target, protocol, port, let_through)
            };
            let first = match list.iter().position(same) {
                Some(at) => list.remove(at).map_or(now, |(_, known)| known.first),
                None => at,
            };
            list.push_back((app, Denied { source, target, protocol, port, let_through, first, last: at }));
            while list.len() > REMEMBERED {
                list.pop_front();
            }
        }
    }

    /// What was counted of the flows that are about to close.
    pub(super) async fn used(&self) -> Vec<Used> {
        if lock(&self.flows).all().all(|plan| plan.watched.is_empty()) {
            return Vec::new();
        }
        let tenants = lock(&self.journal).bridges(&self.config);
        let standing = self.standing(&lock(&self.own).clone());
        let owners = owners(&standing);
        let mut used: HashMap<_, u64> = HashMap::new();
        for (bridge, source, network, protocol, port, packets) in kernel::counted(&self.config.table()).await
        {
            let Some((tenant, number)) = tenants.get(&bridge) else { continue };
            let Some(app) = owners.get(&(*number, source)) else { continue };
            *used.entry((tenant.clone(), *app, network, protocol, port)).or_default() += packets;
        }
        let told = |((tenant, app, network, protocol, port), packets)| Used {
            tenant,
            app,
            network,
            protocol,
            port,
            packets,
        };
        used.into_iter().map(told).collect()
    }

    /// What was refused of one app lately, the newest first.
    pub(super) fn denied(&self, tenant: &TenantName, app: AppId) -> Vec<Denied> {
        let denials = lock(&self.denials);
        let list = denials.get(tenant).into_iter().flatten().rev();
        list.filter(|(own, _)| *own == app).map(|(_, denied)| denied.clone()).collect()
    }
}

/// Whose an address of a network is.
fn owners(standing: &Standing) -> HashMap<(u32, Ipv4Addr), AppId> {
    let of = |(app, place): (&AppId, &Place)| {
        let (app, network) = (*app, place.network);
        place.addresses.iter().map(move |address| ((network, *address), app)).collect::<Vec<_>>()
    };
    standing.apps.iter().flat_map(of).collect()
}

#[cfg(test)]
mod tests;
