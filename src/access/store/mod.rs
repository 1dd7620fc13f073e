//! Lookup of the actor behind a credential, in one query. A file each for accounts, sessions, tokens, members,
//! links and throttling.

use sqlx::PgConnection;
use time::OffsetDateTime;

use super::{Actor, Means, PlatformRole, Role, TenantRef};
use crate::db::Within;
use crate::error::Error;
use crate::ids::{AccountId, ActorId, TenantId, TenantName};

mod answers;
mod links;
mod members;
mod people;
mod sessions;
mod throttle;
mod tokens;

pub(super) use {answers::*, links::*, members::*, people::*, sessions::*, throttle::*, tokens::*};

/// An actor, and the requested tenant with the actor's role in it, if the tenant exists.
#[derive(Debug)]
pub(super) struct ActorFacts {
    pub(super) actor: Actor,
    pub(super) tenant: Option<(TenantRef, Option<Role>)>,
}

fn tenant(
    id: Option<i64>,
    state: Option<String>,
    wanted: Option<&TenantName>,
    role: Option<Role>,
) -> Option<(TenantRef, Option<Role>)> {
    let (id, state, name) = (id?, state?, wanted?.clone());
    // Offboarding revokes all roles in the tenant.
    let role = role.filter(|_| !state.starts_with("offboard"));
    Some((TenantRef { id: TenantId(id), name, state }, role))
}

/// The caller of a lookup: a user, or an open stream. Only a user's request keeps a session alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asks {
    Person,
    Stream,
}

/// Returns the holder of a session. A session ends after 30 minutes idle, after 12 hours, or if its account is
/// disabled.
pub(super) async fn find_session(
    conn: &mut PgConnection,
    hash: &[u8],
    wanted: Option<&TenantName>,
    asks: Asks,
) -> Result<Option<ActorFacts>, Error> {
    let row = sqlx::query!(
        r#"SELECT account_id AS "account_id!", account AS "account!", platform_role, session_id AS "session_id!",
           recent AS "recent!", stale AS "stale!", tenant_id, tenant_state, member_role
           FROM access_by_session($1, $2)"#,
        hash,
        wanted.map(TenantName::as_str)
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(row) = row else { return Ok(None) };
    if row.stale && asks == Asks::Person {
        sqlx::query!("UPDATE session SET last_seen_at = now() WHERE id = $1", row.session_id)
            .execute(conn)
            .await?;
    }
    let role = row.member_role.as_deref().and_then(Role::parse);
    let actor = Actor {
        id: ActorId::new(&format!("account:{} {}", row.account_id, row.account)),
        name: row.account,
        account: Some(AccountId(row.account_id)),
        means: Means::Session { id: row.session_id, hash: hash.to_vec(), recent: row.recent },
        platform: row.platform_role.as_deref().and_then(PlatformRole::parse),
    };
    Ok(Some(ActorFacts { actor, tenant: tenant(row.tenant_id, row.tenant_state, wanted, role) }))
}

struct TokenRow {
    token_id: i64,
    token: String,
    token_role: String,
    token_tenant: Option<i64>,
    expires_at: OffsetDateTime,
    stale: bool,
    account_id: Option<i64>,
    account: Option<String>,
    platform_role: Option<String>,
    service: Option<String>,
    service_role: Option<String>,
    tenant_id: Option<i64>,
    tenant_state: Option<String>,
    member_role: Option<String>,
}

impl TokenRow {
    /// Returns the tenant role of the token: the lower of the token's scope and its holder's current role.
    fn role(&self) -> Option<Role> {
        let scope = Role::parse(&self.token_role)?;
        if self.account_id.is_some() {
            let member = self.member_role.as_deref().and_then(Role::parse);
            let platform =
                self.platform_role.as_deref().and_then(PlatformRole::parse).map(|role| match role {
                    PlatformRole::Admin => Role::Owner,
                    PlatformRole::Auditor => Role::Viewer,
                });
            return member.max(platform).map(|now| now.min(scope));
        }
        match &self.service_role {
            Some(role) => Role::parse(role).map(|now| now.min(scope)),
            None => Some(scope),
        }
    }

    fn platform(&self) -> Option<PlatformRole> {
        if self.token_tenant.is_some() {
            return None;
        }
        let scope = PlatformRole::parse(&self.token_role)?;
        match self.account_id {
            Some(_) => self.platform_role.as_deref().and_then(PlatformRole::parse).map(|now| now.min(scope)),
            None => Some(scope),
        }
    }

    fn facts(self, hash: &[u8], wanted: Option<&TenantName>) -> ActorFacts {
        let own = self.token_tenant.is_some() && self.token_tenant == self.tenant_id;
        let role = if own { self.role() } else { None };
        let text = match (&self.account, &self.service) {
            (Some(account), _) => format!("account:{} {account}", self.account_id.unwrap_or_default()),
            (None, Some(service)) => format!("service:{service}"),
            (None, None) => "root".to_owned(),
        };
        let actor = Actor {
            id: ActorId::new(&text).by_token(self.token_id, &self.token),
            platform: self.platform(),
            account: self.account_id.map(AccountId),
            means: Means::Token { id: self.token_id, hash: hash.to_vec(), expires_at: self.expires_at },
            // A user's token acts as the user. The token's name is the holder's choice.
            name: self.account.unwrap_or(self.token),
        };
        ActorFacts { actor, tenant: tenant(self.tenant_id, self.tenant_state, wanted, role) }
    }
}

/// Returns the holder of a token that is neither expired nor revoked, if the holder still exists. Records the
/// last use at most once a minute, so most reads cause no write.
pub(super) async fn find_token(
    conn: &mut PgConnection,
    hash: &[u8],
    wanted: Option<&TenantName>,
) -> Result<Option<ActorFacts>, Error> {
    let row = sqlx::query_as!(
        TokenRow,
        r#"SELECT token_id AS "token_id!", token AS "token!", token_role AS "token_role!", token_tenant,
           expires_at AS "expires_at!", stale AS "stale!", account_id, account, platform_role, service, service_role,
           tenant_id, tenant_state, member_role FROM access_by_token($1, $2)"#,
        hash,
        wanted.map(TenantName::as_str)
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(row) = row else { return Ok(None) };
    if row.stale {
        sqlx::query_scalar!("SELECT access_note_use($1)", hash).fetch_one(conn).await?;
    }
    Ok(Some(row.facts(hash, wanted)))
}

/// Returns the current role of an API token in this tenant, for the registry proxy.
pub async fn registry_role(
    conn: &mut PgConnection,
    tenant: &TenantName,
    hash: &[u8],
) -> Result<Option<Role>, Error> {
    let facts = find_token(conn, hash, Some(tenant)).await?;
    Ok(facts.and_then(|facts| facts.tenant).and_then(|(_, role)| role))
}

/// Whether an enabled admin account exists.
pub async fn has_admin(conn: &mut PgConnection) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM account WHERE platform_role = 'admin' AND disabled_at IS NULL) AS "yes!""#
    )
    .fetch_one(conn)
    .await?)
}

