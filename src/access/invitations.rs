//! Links that are used once: an invitation, or a new password. The link is shown to whoever made it, to pass
//! on; here is its hash. It names its recipient: nobody else can use it for another account.

use serde_json::json;
use sqlx::PgPool;

use super::credentials::{self, Secret};
use super::extract::TenantScope;
use super::sessions::{Client, Desk, note};
use super::store::{self, Link, NewLink};
use super::{Actor, PlatformRole, Role, accounts, members};
use crate::audit;
use crate::db::{self, Tx, Within};
use crate::error::Error;
use crate::fault::plain;
use crate::ids::{AccountId, AccountName, ActorId, TenantId};

/// Hours that an invitation is good unless said otherwise, and at most.
pub const HOURS: (i32, i32) = (72, 168);
/// Hours that a link for a new password is good.
const RESET_HOURS: i32 = 4;

/// Makes the one-time link for an admin's account, as root on the machine: its path. Earlier ones end.
pub async fn make_first_admin_link(pool: &PgPool) -> Result<String, Error> {
    let secret = Secret::generate("");
    let mut tx = db::begin(pool, Within::Platform).await?;
    store::replace_first_link(&mut tx, &secret.hash()).await?;
    let root = ActorId::new("root");
    note(&mut tx, &root, "account.first_admin_link", "first admin", "command line", json!({})).await?;
    tx.commit().await?;
    Ok(format!("/first-admin/{}", secret.expose()))
}

/// A link that was made: number and code.
pub struct Made {
    /// Number.
    pub id: i64,
    /// Path below our own address, with the code in it.
    pub path: String,
}

fn made(id: i64, kind: &str, secret: &Secret) -> Made {
    Made { id, path: format!("/{kind}/{}", secret.expose()) }
}

/// Where a link leads, for its page.
pub struct Seen {
    /// Whom it is for.
    pub recipient: String,
    /// Whether somebody of that name has an account.
    pub has_account: bool,
    /// The tenant.
    pub tenant: Option<String>,
    /// The role that it gives.
    pub role: Option<String>,
    /// Who made it.
    pub by: String,
    pub(super) kind: Kind,
}

/// What a link is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// To become somebody here.
    Invitation,
    /// To set a new password.
    Reset,
}

/// Name and password of somebody who is new.
pub struct NewPerson<'a> {
    /// For people.
    pub display_name: &'a str,
    /// Password.
    pub password: &'a str,
}

/// Checks a name for people.
pub(super) fn check_display_name(text: &str) -> Result<&str, Error> {
    let text = text.trim();
    let count = text.chars().count();
    if (1..=120).contains(&count) && text.chars().all(|c| plain(c) == c) {
        Ok(text)
    } else {
        Err(accounts::wrong(
            "display_name",
            "a name for people has 1 to 120 characters, and none that controls, hides or turns text",
        ))
    }
}

impl Desk {
    /// Invites somebody into a tenant.
    pub async fn invite<P>(
        &self,
        scope: &TenantScope<P>,
        recipient: &AccountName,
        role: Role,
        hours: i32,
    ) -> Result<Made, Error> {
        scope.actor.require_recent()?;
        members::require_within(scope, role)?;
        check_hours(&scope.actor, hours)?;
        let secret = Secret::generate("");
        let tenant = Some(scope.tenant.id);
        let mut tx = db::begin(&self.pool, scope.tenant.id).await?;
        store::end_links(&mut tx, "invitation", tenant, recipient.as_str()).await?;
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
        let event = audit::Event {
            tenant,
            actor: &scope.actor.id,
            action: "member.invite",
            object: recipient.as_str(),
            request_id: &scope.request_id.0,
            detail: json!({"role": role.as_str(), "hours": hours}),
        };
        audit::record(&mut tx, event).await?;
        tx.commit().await?;
        Ok(made(id, "invitations", &secret))
    }

    /// Invites somebody to the platform itself, with a role there or none.
    pub async fn invite_to_platform(
        &self,
        actor: &Actor,
        request_id: &str,
        recipient: &AccountName,
        role: Option<PlatformRole>,
        hours: i32,
    ) -> Result<Made, Error> {
        actor.require_recent()?;
        check_hours(actor, hours)?;
        let secret = Secret::generate("");
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        store::end_links(&mut tx, "invitation", None, recipient.as_str()).await?;
        let new = NewLink {
            kind: "invitation",
            tenant: None,
            role: None,
            platform_role: role.map(PlatformRole::as_str),
            recipient: recipient.as_str(),
            account: None,
            by: &actor.id,
            hours,
        };
        let id = store::insert_link(&mut tx, &secret.hash(), &new).await?;
        let detail = json!({"role": role.map_or("none", PlatformRole::as_str), "hours": hours});
        note(&mut tx, &actor.id, "account.invite", recipient.as_str(), request_id, detail).await?;
        tx.commit().await?;
        Ok(made(id, "invitations", &secret))
    }

