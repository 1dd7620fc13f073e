//! Tokens, sessions, the first-admin link and the answers of repeated requests.

use sqlx::PgConnection;
use time::{Duration, OffsetDateTime};

use super::credentials::{Secret, TOKEN_PREFIX};
use super::{Actor, Authority, PlatformRole, Role, TenantRef};
use crate::error::Error;
use crate::ids::{ActorId, TenantId, TenantName};

struct TokenRow {
    id: i64,
    name: String,
    tenant_id: Option<i64>,
    role: String,
}

impl TokenRow {
    fn actor(self) -> Option<Actor> {
        let authority = match self.tenant_id {
            Some(tenant) => Authority::Tenant(TenantId(tenant), Role::parse(&self.role)?),
            None => Authority::Platform(PlatformRole::parse(&self.role)?),
        };
        let id = ActorId::new(&format!("token:{} {}", self.id, self.name));
        Some(Actor { id, name: self.name, token_id: self.id, authority })
    }
}

/// The actor behind a token that is neither expired nor revoked. The last use is written down at
/// most once a minute, so that reading costs no write.
pub(super) async fn find_token(conn: &mut PgConnection, hash: &[u8]) -> Result<Option<Actor>, Error> {
    let row = sqlx::query_as!(
        TokenRow,
        "SELECT id, name, tenant_id, role FROM api_token \
         WHERE hash = $1 AND revoked_at IS NULL AND expires_at > now()",
        hash
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(row) = row else { return Ok(None) };
    sqlx::query!(
        "UPDATE api_token SET last_used_at = now() \
         WHERE id = $1 AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute')",
        row.id
    )
    .execute(conn)
    .await?;
    Ok(row.actor())
}

/// The actor behind a session: idle for at most 30 minutes, 12 hours in all, and only as long as
/// the token behind it is good.
pub(super) async fn find_session(conn: &mut PgConnection, hash: &[u8]) -> Result<Option<Actor>, Error> {
    let row = sqlx::query_as!(
        TokenRow,
        "SELECT t.id, t.name, t.tenant_id, t.role FROM session s JOIN api_token t ON t.id = s.token_id \
         WHERE s.hash = $1 AND s.created_at > now() - interval '12 hours' \
         AND s.last_seen_at > now() - interval '30 minutes' \
         AND t.revoked_at IS NULL AND t.expires_at > now()",
        hash
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(row) = row else { return Ok(None) };
    sqlx::query!(
        "UPDATE session SET last_seen_at = now() WHERE hash = $1 AND last_seen_at < now() - interval '1 minute'",
        hash
    )
    .execute(conn)
    .await?;
    Ok(row.actor())
}

pub(super) async fn insert_session(conn: &mut PgConnection, hash: &[u8], token_id: i64) -> Result<(), Error> {
    sqlx::query!("DELETE FROM session WHERE created_at < now() - interval '12 hours'")
        .execute(&mut *conn)
        .await?;
    sqlx::query!("INSERT INTO session (hash, token_id) VALUES ($1, $2)", hash, token_id)
        .execute(conn)
        .await?;
    Ok(())
}

pub(super) async fn delete_session(conn: &mut PgConnection, hash: &[u8]) -> Result<(), Error> {
    sqlx::query!("DELETE FROM session WHERE hash = $1", hash).execute(conn).await?;
    Ok(())
}

pub(super) async fn find_tenant(
    conn: &mut PgConnection,
    name: &TenantName,
) -> Result<Option<TenantRef>, Error> {
    let row = sqlx::query!(r#"SELECT id, state FROM tenant WHERE name = $1"#, name.as_str())
        .fetch_optional(conn)
        .await?;
    Ok(row.map(|row| TenantRef { id: TenantId(row.id), name: name.clone(), state: row.state }))
}

/// Makes an API token and returns it in clear, for the one time that it is shown.
pub async fn create_token(
    conn: &mut PgConnection,
    name: &str,
    authority: Authority,
    created_by: &ActorId,
    life: Duration,
) -> Result<(i64, Secret), Error> {
    let secret = Secret::generate(TOKEN_PREFIX);
    let (tenant, role) = match authority {
        Authority::Platform(role) => (None, role.as_str()),
        Authority::Tenant(tenant, role) => (Some(tenant.0), role.as_str()),
    };
    let id = sqlx::query_scalar!(
        "INSERT INTO api_token (hash, name, tenant_id, role, created_by, expires_at) \
         VALUES ($1, $2, $3, $4, $5, $6) RETURNING id",
        secret.hash(),
        name,
        tenant,
        role,
        created_by.as_str(),
        OffsetDateTime::now_utc() + life,
    )
    .fetch_one(conn)
    .await?;
    Ok((id, secret))
}

/// Whether there is an admin's token that works.
pub async fn has_admin(conn: &mut PgConnection) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM api_token WHERE tenant_id IS NULL AND role = 'admin'
           AND revoked_at IS NULL AND expires_at > now()) AS "yes!""#
    )
    .fetch_one(conn)
    .await?)
}

