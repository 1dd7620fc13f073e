//! The observation window: nothing changes yet, and use of the endpoints that will be removed is counted.

use time::OffsetDateTime;

use super::Stage;
use super::advance::{BATCH, COUNTING, RolloutReconciler, RolloutStep, SOON};
use crate::db;
use crate::driver::Used;
use crate::networks::Endpoint;
use crate::networks::store::{self, Rollout, TenantFilter, UseRow};
use crate::reconcile::Failure;

impl RolloutReconciler {
    /// Runs one step of the observation window.
    pub(super) async fn window(&self, rollout: &Rollout) -> Result<RolloutStep, Failure> {
        if let Some(step) = self.not_in_force(rollout, TenantFilter::Watched).await? {
            return Ok(step);
        }
        let mut tx = db::begin_for_all(&self.0.pool).await?;
        if !store::set_progress(&mut tx, rollout.id, Stage::Window, (None, &rollout.message)).await? {
            return Ok(RolloutStep::On);
        }
        let watched = store::watch_tenants(&mut tx, rollout, BATCH).await?;
        let words = format!(
            "the rollout {} of {} starts: use of the endpoints that it will remove is counted",
            rollout.id, rollout.service
        );
        store::note_tenants(&mut tx, &watched, &rollout.begun_by, &words).await?;
        tx.commit().await?;
        if !watched.is_empty() {
            return Ok(RolloutStep::Wait(SOON, "setting up the counters".into()));
        }
        let (some, all) = self.count(rollout).await?;
        let left = rollout.until.map_or(time::Duration::ZERO, |until| until - OffsetDateTime::now_utc());
        if left.is_positive() {
            let message = format!("counting connections to endpoints that will be removed: {all} so far");
            return Ok(RolloutStep::Wait(left.unsigned_abs().min(COUNTING), message));
        }
        if let Some(one) = some.first() {
            return Ok(RolloutStep::Ask(format!(
                "in {}, {all} connection(s) used endpoints that this change removes, such as {}/{} to {} {} {}. \
                 Resume to close them",
                lasted(rollout),
                one.tenant,
                one.app,
                one.network,
                one.protocol,
                one.port
            )));
        }
        let message = format!("in {} no app used the endpoints that will be removed", lasted(rollout));
        self.go_on(rollout, Stage::Canary, &message).await
    }

    /// Reads the counters and records the use of the endpoints that this rollout removes.
    async fn count(&self, rollout: &Rollout) -> Result<(Vec<UseRow>, i64), Failure> {
        let used = self.0.driver.used().await?;
        let mut tx = db::begin_for_all(&self.0.pool).await?;
        let mut names: Vec<String> = used.iter().map(|used| used.tenant.to_string()).collect();
        names.sort();
        names.dedup();
        let users = store::list_users_named(&mut tx, rollout.service_id, &names).await?;
        let of = |name: &_| users.iter().find(|(known, _)| known == name).map(|(_, id)| *id);
        // The counters include other rollouts' windows: each rollout takes its own. A counted range may
        // contain the endpoint.
        let closes = |used: &Used| {
            let within = |end: &&Endpoint| {
                used.network.holds(end.network) && (end.protocol, end.port) == (used.protocol, used.port)
            };
            rollout.before.iter().filter(within).any(|end| !end.is_among(&rollout.endpoints))
        };
        let uses: Vec<_> =
            used.into_iter().filter(closes).filter_map(|used| Some((of(&used.tenant)?, used))).collect();
        store::put_uses(&mut tx, rollout.id, &uses).await?;
        let seen = store::list_uses(&mut tx, rollout.id, 1).await?;
        tx.commit().await?;
        Ok(seen)
    }
}

/// Returns how long the observation window lasted. A user may have ended it early.
fn lasted(rollout: &Rollout) -> String {
    let minutes = (OffsetDateTime::now_utc() - rollout.begun_at).whole_minutes();
    if minutes < 60 { format!("{minutes} min") } else { format!("{} h", minutes / 60) }
}
