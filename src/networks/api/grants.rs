//! Grants between tenants.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::json;
use sqlx::PgPool;

use super::NumberPath;
use crate::access::idempotency::{IdempotencyKey, Once};
use crate::access::{ManageConnections, ReadTenant, TenantScope};
use crate::db::{self, Page, PageQuery};
use crate::error::Error;
use crate::http::asked::{Body, Query};
use crate::http::parse_json;
use crate::networks::actions::{self, Offer};
use crate::networks::store;
use crate::reconcile::Waker;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfferBody {
    app: String,
    tenant: String,
    to_app: Option<String>,
    days: Option<i32>,
}

/// Validates an offer.
pub(in crate::networks) fn check_offer(
    app: &str,
    tenant: &str,
    to_app: Option<&str>,
    days: Option<i32>,
) -> Result<Offer, Error> {
    let mut faults = Vec::new();
    let app = super::parse(app, "app", &mut faults);
    let tenant = super::parse(tenant, "tenant", &mut faults);
    let to_app = to_app.map(|name| super::parse(name, "to_app", &mut faults));
    super::days(days, &mut faults);
    match (app, tenant) {
        (Some(app), Some(tenant)) if faults.is_empty() => {
            Ok(Offer { app, tenant, to_app: to_app.flatten(), days })
        }
        _ => Err(Error::Invalid(faults)),
    }
}

/// POST /api/v1/tenants/{tenant}/grants
pub async fn offer(
    scope: TenantScope<ManageConnections>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    key: IdempotencyKey,
    body: Body,
) -> Result<HttpResponse, Error> {
    let input: OfferBody = parse_json(&req, &body)?;
    let offer = check_offer(&input.app, &input.tenant, input.to_app.as_deref(), input.days)?;
    let once = Once::of(key, &req, &body);
    let kept = actions::offer(&pool, scope.by(), &once, &scope.tenant, &offer).await?;
    Ok(HttpResponse::build(kept.status).json(kept.body))
}

/// GET /api/v1/tenants/{tenant}/grants: grants that the tenant offers, by number.
pub async fn list_given(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let (limit, after) = (query.limit()?, query.after_number(0)?);
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let rows = store::list_given(&mut conn, scope.tenant.id, after, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.id)))
}

/// GET /api/v1/tenants/{tenant}/grants/received: grants that the tenant receives, by number.
pub async fn list_received(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let (limit, after) = (query.limit()?, query.after_number(0)?);
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let rows = store::list_received(&mut conn, after, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.id)))
}

/// PUT /api/v1/tenants/{tenant}/grants/{id}/acceptance
pub async fn accept(
    scope: TenantScope<ManageConnections>,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    path: web::Path<NumberPath>,
) -> Result<HttpResponse, Error> {
    actions::accept(&pool, &waker, scope.by(), &scope.tenant, path.id).await?;
    Ok(HttpResponse::Accepted().json(json!({"id": path.id, "state": "accepted"})))
}

/// DELETE /api/v1/tenants/{tenant}/grants/{id}: withdraws, ends or declines a grant, from either side.
pub async fn end(
    scope: TenantScope<ManageConnections>,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    path: web::Path<NumberPath>,
) -> Result<HttpResponse, Error> {
    actions::end(&pool, &waker, scope.by(), &scope.tenant, path.id).await?;
    Ok(HttpResponse::Accepted().finish())
}
