//! Whether an app can reach a destination, and which of its packets were denied.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::Ipv4Addr;

use actix_web::{HttpResponse, web};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::{PgConnection, PgPool};

use crate::access::{Deploy, ReadTenant, TenantRef, TenantScope};
use crate::apps::api::AppPath;
use crate::apps::connections::{find_at, find_id, list_connecting_of};
use crate::config::{Config, Pools};
use crate::db;
use crate::driver::workload::Subnet;
use crate::driver::{Denied, Driver, Probe, ProbeOutcome, ProbeTarget};
use crate::error::Error;
use crate::http::asked::Query;
use crate::ids::{AppId, AppName, DomainName, TenantName};
use crate::networks::explain::{self, AddressFacts, Closed, To};
use crate::networks::{AppPlan, connections, store};
use crate::policy::never::Range;
use crate::policy::{Protocol, Target};
use crate::tenants;

/// `?to=NAME or ADDRESS&port=&protocol=`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReachQuery {
    to: String,
    port: u16,
    #[serde(default)]
    protocol: Option<String>,
}

/// Reads the facts that are the same for every address.
async fn around(
    conn: &mut PgConnection,
    tenant: &TenantRef,
    pools: &Pools,
    closed: Vec<Range>,
) -> Result<AddressFacts, Error> {
    let number = tenants::tenant_network(conn, tenant.id).await?;
    let subnet = pools.subnet(number).ok_or_else(|| Error::internal("a network beyond the pool"))?;
    let services = store::list_given_services(conn, tenant.id, "", 200).await?;
    Ok(AddressFacts { pool: connections::pool(pools), subnet, app: None, services, closed })
}

/// Returns the machine's reserved ranges. They are empty while the agent does not answer.
async fn closed(driver: &dyn Driver) -> Vec<Range> {
    driver.walls().await.unwrap_or_default().ranges()
}

/// Returns the tenant's own app at an address, if any.
async fn owner(
    conn: &mut PgConnection,
    tenant: &TenantRef,
    subnet: Subnet,
    target: Ipv4Addr,
) -> Result<Option<(AppId, AppName)>, Error> {
    if !subnet.contains(target) {
        return Ok(None);
    }
    find_at(conn, tenant.id, i64::from(target.to_bits()) - i64::from(subnet.address().to_bits())).await
}

#[derive(Serialize)]
struct Reach {
    open: bool,
    plan: i64,
    in_force: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    through: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", flatten)]
    closed: Option<Closed>,
}

/// Returns a name as `connects` spells it: the tenant's own app has no tenant prefix there.
fn own_name(tenant: &TenantName, to: &str) -> String {
    match to.split_once('/') {
        Some((prefix, app)) if prefix == tenant.as_str() => app.to_owned(),
        _ => to.to_owned(),
    }
}

/// A resolved query.
pub(in crate::networks) struct ResolvedReachQuery {
    app: AppId,
    protocol: Protocol,
    port: u16,
    reach: Reach,
    /// The destination of a probe; `None` for a name without an address.
    target: Option<ProbeTarget>,
}

