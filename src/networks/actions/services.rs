//! The catalogue of services, and who may use what.

use serde_json::json;
use sqlx::PgPool;

use crate::access::{By, TenantRef};
use crate::db::{self, Within, constraint};
use crate::error::Error;
use crate::ids::ServiceName;
use crate::networks::connections::note;
use crate::networks::{Endpoint, store};
use crate::reconcile::Waker;
use crate::tenants::actions::check_generation;

/// Puts a service into the catalogue, or changes it: whoever uses it gets a new plan. Its generation, and
/// whether it is new.
pub async fn put_service(
    pool: &PgPool,
    waker: &Waker,
    by: By<'_>,
    name: &ServiceName,
    (description, endpoints): (&str, &[Endpoint]),
    expected: Option<i64>,
) -> Result<(i64, bool), Error> {
    let mut tx = db::begin(pool, Within::Platform).await?;
    let known = store::find_service(&mut tx, name).await?;
    if let Some((_, known)) = &known {
        check_generation(expected, known.generation)?;
        if known.description == description && known.endpoints == endpoints {
            return Ok((known.generation, false));
        }
    } else if expected.is_some_and(|expected| expected != 0) {
        return Err(Error::PreconditionFailed(0));
    }
    let (id, generation) = store::put_service(&mut tx, name, description, endpoints).await?;
    let detail = json!({"generation": generation, "endpoints": endpoints});
    by.record(&mut tx, None, "service.put", name.as_str(), detail).await?;
    let words = format!("the service {name} has changed");
    store::wake_users(&mut tx, id, by.actor.id.as_str(), &words).await?;
    tx.commit().await?;
    waker.wake();
    Ok((generation, known.is_none()))
}

/// Takes a service out of the catalogue, once no tenant may use it.
pub async fn delete_service(pool: &PgPool, by: By<'_>, name: &ServiceName) -> Result<(), Error> {
    let mut tx = db::begin(pool, Within::Platform).await?;
    let (id, _) = store::find_service(&mut tx, name).await?.ok_or(Error::NotFound)?;
    store::delete_service(&mut tx, id).await.map_err(|error| match constraint(&error) {
        Some("service_is_in_use") => Error::Conflict(
            "tenants may use this service: take it from them first, so that it is seen whom it cuts off"
                .into(),
        ),
        _ => error.into(),
    })?;
    by.record(&mut tx, None, "service.delete", name.as_str(), json!({})).await?;
    tx.commit().await?;
    Ok(())
}

/// Lets a tenant use a service.
pub async fn give(
    pool: &PgPool,
    waker: &Waker,
    by: By<'_>,
    tenant: &TenantRef,
    name: &ServiceName,
) -> Result<(), Error> {
    tenant.require_active()?;
    let mut tx = db::begin(pool, Within::Platform).await?;
    let (id, _) = store::find_service(&mut tx, name).await?.ok_or(Error::NotFound)?;
    db::enter(&mut tx, tenant.id).await?;
    if store::give_service(&mut tx, tenant.id, id, by.actor.id.as_str()).await? {
        by.record(&mut tx, tenant.id, "service.give", name.as_str(), json!({})).await?;
        let words = format!("the tenant may use the service {name}");
        note(&mut tx, tenant.id, by.actor.id.as_str(), &words).await?;
    }
    tx.commit().await?;
    waker.wake();
    Ok(())
}

/// Takes a service from a tenant: what runs over it is cut.
pub async fn take(
    pool: &PgPool,
    waker: &Waker,
    by: By<'_>,
    tenant: &TenantRef,
    name: &ServiceName,
) -> Result<(), Error> {
    let mut tx = db::begin(pool, tenant.id).await?;
    if !store::take_service(&mut tx, tenant.id, name).await? {
        return Err(Error::NotFound);
    }
    by.record(&mut tx, tenant.id, "service.take", name.as_str(), json!({})).await?;
    let words = format!("the tenant may no longer use the service {name}");
    note(&mut tx, tenant.id, by.actor.id.as_str(), &words).await?;
    tx.commit().await?;
    waker.wake();
    Ok(())
}
