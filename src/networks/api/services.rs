//! The catalogue of services, and who may use what.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::json;
use sqlx::PgPool;

use super::NamePath;
use crate::access::{ManageNetwork, PlatformScope, ReadPlatform, ReadTenant, TenantScope};
use crate::config::Config;
use crate::db::{self, Page, PageQuery, Within};
use crate::driver::Driver;
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::http::parse_json;
use crate::networks::{Endpoint, actions, check_network, store};
use crate::policy::never::against_service;
use crate::reconcile::Waker;
use crate::tenants::api::{etag, if_match};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceBody {
    #[serde(default)]
    description: String,
    endpoints: Vec<Endpoint>,
}

/// PUT /api/v1/services/{name}
pub async fn put_service(
    scope: PlatformScope<ManageNetwork>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    places: (web::Data<Config>, web::Data<dyn Driver>),
    path: web::Path<NamePath>,
    body: web::Bytes,
) -> Result<HttpResponse, Error> {
    let (config, driver) = places;
    let name = path.parse()?;
    let mut input: ServiceBody = parse_json(&req, &body)?;
    input.endpoints.sort();
    let mut faults = Vec::new();
    let fault = |path: String, message: &str| Fault::new(Code(426), Kind::Invalid, path, message);
    if input.description.chars().count() > 500 {
        faults.push(fault("description".into(), "the description has at most 500 characters"));
    }
    if input.endpoints.is_empty() || input.endpoints.len() > 32 {
        faults.push(fault("endpoints".into(), "a service has 1 to 32 endpoints"));
    }
    let (tenants, own) = super::walls(&config, &**driver).await;
    for (n, endpoint) in input.endpoints.iter().enumerate() {
        let path = format!("endpoints[{n}]");
        if endpoint.port == 0 {
            faults.push(fault(format!("{path}.port"), "a port is 1 to 65535"));
        }
        if input.endpoints[..n].contains(endpoint) {
            faults.push(fault(path.clone(), "this endpoint stands twice"));
        }
        let wall = against_service(endpoint.network, &own);
        faults.extend(check_network(endpoint.network, &format!("{path}.network"), wall, tenants).err());
    }
    if !faults.is_empty() {
        return Err(Error::Invalid(faults));
    }
    let what = (input.description.as_str(), input.endpoints.as_slice());
    let (generation, new) =
        actions::put_service(&pool, &waker, scope.by(), &name, what, if_match(&req)?).await?;
    let mut answer = if new { HttpResponse::Created() } else { HttpResponse::Ok() };
    Ok(answer.insert_header(etag(generation)).json(json!({"name": name, "generation": generation})))
}

/// GET /api/v1/services: by name.
pub async fn list_services(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    query: web::Query<PageQuery>,
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

/// GET /api/v1/tenants/{tenant}/services: those that the tenant may use, by name.
pub async fn list_given(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    query: web::Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let rows = store::list_services(&mut conn, &query.after_text()?, limit + 1).await?;
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
