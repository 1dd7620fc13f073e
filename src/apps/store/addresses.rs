//! The addresses of an app in its tenant's subnet.

use std::net::Ipv4Addr;

use sqlx::PgConnection;

use crate::driver::workload::Subnet;
use crate::error::Error;
use crate::ids::{AppId, AppName, TenantId};

/// Ensures that the app has `count` addresses. Keeps its own and takes the lowest that are free and were not
/// used for a minute. Returns false when the subnet has no more.
pub(in crate::apps) async fn take_addresses(
    conn: &mut PgConnection,
    tenant: TenantId,
    app: AppId,
    count: i64,
    subnet: Subnet,
) -> Result<bool, Error> {
    let have = sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM app_address WHERE tenant_id = $1 AND app_id = $2"#,
        tenant.0,
        app.0
    )
    .fetch_one(&mut *conn)
    .await?;
    if have >= count {
        return Ok(true);
    }
    // The first two addresses are the network and its gateway, the last one is the broadcast address.
    let done = sqlx::query!(
        "INSERT INTO app_address (tenant_id, host, app_id) \
         SELECT $1, n, $2 FROM generate_series(2, $4::bigint - 2) n WHERE NOT EXISTS \
         (SELECT 1 FROM app_address a WHERE a.tenant_id = $1 AND a.host = n \
          AND (a.app_id IS NOT NULL OR a.freed_at > now() - interval '1 minute')) \
         ORDER BY n LIMIT $3 \
         ON CONFLICT (tenant_id, host) DO UPDATE SET app_id = EXCLUDED.app_id, freed_at = NULL, taken_at = now()",
        tenant.0,
        app.0,
        count - have,
        i64::from(subnet.size())
    )
    .execute(conn)
    .await?;
    Ok(i64::try_from(done.rows_affected()).unwrap_or(0) == count - have)
}

/// Counts the addresses that are available now.
pub(in crate::apps) async fn count_free_addresses(
    conn: &mut PgConnection,
    tenant: TenantId,
    subnet: Subnet,
) -> Result<i64, Error> {
    let taken = sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM app_address WHERE tenant_id = $1
           AND (app_id IS NOT NULL OR freed_at > now() - interval '1 minute')"#,
        tenant.0
    )
    .fetch_one(conn)
    .await?;
    Ok(i64::from(subnet.size()) - 3 - taken)
}

/// Returns the app's addresses in the order of allocation, so each index stays stable.
pub(in crate::apps) async fn list_addresses(
    conn: &mut PgConnection,
    tenant: TenantId,
    app: AppId,
    subnet: Subnet,
) -> Result<Vec<Ipv4Addr>, Error> {
    let hosts = sqlx::query_scalar!(
        "SELECT host FROM app_address WHERE tenant_id = $1 AND app_id = $2 ORDER BY taken_at, host",
        tenant.0,
        app.0
    )
    .fetch_all(conn)
    .await?;
    hosts
        .into_iter()
        .map(|host| {
            u32::try_from(host)
                .ok()
                .and_then(|host| subnet.nth(host))
                .ok_or_else(|| Error::internal("an address of the app is outside the tenant's subnet"))
        })
        .collect()
}

/// Returns the app with the n-th address.
pub(in crate::apps) async fn find_at(
    conn: &mut PgConnection,
    tenant: TenantId,
    host: i64,
) -> Result<Option<(AppId, AppName)>, Error> {
    let row = sqlx::query!(
        r#"SELECT a.id, a.name AS "name: AppName" FROM app_address p
           JOIN app a ON a.tenant_id = p.tenant_id AND a.id = p.app_id WHERE p.tenant_id = $1 AND p.host = $2"#,
        tenant.0,
        host
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (AppId(row.id), row.name)))
}

pub(in crate::apps) async fn free_addresses(
    conn: &mut PgConnection,
    tenant: TenantId,
    app: AppId,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE app_address SET app_id = NULL, freed_at = now() WHERE tenant_id = $1 AND app_id = $2",
        tenant.0,
        app.0
    )
    .execute(conn)
    .await?;
    Ok(())
}
