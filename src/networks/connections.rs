//! What the network says to apps: whether what they ask for is to be had, that they have changed, and that
//! their plan is in force. A plan is made, proven and applied here, by whoever needs it first.

use std::collections::BTreeSet;
use std::sync::Arc;

use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;

use super::compile::{closing, compile};
use super::justify::justify;
use super::store::{self, NewPlan};
use super::{AppPlan, Facts, actions, probe};
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

/// The noun's answers.
#[derive(Clone)]
pub struct Network {
    /// Database.
    pub pool: PgPool,
    /// Pools of the installation.
    pub pools: Pools,
    /// What applies plans.
    pub driver: Arc<dyn Driver>,
}

/// The pool of tenants' addresses.
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
            faults.push(closed("connects.apps", message, "deploy that app first, or leave it out"));
        }
        let others: Vec<String> =
            connects.apps.iter().filter(|app| app.tenant.is_some()).map(ToString::to_string).collect();
        if !others.is_empty() {
            let accepted = store::list_accepted(conn, &others).await?;
            for name in others.iter().filter(|name| !accepted.contains(name)) {
                let message = format!("{name} is not granted to this tenant, or the grant was not accepted");
                let instead = "its owner offers it, an owner here accepts it under Network; or leave it out";
                faults.push(closed("connects.apps", message, instead));
            }
        }
        let services: Vec<String> = connects.services.iter().map(ToString::to_string).collect();
        if !services.is_empty() {
            let usable = store::list_named_services(conn, &services).await?;
            for name in services.iter().filter(|name| !usable.contains(name)) {
                let message = format!("this tenant may not use a service {name}");
                let instead = "ask the platform's admin for it, or leave it out";
                faults.push(closed("connects.services", message, instead));
            }
        }
        let egress: Vec<String> = connects.egress.iter().map(ToString::to_string).collect();
        for name in store::list_closed_targets(conn, tenant.id, &egress).await? {
            let message = format!("there is no approved egress target {name}");
            let instead = "an owner asks for it under Network, an admin approves it; or leave it out";
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
                    faults.push(closed("connects.egress", message, "leave it out, or ask for another place"));
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
        // Its port may be another one now, or none.
        store::wake_receivers(conn, Some(app), None, "a granted app has changed").await
    }

    async fn settle(&self, tenant: TenantId) -> Result<(), Failure> {
        // Each of a tenant's apps asks: where nothing was decided since, the whole plan is not gone through again.
        let mut conn = self.pool.acquire().await?;
        if store::is_settled(&mut conn, tenant).await? {
            return Ok(());
        }
        drop(conn);
        self.ensure(tenant, Again::No).await.map(drop)
    }
}

/// Something was decided about a tenant's network: within the transaction in which it is.
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
    /// Makes the plan that follows from what was decided, if it is another one, proves it, and sees to it that
    /// it is in force. Returns when the first of what was decided ends by itself.
    ///
    /// A plan that is not proven opens nothing, but what it closes is closed: of the one before, that stays which
    /// is in both.
    pub(super) async fn ensure(
        &self,
        tenant: TenantId,
        again: Again,
    ) -> Result<Option<OffsetDateTime>, Failure> {
        let walls = self.driver.walls().await.unwrap_or_default().ranges();
        let mut tx = db::begin_for_all(&self.pool).await?;
        // Locked before anything is read: what is read is the newest, and plans come one after another.
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
        // Where what was decided changes nothing of what is open, no plan comes of it.
        if hash != standing.hash {
            let (mut opens, mut closes) = difference(&standing.apps, &apps);
            // A moved end of a trial opens and closes nothing.
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
            tracing::error!(tenant = %facts.tenant, why, "a plan is not proven; it opens nothing");
            Failure::Permanent(format!(
                "a plan is not proven and opens nothing; what it closes is closed: {why}"
            ))
        })?;
        Ok(facts.ends)
    }

    async fn apply(
        &self,
        tenant: TenantId,
        facts: &Facts,
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
            // Only a tenant that is not known there yet has to be told first: nothing else of it keeps a
            // withdrawal waiting.
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
            // A newer plan was there than this database knows of: it was restored, or somebody else wrote. What is
            // decided now gets a number beyond it.
            store::number_beyond(&mut tx, held).await?;
            store::unset_standing(&mut tx, tenant).await?;
            tx.commit().await?;
            return Err(Failure::Transient("the agent has seen a newer plan; it is made anew".into()));
        }
        if store::set_in_force(&mut tx, tenant, plan).await? {
            enqueue(&mut tx, probe::WORK, probe::OBJECT, None).await?;
        }
        tx.commit().await?;
        Ok(())
    }
}

/// Whether a plan is handed over again that is in force already: the other side may have lost it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    /// Only if it is not in force.
    No,
    /// In any case.
    Yes,
}

/// What a trial is called in a plan.
const TRIAL: &str = "on trial, everything outside that is not behind a wall; it is written down";

fn hash(apps: &[AppPlan], trial: Option<i64>, watched: &[AppPlan]) -> Result<String, Error> {
    let text = match watched {
        [] => serde_json::to_vec(&(apps, trial)),
        watched => serde_json::to_vec(&(apps, trial, watched)),
    };
    Ok(Digest::of(&text.map_err(Error::internal)?).to_string())
}

/// What is open under both: what the second does not have is closed, what the first does not have stays so.
fn in_both(before: &[AppPlan], after: &[AppPlan]) -> Vec<AppPlan> {
    let kept = |app: &AppPlan| {
        let own = before.iter().find(|own| own.app == app.app);
        let flows = app.flows.iter().filter(|flow| own.is_some_and(|own| own.flows.contains(flow)));
        AppPlan { flows: flows.cloned().collect(), ..app.clone() }
    };
    after.iter().map(kept).collect()
}

async fn facts(conn: &mut PgConnection, tenant: TenantId, walls: &[Range]) -> Result<Facts, Error> {
    let name = tenants::name_of(conn, tenant).await?;
    let apps = list_connecting(conn, tenant).await?;
    let services = store::decided_services(conn, tenant).await?;
    let (grants, grants_end) = store::decided_grants(conn, tenant).await?;
    let (mut egress, egress_ends) = store::decided_egress(conn, tenant).await?;
    // What was approved before it came to lie behind a wall.
    egress.retain(|target| target.behind(walls).is_none());
    let trial = store::decided_trial(conn, tenant).await?;
    let windows = store::decided_windows(conn, tenant).await?;
    let ends = grants_end.into_iter().chain(egress_ends).chain(trial).min();
    let trial = trial.map(OffsetDateTime::unix_timestamp);
    Ok(Facts { tenant: name, apps, services, windows, grants, egress, trial, ends })
}

/// A flow of an app, in words.
fn words(app: &AppName, flow: &Flow) -> String {
    let Flow { name, target, protocol, port, .. } = flow;
    match target {
        Target::App { .. } => format!("{app} to {name}, {protocol} {port}"),
        Target::Service { network } => format!("{app} to the service {name}, {network} {protocol} {port}"),
        Target::Outside { network } => format!("{app} to {name} outside, {network} {protocol} {port}"),
        Target::Domain { domain } => format!("{app} to {name} outside, {domain} {protocol} {port}"),
    }
}

/// What the second opens and closes against the first.
fn difference(before: &[AppPlan], after: &[AppPlan]) -> (Vec<String>, Vec<String>) {
    let set = |apps: &[AppPlan]| -> BTreeSet<(AppId, Flow, AppName)> {
        let of = |app: &AppPlan| {
            // An end that moves opens and closes nothing.
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
