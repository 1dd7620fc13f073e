//! The firewall as the root half keeps it: what stands behind it, what follows from that, the proof, and
//! what packets were refused.

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::sync::Arc;

use time::OffsetDateTime;

use super::app::App;
use super::core::{Agent, lock};
use super::flows;
use crate::driver::podman::firewall::kernel::{self, Refusal};
use crate::driver::podman::firewall::{Rules, compile};
use crate::driver::podman::ports;
use crate::driver::{Denied, Error};
use crate::ids::{AppId, TenantName};
use crate::policy::never::{self, BUILT_IN, Range};
use crate::policy::proof::{self, Place, Proven, Standing, Walls};
use crate::policy::read::{Shell, Table};
use crate::policy::{Cidr, Flow, Target, TenantFlows};

/// Most refusals that are remembered of a tenant.
const REMEMBERED: usize = 500;

/// What is in force.
pub(super) struct InForce {
    rules: Rules,
    table: Table,
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

    /// What nobody reaches: what is built in, and the machine's own addresses.
    fn never(&self) -> Vec<Range> {
        BUILT_IN.iter().copied().chain(lock(&self.own).iter().copied()).collect()
    }

    /// What stands behind the table: who is where, and which flows are meant for them.
    fn standing(&self) -> Standing {
        let mut standing = Standing::default();
        let apps: Vec<Arc<App>> = lock(&self.apps).values().cloned().collect();
        let mut tenants = HashMap::new();
        for app in apps {
            let recorded =
                lock(&self.journal).ever(&app.tenant).map(|own| (own.network, own.subnet.gateway()));
            let Some((network, gateway)) = recorded else { continue };
            let addresses = lock(&app.kept).in_use();
            tenants.insert(app.id, app.tenant.clone());
            let tenant = app.tenant.clone();
            standing.apps.insert(app.id, Place { tenant, network, gateway, addresses });
        }
        let (pool, own) = (self.config.pool(), lock(&self.own).clone());
        let flows = lock(&self.flows);
        for plan in flows.all() {
            for app in plan.apps.iter().filter(|app| tenants.get(&app.app) == Some(&plan.tenant)) {
                let meant = |flow: &&Flow| match &flow.target {
                    // Of no avail until the other app is here, and never for another of its name.
                    Target::App { tenant, app } => tenants.get(app) == Some(tenant),
                    _ => flows::obstacle(flow, pool, &own).is_none(),
                };
                standing.flows.insert(app.app, app.flows.iter().filter(meant).cloned().collect());
            }
        }
        drop(flows);
        // A machine's own address may have been found for a name before it was the machine's own.
        let outside = |address: &Ipv4Addr| never::against_outside(Cidr::of(*address), &own).is_none();
        standing.resolved = self
            .resolved()
            .into_iter()
            .map(|(name, addresses)| {
                (name, addresses.into_iter().filter(|(address, _)| outside(address)).collect())
            })
            .collect();
        standing
    }

    fn walls(&self) -> Walls {
        let subnets = lock(&self.journal).subnets();
        let of = |subnet: crate::driver::workload::Subnet| Cidr::new(subnet.address(), subnet.prefix());
        let subnets =
            subnets.into_iter().filter_map(|(number, subnet)| Some((number, of(subnet)?))).collect();
        Walls::new(self.shell(), self.never(), subnets)
    }

    /// Takes over a tenant's flows and puts them in force.
    pub(super) async fn ensure_flows(&self, flows: TenantFlows) -> Result<(), Error> {
        if lock(&self.journal).tenant(&flows.tenant).is_none() {
            return Err(Error::Rejected("this tenant is not in the journal".into()));
        }
        let own = lock(&self.own).clone();
        flows::check(&flows, self.config.pool(), &own).map_err(Error::Rejected)?;
        lock(&self.flows).take(flows)?;
        self.refresh_firewall().await
    }

