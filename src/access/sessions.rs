//! Sign-in and sign-out. An unknown name, a wrong password and a disabled account take the same path and get
//! the same response.

use std::net::IpAddr;

use actix_web::http::header;
use actix_web::{HttpRequest, web};
use serde_json::json;
use sqlx::PgPool;

use super::credentials::{self, Secret};
use super::denials::Denials;
use super::extract::{cookie_name, known_name};
use super::oidc::Providers;
use super::passwords::{PasswordVerdict, Passwords};
use super::store::{self, ForSignIn, NewSession, PendingSignIn};
use super::throttle::{Throttle, network};
use super::{Actor, By, second_factor};
use crate::audit::{self, Refusal};
use crate::db::{self, Tx, Within};
use crate::error::Error;
use crate::http::OwnAddress;
use crate::ids::{AccountId, ActorId, TenantId};
use crate::keys::Keys;

/// Dependencies of the access actions.
#[derive(Debug, Clone)]
pub struct Desk {
    /// Database.
    pub pool: PgPool,
    /// Master key of the platform.
    pub keys: Keys,
    /// Password hashing.
    pub passwords: Passwords,
    /// Rate limits of guesses.
    pub throttle: Throttle,
    /// Refusals for the audit log.
    pub denials: Denials,
    /// Identity providers.
    pub providers: Providers,
}

/// The client of a request, as seen on the network.
#[derive(Debug, Clone)]
pub struct Client {
    /// Address.
    pub address: IpAddr,
    /// User agent.
    pub agent: String,
    /// Hash of the browser's current session.
    pub session: Option<Vec<u8>>,
    /// Cookie that recognises the browser after a correct password.
    pub known: Option<String>,
    /// Request id.
    pub request_id: String,
}

impl Client {
    /// Reads the client of a request.
    #[must_use]
    pub fn of(req: &HttpRequest, own: &OwnAddress) -> Self {
        let agent = req.headers().get(header::USER_AGENT).and_then(|v| v.to_str().ok()).unwrap_or("");
        Self {
            address: own.client(req),
            agent: agent.chars().filter(|c| !c.is_control()).take(200).collect(),
            session: req.cookie(cookie_name(req)).map(|cookie| credentials::hash(cookie.value())),
            known: req.cookie(known_name(req)).map(|cookie| cookie.value().to_owned()),
            request_id: crate::http::request_id(req).0.to_string(),
        }
    }
}

/// Result of a correct password.
pub enum SignIn {
    /// The user is signed in: the reference of the session.
    Done(Secret),
    /// The second factor is required: the reference of the pending sign-in.
    SecondFactor(Secret),
}

/// Normalises a typed name. Input that is longer than any name is cut.
#[must_use]
pub fn typed_name(name: &str) -> String {
    name.trim().to_lowercase().chars().take(64).collect()
}

const STEP: &str = "second-factor";

impl Desk {
    pub(super) fn refuse(&self, client: &Client, actor: &str, object: &str, reason: &'static str) {
        self.denials.note(Refusal {
            tenant: None,
            actor: actor.to_owned(),
            via: None,
            object: object.to_owned(),
            reason,
            place: network(client.address).to_string(),
        });
    }

    /// Checks name and password. Returns `None` if they do not match.
    pub async fn sign_in(
        &self,
        client: &Client,
        name: &str,
        password: &str,
    ) -> Result<Option<SignIn>, Error> {
        // Input longer than any name or password still counts as one guess.
        let name = typed_name(name);
        let password: String = password.chars().take(1_024).collect();
        let mut conn = self.pool.acquire().await?;
        let found = store::find_for_sign_in(&mut conn, &name).await?;
        drop(conn);
        let account = found.as_ref().map(|found| AccountId(found.id));
        self.throttle.guess_from(&name, client.address, account, client.known.as_deref()).await?;
        let phc = found.as_ref().and_then(|found| found.password.as_deref());
        let verdict = self.passwords.verify(&password, phc).await?;
        let (Some(found), true) = (found, verdict != PasswordVerdict::Wrong) else {
            // An unknown name may be a password typed into the wrong field, so it is not recorded.
            let who = account.map_or_else(|| "anonymous".to_owned(), |id| format!("account:{id} {name}"));
            self.refuse(client, &who, "sign-in", "wrong name or password");
            return Ok(None);
        };
        if found.disabled {
            self.refuse(
                client,
                &format!("account:{} {name}", found.id),
                "sign-in",
                "the account is disabled",
            );
            return Ok(None);
        }
        self.proceed(client, &found, &verdict).await.map(Some)
    }

