//! Audit mode over the API.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::json;
use sqlx::PgPool;
use time::format_description::well_known::Rfc3339;

use crate::access::{ManageNetwork, ReadTenant, TenantScope};
use crate::db;
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::http::asked::Body;
use crate::http::parse_json;
use crate::networks::{actions, store};
use crate::reconcile::Waker;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TrialBody {
    hours: i32,
}

/// PUT /api/v1/tenants/{tenant}/network/trial
pub async fn begin(
    scope: TenantScope<ManageNetwork>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    body: Body,
) -> Result<HttpResponse, Error> {
    let TrialBody { hours } = parse_json(&req, &body)?;
    scope.actor.require_recent()?;
    if !(1..=168).contains(&hours) {
        let message = "audit mode lasts 1 to 168 hours: it allows all egress outside the reserved ranges";
        return Err(Error::fault(Fault::new(Code(426), Kind::Invalid, "hours", message)));
    }
    let until = actions::begin_trial(&pool, &waker, scope.by(), &scope.tenant, hours).await?;
    Ok(HttpResponse::Accepted().json(json!({"until": until.format(&Rfc3339).unwrap_or_default()})))
}

/// DELETE /api/v1/tenants/{tenant}/network/trial
pub async fn end(
    scope: TenantScope<ManageNetwork>,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
) -> Result<HttpResponse, Error> {
    actions::end_trial(&pool, &waker, scope.by(), &scope.tenant).await?;
    Ok(HttpResponse::Accepted().finish())
}

/// GET /api/v1/tenants/{tenant}/network/trial: the end of audit mode; 404 if it is off.
pub async fn get(scope: TenantScope<ReadTenant>, pool: web::Data<PgPool>) -> Result<HttpResponse, Error> {
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let until = store::decided_trial(&mut conn, scope.tenant.id).await?.ok_or(Error::NotFound)?;
    Ok(HttpResponse::Ok().json(json!({"until": until.format(&Rfc3339).unwrap_or_default()})))
}
