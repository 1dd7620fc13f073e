//! Egress targets: requested by a tenant, approved or refused by the platform, withdrawn by the tenant.

use serde_json::json;
use sqlx::PgPool;

use crate::access::{By, TenantRef};
use crate::db::{self, constraint};
use crate::error::Error;
use crate::ids::EgressName;
use crate::networks::connections::note;
use crate::networks::store::{self, NewEgressRequest};
use crate::quotas::{self, Resource};
use crate::reconcile::Waker;

/// The decision on a request.
#[derive(Debug)]
pub struct Decision {
    /// Number of the request that was reviewed.
    pub id: i64,
    /// Whether it is approved.
    pub approved: bool,
    /// Note to the tenant.
    pub note: Option<String>,
    /// Days until the approval expires, at most the number requested.
    pub days: Option<i32>,
}

/// Maximum number of a tenant's pending requests.
const WAITING: i64 = 20;

/// Requests an egress target. Returns whether the request is new: an identical one changes nothing.
pub async fn ask(
    pool: &PgPool,
    by: By<'_>,
    tenant: &TenantRef,
    wish: &NewEgressRequest,
) -> Result<bool, Error> {
    tenant.require_active()?;
    let mut tx = db::begin(pool, tenant.id).await?;
    if let Some(known) = store::find_target(&mut tx, tenant.id, &wish.name).await?
        && ["asked", "approved"].contains(&known.state.as_str())
    {
        let ports: Vec<i32> = wish.ports.iter().map(|port| i32::from(*port)).collect();
        if known.place == wish.place.to_string()
            && known.protocol == wish.protocol.as_str()
            && known.ports == ports
        {
            return Ok(false);
        }
        return Err(Error::AlreadyExists(format!(
            "{} is already {} for other addresses or ports. Withdraw it first, or choose another name",
            wish.name, known.state
        )));
    }
    quotas::take_place(&mut tx, tenant.id, Resource::EgressTargets).await?;
    if store::count_waiting(&mut tx, tenant.id).await? >= WAITING {
        return Err(Error::Conflict(format!(
            "{WAITING} requests are already pending. Withdraw one, or wait for a decision"
        )));
    }
    // A target that has expired releases its name.
    store::withdraw_target(&mut tx, tenant.id, &wish.name, by.actor.id.as_str()).await?;
    store::insert_target(&mut tx, tenant.id, wish, by.actor.id.as_str()).await.map_err(|error| {
        match constraint(&error) {
            Some("egress_name_is_taken") => {
                Error::AlreadyExists("another request has just taken this name".into())
            }
            _ => error.into(),
        }
    })?;
    let detail = json!({"place": wish.place.to_string(), "protocol": wish.protocol, "ports": wish.ports, "days": wish.days});
    by.record(&mut tx, tenant.id, "egress.ask", wish.name.as_str(), detail).await?;
    tx.commit().await?;
    Ok(true)
}

/// Approves or refuses a request.
pub async fn decide(
    pool: &PgPool,
    waker: &Waker,
    by: By<'_>,
    tenant: &TenantRef,
    name: &EgressName,
    decision: &Decision,
) -> Result<(), Error> {
    let mut tx = db::begin(pool, tenant.id).await?;
    let known = store::find_target(&mut tx, tenant.id, name).await?.ok_or(Error::NotFound)?;
    let (state, action) =
        if decision.approved { ("approved", "egress.approve") } else { ("refused", "egress.refuse") };
    let decided = (state, decision.note.as_deref(), decision.days);
    if known.id != decision.id {
        return Err(Error::Conflict(
            "the tenant has changed the request of this name. Review it again".into(),
        ));
    }
    if !store::decide_target(&mut tx, tenant.id, known.id, decided, by.actor.id.as_str()).await? {
        return Err(Error::Conflict(format!(
            "this target is {}, so there is nothing to decide",
            known.state
        )));
    }
    let detail = json!({"place": known.place, "protocol": known.protocol, "ports": known.ports, "note": decision.note});
    by.record(&mut tx, tenant.id, action, name.as_str(), detail).await?;
    let words = format!("the egress target {name}, requested by {}, is {state}", known.asked_by);
    note(&mut tx, tenant.id, by.actor.id.as_str(), &words).await?;
    tx.commit().await?;
    waker.wake();
    Ok(())
}

/// Withdraws a request, or closes an approved target.
pub async fn withdraw_target(
    pool: &PgPool,
    waker: &Waker,
    by: By<'_>,
    tenant: &TenantRef,
    name: &EgressName,
) -> Result<(), Error> {
    let mut tx = db::begin(pool, tenant.id).await?;
    if !store::withdraw_target(&mut tx, tenant.id, name, by.actor.id.as_str()).await? {
        return Err(Error::NotFound);
    }
    by.record(&mut tx, tenant.id, "egress.withdraw", name.as_str(), json!({})).await?;
    note(&mut tx, tenant.id, by.actor.id.as_str(), &format!("the egress target {name} is withdrawn")).await?;
    tx.commit().await?;
    waker.wake();
    Ok(())
}
