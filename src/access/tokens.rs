//! API tokens of users, of service accounts, and of root on the machine. A token's role is an upper limit: the
//! holder's current role may be lower. A token is shown once.

use serde_json::json;
use sqlx::PgConnection;
use time::{Duration, OffsetDateTime};

use super::credentials::{Secret, TOKEN_PREFIX};
use super::extract::TenantScope;
use super::sessions::Desk;
use super::store::{self, TokenHolder};
use super::{Actor, Authority, By, PlatformRole, Role, accounts, members};
use crate::audit;
use crate::db::{self, Within};
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::ids::{ActorId, TenantId};
use crate::quotas::{self, Resource};

/// Maximum lifetime of a token in days.
pub const DAYS: i32 = 365;
/// Default lifetime of a token in days. A token that creates another one limits the default to its own
/// remaining time.
pub const DAYS_DEFAULT: i32 = 90;

/// A created token.
pub struct CreatedToken {
    /// Number.
    pub id: i64,
    /// The token itself, shown once.
    pub secret: Secret,
    /// Expiry.
    pub expires_at: OffsetDateTime,
}

/// The checked name and lifetime of a token.
pub struct NewToken {
    name: String,
    expires_at: OffsetDateTime,
}

impl NewToken {
    /// Checks name and lifetime. A token that another token creates must not outlive it: the default lifetime
    /// is cut, an explicit longer one is rejected.
    pub fn check(actor: &Actor, name: &str, days: Option<i32>) -> Result<Self, Error> {
        let name = name.trim();
        if !(1..=60).contains(&name.chars().count()) || name.chars().any(|c| crate::fault::plain(c) != c) {
            return Err(accounts::wrong("name", "a token's name must have 1 to 60 visible characters"));
        }
        if days.is_some_and(|days| !(1..=DAYS).contains(&days)) {
            return Err(accounts::wrong("days", format!("days must be 1 to {DAYS}")));
        }
        let now = OffsetDateTime::now_utc();
        let asked = now + Duration::days(days.unwrap_or(DAYS_DEFAULT).into());
        let expires_at = match actor.ends() {
            Some(end) if asked > end && days.is_some() => {
                let left = (end - now).whole_days();
                let most = if left > 0 { format!("set days to at most {left}, or ") } else { String::new() };
                return Err(Error::fault(
                    Fault::new(
                        Code(426),
                        Kind::Invalid,
                        "days",
                        "a token cannot create a token that outlives it",
                    )
                    .because(format!("the token of this request expires in {left} whole days"))
                    .instead(format!("{most}omit days: the new token then expires with this one")),
                ));
            }
            Some(end) => asked.min(end),
            None => asked,
        };
        Ok(Self { name: name.to_owned(), expires_at })
    }
}

/// Creates a token as root on the machine, without a holder. No quota applies: such a token restores access
/// when a quota is exhausted.
pub async fn create_as_root(
    conn: &mut PgConnection,
    name: &str,
    authority: Authority,
    by: &ActorId,
    life: Duration,
) -> Result<(i64, Secret), Error> {
    let secret = Secret::generate(TOKEN_PREFIX);
    let end = OffsetDateTime::now_utc() + life;
    let id = store::insert_token(conn, &secret.hash(), name, authority, TokenHolder::Root, (by, end)).await?;
    let tenant = match authority {
        Authority::Tenant(tenant, _) => Some(tenant),
        Authority::Platform(_) => None,
    };
    let role = match authority {
        Authority::Tenant(_, role) => role.as_str(),
        Authority::Platform(role) => role.as_str(),
    };
    let event = audit::AuditEvent {
        tenant,
        actor: by,
        action: "token.create",
        object: name,
        request_id: "command line",
        detail: json!({"role": role, "days": life.whole_days(), "token": id}),
    };
    audit::record(conn, event).await?;
    Ok((id, secret))
}

impl Desk {
    /// Creates a token for a service account of a tenant.
    pub async fn create_service_token<P>(
        &self,
        scope: &TenantScope<P>,
        service: &str,
        new: NewToken,
    ) -> Result<CreatedToken, Error> {
        scope.actor.require_recent()?;
        let tenant = scope.tenant.id;
        let mut tx = db::begin(&self.pool, tenant).await?;
        let (id, role) = store::find_service(&mut tx, tenant, service)
            .await?
            .ok_or_else(|| accounts::wrong("service_account", "there is no such service account"))?;
        let role = Role::parse(&role).ok_or_else(|| Error::internal("an unknown role"))?;
        members::require_within(scope, role)?;
        let made = self
            .insert(&mut tx, scope.by(), new, (Authority::Tenant(tenant, role), TokenHolder::Service(id)))
            .await?;
        tx.commit().await?;
        Ok(made)
    }

    /// Creates a token of the actor for a tenant or the platform, with the actor's own role or a lower one.
    pub async fn create_own_token(
        &self,
        by: By<'_>,
        authority: Authority,
        new: NewToken,
    ) -> Result<CreatedToken, Error> {
        let account = by.actor.require_person()?;
        by.actor.require_recent()?;
        let within = match authority {
            Authority::Tenant(tenant, _) => Within::Tenant(tenant),
            Authority::Platform(_) => Within::Platform,
        };
        let mut tx = db::begin(&self.pool, within).await?;
        let made = self.insert(&mut tx, by, new, (authority, TokenHolder::Person(account))).await?;
        tx.commit().await?;
        Ok(made)
    }