/// Stores the hash of a new link for the first admin, valid for a day. Deletes all earlier ones.
pub(super) async fn replace_first_link(conn: &mut PgConnection, hash: &[u8]) -> Result<(), Error> {
    sqlx::query!("DELETE FROM first_admin_link").execute(&mut *conn).await?;
    sqlx::query!(
        "INSERT INTO first_admin_link (hash, expires_at) VALUES ($1, now() + interval '1 day')",
        hash
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Deletes expired responses, sessions, sign-ins, rate limit buckets and known places.
pub async fn prune(pool: &sqlx::PgPool) -> Result<(), Error> {
    let mut conn = pool.acquire().await?;
    sqlx::query!("DELETE FROM idempotency WHERE created_at < now() - interval '24 hours'")
        .execute(&mut *conn)
        .await?;
    sqlx::query!("DELETE FROM session WHERE created_at < now() - interval '12 hours'")
        .execute(&mut *conn)
        .await?;
    sqlx::query!("DELETE FROM sign_in WHERE expires_at < now()").execute(&mut *conn).await?;
    sqlx::query!("DELETE FROM throttle WHERE tat < now()").execute(&mut *conn).await?;
    sqlx::query!("DELETE FROM known_place WHERE last_at < now() - interval '90 days'")
        .execute(&mut *conn)
        .await?;
    Ok(())
}

/// Translates a displayed name to an actor of the audit log: an account, else a service account. An actor id
/// stays unchanged. Within a tenant only its own members are found, so the filter does not reveal other
/// accounts.
pub async fn actor_of(pool: &sqlx::PgPool, text: &str, tenant: Option<TenantId>) -> Result<String, Error> {
    if text.contains(':') || matches!(text, "root" | "platform" | "anonymous" | "many") {
        return Ok(text.to_owned());
    }
    if let Some(name) = text.strip_prefix("service account ") {
        return Ok(format!("service:{name}"));
    }
    let mut conn = crate::db::begin(pool, tenant.map_or(Within::Platform, Within::Tenant)).await?;
    let found = match (tenant, text.parse()) {
        (Some(tenant), _) => find_member(&mut conn, tenant, text).await?.map(|(id, ..)| id),
        (None, Ok(name)) => find_account_id(&mut conn, &name).await?,
        (None, Err(_)) => None,
    };
    Ok(found.map_or_else(|| format!("service:{text}"), |id| format!("account:{id} {text}")))
}
