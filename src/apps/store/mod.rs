//! Database rows of apps, releases, addresses and observations.

use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;

use super::reservation::Reserved;
use super::{App, Peak};
use crate::driver::AppObserved;
use crate::error::Error;
use crate::ids::{AppId, AppName, TenantId};
use crate::quotas::{self, Amount, Quota, Resource};
use crate::uid_ranges::Block;

mod addresses;
mod observed;
mod releases;

pub(super) use {addresses::*, observed::*, releases::*};

struct AppRow {
    id: i64,
    tenant_id: i64,
    name: AppName,
    generation: i64,
    observed_generation: i64,
    revision: i64,
    peak_instances: i64,
    peak_surge: i64,
    peak_cpu_millis: i64,
    peak_memory: i64,
    reserved_cpu: Option<i64>,
    reserved_memory: Option<i64>,
    uid_start: i64,
    uid_size: i64,
    observed: Option<Json<AppObserved>>,
    observed_at: Option<OffsetDateTime>,
    problem: Option<String>,
    created_at: OffsetDateTime,
    changed_at: OffsetDateTime,
    deleted_at: Option<OffsetDateTime>,
}

impl From<AppRow> for App {
    fn from(row: AppRow) -> Self {
        let peak = Peak {
            instances: row.peak_instances,
            surge: row.peak_surge,
            cpu_millis: row.peak_cpu_millis,
            memory: row.peak_memory,
        };
        Self {
            id: AppId(row.id),
            tenant_id: TenantId(row.tenant_id),
            name: row.name,
            generation: row.generation,
            observed_generation: row.observed_generation,
            revision: row.revision,
            peak,
            reserved: reserved(peak, row.reserved_cpu, row.reserved_memory),
            uid_start: row.uid_start,
            uid_size: row.uid_size,
            observed: row.observed.map(|Json(observed)| observed),
            observed_at: row.observed_at,
            problem: row.problem,
            created_at: row.created_at,
            changed_at: row.changed_at,
            deleted_at: row.deleted_at,
        }
    }
}

/// Returns the reservation of a row: its own sums, or the product of its peak.
fn reserved(peak: Peak, cpu: Option<i64>, memory: Option<i64>) -> Reserved {
    let product = peak.reserved();
    Reserved {
        cpu: cpu.unwrap_or(product.cpu),
        memory: memory.unwrap_or(product.memory),
        instances: product.instances,
    }
}

/// Finds an app by name, unless it was removed.
pub(super) async fn find_app(
    conn: &mut PgConnection,
    tenant: TenantId,
    name: &AppName,
) -> Result<Option<App>, Error> {
    let row = sqlx::query_as!(
        AppRow,
        r#"SELECT id, tenant_id, name AS "name: AppName", generation, observed_generation, revision,
           peak_instances, peak_surge, peak_cpu_millis, peak_memory, reserved_cpu, reserved_memory, uid_start, uid_size,
           observed AS "observed: Json<AppObserved>", observed_at, problem, created_at, changed_at, deleted_at
           FROM app WHERE tenant_id = $1 AND name = $2 AND removed_at IS NULL"#,
        tenant.0,
        name.as_str()
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(Into::into))
}

/// Finds an app by id, unless it was removed.
pub(super) async fn find_app_by_id(conn: &mut PgConnection, id: AppId) -> Result<Option<App>, Error> {
    let row = sqlx::query_as!(
        AppRow,
        r#"SELECT id, tenant_id, name AS "name: AppName", generation, observed_generation, revision,
           peak_instances, peak_surge, peak_cpu_millis, peak_memory, reserved_cpu, reserved_memory, uid_start, uid_size,
           observed AS "observed: Json<AppObserved>", observed_at, problem, created_at, changed_at, deleted_at
           FROM app WHERE id = $1 AND removed_at IS NULL"#,
        id.0
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(Into::into))
}

