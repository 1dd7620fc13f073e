//! Tables of the audit log. Insert-only: only the table's owner has further rights.

use serde_json::{Value, json};
use sqlx::{PgConnection, PgPool};

use super::{AuditEvent, Refusals};
use crate::db;
use crate::error::Error;
use crate::quotas::{self, Amount, Resource};

mod list;
mod seals;

pub use list::{Filter, list};
pub(super) use seals::*;

/// Inserts an event. An event that counts against its tenant's daily quota is refused when the quota is used
/// up; the caller's transaction then changes nothing. The count is part of the same statement.
pub(super) async fn insert_event(conn: &mut PgConnection, event: &AuditEvent<'_>) -> Result<(), Error> {
    let counts = event.tenant.is_some() && counts(event);
    let done = sqlx::query_scalar!(
        r#"WITH today AS (SELECT (now() AT TIME ZONE 'UTC')::date AS day),
           taken AS (UPDATE quota q SET used = CASE WHEN q.since = t.day THEN q.used + 1 ELSE 1 END, since = t.day
             FROM quota_default d, today t WHERE $8::boolean AND q.tenant_id = $1 AND q.resource = 'changes_per_day'
             AND d.resource = q.resource AND (q.since IS DISTINCT FROM t.day OR q.used < coalesce(q.limit_, d.limit_))
             RETURNING 1),
           put AS (INSERT INTO audit (tenant_id, actor, via, action, object, request_id, detail)
             SELECT $1, $2, $3, $4, $5, $6, $7)
           SELECT NOT $8::boolean OR EXISTS (SELECT FROM taken) OR NOT EXISTS
             (SELECT FROM quota WHERE tenant_id = $1 AND resource = 'changes_per_day') AS "done!""#,
        event.tenant.map(|id| id.0),
        event.actor.as_str(),
        event.actor.via(),
        event.action,
        event.object,
        event.request_id,
        event.detail,
        counts
    )
    .fetch_one(&mut *conn)
    .await?;
    match event.tenant {
        Some(tenant) if !done => {
            let limit = quotas::limit(conn, tenant, Resource::ChangesPerDay).await?;
            Err(quotas::exceeded(Resource::ChangesPerDay, Amount { limit, used: limit }, 1))
        }
        _ => Ok(()),
    }
}

/// Whether an event counts against its tenant's daily quota. Events that delete or revoke do not count: each
/// follows a counted event, and a tenant must always be able to revoke. Actions of admins and of the platform
/// do not count.
fn counts(event: &AuditEvent<'_>) -> bool {
    let (noun, verb) = event.action.split_once('.').unwrap_or((event.action, ""));
    let ends =
        ["delete", "removed", "remove", "revoke", "end", "withdraw", "decline", "take", "approve", "refuse"];
    !ends.contains(&verb)
        && !["tenant", "service", "rollout", "session", "account"].contains(&noun)
        && event.actor.as_str() != crate::ids::ActorId::platform().as_str()
}

pub(super) async fn insert_refusals(conn: &mut PgConnection, batch: &Refusals) -> Result<(), Error> {
    let tenants: Vec<Option<i64>> = batch.keys().map(|refusal| refusal.tenant.map(|id| id.0)).collect();
    let clean = |text: &str| text.chars().filter(|c| !c.is_control()).take(200).collect::<String>();
    let actors: Vec<String> = batch.keys().map(|refusal| clean(&refusal.actor)).collect();
    let vias: Vec<Option<String>> = batch.keys().map(|refusal| refusal.via.as_deref().map(clean)).collect();
    let objects: Vec<String> = batch.keys().map(|refusal| clean(&refusal.object)).collect();
    let details: Vec<Value> = batch
        .iter()
        .map(|(refusal, count)| json!({"reason": refusal.reason, "from": refusal.place, "count": count}))
        .collect();
    sqlx::query!(
        "INSERT INTO audit (tenant_id, actor, via, action, object, result, request_id, detail) \
         SELECT t, a, v, 'access.denied', o, 'denied', 'batch', d \
         FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::jsonb[]) AS x (t, a, v, o, d)",
        &tenants as &[Option<i64>],
        &actors,
        &vias as &[Option<String>],
        &objects,
        &details
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Creates the partitions of the coming months.
pub async fn prepare_months(pool: &PgPool) -> Result<(), Error> {
    let mut conn = pool.acquire().await?;
    sqlx::query_scalar!("SELECT audit_prepare_months()").fetch_one(&mut *conn).await?;
    Ok(())
}

/// Retires the oldest month if it ended more than `months` months ago, and records that in the audit log.
pub async fn retire_months(pool: &PgPool, months: u32) -> Result<(), Error> {
    let mut tx = db::begin_for_all(pool).await?;
    let months = i32::try_from(months).unwrap_or(i32::MAX);
    let due = sqlx::query_scalar!(
        r#"SELECT (date_trunc('month', min(at)))::date AS "month?" FROM audit
           HAVING date_trunc('month', min(at)) + interval '1 month' < now() - make_interval(months => $1)"#,
        months
    )
    .fetch_optional(&mut *tx)
    .await?
    .flatten();
    let Some(month) = due else { return Ok(()) };
    let rows =
        sqlx::query_scalar!(r#"SELECT audit_retire_month($1) AS "rows!""#, month).fetch_one(&mut *tx).await?;
    let actor = crate::ids::ActorId::platform();
    let event = AuditEvent {
        tenant: None,
        actor: &actor,
        action: "audit.retire",
        object: &month.to_string(),
        request_id: "housekeeping",
        detail: json!({"rows": rows}),
    };
    insert_event(&mut tx, &event).await?;
    tx.commit().await?;
    Ok(())
}
