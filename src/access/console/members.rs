//! A tenant's people, service accounts and tokens.

use actix_web::http::StatusCode;
use actix_web::{HttpRequest, HttpResponse, web};
use askama::Template;
use serde::Deserialize;

use super::account::WhichForm;
use super::{SecretPage, inline, page_with, see_other, tenant_frame, when, who};
use crate::access::api::members::role;
use crate::access::extract::{Posted, TenantScope};
use crate::access::invitations::HOURS;
use crate::access::sessions::DeskData;
use crate::access::tokens::NewToken;
use crate::access::{ManageCredentials, ManageMembers, ReadActivity, ReadTenant, accounts, members, store};
use crate::db::{self, Page, PageQuery};
use crate::error::Error;
use crate::http::html::Frame;
use crate::http::{OwnAddress, html};

struct MemberView {
    name: String,
    display_name: String,
    role: String,
    note: String,
    since: String,
    own: bool,
    factor: bool,
}

struct InvitationView {
    id: i64,
    name: String,
    role: String,
    until: String,
}

#[derive(Template)]
#[template(path = "access/members.html")]
struct MembersPage {
    frame: Frame,
    tenant: String,
    error: String,
    manages: bool,
    member: bool,
    members: Vec<MemberView>,
    next: String,
    invitations: Vec<InvitationView>,
}

async fn view<P>(
    scope: &TenantScope<P>,
    desk: &DeskData,
    query: &PageQuery,
    error: String,
) -> Result<MembersPage, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&desk.pool, scope.tenant.id).await?;
    let rows = store::list_members(&mut conn, scope.tenant.id, &query.after_text()?, limit + 1).await?;
    let page = Page::new(rows, limit, |row| row.name.clone());
    let manages = scope.may::<ManageMembers>() && scope.tenant.state == "active";
    let invitations = if scope.may::<ReadActivity>() {
        store::list_invitations(&mut conn, Some(scope.tenant.id), 0, 200).await?
    } else {
        Vec::new()
    };
    Ok(MembersPage {
        frame: tenant_frame(&desk.keys, scope, "Members"),
        tenant: scope.tenant.name.to_string(),
        error,
        manages,
        member: scope.role.is_some() && scope.actor.account.is_some(),
        members: page
            .items
            .into_iter()
            .map(|row| MemberView {
                own: row.name == scope.actor.name,
                note: match (row.disabled, row.source.as_str()) {
                    (true, _) => "disabled".into(),
                    (_, "local") => String::new(),
                    (_, provider) => format!("through {provider}"),
                },
                since: when(row.since),
                factor: row.second_factor,
                name: row.name,
                display_name: row.display_name,
                role: row.role,
            })
            .collect(),
        next: page.next.unwrap_or_default(),
        invitations: invitations
            .into_iter()
            .map(|row| InvitationView {
                id: row.id,
                name: row.name,
                role: row.role.unwrap_or_default(),
                until: when(row.expires_at),
            })
            .collect(),
    })
}

/// GET /tenants/{tenant}/members
pub async fn members_page(
    scope: TenantScope<ReadTenant>,
    desk: DeskData,
    query: web::Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    html::page(&view(&scope, &desk, &query, String::new()).await?)
}

async fn after<P>(
    scope: &TenantScope<P>,
    desk: &DeskData,
    outcome: Result<(), Error>,
) -> Result<HttpResponse, Error> {
    let place = format!("/tenants/{}/members", scope.tenant.name);
    match outcome {
        Ok(()) => Ok(see_other(&place)),
        Err(Error::Unconfirmed) => Ok(see_other(&format!("/confirm?next={place}"))),
        Err(error) => {
            let error = inline(error)?;
            let page = view(scope, desk, &PageQuery::default(), error).await?;
            page_with(StatusCode::UNPROCESSABLE_ENTITY, &page)
        }
    }
}

/// Whom, and as what.
#[derive(Deserialize)]
pub struct MemberForm {
    name: String,
    #[serde(default)]
    role: String,
}

/// POST /tenants/{tenant}/members/role
pub async fn change_member(
    scope: TenantScope<ManageMembers>,
    desk: DeskData,
    form: Posted<MemberForm>,
) -> Result<HttpResponse, Error> {
    let outcome = match role(&form.0.role) {
        Ok(role) => members::change_role(&desk.pool, &scope, &form.0.name, role).await,
        Err(error) => Err(error),
    };
    after(&scope, &desk, outcome).await
}

/// POST /tenants/{tenant}/members/removal
pub async fn remove_member(
    scope: TenantScope<ManageMembers>,
    desk: DeskData,
    form: Posted<MemberForm>,
) -> Result<HttpResponse, Error> {
    let outcome = members::remove(&desk.pool, &scope, &form.0.name).await;
    after(&scope, &desk, outcome).await
}

/// POST /tenants/{tenant}/leave
pub async fn leave(
    scope: TenantScope<ReadTenant>,
    desk: DeskData,
    _: Posted<super::login::Nothing>,
) -> Result<HttpResponse, Error> {
    scope.actor.require_person()?;
    match members::remove(&desk.pool, &scope, &scope.actor.name).await {
        Ok(()) => Ok(see_other("/")),
        Err(error) => after(&scope, &desk, Err(error)).await,
    }
}

fn link_page<P>(
    scope: &TenantScope<P>,
    desk: &DeskData,
    title: String,
    text: &'static str,
    link: String,
) -> Result<HttpResponse, Error> {
    html::page(&SecretPage {
        frame: tenant_frame(&desk.keys, scope, "Members"),
        title,
        text,
        lines: vec![link],
        back: format!("/tenants/{}/members", scope.tenant.name),
    })
}

