//! Applies each tenant's plan, again whenever a part of it expires, and removes a tenant's connections during
//! offboarding.

use std::time::Duration;

use sqlx::PgPool;
use time::OffsetDateTime;

use super::actions;
use super::connections::{Again, Network};
use super::store;
use crate::db;
use crate::ids::{TenantId, TenantName};
use crate::reconcile::{Failure, Lease, Outcome, Reconciler};
use crate::tenants::{Belongings, Left};

/// Maximum time between two checks of a plan.
const LOOK: Duration = Duration::from_secs(540);

/// The reconciler of tenants' plans.
pub struct NetworkReconciler(pub Network);

#[async_trait::async_trait]
impl Reconciler for NetworkReconciler {
    fn kind(&self) -> &'static str {
        actions::WORK
    }

    async fn reconcile(&self, lease: Lease) -> Result<Outcome, Failure> {
        let tenant = TenantId(lease.object_id);
        let mut conn = self.0.pool.acquire().await?;
        let state = crate::tenants::tenant_state(&mut conn, tenant).await?;
        drop(conn);
        if state.starts_with("offboard") {
            return Ok(Outcome::Gone);
        }
        // Each check sends the plan again: the agent may have lost it.
        let Some(ends) = self.0.ensure(tenant, Again::Yes).await? else { return Ok(Outcome::Settled) };
        let left = (ends - OffsetDateTime::now_utc()).max(time::Duration::ZERO).unsigned_abs();
        Ok(Outcome::Again(left.min(LOOK) + Duration::from_millis(50)))
    }

    async fn report(&self, object_id: i64, problem: Option<&str>) -> Result<(), sqlx::Error> {
        let Some(problem) = problem else { return Ok(()) };
        let mut conn = self.0.pool.acquire().await?;
        store::set_plan_message(&mut conn, TenantId(object_id), problem)
            .await
            .map_err(|error| sqlx::Error::Protocol(error.to_string()))
    }
}

/// The grants, requests and service access of a tenant that is being deleted.
pub struct ConnectionsOfTenant {
    /// Database.
    pub pool: PgPool,
}

#[async_trait::async_trait]
impl Belongings for ConnectionsOfTenant {
    fn step(&self) -> &'static str {
        "connections"
    }

    async fn remove(&self, tenant: TenantId, _: &TenantName) -> Result<Left, Failure> {
        let mut tx = db::begin_for_all(&self.pool).await?;
        store::end_all(&mut tx, tenant).await?;
        tx.commit().await?;
        Ok(Left::Nothing)
    }
}
