//! The steps of a roll-out. Each looks at what the database says, does one thing, and writes down what came of it;
//! whoever repeats a step, because somebody died in the middle of it, does no more than was meant.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::json;
use sqlx::PgConnection;
use time::OffsetDateTime;

use super::attempt::{Tried, attempt, place};
use super::{Check, Stage, WORK};
use crate::audit;
use crate::driver::Used;
use crate::error::Error;
use crate::ids::ActorId;
use crate::networks::Endpoint;
use crate::networks::connections::Network;
use crate::networks::store::{self, Before, Pick, Rollout, UseRow, Whom};
use crate::reconcile::{Failure, Lease, Outcome, Reconciler};

/// How many tenants are reached at a time, and looked at before the next are.
const BATCH: i64 = 100;
/// From within how many tenants' apps it is tried: of those reached last, and at the end.
const OF_BATCH: i64 = 5;
const SAMPLE: i64 = 20;
/// After what time a fault is looked at again.
const CONFIRM: Duration = Duration::from_secs(1);
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
        if let Some(step) = self.not_in_force(rollout, Whom::Watched).await? {
            return Ok(step);
        }
        let mut tx = self.0.pool.begin().await?;
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
                "within the window of {} h, {all} connection(s) were used that it closes, such as {}/{} to {} {} {}; \
                 going on closes them",
                rollout.window_hours, one.tenant, one.app, one.network, one.protocol, one.port
            )));
        }
        let message = format!("in {} h nothing was used of what it closes", rollout.window_hours);
        self.go_on(rollout, Stage::Canary, &message).await
    }

    /// Reads the counters, and writes down what was used of what this one closes.
    async fn count(&self, rollout: &Rollout) -> Result<(Vec<UseRow>, i64), Failure> {
        let used = self.0.driver.used().await?;
        let mut tx = self.0.pool.begin().await?;
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
        let Some(canaries) = &rollout.canaries else {
            let mut conn = self.0.pool.acquire().await?;
            let most = (rollout.tenants / 100).clamp(1, CANARIES);
            let chosen = store::list_using_plans(&mut conn, rollout, (Pick::Some, false), most).await?;
            let ids: Vec<i64> = chosen.iter().map(|plan| plan.tenant.0).collect();
            store::set_canaries(&mut conn, rollout.id, &ids).await?;
            return Ok(Step::On);
        };
        if canaries.is_empty() {
            return self.go_on(rollout, Stage::All, "nobody is reached first").await;
        }
        if rollout.reached == 0 {
            self.try_before(rollout, Pick::These(canaries)).await?;
            let reached = self.reach(rollout, Some(canaries), CANARIES * 10).await?;
            return match reached {
                0 => {
                    let message = "none of the first tenants uses the service any more";
                    self.go_on(rollout, Stage::All, message).await
                }
                _ => Ok(Step::Wait(SOON, "the first tenants' plans are being made".into())),
            };
        }
        if let Some(step) = self.not_in_force(rollout, Whom::Reached).await? {
            return Ok(step);
        }
        let first = rollout.until.is_none();
        let left = rollout.until.map_or(time::Duration::ZERO, |until| until - OffsetDateTime::now_utc());
        if left.is_positive() {
            let message = format!("the first tenants are looked at; {}", said(rollout));
            return Ok(Step::Wait(left.unsigned_abs().min(COUNTING), message));
        }
        let summary = match self.tried(rollout, "canary", Pick::These(canaries), CANARIES * 10).await? {
            Ok(summary) => summary,
            Err(step) => return Ok(step),
        };
        if first && rollout.observe_seconds > 0 {
            let mut conn = self.0.pool.acquire().await?;
            let progress = (Some(rollout.observe_seconds), summary.as_str());
            store::set_progress(&mut conn, rollout.id, Stage::Canary, progress).await?;
            return Ok(Step::On);
        }
        self.go_on(rollout, Stage::All, &summary).await
    }

    /// Tries, before anybody is reached, what answers: what does not is no fault of the roll-out later.
    async fn try_before(&self, rollout: &Rollout, pick: Pick<'_>) -> Result<(), Failure> {
        let mut conn = self.0.pool.acquire().await?;
        let plans = store::list_using_plans(&mut conn, rollout, (pick, false), CANARIES).await?;
        drop(conn);
        let before = attempt(&*self.0.driver, rollout, &plans, false, &BTreeSet::new()).await?;
        let mut conn = self.0.pool.acquire().await?;
        Ok(store::put_checks(&mut conn, rollout.id, "before", &before.checks).await?)
    }

    /// Reaches tenants, unless somebody has stopped it meanwhile. How many.
    async fn reach(&self, rollout: &Rollout, only: Option<&[i64]>, most: i64) -> Result<usize, Failure> {
        let mut tx = self.0.pool.begin().await?;
        if !store::set_progress(&mut tx, rollout.id, rollout.stage, (None, &rollout.message)).await? {
            return Ok(0);
        }
        let reached = store::reach_tenants(&mut tx, rollout, only, most).await?;
        store::note_tenants(&mut tx, &reached, &rollout.begun_by, &goes_on(rollout)).await?;
        tx.commit().await?;
        fail::fail_point!("rollouts::reached");
        Ok(reached.len())
    }

    /// All others, some at a time, of whom some are tried before the next; then it is what the service says.
    async fn all(&self, rollout: &Rollout) -> Result<Step, Failure> {
        if let Some(step) = self.not_in_force(rollout, Whom::Reached).await? {
            return Ok(step);
        }
        if rollout.reached == 0 {
            self.try_before(rollout, Pick::Some).await?;
        } else if rollout.reached < rollout.tenants
            && let Err(step) = self.tried(rollout, "all", Pick::Last, OF_BATCH).await?
        {
            return Ok(step);
        }
        let reached = self.reach(rollout, None, BATCH).await?;
        if reached > 0 {
            let n = rollout.reached + i64::try_from(reached).unwrap_or(0);
            return Ok(Step::Wait(SOON, format!("{n} of {} tenants are reached", rollout.tenants)));
        }
        match self.tried(rollout, "all", Pick::Some, SAMPLE).await? {
            Ok(summary) => self.finish(rollout, &summary).await,
            Err(step) => Ok(step),
        }
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
        store::leave_tenants(&mut tx, rollout, i64::MAX).await?;
        record(&mut tx, rollout, "rollout.done", json!({"endpoints": rollout.endpoints, "checks": summary}))
            .await?;
        tx.commit().await?;
        fail::fail_point!("rollouts::finished");
        Ok(Step::On)
    }

    /// Takes it back from whom it means something to, some at a time.
    async fn undo(&self, rollout: &Rollout) -> Result<Step, Failure> {
        let message = rollout.message.clone();
        let mut tx = self.0.pool.begin().await?;
        let late = store::find_unsettled(&mut tx, rollout.id, Whom::Left).await?;
        let waits = late.as_ref().is_some_and(|late| late.seconds <= PATIENCE);
        if waits {
            return Ok(Step::Wait(SOON, message));
        }
        let left = store::leave_tenants(&mut tx, rollout, BATCH).await?;
        if !left.is_empty() {
            let words = format!("the roll-out {} of {} is taken back", rollout.id, rollout.service);
            store::note_tenants(&mut tx, &left, ActorId::platform().as_str(), &words).await?;
            tx.commit().await?;
            fail::fail_point!("rollouts::left");
            return Ok(Step::Wait(SOON, message));
        }
        let message = match late {
            None => message,
            Some(late) => format!("{message}; the plans of {} tenant(s) are not in force yet", late.count),
        };
        if store::set_stage(&mut tx, rollout.id, (Stage::Undo, Stage::Over), (None, &message)).await? {
            record(&mut tx, rollout, "rollout.taken-back", json!({"outcome": rollout.outcome})).await?;
        }
        tx.commit().await?;
        Ok(Step::On)
    }

    /// What there is to wait for, or to turn back for, before the next step.
    async fn not_in_force(&self, rollout: &Rollout, whom: Whom) -> Result<Option<Step>, Failure> {
        let mut conn = self.0.pool.acquire().await?;
        if let Some((tenant, why)) = store::find_unproven(&mut conn, rollout.id).await? {
            return Ok(Some(Step::Back(format!("the plan of {tenant} is not proven: {why}"))));
        }
        let Some(late) = store::find_unsettled(&mut conn, rollout.id, whom).await? else { return Ok(None) };
        let words =
            format!("{} tenant(s) whose plan is not in force yet, such as {}", late.count, late.example);
        if late.seconds <= PATIENCE {
            let message = match whom {
                Whom::Reached => format!("{} of {} tenants are reached; ", rollout.reached, rollout.tenants),
                Whom::Watched | Whom::Left => String::new(),
            };
            return Ok(Some(Step::Wait(SOON, format!("{message}waiting for {words}"))));
        }
        // Whoever has let it go on knows of them.
        Ok((!rollout.resumed)
            .then(|| Step::Ask(format!("waited {PATIENCE} s for {words}; resuming goes on without"))))
    }

    /// Tries it, and says what follows if it is not as it must be; else what was tried, in words.
    async fn tried(
        &self,
        rollout: &Rollout,
        stage: &'static str,
        pick: Pick<'_>,
        most: i64,
    ) -> Result<Result<String, Step>, Failure> {
        let mut conn = self.0.pool.acquire().await?;
        let before = store::list_before(&mut conn, rollout.id).await?;
        let known_open = store::list_found_open(&mut conn, rollout.id, stage).await?;
        let plans = store::list_using_plans(&mut conn, rollout, (pick, true), most).await?;
        drop(conn);
        // What answered somebody before answers.
        let word = |before: &Before| format!("{} {} {}", before.network, before.protocol, before.port);
        let alive: BTreeSet<String> = before.iter().filter(|before| before.good).map(word).collect();
        let dead =
            before.iter().filter(|before| !before.good).map(word).filter(|at| !alive.contains(at)).collect();
        let Tried { checks, idle } = attempt(&*self.0.driver, rollout, &plans, true, &dead).await?;
        let checks = self.confirmed(rollout, checks, &dead).await?;
        let mut conn = self.0.pool.acquire().await?;
        store::put_checks(&mut conn, rollout.id, stage, &checks).await?;
        // What must be closed and is not comes first: taking back would not close it. Whoever has let it go on, knows
        // of what was found by then.
        let known = |check: &Check| {
            rollout.resumed && known_open.iter().any(|(app, at)| *app == check.app && *at == place(check))
        };
        if let Some(open) = checks.iter().find(|check| !check.good && !check.open && !known(check)) {
            return Ok(Err(Step::Ask(format!("ALARM: {open}"))));
        }
        if let Some(shut) = checks.iter().find(|check| !check.good && check.open) {
            return Ok(Err(Step::Back(shut.to_string())));
        }
        // An app that could be tried before and cannot now may be what the change has ended. Of the first tenants' that
        // is asked once.
        let asks =
            !rollout.resumed && (stage == "canary" || rollout.canaries.as_ref().is_some_and(Vec::is_empty));
        let ended =
            idle.iter().find(|(app, _)| before.iter().any(|before| before.app == *app && before.good));
        if let Some((_, name)) = ended.filter(|_| asks) {
            return Ok(Err(Step::Ask(format!(
                "{name} ran before and does not now; resuming goes on without"
            ))));
        }
        if checks.is_empty() && !idle.is_empty() && stage == "canary" && !rollout.resumed {
            return Ok(Err(Step::Ask(
                "no app of the first tenants runs that uses the service: nothing can be tried; resuming goes on without"
                    .to_owned(),
            )));
        }
        Ok(Ok(summary(&checks)))
    }

    /// What is not as it must be is tried once more, under the plan that stands then: its tenant may have changed it
    /// in between. What is not wanted any more is no fault.
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
        return "nothing was tried: no app was found running that uses the service".to_owned();
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