/// POST /tenants/{tenant}/members/invitation
pub async fn invite(
    scope: TenantScope<ManageMembers>,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    form: Posted<MemberForm>,
) -> Result<HttpResponse, Error> {
    let make = async {
        scope.tenant.require_active()?;
        let name = accounts::account_name("name", &form.0.name)?;
        desk.invite(&scope, &name, role(&form.0.role)?, HOURS.0).await
    };
    match make.await {
        Ok(made) => link_page(
            &scope,
            &desk,
            format!("Invitation for {}", form.0.name),
            "Pass this link on. It works once, for three days, for that name alone, and is not shown again.",
            format!("{}{}", own.of(&req).unwrap_or_default(), made.path),
        ),
        Err(error) => after(&scope, &desk, Err(error)).await,
    }
}

/// POST /tenants/{tenant}/members/invitation/revocation
pub async fn revoke_invitation(
    scope: TenantScope<ManageMembers>,
    desk: DeskData,
    form: Posted<WhichForm>,
) -> Result<HttpResponse, Error> {
    let id = form.0.number()?;
    let outcome = desk.revoke_invitation(&scope.actor, &scope.request_id.0, Some(scope.tenant.id), id).await;
    after(&scope, &desk, outcome).await
}

/// POST /tenants/{tenant}/members/reset
pub async fn reset_member(
    scope: TenantScope<ManageMembers>,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    form: Posted<MemberForm>,
) -> Result<HttpResponse, Error> {
    match desk.reset_member(&scope, &form.0.name).await {
        Ok(made) => link_page(
            &scope,
            &desk,
            format!("New password for {}", form.0.name),
            "Pass this link on. It works once, for four hours; it ends that person's sessions and tokens.",
            format!("{}{}", own.of(&req).unwrap_or_default(), made.path),
        ),
        Err(error) => after(&scope, &desk, Err(error)).await,
    }
}

struct TokenView {
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
    services: Vec<store::ServiceRow>,
    tokens: Vec<TokenView>,
    next: String,
}

async fn tokens_view<P>(
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
            .map(|row| store::ServiceRow { created_by: who(&row.created_by), ..row })
            .collect(),
        tokens: page
            .items
            .into_iter()
            .map(|row| TokenView {
                id: row.id,
                holder: match (row.service_account, row.account) {
                    (Some(service), _) => format!("service account {service}"),
                    (_, Some(account)) => account,
                    _ => "made by root on the machine".into(),
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
    html::page(&tokens_view(&scope, &desk, &query, String::new()).await?)
}

async fn after_token<P>(
    scope: &TenantScope<P>,
    desk: &DeskData,
    outcome: Result<(), Error>,
) -> Result<HttpResponse, Error> {
    let place = format!("/tenants/{}/tokens", scope.tenant.name);
    match outcome {
        Ok(()) => Ok(see_other(&place)),
        Err(Error::Unconfirmed) => Ok(see_other(&format!("/confirm?next={place}"))),
        Err(error) => {
            let error = inline(error)?;
            let page = tokens_view(scope, desk, &PageQuery::default(), error).await?;
            page_with(StatusCode::UNPROCESSABLE_ENTITY, &page)
        }
    }
}

/// POST /tenants/{tenant}/tokens/service-account
pub async fn create_service(
    scope: TenantScope<ManageCredentials>,
    desk: DeskData,
    form: Posted<MemberForm>,
) -> Result<HttpResponse, Error> {
    let outcome = match role(&form.0.role) {
        Ok(role) => desk.create_service(&scope, form.0.name.trim(), role).await,
        Err(error) => Err(error),
    };
    after_token(&scope, &desk, outcome).await
}

/// POST /tenants/{tenant}/tokens/service-account/removal
pub async fn delete_service(
    scope: TenantScope<ManageCredentials>,
    desk: DeskData,
    form: Posted<MemberForm>,
) -> Result<HttpResponse, Error> {
    let outcome = desk.delete_service(&scope, &form.0.name).await;
    after_token(&scope, &desk, outcome).await
}

/// A token for a service account.
#[derive(Deserialize)]
pub struct TokenForm {
    service: String,
    name: String,
    days: String,
}

/// POST /tenants/{tenant}/tokens
pub async fn create_token(
    scope: TenantScope<ManageCredentials>,
    desk: DeskData,
    form: Posted<TokenForm>,
) -> Result<HttpResponse, Error> {
    let form = form.0;
    let make = async {
        let new = NewToken::check(&scope.actor, &form.name, form.days.parse().unwrap_or(0))?;
        desk.create_service_token(&scope, &form.service, new).await
    };
    match make.await {
        Ok(made) => html::page(&SecretPage {
            frame: tenant_frame(&desk.keys, &scope, "Tokens"),
            title: format!("Token {}", form.name),
            text: "Keep it where your automation keeps its secrets: it is not shown again. It is sent as Authorization: Bearer …, and opens the registry as the password of any user name.",
            lines: vec![made.secret.expose().to_owned()],
            back: format!("/tenants/{}/tokens", scope.tenant.name),
        }),
        Err(error) => after_token(&scope, &desk, Err(error)).await,
    }
}

/// POST /tenants/{tenant}/tokens/revocation
pub async fn revoke_token(
    scope: TenantScope<ManageCredentials>,
    desk: DeskData,
    form: Posted<WhichForm>,
) -> Result<HttpResponse, Error> {
    let id = form.0.number()?;
    let outcome = desk.revoke_token(&scope.actor, &scope.request_id.0, Some(scope.tenant.id), id).await;
    after_token(&scope, &desk, outcome).await
}
