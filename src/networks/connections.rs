//! The network's answers to the apps module: whether an app may use the names under `connects`, and whether
//! its tenant's plan is applied. The first caller that needs a plan compiles, verifies and applies it here.

use std::collections::BTreeSet;
use std::sync::Arc;

use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;

use super::compile::{closing, compile};
use super::justify::justify;
use super::store::{self, NewPlan};
use super::{AppPlan, PlanFacts, actions, probe};
use crate::access::{By, TenantRef};
use crate::apps::connections::{Connections, list_connecting, list_missing};
use crate::apps::spec::Connects;
use crate::config::Pools;
use crate::db;
use crate::driver::Driver;
use crate::driver::agent::UNKNOWN_TENANT;
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::ids::{AppId, AppName, Digest, TenantId};
use crate::policy::never::Range;
use crate::policy::{AppFlows, Cidr, Flow, Target, TenantFlows};
use crate::reconcile::{Failure, enqueue};
use crate::tenants;

/// The implementation of [`Connections`].
#[derive(Clone)]
pub struct Network {
    /// Database.
    pub pool: PgPool,
    /// Address pools of the installation.
    pub pools: Pools,
    /// The driver that applies plans.
    pub driver: Arc<dyn Driver>,
}

/// Returns the pool of the tenants' subnets.
pub(super) fn pool(pools: &Pools) -> Cidr {
    Cidr::new(pools.network.address(), pools.network.prefix()).unwrap_or(Cidr::of(pools.network.address()))
}

fn closed(path: &str, message: String, instead: &str) -> Fault {
    Fault::new(Code(427), Kind::Conflict, path, message).instead(instead)
}

#[async_trait::async_trait]
impl Connections for Network {
    async fn absent(
        &self,
        conn: &mut PgConnection,
        tenant: &TenantRef,
        connects: &Connects,
    ) -> Result<Vec<Fault>, Error> {
        let mut faults = Vec::new();
        let own: Vec<AppName> =
            connects.apps.iter().filter(|app| app.tenant.is_none()).map(|app| app.app.clone()).collect();
        for name in list_missing(conn, tenant.id, &own).await? {
            let message = format!("there is no app {name}");
            faults.push(closed("connects.apps", message, "deploy that app first, or remove the name"));
        }
        let others: Vec<String> =
            connects.apps.iter().filter(|app| app.tenant.is_some()).map(ToString::to_string).collect();
        if !others.is_empty() {
            let accepted = store::list_accepted(conn, &others).await?;
            for name in others.iter().filter(|name| !accepted.contains(name)) {
                let message = format!("{name} is not granted to this tenant, or the grant was not accepted");
                let instead =
                    "an owner there offers it, an owner here accepts it under Network; or remove the name";
                faults.push(closed("connects.apps", message, instead));
            }
        }
        let services: Vec<String> = connects.services.iter().map(ToString::to_string).collect();
        if !services.is_empty() {
            let usable = store::list_named_services(conn, &services).await?;
            for name in services.iter().filter(|name| !usable.contains(name)) {
                let message = format!("this tenant may not use the service {name}");
                let instead = "ask the platform's admin for access, or remove the name";
                faults.push(closed("connects.services", message, instead));
            }
        }
        let egress: Vec<String> = connects.egress.iter().map(ToString::to_string).collect();
        for name in store::list_closed_targets(conn, tenant.id, &egress).await? {
            let message = format!("there is no approved egress target {name}");
            let instead = "an owner requests it under Network, an admin approves it; or remove the name";
            faults.push(closed("connects.egress", message, instead));
        }
        Ok(faults)
    }

    async fn missing(
        &self,
        conn: &mut PgConnection,
        tenant: &TenantRef,
        connects: &Connects,
    ) -> Result<Vec<Fault>, Error> {
        let mut faults = self.absent(conn, tenant, connects).await?;
        if !connects.egress.is_empty() {
            let walls = self.driver.walls().await.unwrap_or_default().ranges();
            let (approved, _) = store::decided_egress(conn, tenant.id).await?;
            for target in approved.iter().filter(|target| connects.egress.contains(&target.name)) {
                if let Some(range) = target.behind(&walls) {
                    let message = format!("{} touches {}: {}", target.name, range.network, range.words);
                    faults.push(closed(
                        "connects.egress",
                        message,
                        "remove the name, or request another target",
                    ));
                }
            }
        }
        Ok(faults)
    }

    async fn changed(
        &self,
        conn: &mut PgConnection,
        by: By<'_>,
        tenant: TenantId,
        app: AppId,
        words: String,
    ) -> Result<(), Error> {
        note(conn, tenant, by.actor.id.as_str(), &words).await?;
        // The app's port may have changed.
        store::wake_receivers(conn, Some(app), None, "a granted app has changed").await
    }

