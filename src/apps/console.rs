//! The console pages of apps: the apps of a tenant, and one app with its state, releases and log.

use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, web};
use askama::Template;
use futures_util::StreamExt;
use time::OffsetDateTime;

use super::actions::Apps;
use super::api::AppPath;
use super::sight::Sight;
use super::{App, Event, Release, logs, store, view};
use crate::access::console::tenant_frame;
use crate::access::{ReadTenant, TenantScope};
use crate::config::Config;
use crate::db::{self, Page, PageQuery};
use crate::driver::{Driver, InstanceObserved, InstanceState, LogQuery};
use crate::error::Error;
use crate::http::html::Frame;
use crate::http::{OwnAddress, html};
use crate::keys::Keys;
use crate::quotas::{self, Amount, How, Quota, Resource, Unit};
use crate::tenants;
use crate::tenants::console::{bytes, cores, mark as tenant_mark};
use crate::uid_ranges;

struct AppItem {
    name: String,
    state: &'static str,
    mark: &'static str,
    summary: String,
    image: String,
    changed: String,
}

struct LimitRow {
    label: &'static str,
    used: String,
    limit: String,
    mark: &'static str,
}

struct Bar {
    label: &'static str,
    used: String,
    limit: String,
    percent: i64,
}

struct ConditionRow {
    kind: String,
    mark: &'static str,
    reason: String,
    message: String,
}

#[derive(Template)]
#[template(path = "tenants/show.html")]
struct TenantPage {
    frame: Frame,
    platform: bool,
    name: String,
    display_name: String,
    state: String,
    mark: &'static str,
    apps: Vec<AppItem>,
    next: String,
    quota: Vec<Bar>,
    limits: Vec<LimitRow>,
    ranges: Vec<String>,
    subnet: String,
    conditions: Vec<ConditionRow>,
    address: String,
    host: String,
    plain: bool,
}

fn mark(state: &str) -> &'static str {
    match state {
        "running" => "running",
        "changing" | "deleting" => "changing",
        "attention" | "unseen" | "flapping" => "attention",
        "failed" => "failed",
        _ => "stopped",
    }
}

fn when(at: OffsetDateTime) -> String {
    let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute]:[second] UTC");
    at.format(format).unwrap_or_default()
}

fn amount(resource: Resource, n: i64) -> String {
    match resource.definition().unit {
        Unit::Cpu => cores(n),
        Unit::Bytes => bytes(n),
        Unit::Count => n.to_string(),
    }
}

/// A bar for each reserved or stored resource.
fn bars(quota: &Quota) -> Vec<Bar> {
    let stored = quota.iter().filter(|(resource, _)| resource.definition().how == How::Stored);
    stored
        .map(|(resource, Amount { limit, used })| {
            let percent = if limit > 0 { used.saturating_mul(100) / limit } else { 100 };
            Bar {
                label: resource.definition().label,
                used: amount(resource, used),
                limit: amount(resource, limit),
                percent: percent.clamp(0, 100),
            }
        })
        .collect()
}

/// Counted resources, and limits without a counter.
fn limit_rows(quota: &Quota) -> Vec<LimitRow> {
    let others = quota.iter().filter(|(resource, _)| resource.definition().how != How::Stored);
    others
        .map(|(resource, Amount { limit, used })| {
            let counted = matches!(resource.definition().how, How::Counted | How::Daily);
            LimitRow {
                label: resource.definition().label,
                used: if counted { amount(resource, used) } else { String::new() },
                limit: amount(resource, limit),
                mark: if counted && used >= limit { "attention" } else { "" },
            }
        })
        .collect()
}

