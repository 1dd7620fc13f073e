//! A tenant's network: who may talk to whom, what was refused and why, and the requests that would open it.

use actix_web::{HttpRequest, HttpResponse, web};
use askama::Template;
use serde::Deserialize;
use sqlx::PgPool;

use super::PlanRow;
use crate::access::console::{after, tenant_frame, when, who};
use crate::access::extract::{Posted, TenantScope};
use crate::access::idempotency::Once;
use crate::access::{ManageConnections, ReadTenant};
use crate::config::Config;
use crate::db;
use crate::driver::Driver;
use crate::error::Error;
use crate::http::html::{self, Frame};
use crate::ids::{AppName, EgressName};
use crate::keys::Keys;
use crate::networks::api::egress::{WishBody, check_wish};
use crate::networks::api::grants::check_offer;
use crate::networks::api::reach::{self, ReachQuery};
use crate::networks::{Service, actions, store};
use crate::policy::Target;
use crate::reconcile::Waker;

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
struct NetworkPage {
    frame: Frame,
    tenant: String,
    error: String,
    manages: bool,
    apps: Vec<String>,
    flows: Vec<FlowRow>,
    in_force: bool,
    services: Vec<Service>,
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

/// `?app=`: whose refusals; with `to` and `port`: whether it gets there.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Look {
    #[serde(default)]
    app: String,
    #[serde(default)]
    to: String,
    #[serde(default)]
    port: String,
}

/// What the page is made from.
#[derive(Clone)]
struct Parts {
    pool: web::Data<PgPool>,
    keys: web::Data<Keys>,
    config: web::Data<Config>,
    driver: web::Data<dyn Driver>,
}

