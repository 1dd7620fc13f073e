//! Invitations: into a tenant by an owner, to the platform by an admin. Each is a single-use link.

use serde_json::json;

use super::credentials::{self, Secret};
use super::extract::TenantScope;
use super::links::{CreatedLink, NewPerson, check_display_name, made};
use super::sessions::{Client, Desk, note};
use super::store::{self, LinkRecord, NewLink};
use super::{Actor, By, PlatformRole, Role, accounts, members};
use crate::db::{self, Tx, Within};
use crate::error::Error;
use crate::ids::{AccountId, AccountName, ActorId, TenantId};
use crate::quotas::{self, Resource};

/// Default and maximum lifetime of an invitation, in hours.
pub const HOURS: (i32, i32) = (72, 168);

impl Desk {
    /// Invites a user into a tenant.
    pub async fn invite<P>(
        &self,
        scope: &TenantScope<P>,
        recipient: &AccountName,
        role: Role,
        hours: i32,
    ) -> Result<CreatedLink, Error> {
        scope.actor.require_recent()?;
        members::require_within(scope, role)?;
        check_hours(&scope.actor, hours)?;
        let secret = Secret::generate("");
        let tenant = Some(scope.tenant.id);
        let mut tx = db::begin(&self.pool, scope.tenant.id).await?;
        store::end_links(&mut tx, "invitation", tenant, recipient.as_str()).await?;
        quotas::take_place(&mut tx, scope.tenant.id, Resource::Invitations).await?;
        let new = NewLink {
            kind: "invitation",
            tenant,
            role: Some(role.as_str()),
            platform_role: None,
            recipient: recipient.as_str(),
            account: None,
            by: &scope.actor.id,
            hours,
        };
        let id = store::insert_link(&mut tx, &secret.hash(), &new).await?;
        let detail = json!({"role": role.as_str(), "hours": hours});
        scope.by().record(&mut tx, tenant, "member.invite", recipient.as_str(), detail).await?;
        tx.commit().await?;
        Ok(made(id, "invitations", &secret))
    }

    /// Invites a user to the platform itself, with or without a platform role.
    pub async fn invite_to_platform(
        &self,
        by: By<'_>,
        recipient: &AccountName,
        role: Option<PlatformRole>,
        hours: i32,
    ) -> Result<CreatedLink, Error> {
        by.actor.require_recent()?;
        check_hours(by.actor, hours)?;
        let secret = Secret::generate("");
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        store::end_links(&mut tx, "invitation", None, recipient.as_str()).await?;
        quotas::take_platform_place(&mut tx, Resource::PlatformInvitations).await?;
        let new = NewLink {
            kind: "invitation",
            tenant: None,
            role: None,
            platform_role: role.map(PlatformRole::as_str),
            recipient: recipient.as_str(),
            account: None,
            by: &by.actor.id,
            hours,
        };
        let id = store::insert_link(&mut tx, &secret.hash(), &new).await?;
        let detail = json!({"role": role.map_or("none", PlatformRole::as_str), "hours": hours});
        by.record(&mut tx, None, "account.invite", recipient.as_str(), detail).await?;
        tx.commit().await?;
        Ok(made(id, "invitations", &secret))
    }