pub(in crate::networks) async fn resolve(
    tenant: &TenantRef,
    pool: &PgPool,
    (pools, driver): (&Pools, &dyn Driver),
    name: &AppName,
    query: &ReachQuery,
) -> Result<ResolvedReachQuery, Error> {
    let protocol = match query.protocol.as_deref() {
        None => Protocol::Tcp,
        Some(text) => {
            Protocol::parse(text).ok_or_else(|| Error::Malformed("protocol is tcp or udp".into()))?
        }
    };
    let port = query.port;
    let to = match query.to.parse::<Ipv4Addr>() {
        Ok(address) => To::Address(address),
        Err(_) if query.to.len() <= 100 => To::Name(own_name(&tenant.name, &query.to)),
        Err(_) => return Err(Error::Malformed("to is a name under connects, or an IPv4 address".into())),
    };
    let configured = match to {
        To::Address(_) => closed(driver).await,
        To::Name(_) => Vec::new(),
    };
    let mut conn = db::begin(pool, tenant.id).await?;
    let app = find_id(&mut conn, tenant.id, name).await?.ok_or(Error::NotFound)?;
    let standing = store::find_standing(&mut conn, tenant.id).await?;
    let (plan, in_force) =
        standing.as_ref().map_or((0, false), |standing| (standing.number, standing.in_force));
    let empty = AppPlan { app, name: name.clone(), flows: Vec::new() };
    let own =
        standing.iter().flat_map(|standing| &standing.apps).find(|own| own.app == app).unwrap_or(&empty);
    let (at, closed) = match &to {
        To::Address(target) => {
            let around = around(&mut conn, tenant, pools, configured).await?;
            let owner = owner(&mut conn, tenant, around.subnet, *target).await?;
            let at = owner.as_ref().map(|(id, _)| *id);
            let known = AddressFacts { app: owner.map(|(_, name)| name), ..around };
            (at, explain::address(*target, protocol, port, &known))
        }
        To::Name(to) => {
            let apps = list_connecting_of(&mut conn, &[(tenant.id, app)]).await?;
            let asks = apps.first().is_some_and(|own| own.connects.names(to));
            (None, name_closed(own, to, asks, (protocol, port)))
        }
    };
    let flow = explain::flow(own, &to, (protocol, port), at.map(|at| (&tenant.name, at)));
    let through = flow.map(|flow| flow.name.clone());
    // Traffic that never leaves the app is not subject to policy.
    let inside = matches!(&to, To::Address(to) if to.is_loopback() || to.is_unspecified());
    let itself = match &to {
        To::Name(to) => to == name.as_str(),
        To::Address(_) => at == Some(app) || inside,
    };
    let on_trial = standing.as_ref().is_some_and(|standing| standing.trial.is_some());
    let (through, closed) = match &to {
        _ if itself => {
            (Some("itself: an app's traffic to itself does not leave its own network".to_owned()), closed)
        }
        To::Name(_) => (through, closed),
        // Only the agent knows a domain's addresses, other tenants' instances, and the effect of audit mode.
        To::Address(address) => {
            drop(conn);
            let target = ProbeTarget::Address(*address);
            let probe = Probe { tenant: tenant.name.clone(), app, target, protocol, port, platform: false };
            let permits = driver.permits(&probe).await.ok().flatten();
            conn = db::begin(pool, tenant.id).await?;
            match (through, permits) {
                (Some(_), Some(false)) if in_force => {
                    let why = if at.is_some() {
                        "the plan allows the app that owns this address, but no instance has the address now"
                    } else {
                        "the plan allows it, but the machine denies it: the machine has this address now, or its \
                         configuration blocks it"
                    };
                    (None, Closed { why: why.to_owned(), ask: None })
                }
                (None, Some(true)) => (Some(explain::unnamed(own, protocol, port, on_trial)), closed),
                (through, _) => (through, closed),
            }
        }
    };
    let target = match (&to, own.flows.iter().find(|flow| To::Name(flow.name.clone()) == to)) {
        (To::Address(_), _) if inside => None,
        (To::Address(address), _) => Some(ProbeTarget::Address(*address)),
        (To::Name(_), Some(flow)) => match &flow.target {
            Target::App { tenant, app } => Some(ProbeTarget::App { tenant: tenant.clone(), app: *app }),
            Target::Service { network } | Target::Outside { network } => {
                Some(ProbeTarget::Address(Ipv4Addr::from_bits(network.first())))
            }
            Target::Domain { .. } => None,
        },
        (To::Name(_), None) if itself => Some(ProbeTarget::App { tenant: tenant.name.clone(), app }),
        // For the tenant's own app that is not named, a probe shows that it is denied.
        (To::Name(name), None) => match name.parse() {
            Ok(name) => find_id(&mut conn, tenant.id, &name)
                .await?
                .map(|app| ProbeTarget::App { tenant: tenant.name.clone(), app }),
            Err(_) => None,
        },
    };
    let closed = if through.is_some() { None } else { Some(closed) };
    let reach = Reach { open: through.is_some(), plan, in_force, through, closed };
    Ok(ResolvedReachQuery { app, protocol, port, reach, target })
}

