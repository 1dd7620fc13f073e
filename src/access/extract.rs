//! Extractors that give a handler its authority. They authenticate, load the tenant of the path and check the
//! role, in one step and one database query. A route accepts a handler only if its first argument is one of
//! these (`routes.rs`), so a handler without authority does not compile.

use std::marker::PhantomData;
use std::pin::Pin;

use actix_web::dev::Payload;
use actix_web::http::{Method, header};
use actix_web::{FromRequest, HttpMessage, HttpRequest, web};
use serde::de::DeserializeOwned;
use serde::de::value::{Error as FormError, MapDeserializer};
use sqlx::PgPool;
use subtle::ConstantTimeEq;

use super::denials::Denials;
use super::store::{ActorFacts, Asks};
use super::turns::{Allowance, Payer, Turns};
use super::{
    Actor, By, Effect, Means, Permission, PlatformRole, Role, TenantRef, credentials, includes, store,
};
use crate::audit::Refusal;
use crate::error::Error;
use crate::http::{OwnAddress, RateLimit, RequestId, network, request_id};
use crate::ids::{ActorId, TenantName};
use crate::keys::{KeyPurpose, Keys, mac};
use crate::permits::Permit;

/// Session cookie over https.
const COOKIE_SECURE: &str = "__Host-bulkhead";
/// Session cookie over plain loopback, where a browser rejects the `__Host-` cookie.
const COOKIE_PLAIN: &str = "bulkhead-loopback";

/// Marks an extractor that decides about authority.
pub trait Authorizes {
    /// The role that a request needs.
    const NEEDS: Needs;
    /// Returns the actor, if known.
    fn actor(&self) -> Option<&Actor>;
}

/// The role that a request needs, for documentation and tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing.
    Nothing,
    /// An account that has signed in, or a token.
    Account,
    /// The lowest role in the tenant, if one suffices, and the lowest role on the platform.
    Role(Option<Role>, PlatformRole),
}

/// Open to all requests, on purpose.
#[derive(Debug, Clone)]
pub struct Public {
    /// Request id.
    pub request_id: RequestId,
}

/// An actor with a platform role that includes `P`.
#[derive(Debug)]
pub struct PlatformScope<P> {
    /// The actor.
    pub actor: Actor,
    /// Request id.
    pub request_id: RequestId,
    permission: PhantomData<P>,
}

impl<P> PlatformScope<P> {
    /// Returns the actor and the request id.
    #[must_use]
    pub fn by(&self) -> By<'_> {
        By { actor: &self.actor, request_id: &self.request_id.0 }
    }
}

/// An actor with the permission `P` in the tenant of the path.
#[derive(Debug)]
pub struct TenantScope<P> {
    /// The actor.
    pub actor: Actor,
    /// The tenant.
    pub tenant: TenantRef,
    /// Role in the tenant. `None` for platform roles without membership.
    pub role: Option<Role>,
    /// Request id.
    pub request_id: RequestId,
    permission: PhantomData<P>,
}

impl<P> TenantScope<P> {
    /// Returns the actor and the request id.
    #[must_use]
    pub fn by(&self) -> By<'_> {
        By { actor: &self.actor, request_id: &self.request_id.0 }
    }

    /// Whether the actor also has the permission `Q` here. Decides which actions a page offers.
    #[must_use]
    pub fn may<Q: Permission>(&self) -> bool {
        includes::<Q>(self.actor.platform, self.role)
    }

    /// Returns the highest role that the actor may give in this tenant.
    #[must_use]
    pub fn highest(&self) -> Option<Role> {
        if self.actor.platform == Some(PlatformRole::Admin) { Some(Role::Owner) } else { self.role }
    }
}

/// Any signed-in actor, with any role.
#[derive(Debug)]
pub struct SignedIn {
    /// The actor.
    pub actor: Actor,
    /// Request id.
    pub request_id: RequestId,
}

impl SignedIn {
    /// Returns the actor and the request id.
    #[must_use]
    pub fn by(&self) -> By<'_> {
        By { actor: &self.actor, request_id: &self.request_id.0 }
    }
}

/// A signed-in actor or an anonymous visitor, for pages that differ between the two.
#[derive(Debug)]
pub struct Perhaps {
    /// The actor.
    pub actor: Option<Actor>,
    /// Request id.
    pub request_id: RequestId,
}

impl Authorizes for Public {
    const NEEDS: Needs = Needs::Nothing;
    fn actor(&self) -> Option<&Actor> {
        None
    }
}

