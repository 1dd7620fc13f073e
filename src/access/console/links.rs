//! Pages of single-use links. Opening a page changes nothing; only the form uses the link up.

use actix_web::http::StatusCode;
use actix_web::{HttpRequest, HttpResponse, web};
use askama::Template;
use serde::Deserialize;

use super::{frame, inline, page_with, see_other, session_cookie, who};
use crate::access::extract::{Perhaps, Public, require_own_page};
use crate::access::links::{LinkContent, LinkKind, NewPerson};
use crate::access::sessions::{Client, DeskData};
use crate::error::Error;
use crate::http::html::Frame;
use crate::http::{OwnAddress, html};

#[derive(Template)]
#[template(path = "access/invitation.html")]
struct InvitationPage {
    frame: Frame,
    error: String,
    recipient: String,
    place: String,
    role: String,
    by: String,
    /// The signed-in user is the recipient.
    ready: bool,
    /// The recipient has an account and is not the signed-in user.
    has_account: bool,
    display_name: String,
}

fn view(seen: LinkContent, frame: Frame, person: &str) -> InvitationPage {
    InvitationPage {
        frame,
        error: String::new(),
        ready: person == seen.recipient,
        has_account: seen.has_account,
        place: seen.tenant.map_or_else(|| "the platform".to_owned(), |tenant| format!("the tenant {tenant}")),
        role: seen.role.unwrap_or_default(),
        by: who(&seen.by),
        recipient: seen.recipient,
        display_name: String::new(),
    }
}

/// GET /invitations/{code}
pub async fn invitation_page(
    scope: Perhaps,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    code: web::Path<String>,
) -> Result<HttpResponse, Error> {
    let seen = desk.look_at_link(&Client::of(&req, &own), &code).await?;
    if seen.kind != LinkKind::Invitation {
        return Err(Error::NotFound);
    }
    let (who, frame) = match &scope.actor {
        Some(actor) => (actor.name.clone(), frame(&desk.keys, actor)),
        None => (String::new(), Frame::default()),
    };
    html::page(&view(seen, frame, &who))
}

/// Form: name and password of a new user.
#[derive(Deserialize)]
pub struct JoinForm {
    #[serde(default)]
    name: String,
    #[serde(default)]
    display_name: String,
    #[serde(default)]
    password: String,
}

/// POST /invitations/{code}
pub async fn accept(
    scope: Perhaps,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    code: web::Path<String>,
    form: web::Form<JoinForm>,
) -> Result<HttpResponse, Error> {
    require_own_page(&req)?;
    let client = Client::of(&req, &own);
    let seen = desk.look_at_link(&client, &code).await?;
    // Another user's session must not accept an invitation for a new user.
    let as_whom = match &scope.actor {
        Some(actor) if actor.name == seen.recipient || seen.has_account => Ok(actor),
        _ => Err(NewPerson { display_name: &form.display_name, password: &form.password }),
    };
    match desk.accept(&client, &code, as_whom).await {
        Ok(session) => {
            let mut answer = see_other("/");
            if let Some(session) = session {
                let _ = answer.add_cookie(&session_cookie(&req, session.expose()));
            }
            Ok(answer)
        }
        Err(error) => {
            let who = scope.actor.as_ref().map(|actor| actor.name.clone()).unwrap_or_default();
            let page = InvitationPage {
                error: inline(error)?,
                display_name: form.display_name.clone(),
                ..view(seen, Frame::default(), &who)
            };
            page_with(StatusCode::UNPROCESSABLE_ENTITY, &page)
        }
    }
}

#[derive(Template)]
#[template(path = "access/reset.html")]
struct ResetPage {
    frame: Frame,
    error: String,
    recipient: String,
}

/// GET /reset/{code}
pub async fn reset_page(
    _: Public,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    code: web::Path<String>,
) -> Result<HttpResponse, Error> {
    let seen = desk.look_at_link(&Client::of(&req, &own), &code).await?;
    if seen.kind != LinkKind::Reset {
        return Err(Error::NotFound);
    }
    html::page(&ResetPage { frame: Frame::default(), error: String::new(), recipient: seen.recipient })
}

/// POST /reset/{code}
pub async fn reset(
    _: Public,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    code: web::Path<String>,
    form: web::Form<JoinForm>,
) -> Result<HttpResponse, Error> {
    require_own_page(&req)?;
    let client = Client::of(&req, &own);
    let seen = desk.look_at_link(&client, &code).await?;
    match desk.use_reset(&client, &code, &form.password).await {
        Ok(()) => Ok(see_other("/login")),
        Err(error) => {
            let page =
                ResetPage { frame: Frame::default(), error: inline(error)?, recipient: seen.recipient };
            page_with(StatusCode::UNPROCESSABLE_ENTITY, &page)
        }
    }
}

#[derive(Template)]
#[template(path = "access/first_admin.html")]
struct FirstAdminPage {
    frame: Frame,
    error: String,
    name: String,
    display_name: String,
}

/// GET /first-admin/{code}: shows the form only.
pub async fn first_admin_page(
    _: Public,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    code: web::Path<String>,
) -> Result<HttpResponse, Error> {
    if !desk.is_first_link_good(&Client::of(&req, &own), &code).await? {
        return Err(Error::NotFound);
    }
    html::page(&FirstAdminPage {
        frame: Frame::default(),
        error: String::new(),
        name: String::new(),
        display_name: String::new(),
    })
}

/// POST /first-admin/{code}: uses the link up, creates the account and signs in.
pub async fn first_admin(
    _: Public,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    code: web::Path<String>,
    form: web::Form<JoinForm>,
) -> Result<HttpResponse, Error> {
    require_own_page(&req)?;
    let client = Client::of(&req, &own);
    let display_name = if form.display_name.trim().is_empty() { &form.name } else { &form.display_name };
    let person = NewPerson { display_name, password: &form.password };
    match desk.become_first_admin(&client, &code, &form.name, &person).await {
        Ok(session) => {
            let mut answer = see_other("/");
            let _ = answer.add_cookie(&session_cookie(&req, session.expose()));
            Ok(answer)
        }
        Err(error) => page_with(
            StatusCode::UNPROCESSABLE_ENTITY,
            &FirstAdminPage {
                frame: Frame::default(),
                error: inline(error)?,
                name: form.name.clone(),
                display_name: form.display_name.clone(),
            },
        ),
    }
}
