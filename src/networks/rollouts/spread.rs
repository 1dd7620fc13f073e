//! Reaches tenants: the canary tenants first, then all others in batches.

use std::collections::BTreeSet;

use serde_json::json;
use time::OffsetDateTime;

use super::Stage;
use super::advance::{BATCH, COUNTING, RolloutReconciler, RolloutStep, SOON, record};
use super::attempt::attempt;
use crate::db;
use crate::networks::store::{self, Pick, Rollout, TenantFilter};
use crate::reconcile::Failure;

/// Number of tenants whose apps are probed: of the last batch, and at the end.
const OF_BATCH: i64 = 5;
const SAMPLE: i64 = 20;
/// One in a hundred users of a service is a canary tenant, up to this number.
const CANARIES: i64 = 10;

impl RolloutReconciler {
    /// The canary stage: probe, reach the canary tenants, wait for their plans, probe, observe, probe again.
    pub(super) async fn canary(&self, rollout: &Rollout) -> Result<RolloutStep, Failure> {
        let Some(canaries) = &rollout.canaries else {
            let mut conn = self.0.pool.acquire().await?;
            let most = (rollout.tenants / 100).clamp(1, CANARIES);
            let chosen = store::list_using_plans(&mut conn, rollout, (Pick::Some, false), most).await?;
            let ids: Vec<i64> = chosen.iter().map(|plan| plan.tenant.0).collect();
            store::set_canaries(&mut conn, rollout.id, &ids).await?;
            return Ok(RolloutStep::On);
        };
        if canaries.is_empty() {
            return self.go_on(rollout, Stage::All, "there are no canary tenants").await;
        }
        if rollout.reached == 0 {
            self.try_before(rollout, Pick::These(canaries)).await?;
            let reached = self.reach(rollout, Some(canaries), CANARIES * 10).await?;
            return match reached {
                None => Ok(RolloutStep::On),
                Some(0) => {
                    let message = "the canary tenants no longer use the service";
                    self.go_on(rollout, Stage::All, message).await
                }
                Some(_) => Ok(RolloutStep::Wait(SOON, "waiting for the plans of the canary tenants".into())),
            };
        }
        if let Some(step) = self.not_in_force(rollout, TenantFilter::Reached).await? {
            return Ok(step);
        }
        let first = rollout.until.is_none();
        let left = rollout.until.map_or(time::Duration::ZERO, |until| until - OffsetDateTime::now_utc());
        if left.is_positive() {
            let message = format!("observing the canary tenants; {}", said(rollout));
            return Ok(RolloutStep::Wait(left.unsigned_abs().min(COUNTING), message));
        }
        let summary = match self.tried(rollout, "canary", Pick::These(canaries), CANARIES * 10).await? {
            Ok(summary) => summary,
            Err(step) => return Ok(step),
        };
        if first && rollout.observe_seconds > 0 {
            let mut conn = self.0.pool.acquire().await?;
            let progress = (Some(rollout.observe_seconds), summary.as_str());
            store::set_progress(&mut conn, rollout.id, Stage::Canary, progress).await?;
            return Ok(RolloutStep::On);
        }
        self.go_on(rollout, Stage::All, &summary).await
    }

    /// Probes the endpoints before any tenant is reached. An endpoint that does not answer then is no fault
    /// of the rollout later.
    async fn try_before(&self, rollout: &Rollout, pick: Pick<'_>) -> Result<(), Failure> {
        let mut conn = self.0.pool.acquire().await?;
        let plans = store::list_using_plans(&mut conn, rollout, (pick, false), CANARIES).await?;
        drop(conn);
        let before = attempt(&*self.0.driver, rollout, &plans, false, &BTreeSet::new()).await?;
        let mut conn = self.0.pool.acquire().await?;
        Ok(store::put_checks(&mut conn, rollout.id, "before", &before.checks).await?)
    }

    /// Reaches tenants and returns their number; `None` if the rollout was paused or aborted meanwhile.
    async fn reach(
        &self,
        rollout: &Rollout,
        only: Option<&[i64]>,
        most: i64,
    ) -> Result<Option<usize>, Failure> {
        let mut tx = db::begin_for_all(&self.0.pool).await?;
        if !store::set_progress(&mut tx, rollout.id, rollout.stage, (None, &rollout.message)).await? {
            return Ok(None);
        }
        let reached = store::reach_tenants(&mut tx, rollout, only, most).await?;
        store::note_tenants(&mut tx, &reached, &rollout.begun_by, &goes_on(rollout)).await?;
        tx.commit().await?;
        fail::fail_point!("rollouts::reached");
        Ok(Some(reached.len()))
    }

    /// The last stage: reaches all other tenants in batches and probes a sample before each next batch. At
    /// the end, copies the change to the service.
    pub(super) async fn all(&self, rollout: &Rollout) -> Result<RolloutStep, Failure> {
        if let Some(step) = self.not_in_force(rollout, TenantFilter::Reached).await? {
            return Ok(step);
        }
        if rollout.reached == 0 {
            self.try_before(rollout, Pick::Some).await?;
        } else if rollout.reached < rollout.tenants
            && let Err(step) = self.tried(rollout, "all", Pick::Last, OF_BATCH).await?
        {
            return Ok(step);
        }
        let Some(reached) = self.reach(rollout, None, BATCH).await? else { return Ok(RolloutStep::On) };
        if reached > 0 {
            let n = rollout.reached + i64::try_from(reached).unwrap_or(0);
            return Ok(RolloutStep::Wait(SOON, format!("{n} of {} tenants are reached", rollout.tenants)));
        }
        match self.tried(rollout, "all", Pick::Some, SAMPLE).await? {
            Ok(summary) => self.finish(rollout, &summary).await,
            Err(step) => Ok(step),
        }
    }

    async fn finish(&self, rollout: &Rollout, summary: &str) -> Result<RolloutStep, Failure> {
        let mut tx = db::begin_for_all(&self.0.pool).await?;
        // A tenant that gains access at this moment is either listed below, or sees the change that is
        // written here.
        store::lock_service(&mut tx, rollout.service_id).await?;
        if !store::set_stage(&mut tx, rollout.id, (Stage::All, Stage::Over), (Some("done"), summary)).await? {
            return Ok(RolloutStep::On);
        }
        let late = store::list_unreached(&mut tx, rollout.service_id).await?;
        store::note_tenants(&mut tx, &late, &rollout.begun_by, &goes_on(rollout)).await?;
        store::adopt(&mut tx, rollout.id).await?;
        // Nothing changes for these tenants: the service now has the endpoints that they have.
        store::leave_tenants(&mut tx, rollout, i64::MAX).await?;
        record(&mut tx, rollout, "rollout.done", json!({"endpoints": rollout.endpoints, "checks": summary}))
            .await?;
        tx.commit().await?;
        fail::fail_point!("rollouts::finished");
        Ok(RolloutStep::On)
    }
}

fn goes_on(rollout: &Rollout) -> String {
    format!("the rollout {} of {} continues", rollout.id, rollout.service)
}

/// Returns the part of the message that is kept while the canary tenants are observed.
fn said(rollout: &Rollout) -> &str {
    rollout.message.split_once("; ").map_or(rollout.message.as_str(), |(_, said)| said)
}