/// Lists the apps of a tenant by name.
pub(super) async fn list_apps(
    conn: &mut PgConnection,
    tenant: TenantId,
    after: &str,
    limit: i64,
) -> Result<Vec<App>, Error> {
    let rows = sqlx::query_as!(
        AppRow,
        r#"SELECT id, tenant_id, name AS "name: AppName", generation, observed_generation, revision,
           peak_instances, peak_surge, peak_cpu_millis, peak_memory, reserved_cpu, reserved_memory, uid_start, uid_size,
           observed AS "observed: Json<AppObserved>", observed_at, problem, created_at, changed_at, deleted_at
           FROM app WHERE tenant_id = $1 AND removed_at IS NULL AND name > $2 ORDER BY name LIMIT $3"#,
        tenant.0,
        after,
        limit
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(Into::into).collect())
}

/// Returns the names that belong to no app of the tenant.
pub(super) async fn list_missing(
    conn: &mut PgConnection,
    tenant: TenantId,
    names: &[AppName],
) -> Result<Vec<String>, Error> {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    Ok(sqlx::query_scalar!(
        r#"SELECT n AS "name!" FROM unnest($2::text[]) n WHERE NOT EXISTS
           (SELECT 1 FROM app WHERE tenant_id = $1 AND name = n AND removed_at IS NULL AND deleted_at IS NULL)"#,
        tenant.0,
        &names
    )
    .fetch_all(conn)
    .await?)
}

/// Locks the tenant's quota and state. Until the transaction ends, no other deploy of this tenant reserves
/// quota, no image is deleted, and the tenant is not suspended or offboarded. The gate row is locked before the
/// other rows.
pub(super) async fn lock_quota(conn: &mut PgConnection, tenant: TenantId) -> Result<(Quota, String), Error> {
    let rows = sqlx::query!(
        r#"SELECT q.resource, coalesce(q.limit_, d.limit_) AS "limit!", q.used, t.state
           FROM quota q JOIN quota_default d USING (resource) JOIN tenant t ON t.id = q.tenant_id
           WHERE q.tenant_id = $1 AND q.resource IN ('registry_bytes', 'cpu', 'memory', 'apps', 'instances')
           ORDER BY q.resource <> 'registry_bytes', q.resource FOR SHARE OF t FOR UPDATE OF q"#,
        tenant.0
    )
    .fetch_all(conn)
    .await?;
    let Some(first) = rows.first() else { return Err(Error::NotFound) };
    let state = first.state.clone();
    let amount = |limit, used| Amount { limit, used };
    let known = |name: &str| Resource::by_name(name);
    Ok((
        rows.into_iter()
            .filter_map(|row| Some((known(&row.resource)?, amount(row.limit, row.used))))
            .collect(),
        state,
    ))
}

/// Changes the used amounts. CHECK constraints of the rows prevent negative values.
pub(super) async fn add_used(
    conn: &mut PgConnection,
    tenant: TenantId,
    before: crate::apps::reservation::Reserved,
    after: crate::apps::reservation::Reserved,
    apps: i64,
) -> Result<(), Error> {
    let changes = [
        (Resource::Cpu, after.cpu - before.cpu),
        (Resource::Memory, after.memory - before.memory),
        (Resource::Instances, after.instances - before.instances),
        (Resource::Apps, apps),
    ];
    quotas::add_used(conn, tenant, &changes).await
}

pub(super) async fn insert_app(
    conn: &mut PgConnection,
    tenant: TenantId,
    name: &AppName,
    peak: Peak,
    block: Block,
) -> Result<AppId, Error> {
    let id = sqlx::query_scalar!(
        "INSERT INTO app (tenant_id, name, peak_instances, peak_surge, peak_cpu_millis, peak_memory, \
         uid_slot, uid_start, uid_size) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) RETURNING id",
        tenant.0,
        name.as_str(),
        peak.instances,
        peak.surge,
        peak.cpu_millis,
        peak.memory,
        block.slot,
        i64::from(block.ids.start),
        i64::from(block.ids.size)
    )
    .fetch_one(conn)
    .await?;
    Ok(AppId(id))
}