    async fn insert(
        &self,
        tx: &mut db::Tx,
        by: By<'_>,
        new: NewToken,
        (authority, holder): (Authority, TokenHolder),
    ) -> Result<CreatedToken, Error> {
        match authority {
            Authority::Tenant(tenant, _) => quotas::take_place(tx, tenant, Resource::ApiTokens).await?,
            Authority::Platform(_) => quotas::take_platform_place(tx, Resource::PlatformTokens).await?,
        }
        let secret = Secret::generate(TOKEN_PREFIX);
        let id = store::insert_token(
            tx,
            &secret.hash(),
            &new.name,
            authority,
            holder,
            (&by.actor.id, new.expires_at),
        )
        .await?;
        let (tenant, role) = match authority {
            Authority::Tenant(tenant, role) => (Some(tenant), role.as_str()),
            Authority::Platform(role) => (None, role.as_str()),
        };
        by.record(tx, tenant, "token.create", &new.name, json!({"role": role, "token": id})).await?;
        Ok(CreatedToken { id, secret, expires_at: new.expires_at })
    }

    /// Returns the authority of a token of the actor: the requested role, if it is at most the actor's own.
    pub async fn own_authority(
        &self,
        actor: &Actor,
        tenant: Option<&str>,
        role: &str,
    ) -> Result<Authority, Error> {
        let account = actor.require_person()?;
        let Some(tenant) = tenant else {
            let wanted = PlatformRole::parse(role)
                .ok_or_else(|| accounts::wrong("role", "role must be auditor or admin on the platform"))?;
            return match actor.platform {
                Some(own) if wanted <= own => Ok(Authority::Platform(wanted)),
                _ => Err(Error::Forbidden("a token cannot do more than you".into())),
            };
        };
        let wanted = Role::parse(role)
            .ok_or_else(|| accounts::wrong("role", "role must be viewer, deployer or owner in a tenant"))?;
        let mut conn = self.pool.acquire().await?;
        let places = store::tenants_of(&mut conn, account).await?;
        let place = places
            .iter()
            .find(|place| place.tenant == tenant)
            .ok_or_else(|| accounts::wrong("tenant", "you are not a member of a tenant of this name"))?;
        match Role::parse(&place.role) {
            Some(own) if wanted <= own => Ok(Authority::Tenant(TenantId(place.id), wanted)),
            _ => Err(Error::Forbidden("a token cannot do more than you".into())),
        }
    }

    /// Revokes a token of a tenant, or of the platform (`None`), of any holder.
    pub async fn revoke_token(&self, by: By<'_>, tenant: Option<TenantId>, id: i64) -> Result<(), Error> {
        let mut tx = db::begin(&self.pool, tenant.map_or(Within::Platform, Within::Tenant)).await?;
        let name = store::revoke_token(&mut tx, tenant, id).await?.ok_or(Error::NotFound)?;
        by.record(&mut tx, tenant, "token.revoke", &name, json!({"token": id})).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Revokes one of the actor's own tokens.
    pub async fn revoke_own_token(&self, by: By<'_>, id: i64) -> Result<(), Error> {
        let account = by.actor.require_person()?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        let (tenant, name) = store::revoke_own_token(&mut tx, account, id).await?.ok_or(Error::NotFound)?;
        if let Some(tenant) = tenant {
            db::enter(&mut tx, tenant).await?;
        }
        by.record(&mut tx, tenant, "token.revoke", &name, json!({"token": id})).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Creates a service account.
    pub async fn create_service<P>(
        &self,
        scope: &TenantScope<P>,
        name: &str,
        role: Role,
    ) -> Result<(), Error> {
        scope.actor.require_recent()?;
        members::require_within(scope, role)?;
        let good = name.parse::<crate::ids::AppName>().is_ok() && (2..=32).contains(&name.len());
        if !good {
            return Err(accounts::wrong(
                "name",
                "a service account's name must have 2 to 32 characters of a to z, 0 to 9 and -, and start with a letter",
            ));
        }
        let mut tx = db::begin(&self.pool, scope.tenant.id).await?;
        quotas::take_place(&mut tx, scope.tenant.id, Resource::ServiceAccounts).await?;
        store::insert_service(&mut tx, scope.tenant.id, name, role.as_str(), &scope.actor.id).await?;
        let detail = json!({"role": role.as_str()});
        scope.by().record(&mut tx, scope.tenant.id, "service_account.create", name, detail).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Deletes a service account and revokes all its tokens.
    pub async fn delete_service<P>(&self, scope: &TenantScope<P>, name: &str) -> Result<(), Error> {
        let mut tx = db::begin(&self.pool, scope.tenant.id).await?;
        if !store::delete_service(&mut tx, scope.tenant.id, name).await? {
            return Err(Error::NotFound);
        }
        store::end_links_within(&mut tx, scope.tenant.id, &format!("service:{name}"), "").await?;
        scope.by().record(&mut tx, scope.tenant.id, "service_account.delete", name, json!({})).await?;
        tx.commit().await?;
        Ok(())
    }
}
