//! A trial: what a tenant's apps send outside is let through for a while and written down, so that it is seen
//! what they need before it is closed. Walls, hosts and other tenants stay closed.

use serde_json::json;
use sqlx::PgPool;
use time::OffsetDateTime;

use crate::access::{By, TenantRef};
use crate::db;
use crate::error::Error;
use crate::networks::connections::note;
use crate::networks::store;
use crate::reconcile::Waker;

/// Begins a trial of so many hours, or moves its end.
pub async fn begin_trial(
    pool: &PgPool,
    waker: &Waker,
    by: By<'_>,
    tenant: &TenantRef,
    hours: i32,
) -> Result<OffsetDateTime, Error> {
    tenant.require_active()?;
    let mut tx = db::begin(pool, tenant.id).await?;
    let until = store::put_trial(&mut tx, tenant.id, hours, by.actor.id.as_str()).await?;
    by.record(&mut tx, tenant.id, "network.trial", tenant.name.as_str(), json!({"hours": hours})).await?;
    note(&mut tx, tenant.id, by.actor.id.as_str(), &format!("a trial of {hours} h begins")).await?;
    tx.commit().await?;
    waker.wake();
    Ok(until)
}

/// Ends a trial: what was let through is closed, what runs over it is cut.
pub async fn end_trial(pool: &PgPool, waker: &Waker, by: By<'_>, tenant: &TenantRef) -> Result<(), Error> {
    let mut tx = db::begin(pool, tenant.id).await?;
    if !store::end_trial(&mut tx, tenant.id).await? {
        return Err(Error::NotFound);
    }
    by.record(&mut tx, tenant.id, "network.trial-end", tenant.name.as_str(), json!({})).await?;
    note(&mut tx, tenant.id, by.actor.id.as_str(), "the trial ends").await?;
    tx.commit().await?;
    waker.wake();
    Ok(())
}