/// Makes the next release the desired one. Returns the raised generation and the new revision.
pub(super) async fn advance_app(
    conn: &mut PgConnection,
    tenant: TenantId,
    id: AppId,
    peak: Peak,
    reserved: Reserved,
) -> Result<(i64, i64), Error> {
    let row = sqlx::query!(
        "UPDATE app SET generation = generation + 1, revision = last_revision + 1, \
         last_revision = last_revision + 1, peak_instances = $3, peak_surge = $4, peak_cpu_millis = $5, \
         peak_memory = $6, reserved_cpu = $7, reserved_memory = $8, changed_at = now(), problem = NULL WHERE tenant_id = $1 AND id = $2 \
         RETURNING generation, revision",
        tenant.0,
        id.0,
        peak.instances,
        peak.surge,
        peak.cpu_millis,
        peak.memory,
        reserved.cpu,
        reserved.memory
    )
    .fetch_one(conn)
    .await?;
    Ok((row.generation, row.revision))
}

pub(super) async fn set_peak(
    conn: &mut PgConnection,
    tenant: TenantId,
    id: AppId,
    peak: Peak,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE app SET peak_instances = $3, peak_surge = $4, peak_cpu_millis = $5, peak_memory = $6, \
         reserved_cpu = NULL, reserved_memory = NULL WHERE tenant_id = $1 AND id = $2",
        tenant.0,
        id.0,
        peak.instances,
        peak.surge,
        peak.cpu_millis,
        peak.memory
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Returns the reservation of an app, removed or not.
pub(super) async fn find_reserved(
    conn: &mut PgConnection,
    tenant: TenantId,
    id: AppId,
) -> Result<Reserved, Error> {
    let row = sqlx::query!(
        "SELECT peak_instances, peak_surge, peak_cpu_millis, peak_memory, reserved_cpu, reserved_memory \
         FROM app WHERE tenant_id = $1 AND id = $2",
        tenant.0,
        id.0
    )
    .fetch_one(conn)
    .await?;
    let peak = Peak {
        instances: row.peak_instances,
        surge: row.peak_surge,
        cpu_millis: row.peak_cpu_millis,
        memory: row.peak_memory,
    };
    Ok(reserved(peak, row.reserved_cpu, row.reserved_memory))
}

/// Counts the apps that the tenant created within 24 hours, including removed ones.
pub(super) async fn count_made_lately(conn: &mut PgConnection, tenant: TenantId) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM app WHERE tenant_id = $1 AND created_at > now() - interval '1 day'"#,
        tenant.0
    )
    .fetch_one(conn)
    .await?)
}

/// Requests the removal. The row is marked removed once the absence was observed.
pub(super) async fn set_deleted(conn: &mut PgConnection, tenant: TenantId, id: AppId) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        "UPDATE app SET deleted_at = coalesce(deleted_at, now()), generation = generation + 1, changed_at = now() \
         WHERE tenant_id = $1 AND id = $2 RETURNING generation",
        tenant.0,
        id.0
    )
    .fetch_one(conn)
    .await?)
}

pub(super) async fn set_removed(conn: &mut PgConnection, tenant: TenantId, id: AppId) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE app SET removed_at = now(), observed = NULL WHERE tenant_id = $1 AND id = $2 AND removed_at IS NULL",
        tenant.0,
        id.0
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Lists the apps of a tenant whose deletion was not requested yet.
pub(super) async fn list_undeleted(conn: &mut PgConnection, tenant: TenantId) -> Result<Vec<AppName>, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT name AS "name: AppName" FROM app WHERE tenant_id = $1 AND removed_at IS NULL
           AND deleted_at IS NULL ORDER BY name LIMIT 200"#,
        tenant.0
    )
    .fetch_all(conn)
    .await?)
}

pub(super) async fn count_left(conn: &mut PgConnection, tenant: TenantId) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM app WHERE tenant_id = $1 AND removed_at IS NULL"#,
        tenant.0
    )
    .fetch_one(conn)
    .await?)
}