/// GET /tenants/{tenant}
pub async fn tenant_page(
    scope: TenantScope<ReadTenant>,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    config: web::Data<Config>,
    apps: web::Data<Apps>,
    keys: web::Data<Keys>,
    query: web::Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&apps.pool, scope.tenant.id).await?;
    let tenant = tenants::find_for_console(&mut conn, scope.tenant.id).await?.ok_or(Error::NotFound)?;
    let rows = store::list_apps(&mut conn, tenant.id, &query.after_text()?, limit + 1).await?;
    let wanted = store::list_wanted(&mut conn, tenant.id, &rows).await?;
    let page = Page::new(rows, limit, |app| app.name.clone());
    let number = tenants::tenant_network(&mut conn, tenant.id).await?;
    let ranges = uid_ranges::list_ranges_of(&mut conn, tenant.id).await?;
    let conditions = tenants::list_conditions(&mut conn, tenant.id).await?;
    let address = own.of(&req).unwrap_or_default();
    let quota = quotas::read_counted(&mut conn, tenant.id).await?;
    html::page(&TenantPage {
        frame: tenant_frame(&keys, &scope, "Apps"),
        platform: scope.actor.platform.is_some(),
        mark: tenant_mark(&tenant.state),
        apps: page.items.into_iter().map(|app| app_row(app, &wanted, &tenant.state, &apps.sight)).collect(),
        next: page.next.unwrap_or_default(),
        quota: bars(&quota),
        limits: limit_rows(&quota),
        ranges: ranges.iter().map(|r| format!("{} to {}", r.start, r.end - 1)).collect(),
        subnet: config.pools.subnet(number).map(|subnet| subnet.to_string()).unwrap_or_default(),
        conditions: conditions
            .into_iter()
            .map(|c| ConditionRow {
                mark: match c.status.as_str() {
                    "true" => "running",
                    "false" => "attention",
                    _ => "changing",
                },
                kind: c.kind,
                reason: c.reason,
                message: c.message,
            })
            .collect(),
        name: tenant.name.to_string(),
        display_name: tenant.display_name,
        state: tenant.state,
        host: address.split("://").nth(1).unwrap_or_default().to_owned(),
        plain: address.starts_with("http://"),
        address,
    })
}

fn app_row(
    app: App,
    wanted: &std::collections::HashMap<crate::ids::AppId, Release>,
    tenant_state: &str,
    sight: &Sight,
) -> AppItem {
    let release = wanted.get(&app.id);
    let (state, summary) = view::state(&app, wanted_instances(release), tenant_state, sight);
    AppItem {
        mark: mark(state),
        state,
        summary,
        image: release.map(Release::image).unwrap_or_default(),
        changed: when(app.changed_at),
        name: app.name.to_string(),
    }
}

fn wanted_instances(release: Option<&Release>) -> u32 {
    release
        .and_then(|release| release.spec["instances"].as_u64())
        .and_then(|n| u32::try_from(n).ok())
        .unwrap_or(1)
}

struct InstanceRow {
    number: u32,
    revision: i64,
    state: &'static str,
    mark: &'static str,
    reason: String,
    since: String,
    restarts: u32,
    uid: String,
    address: String,
}

struct ReleaseItem {
    revision: i64,
    current: bool,
    note: String,
    image: String,
    digest: String,
    short: String,
    by: String,
    at: String,
}

struct AppEventItem {
    at: String,
    text: String,
}

#[derive(Template)]
#[template(path = "apps/show.html")]
struct AppPage {
    frame: Frame,
    tenant: String,
    name: String,
    state: &'static str,
    mark: &'static str,
    summary: String,
    missing: Vec<String>,
    warnings: Vec<String>,
    instances: Vec<InstanceRow>,
    releases: Vec<ReleaseItem>,
    log: Vec<String>,
    log_note: &'static str,
    user: String,
    uids: String,
    limits: String,
    reaches: String,
    reserved: String,
    seen: String,
    events: Vec<AppEventItem>,
    address: String,
}

