//! The service catalogue, and the tenants' access to services.

use serde_json::json;
use sqlx::{PgConnection, PgPool};

use crate::access::{By, TenantRef};
use crate::db::expected::Expected;
use crate::db::{self, Within, constraint};
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::ids::{ServiceName, TenantName};
use crate::networks::connections::note;
use crate::networks::rollouts::{self, Staging};
use crate::networks::store::{NewRollout, Rollout};
use crate::networks::{Endpoint, store};
use crate::reconcile::{Waker, enqueue};

/// The result of a request to create or change a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// The service is changed. No rollout was needed.
    Done {
        /// Its generation.
        generation: i64,
        /// Whether the service is new.
        new: bool,
    },
    /// Tenants use the service: a rollout brings the change to them.
    Begun {
        /// Its generation until the rollout ends.
        generation: i64,
        /// Number of the rollout.
        rollout: i64,
    },
}

/// Creates or changes a service. If tenants use it and its endpoints change, starts a rollout.
pub async fn put_service(
    pool: &PgPool,
    waker: &Waker,
    by: By<'_>,
    name: &ServiceName,
    what: (&str, &[Endpoint]),
    staging: &Staging,
    expected: &Expected,
) -> Result<Put, Error> {
    let (description, endpoints) = what;
    let mut tx = db::begin(pool, Within::Platform).await?;
    let Some((id, _)) = store::find_service(&mut tx, name).await? else {
        expected.check(None)?;
        refuse_first(staging)?;
        return put_now(tx, by, name, what, true).await;
    };
    // With the lock held, no tenant gains access and no other change is made in between.
    store::lock_service(&mut tx, id).await?;
    let (_, known) = store::find_service(&mut tx, name).await?.ok_or(Error::NotFound)?;
    expected.check(Some(known.generation))?;
    if let Some(under_way) = store::find_under_way(&mut tx, id).await? {
        let same = *under_way.endpoints == endpoints
            && under_way.description == description
            && is_staged(&under_way, staging);
        let id = under_way.id;
        return match under_way.stage {
            rollouts::Stage::Undo => Err(Error::Conflict(format!(
                "the rollout {id} of this service is rolling back. Try again when it is over"
            ))),
            _ if same => Ok(Put::Begun { generation: known.generation, rollout: id }),
            _ => Err(Error::Conflict(format!(
                "the rollout {id} of this service is running, with other endpoints or stages. Wait until it is \
                 over, or abort it"
            ))),
        };
    }
    if known.endpoints == endpoints && known.description == description {
        return Ok(Put::Done { generation: known.generation, new: false });
    }
    if known.endpoints == endpoints || store::count_users(&mut tx, id).await? == 0 {
        refuse_first(staging)?;
        return put_now(tx, by, name, what, false).await;
    }
    let canaries = match &staging.canaries {
        Some(names) => Some(identify(&mut tx, id, names).await?),
        None => None,
    };
    let new = NewRollout {
        service_id: id,
        service: name,
        description,
        before: &known.endpoints,
        endpoints,
        window_hours: staging.window_hours,
        observe_seconds: staging.observe_seconds,
        canaries: canaries.as_deref(),
    };
    let rollout = store::insert_rollout(&mut tx, &new, by.actor.id.as_str()).await?;
    let detail = json!({"rollout": rollout, "endpoints": endpoints, "window_hours": staging.window_hours,
        "canaries": staging.canaries});
    by.record(&mut tx, None, "service.put", name.as_str(), detail).await?;
    enqueue(&mut tx, rollouts::WORK, rollout, None).await?;
    tx.commit().await?;
    waker.wake();
    Ok(Put::Begun { generation: known.generation, rollout })
}

/// Reports whether a rollout has these stages. A request without stages matches any rollout.
fn is_staged(rollout: &Rollout, staging: &Staging) -> bool {
    let canaries = staging.canaries.as_ref().is_none_or(|names| {
        let mut names: Vec<String> = names.iter().map(ToString::to_string).collect();
        names.sort();
        names.dedup();
        names == rollout.canary_names
    });
    *staging == Staging::default()
        || (rollout.window_hours, rollout.observe_seconds) == (staging.window_hours, staging.observe_seconds)
            && canaries
}

async fn put_now(
    mut tx: db::Tx,
    by: By<'_>,
    name: &ServiceName,
    (description, endpoints): (&str, &[Endpoint]),
    new: bool,
) -> Result<Put, Error> {
    let generation = store::put_service(&mut tx, name, description, endpoints).await?;
    let detail = json!({"generation": generation, "endpoints": endpoints});
    by.record(&mut tx, None, "service.put", name.as_str(), detail).await?;
    tx.commit().await?;
    Ok(Put::Done { generation, new })
}

/// Rejects canary tenants where no rollout takes place.
fn refuse_first(staging: &Staging) -> Result<(), Error> {
    match staging.canaries.as_deref() {
        None | Some([]) => Ok(()),
        Some(_) => {
            let message =
                "no rollout takes place: no tenant uses the service, or its endpoints do not change";
            Err(Error::fault(Fault::new(Code(426), Kind::Invalid, "rollout.canaries", message)))
        }
    }
}

/// Returns the ids of these tenants. Each must be allowed to use the service.
async fn identify(conn: &mut PgConnection, service: i64, names: &[TenantName]) -> Result<Vec<i64>, Error> {
    let texts: Vec<String> = names.iter().map(ToString::to_string).collect();
    let known = store::list_users_named(conn, service, &texts).await?;
    let missing: Vec<Fault> = names
        .iter()
        .enumerate()
        .filter(|(_, name)| !known.iter().any(|(known, _)| known == *name))
        .map(|(n, name)| {
            let message = format!("{name} may not use this service, so it cannot be a canary tenant");
            Fault::new(Code(426), Kind::Invalid, format!("rollout.canaries[{n}]"), message)
        })
        .collect();
    if missing.is_empty() {
        Ok(known.into_iter().map(|(_, id)| id.0).collect())
    } else {
        Err(Error::Invalid(missing))
    }
}

/// Deletes a service that no tenant may use.
pub async fn delete_service(pool: &PgPool, by: By<'_>, name: &ServiceName) -> Result<(), Error> {
    let mut tx = db::begin(pool, Within::Platform).await?;
    let (id, _) = store::find_service(&mut tx, name).await?.ok_or(Error::NotFound)?;
    if let Some(under_way) = store::find_under_way(&mut tx, id).await? {
        return Err(Error::Conflict(format!(
            "the rollout {} of this service is running. Abort it first",
            under_way.id
        )));
    }
    store::delete_service(&mut tx, id).await.map_err(|error| match constraint(&error) {
        Some("service_is_in_use") => Error::Conflict(
            "tenants may use this service. Remove their access first, so that you see which tenants it affects"
                .into(),
        ),
        _ => error.into(),
    })?;
    by.record(&mut tx, None, "service.delete", name.as_str(), json!({})).await?;
    tx.commit().await?;
    Ok(())
}

/// Allows a tenant to use a service.
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

/// Removes a tenant's access to a service. Its open connections are closed.
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
