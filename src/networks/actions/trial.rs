//! Audit mode: for a limited time, traffic that would be denied is allowed and recorded. It shows which
//! egress a tenant's apps need. Reserved ranges, hosts and other tenants stay denied.

use serde_json::json;
use sqlx::PgPool;
use time::OffsetDateTime;

use crate::access::{By, TenantRef};
use crate::db;
use crate::error::Error;
use crate::networks::connections::note;
use crate::networks::store;
use crate::reconcile::Waker;

/// Starts audit mode for `hours`, or moves its end.
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
    note(&mut tx, tenant.id, by.actor.id.as_str(), &format!("audit mode starts for {hours} h")).await?;
    tx.commit().await?;
    waker.wake();
    Ok(until)
}

/// Ends audit mode: unapproved egress is denied again, and its open connections are closed.
pub async fn end_trial(pool: &PgPool, waker: &Waker, by: By<'_>, tenant: &TenantRef) -> Result<(), Error> {
    let mut tx = db::begin(pool, tenant.id).await?;
    if !store::end_trial(&mut tx, tenant.id).await? {
        return Err(Error::NotFound);
    }
    by.record(&mut tx, tenant.id, "network.trial-end", tenant.name.as_str(), json!({})).await?;
    note(&mut tx, tenant.id, by.actor.id.as_str(), "audit mode ends").await?;
    tx.commit().await?;
    waker.wake();
    Ok(())
}
