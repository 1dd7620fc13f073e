//! API of a tenant's members and invitations.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::json;
use sqlx::PgPool;

use super::NumberPath;
use crate::access::extract::TenantScope;
use crate::access::invitations::HOURS;
use crate::access::links::CreatedLink;
use crate::access::sessions::DeskData;
use crate::access::{ManageMembers, ReadActivity, ReadTenant, Role, accounts, members, store};
use crate::db::{self, Page, PageQuery};
use crate::error::Error;
use crate::http::asked::{Body, Query};
use crate::http::{OwnAddress, parse_json};

/// GET /api/v1/tenants/{tenant}/members: ordered by name.
pub async fn list_members(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let rows = store::list_members(&mut conn, scope.tenant.id, &query.after_text()?, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.name.clone())))
}

/// Path parameter: the member.
#[derive(Deserialize)]
pub struct MemberPath {
    /// Name.
    pub member: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RoleBody {
    role: String,
}

/// Parses the field `role`.
pub(in crate::access) fn role(text: &str) -> Result<Role, Error> {
    Role::parse(text).ok_or_else(|| accounts::wrong("role", "role must be viewer, deployer or owner"))
}

/// PUT /api/v1/tenants/{tenant}/members/{member}
pub async fn change_member(
    scope: TenantScope<ManageMembers>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    path: web::Path<MemberPath>,
    body: Body,
) -> Result<HttpResponse, Error> {
    let input: RoleBody = parse_json(&req, &body)?;
    let wanted = role(&input.role)?;
    members::change_role(&pool, &scope, &path.member, wanted).await?;
    Ok(HttpResponse::Ok().json(json!({"name": path.member, "role": wanted.as_str()})))
}

/// DELETE /api/v1/tenants/{tenant}/members/{member}
pub async fn remove_member(
    scope: TenantScope<ManageMembers>,
    pool: web::Data<PgPool>,
    path: web::Path<MemberPath>,
) -> Result<HttpResponse, Error> {
    members::remove(&pool, &scope, &path.member).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// Builds the only response that shows the link.
pub(in crate::access) fn link_made(req: &HttpRequest, own: &OwnAddress, made: &CreatedLink) -> HttpResponse {
    let address = own.of(req).unwrap_or_default();
    HttpResponse::Created().json(json!({"id": made.id, "link": format!("{address}{}", made.path)}))
}

/// POST /api/v1/tenants/{tenant}/members/{member}/reset: creates a password reset link.
pub async fn reset_member(
    scope: TenantScope<ManageMembers>,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    path: web::Path<MemberPath>,
) -> Result<HttpResponse, Error> {
    let made = desk.reset_member(&scope, &path.member).await?;
    Ok(link_made(&req, &own, &made))
}

/// GET /api/v1/tenants/{tenant}/invitations: open invitations, oldest first.
pub async fn list_invitations(
    scope: TenantScope<ReadActivity>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let (limit, after) = (query.limit()?, query.after_number(0)?);
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let rows = store::list_invitations(&mut conn, Some(scope.tenant.id), after, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.id)))
}

/// Default lifetime of an invitation in hours.
pub(super) fn hours() -> i32 {
    HOURS.0
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MemberInvitationBody {
    name: String,
    role: String,
    #[serde(default = "hours")]
    hours: i32,
}

/// POST /api/v1/tenants/{tenant}/invitations
pub async fn invite(
    scope: TenantScope<ManageMembers>,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    body: Body,
) -> Result<HttpResponse, Error> {
    let input: MemberInvitationBody = parse_json(&req, &body)?;
    scope.tenant.require_active()?;
    let name = accounts::account_name("name", &input.name)?;
    let made = desk.invite(&scope, &name, role(&input.role)?, input.hours).await?;
    Ok(link_made(&req, &own, &made))
}

/// DELETE /api/v1/tenants/{tenant}/invitations/{id}
pub async fn revoke_invitation(
    scope: TenantScope<ManageMembers>,
    desk: DeskData,
    path: web::Path<NumberPath>,
) -> Result<HttpResponse, Error> {
    desk.revoke_invitation(scope.by(), Some(scope.tenant.id), path.id).await?;
    Ok(HttpResponse::NoContent().finish())
}
