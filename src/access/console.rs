//! Sign-in pages: with an API token, or with the first admin's one-time link. The next step of the
//! platform adds people and their second factors; the session stays the same.

use actix_web::cookie::{Cookie, SameSite};
use actix_web::{HttpRequest, HttpResponse, web};
use askama::Template;
use serde::Deserialize;
use sqlx::PgPool;

use super::credentials::{self, Secret};
use super::extract::{Public, SignedIn, cookie_name};
use super::{Authority, PlatformRole, store};
use crate::audit;
use crate::error::Error;
use crate::http::{OwnAddress, html};
use crate::ids::ActorId;

#[derive(Template)]
#[template(path = "access/login.html")]
struct LoginPage {
    failed: bool,
    plain: bool,
}

/// GET /login
pub async fn login_page(_: Public, req: HttpRequest) -> Result<HttpResponse, Error> {
    html::page(&LoginPage { failed: false, plain: req.connection_info().scheme() != "https" })
}

/// The form of the sign-in page.
#[derive(Deserialize)]
pub struct LoginForm {
    token: String,
}

fn require_own_page(req: &HttpRequest, own: &OwnAddress) -> Result<(), Error> {
    if own.same_origin(req) {
        Ok(())
    } else {
        Err(Error::Forbidden("this form was not sent from Bulkhead's own page".into()))
    }
}

fn cookie(req: &HttpRequest, value: &str) -> Cookie<'static> {
    Cookie::build(cookie_name(req), value.to_owned())
        .path("/")
        .http_only(true)
        .same_site(SameSite::Lax)
        .secure(req.connection_info().scheme() == "https")
        .finish()
}

/// POST /login
pub async fn login(
    scope: Public,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    pool: web::Data<PgPool>,
    form: web::Form<LoginForm>,
) -> Result<HttpResponse, Error> {
    require_own_page(&req, &own)?;
    let mut tx = pool.begin().await?;
    let Some(actor) = store::find_token(&mut tx, &credentials::hash(form.token.trim())).await? else {
        let page = LoginPage { failed: true, plain: req.connection_info().scheme() != "https" };
        let text = page.render().map_err(Error::internal)?;
        return Ok(HttpResponse::Unauthorized().content_type("text/html; charset=utf-8").body(text));
    };
    let session = Secret::generate("");
    store::insert_session(&mut tx, &session.hash(), actor.token_id).await?;
    let event = audit::Event {
        tenant: None,
        actor: &actor.id,
        action: "session.begin",
        object: &actor.name,
        request_id: &scope.request_id.0,
        detail: serde_json::json!({}),
    };
    audit::record(&mut tx, event).await?;
    tx.commit().await?;
    Ok(HttpResponse::SeeOther()
        .insert_header(("location", "/"))
        .cookie(cookie(&req, session.expose()))
        .finish())
}

/// POST /logout
pub async fn logout(
    scope: SignedIn,
    req: HttpRequest,
    pool: web::Data<PgPool>,
) -> Result<HttpResponse, Error> {
    let mut tx = pool.begin().await?;
    if let Some(session) = req.cookie(cookie_name(&req)) {
        store::delete_session(&mut tx, &credentials::hash(session.value())).await?;
    }
    let event = audit::Event {
        tenant: None,
        actor: &scope.actor.id,
        action: "session.end",
        object: &scope.actor.name,
        request_id: &scope.request_id.0,
        detail: serde_json::json!({}),
    };
    audit::record(&mut tx, event).await?;
    tx.commit().await?;
    let mut gone = cookie(&req, "");
    gone.make_removal();
    Ok(HttpResponse::SeeOther().insert_header(("location", "/login")).cookie(gone).finish())
}

#[derive(Template)]
#[template(path = "access/first_admin.html")]
struct FirstAdminPage {
    token: String,
}

/// GET /first-admin/{code}: asks; nothing happens yet.
pub async fn first_admin_page(
    _: Public,
    pool: web::Data<PgPool>,
    code: web::Path<String>,
) -> Result<HttpResponse, Error> {
    let mut conn = pool.acquire().await?;
    if !store::is_link_good(&mut conn, &credentials::hash(&code)).await? {
        return Err(Error::NotFound);
    }
    html::page(&FirstAdminPage { token: String::new() })
}

/// POST /first-admin/{code}: uses the link up, makes the first admin's token, shows it once and
/// signs in.
pub async fn first_admin(
    scope: Public,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    pool: web::Data<PgPool>,
    code: web::Path<String>,
) -> Result<HttpResponse, Error> {
    require_own_page(&req, &own)?;
    let mut tx = pool.begin().await?;
    if !store::use_link(&mut tx, &credentials::hash(&code)).await? {
        return Err(Error::NotFound);
    }
    let actor = ActorId::new("first-admin link");
    let authority = Authority::Platform(PlatformRole::Admin);
    let (id, token) =
        store::create_token(&mut tx, "first admin", authority, &actor, time::Duration::days(365)).await?;
    let session = Secret::generate("");
    store::insert_session(&mut tx, &session.hash(), id).await?;
    let event = audit::Event {
        tenant: None,
        actor: &actor,
        action: "token.create",
        object: "first admin",
        request_id: &scope.request_id.0,
        detail: serde_json::json!({"role": "admin", "token": id}),
    };
    audit::record(&mut tx, event).await?;
    tx.commit().await?;
    let page = FirstAdminPage { token: token.expose().to_owned() }.render().map_err(Error::internal)?;
    Ok(HttpResponse::Ok()
        .content_type("text/html; charset=utf-8")
        .cookie(cookie(&req, session.expose()))
        .body(page))
}