    async fn settle(&self, tenant: TenantId) -> Result<(), Failure> {
        // Each of a tenant's apps calls this. If no decision was made since, the plan is not compiled again.
        let mut conn = self.pool.acquire().await?;
        if store::is_settled(&mut conn, tenant).await? {
            return Ok(());
        }
        drop(conn);
        self.ensure(tenant, Again::No).await.map(drop)
    }
}

/// Records a decision about a tenant's network. Runs in the transaction of the decision.
pub(super) async fn note(
    conn: &mut PgConnection,
    tenant: TenantId,
    who: &str,
    words: &str,
) -> Result<(), Error> {
    store::insert_cause(conn, tenant, who, words).await?;
    Ok(enqueue(conn, actions::WORK, tenant.0, tenant).await?)
}

impl Network {
    /// Compiles the plan from the decisions, verifies it if it changed, and applies it. Returns the time at
    /// which the first decision expires.
    ///
    /// If verification fails, it applies the intersection of the old and the new plan: closing is always
    /// safe, opening is not.
    pub(super) async fn ensure(
        &self,
        tenant: TenantId,
        again: Again,
    ) -> Result<Option<OffsetDateTime>, Failure> {
        let walls = self.driver.walls().await.unwrap_or_default().ranges();
        let mut tx = db::begin_for_all(&self.pool).await?;
        // The lock comes before the first read: the reads see the newest decisions, and plans are made one
        // after another.
        let standing = store::lock_plan(&mut tx, tenant).await?;
        let facts = facts(&mut tx, tenant, &walls).await?;
        let (wanted, gaps) = compile(&facts);
        let proof = justify(&facts, &wanted, &gaps, pool(&self.pools));
        let refused = proof.as_ref().err().map(String::as_str);
        let apps = if refused.is_some() { in_both(&standing.apps, &wanted) } else { wanted.clone() };
        let watched = closing(&apps, &facts.windows);
        let (hash, asked) = (hash(&apps, facts.trial, &watched)?, hash(&wanted, facts.trial, &watched)?);
        let (mut number, mut apply) = (standing.number, !standing.in_force || again == Again::Yes);
        let causes = store::take_causes(&mut tx, tenant).await?;
        if let Some(why) = refused
            && store::find_refused(&mut tx, tenant, &asked).await?.is_none()
        {
            let (opens, closes) = difference(&standing.apps, &wanted);
            let plan =
                NewPlan { hash: &asked, opens: &opens, closes: &closes, causes: &causes, refused: Some(why) };
            store::insert_plan(&mut tx, tenant, &plan).await?;
        }
        // A decision that changes no flow makes no new plan.
        if hash != standing.hash {
            let (mut opens, mut closes) = difference(&standing.apps, &apps);
            // A new end of audit mode changes no flow.
            match (standing.trial, facts.trial) {
                (None, Some(_)) => opens.push(TRIAL.to_owned()),
                (Some(_), None) => closes.push(TRIAL.to_owned()),
                _ => {}
            }
            let plan =
                NewPlan { hash: &hash, opens: &opens, closes: &closes, causes: &causes, refused: None };
            number = store::insert_plan(&mut tx, tenant, &plan).await?;
            store::set_standing(&mut tx, tenant, (number, &hash), (&apps, facts.trial)).await?;
            apply = true;
        }
        fail::fail_point!("networks::planned", |_| Err(Failure::Transient("failpoint".into())));
        tx.commit().await?;
        fail::fail_point!("networks::plan_committed");
        if apply && number > 0 {
            self.apply(tenant, &facts, number, (apps, watched)).await?;
        }
        proof.map_err(|why| {
            tracing::error!(tenant = %facts.tenant, why, "plan verification failed; no new flow is opened");
            Failure::Permanent(format!(
                "plan verification failed: no new flow is opened, removed flows are closed: {why}"
            ))
        })?;
        Ok(facts.ends)
    }

