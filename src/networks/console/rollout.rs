//! A rollout's page: progress, recorded use, probe results, actions. Also the form that changes a service.

use actix_web::{HttpResponse, web};
use askama::Template;
use serde::Deserialize;
use sqlx::PgPool;
use time::OffsetDateTime;

use super::platform;
use crate::access::api::NumberPath;
use crate::access::console::{after, platform_frame, when, who};
use crate::access::extract::{PlatformScope, Posted};
use crate::access::{Actor, ManageNetwork, ReadPlatform, includes};
use crate::config::Config;
use crate::db::expected::Expected;
use crate::db::{self, Page, PageQuery, Within};
use crate::driver::Driver;
use crate::error::Error;
use crate::http::html::{self, Frame};
use crate::ids::ServiceName;
use crate::keys::Keys;
use crate::networks::actions::{self, Put};
use crate::networks::api::rollouts::{StagingBody, TOLD, check_reason};
use crate::networks::api::services::check_service;
use crate::networks::rollouts::Stage;
use crate::networks::store::{self, CheckRow, Rollout, UseRow};
use crate::networks::{Endpoint, actions::abort, actions::end_window, actions::pause, actions::resume};
use crate::policy::Protocol;
use crate::reconcile::Waker;

/// A rollout in a list.
pub(super) struct RolloutRow {
    pub(super) id: i64,
    pub(super) service: String,
    pub(super) state: &'static str,
    pub(super) mark: &'static str,
    pub(super) progress: String,
    pub(super) message: String,
    pub(super) at: String,
    pub(super) by: String,
}

impl From<&Rollout> for RolloutRow {
    fn from(rollout: &Rollout) -> Self {
        let (state, mark) = match (rollout.stage, rollout.paused_by.as_deref(), rollout.outcome.as_deref()) {
            (Stage::Over, _, Some("done")) => ("Done", "running"),
            (Stage::Over, _, Some("aborted")) => ("Aborted", "stopped"),
            (Stage::Over, ..) => ("Rolled back", "failed"),
            (Stage::Undo, ..) => ("Rolling back", "changing"),
            (_, Some("platform"), _) => ("Needs approval", "attention"),
            (_, Some(_), _) => ("Paused", "stopped"),
            (Stage::Window, ..) => ("Observing use", "changing"),
            (Stage::Canary, ..) => ("Canary stage", "changing"),
            (Stage::All, ..) => ("Rolling out", "changing"),
        };
        let progress = match rollout.stage {
            Stage::Over => String::new(),
            _ => format!("{} of {} tenants", rollout.reached, rollout.tenants),
        };
        Self {
            id: rollout.id,
            service: rollout.service.to_string(),
            state,
            mark,
            progress,
            message: rollout.message.clone(),
            at: when(rollout.begun_at),
            by: who(&rollout.begun_by),
        }
    }
}

/// A stage on the page.
struct Leg {
    name: &'static str,
    words: String,
    mark: &'static str,
}

fn legs(rollout: &Rollout) -> Vec<Leg> {
    let stages = [Stage::Window, Stage::Canary, Stage::All];
    let at = stages.iter().position(|stage| *stage == rollout.stage);
    let done = rollout.outcome.as_deref() == Some("done");
    let mark = |n: usize| match at {
        Some(at) if n < at => "running",
        Some(at) if n == at && rollout.paused_by.is_some() => "attention",
        Some(at) if n == at => "changing",
        None if done => "running",
        _ => "stopped",
    };
    let window = match rollout.window_hours {
        0 => "None".to_owned(),
        hours => format!("Counts connections to the removed endpoints for {hours} h"),
    };
    let first = match &rollout.canaries {
        None => "Chosen when the stage starts".to_owned(),
        Some(ids) if ids.is_empty() => "None".to_owned(),
        Some(_) => rollout.canary_names.join(", "),
    };
    vec![
        Leg { name: "Observation window", words: window, mark: mark(0) },
        Leg { name: "Canary tenants", words: first, mark: mark(1) },
        Leg { name: "All tenants", words: "The other tenants, in batches".to_owned(), mark: mark(2) },
    ]
}

/// A button of the page.
struct Choice {
    what: &'static str,
    label: &'static str,
    class: &'static str,
}

fn is_under_way(rollout: &Rollout) -> bool {
    matches!(rollout.stage, Stage::Window | Stage::Canary | Stage::All)
}

