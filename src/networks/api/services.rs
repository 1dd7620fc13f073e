//! The service catalogue and the tenants' access to services, over the API.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::json;
use sqlx::PgPool;

use super::NamePath;
use super::rollouts::StagingBody;
use crate::access::{ManageNetwork, PlatformScope, ReadPlatform, ReadTenant, TenantScope};
use crate::config::Config;
use crate::db::expected::Expected;
use crate::db::{self, Page, PageQuery, Within};
use crate::driver::Driver;
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::http::asked::{Body, Query};
use crate::http::parse_json;
use crate::ids::ServiceName;
use crate::networks::actions::Put;
use crate::networks::rollouts::Staging;
use crate::networks::{Endpoint, actions, check_network, store};
use crate::policy::never::against_service;
use crate::reconcile::Waker;
use crate::tenants::api::etag;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceBody {
    #[serde(default)]
    description: String,
    endpoints: Vec<Endpoint>,
    /// The stages in which a change reaches the tenants that use the service.
    #[serde(default)]
    rollout: StagingBody,
}

/// Validates a service against its limits and the reserved ranges.
pub(in crate::networks) async fn check_service(
    description: &str,
    endpoints: &mut [Endpoint],
    staging: StagingBody,
    (config, driver): (&Config, &dyn Driver),
) -> Result<Staging, Error> {
    endpoints.sort();
    let mut faults = Vec::new();
    let fault = |path: String, message: &str| Fault::new(Code(426), Kind::Invalid, path, message);
    if description.chars().count() > 500 {
        faults.push(fault("description".into(), "the description has at most 500 characters"));
    }
    if endpoints.is_empty() || endpoints.len() > 32 {
        faults.push(fault("endpoints".into(), "a service has 1 to 32 endpoints"));
    }
    let (tenants, own) = super::walls(config, driver).await;
    for (n, endpoint) in endpoints.iter().enumerate() {
        let path = format!("endpoints[{n}]");
        if endpoint.port == 0 {
            faults.push(fault(format!("{path}.port"), "a port is 1 to 65535"));
        }
        if endpoints[..n].contains(endpoint) {
            faults.push(fault(path.clone(), "this endpoint is listed twice"));
        }
        let wall = against_service(endpoint.network, &own);
        faults.extend(check_network(endpoint.network, &format!("{path}.network"), wall, tenants).err());
    }
    let staging = staging.check(&mut faults);
    if faults.is_empty() { Ok(staging) } else { Err(Error::Invalid(faults)) }
}

/// PUT /api/v1/services/{name}: answers 202 with the number of a rollout if tenants use the service and its
/// endpoints change.
pub async fn put_service(
    scope: PlatformScope<ManageNetwork>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    places: (web::Data<Config>, web::Data<dyn Driver>),
    path: web::Path<NamePath>,
    asked: (Expected, Body),
) -> Result<HttpResponse, Error> {
    let (config, driver) = places;
    let (expected, body) = asked;
    let name: ServiceName = path.checked()?;
    let ServiceBody { description, mut endpoints, rollout } = parse_json(&req, &body)?;
    let staging = check_service(&description, &mut endpoints, rollout, (&config, &**driver)).await?;
    let what = (description.as_str(), endpoints.as_slice());
    let put = actions::put_service(&pool, &waker, scope.by(), &name, what, &staging, &expected).await?;
    let (mut answer, generation, rollout) = match put {
        Put::Done { generation, new: true } => (HttpResponse::Created(), generation, None),
        Put::Done { generation, new: false } => (HttpResponse::Ok(), generation, None),
        Put::Begun { generation, rollout } => (HttpResponse::Accepted(), generation, Some(rollout)),
    };
    let body = json!({"name": name, "generation": generation, "rollout": rollout});
    Ok(answer.insert_header(etag(generation)).json(body))
}

/// GET /api/v1/services: by name.
pub async fn list_services(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let rows = store::list_services(&mut conn, &query.after_text()?, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.name.clone())))
}

/// GET /api/v1/services/{name}
pub async fn get_service(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    path: web::Path<NamePath>,
) -> Result<HttpResponse, Error> {
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let (_, service) = store::find_service(&mut conn, &path.parse()?).await?.ok_or(Error::NotFound)?;
    Ok(HttpResponse::Ok().insert_header(etag(service.generation)).json(service))
}

/// DELETE /api/v1/services/{name}
pub async fn delete_service(
    scope: PlatformScope<ManageNetwork>,
    pool: web::Data<PgPool>,
    path: web::Path<NamePath>,
) -> Result<HttpResponse, Error> {
    actions::delete_service(&pool, scope.by(), &path.parse()?).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// GET /api/v1/tenants/{tenant}/services: services that the tenant may use, by name.
pub async fn list_given(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let rows =
        store::list_given_services(&mut conn, scope.tenant.id, &query.after_text()?, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.name.clone())))
}

/// PUT /api/v1/tenants/{tenant}/services/{name}
pub async fn give(
    scope: TenantScope<ManageNetwork>,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    path: web::Path<NamePath>,
) -> Result<HttpResponse, Error> {
    let name = path.parse()?;
    actions::give(&pool, &waker, scope.by(), &scope.tenant, &name).await?;
    Ok(HttpResponse::Accepted().json(json!({"name": name})))
}

/// DELETE /api/v1/tenants/{tenant}/services/{name}
pub async fn take(
    scope: TenantScope<ManageNetwork>,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    path: web::Path<NamePath>,
) -> Result<HttpResponse, Error> {
    actions::take(&pool, &waker, scope.by(), &scope.tenant, &path.parse()?).await?;
    Ok(HttpResponse::Accepted().finish())
}
