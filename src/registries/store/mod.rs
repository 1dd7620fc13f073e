//! Rows of registry credentials, manifests, tags and blobs, with their quota use.

use sqlx::PgConnection;

use crate::error::Error;
use crate::ids::{TenantId, TenantName};

mod claims;
mod layers;
mod push;
mod read;
mod remove;
mod robots;
mod uploads;

pub use layers::image_bytes;
pub use read::are_manifests_there;
pub(super) use {
    claims::*,
    layers::{image_use, insert_report, list_reports},
    push::*,
    read::*,
    remove::*,
    robots::*,
    uploads::*,
};

pub(in crate::registries) async fn tenant_state(
    conn: &mut PgConnection,
    tenant: &TenantName,
) -> Result<Option<String>, Error> {
    Ok(sqlx::query_scalar!("SELECT state FROM tenant WHERE name = $1", tenant.as_str())
        .fetch_optional(conn)
        .await?)
}

/// Minimum bytes counted for a blob, a manifest and an open upload: roughly the size of their files and
/// folders.
pub(in crate::registries) const FLOOR: u64 = 32 << 10;

/// Returns the bytes counted for a blob or manifest of this size.
fn weight(size: u64) -> i64 {
    signed(size.max(FLOOR))
}

fn positive(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Returns the used bytes, including open uploads, and the limit.
pub(in crate::registries) async fn registry_use(
    conn: &mut PgConnection,
    tenant: &TenantName,
) -> Result<(u64, u64), Error> {
    let row = sqlx::query!(
        r#"SELECT (q.used + coalesce((SELECT sum(greatest(u.bytes, 32768)) FROM upload u WHERE u.tenant_id = t.id
                   AND u.changed_at > now() - interval '2 hours'), 0))::bigint AS "used!",
                  coalesce(q.limit_, d.limit_) AS "limit!"
           FROM tenant t JOIN quota q ON q.tenant_id = t.id JOIN quota_default d USING (resource)
           WHERE t.name = $1 AND q.resource = 'registry_bytes'"#,
        tenant.as_str()
    )
    .fetch_one(conn)
    .await?;
    Ok((positive(row.used), positive(row.limit)))
}

/// Locks the gate row of a tenant's quota, which serializes changes to its project.
pub(in crate::registries) async fn lock_project(
    conn: &mut PgConnection,
    tenant: &TenantName,
) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        "SELECT q.tenant_id FROM quota q JOIN tenant t ON t.id = q.tenant_id \
         WHERE t.name = $1 AND q.resource = 'registry_bytes' FOR UPDATE OF q",
        tenant.as_str()
    )
    .fetch_one(conn)
    .await?)
}

/// Locks the project for a push, which requires an active tenant.
async fn lock_active(conn: &mut PgConnection, tenant: &TenantName) -> Result<i64, Error> {
    let id = lock_project(conn, tenant).await?;
    require_active(conn, tenant).await?;
    Ok(id)
}

/// Refuses a push unless the tenant is active.
async fn require_active(conn: &mut PgConnection, tenant: &TenantName) -> Result<(), Error> {
    match tenant_state(conn, tenant).await?.as_deref() {
        Some("active") => Ok(()),
        state => {
            let state = state.unwrap_or("gone");
            Err(Error::Conflict(format!("the tenant is {state}: nothing can be pushed")))
        }
    }
}

/// The error for pushing content that is still being deleted.
fn going() -> Error {
    Error::Unavailable(
        "this content is being deleted; push it again in a few seconds".into(),
        std::time::Duration::from_secs(5),
    )
}

async fn add_used(conn: &mut PgConnection, tenant: TenantId, bytes: i64) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE quota SET used = greatest(0, used + $2) WHERE tenant_id = $1 AND resource = 'registry_bytes'",
        tenant.0,
        bytes
    )
    .execute(conn)
    .await?;
    Ok(())
}
