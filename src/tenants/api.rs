//! API of tenants.

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::PgPool;

use super::actions::{self, NewTenant, Suspension};
use super::store::TenantCondition;
use super::{Tenant, store};
use crate::access::idempotency::{IdempotencyKey, Once};
use crate::access::{ManageTenants, PlatformScope, ReadPlatform, ReadTenant, TenantScope};
use crate::config::{Config, Pools};
use crate::db::expected::Expected;
use crate::db::{self, Page, PageQuery, Within};
use crate::error::Error;
use crate::fault::{Code, Fault, Kind, plain};
use crate::http::asked::{Body, Query};
use crate::http::parse_json;
use crate::ids::TenantName;
use crate::quotas::{self, Quota, QuotaInput};
use crate::reconcile::Waker;
use crate::uid_ranges::{self, UidRange};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OnboardBody {
    name: String,
    display_name: Option<String>,
    #[serde(default)]
    quota: QuotaInput,
}

fn check_display_name(name: &str, faults: &mut Vec<Fault>) {
    let count = name.chars().count();
    if !(1..=120).contains(&count) || name.chars().any(|c| plain(c) != c) {
        faults.push(Fault::new(
            Code(426),
            Kind::Invalid,
            "display_name",
            "a display name must have 1 to 120 characters, without control, invisible or bidirectional characters",
        ));
    }
}

/// POST /api/v1/tenants
pub async fn onboard(
    scope: PlatformScope<ManageTenants>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    config: web::Data<Config>,
    waker: web::Data<Waker>,
    key: IdempotencyKey,
    body: Body,
) -> Result<HttpResponse, Error> {
    let input: OnboardBody = parse_json(&req, &body)?;
    let mut faults = Vec::new();
    let name = input.name.parse::<TenantName>().map_err(|error| {
        faults.push(Fault::new(Code(426), Kind::Invalid, "name", error.to_string()));
    });
    let display_name = input.display_name.unwrap_or_else(|| input.name.clone());
    check_display_name(&display_name, &mut faults);
    let mut limits = input.quota.parse(&mut faults);
    let (Ok(name), true) = (name, faults.is_empty()) else { return Err(Error::Invalid(faults)) };
    actions::fill_limits(&mut limits);
    let once = Once::of(key, &req, &body);
    let by = scope.by();
    let new = NewTenant { name, display_name, limits };
    let kept = actions::onboard(&pool, &config.pools, &waker, by, &once, new).await?;
    Ok(HttpResponse::build(kept.status).json(kept.body))
}

/// A tenant as the API shows it.
#[derive(Serialize)]
struct TenantView {
    name: TenantName,
    display_name: String,
    state: String,
    generation: i64,
    observed_generation: i64,
    #[serde(with = "time::serde::rfc3339")]
    created_at: time::OffsetDateTime,
    quota: Quota,
    #[serde(skip_serializing_if = "Option::is_none")]
    uid_ranges: Option<Vec<UidRange>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    subnet: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    conditions: Option<Vec<TenantCondition>>,
}

impl TenantView {
    fn row(tenant: Tenant) -> Self {
        Self {
            name: tenant.name,
            display_name: tenant.display_name,
            state: tenant.state,
            generation: tenant.generation,
            observed_generation: tenant.observed_generation,
            created_at: tenant.created_at,
            quota: tenant.quota,
            uid_ranges: None,
            subnet: None,
            conditions: None,
        }
    }
}

/// GET /api/v1/tenants: ordered by name.
pub async fn list_tenants(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let rows = store::list_tenants(&mut conn, &query.after_text()?, limit + 1).await?;
    let page = Page::new(rows.into_iter().map(TenantView::row).collect(), limit, |row| row.name.clone());
    Ok(HttpResponse::Ok().json(page))
}

async fn view(pool: &PgPool, pools: &Pools, id: crate::ids::TenantId) -> Result<TenantView, Error> {
    let mut conn = db::begin(pool, id).await?;
    let tenant = store::find_tenant(&mut conn, id).await?.ok_or(Error::NotFound)?;
    let mut view = TenantView::row(tenant);
    view.uid_ranges = Some(uid_ranges::list_ranges_of(&mut conn, id).await?);
    view.subnet = pools.subnet(store::tenant_network(&mut conn, id).await?).map(|subnet| subnet.to_string());
    view.conditions = Some(store::list_conditions(&mut conn, id).await?);
    Ok(view)
}

