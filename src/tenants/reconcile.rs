//! Reconciles a tenant: its grant on the engine, its registry project, and its offboarding, step by step. A
//! check confirms each step.

use std::sync::Arc;
use std::time::Duration;

use sqlx::{PgConnection, PgPool};

use super::{Belongings, Left, Tenant, actions, store};
use crate::config::Pools;
use crate::db;
use crate::driver::{Driver, Removal, TenantGrant, TenantLimits};
use crate::error::Error;
use crate::ids::{TenantId, TenantName};
use crate::quotas::{self, Resource};
use crate::reconcile::{Failure, Lease, Outcome, Reconciler};
use crate::uid_ranges;

/// The reconciler of tenants.
pub struct TenantReconciler {
    /// Database.
    pub pool: PgPool,
    /// Address and id pools of the installation.
    pub pools: Pools,
    /// Driver of the engine.
    pub driver: Arc<dyn Driver>,
    /// Tenant resources to remove first, in the order of the steps `credentials` (robots), `apps`, `registry`.
    pub belongings: Vec<Arc<dyn Belongings>>,
}

#[async_trait::async_trait]
impl Reconciler for TenantReconciler {
    fn kind(&self) -> &'static str {
        actions::WORK
    }

    async fn reconcile(&self, lease: Lease) -> Result<Outcome, Failure> {
        let id = TenantId(lease.object_id);
        let mut conn = self.pool.acquire().await?;
        let tenant = store::find_tenant(&mut conn, id).await?;
        drop(conn);
        let Some(tenant) = tenant else { return Ok(Outcome::Gone) };
        match tenant.state.as_str() {
            "offboarded" => Ok(Outcome::Gone),
            "offboarding" => self.remove(&tenant).await,
            _ => self.ensure(&tenant).await,
        }
    }

    async fn report(&self, object_id: i64, problem: Option<&str>) -> Result<(), sqlx::Error> {
        let Some(problem) = problem else { return Ok(()) };
        let mut conn = self.pool.acquire().await?;
        let id = TenantId(object_id);
        store::set_condition(&mut conn, id, "Converged", "false", "Failing", problem)
            .await
            .map_err(|error| sqlx::Error::Protocol(error.to_string()))
    }
}

impl TenantReconciler {
    async fn ensure(&self, tenant: &Tenant) -> Result<Outcome, Failure> {
        let grant = grant(&self.pool, &self.pools, tenant.id, &tenant.name).await?;
        self.driver.ensure_tenant(&grant).await?;
        fail::fail_point!("tenants::ensured", |_| Err(Failure::Transient("failpoint".into())));
        let mut tx = db::begin_for_all(&self.pool).await?;
        let bridge =
            format!("subnet {}, isolated from other tenants, the host and external networks", grant.subnet);
        store::set_condition(&mut tx, tenant.id, "Network", "true", "Ready", &bridge).await?;
        let project = format!("push to {}/REPOSITORY:TAG", tenant.name);
        store::set_condition(&mut tx, tenant.id, "Registry", "true", "Ready", &project).await?;
        let (status, reason, message) = match tenant.state.as_str() {
            "suspended" => ("false", "Suspended", "apps are stopped; all data is kept"),
            _ => ("true", "Active", "apps may run"),
        };
        store::set_condition(&mut tx, tenant.id, "Active", status, reason, message).await?;
        store::set_condition(
            &mut tx,
            tenant.id,
            "Converged",
            "true",
            "UpToDate",
            "the tenant matches its desired state",
        )
        .await?;
        store::set_observed(&mut tx, tenant.id, tenant.generation).await?;
        tx.commit().await?;
        Ok(Outcome::Settled)
    }

    async fn remove(&self, tenant: &Tenant) -> Result<Outcome, Failure> {
        let again = Ok(Outcome::Again(Duration::from_millis(500)));
        let mut conn = self.pool.acquire().await?;
        store::revoke_tokens(&mut conn, tenant.id).await?;
        let tokens = store::count_good_tokens(&mut conn, tenant.id).await?;
        drop(conn);
        if tokens > 0 {
            return again;
        }
        for part in &self.belongings {
            self.step(tenant.id, part.step(), "running", "").await?;
            match part.remove(tenant.id, &tenant.name).await? {
                Left::Nothing => self.step(tenant.id, part.step(), "done", "").await?,
                Left::Some(what) => {
                    self.step(tenant.id, part.step(), "running", &what).await?;
                    return again;
                }
            }
        }
        self.step(tenant.id, "network", "running", "").await?;
        if self.driver.remove_tenant(&tenant.name, tenant.id).await? != Removal::Gone {
            return again;
        }
        self.step(tenant.id, "network", "done", "").await?;
        let mut tx = db::begin_for_all(&self.pool).await?;
        uid_ranges::release_ranges(&mut tx, tenant.id).await?;
        store::set_step(&mut tx, tenant.id, "user-ids", "done", "").await?;
        for part in ["Network", "Registry", "Active", "Converged"] {
            store::set_condition(&mut tx, tenant.id, part, "false", "Offboarded", "removed").await?;
        }
        store::set_condition(
            &mut tx,
            tenant.id,
            "UserIds",
            "false",
            "Burnt",
            "the user ids are never reused",
        )
        .await?;
        store::set_offboarded(&mut tx, tenant.id).await?;
        actions::record_offboarded(&mut tx, tenant.id, &tenant.name).await?;
        tx.commit().await?;
        Ok(Outcome::Gone)
    }

    async fn step(&self, id: TenantId, name: &str, state: &str, message: &str) -> Result<(), Failure> {
        let mut conn = self.pool.acquire().await?;
        Ok(store::set_step(&mut conn, id, name, state, message).await?)
    }
}

/// Builds the tenant's grant on the engine: user ids, network and limits.
pub async fn grant(
    pool: &PgPool,
    pools: &Pools,
    id: TenantId,
    name: &TenantName,
) -> Result<TenantGrant, Error> {
    let mut conn = pool.acquire().await?;
    let ranges = uid_ranges::list_ranges_of(&mut conn, id).await?;
    let network = store::tenant_network(&mut conn, id).await?;
    let subnet = pools.subnet(network).ok_or_else(|| Error::internal("a network beyond the pool"))?;
    Ok(TenantGrant {
        tenant: name.clone(),
        tenant_id: id,
        ranges: ranges.iter().map(uid_ranges::UidRange::ids).collect(),
        network,
        subnet,
        limits: TenantLimits {
            cpu_millis: limit(&mut conn, id, Resource::Cpu).await?,
            memory: limit(&mut conn, id, Resource::Memory).await?,
            pids: limit(&mut conn, id, Resource::Pids).await?,
        },
    })
}

/// Returns a limit for the driver, at least the minimum of its range: the kernel accepts no bound of zero.
async fn limit(conn: &mut PgConnection, id: TenantId, resource: Resource) -> Result<u64, Error> {
    let (least, _) = resource.definition().range;
    let limit = quotas::limit(conn, id, resource).await?.max(least);
    u64::try_from(limit).map_err(Error::internal)
}
