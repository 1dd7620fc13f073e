//! Shared parts of the registry proxy: the credential of a request, and OCI's error format (distribution
//! specification 1.1, "Error codes").

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use actix_web::http::{StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};
use data_encoding::BASE64;
use serde::Deserialize;
use serde_json::json;
use sqlx::PgPool;

use super::token::{Claims, CredentialKind, Push, Right, SERVICE, SigningKey, TokenAccess, grant};
use super::{Distribution, Holders, store};
use crate::access::denials::Denials;
use crate::access::throttle::network;
use crate::access::turns::{Payer, Turns};
use crate::access::{self, Public, PullImages, PushImages, credentials, includes};
use crate::audit::Refusal;
use crate::db;
use crate::error::Error;
use crate::http::OwnAddress;
use crate::ids::TenantName;
use crate::permits::Permit;

/// The listener of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Door {
    /// For tenants' clients.
    Tenants,
    /// For the engine: pulls only; its realm is this address.
    Engine(String),
}

/// Shared lookup of the apps that use images.
#[derive(Clone)]
pub struct ImageHolders(pub Arc<dyn Holders>);

impl std::fmt::Debug for ImageHolders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ImageHolders")
    }
}

/// Dependencies of the handlers.
#[derive(Debug, Clone)]
pub struct FrontDoor {
    /// Database.
    pub pool: PgPool,
    /// Key that signs the tokens.
    pub key: SigningKey,
    /// The registry behind the proxy.
    pub registry: Distribution,
    /// The server's own address.
    pub own: OwnAddress,
    /// The listener.
    pub door: Door,
    /// Lookup of the apps that use images.
    pub holders: ImageHolders,
    /// Refusals, for the audit log.
    pub denials: Denials,
    /// Limits of database use.
    pub turns: Turns,
}

/// An error in the format of registry clients.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct OciError {
    status: StatusCode,
    code: &'static str,
    message: String,
    challenge: Option<String>,
}

impl OciError {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), challenge: None }
    }
    pub(super) fn denied(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "DENIED", message)
    }
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", message)
    }
    pub(super) fn unsupported() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "this is not available here")
    }
    pub(super) fn unknown_name() -> Self {
        Self::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", "there is no such repository")
    }
    pub(super) fn unknown_blob() -> Self {
        Self::new(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", "there is no such blob")
    }
    pub(super) fn unknown_manifest() -> Self {
        Self::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", "there is no such manifest")
    }
}

impl From<Error> for OciError {
    fn from(error: Error) -> Self {
        match error {
            Error::Internal(cause) => {
                tracing::error!(%cause, "internal error in the registry proxy");
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", "internal error")
            }
            Error::NotFound => Self::unknown_name(),
            Error::Unavailable(text, _) => Self::new(StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE", text),
            Error::QuotaExceeded(faults) if !faults.is_empty() => {
                // The numbers show how much to free or to request.
                let texts = faults.into_iter().map(|fault| {
                    let (name, instead) = (fault.path, fault.suggestion.unwrap_or_default());
                    format!("{name}: {}; {instead}", fault.message)
                });
                Self::denied(texts.collect::<Vec<_>>().join("; "))
            }
            other => Self::denied(other.to_string()),
        }
    }
}

impl From<sqlx::Error> for OciError {
    fn from(error: sqlx::Error) -> Self {
        Error::from(error).into()
    }
}

impl actix_web::ResponseError for OciError {
    fn status_code(&self) -> StatusCode {
        self.status
    }
    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponse::build(self.status);
        response.insert_header(("Docker-Distribution-Api-Version", "registry/2.0"));
        if let Some(challenge) = &self.challenge {
            response.insert_header((header::WWW_AUTHENTICATE, challenge.clone()));
        }
        if matches!(self.status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
            response.insert_header((header::RETRY_AFTER, "3"));
        }
        response.json(json!({"errors": [{"code": self.code, "message": self.message}]}))
    }
}

