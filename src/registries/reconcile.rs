//! The registry's background work: completes interrupted pushes, removes unreferenced blobs, and removes the
//! project of an offboarded tenant.

use std::time::Duration;

use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use super::collector::RegistryLink;
use super::store::{self, Why};
use super::{Distribution, collect};
use crate::db;
use crate::error::Error;
use crate::ids::{Digest, RepositoryPath, TenantId, TenantName};
use crate::reconcile::Failure;
use crate::tenants::{Belongings, Left};

/// Lock number: one replica at a time does this work.
const LEASE: i64 = 0x6275_6c6b_7377_6570;

/// Sweeps the registry once a minute, until `stop`.
pub async fn sweep(pool: PgPool, registry: Distribution, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(Duration::from_secs(60)) => {}
        }
        if let Err(error) = once(&pool, &registry).await {
            tracing::warn!(error = error.for_log(), "the registry sweep failed; retrying in a minute");
        }
    }
}

/// Sweeps the registry once, unless another replica does.
pub async fn once(pool: &PgPool, registry: &Distribution) -> Result<(), Error> {
    let mut lease = db::begin_for_all(pool).await?;
    if !store::take_lease(&mut lease, LEASE).await? {
        return Ok(());
    }
    if let Err(error) = settle_pushes(pool, registry).await {
        tracing::warn!(error = error.for_log(), "pushes could not be settled; retrying later");
    }
    if let Err(error) = clear_doomed(pool, registry).await {
        tracing::warn!(
            error = error.for_log(),
            "manifests marked for deletion could not be removed; retrying later"
        );
    }
    if let Err(error) = collect::settle_uploads(pool, registry).await {
        tracing::warn!(error = error.for_log(), "uploads could not be settled; retrying later");
    }
    if let Err(error) = clear_blobs(pool, registry).await {
        tracing::warn!(error = error.for_log(), "unreferenced blobs could not be removed; retrying later");
    }
    lease.commit().await?;
    Ok(())
}

/// Settles manifests that were recorded but not confirmed: each is either in the registry or not.
async fn settle_pushes(pool: &PgPool, registry: &Distribution) -> Result<(), Error> {
    let mut conn = pool.acquire().await?;
    let open = store::list_unconfirmed(&mut conn).await?;
    drop(conn);
    for (tenant, name, repository, digest) in open {
        if let Err(error) = settle_push(pool, registry, (tenant, &name), &repository, &digest).await {
            tracing::warn!(error = error.for_log(), tenant = %name, "a push could not be settled; retrying later");
        }
    }
    Ok(())
}

