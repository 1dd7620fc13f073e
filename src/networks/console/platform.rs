//! The platform's network page: pending requests, the catalogue, all tenants' plans, reserved ranges.

use actix_web::{HttpResponse, web};
use askama::Template;
use serde::Deserialize;
use sqlx::PgPool;

use super::PlanRow;
use super::decide::days;
use super::rollout::RolloutRow;
use crate::access::console::{after, platform_frame, when, who};
use crate::access::extract::{PlatformScope, Posted};
use crate::access::{Actor, ManageNetwork, ReadPlatform, TenantRef, includes};
use crate::apps::{MachineEvent, list_machine_events};
use crate::db::{self, Page, PageQuery, Within};
use crate::driver::Driver;
use crate::error::Error;
use crate::http::html::{self, Frame};
use crate::ids::{EgressName, TenantName};
use crate::keys::Keys;
use crate::networks::actions::{self, Decision};
use crate::networks::{Service, store};
use crate::policy::never::{self, BUILT_IN, Range, ReservedKind};
use crate::reconcile::Waker;
use crate::tenants;

const PLACE: &str = "/network";
/// Maximum number of rows of a list on the first page.
const SHOWN: i64 = 20;

/// Truncates a list that was read with one row more than is shown. Returns whether it was longer.
fn cut<T>(rows: &mut Vec<T>) -> bool {
    let shown = usize::try_from(SHOWN).unwrap_or(usize::MAX);
    let more = rows.len() > shown;
    rows.truncate(shown);
    more
}

struct WaitingRow {
    id: i64,
    tenant: String,
    name: String,
    place: String,
    reason: String,
    by: String,
}

struct ListenerRow {
    at: String,
    program: String,
    state: &'static str,
    mark: &'static str,
    remedy: String,
}

struct RolloutEventRow {
    at: String,
    text: String,
    mark: &'static str,
    word: &'static str,
}

impl From<MachineEvent> for RolloutEventRow {
    fn from(event: MachineEvent) -> Self {
        let (mark, word) = match event.kind.as_str() {
            "probe_alarm" => ("failed", "Alarm"),
            "probe_failed" | "plan_refused" | "flow_left_out" | "connections_crowded" => {
                ("attention", "Warning")
            }
            "firewall_repaired" | "neighbours_repaired" => ("attention", "Repaired"),
            _ => ("stopped", "Note"),
        };
        Self { at: when(event.at), text: event.text, mark, word }
    }
}

/// Lists the sockets that listen on the machine, and whether tenants can reach them.
async fn host(driver: &dyn Driver) -> (Vec<ListenerRow>, &'static str) {
    let Ok(listeners) = driver.listeners().await else {
        return (Vec::new(), "The agent does not answer. Try again in a moment.");
    };
    let rows = listeners.into_iter().map(|listener| {
        let (state, mark) = match listener.answers {
            Some(true) if listener.names => ("Name server, open to tenants", "running"),
            Some(true) => ("Open to tenants", "failed"),
            Some(false) => ("Closed, tested from inside an app", "running"),
            None => ("Closed by plan", "running"),
        };
        let remedy =
            match (listener.answers.map(|answers| answers && !listener.names), listener.unit.as_str()) {
                (Some(true), "") => "Stop this program, or let it listen only on loopback".to_owned(),
                (Some(true), unit) => format!("systemctl disable --now {unit}"),
                _ => String::new(),
            };
        let at = format!("{} {} {}", listener.address, listener.protocol, listener.port);
        let program = [listener.program, listener.unit].join(" ").trim().to_owned();
        ListenerRow { at, program, state, mark, remedy }
    });
    (rows.collect(), "No program listens on an address other than loopback.")
}

#[derive(Template)]
#[template(path = "networks/platform.html")]
pub(super) struct PlatformPage {
    frame: Frame,
    listeners: Vec<ListenerRow>,
    host_note: &'static str,
    error: String,
    manages: bool,
    waiting: Vec<WaitingRow>,
    more_waiting: bool,
    more_services: bool,
    services: Vec<Service>,
    rollouts: Vec<RolloutRow>,
    events: Vec<RolloutEventRow>,
    plans: Vec<PlanRow>,
    next: String,
    walls: Vec<Range>,
}