    async fn proceed(
        &self,
        client: &Client,
        found: &ForSignIn,
        verdict: &PasswordVerdict,
    ) -> Result<SignIn, Error> {
        let account = AccountId(found.id);
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        // Hashing takes time: check again that neither password nor second factor changed meanwhile.
        if !store::is_unchanged(&mut tx, found).await? {
            return Err(Error::Conflict("the account has just changed; sign in again".into()));
        }
        if let (PasswordVerdict::Stronger(new), Some(old)) = (verdict, &found.password) {
            store::strengthen_password(&mut tx, account, old, new).await?;
        }
        if found.second_factor {
            let step = Secret::generate("");
            let begun = PendingSignIn { account_id: Some(found.id), provider: None, session_id: None };
            store::insert_sign_in(&mut tx, &step.hash(), STEP, &begun).await?;
            tx.commit().await?;
            return Ok(SignIn::SecondFactor(step));
        }
        let session = self.begin(&mut tx, client, account, &found.name, "password").await?;
        tx.commit().await?;
        Ok(SignIn::Done(session))
    }

    /// Whether a sign-in with this reference waits for its second factor.
    pub async fn awaits(&self, reference: &str) -> Result<bool, Error> {
        let mut conn = self.pool.acquire().await?;
        store::is_sign_in_good(&mut conn, &credentials::hash(reference), STEP).await
    }

    /// Completes the second step of a sign-in. Returns `None` if the code is wrong or no first step is pending.
    pub async fn second_step(
        &self,
        client: &Client,
        reference: &str,
        code: &str,
    ) -> Result<Option<Secret>, Error> {
        let hash = credentials::hash(reference);
        // Count the attempt whatever its outcome.
        let mut conn = self.pool.acquire().await?;
        let begun = store::try_sign_in(&mut conn, &hash, STEP).await?;
        drop(conn);
        let Some(account) = begun.and_then(|begun| begun.account_id).map(AccountId) else { return Ok(None) };
        self.throttle.guess_factor(account, client.address).await?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        if !second_factor::check(&mut tx, &self.keys, account, code, second_factor::now()).await? {
            self.refuse(client, &format!("account:{account}"), "sign-in", "wrong second factor");
            return Ok(None);
        }
        // Use up the attempt with the code: neither works twice.
        if store::use_sign_in(&mut tx, &hash, STEP).await?.is_none() {
            return Ok(None);
        }
        let Some((name, false)) = store::find_name(&mut tx, account).await? else { return Ok(None) };
        store::forgive(&mut tx, &self.throttle.factor(account)).await?;
        let session = self.begin(&mut tx, client, account, &name, "password and code").await?;
        tx.commit().await?;
        Ok(Some(session))
    }

    /// Starts a session in the transaction that authenticated the user. Ends the browser's earlier session, so
    /// a session that an attacker planted is useless.
    pub async fn begin(
        &self,
        tx: &mut Tx,
        client: &Client,
        account: AccountId,
        name: &str,
        method: &str,
    ) -> Result<Secret, Error> {
        if let Some(old) = &client.session {
            store::delete_session(tx, old).await?;
        }
        let session = Secret::generate("");
        let new = NewSession {
            hash: &session.hash(),
            account,
            method,
            place: &client.address.to_string(),
            agent: &client.agent,
        };
        let id = store::insert_session(tx, &new).await?;
        store::know_place(tx, account, &self.throttle.place(client.address)).await?;
        store::forgive(tx, &self.throttle.pair(name, client.address)).await?;
        let actor = ActorId::new(&format!("account:{account} {name}"));
        let detail = json!({"session": id, "method": method, "place": client.address});
        note(tx, None, &actor, "session.begin", name, &client.request_id, detail).await?;
        Ok(session)
    }

