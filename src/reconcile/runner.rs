//! The loop of claim, act and record. Only this file handles retries and leases.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::PgPool;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Failure, Lease, Outcome, Reconciler, Waker, store};
use crate::permits::FairPermits;
use crate::telemetry::Metrics;

/// Maximum number of objects in progress, in total and per tenant.
const AT_ONCE: usize = 16;
const PER_TENANT: i64 = 4;
/// Slots reserved for tenants without any object in progress.
const RESERVE: i64 = 4;
/// Work that takes longer (a pull, a hung engine) leaves its slot and continues in the slow lane.
const SLOW: Duration = Duration::from_secs(2);
/// Slots of the slow lane. Per tenant the limit is the same as for all of its work.
const SLOW_AT_ONCE: usize = 128;
/// Interval at which work of other replicas is looked for.
const POLL: Duration = Duration::from_millis(250);
/// Interval at which a claim is renewed: well within its duration, with room for a slow database.
const RENEW: Duration = Duration::from_secs(6);

/// Runs all reconcilers until `stop`. Work under way is finished first.
pub async fn run(
    pool: PgPool,
    reconcilers: Vec<Arc<dyn Reconciler>>,
    waker: Waker,
    metrics: actix_web::web::Data<Metrics>,
    stop: CancellationToken,
) {
    let by_kind: HashMap<&'static str, Arc<dyn Reconciler>> =
        reconcilers.into_iter().map(|r| (r.kind(), r)).collect();
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let busy: Arc<Mutex<HashMap<i64, i64>>> = Arc::default();
    let slow = FairPermits::new(usize::try_from(PER_TENANT).unwrap_or(4), SLOW_AT_ONCE);
    let under_way = TaskTracker::new();
    let mut down = false;
    while !stop.is_cancelled() {
        let free = i64::try_from(room.available_permits()).unwrap_or(0);
        let claimed = if free == 0 {
            Ok(Vec::new())
        } else {
            let now = lock(&busy).clone();
            let (most, per_tenant) = if free > RESERVE { (free - RESERVE, PER_TENANT) } else { (free, 1) };
            store::claim(&pool, most, per_tenant, &now).await
        };
        let claimed = match claimed {
            Ok(claimed) => {
                down = false;
                claimed
            }
            Err(error) => {
                if !down {
                    tracing::warn!(%error, "no work can be claimed; trying again");
                }
                down = true;
                Vec::new()
            }
        };
        let some = !claimed.is_empty();
        if some {
            fail::fail_point!("reconcile::claimed");
        }
        for claim in claimed {
            let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
            let Some(reconciler) = by_kind.get(claim.kind.as_str()).cloned() else {
                tracing::error!(
                    kind = claim.kind,
                    "this version does not know a kind of work; the row is skipped"
                );
                continue;
            };
            let (pool, metrics, waker) = (pool.clone(), metrics.clone(), waker.clone());
            let turn = TenantSlot::take(&busy, claim.tenant);
            let lane =
                Lane { slot: Some(permit), slow: slow.clone(), tenant: claim.tenant, waker: waker.clone() };
            under_way.spawn(async move {
                lane.run(work(&pool, &*reconciler, claim.lease, &metrics)).await;
                drop(turn);
                waker.wake();
            });
        }
        if !some {
            tokio::select! {
                () = stop.cancelled() => {}
                () = waker.woken() => {}
                () = tokio::time::sleep(POLL) => {}
            }
        }
    }
    under_way.close();
    let _ = tokio::time::timeout(Duration::from_secs(15), under_way.wait()).await;
}

/// The slot that a piece of work holds, and its access to the slow lane.
struct Lane {
    slot: Option<OwnedSemaphorePermit>,
    slow: FairPermits<i64>,
    tenant: i64,
    waker: Waker,
}

