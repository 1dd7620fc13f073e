//! After each plan, what it must have opened and closed is tried from within the tenant's apps, and written down
//! with it.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::sync::Semaphore;

use super::connections::Network;
use super::store;
use crate::driver;
use crate::ids::TenantId;
use crate::reconcile::{Failure, Lease, Outcome, Reconciler};

/// The kind of this work; the object is the tenant.
pub const WORK: &str = "probe";

/// How many tenants are tried at a time: trying takes seconds, and others wait for the same room.
const AT_ONCE: usize = 2;
/// How long apps are waited for that are about to start.
const PATIENCE: time::Duration = time::Duration::seconds(60);

/// The reconciler that tries plans.
pub struct ProbeReconciler {
    network: Network,
    room: Semaphore,
}

impl ProbeReconciler {
    /// Over the noun's parts.
    #[must_use]
    pub fn new(network: Network) -> Self {
        Self { network, room: Semaphore::new(AT_ONCE) }
    }
}

#[async_trait::async_trait]
impl Reconciler for ProbeReconciler {
    fn kind(&self) -> &'static str {
        WORK
    }

    async fn reconcile(&self, lease: Lease) -> Result<Outcome, Failure> {
        let tenant = TenantId(lease.object_id);
        let Ok(_turn) = self.room.try_acquire() else {
            return Ok(Outcome::Again(Duration::from_millis(500)));
        };
        let mut conn = self.network.pool.acquire().await?;
        let Some(plan) = store::find_unprobed(&mut conn, tenant).await? else { return Ok(Outcome::Gone) };
        drop(conn);
        let probed = match self.network.driver.probe_tenant(&plan.tenant).await {
            Ok(probed) => probed,
            // Others are being tried.
            Err(driver::Error::Transient(_)) => return Ok(Outcome::Again(Duration::from_secs(1))),
            Err(error) => return Err(error.into()),
        };
        if !probed.faults.is_empty() {
            tracing::error!(tenant = %plan.tenant, plan = plan.number, faults = ?probed.faults, "a plan is not what it says");
        }
        // Apps that are about to start are tried when they have.
        let young = OffsetDateTime::now_utc() - plan.in_force_at < PATIENCE;
        let whole = i64::from(probed.apps) >= plan.apps.min(i64::from(driver::PROBED_APPS)) || !young;
        let mut conn = self.network.pool.acquire().await?;
        store::set_probed(&mut conn, tenant, plan.number, &probed, whole).await?;
        Ok(if whole { Outcome::Gone } else { Outcome::Again(Duration::from_secs(2)) })
    }

    async fn report(&self, _: i64, _: Option<&str>) -> Result<(), sqlx::Error> {
        Ok(())
    }
}