fn decisions(rollout: &Rollout) -> Vec<Choice> {
    if !is_under_way(rollout) {
        return Vec::new();
    }
    let abort = Choice { what: "abort", label: "Abort and roll back", class: "quiet danger" };
    let end = Choice { what: "end", label: "End the observation window", class: "quiet" };
    let pause = Choice { what: "pause", label: "Pause", class: "quiet" };
    match (rollout.paused_by.is_some(), rollout.stage) {
        (true, _) => vec![Choice { what: "resume", label: "Resume", class: "" }, abort],
        (false, Stage::Window) if rollout.until > Some(OffsetDateTime::now_utc()) => vec![pause, end, abort],
        (false, _) => vec![pause, abort],
    }
}

fn words(end: Endpoint) -> String {
    format!("{} {} {}", end.network, end.protocol, end.port)
}

#[derive(Template)]
#[template(path = "networks/rollout.html")]
struct RolloutPage {
    frame: Frame,
    error: String,
    row: RolloutRow,
    under_way: bool,
    decisions: Vec<Choice>,
    legs: Vec<Leg>,
    opens: Vec<String>,
    closes: Vec<String>,
    until: String,
    window: i32,
    uses: Vec<UseRow>,
    uses_in_all: i64,
    checks: Vec<CheckRow>,
    checks_in_all: i64,
}

async fn view(
    actor: &Actor,
    pool: &PgPool,
    keys: &Keys,
    id: i64,
    error: String,
) -> Result<RolloutPage, Error> {
    let mut conn = db::begin(pool, Within::Platform).await?;
    let rollout = store::find_rollout(&mut conn, id).await?.ok_or(Error::NotFound)?;
    let (uses, uses_in_all) = store::list_uses(&mut conn, id, TOLD).await?;
    let (checks, checks_in_all) = store::list_checks(&mut conn, id, TOLD).await?;
    drop(conn);
    let only = |ends: &[Endpoint], there: &[Endpoint]| {
        ends.iter().filter(|end| !there.contains(end)).copied().map(words).collect()
    };
    Ok(RolloutPage {
        frame: platform_frame(keys, actor, "Network"),
        error,
        row: RolloutRow::from(&rollout),
        under_way: is_under_way(&rollout),
        decisions: if includes::<ManageNetwork>(actor.platform, None) {
            decisions(&rollout)
        } else {
            Vec::new()
        },
        legs: legs(&rollout),
        opens: only(&rollout.endpoints, &rollout.before),
        closes: only(&rollout.before, &rollout.endpoints),
        until: rollout.until.filter(|_| rollout.stage != Stage::Undo).map(when).unwrap_or_default(),
        window: rollout.window_hours,
        uses,
        uses_in_all,
        checks,
        checks_in_all,
    })
}

#[derive(Template)]
#[template(path = "networks/rollouts.html")]
struct RolloutsPage {
    frame: Frame,
    rollouts: Vec<RolloutRow>,
    next: String,
}

/// GET /network/rollouts: all rollouts, the newest first.
pub async fn rollouts_page(
    scope: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    keys: web::Data<Keys>,
    query: web::Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let (limit, before) = (query.limit()?.min(50), query.after_number(i64::MAX)?);
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let rows = store::list_rollouts(&mut conn, before, limit + 1).await?;
    drop(conn);
    let page = Page::new(rows, limit, |row| row.id);
    html::page(&RolloutsPage {
        frame: platform_frame(&keys, &scope.actor, "Network"),
        rollouts: page.items.iter().map(RolloutRow::from).collect(),
        next: page.next.unwrap_or_default(),
    })
}

/// GET /network/rollouts/{id}
pub async fn rollout_page(
    scope: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    keys: web::Data<Keys>,
    path: web::Path<NumberPath>,
) -> Result<HttpResponse, Error> {
    html::page(&view(&scope.actor, &pool, &keys, path.id, String::new()).await?)
}

/// The form that pauses, resumes or aborts a rollout.
#[derive(Deserialize)]
pub struct RolloutDecisionForm {
    what: String,
    #[serde(default)]
    reason: String,
}

/// POST /network/rollouts/{id}/decision
pub async fn decide(
    scope: PlatformScope<ManageNetwork>,
    pool: web::Data<PgPool>,
    keys: web::Data<Keys>,
    waker: web::Data<Waker>,
    path: web::Path<NumberPath>,
    form: Posted<RolloutDecisionForm>,
) -> Result<HttpResponse, Error> {
    let make = async {
        let reason = check_reason(&form.0.reason)?;
        match form.0.what.as_str() {
            "pause" => pause(&pool, scope.by(), path.id, &reason).await,
            "resume" => resume(&pool, &waker, scope.by(), path.id, &reason).await,
            "end" => end_window(&pool, &waker, scope.by(), path.id, &reason).await,
            "abort" => abort(&pool, &waker, scope.by(), path.id, &reason).await,
            _ => Err(Error::Conflict(
                "unknown action: choose pause, resume, abort, or end for the observation window".into(),
            )),
        }
    };
    let outcome = make.await;
    let again = async |error| view(&scope.actor, &pool, &keys, path.id, error).await;
    after(&format!("/network/rollouts/{}", path.id), outcome, again).await
}

