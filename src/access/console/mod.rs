//! Console pages of access: sign-in, the user's own account, a tenant's members and tokens, the platform's
//! accounts. Every action is a plain form and works without script.

use actix_web::cookie::{Cookie, SameSite};
use actix_web::http::{StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};
use askama::Template;
use time::OffsetDateTime;

use super::extract::{TenantScope, cookie_name, form_token, known_name};
use super::links::CreatedLink;
use super::{Actor, Means, ReadActivity, includes};
use crate::error::Error;
use crate::http::html::{Frame, NavLink};
use crate::http::{OwnAddress, html};
use crate::keys::Keys;

pub mod account;
pub mod credentials;
pub mod links;
pub mod login;
pub mod members;
pub mod people;
pub mod permissions;
pub mod provider;

fn is_secure(req: &HttpRequest) -> bool {
    req.app_data::<web::Data<OwnAddress>>().is_some_and(|own| own.is_secure(req))
}

fn cookie(req: &HttpRequest, name: &'static str, value: &str) -> Cookie<'static> {
    Cookie::build(name, value.to_owned())
        .path("/")
        .http_only(true)
        .same_site(SameSite::Lax)
        .secure(is_secure(req))
        .finish()
}

/// Builds the session cookie.
#[must_use]
pub fn session_cookie(req: &HttpRequest, value: &str) -> Cookie<'static> {
    cookie(req, cookie_name(req), value)
}

/// Builds the cookie that recognises a browser for 400 days. It grants no access. It exempts the user from
/// delays that the guesses of others cause.
fn known_cookie(req: &HttpRequest, value: &str) -> Cookie<'static> {
    let mut known = cookie(req, known_name(req), value);
    known.set_max_age(actix_web::cookie::time::Duration::days(400));
    known
}

/// Returns the name of the cookie of a sign-in that waits for its second step.
fn step_name(req: &HttpRequest) -> &'static str {
    if is_secure(req) { "__Host-bulkhead-step" } else { "bulkhead-step-loopback" }
}

fn step_cookie(req: &HttpRequest, value: &str) -> Cookie<'static> {
    cookie(req, step_name(req), value)
}

fn gone(mut cookie: Cookie<'static>) -> Cookie<'static> {
    cookie.make_removal();
    cookie
}

/// Redirects the browser with 303 See Other.
pub(super) fn see_other(to: &str) -> HttpResponse {
    HttpResponse::SeeOther().insert_header((header::LOCATION, to)).finish()
}

/// Returns the redirect target after sign-in or confirmation: `text` if it is a path of Bulkhead, else `/`.
#[must_use]
pub fn own_path(text: &str) -> &str {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/-_.".contains(&b);
    let good = text.len() <= 200
        && text.starts_with('/')
        && !text.starts_with("//")
        && text.bytes().all(plain)
        && !text.contains("..");
    if good { text } else { "/" }
}

/// Renders a page with a status other than 200.
fn page_with(status: StatusCode, template: &impl Template) -> Result<HttpResponse, Error> {
    let mut response = html::page(template)?;
    *response.status_mut() = status;
    Ok(response)
}

/// Answers a form: redirects to the page, or to the confirmation, or renders the page again with the error.
pub async fn after<T: Template>(
    place: &str,
    outcome: Result<(), Error>,
    again: impl AsyncFnOnce(String) -> Result<T, Error>,
) -> Result<HttpResponse, Error> {
    match outcome {
        Ok(()) => Ok(see_other(place)),
        Err(Error::Unconfirmed) => Ok(see_other(&format!("/confirm?next={place}"))),
        Err(error) => page_with(StatusCode::UNPROCESSABLE_ENTITY, &again(inline(error)?).await?),
    }
}

/// Returns the error's message if a form can show it, else the error itself.
fn inline(error: Error) -> Result<String, Error> {
    match error {
        Error::Invalid(faults) => {
            Ok(faults.iter().map(|f| f.message.as_str()).collect::<Vec<_>>().join("; "))
        }
        Error::AlreadyExists(text) | Error::Conflict(text) => Ok(text),
        Error::Throttled(_) => Ok(error.to_string()),
        other => Err(other),
    }
}

/// Formats a time for display.
#[must_use]
pub fn when(at: OffsetDateTime) -> String {
    let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute] UTC");
    at.format(format).unwrap_or_default()
}

/// Formats an actor of the audit log for display, without its numeric id.
#[must_use]
pub fn who(actor: &str) -> String {
    match actor.split_once(':') {
        Some(("account", rest)) => rest.split_once(' ').map_or(rest, |(_, name)| name).to_owned(),
        Some(("service", rest)) => format!("service account {rest}"),
        _ => actor.to_owned(),
    }
}

