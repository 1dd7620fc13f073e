//! Actions on a tenant: onboard, change, suspend, resume, offboard. Each is one transaction, which commits
//! rows, audit events and work together.

use actix_web::http::StatusCode;
use serde_json::json;
use sqlx::{PgPool, Postgres, Transaction};

use super::store;
use crate::access::idempotency::{Once, StoredResponse};
use crate::access::{By, TenantRef};
use crate::audit;
use crate::config::Pools;
use crate::db::expected::Expected;
use crate::db::{self, Within};
use crate::error::Error;
use crate::ids::{ActorId, TenantId, TenantName};
use crate::quotas::{self, QuotaLimits, Resource};
use crate::reconcile::{Waker, enqueue};
use crate::uid_ranges;

/// Kind of the work of a tenant.
pub const WORK: &str = "tenant";

/// A checked new tenant.
#[derive(Debug)]
pub struct NewTenant {
    /// Name.
    pub name: TenantName,
    /// Display name.
    pub display_name: String,
    /// All limits.
    pub limits: QuotaLimits,
}

/// Fills in the default limits, sized for a small team. By default, unpacked images may take four times their
/// packed size on the engine's disk. The limit of 4,096 processes does not depend on the number of instances.
pub fn fill_limits(limits: &mut QuotaLimits) {
    for (resource, limit) in [
        (Resource::Cpu, 4_000),
        (Resource::Memory, 8 << 30),
        (Resource::Pids, 4_096),
        (Resource::Apps, 20),
        (Resource::Instances, 60),
        (Resource::RegistryBytes, 20 << 30),
    ] {
        limits.or(resource, limit);
    }
    let packed = limits.get(Resource::RegistryBytes).unwrap_or_default();
    limits.or(Resource::ImageBytes, packed.saturating_mul(4));
}

/// Onboards a tenant. One transaction creates tenant, quota, id range, network number, work and audit event.
pub async fn onboard(
    pool: &PgPool,
    pools: &Pools,
    waker: &Waker,
    by: By<'_>,
    once: &Once,
    new: NewTenant,
) -> Result<StoredResponse, Error> {
    let mut tx = db::begin(pool, Within::Platform).await?;
    if let Some(kept) = once.kept(&mut tx, by.actor).await? {
        return Ok(kept);
    }
    let id = store::insert_tenant(&mut tx, &new.name, &new.display_name).await.map_err(|error| {
        match crate::db::constraint(&error) {
            Some("tenant_name_is_taken") => {
                Error::AlreadyExists("this name is or was in use: tenant names are never reused".into())
            }
            _ => error.into(),
        }
    })?;
    db::enter(&mut tx, id).await?;
    quotas::insert_rows(&mut tx, id, &new.limits).await?;
    let range = uid_ranges::allocate_range(&mut tx, id, pools).await?;
    store::insert_network(&mut tx, id, i64::from(pools.networks())).await.map_err(|error| {
        match crate::db::constraint(&error) {
            Some("network_pool_is_used_up") => Error::Conflict(
                "the pool of networks is exhausted: network numbers are never reused (BH-425)".into(),
            ),
            _ => error.into(),
        }
    })?;
    let ids = format!("user ids {} to {} are reserved for this tenant", range.start, range.end - 1);
    store::set_condition(&mut tx, id, "UserIds", "true", "Given", &ids).await?;
    for part in ["Registry", "Network"] {
        store::set_condition(&mut tx, id, part, "unknown", "Pending", "being set up").await?;
    }
    by.record(&mut tx, id, "tenant.onboard", new.name.as_str(), json!({"uids": [range.start, range.end]}))
        .await?;
    enqueue(&mut tx, WORK, id.0, id).await?;
    let body = json!({
        "name": new.name, "generation": 1, "state": "active",
        "uid_ranges": [{"start": range.start, "end": range.end}],
    });
    once.keep(&mut tx, by.actor, StatusCode::ACCEPTED, &body).await?;
    fail::fail_point!("tenants::onboard_commit", |_| Err(Error::internal("failpoint")));
    tx.commit().await?;
    waker.wake();
    Ok(StoredResponse { status: StatusCode::ACCEPTED, body })
}