async fn view<P>(
    scope: &TenantScope<P>,
    parts: &Parts,
    look: &Look,
    error: String,
) -> Result<NetworkPage, Error> {
    let mut conn = db::begin(&parts.pool, scope.tenant.id).await?;
    let tenant = scope.tenant.id;
    let standing = store::find_standing(&mut conn, tenant).await?;
    let services = store::list_services(&mut conn, "", 200).await?;
    let received = store::list_received(&mut conn, 0, 200).await?;
    let given = store::list_given(&mut conn, tenant, 0, 200).await?;
    let egress = store::list_targets(&mut conn, tenant, i64::MAX, 50).await?;
    let plans = store::list_plans(&mut conn, Some(tenant), i64::MAX, 5).await?;
    drop(conn);
    let apps = standing.as_ref().map_or(&[][..], |standing| &standing.apps);
    let flows = apps.iter().flat_map(|app| {
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
    let until = |at: Option<time::OffsetDateTime>| at.map_or_else(|| "no end".to_owned(), when);
    let mut page = NetworkPage {
        frame: tenant_frame(&parts.keys, scope, "Network"),
        tenant: scope.tenant.name.to_string(),
        error,
        manages: scope.may::<ManageConnections>() && scope.tenant.state == "active",
        apps: apps.iter().map(|app| app.name.to_string()).collect(),
        flows: flows.collect(),
        in_force: standing.as_ref().is_none_or(|standing| standing.in_force),
        services,
        received: received
            .into_iter()
            .map(|row| GrantRow {
                id: row.id,
                app: row.to_app.map_or_else(|| "every app here".into(), |app| format!("the app {app} here")),
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
        denied_note: "Choose an app to see what it tried in vain.",
        answer: String::new(),
        asked_to: look.to.clone(),
        asked_port: look.port.clone(),
    };
    if let Ok(app) = look.app.parse::<AppName>() {
        fill(&mut page, scope, parts, &app, look).await?;
    }
    Ok(page)
}

fn egress_row(row: store::Target) -> EgressRow {
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

/// What is asked about one app.
async fn fill<P>(
    page: &mut NetworkPage,
    scope: &TenantScope<P>,
    parts: &Parts,
    app: &AppName,
    look: &Look,
) -> Result<(), Error> {
    let pools = &parts.config.pools;
    match reach::denials(&scope.tenant, &parts.pool, pools, &**parts.driver, app).await {
        Ok(rows) => {
            page.denied_note = "Nothing was refused lately.";
            page.denied = rows
                .into_iter()
                .take(50)
                .map(|row| DeniedRow {
                    target: format!("{} {} {}", row.denied.target, row.denied.protocol, row.denied.port),
                    at: when(row.denied.last),
                    why: row.closed.why,
                    ask: row.closed.ask.unwrap_or_default(),
                })
                .collect();
        }
        Err(Error::Unavailable(..)) => page.denied_note = "The agent does not answer; try again in a moment.",
        Err(Error::NotFound) => page.denied_note = "There is no such app.",
        Err(error) => return Err(error),
    }
    let Ok(port) = look.port.parse() else { return Ok(()) };
    let query = ReachQuery::new(look.to.clone(), port);
    page.answer = match reach::resolve(&scope.tenant, &parts.pool, pools, app, &query).await {
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
    look: web::Query<Look>,
) -> Result<HttpResponse, Error> {
    let parts = Parts { pool, keys, config, driver };
    html::page(&view(&scope, &parts, &look, String::new()).await?)
}

async fn done<P>(
    scope: &TenantScope<P>,
    req: &HttpRequest,
    outcome: Result<(), Error>,
) -> Result<HttpResponse, Error> {
    let data = || Error::internal("a part is missing");
    let parts = Parts {
        pool: req.app_data::<web::Data<PgPool>>().ok_or_else(data)?.clone(),
        keys: req.app_data::<web::Data<Keys>>().ok_or_else(data)?.clone(),
        config: req.app_data::<web::Data<Config>>().ok_or_else(data)?.clone(),
        driver: req.app_data::<web::Data<dyn Driver>>().ok_or_else(data)?.clone(),
    };
    let again = async |error| view(scope, &parts, &Look::default(), error).await;
    after(&format!("/tenants/{}/network", scope.tenant.name), outcome, again).await
}

/// A grant to be offered.
#[derive(Deserialize)]
pub struct OfferForm {
    app: String,
    tenant: String,
    #[serde(default)]
    to_app: String,
    #[serde(default)]
    days: String,
}

/// An optional number of days, as a form has it.
pub(super) fn days(text: &str) -> Result<Option<i32>, Error> {
    match text.trim() {
        "" => Ok(None),
        text => text
            .parse()
            .map(Some)
            .map_err(|_| Error::Conflict("days is a whole number, or empty for no end".into())),
    }
}

/// POST /tenants/{tenant}/network/grants
pub async fn offer(
    scope: TenantScope<ManageConnections>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    form: Posted<OfferForm>,
) -> Result<HttpResponse, Error> {
    let make = async {
        let OfferForm { app, tenant, to_app, days: wanted } = &form.0;
        let to_app = Some(to_app.as_str()).filter(|name| !name.is_empty());
        let offer = check_offer(app, tenant, to_app, days(wanted)?)?;
        let once = Once::of(&req, &[])?;
        actions::offer(&pool, scope.by(), &once, &scope.tenant, &offer).await.map(drop)
    };
    let outcome = make.await;
    done(&scope, &req, outcome).await
}

/// Which grant.
#[derive(Deserialize)]
pub struct GrantForm {
    id: i64,
}

/// POST /tenants/{tenant}/network/grants/acceptance
pub async fn accept(
    scope: TenantScope<ManageConnections>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    form: Posted<GrantForm>,
) -> Result<HttpResponse, Error> {
    let outcome = actions::accept(&pool, &waker, scope.by(), &scope.tenant, form.0.id).await;
    done(&scope, &req, outcome).await
}

/// POST /tenants/{tenant}/network/grants/end
pub async fn end(
    scope: TenantScope<ManageConnections>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    form: Posted<GrantForm>,
) -> Result<HttpResponse, Error> {
    let outcome = actions::end(&pool, &waker, scope.by(), &scope.tenant, form.0.id).await;
    done(&scope, &req, outcome).await
}

/// A place outside to be asked for.
#[derive(Deserialize)]
pub struct EgressForm {
    name: String,
    #[serde(default)]
    network: String,
    #[serde(default)]
    protocol: String,
    #[serde(default)]
    ports: String,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    days: String,
}

impl EgressForm {
    fn name(&self) -> Result<EgressName, Error> {
        self.name.trim().parse().map_err(|error: crate::ids::NameError| Error::Conflict(error.to_string()))
    }
}

/// POST /tenants/{tenant}/network/egress
pub async fn ask(
    scope: TenantScope<ManageConnections>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    config: web::Data<Config>,
    driver: web::Data<dyn Driver>,
    form: Posted<EgressForm>,
) -> Result<HttpResponse, Error> {
    let make = async {
        let ports = form.0.ports.split([',', ' ']).filter(|port| !port.is_empty()).map(str::parse);
        let ports = ports
            .collect::<Result<_, _>>()
            .map_err(|_| Error::Conflict("ports are numbers, such as 443".into()))?;
        // Digits, dots and a slash are addresses; a name has a letter.
        let place = form.0.network.trim().to_owned();
        let is_name = place.contains(|c: char| c.is_ascii_alphabetic());
        let (network, domain) = if is_name { (String::new(), place) } else { (place, String::new()) };
        let input = WishBody {
            network,
            domain,
            protocol: form.0.protocol.clone(),
            ports,
            reason: form.0.reason.clone(),
            days: days(&form.0.days)?,
        };
        let wish = check_wish(form.0.name()?, input, (&config, &**driver)).await?;
        actions::ask(&pool, scope.by(), &scope.tenant, &wish).await.map(drop)
    };
    let outcome = make.await;
    done(&scope, &req, outcome).await
}

/// POST /tenants/{tenant}/network/egress/withdrawal
pub async fn withdraw(
    scope: TenantScope<ManageConnections>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    form: Posted<EgressForm>,
) -> Result<HttpResponse, Error> {
    let outcome = match form.0.name() {
        Ok(name) => actions::withdraw_target(&pool, &waker, scope.by(), &scope.tenant, &name).await,
        Err(error) => Err(error),
    };
    done(&scope, &req, outcome).await
}