/// The error of a request that did not get a database slot in time.
fn later(_: crate::error::Error) -> OciError {
    OciError::new(
        StatusCode::TOO_MANY_REQUESTS,
        "TOOMANYREQUESTS",
        "too many requests are in progress; try again in a moment",
    )
}

impl FrontDoor {
    fn realm(&self, req: &HttpRequest) -> Option<String> {
        let own = match &self.door {
            Door::Tenants => self.own.of(req)?,
            Door::Engine(address) => format!("http://{address}"),
        };
        Some(format!("{own}/auth/token"))
    }

    /// Builds the error that tells a client where to get a token, and for which scope.
    pub(super) fn challenge(&self, req: &HttpRequest, scope: Option<(&str, &str)>) -> OciError {
        let mut error = OciError::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "authentication is required");
        error.challenge = self.realm(req).map(|realm| {
            let scope = scope.map(|(name, actions)| format!(",scope=\"repository:{name}:{actions}\""));
            format!("Bearer realm=\"{realm}\",service=\"{SERVICE}\"{}", scope.unwrap_or_default())
        });
        error
    }

    /// Returns the claims of the request's token; none if its registry credential was revoked since.
    pub(super) async fn claims(&self, req: &HttpRequest) -> Result<Option<Claims>, OciError> {
        let token =
            req.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()?.strip_prefix("Bearer "));
        let Some(claims) = token.and_then(|token| self.key.verify(token)) else { return Ok(None) };
        Ok(self.is_good(&claims).await?.then_some(claims))
    }

    /// Takes a database slot for a tenant's request. Held during database work, never while streaming.
    pub(super) async fn room(&self, tenant: &TenantName) -> Result<Permit<Payer>, OciError> {
        self.turns.signed(tenant).await.map_err(later)
    }

    /// Returns whether the credential of the claims is still valid with the same rights.
    pub(super) async fn is_good(&self, claims: &Claims) -> Result<bool, OciError> {
        let Some((kind, id, tenant)) = claims.holder() else { return Ok(true) };
        let _room = self.room(&tenant).await?;
        // A token is valid for minutes. Meanwhile its holder may have lost access or rights.
        let mut conn = db::begin(&self.pool, &tenant).await?;
        let good = if kind == CredentialKind::Robot {
            store::is_robot_good(&mut conn, id).await?
        } else {
            let role = match store::find_token_hash(&mut conn, id).await? {
                Some(hash) => access::registry_role(&mut conn, &tenant, &hash).await?,
                None => None,
            };
            includes::<PullImages>(None, role)
                && (includes::<PushImages>(None, role) || !claims.access.iter().any(TokenAccess::pushes))
        };
        conn.commit().await?;
        Ok(good)
    }

    /// Returns the host in front of image names.
    pub(super) fn host(&self, req: &HttpRequest) -> String {
        let own = self.own.of(req).unwrap_or_default();
        own.split_once("://").map_or_else(|| "HOST".to_owned(), |(_, host)| host.to_owned())
    }

    /// Returns whether the token's credential has push rights at all, regardless of the token's scope.
    pub(super) async fn may_push_at_all(&self, claims: &Claims) -> Result<bool, OciError> {
        let Some((kind, id, tenant)) = claims.holder() else { return Ok(false) };
        let mut conn = db::begin(&self.pool, &tenant).await?;
        if kind == CredentialKind::Robot {
            return Ok(store::may_robot_push(&mut conn, id).await?);
        }
        let Some(hash) = store::find_token_hash(&mut conn, id).await? else { return Ok(false) };
        let role = access::registry_role(&mut conn, &tenant, &hash).await?;
        Ok(includes::<PushImages>(None, role))
    }

    /// Returns the right of a user name and password.
    async fn right(
        &self,
        user: &str,
        password: &str,
        place: IpAddr,
    ) -> Result<Option<(String, Right)>, OciError> {
        if user == "engine" {
            let one = self.key.verify_pull(password).map(Right::One);
            return Ok(one.map(|right| ("engine".to_owned(), right)));
        }
        if self.door != Door::Tenants {
            return Ok(None);
        }
        let (tenant, name) = user.split_once('+').unwrap_or((user, ""));
        let Ok(tenant) = tenant.parse::<TenantName>() else { return Ok(None) };
        let hash = credentials::hash(password);
        let _room = self.turns.lookup(&hash, place).await.map_err(later)?;
        let mut conn = db::begin(&self.pool, &tenant).await?;
        let found = if password.starts_with(credentials::TOKEN_PREFIX) {
            // An API token works as the password of the tenant's name, within the token's role.
            let role = access::registry_role(&mut conn, &tenant, &hash).await?;
            match store::find_token_id(&mut conn, &hash).await? {
                Some(id) if includes::<PullImages>(None, role) => {
                    Some((format!("token:{id}"), includes::<PushImages>(None, role)))
                }
                _ => None,
            }
        } else {
            let robot = store::find_robot(&mut conn, &tenant, name, &hash).await?;
            robot.map(|robot| (format!("robot:{}", robot.id), robot.push))
        };
        conn.commit().await?;
        if found.is_some() {
            self.turns.remember(&hash, Payer::Named(tenant.clone()));
        }
        Ok(found.map(|(subject, push)| {
            let push = if push { Push::Yes } else { Push::No };
            (format!("{subject}@{tenant}"), Right::Tenant(tenant, push))
        }))
    }
}

