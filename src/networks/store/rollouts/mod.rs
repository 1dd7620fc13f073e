//! Rollouts and their progress. `reach.rs` tracks the tenants that a rollout has reached, `evidence.rs`
//! recorded use and probe results.

use serde::Serialize;
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;

use crate::error::Error;
use crate::ids::ServiceName;
use crate::networks::Endpoint;
use crate::networks::rollouts::Stage;

mod evidence;
mod reach;

pub(in crate::networks) use evidence::*;
pub(in crate::networks) use reach::*;

/// A rollout.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Rollout {
    /// Number.
    pub id: i64,
    #[serde(skip)]
    pub service_id: i64,
    /// Service.
    pub service: ServiceName,
    /// The service's description after the rollout.
    pub description: String,
    /// Endpoints of tenants that the rollout has not reached.
    pub before: Json<Vec<Endpoint>>,
    /// Endpoints of tenants that the rollout has reached.
    pub endpoints: Json<Vec<Endpoint>>,
    /// Length of the observation window, in hours.
    pub window_hours: i32,
    /// How long canary tenants are observed, in seconds.
    pub observe_seconds: i32,
    #[serde(skip)]
    pub canaries: Option<Vec<i64>>,
    /// The canary tenants, as far as they are chosen.
    #[serde(rename = "canaries")]
    pub canary_names: Vec<String>,
    /// `window`, `canary`, `all`, `undo`, `over`.
    pub stage: Stage,
    /// `done`, `aborted` or `rolled_back`, once it is decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    /// When the stage began.
    #[serde(with = "time::serde::rfc3339")]
    pub stage_at: OffsetDateTime,
    /// Earliest end of the stage.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub until: Option<OffsetDateTime>,
    /// Actor who paused it; `platform` if the rollout paused itself and needs approval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused_by: Option<String>,
    #[serde(skip)]
    pub resumed: bool,
    /// Its status, for people.
    pub message: String,
    /// Actor who started it.
    pub begun_by: String,
    /// When it was started.
    #[serde(with = "time::serde::rfc3339")]
    pub begun_at: OffsetDateTime,
    /// When it ended.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<OffsetDateTime>,
    /// Number of tenants that it has reached; absent once it is over.
    #[serde(skip_serializing_if = "is_none")]
    pub reached: i64,
    /// Number of tenants that may use the service; absent once it is over.
    #[serde(skip_serializing_if = "is_none")]
    pub tenants: i64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "this is how it is asked")]
fn is_none(count: &i64) -> bool {
    *count < 0
}

