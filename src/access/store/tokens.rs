//! API tokens and service accounts.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::access::Authority;
use crate::error::Error;
use crate::ids::{AccountId, ActorId, TenantId};

/// The holder of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::access) enum TokenHolder {
    Person(AccountId),
    Service(i64),
    Root,
}

pub(in crate::access) async fn insert_token(
    conn: &mut PgConnection,
    hash: &[u8],
    name: &str,
    authority: Authority,
    holder: TokenHolder,
    (created_by, expires_at): (&ActorId, OffsetDateTime),
) -> Result<i64, Error> {
    let (tenant, role) = match authority {
        Authority::Platform(role) => (None, role.as_str()),
        Authority::Tenant(tenant, role) => (Some(tenant.0), role.as_str()),
    };
    let (account, service) = match holder {
        TokenHolder::Person(account) => (Some(account.0), None),
        TokenHolder::Service(service) => (None, Some(service)),
        TokenHolder::Root => (None, None),
    };
    Ok(sqlx::query_scalar!(
        "INSERT INTO api_token (hash, name, tenant_id, role, account_id, service_account_id, created_by, expires_at) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING id",
        hash,
        name,
        tenant,
        role,
        account,
        service,
        created_by.as_str(),
        expires_at,
    )
    .fetch_one(conn)
    .await?)
}

/// A token as shown.
#[derive(Debug, Serialize)]
pub(in crate::access) struct TokenView {
    pub(in crate::access) id: i64,
    pub(in crate::access) name: String,
    pub(in crate::access) role: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::access) tenant: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::access) service_account: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::access) account: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::access) created_by: Option<String>,
    #[serde(with = "time::serde::rfc3339")]
    pub(in crate::access) created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub(in crate::access) expires_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub(in crate::access) last_used_at: Option<OffsetDateTime>,
}

/// Lists the tokens of a tenant, or of the platform (`None`), of all holders, oldest first.
pub(in crate::access) async fn list_tokens(
    conn: &mut PgConnection,
    tenant: Option<TenantId>,
    after: i64,
    limit: i64,
) -> Result<Vec<TokenView>, Error> {
    Ok(sqlx::query_as!(
        TokenView,
        r#"SELECT k.id, k.name, k.role, NULL::text AS tenant, s.name AS "service_account?", a.name AS "account?",
           k.created_by AS "created_by?", k.created_at, k.expires_at, k.last_used_at
           FROM api_token k LEFT JOIN account a ON a.id = k.account_id
           LEFT JOIN service_account s ON s.tenant_id = k.tenant_id AND s.id = k.service_account_id
           WHERE coalesce(k.tenant_id, 0) = coalesce($1::bigint, 0) AND k.id > $2 AND k.revoked_at IS NULL AND k.expires_at > now()
           ORDER BY k.id LIMIT $3"#,
        tenant.map(|id| id.0),
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

pub(in crate::access) async fn revoke_token(
    conn: &mut PgConnection,
    tenant: Option<TenantId>,
    id: i64,
) -> Result<Option<String>, Error> {
    Ok(sqlx::query_scalar!(
        "UPDATE api_token SET revoked_at = now() WHERE coalesce(tenant_id, 0) = coalesce($1::bigint, 0) AND id = $2 \
         AND revoked_at IS NULL RETURNING name",
        tenant.map(|id| id.0),
        id
    )
    .fetch_optional(conn)
    .await?)
}

/// Lists an account's own tokens, in all tenants and on the platform.
pub(in crate::access) async fn list_own_tokens(
    conn: &mut PgConnection,
    account: AccountId,
) -> Result<Vec<TokenView>, Error> {
    Ok(sqlx::query_as!(
        TokenView,
        r#"SELECT id AS "id!", name AS "name!", role AS "role!", tenant, NULL::text AS service_account,
           NULL::text AS account, NULL::text AS created_by, created_at AS "created_at!", expires_at AS "expires_at!",
           last_used_at FROM access_tokens_of($1)"#,
        account.0
    )
    .fetch_all(conn)
    .await?)
}

/// Revokes one of an account's own tokens. Returns its tenant and its name.
pub(in crate::access) async fn revoke_own_token(
    conn: &mut PgConnection,
    account: AccountId,
    id: i64,
) -> Result<Option<(Option<TenantId>, String)>, Error> {
    let row =
        sqlx::query!(r#"SELECT tenant_id, name AS "name!" FROM access_revoke_own($1, $2)"#, account.0, id)
            .fetch_optional(conn)
            .await?;
    Ok(row.map(|row| (row.tenant_id.map(TenantId), row.name)))
}

/// A service account as shown.
#[derive(Debug, Serialize)]
pub(in crate::access) struct ServiceAccountRow {
    pub(in crate::access) name: String,
    pub(in crate::access) role: String,
    pub(in crate::access) tokens: i64,
    pub(in crate::access) created_by: String,
    #[serde(with = "time::serde::rfc3339")]
    pub(in crate::access) created_at: OffsetDateTime,
}

/// Lists service accounts ordered by name.
pub(in crate::access) async fn list_services(
    conn: &mut PgConnection,
    tenant: TenantId,
    after: &str,
    limit: i64,
) -> Result<Vec<ServiceAccountRow>, Error> {
    Ok(sqlx::query_as!(
        ServiceAccountRow,
        r#"SELECT s.name, s.role, s.created_by, s.created_at,
           (SELECT count(*) FROM api_token k WHERE k.tenant_id = s.tenant_id AND k.service_account_id = s.id
            AND k.revoked_at IS NULL AND k.expires_at > now()) AS "tokens!"
           FROM service_account s WHERE s.tenant_id = $1 AND s.deleted_at IS NULL AND s.name > $2
           ORDER BY s.name LIMIT $3"#,
        tenant.0,
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

pub(in crate::access) async fn find_service(
    conn: &mut PgConnection,
    tenant: TenantId,
    name: &str,
) -> Result<Option<(i64, String)>, Error> {
    let row = sqlx::query!(
        "SELECT id, role FROM service_account WHERE tenant_id = $1 AND name = $2 AND deleted_at IS NULL",
        tenant.0,
        name
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (row.id, row.role)))
}

pub(in crate::access) async fn insert_service(
    conn: &mut PgConnection,
    tenant: TenantId,
    name: &str,
    role: &str,
    created_by: &ActorId,
) -> Result<(), Error> {
    let done = sqlx::query!(
        "INSERT INTO service_account (tenant_id, name, role, created_by) VALUES ($1, $2, $3, $4)",
        tenant.0,
        name,
        role,
        created_by.as_str()
    )
    .execute(conn)
    .await;
    match done {
        Ok(_) => Ok(()),
        Err(error) if crate::db::constraint(&error) == Some("service_account_name_is_taken") => {
            Err(Error::AlreadyExists("a service account of this name exists".into()))
        }
        Err(error) => Err(error.into()),
    }
}

/// Deletes a service account and revokes all its tokens.
pub(in crate::access) async fn delete_service(
    conn: &mut PgConnection,
    tenant: TenantId,
    name: &str,
) -> Result<bool, Error> {
    let id = sqlx::query_scalar!(
        "UPDATE service_account SET deleted_at = now() WHERE tenant_id = $1 AND name = $2 AND deleted_at IS NULL \
         RETURNING id",
        tenant.0,
        name
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(id) = id else { return Ok(false) };
    sqlx::query!(
        "UPDATE api_token SET revoked_at = now() WHERE tenant_id = $1 AND service_account_id = $2 \
         AND revoked_at IS NULL",
        tenant.0,
        id
    )
    .execute(conn)
    .await?;
    Ok(true)
}