/// Changes the display name and the limits.
pub async fn change(
    pool: &PgPool,
    by: By<'_>,
    tenant: &TenantRef,
    display_name: Option<&str>,
    limits: &QuotaLimits,
    expected: &Expected,
) -> Result<i64, Error> {
    let mut tx = db::begin(pool, tenant.id).await?;
    let (generation, state) = store::lock_tenant(&mut tx, tenant.id).await?;
    expected.check(Some(generation))?;
    if state.starts_with("offboard") {
        return Err(Error::Conflict(format!("the tenant is {state} and can no longer be changed")));
    }
    if let Some(name) = display_name {
        store::set_display_name(&mut tx, tenant.id, name).await?;
    }
    quotas::set_limits(&mut tx, tenant.id, limits).await?;
    let generation = store::raise_generation(&mut tx, tenant.id, &state).await?;
    by.record(&mut tx, tenant.id, "tenant.change", tenant.name.as_str(), json!({"quota": limits.view()}))
        .await?;
    enqueue(&mut tx, WORK, tenant.id.0, tenant.id).await?;
    tx.commit().await?;
    Ok(generation)
}

/// Direction of a suspension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suspension {
    /// Stops the apps. Keeps all data.
    Begin,
    /// Starts the apps again.
    End,
}

/// Suspends or resumes a tenant. Repeating it changes nothing.
pub async fn suspend(
    pool: &PgPool,
    waker: &Waker,
    by: By<'_>,
    tenant: &TenantRef,
    what: Suspension,
) -> Result<i64, Error> {
    let mut tx = db::begin(pool, tenant.id).await?;
    let (generation, state) = store::lock_tenant(&mut tx, tenant.id).await?;
    let (wanted, action) = match what {
        Suspension::Begin => ("suspended", "tenant.suspend"),
        Suspension::End => ("active", "tenant.resume"),
    };
    if state == wanted {
        return Ok(generation);
    }
    if state.starts_with("offboard") {
        return Err(Error::Conflict(format!("the tenant is {state} and cannot be suspended or resumed")));
    }
    let generation = store::raise_generation(&mut tx, tenant.id, wanted).await?;
    by.record(&mut tx, tenant.id, action, tenant.name.as_str(), json!({})).await?;
    enqueue(&mut tx, WORK, tenant.id.0, tenant.id).await?;
    store::wake_apps(&mut tx, tenant.id).await?;
    tx.commit().await?;
    waker.wake();
    Ok(generation)
}

/// Steps of an offboarding, in order. A step is done only when a check confirms it.
pub const STEPS: [&str; 6] = ["credentials", "apps", "connections", "registry", "network", "user-ids"];

/// Starts the offboarding. Repeating it changes nothing.
pub async fn offboard(pool: &PgPool, waker: &Waker, by: By<'_>, tenant: &TenantRef) -> Result<i64, Error> {
    let mut tx = db::begin(pool, tenant.id).await?;
    let (generation, state) = store::lock_tenant(&mut tx, tenant.id).await?;
    if state.starts_with("offboard") {
        return Ok(generation);
    }
    let generation = store::raise_generation(&mut tx, tenant.id, "offboarding").await?;
    store::insert_steps(&mut tx, tenant.id, &STEPS).await?;
    store::revoke_tokens(&mut tx, tenant.id).await?;
    store::end_access(&mut tx, tenant.id).await?;
    by.record(&mut tx, tenant.id, "tenant.offboard", tenant.name.as_str(), json!({})).await?;
    enqueue(&mut tx, WORK, tenant.id.0, tenant.id).await?;
    tx.commit().await?;
    waker.wake();
    Ok(generation)
}

/// Records that an offboarding is complete.
pub async fn record_offboarded(
    tx: &mut Transaction<'_, Postgres>,
    id: TenantId,
    name: &TenantName,
) -> Result<(), Error> {
    let actor = ActorId::platform();
    let event = audit::AuditEvent {
        tenant: Some(id),
        actor: &actor,
        action: "tenant.offboarded",
        object: name.as_str(),
        request_id: "reconcile",
        detail: json!({}),
    };
    audit::record(tx, event).await
}
