//! Brings one app to its desired state: hands the compiled workload to the driver, or removes it. The driver
//! then watches the instances itself; `follow.rs` stores its observations.

use std::sync::Arc;
use std::time::Duration;

use sqlx::PgPool;

use super::connections::Connections;
use super::release::{Running, WorkloadFacts};
use super::reservation::Reserved;
use super::{App, actions, store};
use crate::config::Pools;
use crate::db;
use crate::driver::workload::IdRange;
use crate::driver::{Driver, Removal};
use crate::error::Error;
use crate::ids::{ActorId, AppId, TenantId, TenantName};
use crate::reconcile::{Failure, Lease, Outcome, Reconciler, enqueue};
use crate::registries::{self, Distribution, PullSecrets};
use crate::tenants::{self, Belongings, Left};

/// The reconciler of apps.
pub struct AppReconciler {
    /// Database.
    pub pool: PgPool,
    /// Pools of the installation.
    pub pools: Pools,
    /// Runs workloads.
    pub driver: Arc<dyn Driver>,
    /// The registry, for the tags that keep deployed digests.
    pub registry: Distribution,
    /// Credentials for pulls.
    pub secrets: PullSecrets,
    /// Decides about connections.
    pub connections: Arc<dyn Connections>,
}

#[async_trait::async_trait]
impl Reconciler for AppReconciler {
    fn kind(&self) -> &'static str {
        actions::WORK
    }

    async fn reconcile(&self, lease: Lease) -> Result<Outcome, Failure> {
        let mut conn = self.pool.acquire().await?;
        let Some(app) = store::find_app_by_id(&mut conn, AppId(lease.object_id)).await? else {
            return Ok(Outcome::Gone);
        };
        let tenant = tenants::name_of(&mut conn, app.tenant_id).await?;
        drop(conn);
        if app.deleted_at.is_some() {
            return self.remove(&tenant, &app).await;
        }
        self.ensure(&tenant, &app, lease).await
    }

    async fn report(&self, object_id: i64, problem: Option<&str>) -> Result<(), sqlx::Error> {
        let mut conn = self.pool.acquire().await?;
        store::set_problem(&mut conn, AppId(object_id), problem).await
    }
}

impl AppReconciler {
    async fn ensure(&self, tenant: &TenantName, app: &App, lease: Lease) -> Result<Outcome, Failure> {
        let mut conn = self.pool.acquire().await?;
        let release = store::find_release(&mut conn, app.tenant_id, app.id, app.revision)
            .await?
            .ok_or_else(|| Error::internal("the app's current release is missing"))?;
        let state = tenants::tenant_state(&mut conn, app.tenant_id).await?;
        let number = tenants::tenant_network(&mut conn, app.tenant_id).await?;
        let subnet = self
            .pools
            .subnet(number)
            .ok_or_else(|| Error::internal("the tenant's network number is outside the pool"))?;
        let addresses = store::list_addresses(&mut conn, app.tenant_id, app.id, subnet).await?;
        let bytes =
            registries::image_bytes(&mut conn, app.tenant_id, &release.repository, &release.digest).await?;
        drop(conn);
        // Keep the deployed digest, even if the tenant moves or deletes its tags.
        self.registry.put_keeper_tag(tenant, &release.repository, &release.index_digest).await?;
        fail::fail_point!("apps::kept", |_| Err(Failure::Transient("failpoint".into())));
        let pull = self.secrets.mint(tenant, &release.repository)?.for_bytes(bytes);
        let id = |n: i64| {
            u32::try_from(n).map_err(|_| Failure::Permanent("a user id of the app exceeds 32 bits".into()))
        };
        let workload = release.workload(WorkloadFacts {
            tenant: tenant.clone(),
            app: app.name.clone(),
            app_id: app.id,
            generation: app.generation,
            epoch: lease.epoch,
            block: IdRange { start: id(app.uid_start)?, size: id(app.uid_size)? },
            addresses,
            running: if state == "active" { Running::Yes } else { Running::Suspended },
        })?;
        // The agent must know the id range of this app before it uses a block of that range.
        let grant = tenants::reconcile::grant(&self.pool, &self.pools, app.tenant_id, tenant).await?;
        self.driver.ensure_tenant(&grant).await?;
        // Apply the connections before the first instance starts. When nothing is to run, stop the instances
        // first: a network problem must not keep them running.
        let runs = workload.instances > 0;
        if runs {
            self.connections.settle(app.tenant_id).await?;
        }
        self.driver.ensure_app(&workload, Some(&pull)).await?;
        if !runs {
            self.connections.settle(app.tenant_id).await?;
        }
        fail::fail_point!("apps::ensured", |_| Err(Failure::Transient("failpoint".into())));
        Ok(Outcome::Settled)
    }

    async fn remove(&self, tenant: &TenantName, app: &App) -> Result<Outcome, Failure> {
        // Delete the row only after the driver confirmed the absence twice.
        for _ in 0..2 {
            if self.driver.remove_app(tenant, &app.name, app.id).await? != Removal::Gone {
                return Ok(Outcome::Again(Duration::from_millis(300)));
            }
        }
        fail::fail_point!("apps::removed", |_| Err(Failure::Transient("failpoint".into())));
        let mut tx = db::begin_for_all(&self.pool).await?;
        store::lock_quota(&mut tx, app.tenant_id).await?;
        if store::set_removed(&mut tx, app.tenant_id, app.id).await? {
            let reserved = store::find_reserved(&mut tx, app.tenant_id, app.id).await?;
            store::add_used(&mut tx, app.tenant_id, reserved, Reserved::default(), -1).await?;
            store::free_addresses(&mut tx, app.tenant_id, app.id).await?;
            let actor = ActorId::platform();
            let event = crate::audit::AuditEvent {
                tenant: Some(app.tenant_id),
                actor: &actor,
                action: "app.removed",
                object: app.name.as_str(),
                request_id: "reconcile",
                detail: serde_json::json!({}),
            };
            crate::audit::record(&mut tx, event).await?;
        }
        tx.commit().await?;
        Ok(Outcome::Gone)
    }
}

/// Removes the apps of a tenant that is being offboarded.
pub struct AppsOfTenant {
    /// Database.
    pub pool: PgPool,
}

#[async_trait::async_trait]
impl Belongings for AppsOfTenant {
    fn step(&self) -> &'static str {
        "apps"
    }

    async fn remove(&self, tenant: TenantId, _: &TenantName) -> Result<Left, Failure> {
        let mut tx = db::begin_for_all(&self.pool).await?;
        for name in store::list_undeleted(&mut tx, tenant).await? {
            let Some(app) = store::find_app(&mut tx, tenant, &name).await? else { continue };
            store::set_deleted(&mut tx, tenant, app.id).await?;
            enqueue(&mut tx, actions::WORK, app.id.0, tenant).await?;
        }
        let left = store::count_left(&mut tx, tenant).await?;
        tx.commit().await?;
        Ok(if left == 0 {
            Left::Nothing
        } else {
            Left::Some(format!("{left} app(s) are still being removed"))
        })
    }
}

#[async_trait::async_trait]
impl crate::registries::Holders for AppsOfTenant {
    async fn holders(
        &self,
        conn: &mut sqlx::PgConnection,
        tenant: TenantId,
        repository: &crate::ids::RepositoryPath,
        digests: &[String],
    ) -> Result<Vec<(String, String)>, Error> {
        store::list_holders(conn, tenant, repository, digests).await
    }
}
