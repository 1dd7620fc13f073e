//! Rows of registry credentials (table `robot`).

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::error::Error;
use crate::ids::{TenantId, TenantName};

pub(in crate::registries) struct Robot {
    pub(in crate::registries) id: i64,
    pub(in crate::registries) push: bool,
}

/// Finds a valid registry credential with this secret: neither expired nor revoked.
pub(in crate::registries) async fn find_robot(
    conn: &mut PgConnection,
    tenant: &TenantName,
    name: &str,
    hash: &[u8],
) -> Result<Option<Robot>, Error> {
    let robot = sqlx::query_as!(
        Robot,
        r#"SELECT r.id, r.push FROM robot r JOIN tenant t ON t.id = r.tenant_id
           WHERE t.name = $1 AND r.name = $2 AND r.hash = $3 AND r.revoked_at IS NULL AND r.expires_at > now()
           AND t.state IN ('active', 'suspended')"#,
        tenant.as_str(),
        name,
        hash
    )
    .fetch_optional(&mut *conn)
    .await?;
    if let Some(robot) = &robot {
        sqlx::query!(
            "UPDATE robot SET last_used_at = now() WHERE id = $1 \
             AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute')",
            robot.id
        )
        .execute(conn)
        .await?;
    }
    Ok(robot)
}

pub(in crate::registries) async fn is_robot_good(conn: &mut PgConnection, id: i64) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM robot WHERE id = $1 AND revoked_at IS NULL AND expires_at > now()) AS "yes!""#,
        id
    )
    .fetch_one(conn)
    .await?)
}

/// Returns whether a registry credential may push.
pub(in crate::registries) async fn may_robot_push(conn: &mut PgConnection, id: i64) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(r#"SELECT EXISTS (SELECT 1 FROM robot WHERE id = $1 AND push) AS "yes!""#, id)
        .fetch_one(conn)
        .await?)
}

/// Returns the id of an API token of the transaction's tenant.
pub(in crate::registries) async fn find_token_id(
    conn: &mut PgConnection,
    hash: &[u8],
) -> Result<Option<i64>, Error> {
    Ok(sqlx::query_scalar!("SELECT id FROM api_token WHERE hash = $1", hash).fetch_optional(conn).await?)
}

/// Returns the hash of an API token of the transaction's tenant.
pub(in crate::registries) async fn find_token_hash(
    conn: &mut PgConnection,
    id: i64,
) -> Result<Option<Vec<u8>>, Error> {
    Ok(sqlx::query_scalar!("SELECT hash FROM api_token WHERE id = $1", id).fetch_optional(conn).await?)
}

/// A registry credential in a list.
#[derive(Debug, Serialize)]
pub(in crate::registries) struct RobotRow {
    pub(in crate::registries) name: String,
    pub(in crate::registries) push: bool,
    pub(in crate::registries) created_by: String,
    #[serde(with = "time::serde::rfc3339")]
    pub(in crate::registries) created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub(in crate::registries) expires_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub(in crate::registries) last_used_at: Option<OffsetDateTime>,
}

pub(in crate::registries) async fn list_robots(
    conn: &mut PgConnection,
    tenant: TenantId,
    after: &str,
    limit: i64,
) -> Result<Vec<RobotRow>, Error> {
    Ok(sqlx::query_as!(
        RobotRow,
        "SELECT name, push, created_by, created_at, expires_at, last_used_at FROM robot \
         WHERE tenant_id = $1 AND revoked_at IS NULL AND name > $2 ORDER BY name LIMIT $3",
        tenant.0,
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

pub(in crate::registries) async fn insert_robot(
    conn: &mut PgConnection,
    tenant: TenantId,
    robot: &crate::registries::robots::NewRobot,
    hash: &[u8],
    created_by: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "INSERT INTO robot (tenant_id, name, push, hash, created_by, expires_at) \
         VALUES ($1, $2, $3, $4, $5, now() + make_interval(days => $6))",
        tenant.0,
        robot.name,
        robot.push,
        hash,
        created_by,
        robot.days
    )
    .execute(conn)
    .await?;
    Ok(())
}

pub(in crate::registries) async fn revoke_robot(
    conn: &mut PgConnection,
    tenant: TenantId,
    name: &str,
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE robot SET revoked_at = now() WHERE tenant_id = $1 AND name = $2 AND revoked_at IS NULL",
        tenant.0,
        name
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Revokes all registry credentials of a tenant. Returns how many are still valid afterwards.
pub(in crate::registries) async fn revoke_robots(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<i64, Error> {
    sqlx::query!("UPDATE robot SET revoked_at = now() WHERE tenant_id = $1 AND revoked_at IS NULL", tenant.0)
        .execute(&mut *conn)
        .await?;
    Ok(sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM robot WHERE tenant_id = $1 AND revoked_at IS NULL"#,
        tenant.0
    )
    .fetch_one(conn)
    .await?)
}
