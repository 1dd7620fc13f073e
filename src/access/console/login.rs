//! Sign-in, second step, sign-out, and confirmation of a session.

use actix_web::http::StatusCode;
use actix_web::{HttpRequest, HttpResponse, web};
use askama::Template;
use serde::Deserialize;
use sqlx::PgPool;

use super::{
    frame, gone, inline, known_cookie, own_path, page_with, see_other, session_cookie, step_cookie, step_name,
};
use crate::access::extract::{Perhaps, Posted, Public, SignedIn, require_own_page};
use crate::access::sessions::{Client, DeskData, SignIn, typed_name};
use crate::access::{accounts, store};
use crate::error::Error;
use crate::http::html::Frame;
use crate::http::{OwnAddress, html};

#[derive(Template)]
#[template(path = "access/login.html")]
struct LoginPage {
    frame: Frame,
    error: String,
    plain: bool,
    providers: Vec<(String, String)>,
}

impl LoginPage {
    fn new(req: &HttpRequest, own: &OwnAddress, desk: &DeskData) -> Self {
        Self {
            frame: Frame::default(),
            error: String::new(),
            plain: !own.is_secure(req),
            providers: desk.providers.buttons(),
        }
    }
}

/// GET /login
pub async fn login_page(
    scope: Perhaps,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
) -> Result<HttpResponse, Error> {
    if scope.actor.is_some() {
        return Ok(see_other("/"));
    }
    html::page(&LoginPage::new(&req, &own, &desk))
}

/// The form of the sign-in page.
#[derive(Deserialize)]
pub struct LoginForm {
    name: String,
    password: String,
}

/// POST /login
pub async fn login(
    _: Public,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    form: web::Form<LoginForm>,
) -> Result<HttpResponse, Error> {
    require_own_page(&req)?;
    let client = Client::of(&req, &own);
    let known = desk.throttle.browser(&typed_name(&form.name));
    let outcome = desk.sign_in(&client, &form.name, &form.password).await;
    let (status, error) = match outcome {
        Ok(Some(SignIn::Done(session))) => {
            let mut answer = see_other("/");
            let _ = answer.add_cookie(&session_cookie(&req, session.expose()));
            let _ = answer.add_cookie(&known_cookie(&req, &known));
            return Ok(answer);
        }
        Ok(Some(SignIn::SecondFactor(step))) => {
            let mut answer = see_other("/login/second-factor");
            let _ = answer.add_cookie(&step_cookie(&req, step.expose()));
            let _ = answer.add_cookie(&known_cookie(&req, &known));
            return Ok(answer);
        }
        Ok(None) => (StatusCode::UNAUTHORIZED, "The name or the password is wrong.".to_owned()),
        Err(error @ Error::Throttled(_)) => {
            let mut answer = page_with(
                StatusCode::TOO_MANY_REQUESTS,
                &LoginPage { error: error.to_string(), ..LoginPage::new(&req, &own, &desk) },
            )?;
            retry_after(&mut answer, &error);
            return Ok(answer);
        }
        Err(other) => return Err(other),
    };
    // The name is not shown again: it may be a password that was typed into the wrong field.
    page_with(status, &LoginPage { error, ..LoginPage::new(&req, &own, &desk) })
}

fn retry_after(answer: &mut HttpResponse, error: &Error) {
    if let Error::Throttled(after) = error
        && let Ok(value) = after.as_secs().to_string().parse()
    {
        answer.headers_mut().insert(actix_web::http::header::RETRY_AFTER, value);
    }
}

#[derive(Template)]
#[template(path = "access/second_factor.html")]
struct SecondFactorPage {
    frame: Frame,
    error: String,
}

/// GET /login/second-factor
pub async fn second_factor_page(_: Public, req: HttpRequest, desk: DeskData) -> Result<HttpResponse, Error> {
    let step = req.cookie(step_name(&req));
    let Some(step) = step else { return Ok(see_other("/login")) };
    if !desk.awaits(step.value()).await? {
        return Ok(see_other("/login"));
    }
    html::page(&SecondFactorPage { frame: Frame::default(), error: String::new() })
}

/// A code.
#[derive(Deserialize)]
pub struct CodeForm {
    pub(super) code: String,
}

/// POST /login/second-factor
pub async fn second_factor(
    _: Public,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    form: web::Form<CodeForm>,
) -> Result<HttpResponse, Error> {
    require_own_page(&req)?;
    let Some(step) = req.cookie(step_name(&req)) else { return Ok(see_other("/login")) };
    let client = Client::of(&req, &own);
    let error = match desk.second_step(&client, step.value(), &form.code).await {
        Ok(Some(session)) => {
            let mut answer = see_other("/");
            let _ = answer.add_cookie(&session_cookie(&req, session.expose()));
            let _ = answer.add_cookie(&gone(step_cookie(&req, "")));
            return Ok(answer);
        }
        Ok(None) if !desk.awaits(step.value()).await? => return Ok(see_other("/login")),
        Ok(None) => "The code is not valid now, or it was already used.".to_owned(),
        Err(error) => inline(error)?,
    };
    page_with(StatusCode::UNAUTHORIZED, &SecondFactorPage { frame: Frame::default(), error })
}

