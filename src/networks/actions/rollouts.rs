//! Actions on a running rollout: pause, resume, abort, end the observation window.

use serde_json::json;
use sqlx::{PgConnection, PgPool};

use crate::access::By;
use crate::db::{self, Within};
use crate::error::Error;
use crate::networks::rollouts::{Stage, WORK};
use crate::networks::store::{self, Rollout};
use crate::reconcile::{Waker, enqueue};

async fn find(conn: &mut PgConnection, id: i64) -> Result<Rollout, Error> {
    store::find_rollout(conn, id).await?.ok_or(Error::NotFound)
}

fn not_now(rollout: &Rollout) -> Error {
    Error::Conflict(match rollout.stage {
        Stage::Over => format!("the rollout {} is over", rollout.id),
        Stage::Undo => format!("the rollout {} is rolling back, which cannot be stopped", rollout.id),
        _ => format!("the rollout {} is not paused", rollout.id),
    })
}

/// Pauses a rollout. Tenants that it has reached keep the change, other tenants are not reached.
pub async fn pause(pool: &PgPool, by: By<'_>, id: i64, reason: &str) -> Result<(), Error> {
    let mut tx = db::begin(pool, Within::Platform).await?;
    let rollout = find(&mut tx, id).await?;
    let message = match reason {
        "" => "paused".to_owned(),
        reason => format!("paused: {reason}"),
    };
    if !store::pause(&mut tx, id, by.actor.id.as_str(), &message).await? {
        return if rollout.paused_by.is_some() { Ok(()) } else { Err(not_now(&rollout)) };
    }
    let detail = json!({"rollout": id, "reason": reason});
    by.record(&mut tx, None, "rollout.pause", rollout.service.as_str(), detail).await?;
    tx.commit().await?;
    Ok(())
}

/// Resumes a paused rollout, and accepts the finding for which it was paused.
pub async fn resume(pool: &PgPool, waker: &Waker, by: By<'_>, id: i64, reason: &str) -> Result<(), Error> {
    let mut tx = db::begin(pool, Within::Platform).await?;
    let rollout = find(&mut tx, id).await?;
    if !store::resume(&mut tx, id).await? {
        return Err(not_now(&rollout));
    }
    let detail =
        json!({"rollout": id, "stage": rollout.stage, "in_spite_of": rollout.message, "reason": reason});
    by.record(&mut tx, None, "rollout.resume", rollout.service.as_str(), detail).await?;
    enqueue(&mut tx, WORK, id, None).await?;
    tx.commit().await?;
    waker.wake();
    Ok(())
}

/// Ends an observation window early. The packets counted until now decide.
pub async fn end_window(
    pool: &PgPool,
    waker: &Waker,
    by: By<'_>,
    id: i64,
    reason: &str,
) -> Result<(), Error> {
    let mut tx = db::begin(pool, Within::Platform).await?;
    let rollout = find(&mut tx, id).await?;
    if !store::end_window(&mut tx, id).await? {
        return Err(Error::Conflict(match (rollout.stage, &rollout.paused_by) {
            (Stage::Window, Some(_)) => format!("the rollout {id} is paused. Resume it first"),
            (Stage::Window, None) => format!("the observation window of the rollout {id} is ending already"),
            _ => format!("the rollout {id} has no open observation window"),
        }));
    }
    let left = rollout.until.map_or(0, |until| (until - time::OffsetDateTime::now_utc()).whole_seconds());
    let detail = json!({"rollout": id, "seconds_left": left, "reason": reason});
    by.record(&mut tx, None, "rollout.end-window", rollout.service.as_str(), detail).await?;
    enqueue(&mut tx, WORK, id, None).await?;
    tx.commit().await?;
    waker.wake();
    Ok(())
}

/// Aborts a rollout in any stage and rolls it back.
pub async fn abort(pool: &PgPool, waker: &Waker, by: By<'_>, id: i64, reason: &str) -> Result<(), Error> {
    let mut tx = db::begin(pool, Within::Platform).await?;
    let rollout = find(&mut tx, id).await?;
    let message = if reason.is_empty() { "aborted".to_owned() } else { format!("aborted: {reason}") };
    if !store::abort(&mut tx, id, &message).await? {
        return Err(not_now(&rollout));
    }
    let detail = json!({"rollout": id, "stage": rollout.stage, "reason": reason});
    by.record(&mut tx, None, "rollout.abort", rollout.service.as_str(), detail).await?;
    enqueue(&mut tx, WORK, id, None).await?;
    tx.commit().await?;
    waker.wake();
    Ok(())
}