impl Authorizes for Perhaps {
    const NEEDS: Needs = Needs::Nothing;
    fn actor(&self) -> Option<&Actor> {
        self.actor.as_ref()
    }
}

impl<P: Permission> Authorizes for PlatformScope<P> {
    const NEEDS: Needs = Needs::Role(None, P::PLATFORM);
    fn actor(&self) -> Option<&Actor> {
        Some(&self.actor)
    }
}

impl<P: Permission> Authorizes for TenantScope<P> {
    const NEEDS: Needs = Needs::Role(P::TENANT, P::PLATFORM);
    fn actor(&self) -> Option<&Actor> {
        Some(&self.actor)
    }
}

impl Authorizes for SignedIn {
    const NEEDS: Needs = Needs::Account;
    fn actor(&self) -> Option<&Actor> {
        Some(&self.actor)
    }
}

/// Returns the name of the session cookie for this request.
#[must_use]
pub fn cookie_name(req: &HttpRequest) -> &'static str {
    let secure = req.app_data::<web::Data<OwnAddress>>().is_some_and(|own| own.is_secure(req));
    if secure { COOKIE_SECURE } else { COOKIE_PLAIN }
}

/// Returns the name of the cookie that recognises a browser after a correct password.
#[must_use]
pub fn known_name(req: &HttpRequest) -> &'static str {
    if cookie_name(req) == COOKIE_SECURE { "__Host-bulkhead-known" } else { "bulkhead-known-loopback" }
}

enum Credential {
    Token(String),
    Session(String),
}

/// Returns the credential of the request. A bearer token takes precedence over a cookie. The query string is
/// never read.
fn credential(req: &HttpRequest) -> Option<Credential> {
    if let Some(value) = req.headers().get(header::AUTHORIZATION) {
        let token = value.to_str().ok()?.strip_prefix("Bearer ")?.trim();
        return token.starts_with(credentials::TOKEN_PREFIX).then(|| Credential::Token(token.to_owned()));
    }
    req.cookie(cookie_name(req)).map(|cookie| Credential::Session(cookie.value().to_owned()))
}

fn part<T: 'static>(req: &HttpRequest) -> Result<&web::Data<T>, Error> {
    req.app_data::<web::Data<T>>().ok_or_else(|| Error::internal("a part of the platform is not wired"))
}

/// Rejects a request that a browser sends for a page of another site.
pub fn require_own_page(req: &HttpRequest) -> Result<(), Error> {
    if part::<OwnAddress>(req)?.same_origin(req) {
        Ok(())
    } else {
        Err(Error::Forbidden("this request does not come from Bulkhead's own pages".into()))
    }
}

async fn authenticate(req: &HttpRequest, wanted: Option<&TenantName>) -> Result<ActorFacts, Error> {
    fail::fail_point!("access::authenticate", |_| Err(Error::internal("failpoint")));
    let found = match credential(req) {
        Some(Credential::Token(token)) => {
            let hash = credentials::hash(&token);
            let _room = lookup(req, &hash).await?;
            let mut conn = part::<PgPool>(req)?.acquire().await?;
            store::find_token(&mut conn, &hash, wanted).await?
        }
        Some(Credential::Session(session)) => {
            if !matches!(*req.method(), Method::GET | Method::HEAD) {
                require_own_page(req)?;
            }
            let hash = credentials::hash(&session);
            let _room = lookup(req, &hash).await?;
            let mut conn = part::<PgPool>(req)?.acquire().await?;
            store::find_session(&mut conn, &hash, wanted, Asks::Person).await?
        }
        None => return Err(Error::Unauthenticated),
    };
    let Some(facts) = found else {
        refuse(req, None, None, "invalid credential");
        return Err(Error::Unauthenticated);
    };
    let (Means::Session { hash, .. } | Means::Token { hash, .. }) = &facts.actor.means;
    part::<Turns>(req)?.remember(hash, facts.actor.payer());
    Ok(facts)
}

/// Takes a slot for a credential lookup. The slot is freed when the lookup ends.
async fn lookup(req: &HttpRequest, hash: &[u8]) -> Result<Permit<Payer>, Error> {
    let network = network(part::<OwnAddress>(req)?.client(req));
    part::<Turns>(req)?.lookup(hash, network).await
}

