//! Plans: the connections that each opened and closed, and the decisions behind it.

use actix_web::{HttpResponse, web};
use sqlx::PgPool;

use super::NumberPath;
use crate::access::{PlatformScope, ReadPlatform, ReadTenant, TenantScope};
use crate::apps::list_machine_events;
use crate::db::{self, Page, PageQuery, Within};
use crate::error::Error;
use crate::http::asked::Query;
use crate::networks::store;

/// GET /api/v1/network/plans: the plans of all tenants, the newest first.
pub async fn list_all(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let (limit, before) = (query.limit()?, query.after_number(i64::MAX)?);
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let rows = store::list_plans(&mut conn, None, before, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.number)))
}

/// GET /api/v1/network/events: the machine's events, the newest first.
pub async fn list_events(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let (limit, before) = (query.limit()?, query.after_number(i64::MAX)?);
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let rows = list_machine_events(&mut conn, before, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.id)))
}

/// GET /api/v1/network/plans/{id}
pub async fn get_any(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    path: web::Path<NumberPath>,
) -> Result<HttpResponse, Error> {
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let plan = store::find_plan(&mut conn, None, path.id).await?.ok_or(Error::NotFound)?;
    Ok(HttpResponse::Ok().json(plan))
}

/// GET /api/v1/tenants/{tenant}/network/plans: the newest first.
pub async fn list_plans(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let (limit, before) = (query.limit()?, query.after_number(i64::MAX)?);
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let rows = store::list_plans(&mut conn, Some(scope.tenant.id), before, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.number)))
}

/// GET /api/v1/tenants/{tenant}/network/plans/{id}
pub async fn get_plan(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    path: web::Path<NumberPath>,
) -> Result<HttpResponse, Error> {
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let plan = store::find_plan(&mut conn, Some(scope.tenant.id), path.id).await?.ok_or(Error::NotFound)?;
    Ok(HttpResponse::Ok().json(plan))
}