impl ReachQuery {
    /// Over TCP.
    pub(in crate::networks) fn new(to: String, port: u16) -> Self {
        Self { to, port, protocol: None }
    }
}

impl ResolvedReachQuery {
    /// Returns the answer as a sentence.
    pub(in crate::networks) fn words(&self, app: &AppName, to: &str) -> String {
        let port = self.port;
        match (&self.reach.through, &self.reach.closed) {
            (Some(name), _) => format!("Open: {app} may connect to {to} on port {port}, through {name}."),
            (None, Some(Closed { why, ask: Some(ask) })) => format!("Denied: {why}. To allow it: {ask}."),
            (None, Some(Closed { why, .. })) => format!("Denied: {why}."),
            (None, None) => "Denied.".to_owned(),
        }
    }
}

/// GET /api/v1/tenants/{tenant}/apps/{app}/reach: answers from the current plan.
pub async fn get_reach(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    config: web::Data<Config>,
    driver: web::Data<dyn Driver>,
    path: web::Path<AppPath>,
    query: Query<ReachQuery>,
) -> Result<HttpResponse, Error> {
    let place = (&config.pools, &**driver);
    let asked = resolve(&scope.tenant, &pool, place, &path.name()?, &query).await?;
    Ok(HttpResponse::Ok().json(asked.reach))
}

#[derive(Serialize)]
struct ProbedReach {
    #[serde(flatten)]
    reach: Reach,
    probe: &'static str,
    words: String,
    agrees: bool,
}

/// POST /api/v1/tenants/{tenant}/apps/{app}/reach: the same, and probes it from inside an instance of the
/// app.
pub async fn post_reach(
    scope: TenantScope<Deploy>,
    pool: web::Data<PgPool>,
    config: web::Data<Config>,
    driver: web::Data<dyn Driver>,
    path: web::Path<AppPath>,
    query: Query<ReachQuery>,
) -> Result<HttpResponse, Error> {
    let ResolvedReachQuery { app, protocol, port, reach, target } =
        resolve(&scope.tenant, &pool, (&config.pools, &**driver), &path.name()?, &query).await?;
    // A domain has no address until an app looks it up, and neither has an unknown name: the plan's answer
    // stands.
    let Some(target) = target else {
        let words = match query.to.parse::<Ipv4Addr>() {
            Ok(_) => "not tested: traffic to this address never leaves the app".to_owned(),
            Err(_) => "not tested: this name has no address here. Use an address to test".to_owned(),
        };
        return Ok(HttpResponse::Ok().json(ProbedReach { reach, probe: "none", words, agrees: true }));
    };
    let probe = Probe { tenant: scope.tenant.name.clone(), app, target, protocol, port, platform: false };
    let outcome = driver.probe(&probe).await.map_err(|error| match error {
        crate::driver::Error::Rejected(why) => Error::Conflict(why),
        error => away(error),
    })?;
    let word = match outcome {
        ProbeOutcome::Reached => "reached",
        ProbeOutcome::Opened => "opened",
        ProbeOutcome::Refused => "refused",
        ProbeOutcome::Prohibited => "prohibited",
        ProbeOutcome::Unreachable => "unreachable",
        ProbeOutcome::Silent => "silent",
    };
    let agrees = reach.open == outcome.is_through();
    Ok(HttpResponse::Ok().json(ProbedReach { reach, probe: word, words: outcome.to_string(), agrees }))
}

fn away(error: crate::driver::Error) -> Error {
    tracing::warn!(%error, "the agent does not answer");
    Error::Unavailable("the agent does not answer".into(), std::time::Duration::from_secs(5))
}

