//! Every address of the platform, one table. A handler gets in only if its first argument decides
//! about authority ([`Authorizes`]): without one this file does not compile.

use actix_web::http::Method;
use actix_web::{FromRequest, Handler, HttpResponse, Responder, web};
use askama::Template;

use crate::access::extract::{Authorizes, SignedIn};
use crate::access::{self, Authority, Public};
use crate::error::Error;
use crate::fault::catalogue;
use crate::http::html;
use crate::{apps, db, registries, tenants, uid_ranges};

/// Arguments of a handler of which the first decides about authority.
pub trait Authorized {}

macro_rules! authorized {
    ($($rest:ident)*) => {
        impl<First: Authorizes, $($rest),*> Authorized for (First, $($rest,)*) {}
    };
}

authorized!();
authorized!(B);
authorized!(B C);
authorized!(B C D);
authorized!(B C D E);
authorized!(B C D E F);
authorized!(B C D E F G);

fn on<F, Args>(method: Method, handler: F) -> actix_web::Route
where
    F: Handler<Args>,
    Args: FromRequest + Authorized + 'static,
    F::Output: Responder + 'static,
{
    web::method(method).to(handler)
}

/// The API's addresses: method and path. The table of documentation and tests.
pub const API: &[(&str, &str)] = &[
    ("POST", "/api/v1/tenants"),
    ("GET", "/api/v1/tenants"),
    ("GET", "/api/v1/tenants/{tenant}"),
    ("PATCH", "/api/v1/tenants/{tenant}"),
    ("PUT", "/api/v1/tenants/{tenant}/suspension"),
    ("DELETE", "/api/v1/tenants/{tenant}/suspension"),
    ("PUT", "/api/v1/tenants/{tenant}/offboarding"),
    ("GET", "/api/v1/tenants/{tenant}/offboarding"),
    ("POST", "/api/v1/tenants/{tenant}/robots"),
    ("GET", "/api/v1/tenants/{tenant}/robots"),
    ("DELETE", "/api/v1/tenants/{tenant}/robots/{robot}"),
    ("GET", "/api/v1/tenants/{tenant}/repositories"),
    ("GET", "/api/v1/tenants/{tenant}/repositories/{repository}/tags"),
    ("DELETE", "/api/v1/tenants/{tenant}/repositories/{repository}/tags/{tag}"),
    ("GET", "/api/v1/tenants/{tenant}/apps"),
    ("PUT", "/api/v1/tenants/{tenant}/apps/{app}"),
    ("GET", "/api/v1/tenants/{tenant}/apps/{app}"),
    ("DELETE", "/api/v1/tenants/{tenant}/apps/{app}"),
    ("GET", "/api/v1/tenants/{tenant}/apps/{app}/releases"),
    ("POST", "/api/v1/tenants/{tenant}/apps/{app}/releases"),
    ("GET", "/api/v1/tenants/{tenant}/apps/{app}/logs"),
    ("GET", "/api/v1/uids/{uid}"),
    ("GET", "/api/v1/uid-ranges"),
    ("GET", "/api/v1/schemas/app-spec"),
];

/// Everything that the main listener answers.
pub fn configure(cfg: &mut web::ServiceConfig) {
    api(cfg);
    console(cfg);
    registry(cfg);
    cfg.route("/healthz", on(Method::GET, healthz)).route("/readyz", on(Method::GET, readyz));
}

/// What the engine's listener answers: pulls, and nothing else.
pub fn registry(cfg: &mut web::ServiceConfig) {
    cfg.route("/auth/token", on(Method::GET, registries::front::get_token))
        .service(web::resource("/v2/{rest:.*}").route(web::route().to(authorized_proxy)));
}

/// The proxy takes every method; it decides by itself which there are.
async fn authorized_proxy(
    public: Public,
    req: actix_web::HttpRequest,
    door: web::Data<registries::front::FrontDoor>,
    body: web::Payload,
) -> Result<HttpResponse, registries::front::OciError> {
    registries::proxy::handle(public, req, door, body).await
}

