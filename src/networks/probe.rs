//! Tests each new plan from inside the tenant's apps: flows that must be open, and flows that must be closed.
//! The result is stored with the plan. A few plans are tested at a time, the oldest first.

use std::time::Duration;

use time::OffsetDateTime;

use super::connections::Network;
use super::store::{self, Due};
use crate::driver::{self, PROBED_APPS};
use crate::reconcile::{Failure, Lease, Outcome, Reconciler};

/// The kind of this work. All plans share one object: a test takes seconds, and thousands of plans in the
/// queue must not delay other work.
pub const WORK: &str = "probe";
/// The one object.
pub const OBJECT: i64 = 0;

/// Number of tenants tested at a time.
const AT_ONCE: i64 = 3;
/// How long to wait for apps that are about to start, and the interval of the checks in seconds.
const PATIENCE: time::Duration = time::Duration::seconds(60);
const AGAIN: i32 = 3;

/// The reconciler that tests plans.
pub struct ProbeReconciler(pub Network);

#[async_trait::async_trait]
impl Reconciler for ProbeReconciler {
    fn kind(&self) -> &'static str {
        WORK
    }

    async fn reconcile(&self, _: Lease) -> Result<Outcome, Failure> {
        let mut conn = self.0.pool.acquire().await?;
        let due = store::list_due_probes(&mut conn, AT_ONCE).await?;
        drop(conn);
        futures_util::future::try_join_all(due.iter().map(|due| self.try_plan(due))).await?;
        let mut conn = self.0.pool.acquire().await?;
        let Some(next) = store::find_next_probe(&mut conn).await? else { return Ok(Outcome::Settled) };
        let left = (next - OffsetDateTime::now_utc()).max(time::Duration::ZERO).unsigned_abs();
        Ok(Outcome::Again(left + Duration::from_millis(20)))
    }

    async fn report(&self, _: i64, _: Option<&str>) -> Result<(), sqlx::Error> {
        Ok(())
    }
}

impl ProbeReconciler {
    async fn try_plan(&self, due: &Due) -> Result<(), Failure> {
        let (probed, again) = match self.0.driver.probe_tenant(&due.tenant).await {
            Ok(probed) => {
                if !probed.faults.is_empty() {
                    let faults = &probed.faults;
                    tracing::error!(tenant = %due.tenant, plan = due.number, ?faults, "the network differs from the plan");
                }
                // Apps that are about to start are tested once they run.
                let young = OffsetDateTime::now_utc() - due.in_force_at < PATIENCE;
                let some = i64::from(probed.apps) < due.apps.min(i64::from(PROBED_APPS));
                (Some(probed), (some && young).then_some(AGAIN))
            }
            // Other tenants are being tested, or the agent does not answer.
            Err(driver::Error::Transient(_) | driver::Error::Away(_) | driver::Error::Conflict(_)) => {
                (None, Some(AGAIN))
            }
            Err(driver::Error::Rejected(why)) => {
                tracing::error!(tenant = %due.tenant, plan = due.number, why, "a plan cannot be tested");
                (None, None)
            }
        };
        let mut conn = self.0.pool.acquire().await?;
        Ok(store::set_probed(&mut conn, due.tenant_id, due.number, probed.as_ref(), again).await?)
    }
}
