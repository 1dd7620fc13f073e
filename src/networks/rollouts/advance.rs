//! The steps of a roll-out. Each looks at what the database says, does one thing, and writes down what came of it;
//! whoever repeats a step, because somebody died in the middle of it, does no more than was meant.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::json;
use sqlx::PgConnection;
use time::OffsetDateTime;

use super::attempt::attempt;
use super::{Check, Stage, WORK};
use crate::audit;
use crate::driver::Used;
use crate::error::Error;
use crate::ids::ActorId;
use crate::networks::Endpoint;
use crate::networks::connections::Network;
use crate::networks::store::{self, PlanOf, Rollout};
use crate::reconcile::{Failure, Lease, Outcome, Reconciler};

/// How many tenants are reached at a time, and looked at before the next are.
const BATCH: i64 = 100;
/// From within how many tenants' apps it is tried at the end.
const SAMPLE: i64 = 50;
/// Of a hundred users of a service, one is first; these at most.
const CANARIES: i64 = 10;
/// How long a plan may take to be in force, in seconds, before a person is asked.
const PATIENCE: i64 = 120;
/// How often a window's counters are read.
const COUNTING: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_millis(200);

/// The reconciler of roll-outs.
pub struct RolloutReconciler(pub Network);

/// What a step came to.
enum Step {
    /// Go on with this at once.
    On,
    /// Look again.
    Wait(Duration, String),
    /// A person has to decide.
    Ask(String),
    /// It is taken back.
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
        // Whoever lets it go on, wakes this.
        if rollout.paused_by.is_some() && rollout.stage != Stage::Undo {
            return Ok(Outcome::Settled);
        }
        let alarm = match rollout.stage {
            Stage::Canary | Stage::All => store::find_alarm(&mut conn, rollout.stage_at).await?,
            _ => None,
        };
        drop(conn);
        let step = match (alarm, rollout.stage) {
            (Some(alarm), _) => Step::Ask(alarm),
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

fn goes_on(rollout: &Rollout) -> String {
    format!("the roll-out {} of {} goes on", rollout.id, rollout.service)
}

impl RolloutReconciler {
    /// Writes down what a step came to.
    async fn conclude(&self, rollout: &Rollout, step: Step) -> Result<Outcome, Failure> {
        let (id, stage) = (rollout.id, rollout.stage);
        let mut tx = self.0.pool.begin().await?;
        let outcome = match step {
            Step::On => Outcome::Again(Duration::ZERO),
            Step::Wait(after, message) => {
                if message != rollout.message {
                    store::set_progress(&mut tx, id, stage, (None, &message)).await?;
                }
                Outcome::Again(after)
            }
            Step::Ask(message) => {
                if store::pause(&mut tx, id, ActorId::platform().as_str(), &message).await? {
                    tracing::error!(rollout = id, message, "a roll-out waits for a person");
                    record(&mut tx, rollout, "rollout.paused", json!({"why": message})).await?;
                }
                Outcome::Settled
            }
            Step::Back(message) => {
                if store::set_stage(&mut tx, id, (stage, Stage::Undo), (Some("rolled_back"), &message))
                    .await?
                {
                    tracing::error!(rollout = id, message, "a roll-out is taken back");
                    record(&mut tx, rollout, "rollout.rolled-back", json!({"why": message})).await?;
                }
                Outcome::Again(Duration::ZERO)
            }
        };
        tx.commit().await?;
        Ok(outcome)
    }

    /// Nothing changes yet: what is used of what would be closed is counted.
    async fn window(&self, rollout: &Rollout) -> Result<Step, Failure> {
        let used = self.0.driver.used().await?;
        let mut tx = self.0.pool.begin().await?;
        let mut names: Vec<String> = used.iter().map(|used| used.tenant.to_string()).collect();
        names.sort();
        names.dedup();
        let users = store::list_users_named(&mut tx, rollout.service_id, &names).await?;
        let of = |name: &_| users.iter().find(|(known, _)| known == name).map(|(_, id)| *id);
        // Others' windows count too: each takes what is its own.
        let closes = |used: &Used| {
            let end = Endpoint { network: used.network, protocol: used.protocol, port: used.port };
            rollout.before.contains(&end) && !rollout.endpoints.contains(&end)
        };
        let uses: Vec<_> = used
            .into_iter()
            .filter(|used| used.packets > 0 && closes(used))
            .filter_map(|used| Some((of(&used.tenant)?, used)))
            .collect();
        store::put_uses(&mut tx, rollout.id, &uses).await?;
        let (some, all) = store::list_uses(&mut tx, rollout.id, 1).await?;
        tx.commit().await?;
        let left = rollout.until.map_or(time::Duration::ZERO, |until| until - OffsetDateTime::now_utc());
        if left.is_positive() {
            let message = format!("counting what is used of what it closes: {all} so far");
            return Ok(Step::Wait(left.unsigned_abs().min(COUNTING), message));
        }
        if let Some(one) = some.first() {
            return Ok(Step::Ask(format!(
                "within the window of {} h, {all} connection(s) were used that it closes, such as {}/{} to {} {} {}; \
                 going on closes them",
                rollout.window_hours, one.tenant, one.app, one.network, one.protocol, one.port
            )));
        }
        let message = format!("in {} h nothing was used of what it closes", rollout.window_hours);
        self.go_on(rollout, Stage::Canary, &message).await
    }

    async fn go_on(&self, rollout: &Rollout, to: Stage, message: &str) -> Result<Step, Failure> {
        let mut tx = self.0.pool.begin().await?;
        if store::set_stage(&mut tx, rollout.id, (rollout.stage, to), (None, message)).await? {
            record(&mut tx, rollout, "rollout.stage", json!({"stage": to, "why": message})).await?;
        }
        tx.commit().await?;
        fail::fail_point!("rollouts::staged");
        Ok(Step::On)
    }

    /// The first tenants: as it was before, reached, in force, tried, looked at, tried once more.
    async fn canary(&self, rollout: &Rollout) -> Result<Step, Failure> {
        let mut conn = self.0.pool.acquire().await?;
        let key = (rollout.id, rollout.service_id, &rollout.service);
        let Some(canaries) = &rollout.canaries else {
            let most = (rollout.tenants / 100).clamp(1, CANARIES);
            let chosen = store::list_using_plans(&mut conn, key, None, most).await?;
            let ids: Vec<i64> = chosen.iter().map(|plan| plan.tenant.0).collect();
            store::set_canaries(&mut conn, rollout.id, &ids).await?;
            return Ok(Step::On);
        };
        if canaries.is_empty() {
            return self.go_on(rollout, Stage::All, "nobody is reached first").await;
        }
        let plans = store::list_using_plans(&mut conn, key, Some(canaries), CANARIES * 10).await?;
        drop(conn);
        if rollout.reached == 0 {
            return self.reach_canaries(rollout, canaries, &plans).await;
        }
        if let Some(step) = self.not_in_force(rollout).await? {
            return Ok(step);
        }
        let first = rollout.until.is_none();
        let left = rollout.until.map_or(time::Duration::ZERO, |until| until - OffsetDateTime::now_utc());
        if left.is_positive() {
            let message = format!("the first tenants are looked at; {}", said(rollout));
            return Ok(Step::Wait(left.unsigned_abs().min(COUNTING), message));
        }
        let checks = match self.tried(rollout, "canary", &plans).await? {
            Ok(checks) => checks,
            Err(step) => return Ok(step),
        };
        let summary = summary(&checks);
        if first && rollout.observe_seconds > 0 {
            let mut conn = self.0.pool.acquire().await?;
            let progress = (Some(rollout.observe_seconds), summary.as_str());
            store::set_progress(&mut conn, rollout.id, Stage::Canary, progress).await?;
            return Ok(Step::On);
        }
        self.go_on(rollout, Stage::All, &summary).await
    }

    async fn reach_canaries(
        &self,
        rollout: &Rollout,
        canaries: &[i64],
        plans: &[PlanOf],
    ) -> Result<Step, Failure> {
        let before = attempt(&*self.0.driver, rollout, plans, false, &BTreeSet::new()).await?;
        let mut tx = self.0.pool.begin().await?;
        store::put_checks(&mut tx, rollout.id, "before", &before).await?;
        if !store::set_progress(&mut tx, rollout.id, Stage::Canary, (None, "reaching the first tenants"))
            .await?
        {
            return Ok(Step::On);
        }
        let reached =
            store::reach_tenants(&mut tx, (rollout.id, rollout.service_id), Some(canaries), CANARIES * 10)
                .await?;
        store::note_tenants(&mut tx, &reached, &rollout.begun_by, &goes_on(rollout)).await?;
        tx.commit().await?;
        fail::fail_point!("rollouts::reached");
        if reached.is_empty() {
            // Those that were chosen may not use it any more.
            return self
                .go_on(rollout, Stage::All, "none of the first tenants uses the service any more")
                .await;
        }
        Ok(Step::Wait(SOON, "the first tenants' plans are being made".into()))
    }

    /// All others, some at a time; then it is what the service says.
    async fn all(&self, rollout: &Rollout) -> Result<Step, Failure> {
        // Those that have been reached first: a fault there keeps it from the others.
        if let Some(step) = self.not_in_force(rollout).await? {
            return Ok(step);
        }
        let mut tx = self.0.pool.begin().await?;
        if !store::set_progress(&mut tx, rollout.id, Stage::All, (None, &rollout.message)).await? {
            return Ok(Step::On);
        }
        let reached = store::reach_tenants(&mut tx, (rollout.id, rollout.service_id), None, BATCH).await?;
        store::note_tenants(&mut tx, &reached, &rollout.begun_by, &goes_on(rollout)).await?;
        tx.commit().await?;
        fail::fail_point!("rollouts::reached");
        if !reached.is_empty() {
            let n = rollout.reached + i64::try_from(reached.len()).unwrap_or(0);
            return Ok(Step::Wait(SOON, format!("{n} of {} tenants are reached", rollout.tenants)));
        }
        let mut conn = self.0.pool.acquire().await?;
        let key = (rollout.id, rollout.service_id, &rollout.service);
        let plans = store::list_using_plans(&mut conn, key, None, SAMPLE).await?;
        drop(conn);
        let checks = match self.tried(rollout, "all", &plans).await? {
            Ok(checks) => checks,
            Err(step) => return Ok(step),
        };
        self.finish(rollout, &summary(&checks)).await
    }

    async fn finish(&self, rollout: &Rollout, summary: &str) -> Result<Step, Failure> {
        let mut tx = self.0.pool.begin().await?;
        // Whoever is being given the service at this moment, is seen below or sees what is written here.
        store::lock_service(&mut tx, rollout.service_id).await?;
        if !store::set_stage(&mut tx, rollout.id, (Stage::All, Stage::Over), (Some("done"), summary)).await? {
            return Ok(Step::On);
        }
        let late = store::list_unreached(&mut tx, rollout.service_id).await?;
        store::note_tenants(&mut tx, &late, &rollout.begun_by, &goes_on(rollout)).await?;
        store::adopt(&mut tx, rollout.id).await?;
        // Nothing changes for these: what held for them is what the service says now.
        store::leave_tenants(&mut tx, rollout.id).await?;
        record(&mut tx, rollout, "rollout.done", json!({"endpoints": rollout.endpoints, "checks": summary}))
            .await?;
        tx.commit().await?;
        fail::fail_point!("rollouts::finished");
        Ok(Step::On)
    }

    /// Takes it back from whom it has reached.
    async fn undo(&self, rollout: &Rollout) -> Result<Step, Failure> {
        let mut tx = self.0.pool.begin().await?;
        let mut left = store::leave_tenants(&mut tx, rollout.id).await?;
        if !left.is_empty() || rollout.until.is_none() {
            if rollout.window_hours > 0 {
                // What was counted is counted no more.
                left = store::list_unreached(&mut tx, rollout.service_id).await?;
            }
            let words = format!("the roll-out {} of {} is taken back", rollout.id, rollout.service);
            store::note_tenants(&mut tx, &left, ActorId::platform().as_str(), &words).await?;
            store::set_progress(&mut tx, rollout.id, Stage::Undo, (Some(0), &rollout.message)).await?;
            tx.commit().await?;
            fail::fail_point!("rollouts::left");
            return Ok(Step::Wait(SOON, rollout.message.clone()));
        }
        let late = store::find_unsettled(&mut tx, rollout.service_id, None).await?;
        if let Some(late) = &late
            && late.seconds <= PATIENCE
        {
            return Ok(Step::Wait(SOON, rollout.message.clone()));
        }
        let message = match late {
            None => rollout.message.clone(),
            Some(late) => {
                format!("{}; the plans of {} tenant(s) are not in force yet", rollout.message, late.count)
            }
        };
        if store::set_stage(&mut tx, rollout.id, (Stage::Undo, Stage::Over), (None, &message)).await? {
            record(&mut tx, rollout, "rollout.taken-back", json!({"outcome": rollout.outcome})).await?;
        }
        tx.commit().await?;
        Ok(Step::On)
    }

    /// What there is to wait for, or to turn back for, before the next step.
    async fn not_in_force(&self, rollout: &Rollout) -> Result<Option<Step>, Failure> {
        let mut conn = self.0.pool.acquire().await?;
        if let Some((tenant, why)) = store::find_unproven(&mut conn, rollout.id).await? {
            return Ok(Some(Step::Back(format!("the plan of {tenant} is not proven: {why}"))));
        }
        let Some(late) = store::find_unsettled(&mut conn, rollout.service_id, Some(rollout.id)).await? else {
            return Ok(None);
        };
        let words =
            format!("{} tenant(s) whose plan is not in force yet, such as {}", late.count, late.example);
        Ok(Some(if late.seconds > PATIENCE {
            Step::Ask(format!("waited {PATIENCE} s for {words}"))
        } else {
            Step::Wait(
                SOON,
                format!(
                    "{} of {} tenants are reached; waiting for {words}",
                    rollout.reached, rollout.tenants
                ),
            )
        }))
    }

    /// Tries it, and says what follows if it is not as it must be.
    async fn tried(
        &self,
        rollout: &Rollout,
        stage: &'static str,
        plans: &[PlanOf],
    ) -> Result<Result<Vec<Check>, Step>, Failure> {
        let mut conn = self.0.pool.acquire().await?;
        let dead = store::list_dead_before(&mut conn, rollout.id).await?.into_iter().collect();
        drop(conn);
        let checks = attempt(&*self.0.driver, rollout, plans, true, &dead).await?;
        let mut conn = self.0.pool.acquire().await?;
        store::put_checks(&mut conn, rollout.id, stage, &checks).await?;
        // What must be closed and is not comes first: taking back would not close it.
        if let Some(open) = checks.iter().find(|check| !check.good && !check.open) {
            return Ok(Err(Step::Ask(format!("ALARM: {open}"))));
        }
        if let Some(shut) = checks.iter().find(|check| !check.good) {
            return Ok(Err(Step::Back(shut.to_string())));
        }
        Ok(Ok(checks))
    }
}

fn summary(checks: &[Check]) -> String {
    if checks.is_empty() {
        return "nothing was tried: no app that uses the service runs".to_owned();
    }
    let open = checks.iter().filter(|check| check.open).count();
    format!(
        "tried {open} that must be open and {} that must be closed: all as they must be",
        checks.len() - open
    )
}

/// The sentence that is kept while the first tenants are looked at.
fn said(rollout: &Rollout) -> &str {
    rollout.message.split_once("; ").map_or(rollout.message.as_str(), |(_, said)| said)
}

async fn record(
    conn: &mut PgConnection,
    rollout: &Rollout,
    action: &'static str,
    mut detail: serde_json::Value,
) -> Result<(), Error> {
    detail["rollout"] = json!(rollout.id);
    let actor = ActorId::platform();
    let event = audit::Event {
        tenant: None,
        actor: &actor,
        action,
        object: rollout.service.as_str(),
        request_id: "reconcile",
        detail,
    };
    audit::record(conn, event).await
}