impl Lane {
    /// Runs the work. After [`SLOW`] it frees its slot as soon as the slow lane has one.
    async fn run(mut self, work: impl Future<Output = ()>) {
        let (slow, tenant) = (self.slow.clone(), self.tenant);
        let moved = async move {
            tokio::time::sleep(SLOW).await;
            loop {
                if let Ok(permit) = slow.take(&tenant, Duration::from_secs(3600)).await {
                    return permit;
                }
                tokio::time::sleep(SLOW).await;
            }
        };
        let (mut work, mut moved) = (std::pin::pin!(work), std::pin::pin!(moved));
        let mut place = None;
        loop {
            tokio::select! {
                biased;
                () = &mut work => return,
                permit = &mut moved, if place.is_none() => {
                    place = Some(permit);
                    self.slot = None;
                    self.waker.wake();
                }
            }
        }
    }
}

fn lock(busy: &Mutex<HashMap<i64, i64>>) -> std::sync::MutexGuard<'_, HashMap<i64, i64>> {
    busy.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// One object of a tenant in progress; counted until it is dropped. No tenant takes all slots with slow work.
struct TenantSlot {
    busy: Arc<Mutex<HashMap<i64, i64>>>,
    tenant: i64,
}

impl TenantSlot {
    fn take(busy: &Arc<Mutex<HashMap<i64, i64>>>, tenant: i64) -> Self {
        *lock(busy).entry(tenant).or_default() += 1;
        Self { busy: Arc::clone(busy), tenant }
    }
}

impl Drop for TenantSlot {
    fn drop(&mut self) {
        let mut busy = lock(&self.busy);
        match busy.get_mut(&self.tenant) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(busy.remove(&self.tenant)),
        }
    }
}

async fn work(pool: &PgPool, reconciler: &dyn Reconciler, lease: Lease, metrics: &Metrics) {
    let kind = reconciler.kind();
    let result = tokio::select! {
        result = reconciler.reconcile(lease) => result,
        () = hold(pool, kind, lease) => {
            tracing::warn!(kind, object = lease.object_id, "the lease was lost; the work is stopped");
            Metrics::count(&metrics.fenced);
            return;
        }
    };
    fail::fail_point!("reconcile::finish");
    match &result {
        Ok(Outcome::Again(_)) => {}
        Ok(_) => Metrics::count(&metrics.reconciles),
        Err(Failure::Transient(error)) => {
            Metrics::count(&metrics.retries);
            tracing::warn!(
                kind,
                object = lease.object_id,
                attempt = lease.attempt,
                error,
                "a reconcile failed; it is tried again"
            );
        }
        Err(Failure::Permanent(error)) => {
            Metrics::count(&metrics.parked);
            tracing::warn!(
                kind,
                object = lease.object_id,
                error,
                "a reconcile failed permanently; the object is parked"
            );
        }
    }
    let problem = match &result {
        Ok(_) => None,
        Err(Failure::Transient(text) | Failure::Permanent(text)) => Some(text.as_str()),
    };
    let recorded = match store::finish(pool, kind, lease, &result).await {
        Ok(true) => reconciler.report(lease.object_id, problem).await,
        Ok(false) => {
            Metrics::count(&metrics.fenced);
            Ok(())
        }
        Err(error) => Err(error),
    };
    if let Err(error) = recorded {
        // The claim expires by itself and the work is repeated: it is idempotent.
        tracing::warn!(kind, object = lease.object_id, %error, "the result of a reconcile cannot be stored");
    }
}

/// Renews the claim until it can no longer be renewed. Returns a second before the claim ends.
async fn hold(pool: &PgPool, kind: &str, lease: Lease) {
    let margin = Duration::from_secs_f64(store::LEASE_SECONDS - 1.0);
    let mut good_until = tokio::time::Instant::now() + margin;
    loop {
        tokio::time::sleep(RENEW).await;
        let asked = tokio::time::Instant::now();
        match tokio::time::timeout_at(good_until, store::renew(pool, kind, lease)).await {
            Ok(Ok(true)) => good_until = asked + margin,
            Ok(Ok(false)) | Err(_) => return,
            Ok(Err(_)) if tokio::time::Instant::now() >= good_until => return,
            Ok(Err(_)) => {}
        }
    }
}
