//! Rows of limits and use. Each change happens under the row's lock, in the caller's transaction.

use sqlx::PgConnection;
use sqlx::types::Json;

use super::{Amount, GATE, LockedResource, Quota, QuotaLimit, QuotaLimits, Resource, exceeded};
use crate::config;
use crate::error::Error;
use crate::ids::TenantId;

mod counts;

pub use counts::{prune, read_counted, take_place, take_platform_place};

/// Inserts a row of every resource for a new tenant, and sets its own limits.
pub async fn insert_rows(
    conn: &mut PgConnection,
    tenant: TenantId,
    limits: &QuotaLimits,
) -> Result<(), Error> {
    let names: Vec<String> = Resource::of_tenants().map(|resource| resource.name().to_owned()).collect();
    sqlx::query!(
        "INSERT INTO quota (tenant_id, resource) SELECT $1, r FROM unnest($2::text[]) r ON CONFLICT DO NOTHING",
        tenant.0,
        &names
    )
    .execute(&mut *conn)
    .await?;
    set_limits(conn, tenant, limits).await
}

/// Sets the given limits of a tenant.
pub async fn set_limits(
    conn: &mut PgConnection,
    tenant: TenantId,
    limits: &QuotaLimits,
) -> Result<(), Error> {
    enter(conn, tenant).await?;
    let names: Vec<String> = limits.iter().map(|(resource, _)| resource.name().to_owned()).collect();
    let values: Vec<Option<i64>> = limits
        .iter()
        .map(|(_, limit)| match limit {
            QuotaLimit::Own(n) => Some(n),
            QuotaLimit::Default => None,
        })
        .collect();
    sqlx::query!(
        "INSERT INTO quota (tenant_id, resource, limit_) SELECT $1, r, n \
         FROM unnest($2::text[], $3::bigint[]) AS x (r, n) \
         ON CONFLICT (tenant_id, resource) DO UPDATE SET limit_ = excluded.limit_",
        tenant.0,
        &names,
        &values as &[Option<i64>]
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Stores the limits of the settings when `serve` starts.
pub async fn declare(conn: &mut PgConnection, limits: &config::Limits) -> Result<(), Error> {
    let rows: Vec<(Resource, i64)> = defaults(limits);
    let names: Vec<String> = rows.iter().map(|(resource, _)| resource.name().to_owned()).collect();
    let values: Vec<i64> = rows.iter().map(|(_, n)| *n).collect();
    sqlx::query!(
        "INSERT INTO quota_default AS d (resource, limit_) SELECT * FROM unnest($1::text[], $2::bigint[]) AS x (r, n) \
         ORDER BY r ON CONFLICT (resource) DO UPDATE SET limit_ = excluded.limit_ WHERE d.limit_ <> excluded.limit_",
        &names,
        &values
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Returns the limits of the settings by resource, without those that each tenant sets at onboarding.
fn defaults(limits: &config::Limits) -> Vec<(Resource, i64)> {
    Resource::ALL.iter().filter_map(|resource| Some((*resource, limits.of(resource.name())?))).collect()
}

/// Locks the gate of a tenant, for a transaction that changes several resources.
pub async fn enter(conn: &mut PgConnection, tenant: TenantId) -> Result<(), Error> {
    lock(conn, tenant, GATE).await.map(drop)
}

/// Locks one resource of a tenant until the transaction ends. Returns its limit and stored use.
pub async fn lock(
    conn: &mut PgConnection,
    tenant: TenantId,
    resource: Resource,
) -> Result<LockedResource, Error> {
    for _ in 0..2 {
        let row = sqlx::query!(
            r#"SELECT coalesce(q.limit_, d.limit_) AS "limit!", q.used FROM quota q JOIN quota_default d USING (resource)
               WHERE q.tenant_id = $1 AND q.resource = $2 FOR UPDATE OF q"#,
            tenant.0,
            resource.name()
        )
        .fetch_optional(&mut *conn)
        .await?;
        if let Some(row) = row {
            return Ok(LockedResource { resource, amount: Amount { limit: row.limit, used: row.used } });
        }
        // The resource is newer than the tenant.
        sqlx::query!(
            "INSERT INTO quota (tenant_id, resource) VALUES ($1, $2) ON CONFLICT DO NOTHING",
            tenant.0,
            resource.name()
        )
        .execute(&mut *conn)
        .await?;
    }
    Err(Error::internal(format!("tenant {} has no row of {resource}", tenant.0)))
}

/// Locks a resource of the platform itself until the transaction ends.
pub async fn lock_platform(conn: &mut PgConnection, resource: Resource) -> Result<LockedResource, Error> {
    let limit = sqlx::query_scalar!(
        "SELECT limit_ FROM quota_default WHERE resource = $1 FOR UPDATE",
        resource.name()
    )
    .fetch_one(conn)
    .await?;
    Ok(LockedResource { resource, amount: Amount { limit, used: 0 } })
}

/// Reserves an amount of a resource. Returns an error with the numbers if it does not fit.
pub async fn reserve(
    conn: &mut PgConnection,
    tenant: TenantId,
    resource: Resource,
    amount: i64,
) -> Result<(), Error> {
    let held = lock(conn, tenant, resource).await?;
    if amount < 0 {
        return Err(Error::internal(format!("{amount} of {resource} cannot be reserved")));
    }
    if amount > held.amount.limit.saturating_sub(held.amount.used) {
        return Err(exceeded(resource, held.amount, amount));
    }
    add_used(conn, tenant, &[(resource, amount)]).await
}

/// Releases an amount of a resource. The use never falls below 0.
pub async fn release(
    conn: &mut PgConnection,
    tenant: TenantId,
    resource: Resource,
    amount: i64,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE quota SET used = greatest(0, used - greatest(0, $3::bigint)) WHERE tenant_id = $1 AND resource = $2",
        tenant.0,
        resource.name(),
        amount
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Adds to the use of resources whose rows (or the gate) the transaction has locked, in one statement. Writes
/// nothing if nothing changes. The table rejects a use below 0.
pub async fn add_used(
    conn: &mut PgConnection,
    tenant: TenantId,
    changes: &[(Resource, i64)],
) -> Result<(), Error> {
    let changes: Vec<&(Resource, i64)> = changes.iter().filter(|(_, n)| *n != 0).collect();
    if changes.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = changes.iter().map(|(resource, _)| resource.name().to_owned()).collect();
    let amounts: Vec<i64> = changes.iter().map(|(_, n)| *n).collect();
    sqlx::query!(
        "UPDATE quota q SET used = q.used + x.n FROM unnest($2::text[], $3::bigint[]) AS x (r, n) \
         WHERE q.tenant_id = $1 AND q.resource = x.r",
        tenant.0,
        &names,
        &amounts
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Locks a counted resource and requires room for one more beside `count`. Correct only if `count` was taken
/// under a lock that every writer of these rows holds. Otherwise use [`lock`], count, [`LockedResource::require_place`].
pub async fn check_count(
    conn: &mut PgConnection,
    tenant: TenantId,
    resource: Resource,
    count: i64,
) -> Result<(), Error> {
    lock(conn, tenant, resource).await?.require_place(count)
}

/// Checks that a tenant may make one more change today. The change itself counts when it is recorded.
pub async fn check_day(conn: &mut PgConnection, tenant: TenantId) -> Result<(), Error> {
    let day = sqlx::query!(
        r#"SELECT coalesce(q.limit_, d.limit_) AS "limit!", q.used,
           q.since IS NOT DISTINCT FROM (now() AT TIME ZONE 'UTC')::date AS "today!"
           FROM quota q JOIN quota_default d USING (resource) WHERE q.tenant_id = $1 AND q.resource = 'changes_per_day'"#,
        tenant.0
    )
    .fetch_optional(conn)
    .await?;
    match day {
        Some(day) if day.today && day.used >= day.limit => {
            let amount = Amount { limit: day.limit, used: day.used };
            Err(exceeded(Resource::ChangesPerDay, amount, 1))
        }
        _ => Ok(()),
    }
}

/// Returns the effective limit, without a lock.
pub async fn limit(conn: &mut PgConnection, tenant: TenantId, resource: Resource) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT coalesce((SELECT q.limit_ FROM quota q WHERE q.tenant_id = $1 AND q.resource = $2), d.limit_) AS "limit!"
           FROM quota_default d WHERE d.resource = $2"#,
        tenant.0,
        resource.name()
    )
    .fetch_one(conn)
    .await?)
}

/// Returns every limit of a tenant with its stored use. Counted resources show 0.
pub async fn read(conn: &mut PgConnection, tenant: TenantId) -> Result<Quota, Error> {
    let Json(quota) = sqlx::query_scalar!(
        r#"SELECT coalesce(jsonb_object_agg(q.resource,
                  jsonb_build_object('limit', coalesce(q.limit_, d.limit_), 'used', CASE WHEN q.since < (now() AT TIME ZONE 'UTC')::date
                  THEN 0 ELSE q.used END)), '{}') AS "quota!: Json<Quota>"
           FROM quota q JOIN quota_default d USING (resource) WHERE q.tenant_id = $1"#,
        tenant.0
    )
    .fetch_one(conn)
    .await?;
    Ok(quota)
}