/// Returns the ETag of a generation.
#[must_use]
pub fn etag(generation: i64) -> (header::HeaderName, String) {
    (header::ETAG, format!("\"{generation}\""))
}

/// GET /api/v1/tenants/{tenant}
pub async fn get_tenant(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    config: web::Data<Config>,
) -> Result<HttpResponse, Error> {
    let view = view(&pool, &config.pools, scope.tenant.id).await?;
    Ok(HttpResponse::Ok().insert_header(etag(view.generation)).json(view))
}

/// GET /api/v1/tenants/{tenant}/quota: every limit with its use, counted resources included.
pub async fn get_quota(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
) -> Result<HttpResponse, Error> {
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let quota = quotas::read_counted(&mut conn, scope.tenant.id).await?;
    Ok(HttpResponse::Ok().json(json!({"name": scope.tenant.name, "quota": quota})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TenantChangeBody {
    display_name: Option<String>,
    #[serde(default)]
    quota: QuotaInput,
}

/// PATCH /api/v1/tenants/{tenant}
pub async fn change_tenant(
    scope: TenantScope<ManageTenants>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    expected: Expected,
    body: Body,
) -> Result<HttpResponse, Error> {
    let input: TenantChangeBody = parse_json(&req, &body)?;
    let mut faults = Vec::new();
    if let Some(name) = &input.display_name {
        check_display_name(name, &mut faults);
    }
    let limits = input.quota.parse(&mut faults);
    if !faults.is_empty() {
        return Err(Error::Invalid(faults));
    }
    let by = scope.by();
    let name = input.display_name.as_deref();
    let generation = actions::change(&pool, by, &scope.tenant, name, &limits, &expected).await?;
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let quota = quotas::read_counted(&mut conn, scope.tenant.id).await?;
    Ok(HttpResponse::Accepted()
        .insert_header(etag(generation))
        .json(json!({"name": scope.tenant.name, "generation": generation, "quota": quota})))
}

/// PUT /api/v1/tenants/{tenant}/suspension
pub async fn begin_suspension(
    scope: TenantScope<ManageTenants>,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
) -> Result<HttpResponse, Error> {
    suspend(&scope, &pool, &waker, Suspension::Begin).await
}

/// DELETE /api/v1/tenants/{tenant}/suspension
pub async fn end_suspension(
    scope: TenantScope<ManageTenants>,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
) -> Result<HttpResponse, Error> {
    suspend(&scope, &pool, &waker, Suspension::End).await
}

async fn suspend(
    scope: &TenantScope<ManageTenants>,
    pool: &PgPool,
    waker: &Waker,
    what: Suspension,
) -> Result<HttpResponse, Error> {
    scope.actor.require_recent()?;
    let by = scope.by();
    let generation = actions::suspend(pool, waker, by, &scope.tenant, what).await?;
    let state = if what == Suspension::Begin { "suspended" } else { "active" };
    Ok(HttpResponse::Accepted()
        .insert_header(etag(generation))
        .json(json!({"name": scope.tenant.name, "generation": generation, "state": state})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OffboardBody {
    confirm: String,
}

/// PUT /api/v1/tenants/{tenant}/offboarding
pub async fn begin_offboarding(
    scope: TenantScope<ManageTenants>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    body: Body,
) -> Result<HttpResponse, Error> {
    let input: OffboardBody = parse_json(&req, &body)?;
    scope.actor.require_recent()?;
    if input.confirm != scope.tenant.name.as_str() {
        return Err(Error::fault(
            Fault::new(Code(426), Kind::Invalid, "confirm", "confirm must be the name of the tenant")
                .because("an offboarding removes the tenant's apps and images and cannot be undone"),
        ));
    }
    let by = scope.by();
    let generation = actions::offboard(&pool, &waker, by, &scope.tenant).await?;
    Ok(HttpResponse::Accepted().json(json!({"name": scope.tenant.name, "generation": generation})))
}

/// GET /api/v1/tenants/{tenant}/offboarding
pub async fn get_offboarding(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
) -> Result<HttpResponse, Error> {
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let steps = store::list_steps(&mut conn, scope.tenant.id).await?;
    if steps.is_empty() {
        return Err(Error::NotFound);
    }
    Ok(HttpResponse::Ok()
        .json(json!({"name": scope.tenant.name, "state": scope.tenant.state, "steps": steps})))
}