    /// Revokes an invitation.
    pub async fn revoke_invitation(
        &self,
        by: By<'_>,
        tenant: Option<TenantId>,
        id: i64,
    ) -> Result<(), Error> {
        let mut tx = db::begin(&self.pool, tenant.map_or(Within::Platform, Within::Tenant)).await?;
        let recipient = store::revoke_invitation(&mut tx, tenant, id).await?.ok_or(Error::NotFound)?;
        by.record(&mut tx, tenant, "invitation.revoke", &recipient, json!({})).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Accepts an invitation, either as the signed-in recipient or as a new user. Signs a new user in.
    pub async fn accept(
        &self,
        client: &Client,
        code: &str,
        as_whom: Result<&Actor, NewPerson<'_>>,
    ) -> Result<Option<Secret>, Error> {
        self.throttle.knock("link", client.address).await?;
        let hash = credentials::hash(code);
        let mut conn = self.pool.acquire().await?;
        let link = store::find_link(&mut conn, &hash).await?.ok_or(Error::NotFound)?;
        drop(conn);
        if link.kind != "invitation" {
            return Err(Error::NotFound);
        }
        if link.tenant_state.as_deref().is_some_and(|state| state != "active") {
            return Err(Error::Conflict("the tenant is not active and accepts no new members now".into()));
        }
        // Hashing the password is slow, so it happens before the transaction.
        let new = match &as_whom {
            Ok(actor) if actor.name == link.recipient => None,
            Ok(_) => {
                return Err(Error::Forbidden(format!(
                    "this invitation is for {}; sign in with that account",
                    link.recipient
                )));
            }
            Err(person) => {
                let display_name = check_display_name(person.display_name)?;
                Some((display_name, self.prepare_password(&link.recipient, person.password).await?))
            }
        };
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        if let Some(tenant) = link.tenant_id {
            db::enter(&mut tx, TenantId(tenant)).await?;
        }
        if !store::use_link(&mut tx, link.id).await? {
            return Err(Error::NotFound);
        }
        let (account, session) = match (&as_whom, new) {
            (Ok(actor), _) => (actor.require_person()?, None),
            (Err(_), Some((display_name, hash))) => {
                let name: AccountName = link.recipient.parse().map_err(Error::internal)?;
                let account = store::insert_account(&mut tx, &name, display_name, Some(&hash), None).await?;
                let session = self.begin(&mut tx, client, account, &link.recipient, "invitation").await?;
                (account, Some(session))
            }
            (Err(_), None) => return Err(Error::NotFound),
        };
        give(&mut tx, &link, account, &client.request_id).await?;
        tx.commit().await?;
        Ok(session)
    }
}

/// Checks the lifetime of an invitation. An invitation that a token creates must not outlive the token.
fn check_hours(actor: &Actor, hours: i32) -> Result<(), Error> {
    if !(1..=HOURS.1).contains(&hours) {
        return Err(accounts::wrong("hours", format!("hours must be 1 to {}", HOURS.1)));
    }
    let end = time::OffsetDateTime::now_utc() + time::Duration::hours(hours.into());
    if actor.ends().is_some_and(|own| end > own) {
        return Err(accounts::wrong("hours", "a token cannot create an invitation that outlives it"));
    }
    Ok(())
}

/// Gives the recipient the role of the invitation.
async fn give(tx: &mut Tx, link: &LinkRecord, account: AccountId, request_id: &str) -> Result<(), Error> {
    let actor = ActorId::new(&format!("account:{account} {}", link.recipient));
    let by = ActorId::new(&link.created_by);
    if let (Some(tenant), Some(role)) =
        (link.tenant_id.map(TenantId), link.role.as_deref().and_then(Role::parse))
    {
        // An invitation never lowers an existing role.
        let has = store::find_member(tx, tenant, &link.recipient).await?;
        if has.is_none() {
            quotas::take_place(tx, tenant, Resource::Members).await?;
        }
        if has.and_then(|(_, role, _)| Role::parse(&role)).is_none_or(|has| has < role) {
            store::set_member(tx, tenant, account, role, "local", &by).await?;
        }
        let detail = json!({"role": role.as_str(), "invited_by": link.created_by});
        return note(tx, tenant, &actor, "member.join", &link.recipient, request_id, detail).await;
    }
    let (has, _) = store::platform_standing(tx, account).await?;
    let has = has.as_deref().and_then(PlatformRole::parse);
    // The same holds for a platform role.
    if let Some(role) = link.platform_role.as_ref().filter(|role| PlatformRole::parse(role) > has) {
        store::set_platform_role(tx, account, Some(role), "hand").await?;
    }
    let detail = json!({"platform_role": link.platform_role, "invited_by": link.created_by});
    note(tx, None, &actor, "account.join", &link.recipient, request_id, detail).await
}
