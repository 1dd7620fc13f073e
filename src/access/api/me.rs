//! API of the caller's own account.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::json;
use sqlx::PgPool;

use super::NumberPath;
use crate::access::console::session_cookie;
use crate::access::extract::{SignedIn, TenantScope};
use crate::access::sessions::{Client, DeskData};
use crate::access::tokens::NewToken;
use crate::access::{Means, PlatformRole, ReadTenant, accounts, members, store};
use crate::error::Error;
use crate::http::asked::Body;
use crate::http::{OwnAddress, parse_json};

/// GET /api/v1/me
pub async fn get_me(scope: SignedIn, pool: web::Data<PgPool>) -> Result<HttpResponse, Error> {
    let actor = &scope.actor;
    let mut body = json!({"name": actor.name, "actor": actor.id});
    let (kind, id) = match &actor.means {
        Means::Session { id, .. } => ("session", id),
        Means::Token { id, .. } => ("token", id),
    };
    body["by"] = json!({"kind": kind, "id": id});
    if let Some(role) = actor.platform {
        body["platform_role"] = json!(PlatformRole::as_str(role));
    }
    if let Some(account) = actor.account {
        let mut conn = pool.acquire().await?;
        body["tenants"] = json!(store::tenants_of(&mut conn, account).await?);
        body["second_factor"] =
            json!(store::find_factor(&mut conn, account).await?.is_some_and(|factor| factor.confirmed));
    }
    Ok(HttpResponse::Ok().json(body))
}

/// GET /api/v1/me/sessions: newest first.
pub async fn list_sessions(scope: SignedIn, pool: web::Data<PgPool>) -> Result<HttpResponse, Error> {
    let account = accounts::own(&scope.actor)?;
    let mut conn = pool.acquire().await?;
    let rows = store::list_sessions(&mut conn, account).await?;
    Ok(HttpResponse::Ok().json(json!({"items": rows, "next": null})))
}

/// DELETE /api/v1/me/sessions/{id}
pub async fn end_session(
    scope: SignedIn,
    desk: DeskData,
    path: web::Path<NumberPath>,
) -> Result<HttpResponse, Error> {
    desk.end_session(scope.by(), path.id).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// DELETE /api/v1/me/sessions: ends all sessions except the current one.
pub async fn end_other_sessions(scope: SignedIn, desk: DeskData) -> Result<HttpResponse, Error> {
    let ended = desk.end_other_sessions(scope.by()).await?;
    Ok(HttpResponse::Ok().json(json!({"ended": ended})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PasswordBody {
    #[serde(default)]
    current: String,
    new: String,
}

/// PUT /api/v1/me/password
pub async fn set_password(
    scope: SignedIn,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    body: Body,
) -> Result<HttpResponse, Error> {
    let input: PasswordBody = parse_json(&req, &body)?;
    desk.change_password(&Client::of(&req, &own), &scope.actor, &input.current, &input.new).await?;
    Ok(HttpResponse::NoContent().finish())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfirmBody {
    password: String,
    #[serde(default)]
    code: String,
}

/// POST /api/v1/me/confirmation: the session continues under a new cookie.
pub async fn confirm(
    scope: SignedIn,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    body: Body,
) -> Result<HttpResponse, Error> {
    let input: ConfirmBody = parse_json(&req, &body)?;
    let client = Client::of(&req, &own);
    let fresh = desk
        .confirm(&client, &scope.actor, &input.password, &input.code)
        .await?
        .ok_or_else(|| accounts::wrong("password", "the password or the code is wrong"))?;
    Ok(HttpResponse::NoContent().cookie(session_cookie(&req, fresh.expose())).finish())
}

/// POST /api/v1/me/second-factor: starts the setup.
pub async fn begin_second_factor(scope: SignedIn, desk: DeskData) -> Result<HttpResponse, Error> {
    let setup = desk.begin_second_factor(scope.by()).await?;
    Ok(HttpResponse::Created().json(json!({"secret": setup.secret, "address": setup.address})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CodeBody {
    code: String,
}

/// PUT /api/v1/me/second-factor: the first valid code activates the factor.
pub async fn confirm_second_factor(
    scope: SignedIn,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    body: Body,
) -> Result<HttpResponse, Error> {
    let input: CodeBody = parse_json(&req, &body)?;
    let codes = desk.confirm_second_factor(&Client::of(&req, &own), &scope.actor, &input.code).await?;
    Ok(HttpResponse::Ok().json(json!({"recovery_codes": codes})))
}

/// DELETE /api/v1/me/second-factor
pub async fn remove_second_factor(scope: SignedIn, desk: DeskData) -> Result<HttpResponse, Error> {
    desk.remove_second_factor(scope.by()).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// Path parameter: the provider.
#[derive(Deserialize)]
pub struct IdentityPath {
    provider: String,
}

/// DELETE /api/v1/me/providers/{provider}
pub async fn unlink(
    scope: SignedIn,
    desk: DeskData,
    path: web::Path<IdentityPath>,
) -> Result<HttpResponse, Error> {
    desk.unlink(scope.by(), &path.provider).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// GET /api/v1/me/tokens: oldest first.
pub async fn list_tokens(scope: SignedIn, pool: web::Data<PgPool>) -> Result<HttpResponse, Error> {
    let account = accounts::own(&scope.actor)?;
    let mut conn = pool.acquire().await?;
    let rows = store::list_own_tokens(&mut conn, account).await?;
    Ok(HttpResponse::Ok().json(json!({"items": rows, "next": null})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UserTokenBody {
    name: String,
    tenant: Option<String>,
    role: String,
    days: Option<i32>,
}

/// POST /api/v1/me/tokens
pub async fn create_token(
    scope: SignedIn,
    req: HttpRequest,
    desk: DeskData,
    body: Body,
) -> Result<HttpResponse, Error> {
    let input: UserTokenBody = parse_json(&req, &body)?;
    let new = NewToken::check(&scope.actor, &input.name, input.days)?;
    let authority = desk.own_authority(&scope.actor, input.tenant.as_deref(), &input.role).await?;
    let made = desk.create_own_token(scope.by(), authority, new).await?;
    Ok(super::credentials::token_made(&input.name, &made))
}

/// DELETE /api/v1/me/tokens/{id}
pub async fn revoke_token(
    scope: SignedIn,
    desk: DeskData,
    path: web::Path<NumberPath>,
) -> Result<HttpResponse, Error> {
    desk.revoke_own_token(scope.by(), path.id).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// DELETE /api/v1/me/tenants/{tenant}: leaves the tenant.
pub async fn leave(scope: TenantScope<ReadTenant>, pool: web::Data<PgPool>) -> Result<HttpResponse, Error> {
    scope.actor.require_person()?;
    members::remove(&pool, &scope, &scope.actor.name).await?;
    Ok(HttpResponse::NoContent().finish())
}