    async fn apply(
        &self,
        tenant: TenantId,
        facts: &PlanFacts,
        plan: i64,
        (apps, watched): (Vec<AppPlan>, Vec<AppPlan>),
    ) -> Result<(), Failure> {
        let flows = |apps: Vec<AppPlan>| {
            apps.into_iter().map(|app| AppFlows { app: app.app, flows: app.flows }).collect()
        };
        let flows = TenantFlows {
            tenant: facts.tenant.clone(),
            plan,
            apps: flows(apps),
            trial_until: facts.trial,
            watched: flows(watched),
        };
        let held = match self.driver.ensure_flows(&flows).await {
            // The agent must know the tenant first. No other part of the tenant may delay a withdrawal.
            Err(crate::driver::Error::Rejected(why)) if why == UNKNOWN_TENANT => {
                let grant = tenants::reconcile::grant(&self.pool, &self.pools, tenant, &facts.tenant).await?;
                self.driver.ensure_tenant(&grant).await?;
                self.driver.ensure_flows(&flows).await?
            }
            outcome => outcome?,
        };
        fail::fail_point!("networks::applied", |_| Err(Failure::Transient("failpoint".into())));
        let mut tx = db::begin_for_all(&self.pool).await?;
        if held > plan {
            // The agent has a newer plan than this database: the database was restored, or another process
            // wrote. The next plan gets a number above it.
            store::number_beyond(&mut tx, held).await?;
            store::unset_standing(&mut tx, tenant).await?;
            tx.commit().await?;
            return Err(Failure::Transient(
                "the agent has a newer plan than the database; the plan is compiled again".into(),
            ));
        }
        if store::set_in_force(&mut tx, tenant, plan).await? {
            enqueue(&mut tx, probe::WORK, probe::OBJECT, None).await?;
        }
        tx.commit().await?;
        Ok(())
    }
}

/// Whether to send a plan again that is already applied: the agent may have lost it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    /// Send it only if it is not applied.
    No,
    /// Always send it.
    Yes,
}

/// The entry for audit mode in a plan.
const TRIAL: &str = "audit mode: all egress outside the reserved and blocked ranges; it is recorded";

fn hash(apps: &[AppPlan], trial: Option<i64>, watched: &[AppPlan]) -> Result<String, Error> {
    let text = match watched {
        [] => serde_json::to_vec(&(apps, trial)),
        watched => serde_json::to_vec(&(apps, trial, watched)),
    };
    Ok(Digest::of(&text.map_err(Error::internal)?).to_string())
}

/// Returns the intersection of two plans.
fn in_both(before: &[AppPlan], after: &[AppPlan]) -> Vec<AppPlan> {
    let kept = |app: &AppPlan| {
        let own = before.iter().find(|own| own.app == app.app);
        let flows = app.flows.iter().filter(|flow| own.is_some_and(|own| own.flows.contains(flow)));
        AppPlan { flows: flows.cloned().collect(), ..app.clone() }
    };
    after.iter().map(kept).collect()
}

async fn facts(conn: &mut PgConnection, tenant: TenantId, walls: &[Range]) -> Result<PlanFacts, Error> {
    let name = tenants::name_of(conn, tenant).await?;
    let apps = list_connecting(conn, tenant).await?;
    let services = store::decided_services(conn, tenant).await?;
    let (grants, grants_end) = store::decided_grants(conn, tenant).await?;
    let (mut egress, egress_ends) = store::decided_egress(conn, tenant).await?;
    // A target may have been approved before its range was blocked.
    egress.retain(|target| target.behind(walls).is_none());
    let trial = store::decided_trial(conn, tenant).await?;
    let windows = store::decided_windows(conn, tenant).await?;
    let ends = grants_end.into_iter().chain(egress_ends).chain(trial).min();
    let trial = trial.map(OffsetDateTime::unix_timestamp);
    Ok(PlanFacts { tenant: name, apps, services, windows, grants, egress, trial, ends })
}

/// Describes a flow of an app.
fn words(app: &AppName, flow: &Flow) -> String {
    let Flow { name, target, protocol, port, .. } = flow;
    match target {
        Target::App { .. } => format!("{app} to {name}, {protocol} {port}"),
        Target::Service { network } => format!("{app} to the service {name}, {network} {protocol} {port}"),
        Target::Outside { network } => format!("{app} to {name} outside, {network} {protocol} {port}"),
        Target::Domain { domain } => format!("{app} to {name} outside, {domain} {protocol} {port}"),
    }
}

/// Returns the flows that the second plan opens, and those that it closes.
fn difference(before: &[AppPlan], after: &[AppPlan]) -> (Vec<String>, Vec<String>) {
    let set = |apps: &[AppPlan]| -> BTreeSet<(AppId, Flow, AppName)> {
        let of = |app: &AppPlan| {
            // A new expiry changes no flow.
            let bare = |flow: &Flow| Flow { until: None, ..flow.clone() };
            app.flows.iter().map(|flow| (app.app, bare(flow), app.name.clone())).collect::<Vec<_>>()
        };
        apps.iter().flat_map(of).collect()
    };
    let (old, new) = (set(before), set(after));
    let tell = |left: &BTreeSet<_>, right: &BTreeSet<_>| {
        left.difference(right).map(|(_, flow, name): &(AppId, Flow, AppName)| words(name, flow)).collect()
    };
    (tell(&new, &old), tell(&old, &new))
}
