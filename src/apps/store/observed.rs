//! Rows of observations and events.

use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;

use crate::apps::{Event, MachineEvent};
use crate::driver::{AppEvent, AppObserved};
use crate::error::Error;
use crate::ids::{AppId, TenantId};

pub(in crate::apps) async fn set_problem(
    conn: &mut PgConnection,
    id: AppId,
    problem: Option<&str>,
) -> Result<(), sqlx::Error> {
    sqlx::query!("UPDATE app SET problem = $2 WHERE id = $1 AND problem IS DISTINCT FROM $2", id.0, problem)
        .execute(conn)
        .await?;
    Ok(())
}

/// Stores an observation. Drops a generation older than the stored one, and writes nothing when nothing
/// changed.
pub(in crate::apps) async fn set_observed(
    conn: &mut PgConnection,
    seen: &AppObserved,
) -> Result<bool, Error> {
    let mut bare = seen.clone();
    bare.events.clear();
    let done = sqlx::query!(
        "UPDATE app SET observed = $2, observed_at = now(), observed_generation = greatest(observed_generation, $3) \
         WHERE id = $1 AND removed_at IS NULL AND observed_generation <= $3 AND generation >= $3 \
         AND (observed IS DISTINCT FROM $2 OR observed_generation < $3)",
        seen.app_id.0,
        Json(&bare) as _,
        seen.generation
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Number of events kept for each app.
const EVENTS_KEPT: i64 = 200;

pub(in crate::apps) async fn insert_events(
    conn: &mut PgConnection,
    app: AppId,
    events: &[AppEvent],
) -> Result<(), Error> {
    if events.is_empty() {
        return Ok(());
    }
    let seqs: Vec<i64> = events.iter().map(|event| i64::try_from(event.seq).unwrap_or(i64::MAX)).collect();
    let ats: Vec<OffsetDateTime> = events.iter().map(|event| event.at).collect();
    let kinds: Vec<String> = events.iter().map(|event| event.kind.clone()).collect();
    let texts: Vec<String> = events.iter().map(|event| event.text.clone()).collect();
    let done = sqlx::query!(
        "INSERT INTO app_event (tenant_id, app_id, seq, at, kind, text) \
         SELECT a.tenant_id, a.id, e.seq, e.at, e.kind, e.text FROM app a, \
         unnest($2::bigint[], $3::timestamptz[], $4::text[], $5::text[]) AS e (seq, at, kind, text) \
         WHERE a.id = $1 ON CONFLICT DO NOTHING",
        app.0,
        &seqs,
        &ats,
        &kinds,
        &texts
    )
    .execute(&mut *conn)
    .await?;
    if done.rows_affected() > 0 {
        sqlx::query!(
            "WITH last AS MATERIALIZED (SELECT m.tenant_id, m.app_id, m.at, m.seq FROM app a \
             JOIN app_event m ON m.tenant_id = a.tenant_id AND m.app_id = a.id WHERE a.id = $1 \
             ORDER BY m.at DESC, m.seq DESC OFFSET $2 LIMIT 1) \
             DELETE FROM app_event e USING last WHERE e.tenant_id = last.tenant_id AND e.app_id = last.app_id \
             AND (e.at, e.seq) <= (last.at, last.seq)",
            app.0,
            EVENTS_KEPT
        )
        .execute(conn)
        .await?;
    }
    Ok(())
}

pub(in crate::apps) async fn insert_machine_events(
    conn: &mut PgConnection,
    events: &[AppEvent],
) -> Result<(), Error> {
    for event in events {
        sqlx::query!(
            "INSERT INTO machine_event (seq, at, kind, text) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
            i64::try_from(event.seq).unwrap_or(i64::MAX),
            event.at,
            event.kind,
            event.text
        )
        .execute(&mut *conn)
        .await?;
    }
    Ok(())
}

/// Lists the machine's events by number, newest first.
pub(in crate::apps) async fn list_machine_events(
    conn: &mut PgConnection,
    before: i64,
    limit: i64,
) -> Result<Vec<MachineEvent>, Error> {
    Ok(sqlx::query_as!(
        MachineEvent,
        "SELECT id, at, kind, text FROM machine_event WHERE id < $1 ORDER BY id DESC LIMIT $2",
        before,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// Lists the events of an app, newest first.
pub(in crate::apps) async fn list_events(
    conn: &mut PgConnection,
    tenant: TenantId,
    app: AppId,
    limit: i64,
) -> Result<Vec<Event>, Error> {
    Ok(sqlx::query_as!(
        Event,
        "SELECT at, kind, text FROM app_event WHERE tenant_id = $1 AND app_id = $2 ORDER BY at DESC, seq DESC LIMIT $3",
        tenant.0,
        app.0,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// Lists the apps that the driver should know, in pages by id.
pub(in crate::apps) async fn list_expected(
    conn: &mut PgConnection,
    after: i64,
    limit: i64,
) -> Result<Vec<(AppId, TenantId, i64)>, Error> {
    let rows = sqlx::query!(
        "SELECT id, tenant_id, generation FROM app WHERE removed_at IS NULL AND deleted_at IS NULL AND id > $1 \
         AND observed_generation > 0 ORDER BY id LIMIT $2",
        after,
        limit
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (AppId(row.id), TenantId(row.tenant_id), row.generation)).collect())
}

/// Counts the names of refused fields.
pub(in crate::apps) async fn count_refused(conn: &mut PgConnection, names: &[String]) -> Result<(), Error> {
    sqlx::query!(
        "INSERT INTO refused_field (name) SELECT DISTINCT n FROM unnest($1::text[]) n ORDER BY n \
         ON CONFLICT (name) DO UPDATE SET count = refused_field.count + 1, last_at = now()",
        names
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Removes machine events older than 30 days or beyond the newest 100,000, and all refused field names except
/// the 500 most frequent.
pub(in crate::apps) async fn prune(conn: &mut PgConnection) -> Result<(), Error> {
    sqlx::query!(
        "DELETE FROM machine_event \
         WHERE at < now() - interval '30 days' OR id <= (SELECT max(id) - 100000 FROM machine_event)"
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query!(
        "DELETE FROM refused_field WHERE name IN (SELECT name FROM refused_field ORDER BY count DESC, last_at DESC OFFSET 500)"
    )
    .execute(conn)
    .await?;
    Ok(())
}
