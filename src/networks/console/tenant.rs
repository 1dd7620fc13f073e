//! A tenant's network page: allowed and denied connections, and the requests that would allow more.

use actix_web::{HttpResponse, web};
use askama::Template;
use serde::Deserialize;
use sqlx::PgPool;

use super::PlanRow;
use crate::access::console::{tenant_frame, when, who};
use crate::access::extract::TenantScope;
use crate::access::{ManageConnections, ReadTenant};
use crate::config::Config;
use crate::db;
use crate::driver::Driver;
use crate::error::Error;
use crate::http::html::{self, Frame};
use crate::ids::{AppName, ServiceName};
use crate::keys::Keys;
use crate::networks::api::reach::{self, ReachQuery};
use crate::networks::{AppPlan, Endpoint, Service, store};
use crate::policy::Target;

struct FlowRow {
    app: String,
    to: String,
    how: String,
}

struct GrantRow {
    id: i64,
    app: String,
    other: String,
    state: String,
    until: String,
}

struct EgressRow {
    name: String,
    place: String,
    reason: String,
    state: String,
    mark: &'static str,
    note: String,
    open: bool,
}

struct DeniedRow {
    target: String,
    at: String,
    why: String,
    ask: String,
}

#[derive(Template)]
#[template(path = "networks/tenant.html")]
pub(super) struct NetworkPage {
    frame: Frame,
    tenant: String,
    error: String,
    manages: bool,
    apps: Vec<String>,
    flows: Vec<FlowRow>,
    flows_in_all: usize,
    in_force: bool,
    trial: String,
    services: Vec<Service>,
    coming: Vec<String>,
    /// API names of the lists that are cut to their first rows.
    long: Vec<&'static str>,
    received: Vec<GrantRow>,
    given: Vec<GrantRow>,
    egress: Vec<EgressRow>,
    plans: Vec<PlanRow>,
    chosen: String,
    denied: Vec<DeniedRow>,
    denied_note: &'static str,
    answer: String,
    asked_to: String,
    asked_port: String,
}

/// `?app=` selects an app's denied connections. With `to` and `port`, the page also says whether the app
/// reaches them.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkPageQuery {
    #[serde(default)]
    app: String,
    #[serde(default)]
    to: String,
    #[serde(default)]
    port: String,
}

/// Maximum number of rows of a list.
const LISTED: i64 = 50;
/// Maximum number of connections.
const SHOWN: usize = 100;

/// The sources of the page's data.
#[derive(Clone)]
pub(super) struct PageSources {
    pub(super) pool: web::Data<PgPool>,
    pub(super) keys: web::Data<Keys>,
    pub(super) config: web::Data<Config>,
    pub(super) driver: web::Data<dyn Driver>,
}

pub(super) async fn view<P>(
    scope: &TenantScope<P>,
    parts: &PageSources,
    look: &NetworkPageQuery,
    error: String,
) -> Result<NetworkPage, Error> {
    let mut conn = db::begin(&parts.pool, scope.tenant.id).await?;
    let tenant = scope.tenant.id;
    let standing = store::find_standing(&mut conn, tenant).await?;
    let services = store::list_given_services(&mut conn, tenant, "", LISTED).await?;
    let coming = store::decided_windows(&mut conn, tenant).await?;
    let received = store::list_received(&mut conn, 0, LISTED).await?;
    let given = store::list_given(&mut conn, tenant, 0, LISTED).await?;
    let egress = store::list_targets(&mut conn, tenant, i64::MAX, LISTED).await?;
    let is_long = |length: usize| i64::try_from(length).is_ok_and(|length| length >= LISTED);
    let trial = store::decided_trial(&mut conn, tenant).await?;
    let plans = store::list_plans(&mut conn, Some(tenant), i64::MAX, 5).await?;
    drop(conn);
    let apps = standing.as_ref().map_or(&[][..], |standing| &standing.apps);
    // Only one app's flows if an app is selected: a tenant may have thousands of apps.
    let chosen = |app: &AppPlan| look.app.is_empty() || app.name.as_str() == look.app;
    let flows = apps.iter().filter(|app| chosen(app)).flat_map(|app| {
        app.flows.iter().map(|flow| FlowRow {
            app: app.name.to_string(),
            to: flow.name.clone(),
            how: match &flow.target {
                Target::App { .. } => format!("an app, {} {}", flow.protocol, flow.port),
                Target::Service { network } => {
                    format!("a service, {network} {} {}", flow.protocol, flow.port)
                }
                Target::Outside { network } => format!("outside, {network} {} {}", flow.protocol, flow.port),
                Target::Domain { domain } => format!("outside, {domain} {} {}", flow.protocol, flow.port),
            },
        })
    });
    let until = |at: Option<time::OffsetDateTime>| at.map_or_else(|| "No expiry".to_owned(), when);
    let mut page = NetworkPage {
        frame: tenant_frame(&parts.keys, scope, "Network"),
        tenant: scope.tenant.name.to_string(),
        error,
        manages: scope.may::<ManageConnections>() && scope.tenant.state == "active",
        apps: apps.iter().map(|app| app.name.to_string()).collect(),
        flows_in_all: apps.iter().filter(|app| chosen(app)).map(|app| app.flows.len()).sum(),
        flows: flows.take(SHOWN).collect(),
        trial: trial.map(when).unwrap_or_default(),
        in_force: standing.as_ref().is_none_or(|standing| standing.in_force),
        long: [
            (is_long(services.len()), "services"),
            (is_long(received.len()), "grants/received"),
            (is_long(given.len()), "grants"),
            (is_long(egress.len()), "egress"),
        ]
        .into_iter()
        .filter_map(|(long, what)| long.then_some(what))
        .collect(),
        coming: coming.iter().map(|(name, ends)| coming_words(name, ends, &services)).collect(),
        services,
        received: received
            .into_iter()
            .map(|row| GrantRow {
                id: row.id,
                app: row.to_app.map_or_else(|| "all apps here".into(), |app| format!("the app {app} here")),
                other: format!("{}/{}", row.tenant, row.app),
                state: row.state,
                until: until(row.expires_at),
            })
            .collect(),
        given: given
            .into_iter()
            .map(|row| GrantRow {
                id: row.id,
                other: row.to_app.map_or_else(|| row.tenant.clone(), |app| format!("{}/{app}", row.tenant)),
                app: row.app,
                state: row.state,
                until: until(row.expires_at),
            })
            .collect(),
        egress: egress.into_iter().map(egress_row).collect(),
        plans: plans.into_iter().map(PlanRow::from).collect(),
        chosen: look.app.clone(),
        denied: Vec::new(),
        denied_note: "Select an app to see its denied connections.",
        answer: String::new(),
        asked_to: look.to.clone(),
        asked_port: look.port.clone(),
    };
    if let Ok(app) = look.app.parse::<AppName>() {
        fill(&mut page, scope, parts, &app, look).await?;
    }
    Ok(page)
}

