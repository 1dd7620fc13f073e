//! The work table: claimed in batches, fair between tenants, fenced by epochs. Only the clock of the database
//! counts.

use std::collections::HashMap;

use sqlx::{PgConnection, PgPool};

use super::{Failure, Lease, Outcome};
use crate::ids::TenantId;

/// Enqueues work for an object of a tenant, or (none) of the platform itself. Call it in the transaction that
/// changes the object.
pub async fn enqueue(
    conn: &mut PgConnection,
    kind: &str,
    object_id: i64,
    tenant: impl Into<Option<TenantId>>,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "INSERT INTO work (kind, object_id, tenant_id) VALUES ($1, $2, $3) \
         ON CONFLICT (kind, object_id) DO UPDATE SET wake = work.wake + 1, \
         due_at = least(work.due_at, now()), parked_at = NULL, attempt = 0",
        kind,
        object_id,
        tenant.into().map(|tenant| tenant.0)
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Makes idle objects of a kind due within a number of seconds, spread out, because something outside may have
/// changed.
pub async fn bring_forward(conn: &mut PgConnection, kind: &str, seconds: f64) -> Result<(), sqlx::Error> {
    // An object in progress is due when its claim ends, and stays so.
    sqlx::query!(
        "UPDATE work SET due_at = now() + make_interval(secs => $2::float8 * random()) \
         WHERE kind = $1 AND parked_at IS NULL AND due_at > now() + make_interval(secs => $2::float8 + $3::float8)",
        kind,
        seconds,
        LEASE_SECONDS
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A claimed row.
pub(super) struct LeasedRow {
    pub(super) kind: String,
    pub(super) tenant: i64,
    pub(super) lease: Lease,
}

/// Seconds until a claim ends if it is not renewed.
pub(super) const LEASE_SECONDS: f64 = 20.0;

/// Claims up to `limit` due objects, at most `per_tenant` of one tenant. Objects in progress (`busy`) count too.
pub(super) async fn claim(
    pool: &PgPool,
    limit: i64,
    per_tenant: i64,
    busy: &HashMap<i64, i64>,
) -> Result<Vec<LeasedRow>, sqlx::Error> {
    let (tenants, counts): (Vec<i64>, Vec<i64>) = busy.iter().unzip();
    let rows = sqlx::query!(
        r#"WITH due AS (
               SELECT kind, object_id, coalesce(tenant_id, 0) AS tenant_id, due_at FROM work
               WHERE parked_at IS NULL AND due_at <= now() AND coalesce(tenant_id, 0) NOT IN
                 (SELECT b.t FROM unnest($4::bigint[], $5::bigint[]) AS b (t, n) WHERE b.n >= $2)
               ORDER BY due_at LIMIT 500
           ), fair AS (
               SELECT kind, object_id, due_at,
                      row_number() OVER (PARTITION BY tenant_id ORDER BY due_at) + coalesce(b.n, 0) AS place
               FROM due LEFT JOIN unnest($4::bigint[], $5::bigint[]) AS b (t, n) ON b.t = tenant_id
           ), picked AS (
               SELECT w.kind, w.object_id FROM work w JOIN fair f USING (kind, object_id)
               WHERE f.place <= $2 AND w.parked_at IS NULL AND w.due_at <= now()
               ORDER BY f.due_at LIMIT $1 FOR UPDATE OF w SKIP LOCKED
           )
           UPDATE work w SET due_at = now() + make_interval(secs => $3), epoch = w.epoch + 1,
                  seen = w.wake, attempt = w.attempt + 1
           FROM picked p WHERE w.kind = p.kind AND w.object_id = p.object_id
           RETURNING w.kind, w.object_id, coalesce(w.tenant_id, 0) AS "tenant_id!", w.epoch, w.attempt"#,
        limit,
        per_tenant,
        LEASE_SECONDS,
        &tenants,
        &counts
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| LeasedRow {
            kind: row.kind,
            tenant: row.tenant_id,
            lease: Lease { object_id: row.object_id, epoch: row.epoch, attempt: row.attempt },
        })
        .collect())
}

/// Extends a claim. False if the claim was lost.
pub(super) async fn renew(pool: &PgPool, kind: &str, lease: Lease) -> Result<bool, sqlx::Error> {
    let done = sqlx::query!(
        "UPDATE work SET due_at = now() + make_interval(secs => $4) \
         WHERE kind = $1 AND object_id = $2 AND epoch = $3",
        kind,
        lease.object_id,
        lease.epoch,
        LEASE_SECONDS
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Stores the result. False if the claim was lost; the result is then dropped. A wake during the work makes the
/// object due at once.
pub(super) async fn finish(
    pool: &PgPool,
    kind: &str,
    lease: Lease,
    result: &Result<Outcome, Failure>,
) -> Result<bool, sqlx::Error> {
    let (seconds, parked, class, error) = match result {
        Ok(Outcome::Gone) => {
            let done = sqlx::query!(
                "DELETE FROM work WHERE kind = $1 AND object_id = $2 AND epoch = $3 AND wake = seen",
                kind,
                lease.object_id,
                lease.epoch
            )
            .execute(pool)
            .await?;
            return Ok(done.rows_affected() == 1);
        }
        // Every object is reconciled again within ten minutes, spread out.
        Ok(Outcome::Settled) => (480.0 + 120.0 * rand::random::<f64>(), false, None, None),
        Ok(Outcome::Again(after)) => (after.as_secs_f64(), false, None, None),
        Err(Failure::Transient(text)) => {
            let most = f64::from(lease.attempt.clamp(1, 9)).exp2().min(300.0);
            (0.5 + most * rand::random::<f64>(), false, Some("transient"), Some(text.as_str()))
        }
        Err(Failure::Permanent(text)) => (0.0, true, Some("permanent"), Some(text.as_str())),
    };
    let good = result.is_ok();
    let done = sqlx::query!(
        "UPDATE work SET due_at = CASE WHEN wake = seen THEN now() + make_interval(secs => $4) ELSE now() END, \
         parked_at = CASE WHEN $5 AND wake = seen THEN now() END, \
         attempt = CASE WHEN $6 THEN 0 ELSE attempt END, error_class = $7, error = $8 \
         WHERE kind = $1 AND object_id = $2 AND epoch = $3",
        kind,
        lease.object_id,
        lease.epoch,
        seconds,
        parked,
        good,
        class,
        error
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected() == 1)
}