/// Makes the one-time link for the first admin, good for a day; earlier ones end.
pub async fn create_first_admin_link(conn: &mut PgConnection) -> Result<Secret, Error> {
    let secret = Secret::generate("");
    sqlx::query!("DELETE FROM first_admin_link").execute(&mut *conn).await?;
    sqlx::query!(
        "INSERT INTO first_admin_link (hash, expires_at) VALUES ($1, now() + interval '1 day')",
        secret.hash()
    )
    .execute(conn)
    .await?;
    Ok(secret)
}

/// Whether the link is good; it is not used up by looking.
pub(super) async fn is_link_good(conn: &mut PgConnection, hash: &[u8]) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM first_admin_link
           WHERE hash = $1 AND used_at IS NULL AND expires_at > now()) AS "yes!""#,
        hash
    )
    .fetch_one(conn)
    .await?)
}

/// Uses the link up; of two at the same time one wins.
pub(super) async fn use_link(conn: &mut PgConnection, hash: &[u8]) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE first_admin_link SET used_at = now() WHERE hash = $1 AND used_at IS NULL AND expires_at > now()",
        hash
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// The kept answer to a request with this key: hash of the request, status, body.
pub(super) async fn find_answer(
    conn: &mut PgConnection,
    actor: &ActorId,
    key: &str,
) -> Result<Option<(Vec<u8>, i32, serde_json::Value)>, Error> {
    let row = sqlx::query!(
        "SELECT request_hash, status, response FROM idempotency \
         WHERE actor = $1 AND key = $2 AND created_at > now() - interval '24 hours'",
        actor.as_str(),
        key
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (row.request_hash, row.status, row.response)))
}

/// Keeps an answer, in the transaction that did the work.
pub(super) async fn insert_answer(
    conn: &mut PgConnection,
    actor: &ActorId,
    key: &str,
    request_hash: &[u8],
    answer: (i32, &serde_json::Value),
) -> Result<bool, Error> {
    sqlx::query!(
        "DELETE FROM idempotency WHERE actor = $1 AND key = $2 AND created_at < now() - interval '24 hours'",
        actor.as_str(),
        key
    )
    .execute(&mut *conn)
    .await?;
    let done = sqlx::query!(
        "INSERT INTO idempotency (actor, key, request_hash, status, response) VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT DO NOTHING",
        actor.as_str(),
        key,
        request_hash,
        answer.0,
        answer.1
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Removes answers and sessions that have had their time.
pub async fn prune(pool: &sqlx::PgPool) -> Result<(), Error> {
    let mut conn = pool.acquire().await?;
    sqlx::query!("DELETE FROM idempotency WHERE created_at < now() - interval '24 hours'")
        .execute(&mut *conn)
        .await?;
    sqlx::query!("DELETE FROM session WHERE created_at < now() - interval '12 hours'")
        .execute(&mut *conn)
        .await?;
    Ok(())
}

/// Whether a token still opens a tenant: for streams that outlast the request that began them.
pub async fn still_opens(pool: &sqlx::PgPool, token_id: i64, tenant: TenantId) -> Result<bool, Error> {
    let mut conn = pool.acquire().await?;
    Ok(sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM api_token k, tenant t WHERE k.id = $1 AND k.revoked_at IS NULL
           AND k.expires_at > now() AND t.id = $2 AND t.state IN ('active', 'suspended')
           AND (k.tenant_id IS NULL OR k.tenant_id = t.id)) AS "yes!""#,
        token_id,
        tenant.0
    )
    .fetch_one(&mut *conn)
    .await?)
}
