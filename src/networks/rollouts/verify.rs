//! Verifies that the change of a rollout is applied and works.

use std::collections::BTreeSet;
use std::time::Duration;

use super::Check;
use super::advance::{PATIENCE, RolloutReconciler, RolloutStep, SOON};
use super::attempt::{Tried, attempt, place};
use crate::networks::store::{self, Before, Pick, Rollout, TenantFilter};
use crate::reconcile::Failure;

/// Delay before a fault is checked again.
const CONFIRM: Duration = Duration::from_secs(1);

impl RolloutReconciler {
    /// Returns the reason to wait or to roll back before the next step, if any.
    pub(super) async fn not_in_force(
        &self,
        rollout: &Rollout,
        whom: TenantFilter,
    ) -> Result<Option<RolloutStep>, Failure> {
        let mut conn = self.0.pool.acquire().await?;
        if let Some((tenant, why)) = store::find_unproven(&mut conn, rollout.id).await? {
            return Ok(Some(RolloutStep::Back(format!("the plan of {tenant} failed verification: {why}"))));
        }
        let Some(late) = store::find_unsettled(&mut conn, rollout.id, whom).await? else { return Ok(None) };
        let words =
            format!("{} tenant(s) whose plan is not applied yet, such as {}", late.count, late.example);
        if late.seconds <= PATIENCE {
            let message = match whom {
                TenantFilter::Reached => {
                    format!("{} of {} tenants are reached; ", rollout.reached, rollout.tenants)
                }
                TenantFilter::Watched | TenantFilter::Left => String::new(),
            };
            return Ok(Some(RolloutStep::Wait(SOON, format!("{message}waiting for {words}"))));
        }
        // A user who resumed the rollout knows of them.
        Ok((!rollout.resumed).then(|| {
            RolloutStep::Ask(format!("waited {PATIENCE} s for {words}. Resume to continue without them"))
        }))
    }

    /// Runs the probes. Returns a summary if all are as expected, or the next step if not.
    pub(super) async fn tried(
        &self,
        rollout: &Rollout,
        stage: &'static str,
        pick: Pick<'_>,
        most: i64,
    ) -> Result<Result<String, RolloutStep>, Failure> {
        let mut conn = self.0.pool.acquire().await?;
        let before = store::list_before(&mut conn, rollout.id).await?;
        let known_open = store::list_found_open(&mut conn, rollout.id, stage).await?;
        let plans = store::list_using_plans(&mut conn, rollout, (pick, true), most).await?;
        drop(conn);
        // An endpoint that answered one app before must answer.
        let word = |before: &Before| format!("{} {} {}", before.network, before.protocol, before.port);
        let alive: BTreeSet<String> = before.iter().filter(|before| before.good).map(word).collect();
        let dead =
            before.iter().filter(|before| !before.good).map(word).filter(|at| !alive.contains(at)).collect();
        let Tried { checks, idle } = attempt(&*self.0.driver, rollout, &plans, true, &dead).await?;
        let checks = self.confirmed(rollout, checks, &dead).await?;
        let mut conn = self.0.pool.acquire().await?;
        store::put_checks(&mut conn, rollout.id, stage, &checks).await?;
        // An endpoint that must be closed and is open comes first: rolling back would not close it. A user
        // who resumed the rollout knows of the earlier findings.
        let known = |check: &Check| {
            rollout.resumed && known_open.iter().any(|(app, at)| *app == check.app && *at == place(check))
        };
        if let Some(open) = checks.iter().find(|check| !check.good && !check.open && !known(check)) {
            return Ok(Err(RolloutStep::Ask(format!("ALARM: {open}"))));
        }
        if let Some(shut) = checks.iter().find(|check| !check.good && check.open) {
            return Ok(Err(RolloutStep::Back(shut.to_string())));
        }
        // An app that could be probed before and cannot now may have failed because of the change. For canary
        // tenants, this needs approval once.
        let asks =
            !rollout.resumed && (stage == "canary" || rollout.canaries.as_ref().is_some_and(Vec::is_empty));
        let ended =
            idle.iter().find(|(app, _)| before.iter().any(|before| before.app == *app && before.good));
        if let Some((_, name)) = ended.filter(|_| asks) {
            return Ok(Err(RolloutStep::Ask(format!(
                "{name} ran before the change and does not run now. Resume to continue without it"
            ))));
        }
        if checks.is_empty() && !idle.is_empty() && stage == "canary" && !rollout.resumed {
            return Ok(Err(RolloutStep::Ask(
                "no app of a canary tenant that uses the service is running, so nothing was tested. Resume to continue without a test"
                    .to_owned(),
            )));
        }
        Ok(Ok(summary(&checks)))
    }

    /// Probes unexpected outcomes once more, under the plan of that moment: the tenant may have changed its
    /// plan. A flow that is no longer required is no fault.
    async fn confirmed(
        &self,
        rollout: &Rollout,
        checks: Vec<Check>,
        dead: &BTreeSet<String>,
    ) -> Result<Vec<Check>, Failure> {
        let (good, bad): (Vec<Check>, Vec<Check>) = checks.into_iter().partition(|check| check.good);
        if bad.is_empty() {
            return Ok(good);
        }
        tokio::time::sleep(CONFIRM).await;
        let mut ids: Vec<i64> = bad.iter().map(|check| check.tenant.0).collect();
        ids.dedup();
        let mut conn = self.0.pool.acquire().await?;
        let most = i64::try_from(ids.len()).unwrap_or(i64::MAX);
        let plans = store::list_using_plans(&mut conn, rollout, (Pick::These(&ids), true), most).await?;
        drop(conn);
        let again = attempt(&*self.0.driver, rollout, &plans, true, dead).await?;
        let same = |check: &Check| bad.iter().any(|bad| bad.app == check.app && place(bad) == place(check));
        Ok(good.into_iter().chain(again.checks.into_iter().filter(same)).collect())
    }
}

fn summary(checks: &[Check]) -> String {
    if checks.is_empty() {
        return "nothing was tested: no running app uses the service".to_owned();
    }
    let open = checks.iter().filter(|check| check.open).count();
    format!(
        "tested {open} endpoint(s) that must be open and {} that must be closed: all as expected",
        checks.len() - open
    )
}
