//! Handling of the callback of a provider. The callback starts a session with the roles that the provider
//! grants, or continues an existing session, which it confirms or links to the provider.

use serde_json::json;
use subtle::ConstantTimeEq as _;
use time::OffsetDateTime;

use super::vouch::{Back, Vouched};
use super::way::{Goal, Way};
use super::{OidcError, Provider, claims};
use crate::access::credentials::{self, Secret};
use crate::access::sessions::{Client, Desk, note};
use crate::access::store::{self, PendingSignIn};
use crate::access::{Actor, Means, PlatformRole, Role};
use crate::db::{self, Tx, Within};
use crate::error::Error;
use crate::ids::{AccountId, AccountName, ActorId, TenantId};
use crate::quotas::{self, Resource};

/// Kind of the `sign_in` row that marks a login attempt as used.
const KIND: &str = "provider";

/// Result of a callback.
pub enum Came {
    /// A session starts or continues: its reference, and the page to show.
    In(Secret, &'static str),
    /// The callback was refused, with the reason to show.
    Refused(String),
}

impl Desk {
    /// Handles the callback of a provider. An existing session stays unchanged unless every check passes.
    pub async fn come_back(
        &self,
        client: &Client,
        provider: &Provider,
        (callback, cookie): (&str, &str),
        back: &Back,
        actor: Option<&Actor>,
    ) -> Result<Came, Error> {
        let name = &provider.settings.name;
        self.throttle.knock("provider", client.address).await?;
        let refuse = |reason: &OidcError| {
            tracing::warn!(provider = name, %reason, "a sign-in through a provider was refused");
            self.refuse(
                client,
                "anonymous",
                &format!("sign-in through {name}"),
                "invalid response of the provider",
            );
            Ok(Came::Refused(reason.to_string()))
        };
        let Some(way) = Way::parse(&self.keys, name, cookie) else {
            return refuse(&OidcError(
                "the sign-in took too long, or started in another browser; start again".into(),
            ));
        };
        if !bool::from(way.state().as_bytes().ct_eq(back.state.as_bytes())) {
            return refuse(&OidcError("this response belongs to another sign-in; start again".into()));
        }
        if back.iss.as_ref().is_some_and(|iss| *iss != provider.settings.issuer) {
            return refuse(&OidcError("this response comes from another provider".into()));
        }
        if back.error.is_some() || back.code.is_empty() {
            return refuse(&OidcError("the sign-in was denied".into()));
        }
        // Mark the attempt as used before the code is redeemed: it must not run twice, whatever the outcome.
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        let begun = PendingSignIn { account_id: None, provider: Some(name.clone()), session_id: None };
        let hash = credentials::hash(&way.text);
        if !store::mark_used(&mut tx, &hash, KIND, &begun).await? {
            return refuse(&OidcError("this response was already used; start again".into()));
        }
        tx.commit().await?;
        let vouched = match provider.vouch(&self.keys, callback, &way, back).await {
            Ok(vouched) => vouched,
            Err(reason) => return refuse(&reason),
        };
        match way.goal {
            Goal::SignIn => self.admit(client, provider, &vouched).await,
            Goal::Confirm(session) | Goal::Link(session) => {
                let now = OffsetDateTime::now_utc().unix_timestamp();
                // The user must have authenticated since this attempt began; an earlier provider session does
                // not count.
                if vouched.authenticated.is_none_or(|at| at > now + 60 || at < way.begun - 5) {
                    return refuse(&OidcError("the provider did not ask you to sign in again".into()));
                }
                match actor {
                    Some(actor) if matches!(actor.means, Means::Session { id, .. } if id == session) => {
                        self.confirm_through(client, &vouched, actor, way.goal, name).await
                    }
                    _ => refuse(&OidcError("the session of this request has ended; sign in again".into())),
                }
            }
        }
    }

    async fn confirm_through(
        &self,
        client: &Client,
        vouched: &Vouched,
        actor: &Actor,
        goal: Goal,
        provider: &str,
    ) -> Result<Came, Error> {
        let account = actor.require_person()?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        let known = store::find_identity(&mut tx, &vouched.issuer, &vouched.subject).await?;
        let (Goal::Confirm(session) | Goal::Link(session)) = goal else { return Err(Error::NotFound) };
        match (goal, known) {
            (Goal::Confirm(_), Some((owner, ..))) if owner == account => {}
            (Goal::Link(_), None) => {
                actor.require_recent()?;
                if !store::insert_identity(&mut tx, &vouched.issuer, &vouched.subject, account).await? {
                    return Ok(Came::Refused("the provider account does not match this account".into()));
                }
                let detail = json!({"provider": provider});
                note(&mut tx, None, &actor.id, "account.link", &actor.name, &client.request_id, detail)
                    .await?;
            }
            _ => return Ok(Came::Refused("the provider account does not match this account".into())),
        }
        match self.renew(&mut tx, client, actor, session).await? {
            Some(fresh) => {
                tx.commit().await?;
                Ok(Came::In(fresh, "/account"))
            }
            None => Ok(Came::Refused("the session of this request has ended; sign in again".into())),
        }
    }