/// Shortens a user agent to browser and system.
#[must_use]
pub fn browser(agent: &str) -> String {
    let find = |known: &[(&str, &'static str)]| {
        known.iter().find(|(sign, _)| agent.contains(sign)).map(|(_, name)| *name)
    };
    let name = find(&[
        ("Edg/", "Edge"),
        ("Firefox/", "Firefox"),
        ("Chrome/", "Chrome"),
        ("Safari/", "Safari"),
        ("curl/", "curl"),
    ]);
    let system = find(&[
        ("Android", "Android"),
        ("iPhone", "iPhone"),
        ("Windows", "Windows"),
        ("Mac OS", "Mac"),
        ("Linux", "Linux"),
    ]);
    match (name, system) {
        (Some(name), Some(system)) => format!("{name} on {system}"),
        (Some(one), None) | (None, Some(one)) => one.to_owned(),
        (None, None) => "a program".to_owned(),
    }
}

/// Builds the page frame of a signed-in user.
#[must_use]
pub fn frame(keys: &Keys, actor: &Actor) -> Frame {
    let form = match &actor.means {
        Means::Session { hash, .. } => form_token(keys, hash),
        Means::Token { .. } => String::new(),
    };
    Frame { who: actor.name.clone(), form, rail: Vec::new(), rail_name: String::new() }
}

fn link(label: &'static str, href: String, here: &str) -> NavLink {
    NavLink { label, here: label == here, href }
}

/// Builds the page frame within a tenant. `here` is the label of the current section.
#[must_use]
pub fn tenant_frame<P>(keys: &Keys, scope: &TenantScope<P>, here: &str) -> Frame {
    let mut frame = frame(keys, &scope.actor);
    let at = |rest: &str| format!("/tenants/{}{rest}", scope.tenant.name);
    frame.rail = vec![
        link("Apps", at(""), here),
        link("Network", at("/network"), here),
        link("Members", at("/members"), here),
    ];
    if scope.may::<ReadActivity>() {
        frame.rail.push(link("Tokens", at("/tokens"), here));
        frame.rail.push(link("Activity", at("/activity"), here));
    }
    frame.rail_name = scope.tenant.name.to_string();
    frame
}

/// Builds the page frame on the platform.
#[must_use]
pub fn platform_frame(keys: &Keys, actor: &Actor, here: &str) -> Frame {
    let mut frame = frame(keys, actor);
    if includes::<super::ReadPlatform>(actor.platform, None) {
        frame.rail = vec![
            link("Tenants", "/tenants".into(), here),
            link("Network", "/network".into(), here),
            link("People", "/people".into(), here),
            link("Audit", "/audit".into(), here),
        ];
        frame.rail_name = "Platform".into();
    }
    frame
}

/// Page with a value that is shown once.
#[derive(Template)]
#[template(path = "access/secret.html")]
struct SecretPage {
    frame: Frame,
    title: String,
    text: &'static str,
    lines: Vec<String>,
    back: String,
}

/// Shows a link, once, for the user to send to its recipient.
fn link_page(
    (req, own): (&HttpRequest, &OwnAddress),
    (frame, back): (Frame, String),
    title: String,
    text: &'static str,
    made: &CreatedLink,
) -> Result<HttpResponse, Error> {
    let link = format!("{}{}", own.of(req).unwrap_or_default(), made.path);
    html::page(&SecretPage { frame, title, text, lines: vec![link], back })
}

const INVITED: &str = "Send this link to the recipient. It works once, within three days, for that name only. It is not shown again.";
const RESET: &str = "Send this link to the recipient. It works once, within four hours, and ends that user's sessions and tokens.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_read_names() {
        assert_eq!(who("account:12 olga"), "olga");
        assert_eq!(who("service:ci"), "service account ci");
        assert_eq!(who("platform"), "platform");
        assert_eq!(
            browser("Mozilla/5.0 (X11; Linux x86_64) Gecko/20100101 Firefox/130.0"),
            "Firefox on Linux"
        );
        assert_eq!(browser("curl/8.5"), "curl");
        assert_eq!(browser(""), "a program");
    }

    #[test]
    fn nobody_is_sent_elsewhere() {
        for good in ["/", "/account", "/tenants/acme/members"] {
            assert_eq!(own_path(good), good);
        }
        for bad in [
            "",
            "//evil.example",
            "/\\evil.example",
            "https://evil.example",
            "javascript:alert(1)",
            "/../x",
            "/a?next=//x",
            "\n/x",
            "/%2f%2fevil.example",
            " /x",
            "/x\r\nSet-Cookie: a=b",
        ] {
            assert_eq!(own_path(bad), "/", "{bad:?}");
        }
    }
}
