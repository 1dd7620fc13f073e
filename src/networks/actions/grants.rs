//! Grants between tenants: offered by one, accepted by the other, ended by either side.

use actix_web::http::StatusCode;
use serde_json::json;
use sqlx::PgPool;

use crate::access::idempotency::{Once, StoredResponse};
use crate::access::{By, TenantRef};
use crate::apps::connections::find_id;
use crate::db::{self, constraint};
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::ids::{AppName, TenantName};
use crate::networks::connections::note;
use crate::networks::store::{self, NewOffer};
use crate::quotas::{self, Resource};
use crate::reconcile::Waker;

/// A validated offer.
#[derive(Debug)]
pub struct Offer {
    /// The tenant's own app.
    pub app: AppName,
    /// The tenant that may accept it.
    pub tenant: TenantName,
    /// The only app that may use the grant; `None` for all apps of that tenant.
    pub to_app: Option<AppName>,
    /// Days until it expires; `None` for no expiry.
    pub days: Option<i32>,
}

/// Maximum number of a tenant's open offers to one other tenant.
const OFFERS_TO_ONE: i64 = 50;
/// Maximum number of a tenant's offers in 24 hours. Withdrawn offers count: their rows are kept for a while.
const OFFERS_A_DAY: i64 = 1_000;

/// Offers an app to another tenant. The answer does not reveal whether that tenant exists.
pub async fn offer(
    pool: &PgPool,
    by: By<'_>,
    once: &Once,
    tenant: &TenantRef,
    offer: &Offer,
) -> Result<StoredResponse, Error> {
    tenant.require_active()?;
    if offer.tenant == tenant.name {
        let message = "your own app needs no grant. Name it in connects.apps";
        return Err(Error::fault(Fault::new(Code(426), Kind::Invalid, "tenant", message)));
    }
    let mut tx = db::begin(pool, tenant.id).await?;
    if let Some(kept) = once.kept(&mut tx, by.actor).await? {
        return Ok(kept);
    }
    let app = find_id(&mut tx, tenant.id, &offer.app).await?.ok_or_else(|| {
        Error::fault(Fault::new(Code(427), Kind::Conflict, "app", format!("there is no app {}", offer.app)))
    })?;
    let held = quotas::lock(&mut tx, tenant.id, Resource::Grants).await?;
    let (all, to_one, today) = store::count_offers(&mut tx, tenant.id, &offer.tenant).await?;
    held.require_place(all)?;
    if to_one >= OFFERS_TO_ONE {
        return Err(Error::Conflict(format!(
            "{OFFERS_TO_ONE} offers to that tenant are open, the maximum. Withdraw one first"
        )));
    }
    if today >= OFFERS_A_DAY {
        return Err(Error::Conflict(format!(
            "this tenant made {OFFERS_A_DAY} offers in 24 hours, the maximum. Try again later"
        )));
    }
    let new = NewOffer {
        app,
        app_name: &offer.app,
        to_tenant: &offer.tenant,
        to_app: offer.to_app.as_ref(),
        days: offer.days,
    };
    let id = store::insert_offer(&mut tx, tenant.id, &new, by.actor.id.as_str()).await.map_err(|error| {
        match constraint(&error) {
            Some("grant_is_offered_already") => Error::AlreadyExists(
                "this app is already offered to that tenant. Withdraw that offer first".into(),
            ),
            _ => error.into(),
        }
    })?;
    let detail = json!({"id": id, "tenant": offer.tenant, "to_app": offer.to_app, "days": offer.days});
    by.record(&mut tx, tenant.id, "grant.offer", offer.app.as_str(), detail).await?;
    let body = json!({"id": id, "app": offer.app, "tenant": offer.tenant, "state": "offered"});
    once.keep(&mut tx, by.actor, StatusCode::CREATED, &body).await?;
    tx.commit().await?;
    Ok(StoredResponse { status: StatusCode::CREATED, body })
}

/// Accepts an offer. From then on, apps may name the granted app.
pub async fn accept(
    pool: &PgPool,
    waker: &Waker,
    by: By<'_>,
    tenant: &TenantRef,
    id: i64,
) -> Result<(), Error> {
    tenant.require_active()?;
    let mut tx = db::begin(pool, tenant.id).await?;
    if !store::lock_offer(&mut tx, id).await? {
        return Err(Error::NotFound);
    }
    let (from, name, accepted) = store::find_received(&mut tx, id).await?.ok_or(Error::NotFound)?;
    if accepted {
        return Ok(());
    }
    store::insert_answer(&mut tx, tenant.id, from, id, by.actor.id.as_str()).await?;
    by.record(&mut tx, tenant.id, "grant.accept", &name, json!({"id": id})).await?;
    note(&mut tx, tenant.id, by.actor.id.as_str(), &format!("the grant of {name} is accepted")).await?;
    tx.commit().await?;
    waker.wake();
    Ok(())
}

/// Ends a grant from either side. Its open connections are closed.
pub async fn end(pool: &PgPool, waker: &Waker, by: By<'_>, tenant: &TenantRef, id: i64) -> Result<(), Error> {
    let mut tx = db::begin(pool, tenant.id).await?;
    let who = by.actor.id.as_str();
    if let Some((app, to)) = store::withdraw_offer(&mut tx, tenant.id, id, who).await? {
        by.record(&mut tx, tenant.id, "grant.withdraw", &app, json!({"id": id, "tenant": to})).await?;
        let words = format!("the grant of {}/{app} is withdrawn", tenant.name);
        store::wake_receivers(&mut tx, None, Some(id), &words).await?;
    } else {
        let received = store::find_received(&mut tx, id).await?;
        let ended = store::end_answer(&mut tx, tenant.id, id, who).await?;
        match received {
            Some((_, name, _)) if ended => {
                by.record(&mut tx, tenant.id, "grant.end", &name, json!({"id": id})).await?;
                note(&mut tx, tenant.id, who, &format!("the grant of {name} is ended by its receiver"))
                    .await?;
            }
            // An offer that was not accepted is declined and no longer shown.
            Some((from, name, false)) => {
                store::insert_answer(&mut tx, tenant.id, from, id, who).await?;
                store::end_answer(&mut tx, tenant.id, id, who).await?;
                by.record(&mut tx, tenant.id, "grant.decline", &name, json!({"id": id})).await?;
            }
            _ => return Err(Error::NotFound),
        }
    }
    tx.commit().await?;
    waker.wake();
    Ok(())
}