/// The same message for an unknown tenant and a wrong secret.
const WRONG: &str = "the user name or secret is wrong: the user is TENANT+NAME with the secret of that registry \
    credential, or the tenant's name with an API token";

/// Parameters of the token endpoint. `scope` may repeat, so the code parses the query itself.
#[derive(Deserialize)]
pub struct TokenQuery {
    service: Option<String>,
}

fn scopes(query: &str) -> Vec<String> {
    let pairs = serde_urlencoded_pairs(query);
    pairs.into_iter().filter(|(key, _)| key == "scope").map(|(_, value)| value).take(16).collect()
}

fn serde_urlencoded_pairs(query: &str) -> Vec<(String, String)> {
    web::Query::<Vec<(String, String)>>::from_query(query).map(web::Query::into_inner).unwrap_or_default()
}

/// GET /auth/token
pub async fn get_token(
    _: Public,
    req: HttpRequest,
    door: web::Data<FrontDoor>,
    query: web::Query<TokenQuery>,
) -> Result<HttpResponse, OciError> {
    if query.service.as_deref().is_some_and(|service| service != SERVICE) {
        return Err(OciError::new(
            StatusCode::BAD_REQUEST,
            "UNSUPPORTED",
            "this token server does not serve that service",
        ));
    }
    let basic =
        req.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()?.strip_prefix("Basic "));
    let pair = basic
        .and_then(|text| BASE64.decode(text.trim().as_bytes()).ok())
        .and_then(|bytes| String::from_utf8(bytes).ok());
    let wrong = || {
        let mut error = OciError::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", WRONG);
        error.challenge = Some("Basic realm=\"bulkhead\"".into());
        error
    };
    let pair = pair.ok_or_else(wrong)?;
    let (user, password) = pair.split_once(':').ok_or_else(wrong)?;
    let place = network(door.own.client(&req));
    let Some((subject, right)) = door.right(user, password, place).await? else {
        tracing::info!("registry credentials refused");
        door.denials.note(Refusal {
            tenant: None,
            actor: "anonymous".into(),
            via: None,
            object: "registry".into(),
            reason: "the user name or secret is wrong",
            place: place.to_string(),
        });
        return Err(wrong());
    };
    let asked = scopes(req.query_string());
    let access = grant(&right, &asked);
    tracing::info!(subject, asked = asked.len(), given = access.len(), "registry token");
    let token = door.key.mint(&subject, access)?;
    let issued = time::OffsetDateTime::now_utc()
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_default();
    Ok(HttpResponse::Ok().insert_header((header::CACHE_CONTROL, "no-store")).json(json!({
        "token": token, "access_token": token, "expires_in": super::token::LIFE.as_secs(), "issued_at": issued,
    })))
}

/// Maximum time of a registry request without an answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