#[derive(Template)]
#[template(path = "access/signed_out.html")]
struct OutPage {
    frame: Frame,
    address: String,
}

/// A form without fields.
#[derive(Deserialize)]
pub struct Nothing {}

/// POST /logout
pub async fn logout(
    scope: SignedIn,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    _: Posted<Nothing>,
) -> Result<HttpResponse, Error> {
    let provider = desk.sign_out(&Client::of(&req, &own), &scope.actor).await?;
    // A user who signed in through a provider is signed out there too, if the provider supports it.
    let there = match provider.as_deref().and_then(|name| desk.providers.get(name).ok()) {
        Some(provider) => provider.way_out(&format!("{}/login", own.of(&req).unwrap_or_default())),
        None => None,
    };
    let mut answer = match there {
        Some(address) => html::page(&OutPage { frame: Frame::default(), address })?,
        None => see_other("/login"),
    };
    let _ = answer.add_cookie(&gone(session_cookie(&req, "")));
    Ok(answer)
}

#[derive(Template)]
#[template(path = "access/confirm.html")]
struct ConfirmPage {
    frame: Frame,
    error: String,
    next: String,
    password: bool,
    code: bool,
    providers: Vec<(String, String)>,
}

/// Query: the page to return to.
#[derive(Deserialize)]
pub struct NextQuery {
    #[serde(default)]
    next: String,
}

async fn confirm_view(
    scope: &SignedIn,
    desk: &DeskData,
    next: &str,
    error: String,
) -> Result<ConfirmPage, Error> {
    let account = accounts::own(&scope.actor)?;
    let mut conn = desk.pool.acquire().await?;
    let found = store::find_for_sign_in(&mut conn, &scope.actor.name).await?.ok_or(Error::NotFound)?;
    let issuers = store::list_issuers(&mut conn, account).await?;
    let through = issuers.iter().filter_map(|issuer| desk.providers.of_issuer(issuer));
    Ok(ConfirmPage {
        providers: through.map(|p| (p.settings.name.clone(), p.settings.label.clone())).collect(),
        frame: frame(&desk.keys, &scope.actor),
        error,
        next: own_path(next).to_owned(),
        password: found.password.is_some(),
        code: found.second_factor,
    })
}

/// GET /confirm
pub async fn confirm_page(
    scope: SignedIn,
    desk: DeskData,
    query: web::Query<NextQuery>,
) -> Result<HttpResponse, Error> {
    html::page(&confirm_view(&scope, &desk, &query.next, String::new()).await?)
}

/// Form: password, code, and the page to return to.
#[derive(Deserialize)]
pub struct ConfirmForm {
    password: String,
    #[serde(default)]
    code: String,
    #[serde(default)]
    next: String,
}

/// POST /confirm
pub async fn confirm(
    scope: SignedIn,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    form: Posted<ConfirmForm>,
) -> Result<HttpResponse, Error> {
    let client = Client::of(&req, &own);
    let error = match desk.confirm(&client, &scope.actor, &form.0.password, &form.0.code).await {
        Ok(Some(fresh)) => {
            let mut answer = see_other(own_path(&form.0.next));
            let _ = answer.add_cookie(&session_cookie(&req, fresh.expose()));
            return Ok(answer);
        }
        Ok(None) => "The password or the code is wrong.".to_owned(),
        Err(error) => inline(error)?,
    };
    page_with(StatusCode::UNAUTHORIZED, &confirm_view(&scope, &desk, &form.0.next, error).await?)
}

#[derive(Template)]
#[template(path = "access/choose.html")]
struct ChoosePage {
    frame: Frame,
    tenants: Vec<store::BelongsTo>,
}

/// GET /: the start page. Users with a platform role see all tenants, tenant members their own.
pub async fn home(scope: Perhaps, desk: DeskData, pool: web::Data<PgPool>) -> Result<HttpResponse, Error> {
    let Some(actor) = scope.actor else { return Ok(see_other("/login")) };
    if actor.platform.is_some() {
        return Ok(see_other("/tenants"));
    }
    let mut conn = pool.acquire().await?;
    let tenants = match actor.account {
        Some(account) => store::tenants_of(&mut conn, account).await?,
        None => Vec::new(),
    };
    if let [one] = tenants.as_slice() {
        return Ok(see_other(&format!("/tenants/{}", one.tenant)));
    }
    html::page(&ChoosePage { frame: frame(&desk.keys, &actor), tenants })
}