    /// Ends the browser's session. Returns its sign-in method.
    pub async fn sign_out(&self, client: &Client, actor: &Actor) -> Result<Option<String>, Error> {
        let Some(hash) = &client.session else { return Ok(None) };
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        let method = store::delete_session(&mut tx, hash).await?;
        if method.is_some() {
            note(&mut tx, None, &actor.id, "session.end", &actor.name, &client.request_id, json!({})).await?;
        }
        tx.commit().await?;
        Ok(method)
    }

    /// Confirms the session with the password, under a new reference. Returns `None` if the password or the
    /// code is wrong.
    pub async fn confirm(
        &self,
        client: &Client,
        actor: &Actor,
        password: &str,
        code: &str,
    ) -> Result<Option<Secret>, Error> {
        let (account, session) = actor.require_session()?;
        self.throttle.guess(&actor.name, client.address, Some(account)).await?;
        let mut conn = self.pool.acquire().await?;
        let found = store::find_for_sign_in(&mut conn, &actor.name).await?;
        drop(conn);
        let phc = found.as_ref().and_then(|found| found.password.as_deref());
        if self.passwords.verify(password, phc).await? == PasswordVerdict::Wrong {
            self.refuse(client, actor.id.as_str(), "confirmation", "wrong password");
            return Ok(None);
        }
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        if found.is_some_and(|found| found.second_factor)
            && !second_factor::check(&mut tx, &self.keys, account, code, second_factor::now()).await?
        {
            self.refuse(client, actor.id.as_str(), "confirmation", "wrong second factor");
            return Ok(None);
        }
        let fresh = self.renew(&mut tx, client, actor, session).await?;
        tx.commit().await?;
        Ok(fresh)
    }

    /// Continues the session under a new reference, as confirmed.
    pub async fn renew(
        &self,
        tx: &mut Tx,
        client: &Client,
        actor: &Actor,
        session: i64,
    ) -> Result<Option<Secret>, Error> {
        let fresh = Secret::generate("");
        if !store::rotate_session(tx, session, &fresh.hash()).await? {
            return Ok(None);
        }
        store::forgive(tx, &self.throttle.pair(&actor.name, client.address)).await?;
        note(tx, None, &actor.id, "session.confirm", &actor.name, &client.request_id, json!({})).await?;
        Ok(Some(fresh))
    }

    /// Ends one of the actor's own sessions.
    pub async fn end_session(&self, by: By<'_>, id: i64) -> Result<(), Error> {
        let account = by.actor.require_person()?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        if !store::delete_session_of(&mut tx, account, id).await? {
            return Err(Error::NotFound);
        }
        by.record(&mut tx, None, "session.end", &by.actor.name, json!({"session": id})).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Ends all of the actor's own sessions except the current one. Returns their number.
    pub async fn end_other_sessions(&self, by: By<'_>) -> Result<u64, Error> {
        let (account, session) = by.actor.require_session()?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        let ended = store::delete_sessions_but(&mut tx, account, Some(session)).await?;
        by.record(&mut tx, None, "session.end", &by.actor.name, json!({"others": ended})).await?;
        tx.commit().await?;
        Ok(ended)
    }
}

/// Records an action of an actor that is not signed in yet. All others use [`super::By::record`].
pub(super) async fn note(
    tx: &mut Tx,
    tenant: impl Into<Option<TenantId>>,
    actor: &ActorId,
    action: &'static str,
    object: &str,
    request_id: &str,
    detail: serde_json::Value,
) -> Result<(), Error> {
    let tenant = tenant.into();
    audit::record(tx, audit::AuditEvent { tenant, actor, action, object, request_id, detail }).await
}

/// The desk, as request data.
pub type DeskData = web::Data<Desk>;
