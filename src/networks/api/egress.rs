//! Egress targets over the API.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::json;
use sqlx::PgPool;

use super::NamePath;
use crate::access::{ManageConnections, ManageNetwork, PlatformScope, ReadPlatform, ReadTenant, TenantScope};
use crate::config::Config;
use crate::db::{self, Page, PageQuery, Within};
use crate::driver::Driver;
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::http::asked::{Body, Query};
use crate::http::parse_json;
use crate::ids::EgressName;
use crate::networks::actions::{self, Decision};
use crate::networks::store::NewEgressRequest;
use crate::networks::{EgressTarget, check_network, store};
use crate::policy::Protocol;
use crate::policy::never::against_outside;
use crate::reconcile::Waker;

fn tcp() -> String {
    "tcp".into()
}

/// The body of a request for an egress target.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::networks) struct WishBody {
    #[serde(default)]
    pub(in crate::networks) network: String,
    #[serde(default)]
    pub(in crate::networks) domain: String,
    #[serde(default = "tcp")]
    pub(in crate::networks) protocol: String,
    pub(in crate::networks) ports: Vec<u16>,
    pub(in crate::networks) reason: String,
    pub(in crate::networks) days: Option<i32>,
}

/// Validates the body.
pub(in crate::networks) async fn check_wish(
    name: EgressName,
    input: WishBody,
    (config, driver): (&Config, &dyn Driver),
) -> Result<NewEgressRequest, Error> {
    let mut faults = Vec::new();
    let fault = |path: &str, message: &str| Fault::new(Code(426), Kind::Invalid, path, message);
    let place = match (input.network.as_str(), input.domain.as_str()) {
        (network, "") if !network.is_empty() => {
            super::parse(network, "network", &mut faults).map(EgressTarget::Network)
        }
        ("", domain) if !domain.is_empty() => {
            super::parse(domain, "domain", &mut faults).map(EgressTarget::Domain)
        }
        _ => {
            faults.push(fault("network", "a target has either a network or a domain"));
            None
        }
    };
    let protocol = Protocol::parse(&input.protocol);
    if protocol.is_none() {
        faults.push(fault("protocol", "protocol is tcp or udp"));
    }
    let mut ports = input.ports;
    ports.sort_unstable();
    ports.dedup();
    if ports.is_empty() || ports.len() > 16 || ports[0] == 0 {
        faults.push(fault("ports", "1 to 16 ports, each 1 to 65535"));
    }
    let reason = input.reason.trim().to_owned();
    if !(1..=500).contains(&reason.chars().count()) {
        faults
            .push(fault("reason", "give the reason in 1 to 500 characters: the admin who decides reads it"));
    }
    super::days(input.days, &mut faults);
    if let Some(EgressTarget::Network(network)) = place {
        let (tenants, own) = super::walls(config, driver).await;
        faults.extend(check_network(network, "network", against_outside(network, &own), tenants).err());
        if network.prefix() < 8 {
            faults.push(fault(
                "network",
                "the prefix of a network is at least 8, which is 16 million addresses",
            ));
        }
    }
    match (place, protocol) {
        (Some(place), Some(protocol)) if faults.is_empty() => {
            Ok(NewEgressRequest { name, place, protocol, ports, reason, days: input.days })
        }
        _ => Err(Error::Invalid(faults)),
    }
}

/// PUT /api/v1/tenants/{tenant}/egress/{name}: requests a target.
pub async fn ask(
    scope: TenantScope<ManageConnections>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    places: (web::Data<Config>, web::Data<dyn Driver>),
    path: web::Path<NamePath>,
    body: Body,
) -> Result<HttpResponse, Error> {
    let input: WishBody = parse_json(&req, &body)?;
    let wish = check_wish(path.parse()?, input, (&places.0, &**places.1)).await?;
    let new = actions::ask(&pool, scope.by(), &scope.tenant, &wish).await?;
    let mut answer = if new { HttpResponse::Created() } else { HttpResponse::Ok() };
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let target = store::find_target(&mut conn, scope.tenant.id, &wish.name).await?.ok_or(Error::NotFound)?;
    Ok(answer.json(target))
}

/// GET /api/v1/tenants/{tenant}/egress: all targets, ended ones included, the newest first.
pub async fn list_targets(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let (limit, before) = (query.limit()?, query.after_number(i64::MAX)?);
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let rows = store::list_targets(&mut conn, scope.tenant.id, before, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.id)))
}

/// DELETE /api/v1/tenants/{tenant}/egress/{name}
pub async fn withdraw(
    scope: TenantScope<ManageConnections>,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    path: web::Path<NamePath>,
) -> Result<HttpResponse, Error> {
    actions::withdraw_target(&pool, &waker, scope.by(), &scope.tenant, &path.parse()?).await?;
    Ok(HttpResponse::Accepted().finish())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DecisionBody {
    id: i64,
    approved: bool,
    note: Option<String>,
    days: Option<i32>,
}

/// PUT /api/v1/tenants/{tenant}/egress/{name}/decision
pub async fn decide(
    scope: TenantScope<ManageNetwork>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    path: web::Path<NamePath>,
    body: Body,
) -> Result<HttpResponse, Error> {
    let DecisionBody { id, approved, note, days } = parse_json(&req, &body)?;
    let mut faults = Vec::new();
    if note.as_ref().is_some_and(|note| note.chars().count() > 500) {
        faults.push(Fault::new(Code(426), Kind::Invalid, "note", "a note has at most 500 characters"));
    }
    super::days(days, &mut faults);
    if !faults.is_empty() {
        return Err(Error::Invalid(faults));
    }
    let name = path.parse()?;
    let decision = Decision { id, approved, note, days };
    actions::decide(&pool, &waker, scope.by(), &scope.tenant, &name, &decision).await?;
    Ok(HttpResponse::Accepted().json(json!({"name": name, "approved": approved})))
}

/// GET /api/v1/egress: pending requests of all tenants, the oldest first.
pub async fn list_waiting(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let (limit, after) = (query.limit()?, query.after_number(0)?);
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let rows = store::list_waiting(&mut conn, after, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.id)))
}
