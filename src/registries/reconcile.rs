//! What the registry needs looking after: pushes that were cut off between the two writes, blobs
//! that nothing holds, and the project of a tenant that leaves.

use std::time::Duration;

use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use super::{Distribution, collect, store};
use crate::db;
use crate::error::Error;
use crate::ids::{Digest, RepositoryPath, TenantId, TenantName};
use crate::reconcile::Failure;
use crate::tenants::{Belongings, Left};

/// Looks after the registry once a minute, until `stop`.
pub async fn sweep(pool: PgPool, registry: Distribution, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(Duration::from_secs(60)) => {}
        }
        if let Err(error) = settle_pushes(&pool, &registry).await {
            tracing::debug!(%error, "pushes are settled later");
        }
        if let Err(error) = clear_doomed(&pool, &registry).await {
            tracing::debug!(%error, "doomed manifests are removed later");
        }
        if let Err(error) = collect::settle_uploads(&pool, &registry).await {
            tracing::debug!(%error, "uploads are settled later");
        }
        if let Err(error) = clear_blobs(&pool, &registry).await {
            tracing::debug!(%error, "loose blobs are cleared later");
        }
    }
}

/// A manifest that was written down and not confirmed is either in the registry or not.
pub async fn settle_pushes(pool: &PgPool, registry: &Distribution) -> Result<(), Error> {
    let mut conn = pool.acquire().await?;
    let open = store::list_unconfirmed(&mut conn).await?;
    drop(conn);
    for (tenant, name, repository, digest) in open {
        let there = registry.manifest_size(&format!("{name}/{repository}"), &digest).await?.is_some();
        let mut tx = pool.begin().await?;
        if there {
            store::set_confirmed(&mut tx, tenant, &repository, &digest).await?;
        } else {
            store::delete_manifest(&mut tx, tenant, &repository, &digest).await?;
        }
        tx.commit().await?;
    }
    Ok(())
}

/// Takes a doomed manifest out of the registry, then its row.
pub(super) async fn remove_doomed(
    pool: &PgPool,
    registry: &Distribution,
    tenant: (TenantId, &TenantName),
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<(), Error> {
    registry.delete_manifest(&format!("{}/{repository}", tenant.1), digest).await?;
    fail::fail_point!("registries::manifest_deleted", |_| Err(Error::internal("failpoint")));
    // Its bytes count until they are gone.
    collect::collect(registry, digest).await?;
    let mut tx = db::begin(pool, tenant.0).await?;
    store::delete_manifest(&mut tx, tenant.0, repository, digest).await?;
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
            tracing::warn!(%error, %name, "a deleted image is removed later");
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
            for (digest, places) in store::doom_loose_blobs(pool, &name).await? {
                for repository in places {
                    registry.delete_blob(&format!("{name}/{repository}"), &digest).await?;
                }
                collect::collect(registry, &digest).await?;
                let mut tx = pool.begin().await?;
                store::delete_blob(&mut tx, tenant, &digest).await?;
                tx.commit().await?;
            }
        }
    }
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
            self.registry.delete_manifest(&format!("{name}/{repository}"), digest).await?;
            collect::collect(&self.registry, digest).await?;
            store::delete_tags_of(&mut conn, tenant, repository, digest).await?;
            store::delete_manifest(&mut conn, tenant, repository, digest).await?;
        }
        if !manifests.is_empty() {
            return Ok(Left::Some("images are being deleted".into()));
        }
        let blobs = store::list_all_blobs(&mut conn, tenant).await?;
        for (digest, places) in &blobs {
            for repository in places {
                self.registry.delete_blob(&format!("{name}/{repository}"), digest).await?;
            }
            collect::collect(&self.registry, digest).await?;
            store::delete_blob(&mut conn, tenant, digest).await?;
        }
        Ok(if blobs.is_empty() { Left::Nothing } else { Left::Some("layers are being deleted".into()) })
    }
}
