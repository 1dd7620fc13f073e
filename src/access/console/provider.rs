//! Routes of the redirect to an OpenID provider and of the callback.

use actix_web::http::StatusCode;
use actix_web::{HttpRequest, HttpResponse, web};
use askama::Template;
use serde::Deserialize;

use super::{cookie, gone, is_secure, page_with, see_other, session_cookie};
use crate::access::extract::{Perhaps, Public, SignedIn};
use crate::access::oidc::{Back, Came, Goal, OidcError};
use crate::access::sessions::{Client, DeskData};
use crate::error::Error;
use crate::http::OwnAddress;
use crate::http::html::Frame;

/// Path parameter: the provider.
#[derive(Deserialize)]
pub struct ProviderPath {
    provider: String,
}

fn way_name(req: &HttpRequest) -> &'static str {
    if is_secure(req) { "__Host-bulkhead-way" } else { "bulkhead-way-loopback" }
}

#[derive(Template)]
#[template(path = "access/refused.html")]
struct RefusedPage {
    frame: Frame,
    label: String,
    reason: String,
}

fn refused(label: &str, reason: String) -> Result<HttpResponse, Error> {
    page_with(
        StatusCode::UNAUTHORIZED,
        &RefusedPage { frame: Frame::default(), label: label.to_owned(), reason },
    )
}

fn callback(req: &HttpRequest, own: &OwnAddress, provider: &str) -> Result<String, Error> {
    let address = own
        .of(req)
        .ok_or_else(|| Error::Malformed("the host of this request is not an address of Bulkhead".into()))?;
    Ok(format!("{address}/login/providers/{provider}/callback"))
}

async fn go(
    req: &HttpRequest,
    own: &OwnAddress,
    desk: &DeskData,
    name: &str,
    goal: Goal,
) -> Result<HttpResponse, Error> {
    let provider = desk.providers.get(name)?;
    desk.throttle.knock("provider", own.client(req)).await?;
    match provider.way_there(&desk.keys, &callback(req, own, name)?, goal).await {
        Ok((address, way)) => {
            let mut answer = see_other(&address);
            let _ = answer.add_cookie(&cookie(req, way_name(req), &way));
            Ok(answer)
        }
        Err(OidcError(reason)) => {
            tracing::warn!(provider = name, reason, "a provider cannot be reached");
            refused(
                &provider.settings.label,
                "The provider cannot be reached, or its settings are wrong. Other sign-in methods still work."
                    .into(),
            )
        }
    }
}

/// GET /login/providers/{provider}: redirects the browser to the provider. The server stores nothing: the
/// callback must match the cookie that this response sets.
pub async fn begin(
    _: Public,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    path: web::Path<ProviderPath>,
) -> Result<HttpResponse, Error> {
    go(&req, &own, &desk, &path.provider, Goal::SignIn).await
}

/// Returns the session of a request that comes from one of Bulkhead's own pages. A page of another site could
/// send the browser here while it is signed in at the provider as a different user.
fn session_of(scope: &SignedIn, req: &HttpRequest) -> Result<i64, Error> {
    let (_, session) = scope.actor.require_session()?;
    let site = req.headers().get("sec-fetch-site").and_then(|value| value.to_str().ok());
    if site == Some("same-origin") {
        Ok(session)
    } else {
        Err(Error::Forbidden("start this from your account page".into()))
    }
}

/// GET /confirm/{provider}: the provider authenticates the user again.
pub async fn begin_confirmation(
    scope: SignedIn,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    path: web::Path<ProviderPath>,
) -> Result<HttpResponse, Error> {
    let session = session_of(&scope, &req)?;
    go(&req, &own, &desk, &path.provider, Goal::Confirm(session)).await
}

/// GET /account/providers/{provider}: links the provider as a way to sign in.
pub async fn begin_link(
    scope: SignedIn,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    path: web::Path<ProviderPath>,
) -> Result<HttpResponse, Error> {
    let session = session_of(&scope, &req)?;
    if scope.actor.require_recent().is_err() {
        return Ok(see_other("/confirm?next=/account"));
    }
    go(&req, &own, &desk, &path.provider, Goal::Link(session)).await
}

/// GET /login/providers/{provider}/callback
pub async fn come_back(
    scope: Perhaps,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    path: web::Path<ProviderPath>,
    back: web::Query<Back>,
) -> Result<HttpResponse, Error> {
    let provider = desk.providers.get(&path.provider)?;
    let callback = callback(&req, &own, &path.provider)?;
    let way = req.cookie(way_name(&req)).map(|cookie| cookie.value().to_owned()).unwrap_or_default();
    let client = Client::of(&req, &own);
    let came = desk.come_back(&client, provider, (&callback, &way), &back, scope.actor.as_ref()).await?;
    let mut answer = match came {
        Came::In(session, to) => {
            let mut answer = see_other(to);
            let _ = answer.add_cookie(&session_cookie(&req, session.expose()));
            answer
        }
        Came::Refused(reason) => refused(&provider.settings.label, reason)?,
    };
    let _ = answer.add_cookie(&gone(cookie(&req, way_name(&req), "")));
    Ok(answer)
}
