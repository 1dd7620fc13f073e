//! The extractors that give a handler its authority: they authenticate, load what the address
//! names and check the role, in one step. A route takes its handler only if the first argument is
//! one of these (`routes.rs`), so a handler without authority does not compile.

use std::marker::PhantomData;
use std::pin::Pin;

use actix_web::dev::Payload;
use actix_web::http::{Method, header};
use actix_web::{FromRequest, HttpRequest, web};
use sqlx::PgPool;

use super::{Actor, Permission, PlatformRole, Role, TenantRef, credentials, store};
use crate::error::Error;
use crate::http::{OwnAddress, RequestId, request_id};
use crate::ids::TenantName;

/// Cookie of a session where the address is https.
const COOKIE_SECURE: &str = "__Host-bulkhead";
/// Cookie of a session on plain loopback, where a browser would not take the other one.
const COOKIE_PLAIN: &str = "bulkhead-loopback";

/// Marks an extractor that decides about authority.
pub trait Authorizes {}

/// Open to everybody, on purpose.
#[derive(Debug, Clone)]
pub struct Public {
    /// Id of the request.
    pub request_id: RequestId,
}

/// Somebody with a role on the platform that includes `P`.
#[derive(Debug)]
pub struct PlatformScope<P> {
    /// Who.
    pub actor: Actor,
    /// Id of the request.
    pub request_id: RequestId,
    permission: PhantomData<P>,
}

/// Somebody who may do `P` in the tenant that the address names.
#[derive(Debug)]
pub struct TenantScope<P> {
    /// Who.
    pub actor: Actor,
    /// Where.
    pub tenant: TenantRef,
    /// Id of the request.
    pub request_id: RequestId,
    permission: PhantomData<P>,
}

/// Anybody who is signed in, whatever the role.
#[derive(Debug)]
pub struct SignedIn {
    /// Who.
    pub actor: Actor,
    /// Id of the request.
    pub request_id: RequestId,
}

impl Authorizes for Public {}
impl<P> Authorizes for PlatformScope<P> {}
impl<P> Authorizes for TenantScope<P> {}
impl Authorizes for SignedIn {}

/// The name of the session cookie for this request.
#[must_use]
pub fn cookie_name(req: &HttpRequest) -> &'static str {
    if req.connection_info().scheme() == "https" { COOKIE_SECURE } else { COOKIE_PLAIN }
}

enum Credential {
    Token(String),
    Session(String),
}

/// What the request bears: a bearer token wins over a cookie. Never the query string.
fn credential(req: &HttpRequest) -> Option<Credential> {
    if let Some(value) = req.headers().get(header::AUTHORIZATION) {
        let token = value.to_str().ok()?.strip_prefix("Bearer ")?.trim();
        return token.starts_with(credentials::TOKEN_PREFIX).then(|| Credential::Token(token.to_owned()));
    }
    req.cookie(cookie_name(req)).map(|cookie| Credential::Session(cookie.value().to_owned()))
}

async fn authenticate(req: &HttpRequest) -> Result<Actor, Error> {
    let pool = req.app_data::<web::Data<PgPool>>().ok_or_else(|| Error::internal("no pool"))?;
    let mut conn = pool.acquire().await?;
    let actor = match credential(req) {
        Some(Credential::Token(token)) => store::find_token(&mut conn, &credentials::hash(&token)).await?,
        Some(Credential::Session(session)) => {
            let changes = !matches!(*req.method(), Method::GET | Method::HEAD);
            let own = req.app_data::<web::Data<OwnAddress>>();
            if changes && !own.is_some_and(|own| own.same_origin(req)) {
                return Err(Error::Forbidden("this request does not come from Bulkhead's own pages".into()));
            }
            store::find_session(&mut conn, &credentials::hash(&session)).await?
        }
        None => None,
    };
    actor.ok_or(Error::Unauthenticated)
}

fn role_name(tenant: Option<Role>, platform: PlatformRole) -> String {
    match tenant {
        Some(role) => format!("this needs the role {} in the tenant", role.as_str()),
        None => format!("this needs the role {} on the platform", platform.as_str()),
    }
}

type Extracted<T> = Pin<Box<dyn Future<Output = Result<T, Error>>>>;

impl FromRequest for Public {
    type Error = Error;
    type Future = std::future::Ready<Result<Self, Error>>;
    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        std::future::ready(Ok(Self { request_id: request_id(req) }))
    }
}

impl FromRequest for SignedIn {
    type Error = Error;
    type Future = Extracted<Self>;
    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        let req = req.clone();
        Box::pin(async move { Ok(Self { actor: authenticate(&req).await?, request_id: request_id(&req) }) })
    }
}

impl<P: Permission> FromRequest for PlatformScope<P> {
    type Error = Error;
    type Future = Extracted<Self>;
    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        let req = req.clone();
        Box::pin(async move {
            let actor = authenticate(&req).await?;
            match actor.authority {
                super::Authority::Platform(role) if role >= P::PLATFORM => {
                    Ok(Self { actor, request_id: request_id(&req), permission: PhantomData })
                }
                super::Authority::Platform(_) => Err(Error::Forbidden(role_name(None, P::PLATFORM))),
                // Who has a role in a tenant only is a stranger here.
                super::Authority::Tenant(..) => Err(Error::NotFound),
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
            let actor = authenticate(&req).await?;
            let name: TenantName = req.match_info().query("tenant").parse().map_err(|_| Error::NotFound)?;
            let pool = req.app_data::<web::Data<PgPool>>().ok_or_else(|| Error::internal("no pool"))?;
            let mut conn = pool.acquire().await?;
            let tenant = store::find_tenant(&mut conn, &name).await?.ok_or(Error::NotFound)?;
            if !actor.knows(tenant.id) {
                return Err(Error::NotFound);
            }
            if !actor.may_in::<P>(tenant.id) {
                return Err(Error::Forbidden(role_name(P::TENANT, P::PLATFORM)));
            }
            Ok(Self { actor, tenant, request_id: request_id(&req), permission: PhantomData })
        })
    }
}
