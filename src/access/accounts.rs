//! Account actions: changes that users make to their own account, and admins to other accounts.

use serde_json::{Value, json};

use super::passwords::{self, PasswordVerdict};
use super::second_factor::{self, Setup};
use super::sessions::{Client, Desk, note};
use super::{Actor, By, PlatformRole, store};
use crate::db::{self, Within};
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::ids::{AccountId, AccountName};

/// Returns a fault of one field.
pub(super) fn wrong(path: &str, message: impl Into<String>) -> Error {
    Error::fault(Fault::new(Code(426), Kind::Invalid, path, message))
}

/// Parses an account name. Returns a fault of the field `path` if it is invalid.
pub(super) fn account_name(path: &str, text: &str) -> Result<AccountName, Error> {
    text.trim().to_lowercase().parse().map_err(|error: crate::ids::NameError| wrong(path, error.to_string()))
}

/// A change to an account. `None` leaves a property unchanged.
#[derive(Debug, Default)]
pub struct Change {
    /// Platform role. `Some(None)` removes the role.
    pub platform_role: Option<Option<PlatformRole>>,
    /// Whether the account is disabled.
    pub disabled: Option<bool>,
}

impl Desk {
    /// Sets the actor's own password. Ends all other sessions of the account.
    pub async fn change_password(
        &self,
        client: &Client,
        actor: &Actor,
        current: &str,
        new: &str,
    ) -> Result<(), Error> {
        let (account, session) = actor.require_session()?;
        actor.require_recent()?;
        self.throttle.guess(&actor.name, client.address, Some(account)).await?;
        let mut conn = self.pool.acquire().await?;
        let found = store::find_for_sign_in(&mut conn, &actor.name).await?.ok_or(Error::NotFound)?;
        if found.password.is_none() && !store::list_issuers(&mut conn, account).await?.is_empty() {
            return Err(Error::Conflict(
                "this account signs in through a provider; ask an admin for a link to set a password".into(),
            ));
        }
        drop(conn);
        if found.password.is_some()
            && self.passwords.verify(current, found.password.as_deref()).await? == PasswordVerdict::Wrong
        {
            return Err(wrong("current", "the current password is wrong"));
        }
        if let Some(why) = passwords::objection(new, &[&actor.name, "bulkhead"]) {
            return Err(wrong("new", why));
        }
        let hash = self.passwords.hash(new).await?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        store::set_password(&mut tx, account, &hash).await?;
        let ended = store::delete_sessions_but(&mut tx, account, Some(session)).await?;
        store::forgive(&mut tx, &self.throttle.pair(&actor.name, client.address)).await?;
        let detail = json!({"sessions_ended": ended});
        note(&mut tx, None, &actor.id, "account.password", &actor.name, &client.request_id, detail).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Starts the setup of a second factor and returns the secret to scan. The factor is not active yet.
    pub async fn begin_second_factor(&self, by: By<'_>) -> Result<Setup, Error> {
        let account = by.actor.require_person()?;
        by.actor.require_recent()?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        let setup = second_factor::begin(&mut tx, &self.keys, account, &by.actor.name).await?;
        by.record(&mut tx, None, "account.second_factor_begin", &by.actor.name, json!({})).await?;
        tx.commit().await?;
        Ok(setup)
    }

    /// Activates the second factor with the first valid code. Returns the recovery codes, which are shown once.
    /// Ends all other sessions.
    pub async fn confirm_second_factor(
        &self,
        client: &Client,
        actor: &Actor,
        code: &str,
    ) -> Result<Vec<String>, Error> {
        let (account, session) = actor.require_session()?;
        actor.require_recent()?;
        self.throttle.guess_factor(account, client.address).await?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        match store::find_factor(&mut tx, account).await? {
            Some(factor) if !factor.confirmed => {}
            _ => return Err(Error::Conflict("no second factor setup is pending; start one first".into())),
        }
        if !second_factor::check_code(&mut tx, &self.keys, account, code, second_factor::now()).await? {
            return Err(wrong("code", "the code is not valid now; check the clock of the device"));
        }
        let codes = second_factor::make_recovery_codes(&mut tx, account).await?;
        store::forgive(&mut tx, &self.throttle.factor(account)).await?;
        store::delete_sessions_but(&mut tx, account, Some(session)).await?;
        note(
            &mut tx,
            None,
            &actor.id,
            "account.second_factor",
            &actor.name,
            &client.request_id,
            json!({"on": true}),
        )
        .await?;
        tx.commit().await?;
        Ok(codes)
    }

    /// Removes the actor's own second factor.
    pub async fn remove_second_factor(&self, by: By<'_>) -> Result<(), Error> {
        let account = by.actor.require_person()?;
        by.actor.require_recent()?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        if !store::delete_factor(&mut tx, account).await? {
            return Err(Error::NotFound);
        }
        by.record(&mut tx, None, "account.second_factor", &by.actor.name, json!({"on": false})).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Removes the second factor of another account, for a user who lost the device and the recovery codes.
    pub async fn remove_second_factor_of(&self, by: By<'_>, name: &AccountName) -> Result<(), Error> {
        by.actor.require_recent()?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        let account = store::find_account_id(&mut tx, name).await?.ok_or(Error::NotFound)?;
        if !store::delete_factor(&mut tx, account).await? {
            return Err(Error::NotFound);
        }
        store::delete_sessions_but(&mut tx, account, None).await?;
        let detail = json!({"on": false, "by_admin": true});
        by.record(&mut tx, None, "account.second_factor", name.as_str(), detail).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Removes the actor's own link to a provider, with the roles that the provider granted. Fails if no other
    /// way to sign in remains.
    pub async fn unlink(&self, by: By<'_>, provider: &str) -> Result<(), Error> {
        let account = by.actor.require_person()?;
        by.actor.require_recent()?;
        let issuer = self.providers.get(provider)?.settings.issuer.clone();
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        let found = store::find_for_sign_in(&mut tx, &by.actor.name).await?.ok_or(Error::NotFound)?;
        let issuers = store::list_issuers(&mut tx, account).await?;
        if found.password.is_none() && issuers.iter().all(|known| *known == issuer) {
            return Err(Error::Conflict(
                "this provider is your only way to sign in; set a password first".into(),
            ));
        }
        if store::delete_identities(&mut tx, account, Some(&issuer)).await? == 0 {
            return Err(Error::NotFound);
        }
        let detail = json!({"provider": provider});
        by.record(&mut tx, None, "account.unlink", &by.actor.name, detail).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Removes all provider links of an account, as an admin. Ends all its sessions.
    pub async fn unlink_all(&self, by: By<'_>, name: &AccountName) -> Result<(), Error> {
        by.actor.require_recent()?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        let account = store::find_account_id(&mut tx, name).await?.ok_or(Error::NotFound)?;
        if store::delete_identities(&mut tx, account, None).await? == 0 {
            return Err(Error::NotFound);
        }
        store::delete_sessions_but(&mut tx, account, None).await?;
        let detail = json!({"provider": "all", "by_admin": true});
        by.record(&mut tx, None, "account.unlink", name.as_str(), detail).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Changes the platform role or the state of an account. Takes effect with the account's next request, and
    /// on open streams.
    pub async fn change_account(&self, by: By<'_>, name: &AccountName, change: &Change) -> Result<(), Error> {
        by.actor.require_recent()?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        let account = store::find_account_id(&mut tx, name).await?.ok_or(Error::NotFound)?;
        // Lock first: if two admins disable each other, one waits here and is then refused.
        let before = store::count_admins(&mut tx).await?;
        let mut detail = serde_json::Map::new();
        if let Some(role) = change.platform_role {
            store::set_platform_role(&mut tx, account, role.map(PlatformRole::as_str), "hand").await?;
            store::end_links_of(&mut tx, &format!("account:{account} {name}"), name.as_str()).await?;
            detail.insert("platform_role".into(), json!(role.map_or("none", PlatformRole::as_str)));
        }
        if let Some(disabled) = change.disabled {
            store::set_disabled(&mut tx, account, disabled).await?;
            if disabled {
                store::delete_sessions_but(&mut tx, account, None).await?;
            }
            let maker = format!("account:{account} {name}");
            store::end_links_of(&mut tx, &maker, name.as_str()).await?;
            detail.insert("disabled".into(), json!(disabled));
        }
        if before > 0 && store::count_admins(&mut tx).await? == 0 {
            return Err(Error::Conflict("this is the last admin; add another admin first".into()));
        }
        by.record(&mut tx, None, "account.change", name.as_str(), Value::Object(detail)).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Checks and hashes the password of a new account. Call it before the transaction that uses up the link.
    pub(super) async fn prepare_password(&self, name: &str, password: &str) -> Result<String, Error> {
        if let Some(why) = passwords::objection(password, &[name, "bulkhead"]) {
            return Err(wrong("password", why));
        }
        self.passwords.hash(password).await
    }
}

/// Returns the account of a signed-in user. Rejects tokens: a leaked token must not list the user's other
/// credentials.
pub(super) fn own(actor: &Actor) -> Result<AccountId, Error> {
    actor.require_person()
}