fn name_closed(plan: &AppPlan, name: &str, asks: bool, (protocol, port): (Protocol, u16)) -> Closed {
    let ports: Vec<String> = plan
        .flows
        .iter()
        .filter(|flow| flow.name == name)
        .map(|flow| format!("{} {}", flow.protocol, flow.port))
        .collect();
    if ports.is_empty() {
        let closed = |why: String, ask: &str| Closed { why, ask: Some(ask.to_owned()) };
        return if asks {
            closed(
                format!(
                    "the app names {name}, but service access, a grant or an approval is missing or has ended"
                ),
                "ask the platform's admin for a service or an egress target, the owner of an app for a grant",
            )
        } else if name.parse::<DomainName>().is_ok() {
            closed(
                format!("a domain outside the platform; there is no approved egress target {name}"),
                "request an egress target for this domain; once it is approved, name it in connects.egress",
            )
        } else {
            closed(
                format!("the app does not name {name} under connects"),
                "name it under connects; the response to the deploy lists any missing access",
            )
        };
    }
    Closed { why: format!("{name} is allowed on {}, not on {protocol} {port}", ports.join(", ")), ask: None }
}

/// Maximum number of denied packets in an answer, the newest.
const DENIED: usize = 100;

#[derive(Serialize)]
pub(in crate::networks) struct DeniedView {
    #[serde(flatten)]
    pub(in crate::networks) denied: Denied,
    #[serde(flatten)]
    pub(in crate::networks) closed: Closed,
}

/// GET /api/v1/tenants/{tenant}/apps/{app}/denied: recently denied packets, the newest first, at most 100.
pub async fn get_denied(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    config: web::Data<Config>,
    driver: web::Data<dyn Driver>,
    path: web::Path<AppPath>,
) -> Result<HttpResponse, Error> {
    let items = denials(&scope.tenant, &pool, &config.pools, &**driver, &path.name()?).await?;
    Ok(HttpResponse::Ok().json(json!({"items": items, "next": null})))
}

/// Returns an app's recently denied packets, each with the reason.
pub(in crate::networks) async fn denials(
    tenant: &TenantRef,
    pool: &PgPool,
    pools: &Pools,
    driver: &dyn Driver,
    app: &AppName,
) -> Result<Vec<DeniedView>, Error> {
    let mut conn = db::begin(pool, tenant.id).await?;
    let app = find_id(&mut conn, tenant.id, app).await?.ok_or(Error::NotFound)?;
    drop(conn);
    let denied = driver.denied(&tenant.name, app).await.map_err(away)?;
    let configured = closed(driver).await;
    let mut conn = db::begin(pool, tenant.id).await?;
    let mut known = around(&mut conn, tenant, pools, configured).await?;
    let standing = store::find_standing(&mut conn, tenant.id).await?;
    let plan = standing.iter().flat_map(|standing| &standing.apps).find(|own| own.app == app);
    let mut owners = HashMap::new();
    let mut items = Vec::new();
    for denied in denied.into_iter().take(DENIED) {
        let owner = match owners.entry(denied.target) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                entry.insert(owner(&mut conn, tenant, known.subnet, denied.target).await?)
            }
        };
        let at = owner.as_ref().map(|(id, _)| (&tenant.name, *id));
        let place = (&To::Address(denied.target), (denied.protocol, denied.port));
        let flow = plan.and_then(|plan| explain::flow(plan, place.0, place.1, at));
        known.app = owner.as_ref().map(|(_, name)| name.clone());
        let closed = match flow {
            _ if denied.hasty => explain::hasty(),
            Some(flow) => explain::allowed(&flow.name, at.is_some()),
            None => explain::address(denied.target, denied.protocol, denied.port, &known),
        };
        items.push(DeniedView { denied, closed });
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_tenant_before_a_name_is_the_same_as_none() {
        let tenant = "acme".parse().unwrap();
        for (to, name) in [
            ("web", "web"),
            ("acme/web", "web"),
            ("globex/web", "globex/web"),
            ("acme-2/web", "acme-2/web"),
            ("pay.example.org", "pay.example.org"),
        ] {
            assert_eq!(own_name(&tenant, to), name);
        }
    }
}