/// GET /tenants/{tenant}/apps/{app}
pub async fn app_page(
    scope: TenantScope<ReadTenant>,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    apps: web::Data<Apps>,
    keys: web::Data<Keys>,
    driver: web::Data<dyn Driver>,
    path: web::Path<AppPath>,
) -> Result<HttpResponse, Error> {
    let mut conn = db::begin(&apps.pool, scope.tenant.id).await?;
    let tenant = scope.tenant.id;
    let app = store::find_app(&mut conn, tenant, &path.name()?).await?.ok_or(Error::NotFound)?;
    let release =
        store::find_release(&mut conn, tenant, app.id, app.revision).await?.ok_or(Error::NotFound)?;
    let releases = store::list_releases(&mut conn, tenant, app.id, i64::MAX, 10).await?;
    let events = store::list_events(&mut conn, tenant, app.id, 15).await?;
    let spec = release.parse_spec()?;
    let missing = apps.connections.absent(&mut conn, &scope.tenant, spec.connects()).await?;
    drop(conn);
    let (log, log_note) = last_lines(&**driver, &scope, &app).await;
    let (state, summary) = view::state(&app, spec.instances(), &scope.tenant.state, &apps.sight);
    let unseen = apps.sight.unseen().is_some();
    let connects = spec.connects();
    let names: Vec<String> = (connects.services.iter().map(ToString::to_string))
        .chain(connects.apps.iter().map(ToString::to_string))
        .chain(connects.egress.iter().map(ToString::to_string))
        .collect();
    let warnings = release.warnings.as_array().cloned().unwrap_or_default();
    html::page(&AppPage {
        frame: tenant_frame(&keys, &scope, "Apps"),
        tenant: scope.tenant.name.to_string(),
        state,
        mark: mark(state),
        summary,
        missing: missing.into_iter().map(|fault| fault.message).collect(),
        warnings: warnings
            .iter()
            .map(|w| {
                let text = |key: &str| w[key].as_str().unwrap_or_default().to_owned();
                format!("{}. {}.", text("message"), text("suggestion"))
            })
            .collect(),
        instances: (app.observed.iter().flat_map(|seen| seen.instances.iter()))
            .map(|instance| instance_row(instance, unseen))
            .collect(),
        releases: releases.into_iter().map(|r| release_row(r, app.revision)).collect(),
        log,
        log_note,
        user: format!("{}:{}", release.user.uid, release.user.gid),
        uids: format!("{} to {}", app.uid_start, app.uid_start + app.uid_size - 1),
        limits: format!(
            "{} cores, {} of memory (scratch included)",
            cores(i64::from(spec.cpu_millis())),
            bytes(i64::try_from(spec.memory()).unwrap_or(i64::MAX))
        ),
        reaches: if names.is_empty() { "Nothing".into() } else { names.join(", ") },
        reserved: app.peak.words(),
        seen: app.observed_at.map_or_else(|| "Never".into(), when),
        events: events
            .into_iter()
            .map(|Event { at, text, .. }| AppEventItem { at: when(at), text })
            .collect(),
        address: own.of(&req).unwrap_or_default(),
        name: app.name.to_string(),
    })
}

fn instance_row(i: &InstanceObserved, unseen: bool) -> InstanceRow {
    let (state, mark) = match i.state {
        _ if unseen => ("not seen", "stopped"),
        InstanceState::Preparing => ("preparing", "changing"),
        InstanceState::Starting => ("starting", "changing"),
        InstanceState::Running => ("running", "running"),
        InstanceState::Unhealthy => ("unhealthy", "attention"),
        InstanceState::Waiting => ("waiting", "attention"),
        InstanceState::Stopping => ("stopping", "changing"),
        InstanceState::Failed => ("failed", "failed"),
    };
    InstanceRow {
        number: i.number,
        revision: i.revision,
        state,
        mark,
        reason: i.last_end.as_ref().map(|end| logs::clean(&end.detail)).unwrap_or_default(),
        since: when(i.since),
        restarts: i.restarts,
        uid: i.uid.map(|uid| uid.to_string()).unwrap_or_default(),
        address: i.address.to_string(),
    }
}

fn release_row(release: Release, current: i64) -> ReleaseItem {
    ReleaseItem {
        revision: release.revision,
        current: release.revision == current,
        note: release.rolled_back_to.map(|n| format!("rollback to {n}")).unwrap_or_default(),
        image: release.image(),
        short: release.digest.short().to_owned(),
        digest: release.digest.to_string(),
        by: release.actor,
        at: when(release.created_at),
    }
}

/// Returns the newest log lines. A timeout of two seconds keeps a slow log from delaying the page.
async fn last_lines(
    driver: &dyn Driver,
    scope: &TenantScope<ReadTenant>,
    app: &App,
) -> (Vec<String>, &'static str) {
    let query = LogQuery {
        tenant: scope.tenant.name.clone(),
        app: app.name.clone(),
        app_id: app.id,
        instance: None,
        tail: 50,
        follow: false,
    };
    let read = async {
        let stream = driver.logs(&query).await?;
        let lines: Vec<_> = stream.take(200).collect().await;
        lines.into_iter().collect::<Result<Vec<_>, _>>()
    };
    match tokio::time::timeout(Duration::from_secs(2), read).await {
        Ok(Ok(lines)) => (lines.iter().map(logs::line_for_people).collect(), "The log is empty."),
        _ => (Vec::new(), "The log cannot be read right now."),
    }
}
