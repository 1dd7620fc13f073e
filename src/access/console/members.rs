//! Pages of a tenant's members.

use actix_web::{HttpRequest, HttpResponse, web};
use askama::Template;
use serde::Deserialize;

use super::account::WhichForm;
use super::{INVITED, RESET, link_page, see_other, tenant_frame, when};
use crate::access::api::members::role;
use crate::access::extract::{Posted, TenantScope};
use crate::access::invitations::HOURS;
use crate::access::sessions::DeskData;
use crate::access::{ManageMembers, ReadActivity, ReadTenant, accounts, members, store};
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

struct MemberInvitationView {
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
    invitations: Vec<MemberInvitationView>,
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
            .map(|row| MemberInvitationView {
                id: row.id,
                name: row.name,
                role: row.role.unwrap_or_default(),
                until: when(row.expires_at),
            })
            .collect(),
    })
}

fn place<P>(scope: &TenantScope<P>) -> String {
    format!("/tenants/{}/members", scope.tenant.name)
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
    let again = async |error| view(scope, desk, &PageQuery::default(), error).await;
    super::after(&place(scope), outcome, again).await
}

/// Form: the member and the role.
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
        Ok(made) => {
            let around = (tenant_frame(&desk.keys, &scope, "Members"), place(&scope));
            link_page((&req, &own), around, format!("Invitation for {}", form.0.name), INVITED, &made)
        }
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
    let outcome = desk.revoke_invitation(scope.by(), Some(scope.tenant.id), id).await;
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
        Ok(made) => {
            let around = (tenant_frame(&desk.keys, &scope, "Members"), place(&scope));
            link_page((&req, &own), around, format!("New password for {}", form.0.name), RESET, &made)
        }
        Err(error) => after(&scope, &desk, Err(error)).await,
    }
}
