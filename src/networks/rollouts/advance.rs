//! The steps of a rollout. `window.rs` counts use, `spread.rs` reaches tenants, `verify.rs` checks the
//! result; rolling back is here. Each step reads the database, does one thing, and stores the result. A step
//! that is repeated after a crash has no further effect.

use std::time::Duration;

use serde_json::json;
use sqlx::PgConnection;

use super::{Stage, WORK};
use crate::audit;
use crate::db;
use crate::error::Error;
use crate::ids::ActorId;
use crate::networks::connections::Network;
use crate::networks::store::{self, Rollout, TenantFilter};
use crate::reconcile::{Failure, Lease, Outcome, Reconciler};

/// Number of tenants that are reached at a time. They are checked before the next ones are reached.
pub(super) const BATCH: i64 = 100;
/// How long a plan may take to be applied, in seconds, before the rollout needs approval.
pub(super) const PATIENCE: i64 = 120;
/// How often the counters of an observation window are read.
pub(super) const COUNTING: Duration = Duration::from_secs(5);
pub(super) const SOON: Duration = Duration::from_millis(200);

/// The reconciler of rollouts.
pub struct RolloutReconciler(pub Network);

/// The result of a step.
pub(super) enum RolloutStep {
    /// Continue at once.
    On,
    /// Requeue after this time.
    Wait(Duration, String),
    /// Needs approval.
    Ask(String),
    /// Roll back.
    Back(String),
}

#[async_trait::async_trait]
impl Reconciler for RolloutReconciler {
    fn kind(&self) -> &'static str {
        WORK
    }

    async fn reconcile(&self, lease: Lease) -> Result<Outcome, Failure> {
        let mut conn = self.0.pool.acquire().await?;
        let Some(rollout) = store::find_rollout(&mut conn, lease.object_id).await? else {
            return Ok(Outcome::Gone);
        };
        if rollout.stage == Stage::Over {
            return Ok(Outcome::Gone);
        }
        // Resuming wakes it.
        if rollout.paused_by.is_some() && rollout.stage != Stage::Undo {
            return Ok(Outcome::Settled);
        }
        let alarm = match rollout.stage {
            Stage::Canary | Stage::All => store::find_alarm(&mut conn, rollout.stage_at).await?,
            _ => None,
        };
        drop(conn);
        let step = match (alarm, rollout.stage) {
            (Some(alarm), _) => RolloutStep::Ask(alarm),
            (None, Stage::Window) => self.window(&rollout).await?,
            (None, Stage::Canary) => self.canary(&rollout).await?,
            (None, Stage::All) => self.all(&rollout).await?,
            (None, Stage::Undo) => self.undo(&rollout).await?,
            (None, Stage::Over) => return Ok(Outcome::Gone),
        };
        fail::fail_point!("rollouts::stepped");
        self.conclude(&rollout, step).await
    }

    async fn report(&self, object_id: i64, problem: Option<&str>) -> Result<(), sqlx::Error> {
        let Some(problem) = problem else { return Ok(()) };
        let mut conn = self.0.pool.acquire().await?;
        store::set_message(&mut conn, object_id, problem)
            .await
            .map_err(|error| sqlx::Error::Protocol(error.to_string()))
    }
}

impl RolloutReconciler {
    /// Stores the result of a step.
    async fn conclude(&self, rollout: &Rollout, step: RolloutStep) -> Result<Outcome, Failure> {
        let (id, stage) = (rollout.id, rollout.stage);
        let mut tx = db::begin_for_all(&self.0.pool).await?;
        let outcome = match step {
            RolloutStep::On => Outcome::Again(Duration::ZERO),
            RolloutStep::Wait(after, message) => {
                if message != rollout.message {
                    store::set_progress(&mut tx, id, stage, (None, &message)).await?;
                }
                Outcome::Again(after)
            }
            RolloutStep::Ask(message) => {
                if store::pause(&mut tx, id, ActorId::platform().as_str(), &message).await?
                    || store::note_paused(&mut tx, id, &message).await?
                {
                    tracing::error!(rollout = id, message, "a rollout needs approval");
                    record(&mut tx, rollout, "rollout.paused", json!({"why": message})).await?;
                }
                Outcome::Settled
            }
            RolloutStep::Back(message) => {
                if store::set_stage(&mut tx, id, (stage, Stage::Undo), (Some("rolled_back"), &message))
                    .await?
                {
                    tracing::error!(rollout = id, message, "a rollout is rolled back");
                    record(&mut tx, rollout, "rollout.rolled-back", json!({"why": message})).await?;
                }
                Outcome::Again(Duration::ZERO)
            }
        };
        tx.commit().await?;
        Ok(outcome)
    }

    pub(super) async fn go_on(
        &self,
        rollout: &Rollout,
        to: Stage,
        message: &str,
    ) -> Result<RolloutStep, Failure> {
        let mut tx = db::begin_for_all(&self.0.pool).await?;
        if store::set_stage(&mut tx, rollout.id, (rollout.stage, to), (None, message)).await? {
            record(&mut tx, rollout, "rollout.stage", json!({"stage": to, "why": message})).await?;
        }
        tx.commit().await?;
        fail::fail_point!("rollouts::staged");
        Ok(RolloutStep::On)
    }

    /// Rolls back, a batch of tenants at a time.
    async fn undo(&self, rollout: &Rollout) -> Result<RolloutStep, Failure> {
        let message = rollout.message.clone();
        let mut tx = db::begin_for_all(&self.0.pool).await?;
        let late = store::find_unsettled(&mut tx, rollout.id, TenantFilter::Left).await?;
        let waits = late.as_ref().is_some_and(|late| late.seconds <= PATIENCE);
        if waits {
            return Ok(RolloutStep::Wait(SOON, message));
        }
        let left = store::leave_tenants(&mut tx, rollout, BATCH).await?;
        if !left.is_empty() {
            let words = format!("the rollout {} of {} is rolled back", rollout.id, rollout.service);
            store::note_tenants(&mut tx, &left, ActorId::platform().as_str(), &words).await?;
            tx.commit().await?;
            fail::fail_point!("rollouts::left");
            return Ok(RolloutStep::Wait(SOON, message));
        }
        let message = match late {
            None => message,
            Some(late) => format!("{message}; the plans of {} tenant(s) are not applied yet", late.count),
        };
        if store::set_stage(&mut tx, rollout.id, (Stage::Undo, Stage::Over), (None, &message)).await? {
            record(&mut tx, rollout, "rollout.taken-back", json!({"outcome": rollout.outcome})).await?;
        }
        tx.commit().await?;
        Ok(RolloutStep::On)
    }
}

pub(super) async fn record(
    conn: &mut PgConnection,
    rollout: &Rollout,
    action: &'static str,
    mut detail: serde_json::Value,
) -> Result<(), Error> {
    detail["rollout"] = json!(rollout.id);
    let actor = ActorId::platform();
    let event = audit::AuditEvent {
        tenant: None,
        actor: &actor,
        action,
        object: rollout.service.as_str(),
        request_id: "reconcile",
        detail,
    };
    audit::record(conn, event).await
}
