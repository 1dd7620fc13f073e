//! Rollouts over the API: progress, recorded use, probe results, and actions.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::json;
use sqlx::PgPool;

use super::NumberPath;
use crate::access::{ManageNetwork, PlatformScope, ReadPlatform};
use crate::db::{self, Page, PageQuery, Within};
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::http::asked::{Body, Query};
use crate::http::parse_json;
use crate::ids::TenantName;
use crate::networks::rollouts::Staging;
use crate::networks::{actions, store};
use crate::reconcile::Waker;

/// Maximum number of uses and of probe results in an answer.
pub(in crate::networks) const TOLD: i64 = 200;

/// The stages of a rollout, as a request gives them.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::networks) struct StagingBody {
    pub(in crate::networks) window_hours: Option<i32>,
    pub(in crate::networks) observe_seconds: Option<i32>,
    pub(in crate::networks) canaries: Option<Vec<String>>,
}

impl StagingBody {
    /// Validates the stages. Adds its faults to `faults`.
    pub(super) fn check(self, faults: &mut Vec<Fault>) -> Staging {
        let mut fault = |path: String, message: String| {
            faults.push(Fault::new(Code(426), Kind::Invalid, format!("rollout.{path}"), message));
        };
        let usual = Staging::default();
        let window_hours = self.window_hours.unwrap_or(usual.window_hours);
        if !(0..=168).contains(&window_hours) {
            fault("window_hours".into(), "the observation window lasts 0 to 168 hours".into());
        }
        let observe_seconds = self.observe_seconds.unwrap_or(usual.observe_seconds);
        if !(0..=86400).contains(&observe_seconds) {
            fault("observe_seconds".into(), "the canary tenants are observed for 0 to 86400 seconds".into());
        }
        if self.canaries.as_ref().is_some_and(|names| names.len() > 100) {
            fault("canaries".into(), "there are at most 100 canary tenants".into());
        }
        let mut named = |(n, name): (usize, &String)| {
            name.parse::<TenantName>()
                .map_err(|error| fault(format!("canaries[{n}]"), error.to_string()))
                .ok()
        };
        let canaries =
            self.canaries.as_ref().map(|names| names.iter().enumerate().filter_map(&mut named).collect());
        Staging { window_hours, observe_seconds, canaries }
    }
}

/// GET /api/v1/network/rollouts: the newest first.
pub async fn list_rollouts(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let (limit, before) = (query.limit()?, query.after_number(i64::MAX)?);
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let rows = store::list_rollouts(&mut conn, before, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.id)))
}

/// GET /api/v1/network/rollouts/{id}: includes the recorded use of removed endpoints and the probe results.
/// Each list has at most 200 items, with the total count beside it.
pub async fn get_rollout(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    path: web::Path<NumberPath>,
) -> Result<HttpResponse, Error> {
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let rollout = store::find_rollout(&mut conn, path.id).await?.ok_or(Error::NotFound)?;
    let (uses, uses_in_all) = store::list_uses(&mut conn, rollout.id, TOLD).await?;
    let (checks, checks_in_all) = store::list_checks(&mut conn, rollout.id, TOLD).await?;
    let mut body = serde_json::to_value(rollout).map_err(Error::internal)?;
    body["uses"] = json!({"items": uses, "in_all": uses_in_all});
    body["checks"] = json!({"items": checks, "in_all": checks_in_all});
    Ok(HttpResponse::Ok().json(body))
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReasonBody {
    #[serde(default)]
    reason: String,
}

fn reason(req: &HttpRequest, body: &[u8]) -> Result<String, Error> {
    let ReasonBody { reason } = if body.is_empty() { ReasonBody::default() } else { parse_json(req, body)? };
    check_reason(&reason)
}

/// Validates the length of a reason.
pub(in crate::networks) fn check_reason(text: &str) -> Result<String, Error> {
    if text.chars().count() > 500 {
        let message = "a reason has at most 500 characters";
        return Err(Error::fault(Fault::new(Code(426), Kind::Invalid, "reason", message)));
    }
    Ok(text.trim().to_owned())
}

/// PUT /api/v1/network/rollouts/{id}/pause
pub async fn pause(
    scope: PlatformScope<ManageNetwork>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    path: web::Path<NumberPath>,
    body: Body,
) -> Result<HttpResponse, Error> {
    actions::pause(&pool, scope.by(), path.id, &reason(&req, &body)?).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// DELETE /api/v1/network/rollouts/{id}/pause
pub async fn resume(
    scope: PlatformScope<ManageNetwork>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    path: web::Path<NumberPath>,
    body: Body,
) -> Result<HttpResponse, Error> {
    actions::resume(&pool, &waker, scope.by(), path.id, &reason(&req, &body)?).await?;
    Ok(HttpResponse::Accepted().finish())
}

/// DELETE /api/v1/network/rollouts/{id}/window: ends the observation window now.
pub async fn end_window(
    scope: PlatformScope<ManageNetwork>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    path: web::Path<NumberPath>,
    body: Body,
) -> Result<HttpResponse, Error> {
    actions::end_window(&pool, &waker, scope.by(), path.id, &reason(&req, &body)?).await?;
    Ok(HttpResponse::Accepted().finish())
}

/// PUT /api/v1/network/rollouts/{id}/abort
pub async fn abort(
    scope: PlatformScope<ManageNetwork>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    path: web::Path<NumberPath>,
    body: Body,
) -> Result<HttpResponse, Error> {
    actions::abort(&pool, &waker, scope.by(), path.id, &reason(&req, &body)?).await?;
    Ok(HttpResponse::Accepted().finish())
}
