//! API of the platform's accounts, invitations and tokens.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::{Deserialize, Deserializer};
use serde_json::json;
use sqlx::PgPool;

use super::{NumberPath, members};
use crate::access::accounts::Change;
use crate::access::extract::PlatformScope;
use crate::access::sessions::DeskData;
use crate::access::{ManagePeople, PlatformRole, ReadPlatform, accounts, store};
use crate::db::{self, Page, PageQuery, Within};
use crate::error::Error;
use crate::http::asked::{Body, Query};
use crate::http::{OwnAddress, parse_json};

/// GET /api/v1/accounts: ordered by name.
pub async fn list_accounts(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let mut conn = pool.acquire().await?;
    let rows = store::list_accounts(&mut conn, &query.after_text()?, None, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.name.clone())))
}

/// Path parameter: the account.
#[derive(Deserialize)]
pub struct AccountPath {
    /// Name.
    pub account: String,
}

impl AccountPath {
    pub(in crate::access) fn name(&self) -> Result<crate::ids::AccountName, Error> {
        self.account.parse().map_err(|_| Error::NotFound)
    }
}

/// GET /api/v1/accounts/{account}
pub async fn get_account(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    path: web::Path<AccountPath>,
) -> Result<HttpResponse, Error> {
    let name = path.name()?;
    let mut conn = pool.acquire().await?;
    let row =
        store::list_accounts(&mut conn, "", Some(name.as_str()), 1).await?.pop().ok_or(Error::NotFound)?;
    let tenants = store::tenants_of(&mut conn, crate::ids::AccountId(row.id)).await?;
    let mut body = serde_json::to_value(&row).map_err(Error::internal)?;
    body["tenants"] = json!(tenants);
    Ok(HttpResponse::Ok().json(body))
}

/// Tells an explicit null (`Some(None)`) from an absent field (`None`).
fn given<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Option<String>>, D::Error> {
    Option::deserialize(from).map(Some)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AccountChangeBody {
    #[serde(default, deserialize_with = "given")]
    platform_role: Option<Option<String>>,
    disabled: Option<bool>,
}

pub(in crate::access) fn platform_role(text: Option<&str>) -> Result<Option<PlatformRole>, Error> {
    match text {
        None | Some("" | "none") => Ok(None),
        Some(text) => PlatformRole::parse(text)
            .map(Some)
            .ok_or_else(|| accounts::wrong("platform_role", "platform_role must be auditor, admin or null")),
    }
}

/// PATCH /api/v1/accounts/{account}
pub async fn change_account(
    scope: PlatformScope<ManagePeople>,
    req: HttpRequest,
    desk: DeskData,
    path: web::Path<AccountPath>,
    body: Body,
) -> Result<HttpResponse, Error> {
    let input: AccountChangeBody = parse_json(&req, &body)?;
    let role = match &input.platform_role {
        None => None,
        Some(given) => Some(platform_role(given.as_deref())?),
    };
    let change = Change { platform_role: role, disabled: input.disabled };
    let name = path.name()?;
    desk.change_account(scope.by(), &name, &change).await?;
    Ok(HttpResponse::Ok().json(json!({"name": name})))
}

/// POST /api/v1/accounts/{account}/reset: creates a password reset link.
pub async fn reset_account(
    scope: PlatformScope<ManagePeople>,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    path: web::Path<AccountPath>,
) -> Result<HttpResponse, Error> {
    let made = desk.reset(scope.by(), &path.name()?).await?;
    Ok(members::link_made(&req, &own, &made))
}

/// DELETE /api/v1/accounts/{account}/second-factor
pub async fn remove_second_factor(
    scope: PlatformScope<ManagePeople>,
    desk: DeskData,
    path: web::Path<AccountPath>,
) -> Result<HttpResponse, Error> {
    desk.remove_second_factor_of(scope.by(), &path.name()?).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// DELETE /api/v1/accounts/{account}/providers: removes all provider links.
pub async fn unlink_account(
    scope: PlatformScope<ManagePeople>,
    desk: DeskData,
    path: web::Path<AccountPath>,
) -> Result<HttpResponse, Error> {
    desk.unlink_all(scope.by(), &path.name()?).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// GET /api/v1/invitations: open invitations to the platform itself, oldest first.
pub async fn list_invitations(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let (limit, after) = (query.limit()?, query.after_number(0)?);
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let rows = store::list_invitations(&mut conn, None, after, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.id)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AccountInvitationBody {
    name: String,
    platform_role: Option<String>,
    #[serde(default = "super::members::hours")]
    hours: i32,
}

/// POST /api/v1/invitations
pub async fn invite(
    scope: PlatformScope<ManagePeople>,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    body: Body,
) -> Result<HttpResponse, Error> {
    let input: AccountInvitationBody = parse_json(&req, &body)?;
    let name = accounts::account_name("name", &input.name)?;
    let role = platform_role(input.platform_role.as_deref())?;
    let made = desk.invite_to_platform(scope.by(), &name, role, input.hours).await?;
    Ok(members::link_made(&req, &own, &made))
}

/// DELETE /api/v1/invitations/{id}
pub async fn revoke_invitation(
    scope: PlatformScope<ManagePeople>,
    desk: DeskData,
    path: web::Path<NumberPath>,
) -> Result<HttpResponse, Error> {
    desk.revoke_invitation(scope.by(), None, path.id).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// GET /api/v1/tokens: tokens with a platform role, of all holders, oldest first.
pub async fn list_tokens(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let (limit, after) = (query.limit()?, query.after_number(0)?);
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let rows = store::list_tokens(&mut conn, None, after, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.id)))
}

/// DELETE /api/v1/tokens/{id}
pub async fn revoke_token(
    scope: PlatformScope<ManagePeople>,
    desk: DeskData,
    path: web::Path<NumberPath>,
) -> Result<HttpResponse, Error> {
    desk.revoke_token(scope.by(), None, path.id).await?;
    Ok(HttpResponse::NoContent().finish())
}