    /// Takes an invitation back.
    pub async fn revoke_invitation(
        &self,
        actor: &Actor,
        request_id: &str,
        tenant: Option<TenantId>,
        id: i64,
    ) -> Result<(), Error> {
        let mut tx = db::begin(&self.pool, tenant.map_or(Within::Platform, Within::Tenant)).await?;
        let recipient = store::revoke_invitation(&mut tx, tenant, id).await?.ok_or(Error::NotFound)?;
        let event = audit::Event {
            tenant,
            actor: &actor.id,
            action: "invitation.revoke",
            object: &recipient,
            request_id,
            detail: json!({}),
        };
        audit::record(&mut tx, event).await?;
        tx.commit().await?;
        Ok(())
    }

    /// A link for a new password, made by an admin for anybody.
    pub async fn reset(&self, actor: &Actor, request_id: &str, name: &AccountName) -> Result<Made, Error> {
        actor.require_recent()?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        let account = store::find_account_id(&mut tx, name).await?.ok_or(Error::NotFound)?;
        let made = insert_reset(&mut tx, None, name.as_str(), account, &actor.id).await?;
        note(&mut tx, &actor.id, "account.reset", name.as_str(), request_id, json!({})).await?;
        tx.commit().await?;
        Ok(made)
    }

    /// The same, made by an owner for a member: only for somebody who belongs to this tenant alone. Else an
    /// owner could become who that person is elsewhere.
    pub async fn reset_member<P>(&self, scope: &TenantScope<P>, name: &str) -> Result<Made, Error> {
        scope.actor.require_recent()?;
        let tenant = scope.tenant.id;
        let mut tx = db::begin(&self.pool, tenant).await?;
        let (account, role, source) =
            store::find_member(&mut tx, tenant, name).await?.ok_or(Error::NotFound)?;
        if let Some(role) = Role::parse(&role) {
            members::require_within(scope, role)?;
        }
        if source != "local" {
            return Err(Error::Conflict("this person signs in through a provider".into()));
        }
        if !belongs_here_alone(&mut tx, account, tenant).await? {
            return Err(elsewhere());
        }
        let made = insert_reset(&mut tx, Some(tenant), name, account, &scope.actor.id).await?;
        let event = audit::Event {
            tenant: Some(tenant),
            actor: &scope.actor.id,
            action: "member.reset",
            object: name,
            request_id: &scope.request_id.0,
            detail: json!({}),
        };
        audit::record(&mut tx, event).await?;
        tx.commit().await?;
        Ok(made)
    }

    /// What stands behind a code; looking does not use it up.
    pub async fn look_at_link(&self, client: &Client, code: &str) -> Result<Seen, Error> {
        self.throttle.knock("link", client.address).await?;
        let mut conn = self.pool.acquire().await?;
        let link = store::find_link(&mut conn, &credentials::hash(code)).await?.ok_or(Error::NotFound)?;
        let account = match link.recipient.parse() {
            Ok(name) => store::find_account_id(&mut conn, &name).await?,
            Err(_) => None,
        };
        Ok(Seen {
            has_account: account.is_some(),
            kind: if link.kind == "reset" { Kind::Reset } else { Kind::Invitation },
            role: link.role.or(link.platform_role),
            recipient: link.recipient,
            tenant: link.tenant,
            by: link.created_by,
        })
    }

