//! Roll-outs: how far each is, what was used and tried, and the decisions about it.

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

/// Most of what was used and tried that is told with a roll-out.
pub(in crate::networks) const TOLD: i64 = 200;

/// How a change is to be rolled out, as it is handed in.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::networks) struct StagingBody {
    pub(in crate::networks) window_hours: Option<i32>,
    pub(in crate::networks) observe_seconds: Option<i32>,
    pub(in crate::networks) canaries: Option<Vec<String>>,
}

impl StagingBody {
    /// Checked; what is wrong with it is put to the others.
    pub(super) fn check(self, faults: &mut Vec<Fault>) -> Staging {
        let mut fault = |path: String, message: String| {
            faults.push(Fault::new(Code(426), Kind::Invalid, format!("rollout.{path}"), message));
        };
        let usual = Staging::default();
        let window_hours = self.window_hours.unwrap_or(usual.window_hours);
        if !(0..=168).contains(&window_hours) {
            fault("window_hours".into(), "a window has 0 to 168 hours".into());
        }
        let observe_seconds = self.observe_seconds.unwrap_or(usual.observe_seconds);
        if !(0..=86400).contains(&observe_seconds) {
            fault("observe_seconds".into(), "the first tenants are looked at for 0 to 86400 seconds".into());
        }
        if self.canaries.as_ref().is_some_and(|names| names.len() > 100) {
            fault("canaries".into(), "at most 100 tenants are first".into());
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

/// GET /api/v1/network/rollouts/{id}: with what was used of what it closes, and what was tried; of each at most
/// 200, the numbers of all beside them.
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

/// A reason of bounded length.
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

/// DELETE /api/v1/network/rollouts/{id}/window: it ends now.
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
