//! The audit table. Insert-only: nobody but its owner could do more.

use serde_json::{Value, json};
use sqlx::{PgConnection, PgPool};

use super::{Event, Refusals};
use crate::error::Error;

mod list;
mod seals;

pub use list::{Filter, list};
pub(super) use seals::*;

pub(super) async fn insert_event(conn: &mut PgConnection, event: &Event<'_>) -> Result<(), Error> {
    sqlx::query!(
        "INSERT INTO audit (tenant_id, actor, via, action, object, request_id, detail) VALUES ($1, $2, $3, $4, $5, $6, $7)",
        event.tenant.map(|id| id.0),
        event.actor.as_str(),
        event.actor.via(),
        event.action,
        event.object,
        event.request_id,
        event.detail,
    )
    .execute(conn)
    .await?;
    Ok(())
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

/// Makes the months that are to come.
pub async fn prepare_months(pool: &PgPool) -> Result<(), Error> {
    let mut conn = pool.acquire().await?;
    sqlx::query_scalar!("SELECT audit_prepare_months()").fetch_one(&mut *conn).await?;
    Ok(())
}

/// Gives up every month that ended more than `months` months ago, a trace of it in the audit itself.
pub async fn retire_months(pool: &PgPool, months: u32) -> Result<(), Error> {
    let mut tx = pool.begin().await?;
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
    let event = Event {
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
