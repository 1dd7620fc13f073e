//! What the registry needs looking after: pushes that were cut off between the two writes, blobs
//! that nothing holds, and the project of a tenant that leaves.

use std::time::Duration;

use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use super::collector::Link;
use super::store::{self, Why};
use super::{Distribution, collect};
use crate::db;
use crate::error::Error;
use crate::ids::{Digest, RepositoryPath, TenantId, TenantName};
use crate::reconcile::Failure;
use crate::tenants::{Belongings, Left};

/// One replica at a time looks after the registry.
const LEASE: i64 = 0x6275_6c6b_7377_6570;

/// Looks after the registry once a minute, until `stop`.
pub async fn sweep(pool: PgPool, registry: Distribution, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(Duration::from_secs(60)) => {}
        }
        if let Err(error) = once(&pool, &registry).await {
            tracing::warn!(error = error.for_log(), "the registry is looked after later");
        }
    }
}

/// Looks after the registry once, unless another replica does.
pub async fn once(pool: &PgPool, registry: &Distribution) -> Result<(), Error> {
    let mut lease = db::begin_for_all(pool).await?;
    if !store::take_lease(&mut lease, LEASE).await? {
        return Ok(());
    }
    if let Err(error) = settle_pushes(pool, registry).await {
        tracing::warn!(error = error.for_log(), "pushes are settled later");
    }
    if let Err(error) = clear_doomed(pool, registry).await {
        tracing::warn!(error = error.for_log(), "doomed manifests are removed later");
    }
    if let Err(error) = collect::settle_uploads(pool, registry).await {
        tracing::warn!(error = error.for_log(), "uploads are settled later");
    }
    if let Err(error) = clear_blobs(pool, registry).await {
        tracing::warn!(error = error.for_log(), "loose blobs are cleared later");
    }
    lease.commit().await?;
    Ok(())
}

/// A manifest that was written down and not confirmed is either in the registry or not.
async fn settle_pushes(pool: &PgPool, registry: &Distribution) -> Result<(), Error> {
    let mut conn = pool.acquire().await?;
    let open = store::list_unconfirmed(&mut conn).await?;
    drop(conn);
    for (tenant, name, repository, digest) in open {
        if let Err(error) = settle_push(pool, registry, (tenant, &name), &repository, &digest).await {
            tracing::warn!(error = error.for_log(), tenant = %name, "a push is settled later");
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
    // Held from the look at the record on: a push of the same manifest waits, or has made it young again.
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

/// Takes a doomed manifest out of the registry, then its row. Its digest is held meanwhile: what was listed as doomed may
/// have gone and been pushed again since, and then it stays.
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
        collector.remove_link(tenant.1, repository, Link::Revision, digest).await?;
    }
    // Its bytes count until they are gone.
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
        // One that does not go does not hold up the others.
        if let Err(error) = remove_doomed(pool, registry, (tenant, &name), &repository, &digest).await {
            tracing::warn!(error = error.for_log(), %name, "a deleted image is removed later");
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
                tracing::warn!(error = error.for_log(), tenant = %name, "loose blobs are cleared later");
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
            tracing::warn!(error = error.for_log(), tenant = %tenant.1, "a loose blob is cleared later");
        }
    }
    Ok(())
}

/// Takes a doomed blob out of each repository, then its row; as for a manifest, its digest is held meanwhile.
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
            collector.remove_link(tenant.1, &repository, Link::Layer, digest).await?;
        }
    }
    collect::collect_held(&mut tx, registry, digest).await?;
    store::delete_blob(&mut tx, tenant.0, digest).await?;
    tx.commit().await?;
    Ok(())
}

/// Takes a blob out of a repository that is on record without it; when it is doomed and in no repository any more, its row
/// goes too. Unless it has come again.
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
        collector.remove_link(tenant.1, repository, Link::Layer, digest).await?;
    }
    collect::collect_held(&mut tx, registry, digest).await?;
    store::delete_blob(&mut tx, tenant.0, digest).await?;
    tx.commit().await?;
    Ok(())
}

/// The robots of a tenant that leaves: they go first.
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
            n => Ok(Left::Some(format!("{n} robot(s) are still good"))),
        }
    }
}

/// The images of a tenant that leaves.
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
