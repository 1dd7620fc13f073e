//! The table of all addresses of the platform. The first argument of each handler must decide about authority
//! ([`Authorizes`]): otherwise this file does not compile.

use std::pin::Pin;

use actix_web::dev::Payload;
use actix_web::http::Method;
use actix_web::{FromRequest, Handler, HttpRequest, HttpResponse, Responder, web};
use askama::Template;

use crate::access::extract::{Authorizes, Needs};
use crate::access::idempotency::{KeyedOutcome, KeyedRequest, Repeatable};
use crate::access::{self, Public};
use crate::apps::sight::Sight;
use crate::error::Error;
use crate::fault::catalogue;
use crate::http::asked;
use crate::http::html::{self, Frame};
use crate::{activity, apps, db, docs, networks, registries, tenants, uid_ranges};

/// Arguments of a handler, of which the first decides about authority.
pub trait Authorized: Sized + 'static {
    /// The first argument.
    type First: Authorizes + FromRequest;
    /// The other arguments.
    type Rest: FromRequest;
    /// Joins the arguments.
    fn join(first: Self::First, rest: Self::Rest) -> Self;
}

macro_rules! authorized {
    ($($rest:ident)*) => {
        impl<First, $($rest),*> Authorized for (First, $($rest,)*)
        where
            First: Authorizes + FromRequest + 'static,
            $($rest: FromRequest + 'static,)*
        {
            type First = First;
            type Rest = ($($rest,)*);
            #[allow(non_snake_case, clippy::unused_unit, reason = "one macro for all lengths")]
            fn join(first: First, ($($rest,)*): ($($rest,)*)) -> Self {
                (first, $($rest,)*)
            }
        }
    };
}

authorized!();
authorized!(B);
authorized!(B C);
authorized!(B C D);
authorized!(B C D E);
authorized!(B C D E F);
authorized!(B C D E F G);

/// Arguments taken from a request in order. No body and no form is read before the first argument has
/// authorized the request. An API request is refused if it has a part that no argument takes.
enum Gated<Args> {
    /// The handler answers. With a key, the answer is stored.
    Open(Args, Option<Repeatable>),
    /// The same request has been answered before.
    Answered(HttpResponse),
}

impl<Args: Authorized> FromRequest for Gated<Args> {
    type Error = actix_web::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self, actix_web::Error>>>>;
    fn from_request(req: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let (req, mut payload) = (req.clone(), payload.take());
        Box::pin(async move {
            let first = Args::First::from_request(&req, &mut payload).await.map_err(Into::into)?;
            if !req.match_pattern().is_some_and(|path| path.starts_with("/api/")) {
                let rest = Args::Rest::from_request(&req, &mut payload).await.map_err(Into::into)?;
                return Ok(Self::Open(Args::join(first, rest), None));
            }
            asked::check_head(&req)?;
            let wish = if req.headers().contains_key(asked::IDEMPOTENCY_KEY) {
                let body = web::Bytes::from_request(&req, &mut payload).await?;
                let (_, mut whole) = actix_http::h1::Payload::create(true);
                whole.unread_data(body.clone());
                payload = Payload::from(whole);
                KeyedRequest::of(&req, &body)?
            } else {
                None
            };
            let rest = Args::Rest::from_request(&req, &mut payload).await.map_err(Into::into)?;
            asked::check_rest(&req, &mut payload).await?;
            let begun = match (wish, first.actor()) {
                (Some(wish), Some(actor)) if !asked::has_taken_key(&req) => {
                    Some(wish.begin(&req, actor).await?)
                }
                _ => None,
            };
            Ok(match begun {
                Some(KeyedOutcome::Answered(answer)) => Self::Answered(answer),
                Some(KeyedOutcome::First(repeatable)) => {
                    Self::Open(Args::join(first, rest), Some(repeatable))
                }
                None => Self::Open(Args::join(first, rest), None),
            })
        })
    }
}

fn on<F, Args>(method: Method, handler: F) -> actix_web::Route
where
    F: Handler<Args>,
    Args: Authorized,
    F::Output: Responder + 'static,
{
    web::method(method).to(move |req: HttpRequest, gated: Gated<Args>| {
        let handler = handler.clone();
        async move {
            match gated {
                Gated::Answered(answer) => answer,
                Gated::Open(args, None) => handler.call(args).await.respond_to(&req).map_into_boxed_body(),
                Gated::Open(args, Some(repeatable)) => {
                    let answer =
                        async move { handler.call(args).await.respond_to(&req).map_into_boxed_body() };
                    repeatable.run(answer).await
                }
            }
        }
    })
}

/// Returns all addresses and their methods, for documentation and tests. The server uses the same list.
#[must_use]
pub fn table() -> Vec<(Method, String)> {
    let mut rows = Vec::new();
    each(&mut |method, path, _, _| rows.push((method, path.to_owned())));
    rows
}

/// Returns every route with the role that it needs, for the reference.
#[must_use]
pub fn operations() -> Vec<(Method, String, Needs)> {
    let mut rows = Vec::new();
    each(&mut |method, path, needs, _| rows.push((method, path.to_owned(), needs)));
    rows
}

fn needs<F: Handler<Args>, Args: Authorized>(_: &F) -> Needs {
    Args::First::NEEDS
}

/// Registers all routes of the main listener.
pub fn configure(cfg: &mut web::ServiceConfig) {
    each(&mut |_, path, _, route| {
        cfg.route(path, route);
    });
    registry(cfg);
}

/// Registers the routes of the engine's listener: only pulls.
pub fn registry(cfg: &mut web::ServiceConfig) {
    cfg.route("/auth/token", on(Method::GET, registries::front::get_token))
        .service(web::resource("/v2/{rest:.*}").route(web::route().to(authorized_proxy)));
}

/// Accepts every method; the proxy itself decides which methods exist.
async fn authorized_proxy(
    public: Public,
    req: actix_web::HttpRequest,
    door: web::Data<registries::front::FrontDoor>,
    body: web::Payload,
) -> Result<HttpResponse, registries::front::OciError> {
    registries::proxy::handle(public, req, door, body).await
}

type Taker<'a> = dyn FnMut(Method, &str, Needs, actix_web::Route) + 'a;

fn each(take: &mut Taker<'_>) {
    platform(take);
    people(take);
    within_tenant(take);
    connections(take);
    signing_in(take);
    console(take);
}

macro_rules! routes {
    ($take:ident, $($method:ident $path:literal => $handler:expr;)*) => {
        $($take(Method::$method, $path, needs(&$handler), on(Method::$method, $handler));)*
    };
}

fn platform(take: &mut Taker<'_>) {
    use networks::api as n;
    use tenants::api as t;
    routes! { take,
        GET "/healthz" => healthz;
        GET "/readyz" => readyz;
        POST "/api/v1/tenants" => t::onboard;
        GET "/api/v1/tenants" => t::list_tenants;
        GET "/api/v1/tenants/{tenant}" => t::get_tenant;
        PATCH "/api/v1/tenants/{tenant}" => t::change_tenant;
        GET "/api/v1/tenants/{tenant}/quota" => t::get_quota;
        PUT "/api/v1/tenants/{tenant}/suspension" => t::begin_suspension;
        DELETE "/api/v1/tenants/{tenant}/suspension" => t::end_suspension;
        PUT "/api/v1/tenants/{tenant}/offboarding" => t::begin_offboarding;
        GET "/api/v1/tenants/{tenant}/offboarding" => t::get_offboarding;
        GET "/api/v1/uids/{uid}" => uid_ranges::api::get_uid;
        GET "/api/v1/uid-ranges" => uid_ranges::api::list_uid_ranges;
        GET "/api/v1/audit" => activity::api::list_platform;
        GET "/api/v1/audit/export" => activity::api::export_platform;
        GET "/api/v1/services" => n::services::list_services;
        GET "/api/v1/services/{name}" => n::services::get_service;
        PUT "/api/v1/services/{name}" => n::services::put_service;
        DELETE "/api/v1/services/{name}" => n::services::delete_service;
        GET "/api/v1/egress" => n::egress::list_waiting;
        GET "/api/v1/network/events" => n::plans::list_events;
        GET "/api/v1/network/plans" => n::plans::list_all;
        GET "/api/v1/network/plans/{id}" => n::plans::get_any;
        GET "/api/v1/network/rollouts" => n::rollouts::list_rollouts;
        GET "/api/v1/network/rollouts/{id}" => n::rollouts::get_rollout;
        PUT "/api/v1/network/rollouts/{id}/pause" => n::rollouts::pause;
        DELETE "/api/v1/network/rollouts/{id}/pause" => n::rollouts::resume;
        DELETE "/api/v1/network/rollouts/{id}/window" => n::rollouts::end_window;
        PUT "/api/v1/network/rollouts/{id}/abort" => n::rollouts::abort;
        GET "/api/v1/schemas/app-spec" => apps::api::app_spec_schema;
    }
}

fn people(take: &mut Taker<'_>) {
    use access::api::{me, people as p};
    routes! { take,
        GET "/api/v1/me" => me::get_me;
        GET "/api/v1/me/sessions" => me::list_sessions;
        DELETE "/api/v1/me/sessions" => me::end_other_sessions;
        DELETE "/api/v1/me/sessions/{id}" => me::end_session;
        PUT "/api/v1/me/password" => me::set_password;
        POST "/api/v1/me/confirmation" => me::confirm;
        POST "/api/v1/me/second-factor" => me::begin_second_factor;
        PUT "/api/v1/me/second-factor" => me::confirm_second_factor;
        DELETE "/api/v1/me/second-factor" => me::remove_second_factor;
        DELETE "/api/v1/me/providers/{provider}" => me::unlink;
        GET "/api/v1/me/tokens" => me::list_tokens;
        POST "/api/v1/me/tokens" => me::create_token;
        DELETE "/api/v1/me/tokens/{id}" => me::revoke_token;
        DELETE "/api/v1/me/tenants/{tenant}" => me::leave;
        GET "/api/v1/accounts" => p::list_accounts;
        GET "/api/v1/accounts/{account}" => p::get_account;
        PATCH "/api/v1/accounts/{account}" => p::change_account;
        POST "/api/v1/accounts/{account}/reset" => p::reset_account;
        DELETE "/api/v1/accounts/{account}/second-factor" => p::remove_second_factor;
        DELETE "/api/v1/accounts/{account}/providers" => p::unlink_account;
        GET "/api/v1/invitations" => p::list_invitations;
        POST "/api/v1/invitations" => p::invite;
        DELETE "/api/v1/invitations/{id}" => p::revoke_invitation;
        GET "/api/v1/tokens" => p::list_tokens;
        DELETE "/api/v1/tokens/{id}" => p::revoke_token;
    }
}

fn within_tenant(take: &mut Taker<'_>) {
    use access::api::{credentials as c, members as m};
    use registries::{api as r, robots};
    routes! { take,
        GET "/api/v1/tenants/{tenant}/members" => m::list_members;
        PUT "/api/v1/tenants/{tenant}/members/{member}" => m::change_member;
        DELETE "/api/v1/tenants/{tenant}/members/{member}" => m::remove_member;
        POST "/api/v1/tenants/{tenant}/members/{member}/reset" => m::reset_member;
        GET "/api/v1/tenants/{tenant}/invitations" => m::list_invitations;
        POST "/api/v1/tenants/{tenant}/invitations" => m::invite;
        DELETE "/api/v1/tenants/{tenant}/invitations/{id}" => m::revoke_invitation;
        GET "/api/v1/tenants/{tenant}/service-accounts" => c::list_services;
        POST "/api/v1/tenants/{tenant}/service-accounts" => c::create_service;
        DELETE "/api/v1/tenants/{tenant}/service-accounts/{service}" => c::delete_service;
        GET "/api/v1/tenants/{tenant}/tokens" => c::list_tokens;
        POST "/api/v1/tenants/{tenant}/tokens" => c::create_token;
        DELETE "/api/v1/tenants/{tenant}/tokens/{id}" => c::revoke_token;
        GET "/api/v1/tenants/{tenant}/audit" => activity::api::list_tenant;
        GET "/api/v1/tenants/{tenant}/audit/export" => activity::api::export_tenant;
        POST "/api/v1/tenants/{tenant}/robots" => robots::create_robot;
        GET "/api/v1/tenants/{tenant}/robots" => robots::list_robots;
        DELETE "/api/v1/tenants/{tenant}/robots/{robot}" => robots::delete_robot;
        GET "/api/v1/tenants/{tenant}/repositories" => r::list_repositories;
        GET "/api/v1/tenants/{tenant}/repositories/{repository:.+}/tags" => r::list_tags;
        DELETE "/api/v1/tenants/{tenant}/repositories/{repository:.+}/tags/{tag}" => r::delete_tag;
        GET "/api/v1/tenants/{tenant}/apps" => apps::api::list_apps;
        PUT "/api/v1/tenants/{tenant}/apps/{app}" => apps::api::put_app;
        GET "/api/v1/tenants/{tenant}/apps/{app}" => apps::api::get_app;
        DELETE "/api/v1/tenants/{tenant}/apps/{app}" => apps::api::delete_app;
        GET "/api/v1/tenants/{tenant}/apps/{app}/releases" => apps::api::list_releases;
        POST "/api/v1/tenants/{tenant}/apps/{app}/releases" => apps::api::roll_back;
        GET "/api/v1/tenants/{tenant}/apps/{app}/logs" => apps::logs::get_logs;
    }
}

fn connections(take: &mut Taker<'_>) {
    use networks::api as n;
    routes! { take,
        GET "/api/v1/tenants/{tenant}/services" => n::services::list_given;
        PUT "/api/v1/tenants/{tenant}/services/{name}" => n::services::give;
        DELETE "/api/v1/tenants/{tenant}/services/{name}" => n::services::take;
        GET "/api/v1/tenants/{tenant}/grants" => n::grants::list_given;
        POST "/api/v1/tenants/{tenant}/grants" => n::grants::offer;
        GET "/api/v1/tenants/{tenant}/grants/received" => n::grants::list_received;
        PUT "/api/v1/tenants/{tenant}/grants/{id}/acceptance" => n::grants::accept;
        DELETE "/api/v1/tenants/{tenant}/grants/{id}" => n::grants::end;
        GET "/api/v1/tenants/{tenant}/egress" => n::egress::list_targets;
        PUT "/api/v1/tenants/{tenant}/egress/{name}" => n::egress::ask;
        DELETE "/api/v1/tenants/{tenant}/egress/{name}" => n::egress::withdraw;
        PUT "/api/v1/tenants/{tenant}/egress/{name}/decision" => n::egress::decide;
        GET "/api/v1/tenants/{tenant}/network/trial" => n::trial::get;
        PUT "/api/v1/tenants/{tenant}/network/trial" => n::trial::begin;
        DELETE "/api/v1/tenants/{tenant}/network/trial" => n::trial::end;
        GET "/api/v1/tenants/{tenant}/network/plans" => n::plans::list_plans;
        GET "/api/v1/tenants/{tenant}/network/plans/{id}" => n::plans::get_plan;
        GET "/api/v1/tenants/{tenant}/apps/{app}/reach" => n::reach::get_reach;
        POST "/api/v1/tenants/{tenant}/apps/{app}/reach" => n::reach::post_reach;
        GET "/api/v1/tenants/{tenant}/apps/{app}/denied" => n::reach::get_denied;
    }
}

fn signing_in(take: &mut Taker<'_>) {
    use access::console::{account as a, links, login as l, provider as p};
    routes! { take,
        GET "/" => l::home;
        GET "/login" => l::login_page;
        POST "/login" => l::login;
        GET "/login/second-factor" => l::second_factor_page;
        POST "/login/second-factor" => l::second_factor;
        POST "/logout" => l::logout;
        GET "/login/providers/{provider}" => p::begin;
        GET "/login/providers/{provider}/callback" => p::come_back;
        GET "/confirm/{provider}" => p::begin_confirmation;
        GET "/account/providers/{provider}" => p::begin_link;
        GET "/confirm" => l::confirm_page;
        POST "/confirm" => l::confirm;
        GET "/first-admin/{code}" => links::first_admin_page;
        POST "/first-admin/{code}" => links::first_admin;
        GET "/invitations/{code}" => links::invitation_page;
        POST "/invitations/{code}" => links::accept;
        GET "/reset/{code}" => links::reset_page;
        POST "/reset/{code}" => links::reset;
        GET "/account" => a::account_page;
        POST "/account/password" => a::set_password;
        POST "/account/second-factor" => a::begin_second_factor;
        POST "/account/second-factor/confirmation" => a::confirm_second_factor;
        POST "/account/second-factor/removal" => a::remove_second_factor;
        POST "/account/providers/removal" => a::unlink;
        POST "/account/sessions/end" => a::end_session;
        POST "/account/tokens" => a::create_token;
        POST "/account/tokens/revocation" => a::revoke_token;
    }
}

fn console(take: &mut Taker<'_>) {
    use access::console::{credentials as c, members as m, people as p, permissions};
    use networks::console as n;
    routes! { take,
        GET "/people" => p::people_page;
        POST "/people/change" => p::change_person;
        POST "/people/reset" => p::reset_person;
        POST "/people/second-factor/removal" => p::remove_second_factor;
        POST "/people/invitation" => p::invite;
        POST "/people/invitation/revocation" => p::revoke_invitation;
        GET "/audit" => activity::console::platform_page;
        GET "/tenants" => tenants::console::list_page;
        GET "/tenants/{tenant}" => apps::console::tenant_page;
        GET "/tenants/{tenant}/members" => m::members_page;
        POST "/tenants/{tenant}/members/role" => m::change_member;
        POST "/tenants/{tenant}/members/removal" => m::remove_member;
        POST "/tenants/{tenant}/members/reset" => m::reset_member;
        POST "/tenants/{tenant}/members/invitation" => m::invite;
        POST "/tenants/{tenant}/members/invitation/revocation" => m::revoke_invitation;
        POST "/tenants/{tenant}/leave" => m::leave;
        GET "/tenants/{tenant}/tokens" => c::tokens_page;
        POST "/tenants/{tenant}/tokens" => c::create_token;
        POST "/tenants/{tenant}/tokens/revocation" => c::revoke_token;
        POST "/tenants/{tenant}/tokens/service-account" => c::create_service;
        POST "/tenants/{tenant}/tokens/service-account/removal" => c::delete_service;
        GET "/tenants/{tenant}/activity" => activity::console::tenant_page;
        GET "/tenants/{tenant}/apps/{app}" => apps::console::app_page;
        GET "/network" => n::platform::network_page;
        GET "/network/rollouts" => n::rollout::rollouts_page;
        GET "/network/rollouts/{id}" => n::rollout::rollout_page;
        POST "/network/rollouts/{id}/decision" => n::rollout::decide;
        GET "/network/services" => n::platform::services_page;
        POST "/network/services" => n::rollout::put_service;
        POST "/network/egress/decision" => n::platform::decide;
        GET "/tenants/{tenant}/network" => n::tenant::network_page;
        POST "/tenants/{tenant}/network/grants" => n::decide::offer;
        POST "/tenants/{tenant}/network/grants/acceptance" => n::decide::accept;
        POST "/tenants/{tenant}/network/grants/end" => n::decide::end;
        POST "/tenants/{tenant}/network/egress" => n::decide::ask;
        POST "/tenants/{tenant}/network/egress/withdrawal" => n::decide::withdraw;
        GET "/docs" => contents_page;
        GET "/docs/permissions" => permissions::permissions_page;
        GET "/docs/errors" => errors_page;
        GET "/docs/errors/{code}" => error_page;
        GET "/docs/{chapter:.+}" => chapter_page;
        GET "/static/{file}" => static_file;
    }
}

async fn healthz(_: Public) -> HttpResponse {
    HttpResponse::Ok().content_type("text/plain").body("alive\n")
}

/// Returns whether requests can be served, with the state of the other parts and the time since a part is
/// unreachable. Only a database failure gives 503: requests are served without an agent or an engine.
async fn readyz(
    _: Public,
    pool: web::Data<sqlx::PgPool>,
    registry: web::Data<registries::Distribution>,
    sight: web::Data<Sight>,
) -> HttpResponse {
    let database = db::ping(&pool).await.is_ok();
    let registry = registry.ping().await.is_ok();
    let parts = sight.parts();
    let degraded = !(registry && parts.agent && parts.engine);
    let mut body = serde_json::json!({"database": database, "registry": registry, "degraded": degraded});
    if let (Some(body), Ok(serde_json::Value::Object(parts))) =
        (body.as_object_mut(), serde_json::to_value(&parts))
    {
        body.extend(parts);
    }
    if database { HttpResponse::Ok().json(body) } else { HttpResponse::ServiceUnavailable().json(body) }
}

#[derive(Template)]
#[template(path = "docs/chapter.html")]
struct ChapterPage {
    frame: Frame,
    chapters: Vec<docs::ChapterGroup>,
    chapter: &'static docs::Chapter,
    next: Option<docs::Entry>,
}

fn book_page(href: &str) -> Result<HttpResponse, Error> {
    html::page(&ChapterPage {
        frame: Frame::default(),
        chapters: docs::contents(href),
        chapter: docs::chapter(href).ok_or(Error::NotFound)?,
        next: docs::next(href),
    })
}

async fn contents_page(_: Public) -> Result<HttpResponse, Error> {
    book_page("/docs")
}

async fn chapter_page(_: Public, chapter: web::Path<String>) -> Result<HttpResponse, Error> {
    book_page(&format!("/docs/{chapter}"))
}

#[derive(Template)]
#[template(path = "docs/error.html")]
struct ErrorDoc {
    frame: Frame,
    chapters: Vec<docs::ChapterGroup>,
    code: String,
    title: &'static str,
    text: &'static str,
}

async fn error_page(_: Public, code: web::Path<String>) -> Result<HttpResponse, Error> {
    let found = catalogue::explanation(&code).ok_or(Error::NotFound)?;
    html::page(&ErrorDoc {
        frame: Frame::default(),
        chapters: docs::contents("/docs/errors"),
        code: found.code.to_string(),
        title: found.title,
        text: found.text,
    })
}

#[derive(Template)]
#[template(path = "docs/errors.html")]
struct ErrorsDoc {
    frame: Frame,
    chapters: Vec<docs::ChapterGroup>,
    rows: Vec<(String, &'static str)>,
}

async fn errors_page(_: Public) -> Result<HttpResponse, Error> {
    let rows = catalogue::all().map(|entry| (entry.code.to_string(), entry.title)).collect();
    html::page(&ErrorsDoc { frame: Frame::default(), chapters: docs::contents("/docs/errors"), rows })
}

async fn static_file(_: Public, file: web::Path<String>) -> Result<HttpResponse, Error> {
    let (kind, text) = match file.as_str() {
        "tokens.css" => ("text/css; charset=utf-8", include_str!("../static/tokens.css")),
        "console.css" => ("text/css; charset=utf-8", include_str!("../static/console.css")),
        "mark.svg" => ("image/svg+xml", include_str!("../static/mark.svg")),
        _ => return Err(Error::NotFound),
    };
    Ok(HttpResponse::Ok()
        .insert_header(("cache-control", "public, max-age=3600"))
        .content_type(kind)
        .body(text))
}