async fn settle_push(
    pool: &PgPool,
    registry: &Distribution,
    tenant: (TenantId, &TenantName),
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<(), Error> {
    // Lock the digest before reading the row: a push of the same manifest waits, or has already renewed the
    // row.
    let mut tx = db::begin(pool, tenant.0).await?;
    store::lock_digest(&mut tx, digest).await?;
    if !store::is_unconfirmed(&mut tx, tenant.0, repository, digest).await? {
        return Ok(());
    }
    if registry.manifest_size(&format!("{}/{repository}", tenant.1), digest).await?.is_some() {
        store::settle_manifest(&mut tx, tenant.0, repository, digest).await?;
    } else {
        store::delete_manifest(&mut tx, tenant.0, repository, digest, Why::NeverStored).await?;
    }
    tx.commit().await?;
    Ok(())
}

/// Removes a manifest marked for deletion from the registry, then its row, under a lock on its digest. A listed
/// manifest may have been removed and pushed again since; then it stays.
pub(super) async fn remove_doomed(
    pool: &PgPool,
    registry: &Distribution,
    tenant: (TenantId, &TenantName),
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<(), Error> {
    let mut tx = db::begin(registry.work().unwrap_or(pool), tenant.0).await?;
    store::lock_digest(&mut tx, digest).await?;
    if !store::is_doomed(&mut tx, tenant.0, repository, digest).await? {
        return Ok(());
    }
    registry.delete_manifest(&format!("{}/{repository}", tenant.1), digest).await?;
    fail::fail_point!("registries::manifest_deleted", |_| Err(Error::internal("failpoint")));
    if let Some(collector) = registry.collector() {
        collector.remove_link(tenant.1, repository, RegistryLink::Revision, digest).await?;
    }
    // The bytes count until they are removed.
    collect::collect_held(&mut tx, registry, digest).await?;
    store::delete_manifest(&mut tx, tenant.0, repository, digest, Why::Doomed).await?;
    tx.commit().await?;
    Ok(())
}

async fn clear_doomed(pool: &PgPool, registry: &Distribution) -> Result<(), Error> {
    let mut conn = pool.acquire().await?;
    let doomed = store::list_doomed(&mut conn).await?;
    drop(conn);
    for (tenant, name, repository, digest) in doomed {
        // One failing manifest does not block the others.
        if let Err(error) = remove_doomed(pool, registry, (tenant, &name), &repository, &digest).await {
            tracing::warn!(error = error.for_log(), %name, "a deleted image could not be removed; retrying later");
        }
    }
    Ok(())
}

async fn clear_blobs(pool: &PgPool, registry: &Distribution) -> Result<(), Error> {
    let mut after = 0;
    loop {
        let mut conn = pool.acquire().await?;
        let tenants = store::list_tenants_with_loose_blobs(&mut conn, after).await?;
        drop(conn);
        let Some((last, _)) = tenants.last() else { return Ok(()) };
        after = last.0;
        for (tenant, name) in tenants {
            if let Err(error) = clear_blobs_of(pool, registry, (tenant, &name)).await {
                tracing::warn!(error = error.for_log(), tenant = %name, "unreferenced blobs could not be removed; retrying later");
            }
        }
    }
}

async fn clear_blobs_of(
    pool: &PgPool,
    registry: &Distribution,
    tenant: (TenantId, &TenantName),
) -> Result<(), Error> {
    for digest in store::doom_loose_blobs(pool, tenant.1).await? {
        if let Err(error) = remove_blob(pool, registry, tenant, &digest).await {
            tracing::warn!(error = error.for_log(), tenant = %tenant.1, "an unreferenced blob could not be removed; retrying later");
        }
    }
    Ok(())
}

/// Removes a blob marked for deletion from each repository, then its row, under a lock on its digest.
async fn remove_blob(
    pool: &PgPool,
    registry: &Distribution,
    tenant: (TenantId, &TenantName),
    digest: &Digest,
) -> Result<(), Error> {
    let mut tx = db::begin(registry.work().unwrap_or(pool), tenant.0).await?;
    store::lock_digest(&mut tx, digest).await?;
    let Some(places) = store::list_doomed_places(&mut tx, tenant.0, digest).await? else { return Ok(()) };
    for repository in places {
        registry.delete_blob(&format!("{}/{repository}", tenant.1), digest).await?;
        if let Some(collector) = registry.collector() {
            collector.remove_link(tenant.1, &repository, RegistryLink::Layer, digest).await?;
        }
    }
    collect::collect_held(&mut tx, registry, digest).await?;
    store::delete_blob(&mut tx, tenant.0, digest).await?;
    tx.commit().await?;
    Ok(())
}

/// Removes a blob from a repository that no longer has it in the database. Removes its row too if it is marked
/// for deletion and in no other repository. Does nothing if the blob was pushed again.
pub(super) async fn remove_place(
    pool: &PgPool,
    registry: &Distribution,
    tenant: (TenantId, &TenantName),
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<(), Error> {
    let mut tx = db::begin(registry.work().unwrap_or(pool), tenant.0).await?;
    store::lock_digest(&mut tx, digest).await?;
    if store::has_blob(&mut tx, tenant.1, repository, digest).await? {
        return Ok(());
    }
    registry.delete_blob(&format!("{}/{repository}", tenant.1), digest).await?;
    if let Some(collector) = registry.collector() {
        collector.remove_link(tenant.1, repository, RegistryLink::Layer, digest).await?;
    }
    collect::collect_held(&mut tx, registry, digest).await?;
    store::delete_blob(&mut tx, tenant.0, digest).await?;
    tx.commit().await?;
    Ok(())
}

/// Removes the registry credentials of a tenant that is being offboarded; they go first.
pub struct RobotsOfTenant {
    /// Database.
    pub pool: PgPool,
}

#[async_trait::async_trait]
impl Belongings for RobotsOfTenant {
    fn step(&self) -> &'static str {
        "credentials"
    }
    async fn remove(&self, tenant: TenantId, _: &TenantName) -> Result<Left, Failure> {
        let mut conn = self.pool.acquire().await?;
        match store::revoke_robots(&mut conn, tenant).await? {
            0 => Ok(Left::Nothing),
            n => Ok(Left::Some(format!("{n} registry credential(s) are still valid"))),
        }
    }
}

/// Removes the images of a tenant that is being offboarded.
pub struct ImagesOfTenant {
    /// Database.
    pub pool: PgPool,
    /// The registry.
    pub registry: Distribution,
}

#[async_trait::async_trait]
impl Belongings for ImagesOfTenant {
    fn step(&self) -> &'static str {
        "registry"
    }

    async fn remove(&self, tenant: TenantId, name: &TenantName) -> Result<Left, Failure> {
        let mut conn = self.pool.acquire().await?;
        store::doom_all(&mut conn, tenant).await?;
        let manifests = store::list_all_manifests(&mut conn, tenant).await?;
        for (repository, digest) in &manifests {
            store::delete_tags_of(&mut conn, tenant, repository, digest).await?;
            remove_doomed(&self.pool, &self.registry, (tenant, name), repository, digest).await?;
        }
        if !manifests.is_empty() {
            return Ok(Left::Some("images are being deleted".into()));
        }
        let blobs = store::list_all_blobs(&mut conn, tenant).await?;
        for digest in &blobs {
            remove_blob(&self.pool, &self.registry, (tenant, name), digest).await?;
        }
        Ok(if blobs.is_empty() { Left::Nothing } else { Left::Some("layers are being deleted".into()) })
    }
}
