//! The way to a provider and back: authorization code with PKCE, state and nonce, all three derived from one
//! random value in the browser's cookie, so that nothing is written before somebody comes back, and what
//! comes back fits exactly one way there. Each is good once.

use openidconnect::core::{
    CoreAuthPrompt, CoreAuthenticationFlow, CoreClient, CoreGenderClaim, CoreJsonWebKey,
    CoreJweContentEncryptionAlgorithm, CoreJwsSigningAlgorithm,
};
use openidconnect::{
    AccessTokenHash, AdditionalClaims, AuthorizationCode, CsrfToken, IdToken, IdTokenVerifier, Nonce,
    OAuth2TokenResponse, PkceCodeChallenge, PkceCodeVerifier, RedirectUrl, Scope, TokenResponse,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use time::OffsetDateTime;

use super::claims::{self, Given};
use super::{Extra, Provider, Refused, flat};
use crate::access::credentials::{self, Secret};
use crate::access::sessions::{Client, Desk, note};
use crate::access::store::{self, Begun};
use crate::access::{Actor, Means, PlatformRole, Role};
use crate::audit;
use crate::db::{self, Tx, Within};
use crate::error::Error;
use crate::ids::{AccountId, AccountName, ActorId, TenantId};
use crate::keys::{Keys, Purpose, mac};

/// Seconds that a way there and back may take.
const LIFE: i64 = 600;
const KIND: &str = "provider";

/// What somebody comes back for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// To sign in.
    SignIn,
    /// To prove once more to be there, in this session.
    Confirm(i64),
    /// To sign in this way too from now on: the account of this session.
    Link(i64),
}

impl Goal {
    fn word(self) -> (char, i64) {
        match self {
            Self::SignIn => ('s', 0),
            Self::Confirm(session) => ('c', session),
            Self::Link(session) => ('l', session),
        }
    }
}

/// A way to a provider: what the cookie holds, and what follows from it.
struct Way {
    text: String,
    goal: Goal,
    begun: i64,
}

impl Way {
    /// `GOAL.SESSION.TIME.RANDOM.MAC`, bound to one provider.
    fn new(keys: &Keys, provider: &str, goal: Goal) -> Self {
        let (word, session) = goal.word();
        let random = Secret::generate("");
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let body = format!("{word}.{session}.{now}.{}", random.expose());
        Self { text: format!("{body}.{}", Self::seal(keys, provider, &body)), goal, begun: now }
    }

    fn seal(keys: &Keys, provider: &str, body: &str) -> String {
        Self::derive(keys, provider, "state", body)
    }

    fn derive(keys: &Keys, provider: &str, what: &str, body: &str) -> String {
        let mac = mac(&keys.of(Purpose::Provider), &[provider.as_bytes(), what.as_bytes(), body.as_bytes()]);
        data_encoding::BASE64URL_NOPAD.encode(&mac)
    }

    /// What the cookie says, if we said it, to this provider, within the last ten minutes.
    fn parse(keys: &Keys, provider: &str, text: &str) -> Option<Self> {
        use subtle::ConstantTimeEq;
        let (body, seal) = text.rsplit_once('.')?;
        if !bool::from(Self::seal(keys, provider, body).as_bytes().ct_eq(seal.as_bytes())) {
            return None;
        }
        let mut parts = body.split('.');
        let (word, session, at) =
            (parts.next()?, parts.next()?.parse().ok()?, parts.next()?.parse::<i64>().ok()?);
        let age = OffsetDateTime::now_utc().unix_timestamp() - at;
        let goal = match word {
            "s" => Goal::SignIn,
            "c" => Goal::Confirm(session),
            "l" => Goal::Link(session),
            _ => return None,
        };
        (0..=LIFE).contains(&age).then(|| Self { text: text.to_owned(), goal, begun: at })
    }