/// Lists rollouts by number, the newest first.
pub(in crate::networks) async fn list_rollouts(
    conn: &mut PgConnection,
    before: i64,
    limit: i64,
) -> Result<Vec<Rollout>, Error> {
    Ok(sqlx::query_as!(
        Rollout,
        r#"SELECT r.id, r.service_id, r.service AS "service: ServiceName", r.description,
           r.before AS "before: Json<Vec<Endpoint>>", r.endpoints AS "endpoints: Json<Vec<Endpoint>>",
           r.window_hours, r.observe_seconds, r.canaries,
           ARRAY(SELECT t.name FROM tenant t WHERE t.id = ANY (r.canaries) ORDER BY t.name) AS "canary_names!",
           r.stage AS "stage: Stage", r.outcome, r.stage_at, r.until, r.paused_by, r.resumed, r.message, r.begun_by,
           r.begun_at, r.ended_at,
           CASE WHEN r.stage = 'over' THEN -1
                ELSE (SELECT count(*) FROM tenant_service u WHERE u.rollout_id = r.id) END AS "reached!",
           CASE WHEN r.stage = 'over' THEN -1
                ELSE (SELECT count(*) FROM tenant_service u WHERE u.service_id = r.service_id) END AS "tenants!"
           FROM network_rollout r WHERE r.id < $1 ORDER BY r.id DESC LIMIT $2"#,
        before,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// Returns one rollout.
pub(in crate::networks) async fn find_rollout(
    conn: &mut PgConnection,
    id: i64,
) -> Result<Option<Rollout>, Error> {
    let found = list_rollouts(conn, id.saturating_add(1), 1).await?;
    Ok(found.into_iter().find(|rollout| rollout.id == id))
}

/// Returns the running rollout of a service.
pub(in crate::networks) async fn find_under_way(
    conn: &mut PgConnection,
    service: i64,
) -> Result<Option<Rollout>, Error> {
    let id = sqlx::query_scalar!(
        "SELECT id FROM network_rollout WHERE service_id = $1 AND stage <> 'over'",
        service
    )
    .fetch_optional(&mut *conn)
    .await?;
    match id {
        Some(id) => find_rollout(conn, id).await,
        None => Ok(None),
    }
}

/// A new rollout.
pub(in crate::networks) struct NewRollout<'a> {
    pub(in crate::networks) service_id: i64,
    pub(in crate::networks) service: &'a ServiceName,
    pub(in crate::networks) description: &'a str,
    pub(in crate::networks) before: &'a [Endpoint],
    pub(in crate::networks) endpoints: &'a [Endpoint],
    pub(in crate::networks) window_hours: i32,
    pub(in crate::networks) observe_seconds: i32,
    pub(in crate::networks) canaries: Option<&'a [i64]>,
}

pub(in crate::networks) async fn insert_rollout(
    conn: &mut PgConnection,
    new: &NewRollout<'_>,
    who: &str,
) -> Result<i64, Error> {
    let id = sqlx::query_scalar!(
        "INSERT INTO network_rollout (service_id, service, description, before, endpoints, window_hours, \
         observe_seconds, canaries, stage, until, begun_by) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, CASE WHEN $6 > 0 THEN 'window' ELSE 'canary' END, \
         CASE WHEN $6 > 0 THEN now() + make_interval(hours => $6) END, $9) RETURNING id",
        new.service_id,
        new.service.as_str(),
        new.description,
        serde_json::json!(new.before),
        serde_json::json!(new.endpoints),
        new.window_hours,
        new.observe_seconds,
        new.canaries,
        who
    )
    .fetch_one(conn)
    .await?;
    Ok(id)
}

/// Moves to another stage, unless the rollout was paused or aborted meanwhile. Returns whether it moved.
pub(in crate::networks) async fn set_stage(
    conn: &mut PgConnection,
    id: i64,
    (from, to): (Stage, Stage),
    (outcome, message): (Option<&str>, &str),
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE network_rollout SET stage = $3, stage_at = now(), until = NULL, resumed = false, \
         outcome = coalesce($4, outcome), \
         message = CASE WHEN $5 = '' THEN message ELSE $5 END, \
         ended_at = CASE WHEN $3 = 'over' THEN now() END \
         WHERE id = $1 AND stage = $2 AND paused_at IS NULL",
        id,
        from.as_str(),
        to.as_str(),
        outcome,
        message
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Sets the status and the earliest end of the stage. Returns whether the stage is still running.
pub(in crate::networks) async fn set_progress(
    conn: &mut PgConnection,
    id: i64,
    stage: Stage,
    (observe, message): (Option<i32>, &str),
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE network_rollout SET message = $4, until = coalesce(now() + make_interval(secs => $3), until) \
         WHERE id = $1 AND stage = $2 AND paused_at IS NULL",
        id,
        stage.as_str(),
        observe.map(f64::from),
        message
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Records why the rollout does not continue.
pub(in crate::networks) async fn set_message(
    conn: &mut PgConnection,
    id: i64,
    message: &str,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE network_rollout SET message = $2 WHERE id = $1 AND stage <> 'over' AND paused_at IS NULL",
        id,
        message
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Stores the chosen canary tenants.
pub(in crate::networks) async fn set_canaries(
    conn: &mut PgConnection,
    id: i64,
    canaries: &[i64],
) -> Result<(), Error> {
    sqlx::query!("UPDATE network_rollout SET canaries = $2 WHERE id = $1", id, canaries)
        .execute(conn)
        .await?;
    Ok(())
}

/// Pauses a rollout. Returns whether it was running.
pub(in crate::networks) async fn pause(
    conn: &mut PgConnection,
    id: i64,
    who: &str,
    message: &str,
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE network_rollout SET paused_by = $2, paused_at = now(), \
         message = CASE WHEN $3 = '' THEN message ELSE $3 END \
         WHERE id = $1 AND paused_at IS NULL AND stage IN ('window', 'canary', 'all')",
        id,
        who,
        message
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Adds a finding to a rollout that was paused while a step ran, for the user who resumes it. Returns whether
/// it is new.
pub(in crate::networks) async fn note_paused(
    conn: &mut PgConnection,
    id: i64,
    message: &str,
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE network_rollout SET message = $2 || '; ' || message \
         WHERE id = $1 AND paused_at IS NOT NULL AND stage IN ('window', 'canary', 'all') \
         AND position($2 IN message) = 0",
        id,
        message
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Ends an observation window now. Returns whether one was open.
pub(in crate::networks) async fn end_window(conn: &mut PgConnection, id: i64) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE network_rollout SET until = now() \
         WHERE id = $1 AND stage = 'window' AND until > now() AND paused_at IS NULL",
        id
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Resumes a rollout. An observation window that has ended and waits for approval moves on to the canary
/// stage. A window that a user paused is extended by the pause. Returns whether the rollout was paused.
pub(in crate::networks) async fn resume(conn: &mut PgConnection, id: i64) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE network_rollout SET paused_by = NULL, paused_at = NULL, message = '', resumed = true, stage_at = now(), \
         stage = CASE WHEN stage = 'window' AND until <= now() AND paused_by = 'platform' THEN 'canary' ELSE stage END, \
         until = CASE WHEN stage <> 'window' OR (until <= now() AND paused_by = 'platform') THEN NULL \
                 WHEN paused_by = 'platform' THEN until ELSE until + (now() - paused_at) END \
         WHERE id = $1 AND paused_at IS NOT NULL AND stage IN ('window', 'canary', 'all')",
        id
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Aborts a rollout. Returns whether there was one to abort.
pub(in crate::networks) async fn abort(
    conn: &mut PgConnection,
    id: i64,
    message: &str,
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE network_rollout SET stage = 'undo', outcome = 'aborted', stage_at = now(), until = NULL, resumed = false, \
         paused_by = NULL, paused_at = NULL, message = $2 WHERE id = $1 AND stage IN ('window', 'canary', 'all')",
        id,
        message
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Deletes rollouts that ended over 90 days ago.
pub(in crate::networks) async fn prune_rollouts(conn: &mut PgConnection) -> Result<(), Error> {
    sqlx::query!(
        "DELETE FROM network_rollout WHERE stage = 'over' AND ended_at < now() - interval '90 days'"
    )
    .execute(conn)
    .await?;
    Ok(())
}
