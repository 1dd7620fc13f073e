//! A tenant's service accounts and tokens over the API.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::json;
use sqlx::PgPool;
use time::format_description::well_known::Rfc3339;

use super::{NumberPath, members};
use crate::access::extract::TenantScope;
use crate::access::sessions::DeskData;
use crate::access::tokens::{CreatedToken, NewToken};
use crate::access::{ManageCredentials, ReadActivity, store};
use crate::db::{self, Page, PageQuery};
use crate::error::Error;
use crate::http::asked::{Body, Query};
use crate::http::parse_json;

/// Builds the only response that shows the token.
pub(super) fn token_made(name: &str, made: &CreatedToken) -> HttpResponse {
    HttpResponse::Created().json(json!({
        "id": made.id, "name": name, "token": made.secret.expose(),
        "expires_at": made.expires_at.format(&Rfc3339).unwrap_or_default(),
    }))
}

/// GET /api/v1/tenants/{tenant}/service-accounts: ordered by name.
pub async fn list_services(
    scope: TenantScope<ReadActivity>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let rows = store::list_services(&mut conn, scope.tenant.id, &query.after_text()?, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.name.clone())))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceAccountBody {
    name: String,
    role: String,
}

/// POST /api/v1/tenants/{tenant}/service-accounts
pub async fn create_service(
    scope: TenantScope<ManageCredentials>,
    req: HttpRequest,
    desk: DeskData,
    body: Body,
) -> Result<HttpResponse, Error> {
    let input: ServiceAccountBody = parse_json(&req, &body)?;
    scope.tenant.require_active()?;
    desk.create_service(&scope, &input.name, members::role(&input.role)?).await?;
    Ok(HttpResponse::Created().json(json!({"name": input.name, "role": input.role})))
}

/// Path parameter: the service account.
#[derive(Deserialize)]
pub struct ServicePath {
    /// Name.
    pub service: String,
}

/// DELETE /api/v1/tenants/{tenant}/service-accounts/{service}
pub async fn delete_service(
    scope: TenantScope<ManageCredentials>,
    desk: DeskData,
    path: web::Path<ServicePath>,
) -> Result<HttpResponse, Error> {
    desk.delete_service(&scope, &path.service).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// GET /api/v1/tenants/{tenant}/tokens: tokens of all holders, oldest first.
pub async fn list_tokens(
    scope: TenantScope<ReadActivity>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let (limit, after) = (query.limit()?, query.after_number(0)?);
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let rows = store::list_tokens(&mut conn, Some(scope.tenant.id), after, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.id)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceTokenBody {
    service_account: String,
    name: String,
    days: Option<i32>,
}

/// POST /api/v1/tenants/{tenant}/tokens: creates a token for a service account.
pub async fn create_token(
    scope: TenantScope<ManageCredentials>,
    req: HttpRequest,
    desk: DeskData,
    body: Body,
) -> Result<HttpResponse, Error> {
    let input: ServiceTokenBody = parse_json(&req, &body)?;
    scope.tenant.require_active()?;
    let new = NewToken::check(&scope.actor, &input.name, input.days)?;
    let made = desk.create_service_token(&scope, &input.service_account, new).await?;
    Ok(token_made(&input.name, &made))
}

/// DELETE /api/v1/tenants/{tenant}/tokens/{id}
pub async fn revoke_token(
    scope: TenantScope<ManageCredentials>,
    desk: DeskData,
    path: web::Path<NumberPath>,
) -> Result<HttpResponse, Error> {
    desk.revoke_token(scope.by(), Some(scope.tenant.id), path.id).await?;
    Ok(HttpResponse::NoContent().finish())
}