    fn state(&self) -> String {
        data_encoding::BASE64URL_NOPAD.encode(&credentials::hash(&self.text))
    }
    fn nonce(&self, keys: &Keys, provider: &str) -> Nonce {
        Nonce::new(Self::derive(keys, provider, "nonce", &self.text))
    }
    fn verifier(&self, keys: &Keys, provider: &str) -> PkceCodeVerifier {
        PkceCodeVerifier::new(Self::derive(keys, provider, "pkce", &self.text))
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct AllClaims {
    #[serde(flatten)]
    all: Extra,
}
impl AdditionalClaims for AllClaims {}

type Token = IdToken<AllClaims, CoreGenderClaim, CoreJweContentEncryptionAlgorithm, CoreJwsSigningAlgorithm>;

/// Algorithms that are taken: signatures with a public key alone. Not `none`, and nothing with a shared secret.
const ALGORITHMS: [CoreJwsSigningAlgorithm; 3] = [
    CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha256,
    CoreJwsSigningAlgorithm::RsaSsaPssSha256,
    CoreJwsSigningAlgorithm::EcdsaP256Sha256,
];

/// Somebody whom a provider vouches for.
#[derive(Debug)]
pub struct Vouched {
    issuer: String,
    subject: String,
    preferred: Option<String>,
    email: Option<String>,
    display: Option<String>,
    given: Given,
    authenticated: Option<i64>,
}

/// What a provider sends back with the browser.
#[derive(Debug, Default, Deserialize)]
pub struct Back {
    /// The code.
    #[serde(default)]
    pub code: String,
    /// The state.
    #[serde(default)]
    pub state: String,
    /// Its issuer (RFC 9207).
    pub iss: Option<String>,
    /// What went wrong there.
    pub error: Option<String>,
}

impl Provider {
    /// Where to send the browser, and what its cookie holds meanwhile.
    pub async fn way_there(
        &self,
        keys: &Keys,
        callback: &str,
        goal: Goal,
    ) -> Result<(String, String), Refused> {
        let metadata = self.metadata(false).await?;
        let name = &self.settings.name;
        let way = Way::new(keys, name, goal);
        let client = CoreClient::new(self.client_id(), metadata.issuer().clone(), metadata.jwks().clone())
            .set_auth_uri(metadata.authorization_endpoint().clone())
            .set_redirect_uri(redirect(callback)?);
        let (state, nonce) = (way.state(), way.nonce(keys, name));
        let challenge = PkceCodeChallenge::from_code_verifier_sha256(&way.verifier(keys, name));
        let mut request = client
            .authorize_url(CoreAuthenticationFlow::AuthorizationCode, || CsrfToken::new(state), || nonce)
            .set_pkce_challenge(challenge);
        for scope in self.settings.scopes.iter().filter(|scope| *scope != "openid") {
            request = request.add_scope(Scope::new(scope.clone()));
        }
        if goal != Goal::SignIn {
            // The person is asked there anew, whatever session they have.
            request = request.add_prompt(CoreAuthPrompt::Login).set_max_age(std::time::Duration::ZERO);
        }
        let (address, _, _) = request.url();
        Ok((address.to_string(), way.text))
    }

    /// Changes the code for the ID token and believes what stands in it, if every single thing fits.
    async fn vouch(&self, keys: &Keys, callback: &str, way: &Way, back: &Back) -> Result<Vouched, Refused> {
        let name = &self.settings.name;
        let metadata = self.metadata(false).await?;
        let token_endpoint =
            metadata.token_endpoint().cloned().ok_or_else(|| Refused("it has no token endpoint".into()))?;
        let mut client =
            CoreClient::new(self.client_id(), metadata.issuer().clone(), metadata.jwks().clone())
                .set_token_uri(token_endpoint)
                .set_redirect_uri(redirect(callback)?);
        if let Some(secret) = &self.secret {
            client = client.set_client_secret(secret.clone());
        }
        let ask = |request| self.send(request);
        let answer = client
            .exchange_code(AuthorizationCode::new(back.code.clone()))
            .set_pkce_verifier(way.verifier(keys, name))
            .request_async(&ask)
            .await
            .map_err(|error| Refused::because("the code", told(&error)))?;
        let text = answer.id_token().ok_or_else(|| Refused("it sends no ID token".into()))?.to_string();
        let token: Token = text.parse().map_err(|_| Refused("the ID token cannot be read".into()))?;
        let nonce = way.nonce(keys, name);
        let mut verifier = self.verifier(&metadata);
        if token.claims(&verifier, &nonce).is_err() {
            // Perhaps its keys have changed since they were read.
            verifier = self.verifier(&*self.metadata(true).await?);
        }
        let found = token
            .claims(&verifier, &nonce)
            .map_err(|error| Refused::because("the ID token", flat(&error)))?;
        if let Some(wanted) = found.access_token_hash() {
            let refused =
                |error: &dyn std::error::Error| Refused::because("the access token's hash", flat(error));
            let algorithm = token.signing_alg().map_err(|error| refused(&error))?;
            let key = token.signing_key(&verifier).map_err(|error| refused(&error))?;
            let real = AccessTokenHash::from_token(answer.access_token(), algorithm, key)
                .map_err(|error| refused(&error))?;
            if real != *wanted {
                return Err(Refused("the access token is not the one that belongs to the ID token".into()));
            }
        }
        if found.authorized_party().is_some_and(|party| **party != self.settings.client_id) {
            return Err(Refused("the ID token was made for another party".into()));
        }
        let extra = &found.additional_claims().all;
        let now = OffsetDateTime::now_utc().unix_timestamp();
        if extra.get("nbf").and_then(serde_json::Value::as_i64).is_some_and(|nbf| nbf > now + 60) {
            return Err(Refused("the ID token is not valid yet".into()));
        }
        if (found.issue_time().timestamp() - now).abs() > LIFE {
            return Err(Refused("the ID token was not issued just now".into()));
        }
        let subject = found.subject().as_str();
        if subject.is_empty() || subject.len() > 255 || !subject.is_ascii() {
            return Err(Refused("its subject is not 1 to 255 ASCII characters".into()));
        }
        let local = |text: Option<&openidconnect::LocalizedClaim<openidconnect::EndUserName>>| {
            text.and_then(|text| text.get(None)).map(|name| name.as_str().to_owned())
        };
        Ok(Vouched {
            issuer: self.settings.issuer.clone(),
            subject: subject.to_owned(),
            preferred: found.preferred_username().map(|name| name.as_str().to_owned()),
            email: found.email().map(|email| email.as_str().to_owned()),
            display: local(found.name()),
            given: claims::roles(&self.settings, extra),
            authenticated: found.auth_time().map(|at| at.timestamp()),
        })
    }

    fn verifier(
        &self,
        metadata: &openidconnect::ProviderMetadataWithLogout,
    ) -> IdTokenVerifier<'static, CoreJsonWebKey> {
        let (id, issuer, keys) = (self.client_id(), metadata.issuer().clone(), metadata.jwks().clone());
        let verifier = match &self.secret {
            Some(secret) => IdTokenVerifier::new_confidential_client(id, secret.clone(), issuer, keys),
            None => IdTokenVerifier::new_public_client(id, issuer, keys),
        };
        verifier.set_allowed_algs(ALGORITHMS).set_other_audience_verifier_fn(|_| false)
    }

    /// Where signing out there begins, if it can be done.
    pub fn way_out(&self, home: &str) -> Option<String> {
        let metadata = self.known()?;
        let mut address = metadata.additional_metadata().end_session_endpoint.as_ref()?.url().clone();
        self.check_address("end-session endpoint", &address).ok()?;
        address
            .query_pairs_mut()
            .append_pair("client_id", &self.settings.client_id)
            .append_pair("post_logout_redirect_uri", home);
        Some(address.to_string())
    }
}

fn redirect(callback: &str) -> Result<RedirectUrl, Refused> {
    RedirectUrl::new(callback.to_owned()).map_err(|error| Refused::because("our own address", error))
}

/// Why a code was not taken, without the provider's free text, which may hold anything.
fn told<RE, T>(error: &openidconnect::RequestTokenError<RE, T>) -> String
where
    RE: std::error::Error + 'static,
    T: openidconnect::ErrorResponse + 'static,
{
    match error {
        openidconnect::RequestTokenError::ServerResponse(_) => "the provider does not take it".into(),
        openidconnect::RequestTokenError::Request(inner) => flat(inner),
        openidconnect::RequestTokenError::Parse(..) => "the provider's answer cannot be read".into(),
        openidconnect::RequestTokenError::Other(text) => text.clone(),
    }
}

/// What became of somebody who came back.
pub enum Came {
    /// A session begins, or goes on: its reference, and where to go.
    In(Secret, &'static str),
    /// Refused, with the reason for the person.
    Refused(String),
}

impl Desk {
    /// Somebody comes back from a provider. The session that there is stays as it is unless everything fits.
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
        let refuse = |reason: &Refused| {
            tracing::warn!(provider = name, %reason, "a sign-in through a provider was refused");
            self.refuse(
                client,
                "anonymous",
                &format!("sign-in through {name}"),
                "what the provider sent does not fit",
            );
            Ok(Came::Refused(reason.to_string()))
        };
        let Some(way) = Way::parse(&self.keys, name, cookie) else {
            return refuse(&Refused("it took too long, or was begun in another browser; begin anew".into()));
        };
        let same = {
            use subtle::ConstantTimeEq;
            bool::from(way.state().as_bytes().ct_eq(back.state.as_bytes()))
        };
        if !same {
            return refuse(&Refused("this answer belongs to another sign-in; begin anew".into()));
        }
        if back.iss.as_ref().is_some_and(|iss| *iss != provider.settings.issuer) {
            return refuse(&Refused("this answer is another provider's".into()));
        }
        if back.error.is_some() || back.code.is_empty() {
            return refuse(&Refused("the provider let nobody in".into()));
        }
        // Used up before the code is: whatever comes of it, this way is not gone twice.
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        let begun = Begun { account_id: None, provider: Some(name.clone()), session_id: None };
        let hash = credentials::hash(&way.text);
        if !store::mark_used(&mut tx, &hash, KIND, &begun).await? {
            return refuse(&Refused("this answer was used already; begin anew".into()));
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
                // Since this way began, not with a session that the provider had before.
                if vouched.authenticated.is_none_or(|at| at > now + 60 || at < way.begun - 5) {
                    return refuse(&Refused("the provider did not ask you anew".into()));
                }
                match actor {
                    Some(actor) if matches!(actor.means, Means::Session { id, .. } if id == session) => {
                        self.confirm_through(client, &vouched, actor, way.goal, name).await
                    }
                    _ => refuse(&Refused("the session that this belongs to has ended".into())),
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
                    return Ok(Came::Refused("the provider vouches for somebody else".into()));
                }
                let detail = json!({"provider": provider});
                note(&mut tx, &actor.id, "account.link", &actor.name, &client.request_id, detail).await?;
            }
            _ => return Ok(Came::Refused("the provider vouches for somebody else".into())),
        }
        match self.renew(&mut tx, client, actor, session).await? {
            Some(fresh) => {
                tx.commit().await?;
                Ok(Came::In(fresh, "/account"))
            }
            None => Ok(Came::Refused("the session that this belongs to has ended".into())),
        }
    }