/// Describes the pending change of a service.
fn coming_words(name: &ServiceName, ends: &[Endpoint], services: &[Service]) -> String {
    let now =
        services.iter().find(|service| service.name == *name).map_or(&[][..], |service| &service.endpoints);
    let list = |ends: Vec<&Endpoint>| {
        let words = ends.iter().map(|end| format!("{} {} {}", end.network, end.protocol, end.port));
        words.collect::<Vec<_>>().join(", ")
    };
    let opens = list(ends.iter().filter(|end| !now.contains(end)).collect());
    let closes = list(now.iter().filter(|end| !ends.contains(end)).collect());
    match (opens.as_str(), closes.as_str()) {
        (_, "") => format!("The service {name} gets the additional endpoints {opens}."),
        ("", _) => format!(
            "The service {name} loses the endpoints {closes}. Connections to them are counted until then."
        ),
        _ => format!(
            "The service {name} moves to {opens} and loses {closes}. Connections to the old endpoints are counted \
             until then."
        ),
    }
}

fn egress_row(row: store::EgressRequest) -> EgressRow {
    let ports: Vec<String> = row.ports.iter().map(ToString::to_string).collect();
    let end = row.expires_at.map(|at| format!(", until {}", when(at))).unwrap_or_default();
    let decided = row.decided_by.map(|by| format!("by {}", who(&by))).unwrap_or_default();
    EgressRow {
        place: format!("{} {} {}{end}", row.place, row.protocol, ports.join(", ")),
        mark: match row.state.as_str() {
            "approved" => "running",
            "asked" => "changing",
            "refused" => "failed",
            _ => "stopped",
        },
        note: [decided, row.note.unwrap_or_default()].join(" ").trim().to_owned(),
        open: ["asked", "approved"].contains(&row.state.as_str()),
        name: row.name,
        reason: row.reason,
        state: row.state,
    }
}

/// Adds the selected app's denied connections and the answer to the reach query.
async fn fill<P>(
    page: &mut NetworkPage,
    scope: &TenantScope<P>,
    parts: &PageSources,
    app: &AppName,
    look: &NetworkPageQuery,
) -> Result<(), Error> {
    let pools = &parts.config.pools;
    match reach::denials(&scope.tenant, &parts.pool, pools, &**parts.driver, app).await {
        Ok(rows) => {
            page.denied_note = "No connection of this app was denied recently.";
            page.denied = rows
                .into_iter()
                .take(50)
                .map(|row| DeniedRow {
                    target: format!("{} {} {}", row.denied.target, row.denied.protocol, row.denied.port),
                    at: when(row.denied.last),
                    why: if row.denied.let_through {
                        format!("allowed in audit mode, denied afterwards: {}", row.closed.why)
                    } else {
                        row.closed.why
                    },
                    ask: row.closed.ask.unwrap_or_default(),
                })
                .collect();
        }
        Err(Error::Unavailable(..)) => page.denied_note = "The agent does not answer. Try again in a moment.",
        Err(Error::NotFound) => page.denied_note = "There is no such app.",
        Err(error) => return Err(error),
    }
    let Ok(port) = look.port.parse() else { return Ok(()) };
    let query = ReachQuery::new(look.to.clone(), port);
    page.answer =
        match reach::resolve(&scope.tenant, &parts.pool, (pools, &**parts.driver), app, &query).await {
            Ok(asked) => asked.words(app, &look.to),
            Err(Error::NotFound) => "There is no such app.".into(),
            Err(Error::Malformed(why)) => why,
            Err(error) => return Err(error),
        };
    Ok(())
}

/// GET /tenants/{tenant}/network
pub async fn network_page(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    keys: web::Data<Keys>,
    config: web::Data<Config>,
    driver: web::Data<dyn Driver>,
    look: web::Query<NetworkPageQuery>,
) -> Result<HttpResponse, Error> {
    let parts = PageSources { pool, keys, config, driver };
    html::page(&view(&scope, &parts, &look, String::new()).await?)
}