    /// Accepts an invitation: as the person it is for, signed in; or as somebody new, who is then signed in.
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
            return Err(Error::Conflict("the tenant does not take anybody right now".into()));
        }
        // The password costs time: before the transaction, never within.
        let new = match &as_whom {
            Ok(actor) if actor.name == link.recipient => None,
            Ok(_) => {
                return Err(Error::Forbidden(format!(
                    "this invitation is for {}; sign in as that person",
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

    /// Sets a new password by a link. Every session and every token of the person ends; a second factor stays.
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
            // The person may have come to belong elsewhere since.
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
        note(&mut tx, &actor, "account.password", &link.recipient, &client.request_id, detail).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Becomes the first admin: uses the link up, makes the account and signs in.
    pub async fn become_first_admin(
        &self,
        client: &Client,
        code: &str,
        name: &str,
        person: &NewPerson<'_>,
    ) -> Result<Secret, Error> {
        self.throttle.knock("link", client.address).await?;
        let mut conn = self.pool.acquire().await?;
        if !store::is_first_link_good(&mut conn, &credentials::hash(code)).await? {
            return Err(Error::NotFound);
        }
        drop(conn);
        let name = accounts::account_name("name", name)?;
        let display_name = check_display_name(person.display_name)?;
        let password = self.prepare_password(name.as_str(), person.password).await?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        if !store::use_first_link(&mut tx, &credentials::hash(code)).await? {
            return Err(Error::NotFound);
        }
        let account =
            store::insert_account(&mut tx, &name, display_name, Some(&password), Some("admin")).await?;
        let actor = ActorId::new("first-admin link");
        let detail = json!({"platform_role": "admin"});
        note(&mut tx, &actor, "account.create", name.as_str(), &client.request_id, detail).await?;
        let session = self.begin(&mut tx, client, account, name.as_str(), "first-admin link").await?;
        tx.commit().await?;
        Ok(session)
    }

    /// Whether the first admin's link is good.
    pub async fn is_first_link_good(&self, client: &Client, code: &str) -> Result<bool, Error> {
        self.throttle.knock("link", client.address).await?;
        let mut conn = self.pool.acquire().await?;
        store::is_first_link_good(&mut conn, &credentials::hash(code)).await
    }
}

/// Checks how long an invitation is good: what a token makes does not outlive it.
fn check_hours(actor: &Actor, hours: i32) -> Result<(), Error> {
    if !(1..=HOURS.1).contains(&hours) {
        return Err(accounts::wrong("hours", format!("hours is 1 to {}", HOURS.1)));
    }
    let end = time::OffsetDateTime::now_utc() + time::Duration::hours(hours.into());
    if actor.ends().is_some_and(|own| end > own) {
        return Err(accounts::wrong("hours", "a token cannot make an invitation that outlives it"));
    }
    Ok(())
}

fn elsewhere() -> Error {
    Error::Conflict(
        "this person belongs to more than this tenant: only an admin of the platform makes such a link"
            .into(),
    )
}

async fn belongs_here_alone(tx: &mut Tx, account: AccountId, tenant: TenantId) -> Result<bool, Error> {
    let places = store::tenants_of(tx, account).await?;
    let (platform, _) = store::platform_standing(tx, account).await?;
    // Who also signs in through a provider may be given more there: an owner here would come to have it.
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
) -> Result<Made, Error> {
    let secret = Secret::generate("");
    store::end_links(tx, "reset", tenant, recipient).await?;
    let new = NewLink {
        kind: "reset",
        tenant,
        role: None,
        platform_role: None,
        recipient,
        account: Some(account.0),
        by,
        hours: RESET_HOURS,
    };
    let id = store::insert_link(tx, &secret.hash(), &new).await?;
    Ok(made(id, "reset", &secret))
}

/// Gives what an invitation promises.
async fn give(tx: &mut Tx, link: &Link, account: AccountId, request_id: &str) -> Result<(), Error> {
    let actor = ActorId::new(&format!("account:{account} {}", link.recipient));
    let by = ActorId::new(&link.created_by);
    if let (Some(tenant), Some(role)) =
        (link.tenant_id.map(TenantId), link.role.as_deref().and_then(Role::parse))
    {
        // An invitation never lowers what somebody has.
        let has = store::find_member(tx, tenant, &link.recipient).await?;
        if has.and_then(|(_, role, _)| Role::parse(&role)).is_none_or(|has| has < role) {
            store::set_member(tx, tenant, account, role, "local", &by).await?;
        }
        let event = audit::Event {
            tenant: Some(tenant),
            actor: &actor,
            action: "member.join",
            object: &link.recipient,
            request_id,
            detail: json!({"role": role.as_str(), "invited_by": link.created_by}),
        };
        return audit::record(tx, event).await;
    }
    let (has, _) = store::platform_standing(tx, account).await?;
    let has = has.as_deref().and_then(PlatformRole::parse);
    // Nor does one to the platform: it never lowers either.
    if let Some(role) = link.platform_role.as_ref().filter(|role| PlatformRole::parse(role) > has) {
        store::set_platform_role(tx, account, Some(role), "hand").await?;
    }
    let detail = json!({"platform_role": link.platform_role, "invited_by": link.created_by});
    note(tx, &actor, "account.join", &link.recipient, request_id, detail).await
}