    /// Lets somebody in: whom we know by issuer and subject, or who is new and has a reason to be here.
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
                return Ok(Came::Refused("the provider let nobody in".into()));
            }
            None if vouched.given.is_nothing() && !settings.admit_all => {
                return Ok(Came::Refused(
                    "the provider knows you, and nothing here is yours yet: ask an admin".into(),
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
        settings: &crate::config::Provider,
        vouched: &Vouched,
    ) -> Result<(AccountId, String), Error> {
        let base = claims::name(
            &[vouched.preferred.as_deref(), vouched.email.as_deref(), Some(&vouched.subject)],
            &settings.name,
        );
        // A name that somebody has is never taken for that somebody.
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
        // Somebody else's tab was first: that one has made the account.
        if !store::insert_identity(tx, &vouched.issuer, &vouched.subject, account).await? {
            return Err(Error::Conflict("you were let in elsewhere at this moment; begin anew".into()));
        }
        let actor = ActorId::new(&format!("account:{account} {name}"));
        let detail = json!({"provider": settings.name});
        note(tx, &actor, "account.create", name.as_str(), &client.request_id, detail).await?;
        Ok((account, name.to_string()))
    }
}

/// Brings somebody's roles to what the provider says now: those that it gave and does not give any more go.
/// What was decided by hand stays.
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
        note(tx, &actor, "account.change", name, request_id, detail).await?;
    }
    let before = store::tenants_of(tx, account).await?;
    for place in before.iter().filter(|place| place.source == provider) {
        if !vouched.given.tenants.iter().any(|(tenant, _)| tenant.as_str() == place.tenant) {
            db::enter(tx, TenantId(place.id)).await?;
            store::delete_member(tx, TenantId(place.id), account).await?;
            record(tx, TenantId(place.id), &actor, "member.remove", name, request_id, provider, None).await?;
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
        store::set_member(tx, id, account, *role, provider, &ActorId::new(provider)).await?;
        record(tx, id, &actor, "member.join", name, request_id, provider, Some(*role)).await?;
    }
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "a row of the audit has as many parts")]
async fn record(
    tx: &mut Tx,
    tenant: TenantId,
    actor: &ActorId,
    action: &'static str,
    object: &str,
    request_id: &str,
    provider: &str,
    role: Option<Role>,
) -> Result<(), Error> {
    let detail = match role {
        Some(role) => json!({"provider": provider, "role": role.as_str()}),
        None => json!({"provider": provider}),
    };
    let event = audit::Event { tenant: Some(tenant), actor, action, object, request_id, detail };
    audit::record(tx, event).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_is_one_providers_one_browsers_and_has_its_time() {
        let keys = Keys::parse(&Keys::generate()).unwrap();
        let way = Way::new(&keys, "one", Goal::Confirm(7));
        assert_eq!(Way::parse(&keys, "one", &way.text).unwrap().goal, Goal::Confirm(7));
        assert!(Way::parse(&keys, "two", &way.text).is_none());
        let other = Keys::parse(&Keys::generate()).unwrap();
        assert!(Way::parse(&other, "one", &way.text).is_none());
        let forged = way.text.replacen("c.7.", "s.0.", 1);
        assert!(Way::parse(&keys, "one", &forged).is_none());
        let old = format!("s.0.{}.x", OffsetDateTime::now_utc().unix_timestamp() - LIFE - 1);
        let old = format!("{old}.{}", Way::seal(&keys, "one", &old));
        assert!(Way::parse(&keys, "one", &old).is_none());
        assert!(way.verifier(&keys, "one").secret().len() >= 43, "RFC 7636");
        for odd in ["", ".", "s.0.x.y.z", &"a".repeat(9_000)] {
            assert!(Way::parse(&keys, "one", odd).is_none());
        }
    }
}
