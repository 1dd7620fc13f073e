//! Members of a tenant.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::access::Role;
use crate::error::Error;
use crate::ids::{AccountId, ActorId, TenantId, TenantName};

/// A member as shown.
#[derive(Debug, Serialize)]
pub(in crate::access) struct MemberRow {
    pub(in crate::access) name: String,
    pub(in crate::access) display_name: String,
    pub(in crate::access) role: String,
    pub(in crate::access) source: String,
    pub(in crate::access) created_by: String,
    #[serde(with = "time::serde::rfc3339")]
    pub(in crate::access) since: OffsetDateTime,
    pub(in crate::access) second_factor: bool,
    pub(in crate::access) disabled: bool,
}

/// Lists members ordered by name.
pub(in crate::access) async fn list_members(
    conn: &mut PgConnection,
    tenant: TenantId,
    after: &str,
    limit: i64,
) -> Result<Vec<MemberRow>, Error> {
    Ok(sqlx::query_as!(
        MemberRow,
        r#"SELECT a.name, a.display_name, m.role, m.source, m.created_by, m.created_at AS since,
           EXISTS (SELECT 1 FROM second_factor f WHERE f.account_id = a.id AND f.confirmed_at IS NOT NULL)
             AS "second_factor!",
           a.disabled_at IS NOT NULL AS "disabled!"
           FROM membership m JOIN account a ON a.id = m.account_id
           WHERE m.tenant_id = $1 AND a.name > $2 ORDER BY a.name LIMIT $3"#,
        tenant.0,
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// Returns account, role and source of the member with this name. Locks the row.
pub(in crate::access) async fn find_member(
    conn: &mut PgConnection,
    tenant: TenantId,
    name: &str,
) -> Result<Option<(AccountId, String, String)>, Error> {
    let row = sqlx::query!(
        "SELECT m.account_id, m.role, m.source FROM membership m JOIN account a ON a.id = m.account_id \
         WHERE m.tenant_id = $1 AND a.name = $2 FOR UPDATE OF m",
        tenant.0,
        name
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (AccountId(row.account_id), row.role, row.source)))
}

/// Adds a member, or changes role and source.
pub(in crate::access) async fn set_member(
    conn: &mut PgConnection,
    tenant: TenantId,
    account: AccountId,
    role: Role,
    source: &str,
    by: &ActorId,
) -> Result<(), Error> {
    sqlx::query!(
        "INSERT INTO membership (tenant_id, account_id, role, source, created_by) VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT (tenant_id, account_id) DO UPDATE SET role = $3, source = $4",
        tenant.0,
        account.0,
        role.as_str(),
        source,
        by.as_str()
    )
    .execute(conn)
    .await?;
    Ok(())
}

pub(in crate::access) async fn delete_member(
    conn: &mut PgConnection,
    tenant: TenantId,
    account: AccountId,
) -> Result<(), Error> {
    sqlx::query!("DELETE FROM membership WHERE tenant_id = $1 AND account_id = $2", tenant.0, account.0)
        .execute(&mut *conn)
        .await?;
    // Revoke the member's own tokens in this tenant.
    sqlx::query!(
        "UPDATE api_token SET revoked_at = now() WHERE tenant_id = $1 AND account_id = $2 AND revoked_at IS NULL",
        tenant.0,
        account.0
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Counts the owners that can sign in, under a lock: if two owners demote each other, one stays.
pub(in crate::access) async fn count_owners(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<usize, Error> {
    Ok(sqlx::query_scalar!(
        "SELECT m.account_id FROM membership m JOIN account a ON a.id = m.account_id \
         WHERE m.tenant_id = $1 AND m.role = 'owner' AND a.disabled_at IS NULL ORDER BY 1 FOR UPDATE OF m",
        tenant.0
    )
    .fetch_all(conn)
    .await?
    .len())
}

/// A tenant that an account is a member of.
#[derive(Debug, Clone, Serialize)]
pub(in crate::access) struct BelongsTo {
    #[serde(skip)]
    pub(in crate::access) id: i64,
    #[serde(rename = "name")]
    pub(in crate::access) tenant: String,
    pub(in crate::access) display_name: String,
    pub(in crate::access) state: String,
    pub(in crate::access) role: String,
    pub(in crate::access) source: String,
}

/// Lists the tenants of an account.
pub(in crate::access) async fn tenants_of(
    conn: &mut PgConnection,
    account: AccountId,
) -> Result<Vec<BelongsTo>, Error> {
    Ok(sqlx::query_as!(
        BelongsTo,
        r#"SELECT tenant_id AS "id!", tenant AS "tenant!", display_name AS "display_name!",
           tenant_state AS "state!", role AS "role!", source AS "source!" FROM access_tenants_of($1)"#,
        account.0
    )
    .fetch_all(conn)
    .await?)
}

/// Returns a tenant by name, and whether it is active.
pub(in crate::access) async fn find_active_tenant(
    conn: &mut PgConnection,
    name: &TenantName,
) -> Result<Option<(TenantId, bool)>, Error> {
    let row = sqlx::query!("SELECT id, state FROM tenant WHERE name = $1", name.as_str())
        .fetch_optional(conn)
        .await?;
    Ok(row.map(|row| (TenantId(row.id), row.state == "active")))
}
