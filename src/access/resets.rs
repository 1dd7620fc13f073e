//! Password reset links. An admin creates them for any account, an owner only for users of that tenant alone.

use serde_json::json;

use super::credentials::{self, Secret};
use super::extract::TenantScope;
use super::links::{CreatedLink, made};
use super::sessions::{Client, Desk, note};
use super::store::{self, NewLink};
use super::{By, Role, members};
use crate::db::{self, Tx, Within};
use crate::error::Error;
use crate::ids::{AccountId, AccountName, ActorId, TenantId};
use crate::quotas::{self, Resource};

/// Lifetime of a password reset link, in hours.
const HOURS: i32 = 4;

impl Desk {
    /// Creates a password reset link for any account, as an admin.
    pub async fn reset(&self, by: By<'_>, name: &AccountName) -> Result<CreatedLink, Error> {
        by.actor.require_recent()?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        let account = store::find_account_id(&mut tx, name).await?.ok_or(Error::NotFound)?;
        let made = insert_reset(&mut tx, None, name.as_str(), account, &by.actor.id).await?;
        by.record(&mut tx, None, "account.reset", name.as_str(), json!({})).await?;
        tx.commit().await?;
        Ok(made)
    }

    /// Creates a password reset link for a member, as an owner. The member must belong to this tenant only:
    /// otherwise the owner could take over the account's access to other tenants.
    pub async fn reset_member<P>(&self, scope: &TenantScope<P>, name: &str) -> Result<CreatedLink, Error> {
        scope.actor.require_recent()?;
        let tenant = scope.tenant.id;
        let mut tx = db::begin(&self.pool, tenant).await?;
        let (account, role, source) =
            store::find_member(&mut tx, tenant, name).await?.ok_or(Error::NotFound)?;
        if let Some(role) = Role::parse(&role) {
            members::require_within(scope, role)?;
        }
        if source != "local" {
            return Err(Error::Conflict(
                "this member signs in through a provider; reset the password there".into(),
            ));
        }
        if !belongs_here_alone(&mut tx, account, tenant).await? {
            return Err(elsewhere());
        }
        let made = insert_reset(&mut tx, Some(tenant), name, account, &scope.actor.id).await?;
        scope.by().record(&mut tx, scope.tenant.id, "member.reset", name, json!({})).await?;
        tx.commit().await?;
        Ok(made)
    }

    /// Sets a new password through a link. Ends all sessions and tokens of the account. A second factor stays.
    pub async fn use_reset(&self, client: &Client, code: &str, password: &str) -> Result<(), Error> {
        self.throttle.knock("link", client.address).await?;
        let mut conn = self.pool.acquire().await?;
        let link = store::find_link(&mut conn, &credentials::hash(code)).await?.ok_or(Error::NotFound)?;
        drop(conn);
        let (true, Some(account)) = (link.kind == "reset", link.account_id) else {
            return Err(Error::NotFound);
        };
        let account = AccountId(account);
        let hash = self.prepare_password(&link.recipient, password).await?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        if let Some(tenant) = link.tenant_id.map(TenantId) {
            db::enter(&mut tx, tenant).await?;
            // The user may have joined another tenant in the meantime.
            if !belongs_here_alone(&mut tx, account, tenant).await? {
                return Err(elsewhere());
            }
        }
        if !store::use_link(&mut tx, link.id).await? {
            return Err(Error::NotFound);
        }
        store::set_password(&mut tx, account, &hash).await?;
        store::delete_sessions_but(&mut tx, account, None).await?;
        for token in store::list_own_tokens(&mut tx, account).await? {
            store::revoke_own_token(&mut tx, account, token.id).await?;
        }
        let actor = ActorId::new(&format!("account:{account} {}", link.recipient));
        let detail = json!({"by_link": true});
        note(&mut tx, None, &actor, "account.password", &link.recipient, &client.request_id, detail).await?;
        tx.commit().await?;
        Ok(())
    }
}

fn elsewhere() -> Error {
    Error::Conflict(
        "this member has access beyond this tenant; ask an admin of the platform for a password reset link"
            .into(),
    )
}

async fn belongs_here_alone(tx: &mut Tx, account: AccountId, tenant: TenantId) -> Result<bool, Error> {
    let places = store::tenants_of(tx, account).await?;
    let (platform, _) = store::platform_standing(tx, account).await?;
    // A provider may later grant a linked account more access. The owner would gain that access too.
    let through = store::list_issuers(tx, account).await?;
    Ok(platform.is_none()
        && through.is_empty()
        && places.iter().any(|place| place.id == tenant.0)
        && places.iter().all(|place| place.id == tenant.0))
}

async fn insert_reset(
    tx: &mut Tx,
    tenant: Option<TenantId>,
    recipient: &str,
    account: AccountId,
    by: &ActorId,
) -> Result<CreatedLink, Error> {
    let secret = Secret::generate("");
    store::end_links(tx, "reset", tenant, recipient).await?;
    match tenant {
        Some(tenant) => quotas::take_place(tx, tenant, Resource::Invitations).await?,
        None => quotas::take_platform_place(tx, Resource::PlatformInvitations).await?,
    }
    let new = NewLink {
        kind: "reset",
        tenant,
        role: None,
        platform_role: None,
        recipient,
        account: Some(account.0),
        by,
        hours: HOURS,
    };
    let id = store::insert_link(tx, &secret.hash(), &new).await?;
    Ok(made(id, "reset", &secret))
}
