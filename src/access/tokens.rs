//! API tokens: of people, of a tenant's service accounts, and of root on the machine. A token says the most that
//! it may do; whoever stands behind it may have less by now. It is shown once.

use serde_json::json;
use sqlx::PgConnection;
use time::{Duration, OffsetDateTime};

use super::credentials::{Secret, TOKEN_PREFIX};
use super::extract::TenantScope;
use super::sessions::Desk;
use super::store::{self, Holder};
use super::{Actor, Authority, By, PlatformRole, Role, accounts, members};
use crate::audit;
use crate::db::{self, Within};
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::ids::{ActorId, TenantId};
use crate::quotas::{self, Resource};

/// Longest life of a token in days.
pub const DAYS: i32 = 365;
/// Days of a token unless said otherwise, or as many as the token that makes it has left.
pub const DAYS_DEFAULT: i32 = 90;

/// A token that was made.
pub struct Made {
    /// Number.
    pub id: i64,
    /// The token itself, for the one time that it is shown.
    pub secret: Secret,
    /// Its end.
    pub expires_at: OffsetDateTime,
}

/// Name and life of a token, checked.
pub struct NewToken {
    name: String,
    expires_at: OffsetDateTime,
}

impl NewToken {
    /// Checks name and life. What a token makes does not outlive it: the default ends with it, and more is refused.
    pub fn check(actor: &Actor, name: &str, days: Option<i32>) -> Result<Self, Error> {
        let name = name.trim();
        if !(1..=60).contains(&name.chars().count()) || name.chars().any(|c| crate::fault::plain(c) != c) {
            return Err(accounts::wrong("name", "a token's name has 1 to 60 visible characters"));
        }
        if days.is_some_and(|days| !(1..=DAYS).contains(&days)) {
            return Err(accounts::wrong("days", format!("days is 1 to {DAYS}")));
        }
        let now = OffsetDateTime::now_utc();
        let asked = now + Duration::days(days.unwrap_or(DAYS_DEFAULT).into());
        let expires_at = match actor.ends() {
            Some(end) if asked > end && days.is_some() => {
                let left = (end - now).whole_days();
                let most = if left > 0 { format!("days: {left} at most, or ") } else { String::new() };
                return Err(Error::fault(
                    Fault::new(Code(426), Kind::Invalid, "days", "a token cannot make one that outlives it")
                        .because(format!("the token of this request ends in {left} whole days"))
                        .instead(format!("{most}leave days out: the new token then ends with this one")),
                ));
            }
            Some(end) => asked.min(end),
            None => asked,
        };
        Ok(Self { name: name.to_owned(), expires_at })
    }
}

/// Makes a token as root on the machine, bound to nobody. No limit stands in root's way: it is the way back in when
/// a limit is reached.
pub async fn create_as_root(
    conn: &mut PgConnection,
    name: &str,
    authority: Authority,
    by: &ActorId,
    life: Duration,
) -> Result<(i64, Secret), Error> {
    let secret = Secret::generate(TOKEN_PREFIX);
    let end = OffsetDateTime::now_utc() + life;
    let id = store::insert_token(conn, &secret.hash(), name, authority, Holder::Root, (by, end)).await?;
    let tenant = match authority {
        Authority::Tenant(tenant, _) => Some(tenant),
        Authority::Platform(_) => None,
    };
    let role = match authority {
        Authority::Tenant(_, role) => role.as_str(),
        Authority::Platform(role) => role.as_str(),
    };
    let event = audit::Event {
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
    /// Makes a token for a service account of a tenant.
    pub async fn create_service_token<P>(
        &self,
        scope: &TenantScope<P>,
        service: &str,
        new: NewToken,
    ) -> Result<Made, Error> {
        scope.actor.require_recent()?;
        let tenant = scope.tenant.id;
        let mut tx = db::begin(&self.pool, tenant).await?;
        let (id, role) = store::find_service(&mut tx, tenant, service)
            .await?
            .ok_or_else(|| accounts::wrong("service_account", "there is no such service account"))?;
        let role = Role::parse(&role).ok_or_else(|| Error::internal("an unknown role"))?;
        members::require_within(scope, role)?;
        let made = self
            .insert(&mut tx, scope.by(), new, (Authority::Tenant(tenant, role), Holder::Service(id)))
            .await?;
        tx.commit().await?;
        Ok(made)
    }

    /// Makes a token of one's own for a tenant, with one's own role or a smaller one.
    pub async fn create_own_token(
        &self,
        by: By<'_>,
        authority: Authority,
        new: NewToken,
    ) -> Result<Made, Error> {
        let account = by.actor.require_person()?;
        by.actor.require_recent()?;
        let within = match authority {
            Authority::Tenant(tenant, _) => Within::Tenant(tenant),
            Authority::Platform(_) => Within::Platform,
        };
        let mut tx = db::begin(&self.pool, within).await?;
        let made = self.insert(&mut tx, by, new, (authority, Holder::Person(account))).await?;
        tx.commit().await?;
        Ok(made)
    }

    async fn insert(
        &self,
        tx: &mut db::Tx,
        by: By<'_>,
        new: NewToken,
        (authority, holder): (Authority, Holder),
    ) -> Result<Made, Error> {
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
        Ok(Made { id, secret, expires_at: new.expires_at })
    }

    /// Where a token of one's own may open: the role that one has there now, or less.
    pub async fn own_authority(
        &self,
        actor: &Actor,
        tenant: Option<&str>,
        role: &str,
    ) -> Result<Authority, Error> {
        let account = actor.require_person()?;
        let Some(tenant) = tenant else {
            let wanted = PlatformRole::parse(role)
                .ok_or_else(|| accounts::wrong("role", "role is auditor or admin on the platform"))?;
            return match actor.platform {
                Some(own) if wanted <= own => Ok(Authority::Platform(wanted)),
                _ => Err(Error::Forbidden("a token cannot do more than you".into())),
            };
        };
        let wanted = Role::parse(role)
            .ok_or_else(|| accounts::wrong("role", "role is viewer, deployer or owner in a tenant"))?;
        let mut conn = self.pool.acquire().await?;
        let places = store::tenants_of(&mut conn, account).await?;
        let place = places
            .iter()
            .find(|place| place.tenant == tenant)
            .ok_or_else(|| accounts::wrong("tenant", "you do not belong to such a tenant"))?;
        match Role::parse(&place.role) {
            Some(own) if wanted <= own => Ok(Authority::Tenant(TenantId(place.id), wanted)),
            _ => Err(Error::Forbidden("a token cannot do more than you".into())),
        }
    }

    /// Revokes a token that opens a tenant, or (none) the platform, whoever holds it.
    pub async fn revoke_token(&self, by: By<'_>, tenant: Option<TenantId>, id: i64) -> Result<(), Error> {
        let mut tx = db::begin(&self.pool, tenant.map_or(Within::Platform, Within::Tenant)).await?;
        let name = store::revoke_token(&mut tx, tenant, id).await?.ok_or(Error::NotFound)?;
        by.record(&mut tx, tenant, "token.revoke", &name, json!({"token": id})).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Revokes one of one's own tokens.
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

    /// Makes a service account.
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
                "a service account's name has 2 to 32 of a to z, 0 to 9 and -, and starts with a letter",
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

    /// Takes a service account away, with all its tokens.
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