fn api(cfg: &mut web::ServiceConfig) {
    use Method as M;
    let tenant = "/api/v1/tenants/{tenant}";
    let at = |rest: &str| format!("{tenant}{rest}");
    cfg.route("/api/v1/tenants", on(M::POST, tenants::api::onboard))
        .route("/api/v1/tenants", on(M::GET, tenants::api::list_tenants))
        .route(tenant, on(M::GET, tenants::api::get_tenant))
        .route(tenant, on(M::PATCH, tenants::api::change_tenant))
        .route(&at("/suspension"), on(M::PUT, tenants::api::begin_suspension))
        .route(&at("/suspension"), on(M::DELETE, tenants::api::end_suspension))
        .route(&at("/offboarding"), on(M::PUT, tenants::api::begin_offboarding))
        .route(&at("/offboarding"), on(M::GET, tenants::api::get_offboarding))
        .route(&at("/robots"), on(M::POST, registries::robots::create_robot))
        .route(&at("/robots"), on(M::GET, registries::robots::list_robots))
        .route(&at("/robots/{robot}"), on(M::DELETE, registries::robots::delete_robot))
        .route(&at("/repositories"), on(M::GET, registries::api::list_repositories))
        .route(&at("/repositories/{repository:.+}/tags"), on(M::GET, registries::api::list_tags))
        .route(&at("/repositories/{repository:.+}/tags/{tag}"), on(M::DELETE, registries::api::delete_tag))
        .route(&at("/apps"), on(M::GET, apps::api::list_apps))
        .route(&at("/apps/{app}"), on(M::PUT, apps::api::put_app))
        .route(&at("/apps/{app}"), on(M::GET, apps::api::get_app))
        .route(&at("/apps/{app}"), on(M::DELETE, apps::api::delete_app))
        .route(&at("/apps/{app}/releases"), on(M::GET, apps::api::list_releases))
        .route(&at("/apps/{app}/releases"), on(M::POST, apps::api::roll_back))
        .route(&at("/apps/{app}/logs"), on(M::GET, apps::logs::get_logs))
        .route("/api/v1/uids/{uid}", on(M::GET, uid_ranges::api::get_uid))
        .route("/api/v1/uid-ranges", on(M::GET, uid_ranges::api::list_uid_ranges))
        .route("/api/v1/schemas/app-spec", on(M::GET, apps::api::app_spec_schema));
}

fn console(cfg: &mut web::ServiceConfig) {
    use Method as M;
    cfg.route("/", on(M::GET, home))
        .route("/login", on(M::GET, access::console::login_page))
        .route("/login", on(M::POST, access::console::login))
        .route("/logout", on(M::POST, access::console::logout))
        .route("/first-admin/{code}", on(M::GET, access::console::first_admin_page))
        .route("/first-admin/{code}", on(M::POST, access::console::first_admin))
        .route("/tenants", on(M::GET, tenants::console::list_page))
        .route("/tenants/{tenant}", on(M::GET, apps::console::tenant_page))
        .route("/tenants/{tenant}/apps/{app}", on(M::GET, apps::console::app_page))
        .route("/docs/errors", on(M::GET, errors_page))
        .route("/docs/errors/{code}", on(M::GET, error_page))
        .route("/static/{file}", on(M::GET, static_file));
}

/// Where somebody belongs: the platform's people to all tenants, a tenant's to their own.
async fn home(scope: SignedIn, pool: web::Data<sqlx::PgPool>) -> Result<HttpResponse, Error> {
    let to = match scope.actor.authority {
        Authority::Platform(_) => "/tenants".to_owned(),
        Authority::Tenant(id, _) => {
            let mut conn = pool.acquire().await?;
            format!("/tenants/{}", tenants::name_of(&mut conn, id).await?)
        }
    };
    Ok(HttpResponse::SeeOther().insert_header(("location", to)).finish())
}

async fn healthz(_: Public) -> HttpResponse {
    HttpResponse::Ok().content_type("text/plain").body("alive\n")
}

/// Whether requests can be served; what of the rest is there is said beside it.
async fn readyz(
    _: Public,
    pool: web::Data<sqlx::PgPool>,
    registry: web::Data<registries::Distribution>,
) -> HttpResponse {
    let database = db::ping(&pool).await.is_ok();
    let registry = registry.ping().await.is_ok();
    let body = serde_json::json!({"database": database, "registry": registry});
    if database { HttpResponse::Ok().json(body) } else { HttpResponse::ServiceUnavailable().json(body) }
}

#[derive(Template)]
#[template(path = "docs/error.html")]
struct ErrorDoc {
    code: String,
    title: &'static str,
    text: &'static str,
}

async fn error_page(_: Public, code: web::Path<String>) -> Result<HttpResponse, Error> {
    let found = catalogue::explanation(&code).ok_or(Error::NotFound)?;
    html::page(&ErrorDoc { code: found.code.to_string(), title: found.title, text: found.text })
}

#[derive(Template)]
#[template(path = "docs/errors.html")]
struct ErrorsDoc {
    rows: Vec<(String, &'static str)>,
}

async fn errors_page(_: Public) -> Result<HttpResponse, Error> {
    let rows = catalogue::all().map(|entry| (entry.code.to_string(), entry.title)).collect();
    html::page(&ErrorsDoc { rows })
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