/// Takes the request's turn, held until the request ends, and charges the rate limit.
async fn enter(req: &HttpRequest, actor: &Actor, tenant: Option<&TenantRef>) -> Result<(), Error> {
    let turns = part::<Turns>(req)?;
    let turn = turns.enter(actor, tenant, part::<PgPool>(req)?).await?;
    let paid = turns.pay(actor, tenant);
    let (Ok(allowance) | Err((allowance, _))) = paid;
    req.extensions_mut().insert(rate_limit(allowance));
    req.extensions_mut().insert(turn);
    paid.map(drop).map_err(|(_, after)| Error::Throttled(after))
}

fn rate_limit(allowance: Allowance) -> RateLimit {
    RateLimit { limit: allowance.limit, remaining: allowance.remaining, reset: allowance.reset }
}

/// Records a refusal for the audit log.
fn refuse(req: &HttpRequest, tenant: Option<&TenantRef>, actor: Option<&ActorId>, reason: &'static str) {
    let (Some(denials), Some(own)) =
        (req.app_data::<web::Data<Denials>>(), req.app_data::<web::Data<OwnAddress>>())
    else {
        return;
    };
    denials.note(Refusal {
        tenant: tenant.map(|tenant| tenant.id),
        actor: actor.map_or("anonymous", ActorId::as_str).to_owned(),
        via: actor.and_then(ActorId::via).map(str::to_owned),
        object: format!("{} {}", req.method(), req.match_pattern().unwrap_or_default()),
        reason,
        place: network(own.client(req)).to_string(),
    });
}

fn role_name(tenant: Option<Role>, platform: PlatformRole) -> String {
    match tenant {
        Some(role) => format!("this needs the role {} in the tenant", role.as_str()),
        None => format!("this needs the role {} on the platform", platform.as_str()),
    }
}

/// Returns the token that a user's forms carry besides the cookie. Other sites cannot know it.
#[must_use]
pub fn form_token(keys: &Keys, session: &[u8]) -> String {
    let mac = mac(&keys.of(KeyPurpose::Forms), &[session]);
    data_encoding::BASE32_NOPAD.encode(&mac[..20]).to_ascii_lowercase()
}

/// Checks again whether the holder of `means` has the permission `P` in a tenant. Streams call it, because they
/// outlast the request that opened them. A tenant that is no longer active ends the streams of all users.
pub async fn still_may<P: Permission>(
    pool: &PgPool,
    means: &Means,
    tenant: &TenantName,
) -> Result<bool, Error> {
    let mut conn = pool.acquire().await?;
    let facts = match means {
        Means::Session { hash, .. } => {
            store::find_session(&mut conn, hash, Some(tenant), Asks::Stream).await?
        }
        Means::Token { hash, .. } => store::find_token(&mut conn, hash, Some(tenant)).await?,
    };
    Ok(facts.is_some_and(|facts| {
        facts.tenant.is_some_and(|(tenant, role)| {
            tenant.state == "active" && includes::<P>(facts.actor.platform, role)
        })
    }))
}

/// Checks again whether the holder of `means` may read the platform.
pub async fn still_reads_platform(pool: &PgPool, means: &Means) -> Result<bool, Error> {
    let mut conn = pool.acquire().await?;
    let facts = match means {
        Means::Session { hash, .. } => store::find_session(&mut conn, hash, None, Asks::Stream).await?,
        Means::Token { hash, .. } => store::find_token(&mut conn, hash, None).await?,
    };
    Ok(facts.is_some_and(|facts| includes::<super::ReadPlatform>(facts.actor.platform, None)))
}

type Extracted<T> = Pin<Box<dyn Future<Output = Result<T, Error>>>>;

/// Paths that do not query the database, or have limits of their own.
const APART: &[&str] = &["/v2/", "/auth/token", "/static/", "/healthz", "/readyz", "/docs"];

/// Takes the turn of an anonymous visitor, held until the request ends.
async fn as_stranger(req: &HttpRequest) -> Result<(), Error> {
    if APART.iter().any(|start| req.path().starts_with(start)) {
        return Ok(());
    }
    let network = network(part::<OwnAddress>(req)?.client(req));
    if let Some(turns) = req.app_data::<web::Data<Turns>>() {
        let turn = turns.visitor(network).await?;
        req.extensions_mut().insert(turn);
    }
    Ok(())
}

impl FromRequest for Public {
    type Error = Error;
    type Future = Extracted<Self>;
    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        let req = req.clone();
        Box::pin(async move {
            as_stranger(&req).await?;
            Ok(Self { request_id: request_id(&req) })
        })
    }
}