    /// Signs a user in. A user is known by issuer and subject. An unknown user gets an account if the provider
    /// grants a role or the settings admit all.
    async fn admit(&self, client: &Client, provider: &Provider, vouched: &Vouched) -> Result<Came, Error> {
        let settings = &provider.settings;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        let (account, name) = match store::find_identity(&mut tx, &vouched.issuer, &vouched.subject).await? {
            Some((account, name, false)) => (account, name),
            Some((account, name, true)) => {
                let who = format!("account:{account} {name}");
                self.refuse(
                    client,
                    &who,
                    &format!("sign-in through {}", settings.name),
                    "the account is disabled",
                );
                return Ok(Came::Refused("the sign-in was denied".into()));
            }
            None if vouched.given.is_nothing() && !settings.admit_all => {
                return Ok(Came::Refused(
                    "you signed in at the provider, but have no role here; ask an admin".into(),
                ));
            }
            None => self.make_account(&mut tx, client, settings, vouched).await?,
        };
        give(&mut tx, &settings.name, vouched, account, (&name, &client.request_id)).await?;
        let session = self.begin(&mut tx, client, account, &name, &settings.name).await?;
        tx.commit().await?;
        Ok(Came::In(session, "/"))
    }

    async fn make_account(
        &self,
        tx: &mut Tx,
        client: &Client,
        settings: &crate::config::ProviderSettings,
        vouched: &Vouched,
    ) -> Result<(AccountId, String), Error> {
        let base = claims::name(
            &[vouched.preferred.as_deref(), vouched.email.as_deref(), Some(&vouched.subject)],
            &settings.name,
        );
        // A name that is taken never links the user to that account.
        let mut name: AccountName = match base.parse() {
            Ok(name) => name,
            Err(_) => format!("{base}-user").parse().map_err(Error::internal)?,
        };
        while store::find_account_id(tx, &name).await?.is_some() {
            let more = &Secret::generate("").expose()[..6].to_owned();
            name = format!("{base}-{more}").parse().map_err(Error::internal)?;
        }
        let display = claims::display_name(vouched.display.as_deref(), name.as_str());
        let account = store::insert_account(tx, &name, &display, None, None).await?;
        // A concurrent sign-in of the same user already created the account.
        if !store::insert_identity(tx, &vouched.issuer, &vouched.subject, account).await? {
            return Err(Error::Conflict(
                "another sign-in of this user has just created the account; start again".into(),
            ));
        }
        let actor = ActorId::new(&format!("account:{account} {name}"));
        let detail = json!({"provider": settings.name});
        note(tx, None, &actor, "account.create", name.as_str(), &client.request_id, detail).await?;
        Ok((account, name.to_string()))
    }
}

/// Updates an account's roles to those that the provider grants now, and removes those that it no longer
/// grants. Roles that were set by hand stay.
async fn give(
    tx: &mut Tx,
    provider: &str,
    vouched: &Vouched,
    account: AccountId,
    (name, request_id): (&str, &str),
) -> Result<(), Error> {
    let actor = ActorId::new(&format!("account:{account} {name}"));
    let (has, source) = store::platform_standing(tx, account).await?;
    let wanted = vouched.given.platform.map(PlatformRole::as_str);
    if has.as_deref() != wanted && (source == provider || (has.is_none() && source == "local")) {
        store::set_platform_role(tx, account, wanted, provider).await?;
        let detail = json!({"platform_role": wanted.unwrap_or("none"), "provider": provider});
        note(tx, None, &actor, "account.change", name, request_id, detail).await?;
    }
    let before = store::tenants_of(tx, account).await?;
    for place in before.iter().filter(|place| place.source == provider) {
        if !vouched.given.tenants.iter().any(|(tenant, _)| tenant.as_str() == place.tenant) {
            let id = TenantId(place.id);
            db::enter(tx, id).await?;
            store::delete_member(tx, id, account).await?;
            let detail = json!({"provider": provider});
            note(tx, id, &actor, "member.remove", name, request_id, detail).await?;
        }
    }
    for (tenant, role) in &vouched.given.tenants {
        let place = before.iter().find(|place| place.tenant == tenant.as_str());
        let stays =
            place.is_some_and(|place| place.source != provider || Role::parse(&place.role) == Some(*role));
        let Some((id, true)) = store::find_active_tenant(tx, tenant).await? else { continue };
        if stays {
            continue;
        }
        db::enter(tx, id).await?;
        if place.is_none() {
            match quotas::take_place(tx, id, Resource::Members).await {
                Ok(()) => {}
                // Only this tenant is full, so the sign-in continues.
                Err(Error::QuotaExceeded(_)) => {
                    tracing::warn!(%tenant, name, provider, "the tenant is at its limit of members; the role is not granted");
                    continue;
                }
                Err(other) => return Err(other),
            }
        }
        store::set_member(tx, id, account, *role, provider, &ActorId::new(provider)).await?;
        let detail = json!({"provider": provider, "role": role.as_str()});
        note(tx, id, &actor, "member.join", name, request_id, detail).await?;
    }
    Ok(())
}
