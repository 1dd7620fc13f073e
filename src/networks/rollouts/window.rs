//! The window: nothing changes yet, and what is used of what will be closed is counted.

use time::OffsetDateTime;

use super::Stage;
use super::advance::{BATCH, COUNTING, RolloutReconciler, SOON, Step};
use crate::db;
use crate::driver::Used;
use crate::networks::Endpoint;
use crate::networks::store::{self, Rollout, UseRow, Whom};
use crate::reconcile::Failure;

impl RolloutReconciler {
    /// Nothing changes yet: what is used of what would be closed is counted.
    pub(super) async fn window(&self, rollout: &Rollout) -> Result<Step, Failure> {
        if let Some(step) = self.not_in_force(rollout, Whom::Watched).await? {
            return Ok(step);
        }
        let mut tx = db::begin_for_all(&self.0.pool).await?;
        if !store::set_progress(&mut tx, rollout.id, Stage::Window, (None, &rollout.message)).await? {
            return Ok(Step::On);
        }
        let watched = store::watch_tenants(&mut tx, rollout, BATCH).await?;
        let words = format!(
            "the roll-out {} of {} begins; what it will close is counted",
            rollout.id, rollout.service
        );
        store::note_tenants(&mut tx, &watched, &rollout.begun_by, &words).await?;
        tx.commit().await?;
        if !watched.is_empty() {
            return Ok(Step::Wait(SOON, "the counters are being set".into()));
        }
        let (some, all) = self.count(rollout).await?;
        let left = rollout.until.map_or(time::Duration::ZERO, |until| until - OffsetDateTime::now_utc());
        if left.is_positive() {
            let message = format!("counting what is used of what it closes: {all} so far");
            return Ok(Step::Wait(left.unsigned_abs().min(COUNTING), message));
        }
        if let Some(one) = some.first() {
            return Ok(Step::Ask(format!(
                "within the window of {}, {all} connection(s) were used that it closes, such as {}/{} to {} {} {}; \
                 going on closes them",
                lasted(rollout),
                one.tenant,
                one.app,
                one.network,
                one.protocol,
                one.port
            )));
        }
        let message = format!("in {} nothing was used of what it closes", lasted(rollout));
        self.go_on(rollout, Stage::Canary, &message).await
    }

    /// Reads the counters, and writes down what was used of what this one closes.
    async fn count(&self, rollout: &Rollout) -> Result<(Vec<UseRow>, i64), Failure> {
        let used = self.0.driver.used().await?;
        let mut tx = db::begin_for_all(&self.0.pool).await?;
        let mut names: Vec<String> = used.iter().map(|used| used.tenant.to_string()).collect();
        names.sort();
        names.dedup();
        let users = store::list_users_named(&mut tx, rollout.service_id, &names).await?;
        let of = |name: &_| users.iter().find(|(known, _)| known == name).map(|(_, id)| *id);
        // Others' windows count too: each takes what is its own. A range may be counted for one that lies in it.
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

/// How long a window was, which a person may have ended before its time.
fn lasted(rollout: &Rollout) -> String {
    let minutes = (OffsetDateTime::now_utc() - rollout.begun_at).whole_minutes();
    if minutes < 60 { format!("{minutes} min") } else { format!("{} h", minutes / 60) }
}