impl FromRequest for SignedIn {
    type Error = Error;
    type Future = Extracted<Self>;
    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        let req = req.clone();
        Box::pin(async move {
            let actor = authenticate(&req, None).await?.actor;
            enter(&req, &actor, None).await?;
            Ok(Self { actor, request_id: request_id(&req) })
        })
    }
}

impl FromRequest for Perhaps {
    type Error = Error;
    type Future = Extracted<Self>;
    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        let req = req.clone();
        Box::pin(async move {
            let actor = match authenticate(&req, None).await {
                Ok(facts) => Some(facts.actor),
                Err(Error::Unauthenticated) => None,
                Err(other) => return Err(other),
            };
            match &actor {
                Some(actor) => enter(&req, actor, None).await?,
                None => as_stranger(&req).await?,
            }
            Ok(Self { actor, request_id: request_id(&req) })
        })
    }
}

impl<P: Permission> FromRequest for PlatformScope<P> {
    type Error = Error;
    type Future = Extracted<Self>;
    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        let req = req.clone();
        Box::pin(async move {
            let actor = authenticate(&req, None).await?.actor;
            enter(&req, &actor, None).await?;
            match actor.platform {
                Some(role) if role >= P::PLATFORM => {
                    Ok(Self { actor, request_id: request_id(&req), permission: PhantomData })
                }
                Some(_) => {
                    refuse(&req, None, Some(&actor.id), "the role does not include this permission");
                    Err(Error::Forbidden(role_name(None, P::PLATFORM)))
                }
                // An account with tenant roles only gets 404 on platform routes.
                None => {
                    refuse(&req, None, Some(&actor.id), "no role here");
                    Err(Error::NotFound)
                }
            }
        })
    }
}

impl<P: Permission> FromRequest for TenantScope<P> {
    type Error = Error;
    type Future = Extracted<Self>;
    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        let req = req.clone();
        Box::pin(async move {
            let name: Option<TenantName> = req.match_info().query("tenant").parse().ok();
            let ActorFacts { actor, tenant } = authenticate(&req, name.as_ref()).await?;
            // Only a member's requests count against the tenant, so outsiders cannot use up its share.
            let own = tenant.as_ref().filter(|(_, role)| role.is_some()).map(|(tenant, _)| tenant);
            enter(&req, &actor, own).await?;
            let (tenant, role) = tenant.ok_or(Error::NotFound)?;
            if actor.platform.is_none() && role.is_none() {
                // Recorded on the platform's log: the tenant must not learn which outsiders exist.
                refuse(&req, None, Some(&actor.id), "no role here");
                return Err(Error::NotFound);
            }
            if !includes::<P>(actor.platform, role) {
                refuse(&req, Some(&tenant), Some(&actor.id), "the role does not include this permission");
                return Err(Error::Forbidden(role_name(P::TENANT, P::PLATFORM)));
            }
            let of_platform = actor.platform.is_some_and(|role| role >= P::PLATFORM);
            if P::EFFECT == Effect::Changes && tenant.state != "active" && !of_platform {
                refuse(&req, Some(&tenant), Some(&actor.id), "the tenant is suspended");
                tenant.require_active()?;
            }
            Ok(Self { actor, tenant, role, request_id: request_id(&req), permission: PhantomData })
        })
    }
}

/// A form from the user's own page: its fields, after the form token is verified.
#[derive(Debug)]
pub struct Posted<T>(pub T);

impl<T: DeserializeOwned + 'static> FromRequest for Posted<T> {
    type Error = Error;
    type Future = Extracted<Self>;
    fn from_request(req: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let fields = web::Form::<Vec<(String, String)>>::from_request(req, payload);
        let req = req.clone();
        Box::pin(async move {
            let unread = |_| Error::Malformed("the form cannot be read".into());
            let mut fields = fields.await.map_err(unread)?.into_inner();
            let cookie = req.cookie(cookie_name(&req)).ok_or(Error::Unauthenticated)?;
            let wanted = form_token(part::<Keys>(&req)?, &credentials::hash(cookie.value()));
            let given = fields.iter().position(|(name, _)| name == "form").map(|at| fields.remove(at).1);
            if !given.is_some_and(|given| bool::from(given.as_bytes().ct_eq(wanted.as_bytes()))) {
                return Err(Error::Forbidden(
                    "this form belongs to another session; reload the page and submit it again".into(),
                ));
            }
            let fields = MapDeserializer::<_, FormError>::new(fields.into_iter());
            T::deserialize(fields)
                .map(Self)
                .map_err(|error| Error::Malformed(format!("the form cannot be read: {error}")))
        })
    }
}