pub(super) async fn view(
    actor: &Actor,
    pool: &PgPool,
    (keys, driver): (&Keys, &dyn Driver),
    query: &PageQuery,
    error: String,
) -> Result<PlatformPage, Error> {
    let (limit, before) = (query.limit()?.min(SHOWN), query.after_number(i64::MAX)?);
    let mut conn = db::begin(pool, Within::Platform).await?;
    let mut waiting = store::list_waiting(&mut conn, 0, SHOWN + 1).await?;
    let mut services = store::list_services(&mut conn, "", SHOWN + 1).await?;
    let (more_waiting, more_services) = (cut(&mut waiting), cut(&mut services));
    let rollouts = store::list_rollouts(&mut conn, i64::MAX, 5).await?;
    let events = list_machine_events(&mut conn, i64::MAX, 10).await?;
    let plans = store::list_plans(&mut conn, None, before, limit + 1).await?;
    let page = Page::new(plans, limit, |plan| plan.number);
    drop(conn);
    let (listeners, host_note) = host(driver).await;
    let closed = driver.walls().await.unwrap_or_default().closed;
    Ok(PlatformPage {
        listeners,
        host_note,
        frame: platform_frame(keys, actor, "Network"),
        error,
        manages: includes::<ManageNetwork>(actor.platform, None),
        waiting: waiting
            .into_iter()
            .map(|row| {
                let ports: Vec<String> = row.ports.iter().map(ToString::to_string).collect();
                let end = row.expires_at.map(|at| format!(", until {}", when(at))).unwrap_or_default();
                WaitingRow {
                    id: row.id,
                    place: format!("{} {} {}{end}", row.place, row.protocol, ports.join(", ")),
                    by: format!("{}, {}", who(&row.asked_by), when(row.asked_at)),
                    tenant: row.tenant,
                    name: row.name,
                    reason: row.reason,
                }
            })
            .collect(),
        more_waiting,
        more_services,
        services,
        events: events.into_iter().map(RolloutEventRow::from).collect(),
        rollouts: rollouts.iter().map(RolloutRow::from).collect(),
        plans: page.items.into_iter().map(PlanRow::from).collect(),
        next: page.next.unwrap_or_default(),
        walls: closed.into_iter().map(never::configured).chain(BUILT_IN.iter().copied()).collect(),
    })
}

/// GET /network
pub async fn network_page(
    scope: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    keys: web::Data<Keys>,
    driver: web::Data<dyn Driver>,
    query: web::Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    html::page(&view(&scope.actor, &pool, (&keys, &**driver), &query, String::new()).await?)
}

#[derive(Template)]
#[template(path = "networks/services.html")]
struct ServicesPage {
    frame: Frame,
    services: Vec<Service>,
    next: String,
}

/// GET /network/services: all services, by name.
pub async fn services_page(
    scope: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    keys: web::Data<Keys>,
    query: web::Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let rows = store::list_services(&mut conn, &query.after_text()?, limit + 1).await?;
    drop(conn);
    let page = Page::new(rows, limit, |row| row.name.clone());
    html::page(&ServicesPage {
        frame: platform_frame(&keys, &scope.actor, "Network"),
        services: page.items,
        next: page.next.unwrap_or_default(),
    })
}

/// The form that decides a request.
#[derive(Deserialize)]
pub struct RequestDecisionForm {
    id: i64,
    tenant: String,
    name: String,
    what: String,
    #[serde(default)]
    note: String,
    #[serde(default)]
    days: String,
}

/// POST /network/egress/decision
pub async fn decide(
    scope: PlatformScope<ManageNetwork>,
    driver: web::Data<dyn Driver>,
    pool: web::Data<PgPool>,
    keys: web::Data<Keys>,
    waker: web::Data<Waker>,
    form: Posted<RequestDecisionForm>,
) -> Result<HttpResponse, Error> {
    let RequestDecisionForm { id: asked, tenant, name, what, note, days: wanted } = &form.0;
    let make = async {
        let tenant: TenantName = tenant.parse().map_err(|_| Error::NotFound)?;
        let name: EgressName = name.parse().map_err(|_| Error::NotFound)?;
        if note.chars().count() > 500 {
            return Err(Error::Conflict("a note has at most 500 characters".into()));
        }
        let mut conn = pool.acquire().await?;
        let id = tenants::id_of(&mut conn, &tenant).await?.ok_or(Error::NotFound)?;
        let state = tenants::tenant_state(&mut conn, id).await?;
        drop(conn);
        let tenant = TenantRef { id, name: tenant, state };
        let note = Some(note.trim().to_owned()).filter(|note| !note.is_empty());
        let decision = Decision { id: *asked, approved: what == "approve", note, days: days(wanted)? };
        actions::decide(&pool, &waker, scope.by(), &tenant, &name, &decision).await
    };
    let outcome = make.await;
    let again =
        async |error| view(&scope.actor, &pool, (&keys, &**driver), &PageQuery::default(), error).await;
    after(PLACE, outcome, again).await
}