    /// Puts in force what follows from everything on record; connections that are no longer allowed are
    /// cut. Nothing goes to the kernel unproven.
    pub(super) async fn refresh_firewall(&self) -> Result<(), Error> {
        let mut firewall = self.firewall.lock().await;
        let standing = self.standing();
        let rules = compile(self.shell(), &self.never(), &standing);
        if firewall.as_ref().is_some_and(|applied| applied.rules == rules) {
            return Ok(());
        }
        let walls = self.walls();
        let change =
            firewall.as_ref().and_then(|applied| Some((rules.change(&applied.rules)?, &applied.table)));
        let by_change = match change {
            Some((text, before)) => {
                let proven = self.proven(proof::prove_change(text, before, &walls, &standing))?;
                // A change that the kernel does not take, because somebody has been at its sets, is made whole.
                kernel::apply(&proven).await.ok().map(|()| proven.into_table())
            }
            None => None,
        };
        let (table, shape) = match (by_change, firewall.as_ref()) {
            (Some(table), Some(applied)) => (table, applied.shape.clone()),
            _ => self.replace(&rules, &walls, &standing).await?,
        };
        let before = firewall.replace(InForce { rules: rules.clone(), table, shape });
        drop(firewall);
        // Their packets are dropped already; what is tracked of them is tidied up beside.
        if let Some(before) = before {
            tokio::spawn(async move {
                for gone in rules.withdrawn(&before.rules) {
                    kernel::cut(&gone).await;
                }
            });
        }
        Ok(())
    }

    fn proven(&self, outcome: Result<Proven, proof::Refused>) -> Result<Proven, Error> {
        outcome.map_err(|refused| {
            self.machine_event("plan_refused", format!("the firewall's next table is not proven: {refused}"));
            Error::Transient("the firewall's next table is not proven; what is in force stays".into())
        })
    }

    async fn replace(
        &self,
        rules: &Rules,
        walls: &Walls,
        standing: &Standing,
    ) -> Result<(Table, String), Error> {
        let proven = self.proven(proof::prove(rules.text(), walls, standing))?;
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
        let (rules, walls, standing) = (applied.rules.clone(), self.walls(), self.standing());
        // What is on record may have moved on since: then the next refresh has the rest.
        let now = compile(self.shell(), &self.never(), &standing);
        match self.replace(&now, &walls, &standing).await {
            Ok((table, shape)) => {
                drop(rules);
                *firewall = Some(InForce { rules: now, table, shape });
                self.machine_event(
                    "firewall_repaired",
                    format!("the nftables table {what} and was loaded again"),
                );
            }
            Err(error) => tracing::error!(%error, "the nftables table cannot be loaded"),
        }
    }

    /// Takes note of the machine's own addresses; whether they have changed.
    pub(super) async fn note_own_addresses(&self) -> bool {
        let pool = self.config.pool();
        let own = ports::own_addresses(|address| pool.contains(*address)).await;
        let mut known = lock(&self.own);
        let changed = *known != own;
        *known = own;
        changed
    }

    /// Reads from the kernel what was refused, and remembers it by tenant.
    pub(super) async fn note_denials(&self) {
        let seen = kernel::denied(&self.config.table()).await;
        if seen.is_empty() {
            return;
        }
        let tenants = lock(&self.journal).bridges(&self.config);
        let standing = self.standing();
        let owners: HashMap<(u32, Ipv4Addr), AppId> = standing
            .apps
            .iter()
            .flat_map(|(app, place)| {
                place.addresses.iter().map(move |address| ((place.network, *address), *app))
            })
            .collect();
        let now = OffsetDateTime::now_utc();
        let mut denials = lock(&self.denials);
        for Refusal { bridge, source, target, protocol, port, ago } in seen {
            let Some((tenant, network)) = tenants.get(&bridge) else { continue };
            // An address that is no instance's is told to nobody but the record: whoever forged it is unknown.
            let app = owners.get(&(*network, source)).copied().unwrap_or(AppId(0));
            let at = now - time::Duration::seconds(i64::try_from(ago).unwrap_or(0));
            let list = denials.entry(tenant.clone()).or_default();
            let same = |(own, known): &(AppId, Denied)| {
                (*own, known.source, known.target, known.protocol, known.port)
                    == (app, source, target, protocol, port)
            };
            let first = match list.iter().position(same) {
                Some(at) => list.remove(at).map_or(now, |(_, known)| known.first),
                None => at,
            };
            list.push_back((app, Denied { source, target, protocol, port, first, last: at }));
            while list.len() > REMEMBERED {
                list.pop_front();
            }
        }
    }

    /// What was refused of one app lately, the newest first.
    pub(super) fn denied(&self, tenant: &TenantName, app: AppId) -> Vec<Denied> {
        let denials = lock(&self.denials);
        let list = denials.get(tenant).into_iter().flatten().rev();
        list.filter(|(own, _)| *own == app).map(|(_, denied)| denied.clone()).collect()
    }
}

#[cfg(test)]
mod tests;
