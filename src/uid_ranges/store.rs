//! Ranges and blocks. Exclusion constraints guarantee that nothing overlaps.

use sqlx::PgConnection;

use super::{Block, UidRange};
use crate::config::Pools;
use crate::driver::workload::IdRange;
use crate::error::Error;
use crate::ids::TenantId;

pub(super) async fn insert_range(
    conn: &mut PgConnection,
    tenant: TenantId,
    pools: &Pools,
) -> Result<UidRange, sqlx::Error> {
    sqlx::query_as!(
        UidRange,
        r#"INSERT INTO uid_range (tenant_id, pool_start, pool_end, size, block_size) VALUES ($1, $2, $3, $4, $5)
           RETURNING slot, lower(r) AS "start!", upper(r) AS "end!", given_blocks, size / block_size AS "blocks!",
           given_at, released_at"#,
        tenant.0,
        i64::from(pools.uid_start),
        i64::from(pools.uid_end),
        i64::from(pools.range_size),
        i64::from(pools.block_size)
    )
    .fetch_one(conn)
    .await
}

/// Takes the next free block of the tenant's newest range. The row lock serialises two deploys of one tenant
/// and does not affect other tenants.
pub(super) async fn take_block(conn: &mut PgConnection, tenant: TenantId) -> Result<Option<Block>, Error> {
    let row = sqlx::query!(
        r#"UPDATE uid_range SET given_blocks = given_blocks + 1
           WHERE slot = (SELECT slot FROM uid_range WHERE tenant_id = $1 AND released_at IS NULL
                         AND (given_blocks + 1) * block_size <= size ORDER BY slot DESC LIMIT 1 FOR UPDATE)
           RETURNING slot, lower(r) + (given_blocks - 1) * block_size AS "start!", block_size"#,
        tenant.0
    )
    .fetch_optional(conn)
    .await?;
    row.map(|row| {
        Ok(Block {
            slot: row.slot,
            ids: IdRange {
                start: u32::try_from(row.start).map_err(Error::internal)?,
                size: u32::try_from(row.block_size).map_err(Error::internal)?,
            },
        })
    })
    .transpose()
}

/// Lists all ranges of a tenant, oldest first.
pub async fn list_ranges_of(conn: &mut PgConnection, tenant: TenantId) -> Result<Vec<UidRange>, Error> {
    Ok(sqlx::query_as!(
        UidRange,
        r#"SELECT slot, lower(r) AS "start!", upper(r) AS "end!", given_blocks, size / block_size AS "blocks!",
           given_at, released_at FROM uid_range WHERE tenant_id = $1 ORDER BY slot"#,
        tenant.0
    )
    .fetch_all(conn)
    .await?)
}

/// Retires a tenant's ranges.
pub async fn release_ranges(conn: &mut PgConnection, tenant: TenantId) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE uid_range SET released_at = now() WHERE tenant_id = $1 AND released_at IS NULL",
        tenant.0
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The owner of an id: tenant, state and range, and the app if the id lies in an allocated block.
pub(super) struct OwnerRow {
    pub(super) tenant: String,
    pub(super) tenant_state: String,
    pub(super) start: i64,
    pub(super) end: i64,
    pub(super) released: bool,
    pub(super) app: Option<String>,
    pub(super) app_start: Option<i64>,
    pub(super) app_size: Option<i64>,
    pub(super) app_removed: Option<bool>,
}

pub(super) async fn find_owner(conn: &mut PgConnection, id: i64) -> Result<Option<OwnerRow>, Error> {
    Ok(sqlx::query_as!(
        OwnerRow,
        r#"SELECT t.name AS tenant, t.state AS tenant_state, lower(u.r) AS "start!", upper(u.r) AS "end!",
           u.released_at IS NOT NULL AS "released!", a.name AS "app?", a.uid_start AS "app_start?",
           a.uid_size AS "app_size?", a.removed_at IS NOT NULL AS "app_removed?"
           FROM uid_range u JOIN tenant t ON t.id = u.tenant_id
           LEFT JOIN app a ON a.tenant_id = u.tenant_id
             AND int8range(a.uid_start, a.uid_start + a.uid_size) @> $1::bigint
           WHERE u.r @> $1::bigint"#,
        id
    )
    .fetch_optional(conn)
    .await?)
}

/// A range in the list of the whole pool.
#[derive(Debug, serde::Serialize)]
pub(super) struct PoolRow {
    pub(super) slot: i64,
    pub(super) tenant: String,
    pub(super) state: String,
    pub(super) start: i64,
    pub(super) end: i64,
    pub(super) given_blocks: i64,
    pub(super) blocks: i64,
}

pub(super) async fn list_pool(
    conn: &mut PgConnection,
    after: i64,
    limit: i64,
) -> Result<Vec<PoolRow>, Error> {
    Ok(sqlx::query_as!(
        PoolRow,
        r#"SELECT u.slot, t.name AS tenant,
           CASE WHEN u.released_at IS NOT NULL THEN 'burnt' WHEN t.state = 'offboarding' THEN 'leaving'
                ELSE 'in use' END AS "state!",
           lower(u.r) AS "start!", upper(u.r) AS "end!", u.given_blocks, u.size / u.block_size AS "blocks!"
           FROM uid_range u JOIN tenant t ON t.id = u.tenant_id WHERE u.slot > $1 ORDER BY u.slot LIMIT $2"#,
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// Counts the ranges in use. Returns that count and the next slot. The difference is the number of retired
/// ranges, of tenants that left and of onboardings that failed.
pub(super) async fn count_pool(conn: &mut PgConnection) -> Result<(i64, i64), Error> {
    let row = sqlx::query!(
        r#"SELECT count(*) FILTER (WHERE released_at IS NULL) AS "used!",
           (SELECT CASE WHEN is_called THEN last_value + 1 ELSE 0 END FROM uid_slot) AS "next!"
           FROM uid_range"#
    )
    .fetch_one(conn)
    .await?;
    Ok((row.used, row.next))
}
