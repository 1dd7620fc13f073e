//! Follows the driver's observations and stores them when they change. Drift is searched for in bulk: an app
//! that the driver does not know, or knows in an older generation, is enqueued.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use super::sight::Sight;
use super::{actions, store};
use crate::db;
use crate::driver::{AppObserved, Driver, ObservedChanges};
use crate::error::Error;
use crate::ids::{AppId, TenantId};
use crate::reconcile::{Waker, bring_forward, enqueue};

/// How long one request waits for a change. Each answer also proves that the agent is alive.
const WAIT: Duration = Duration::from_secs(4);

/// Follows until `stop`. After a lost connection it starts again with a complete observation.
pub async fn follow(
    pool: PgPool,
    driver: Arc<dyn Driver>,
    waker: Waker,
    sight: Sight,
    stop: CancellationToken,
) {
    let mut cursor: Option<String> = None;
    let mut away = false;
    loop {
        let answer = tokio::select! {
            () = stop.cancelled() => return,
            answer = driver.observe(cursor.as_deref(), WAIT) => answer,
        };
        let failed = match answer {
            Ok(observed) => match record(&pool, &waker, &observed).await {
                Ok(()) => {
                    sight.saw(observed.engine, observed.fetches);
                    cursor = Some(observed.cursor);
                    None
                }
                Err(error) => Some(error.to_string()),
            },
            Err(error) => Some(error.to_string()),
        };
        match failed {
            None => away = false,
            Some(error) => {
                if !away {
                    tracing::warn!(error, "cannot observe the running apps; retrying");
                }
                away = true;
                cursor = None;
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(Duration::from_millis(500)) => {}
                }
            }
        }
    }
}

async fn record(pool: &PgPool, waker: &Waker, observed: &ObservedChanges) -> Result<(), Error> {
    for seen in &observed.apps {
        record_app(pool, seen).await?;
    }
    let mut conn = pool.acquire().await?;
    store::insert_machine_events(&mut conn, &observed.machine).await?;
    // A restarted agent may have other blocked ranges: check the decisions against them again.
    if observed.complete {
        bring_forward(&mut conn, super::connections::WORK, 10.0).await?;
    }
    drop(conn);
    if observed.complete && enqueue_drift(pool, &observed.apps).await? {
        waker.wake();
    }
    Ok(())
}

async fn record_app(pool: &PgPool, seen: &AppObserved) -> Result<(), Error> {
    let mut tx = db::begin_for_all(pool).await?;
    store::set_observed(&mut tx, seen).await?;
    store::insert_events(&mut tx, seen.app_id, &seen.events).await?;
    if seen.settled {
        settle(&mut tx, seen).await?;
    }
    tx.commit().await?;
    Ok(())
}

/// Releases the reservation of the previous revision once only the desired revision runs.
async fn settle(conn: &mut sqlx::PgConnection, seen: &AppObserved) -> Result<(), Error> {
    let Some(app) = store::find_app_by_id(conn, seen.app_id).await? else { return Ok(()) };
    if app.generation != seen.generation || app.revision != seen.revision || app.deleted_at.is_some() {
        return Ok(());
    }
    let Some(release) = store::find_release(conn, app.tenant_id, app.id, app.revision).await? else {
        return Ok(());
    };
    let wanted = super::Peak::of(&release.parse_spec()?);
    if wanted == app.peak && wanted.reserved() == app.reserved {
        return Ok(());
    }
    // Lock in the same order as a deploy: the quota first, then read the current row.
    store::lock_quota(conn, app.tenant_id).await?;
    let Some(app) = store::find_app_by_id(conn, seen.app_id).await? else { return Ok(()) };
    if app.generation == seen.generation && app.deleted_at.is_none() {
        store::add_used(conn, app.tenant_id, app.reserved, wanted.reserved(), 0).await?;
        store::set_peak(conn, app.tenant_id, app.id, wanted).await?;
    }
    Ok(())
}

/// Compares all apps that the driver knows with all apps that it should know.
async fn enqueue_drift(pool: &PgPool, seen: &[AppObserved]) -> Result<bool, Error> {
    const PAGE: i64 = 1_000;
    let known: HashMap<AppId, i64> = seen.iter().map(|app| (app.app_id, app.generation)).collect();
    let mut after = 0;
    let mut found = false;
    loop {
        let mut conn = pool.acquire().await?;
        let page = store::list_expected(&mut conn, after, PAGE).await?;
        drop(conn);
        let Some((last, _, _)) = page.last() else { return Ok(found) };
        after = last.0;
        let full = page.len() == usize::try_from(PAGE).unwrap_or(usize::MAX);
        let missing: Vec<(AppId, TenantId)> = page
            .into_iter()
            .filter(|(id, _, generation)| known.get(id).is_none_or(|held| held < generation))
            .map(|(id, tenant, _)| (id, tenant))
            .collect();
        if !missing.is_empty() {
            found = true;
            let mut tx = db::begin_for_all(pool).await?;
            for (id, tenant) in missing {
                // The tenant's network has to exist first; a lost journal loses both.
                enqueue(&mut tx, crate::tenants::actions::WORK, tenant.0, tenant).await?;
                enqueue(&mut tx, actions::WORK, id.0, tenant).await?;
            }
            tx.commit().await?;
        }
        if !full {
            return Ok(found);
        }
    }
}
