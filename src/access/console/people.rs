//! Pages of the platform's accounts.

use actix_web::{HttpRequest, HttpResponse, web};
use askama::Template;
use serde::Deserialize;

use super::account::WhichForm;
use super::{INVITED, RESET, link_page, platform_frame, when};
use crate::access::accounts::{self, Change};
use crate::access::api::people::platform_role;
use crate::access::extract::{PlatformScope, Posted};
use crate::access::invitations::HOURS;
use crate::access::sessions::DeskData;
use crate::access::{Actor, ManagePeople, ReadPlatform, includes, store};
use crate::db::{self, Page, PageQuery, Within};
use crate::error::Error;
use crate::http::html::Frame;
use crate::http::{OwnAddress, html};

const PLACE: &str = "/people";

struct PersonView {
    name: String,
    display_name: String,
    role: String,
    /// Remark about how the user signs in. Empty if there is nothing to report.
    note: &'static str,
    factor: bool,
    seen: String,
    disabled: bool,
    own: bool,
}

struct AccountInvitationView {
    id: i64,
    name: String,
    role: String,
    until: String,
}

#[derive(Template)]
#[template(path = "access/people.html")]
struct PeoplePage {
    frame: Frame,
    error: String,
    manages: bool,
    people: Vec<PersonView>,
    next: String,
    invitations: Vec<AccountInvitationView>,
}

async fn view(actor: &Actor, desk: &DeskData, query: &PageQuery, error: String) -> Result<PeoplePage, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&desk.pool, Within::Platform).await?;
    let rows = store::list_accounts(&mut conn, &query.after_text()?, None, limit + 1).await?;
    let page = Page::new(rows, limit, |row| row.name.clone());
    let invitations = store::list_invitations(&mut conn, None, 0, 200).await?;
    Ok(PeoplePage {
        frame: platform_frame(&desk.keys, actor, "People"),
        error,
        manages: includes::<ManagePeople>(actor.platform, None),
        people: page
            .items
            .into_iter()
            .map(|row| PersonView {
                own: row.name == actor.name,
                seen: row.last_seen_at.map(when).unwrap_or_default(),
                role: row.platform_role.unwrap_or_else(|| "none".into()),
                note: match (row.password, row.second_factor) {
                    (false, _) => "through a provider",
                    (true, false) => "no second factor",
                    (true, true) => "",
                },
                factor: row.second_factor,
                disabled: row.disabled_at.is_some(),
                name: row.name,
                display_name: row.display_name,
            })
            .collect(),
        next: page.next.unwrap_or_default(),
        invitations: invitations
            .into_iter()
            .map(|row| AccountInvitationView {
                id: row.id,
                name: row.name,
                role: row.role.unwrap_or_else(|| "none".into()),
                until: when(row.expires_at),
            })
            .collect(),
    })
}

/// GET /people
pub async fn people_page(
    scope: PlatformScope<ReadPlatform>,
    desk: DeskData,
    query: web::Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    html::page(&view(&scope.actor, &desk, &query, String::new()).await?)
}

async fn after(actor: &Actor, desk: &DeskData, outcome: Result<(), Error>) -> Result<HttpResponse, Error> {
    let again = async |error| view(actor, desk, &PageQuery::default(), error).await;
    super::after(PLACE, outcome, again).await
}

/// Form: the account and the change.
#[derive(Deserialize)]
pub struct PersonForm {
    name: String,
    #[serde(default)]
    role: String,
    #[serde(default)]
    what: String,
}

impl PersonForm {
    fn name(&self) -> Result<crate::ids::AccountName, Error> {
        self.name.parse().map_err(|_| Error::NotFound)
    }
}

/// POST /people/change: sets the role, or the state if `what` is `disable` or `enable`.
pub async fn change_person(
    scope: PlatformScope<ManagePeople>,
    desk: DeskData,
    form: Posted<PersonForm>,
) -> Result<HttpResponse, Error> {
    let name = form.0.name()?;
    let change = match form.0.what.as_str() {
        "disable" => Change { disabled: Some(true), ..Change::default() },
        "enable" => Change { disabled: Some(false), ..Change::default() },
        _ => Change { platform_role: Some(platform_role(Some(&form.0.role))?), ..Change::default() },
    };
    let outcome = desk.change_account(scope.by(), &name, &change).await;
    after(&scope.actor, &desk, outcome).await
}

/// POST /people/second-factor/removal
pub async fn remove_second_factor(
    scope: PlatformScope<ManagePeople>,
    desk: DeskData,
    form: Posted<PersonForm>,
) -> Result<HttpResponse, Error> {
    let name = form.0.name()?;
    let outcome = desk.remove_second_factor_of(scope.by(), &name).await;
    after(&scope.actor, &desk, outcome).await
}

/// POST /people/reset
pub async fn reset_person(
    scope: PlatformScope<ManagePeople>,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    form: Posted<PersonForm>,
) -> Result<HttpResponse, Error> {
    let name = form.0.name()?;
    match desk.reset(scope.by(), &name).await {
        Ok(made) => {
            let around = (platform_frame(&desk.keys, &scope.actor, "People"), PLACE.to_owned());
            link_page((&req, &own), around, format!("New password for {name}"), RESET, &made)
        }
        Err(error) => after(&scope.actor, &desk, Err(error)).await,
    }
}

/// POST /people/invitation
pub async fn invite(
    scope: PlatformScope<ManagePeople>,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    form: Posted<PersonForm>,
) -> Result<HttpResponse, Error> {
    let make = async {
        let name = accounts::account_name("name", &form.0.name)?;
        let role = platform_role(Some(&form.0.role))?;
        desk.invite_to_platform(scope.by(), &name, role, HOURS.0).await
    };
    match make.await {
        Ok(made) => {
            let around = (platform_frame(&desk.keys, &scope.actor, "People"), PLACE.to_owned());
            link_page((&req, &own), around, format!("Invitation for {}", form.0.name), INVITED, &made)
        }
        Err(error) => after(&scope.actor, &desk, Err(error)).await,
    }
}

/// POST /people/invitation/revocation
pub async fn revoke_invitation(
    scope: PlatformScope<ManagePeople>,
    desk: DeskData,
    form: Posted<WhichForm>,
) -> Result<HttpResponse, Error> {
    let id = form.0.number()?;
    let outcome = desk.revoke_invitation(scope.by(), None, id).await;
    after(&scope.actor, &desk, outcome).await
}
