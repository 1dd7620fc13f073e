//! Actions on apps: deploy, roll back, delete. An action first reads from outside the database: a tag becomes a
//! digest. One transaction then writes quota, ids, addresses, release, audit and work. `deploy.rs` and
//! `roll_back.rs` make releases; this file holds the code that they share.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::json;
use sqlx::{PgPool, Postgres, Transaction};

use super::connections::Connections;
use super::reservation::{Peak, Reserved};
use super::sight::Sight;
use super::{App, Release, store};
use crate::access::{By, TenantRef};
use crate::config::Pools;
use crate::db;
use crate::db::expected::Expected;
use crate::driver::workload::Subnet;
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::ids::{AppId, AppName, Digest, RepositoryPath};
use crate::reconcile::{Waker, enqueue};
use crate::registries::{self, Distribution};

mod deploy;
mod roll_back;

pub use deploy::{Deployed, Mode};

/// The kind of an app's work.
pub const WORK: &str = "app";

/// The dependencies of the actions.
#[derive(Clone)]
pub struct Apps {
    /// Database.
    pub pool: PgPool,
    /// Pools of the installation.
    pub pools: Pools,
    /// The registry.
    pub registry: Distribution,
    /// Wakes the runner.
    pub waker: Waker,
    /// Decides about connections.
    pub connections: Arc<dyn Connections>,
    /// How fresh the observed state of the running apps is.
    pub sight: Sight,
}

impl Apps {
    async fn subnet_of(&self, conn: &mut sqlx::PgConnection, tenant: &TenantRef) -> Result<Subnet, Error> {
        let number = crate::tenants::tenant_network(conn, tenant.id).await?;
        self.pools
            .subnet(number)
            .ok_or_else(|| Error::internal("the tenant's network number is outside the pool"))
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one change")]
    async fn advance(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        by: By<'_>,
        tenant: &TenantRef,
        app: &App,
        (peak, reserved): (Peak, Reserved),
        release: &mut Release,
        action: &'static str,
    ) -> Result<(i64, i64), Error> {
        let (generation, revision) = store::advance_app(tx, tenant.id, app.id, peak, reserved).await?;
        release.revision = revision;
        self.take_addresses(tx, tenant, app.id, peak).await?;
        store::insert_release(tx, tenant.id, app.id, release).await?;
        store::add_used(tx, tenant.id, app.reserved, reserved, 0).await?;
        let detail = json!({
            "revision": revision, "digest": release.digest, "rolled_back_to": release.rolled_back_to,
        });
        by.record(tx, tenant.id, action, app.name.as_str(), detail).await?;
        let words = format!("release {revision} of {}", app.name);
        self.connections.changed(tx, by, tenant.id, app.id, words).await?;
        enqueue(tx, WORK, app.id.0, tenant.id).await?;
        Ok((generation, revision))
    }

    async fn take_addresses(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        tenant: &TenantRef,
        app: AppId,
        peak: Peak,
    ) -> Result<(), Error> {
        let subnet = self.subnet_of(tx, tenant).await?;
        let count = peak.reserved().instances;
        if !store::take_addresses(tx, tenant.id, app, count, subnet).await? {
            return Err(no_address(subnet));
        }
        // A stopping instance keeps its address until it ends. Spare addresses let a release start without
        // waiting for that. The app takes them only while the subnet has many free addresses.
        let spare = peak.instances * peak.surge;
        let free = store::count_free_addresses(tx, tenant.id, subnet).await?;
        if free - spare >= i64::from(subnet.size()) / 2 {
            store::take_addresses(tx, tenant.id, app, count + spare, subnet).await?;
        }
        Ok(())
    }

    /// Requests an app's deletion. The reconciler carries it out; then the name is free again.
    pub async fn delete(
        &self,
        by: By<'_>,
        tenant: &TenantRef,
        name: &AppName,
        expected: &Expected,
    ) -> Result<i64, Error> {
        let mut tx = db::begin(&self.pool, tenant.id).await?;
        store::lock_quota(&mut tx, tenant.id).await?;
        let app = store::find_app(&mut tx, tenant.id, name).await?.ok_or(Error::NotFound)?;
        expected.check(Some(app.generation))?;
        if app.deleted_at.is_some() {
            return Ok(app.generation);
        }
        let generation = store::set_deleted(&mut tx, tenant.id, app.id).await?;
        by.record(&mut tx, tenant.id, "app.delete", name.as_str(), json!({})).await?;
        self.connections.changed(&mut tx, by, tenant.id, app.id, format!("{name} is deleted")).await?;
        enqueue(&mut tx, WORK, app.id.0, tenant.id).await?;
        fail::fail_point!("apps::delete_commit", |_| Err(Error::internal("failpoint")));
        tx.commit().await?;
        self.waker.wake();
        Ok(generation)
    }

    /// Counts the names of refused fields. The counts show which fields the format may need next.
    pub async fn count_refused(&self, faults: &[Fault]) {
        let names: BTreeSet<String> = faults
            .iter()
            .filter(|fault| matches!(fault.kind, Kind::Unknown | Kind::Forbidden))
            .filter_map(|fault| fault.path.rsplit('.').next())
            .map(|name| {
                name.chars().filter(|c| c.is_ascii_alphanumeric() || "_-".contains(*c)).take(64).collect()
            })
            .filter(|name: &String| !name.is_empty())
            .take(20)
            .collect();
        if names.is_empty() {
            return;
        }
        let names: Vec<String> = names.into_iter().collect();
        if let Ok(mut conn) = self.pool.acquire().await
            && let Err(error) = store::count_refused(&mut conn, &names).await
        {
            tracing::warn!(%error, "refused fields were not counted");
        }
    }
}

fn no_address(subnet: Subnet) -> Error {
    Error::Conflict(format!(
        "the tenant's subnet {subnet} has no free address: an app keeps as many addresses as it ever had instances at a time, \
         and the addresses of a deleted app become free after a minute"
    ))
}

async fn is_image_there(
    conn: &mut sqlx::PgConnection,
    tenant: &TenantRef,
    repository: &RepositoryPath,
    index: &Digest,
    manifest: &Digest,
) -> Result<bool, Error> {
    registries::are_manifests_there(conn, tenant.id, repository, &[index, manifest]).await
}

fn image_is_gone() -> Fault {
    Fault::new(Code(200), Kind::Conflict, "image", "the image has just been deleted").instead("push it again")
}