/// The form that creates or changes a service.
#[derive(Deserialize)]
pub struct ServiceForm {
    name: String,
    #[serde(default)]
    description: String,
    /// One endpoint a line: address, protocol (TCP if omitted), port.
    endpoints: String,
    #[serde(default)]
    window_hours: String,
    #[serde(default)]
    canaries: String,
}

fn endpoint(line: &str) -> Result<Endpoint, Error> {
    let wrong = || Error::Conflict(format!("an endpoint is written as 10.5.0.2 tcp 9092, not as {line:?}"));
    let words: Vec<&str> = line.split_whitespace().collect();
    let (network, protocol, port) = match words[..] {
        [network, port] => (network, "tcp", port),
        [network, protocol, port] => (network, protocol, port),
        _ => return Err(wrong()),
    };
    Ok(Endpoint {
        network: network.parse().map_err(|_| wrong())?,
        protocol: Protocol::parse(protocol).ok_or_else(wrong)?,
        port: port.parse().map_err(|_| wrong())?,
    })
}

/// POST /network/services
pub async fn put_service(
    scope: PlatformScope<ManageNetwork>,
    pool: web::Data<PgPool>,
    keys: web::Data<Keys>,
    waker: web::Data<Waker>,
    places: (web::Data<Config>, web::Data<dyn Driver>),
    form: Posted<ServiceForm>,
) -> Result<HttpResponse, Error> {
    let (config, driver) = places;
    let ServiceForm { name, description, endpoints, window_hours, canaries } = &form.0;
    let make = async {
        let name: ServiceName =
            name.trim().parse().map_err(|error: crate::ids::NameError| Error::Conflict(error.to_string()))?;
        let lines = endpoints.lines().map(str::trim).filter(|line| !line.is_empty());
        let mut endpoints = lines.map(endpoint).collect::<Result<Vec<_>, _>>()?;
        let hours = match window_hours.trim() {
            "" => None,
            text => Some(text.parse().map_err(|_| Error::Conflict("hours must be a whole number".into()))?),
        };
        let first: Vec<String> =
            canaries.split([',', ' ']).filter(|name| !name.is_empty()).map(str::to_owned).collect();
        let staging = StagingBody {
            window_hours: hours,
            observe_seconds: None,
            canaries: Some(first).filter(|first| !first.is_empty()),
        };
        // An empty description keeps the current one.
        let mut conn = db::begin(&pool, Within::Platform).await?;
        let known = store::find_service(&mut conn, &name).await?.map(|(_, known)| known.description);
        drop(conn);
        let description = match description.trim() {
            "" => known.unwrap_or_default(),
            text => text.to_owned(),
        };
        let staging = check_service(&description, &mut endpoints, staging, (&config, &**driver)).await?;
        let what = (description.as_str(), endpoints.as_slice());
        actions::put_service(&pool, &waker, scope.by(), &name, what, &staging, &Expected::default()).await
    };
    let (place, outcome) = match make.await {
        Ok(Put::Begun { rollout, .. }) => (format!("/network/rollouts/{rollout}"), Ok(())),
        Ok(Put::Done { .. }) => ("/network".to_owned(), Ok(())),
        Err(error) => ("/network".to_owned(), Err(error)),
    };
    let again = async |error| {
        platform::view(&scope.actor, &pool, (&keys, &**driver), &PageQuery::default(), error).await
    };
    after(&place, outcome, again).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_read_as_a_person_writes_it() {
        for (text, protocol, port) in [("10.5.0.2 9092", "tcp", 9092), ("10.5.0.2   udp 123", "udp", 123)] {
            let read = endpoint(text).unwrap();
            assert_eq!((read.protocol.as_str(), read.port), (protocol, port));
        }
        for bad in
            ["10.5.0.2", "10.5.0.2 tcp", "10.5.0.2 icmp 1", "kafka 9092", "10.5.0.2 tcp 70000", "a b c d"]
        {
            assert!(endpoint(bad).is_err(), "{bad}");
        }
    }
}
