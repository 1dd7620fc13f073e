//! Invitations and password reset links.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::error::Error;
use crate::ids::{ActorId, TenantId};

/// A link to insert.
pub(in crate::access) struct NewLink<'a> {
    pub(in crate::access) kind: &'a str,
    pub(in crate::access) tenant: Option<TenantId>,
    pub(in crate::access) role: Option<&'a str>,
    pub(in crate::access) platform_role: Option<&'a str>,
    pub(in crate::access) recipient: &'a str,
    pub(in crate::access) account: Option<i64>,
    pub(in crate::access) by: &'a ActorId,
    pub(in crate::access) hours: i32,
}

pub(in crate::access) async fn insert_link(
    conn: &mut PgConnection,
    hash: &[u8],
    new: &NewLink<'_>,
) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        "INSERT INTO invitation (hash, kind, tenant_id, role, platform_role, recipient, account_id, created_by, expires_at) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, now() + make_interval(hours => $9)) RETURNING id",
        hash,
        new.kind,
        new.tenant.map(|id| id.0),
        new.role,
        new.platform_role,
        new.recipient,
        new.account,
        new.by.as_str(),
        new.hours
    )
    .fetch_one(conn)
    .await?)
}

/// Revokes earlier links of the same kind to the same recipient.
pub(in crate::access) async fn end_links(
    conn: &mut PgConnection,
    kind: &str,
    tenant: Option<TenantId>,
    recipient: &str,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE invitation SET revoked_at = now() WHERE kind = $1 AND coalesce(tenant_id, 0) = coalesce($2::bigint, 0) \
         AND recipient = $3 AND used_at IS NULL AND revoked_at IS NULL",
        kind,
        tenant.map(|id| id.0),
        recipient
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Revokes the open links that an account created or received, in every tenant and on the platform.
pub(in crate::access) async fn end_links_of(
    conn: &mut PgConnection,
    maker: &str,
    recipient: &str,
) -> Result<(), Error> {
    sqlx::query_scalar!("SELECT access_end_links($1, $2)", maker, recipient).fetch_one(conn).await?;
    Ok(())
}

/// Revokes the open links that an account created or received within the tenant of the transaction.
pub(in crate::access) async fn end_links_within(
    conn: &mut PgConnection,
    tenant: TenantId,
    maker: &str,
    recipient: &str,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE invitation SET revoked_at = now() WHERE coalesce(tenant_id, 0) = $1 \
         AND (created_by = $2 OR recipient = $3) AND used_at IS NULL AND revoked_at IS NULL",
        tenant.0,
        maker,
        recipient
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A valid link.
pub(in crate::access) struct LinkRecord {
    pub(in crate::access) id: i64,
    pub(in crate::access) kind: String,
    pub(in crate::access) tenant_id: Option<i64>,
    pub(in crate::access) tenant: Option<String>,
    pub(in crate::access) tenant_state: Option<String>,
    pub(in crate::access) role: Option<String>,
    pub(in crate::access) platform_role: Option<String>,
    pub(in crate::access) recipient: String,
    pub(in crate::access) account_id: Option<i64>,
    pub(in crate::access) created_by: String,
}

/// Returns the link with this hash. Does not use the link up.
pub(in crate::access) async fn find_link(
    conn: &mut PgConnection,
    hash: &[u8],
) -> Result<Option<LinkRecord>, Error> {
    Ok(sqlx::query_as!(
        LinkRecord,
        r#"SELECT id AS "id!", kind AS "kind!", tenant_id, tenant, tenant_state, role, platform_role,
           recipient AS "recipient!", account_id, created_by AS "created_by!" FROM access_invitation($1)"#,
        hash
    )
    .fetch_optional(conn)
    .await?)
}

/// Uses a link up. Of two concurrent calls, one succeeds.
pub(in crate::access) async fn use_link(conn: &mut PgConnection, id: i64) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE invitation SET used_at = now() WHERE id = $1 AND used_at IS NULL AND revoked_at IS NULL \
         AND expires_at > now()",
        id
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// An open invitation as shown. The link itself is not stored.
#[derive(Debug, Serialize)]
pub(in crate::access) struct InvitationRow {
    pub(in crate::access) id: i64,
    pub(in crate::access) name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::access) role: Option<String>,
    pub(in crate::access) created_by: String,
    #[serde(with = "time::serde::rfc3339")]
    pub(in crate::access) created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub(in crate::access) expires_at: OffsetDateTime,
}

/// Lists the open invitations of a tenant, or of the platform (`None`), oldest first.
pub(in crate::access) async fn list_invitations(
    conn: &mut PgConnection,
    tenant: Option<TenantId>,
    after: i64,
    limit: i64,
) -> Result<Vec<InvitationRow>, Error> {
    Ok(sqlx::query_as!(
        InvitationRow,
        r#"SELECT id, recipient AS name, coalesce(role, platform_role) AS role, created_by, created_at, expires_at
           FROM invitation WHERE kind = 'invitation' AND coalesce(tenant_id, 0) = coalesce($1::bigint, 0) AND id > $2
           AND used_at IS NULL AND revoked_at IS NULL AND expires_at > now() ORDER BY id LIMIT $3"#,
        tenant.map(|id| id.0),
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

pub(in crate::access) async fn revoke_invitation(
    conn: &mut PgConnection,
    tenant: Option<TenantId>,
    id: i64,
) -> Result<Option<String>, Error> {
    Ok(sqlx::query_scalar!(
        "UPDATE invitation SET revoked_at = now() WHERE coalesce(tenant_id, 0) = coalesce($1::bigint, 0) AND id = $2 \
         AND used_at IS NULL AND revoked_at IS NULL RETURNING recipient",
        tenant.map(|id| id.0),
        id
    )
    .fetch_optional(conn)
    .await?)
}

/// Whether the link for the first admin is valid. Does not use the link up.
pub(in crate::access) async fn is_first_link_good(
    conn: &mut PgConnection,
    hash: &[u8],
) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM first_admin_link
           WHERE hash = $1 AND used_at IS NULL AND expires_at > now()) AS "yes!""#,
        hash
    )
    .fetch_one(conn)
    .await?)
}

/// Uses the link for the first admin up. Of two concurrent calls, one succeeds.
pub(in crate::access) async fn use_first_link(conn: &mut PgConnection, hash: &[u8]) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE first_admin_link SET used_at = now() WHERE hash = $1 AND used_at IS NULL AND expires_at > now()",
        hash
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}
