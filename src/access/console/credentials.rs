//! Pages of a tenant's service accounts and tokens.

use actix_web::{HttpResponse, web};
use askama::Template;
use serde::Deserialize;

use super::account::WhichForm;
use super::{SecretPage, tenant_frame, when, who};
use crate::access::api::members::role;
use crate::access::extract::{Posted, TenantScope};
use crate::access::sessions::DeskData;
use crate::access::tokens::NewToken;
use crate::access::{ManageCredentials, ReadActivity, store};
use crate::db::{self, Page, PageQuery};
use crate::error::Error;
use crate::http::html;
use crate::http::html::Frame;

struct TokenItem {
    id: i64,
    name: String,
    holder: String,
    role: String,
    expires: String,
    used: String,
}

#[derive(Template)]
#[template(path = "access/tokens.html")]
struct TokensPage {
    frame: Frame,
    tenant: String,
    error: String,
    manages: bool,
    services: Vec<store::ServiceAccountRow>,
    tokens: Vec<TokenItem>,
    next: String,
}

async fn view<P>(
    scope: &TenantScope<P>,
    desk: &DeskData,
    query: &PageQuery,
    error: String,
) -> Result<TokensPage, Error> {
    let (limit, after) = (query.limit()?, query.after_number(0)?);
    let mut conn = db::begin(&desk.pool, scope.tenant.id).await?;
    let services = store::list_services(&mut conn, scope.tenant.id, "", 200).await?;
    let rows = store::list_tokens(&mut conn, Some(scope.tenant.id), after, limit + 1).await?;
    let page = Page::new(rows, limit, |row| row.id);
    Ok(TokensPage {
        frame: tenant_frame(&desk.keys, scope, "Tokens"),
        tenant: scope.tenant.name.to_string(),
        error,
        manages: scope.may::<ManageCredentials>() && scope.tenant.state == "active",
        services: services
            .into_iter()
            .map(|row| store::ServiceAccountRow { created_by: who(&row.created_by), ..row })
            .collect(),
        tokens: page
            .items
            .into_iter()
            .map(|row| TokenItem {
                id: row.id,
                holder: match (row.service_account, row.account) {
                    (Some(service), _) => format!("service account {service}"),
                    (_, Some(account)) => account,
                    _ => "created by root on the machine".into(),
                },
                name: row.name,
                role: row.role,
                expires: when(row.expires_at),
                used: row.last_used_at.map_or_else(|| "never".to_owned(), when),
            })
            .collect(),
        next: page.next.unwrap_or_default(),
    })
}

/// GET /tenants/{tenant}/tokens
pub async fn tokens_page(
    scope: TenantScope<ReadActivity>,
    desk: DeskData,
    query: web::Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    html::page(&view(&scope, &desk, &query, String::new()).await?)
}

fn place<P>(scope: &TenantScope<P>) -> String {
    format!("/tenants/{}/tokens", scope.tenant.name)
}

async fn after<P>(
    scope: &TenantScope<P>,
    desk: &DeskData,
    outcome: Result<(), Error>,
) -> Result<HttpResponse, Error> {
    let again = async |error| view(scope, desk, &PageQuery::default(), error).await;
    super::after(&place(scope), outcome, again).await
}

/// Form: the name and the role of a service account.
#[derive(Deserialize)]
pub struct ServiceAccountForm {
    name: String,
    #[serde(default)]
    role: String,
}

/// POST /tenants/{tenant}/tokens/service-account
pub async fn create_service(
    scope: TenantScope<ManageCredentials>,
    desk: DeskData,
    form: Posted<ServiceAccountForm>,
) -> Result<HttpResponse, Error> {
    let outcome = match role(&form.0.role) {
        Ok(role) => desk.create_service(&scope, form.0.name.trim(), role).await,
        Err(error) => Err(error),
    };
    after(&scope, &desk, outcome).await
}

/// POST /tenants/{tenant}/tokens/service-account/removal
pub async fn delete_service(
    scope: TenantScope<ManageCredentials>,
    desk: DeskData,
    form: Posted<ServiceAccountForm>,
) -> Result<HttpResponse, Error> {
    let outcome = desk.delete_service(&scope, &form.0.name).await;
    after(&scope, &desk, outcome).await
}

/// Form: a new token of a service account.
#[derive(Deserialize)]
pub struct ServiceTokenForm {
    service: String,
    name: String,
    days: String,
}

/// POST /tenants/{tenant}/tokens
pub async fn create_token(
    scope: TenantScope<ManageCredentials>,
    desk: DeskData,
    form: Posted<ServiceTokenForm>,
) -> Result<HttpResponse, Error> {
    let form = form.0;
    let make = async {
        let new = NewToken::check(&scope.actor, &form.name, Some(form.days.parse().unwrap_or(0)))?;
        desk.create_service_token(&scope, &form.service, new).await
    };
    match make.await {
        Ok(made) => html::page(&SecretPage {
            frame: tenant_frame(&desk.keys, &scope, "Tokens"),
            title: format!("Token {}", form.name),
            text: "Store it with the secrets of your automation now. It is not shown again. Send it as Authorization: Bearer …, or to the registry as the password of any user name.",
            lines: vec![made.secret.expose().to_owned()],
            back: place(&scope),
        }),
        Err(error) => after(&scope, &desk, Err(error)).await,
    }
}

/// POST /tenants/{tenant}/tokens/revocation
pub async fn revoke_token(
    scope: TenantScope<ManageCredentials>,
    desk: DeskData,
    form: Posted<WhichForm>,
) -> Result<HttpResponse, Error> {
    let id = form.0.number()?;
    let outcome = desk.revoke_token(scope.by(), Some(scope.tenant.id), id).await;
    after(&scope, &desk, outcome).await
}
