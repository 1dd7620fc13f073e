//! Garbage collection: removes bytes on the registry's disk that no tenant references, and bytes without a
//! database row. The digest is locked during the removal, so no push can commit it at the same time.

use std::sync::atomic::Ordering;
use std::time::Duration;

use actix_web::web;
use sqlx::{PgConnection, PgPool};
use tokio_util::sync::CancellationToken;

use super::Distribution;
use super::collector::{Blob, RegistryLink};
use super::store::{self, Doomed, OldUpload};
use crate::audit;
use crate::db;
use crate::error::Error;
use crate::ids::{ActorId, Digest, RepositoryPath, TenantId, TenantName};
use crate::telemetry::Metrics;

/// Interval of comparing the complete disk with the database.
const ROUND: Duration =
    if cfg!(feature = "failpoints") { Duration::from_secs(4) } else { Duration::from_secs(600) };
/// Minimum age of bytes without a row before they are removed; uploads in progress are younger.
const GRACE: u64 = if cfg!(feature = "failpoints") { 8 } else { 3_600 };
/// Maximum events of one round; the rest is only counted.
const EVENTS: usize = 50;

/// Removes the bytes of a digest that no tenant has; keeps the bytes if a tenant has it. Without a collector,
/// the registry's own garbage collection does this.
pub(super) async fn collect(registry: &Distribution, digest: &Digest) -> Result<(), Error> {
    let (Some(_), Some(work)) = (registry.collector(), registry.work()) else { return Ok(()) };
    let mut tx = db::begin_for_all(work).await?;
    collect_held(&mut tx, registry, digest).await?;
    tx.commit().await?;
    Ok(())
}

/// Does the same within a reconciler's transaction, which locks the digest until its end.
pub(super) async fn collect_held(
    conn: &mut PgConnection,
    registry: &Distribution,
    digest: &Digest,
) -> Result<(), Error> {
    let Some(collector) = registry.collector() else { return Ok(()) };
    if !store::hold_digest(conn, digest).await? {
        collector.remove_blob(digest).await?;
        fail::fail_point!("registries::collected", |_| Err(Error::internal("failpoint")));
    }
    Ok(())
}

/// Compares the registry's disk with the database repeatedly until `stop`. Does nothing without a collector.
pub async fn watch(
    pool: PgPool,
    registry: Distribution,
    metrics: web::Data<Metrics>,
    stop: CancellationToken,
) {
    if registry.collector().is_none() {
        tracing::info!(
            "registry.collector is not set: the registry's disk is not compared with the database"
        );
        return;
    }
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(ROUND) => {}
        }
        if let Err(error) = round(&pool, &registry, &metrics).await {
            tracing::warn!(
                error = error.for_log(),
                "the registry's disk could not be compared with the database; retrying later"
            );
        }
    }
}

/// Lock number: one replica runs a round, the others skip it.
const LEASE: i64 = 0x6275_6c6b_7265_6773;

async fn round(pool: &PgPool, registry: &Distribution, metrics: &Metrics) -> Result<(), Error> {
    let Some(collector) = registry.collector() else { return Ok(()) };
    let mut lease = db::begin_for_all(pool).await?;
    if !store::take_lease(&mut lease, LEASE).await? {
        return Ok(());
    }
    let (mut strays, mut bytes) = (0, 0);
    for prefix in 0..=255 {
        let blobs = collector.list(prefix).await?;
        tell_altered(pool, &blobs).await?;
        for stray in unknown(pool, blobs).await? {
            if remove_stray(pool, registry, &stray, strays < EVENTS).await? {
                strays += 1;
                bytes += stray.bytes;
                Metrics::count(&metrics.strays);
                metrics.stray_bytes.fetch_add(stray.bytes, Ordering::Relaxed);
            }
        }
    }
    if strays > 0 {
        tracing::error!(
            strays,
            bytes,
            "ALARM: the registry held bytes that no record names; they were removed"
        );
    }
    lease.commit().await?;
    Ok(())
}

/// Reports blobs whose size differs from the committed size. The platform itself never changes them.
async fn tell_altered(pool: &PgPool, blobs: &[Blob]) -> Result<(), Error> {
    let mut conn = pool.acquire().await?;
    for some in blobs.chunks(1_000) {
        for digest in store::list_altered(&mut conn, some).await? {
            tracing::error!(%digest, "ALARM: the registry holds a blob of another size than was committed");
        }
    }
    Ok(())
}

/// Returns the blobs without a row that are older than the grace.
async fn unknown(pool: &PgPool, mut blobs: Vec<Blob>) -> Result<Vec<Blob>, Error> {
    blobs.retain(|blob| blob.age >= GRACE);
    let mut found = Vec::new();
    let mut conn = pool.acquire().await?;
    for some in blobs.chunks(1_000) {
        let digests: Vec<String> = some.iter().map(|blob| blob.digest.to_string()).collect();
        let unknown = store::list_unknown(&mut conn, &digests, Doomed::Known).await?;
        found.extend(some.iter().filter(|blob| unknown.contains(&blob.digest)).cloned());
    }
    Ok(found)
}

/// Removes bytes without a row, unless a row exists by now.
async fn remove_stray(
    pool: &PgPool,
    registry: &Distribution,
    stray: &Blob,
    tell: bool,
) -> Result<bool, Error> {
    let Some(collector) = registry.collector() else { return Ok(false) };
    let mut tx = db::begin_for_all(pool).await?;
    if store::hold_digest(&mut tx, &stray.digest).await? {
        return Ok(false);
    }
    collector.remove_blob(&stray.digest).await?;
    if tell {
        let actor = ActorId::new("platform");
        let event = audit::AuditEvent {
            tenant: None,
            actor: &actor,
            action: "registry.stray",
            object: stray.digest.as_str(),
            request_id: "registry-collector",
            detail: serde_json::json!({"bytes": stray.bytes, "age_seconds": stray.age}),
        };
        audit::record(&mut tx, event).await?;
    }
    tx.commit().await?;
    Ok(true)
}

/// Completes commits that a crash interrupted, gives up abandoned uploads, and removes the folders of empty
/// repositories.
pub(super) async fn settle_uploads(pool: &PgPool, registry: &Distribution) -> Result<(), Error> {
    let mut conn = pool.acquire().await?;
    let old = store::list_old_uploads(&mut conn).await?;
    drop(conn);
    for upload in old {
        // One failing upload does not block the others.
        if let Err(error) = settle_upload(pool, registry, &upload).await {
            tracing::warn!(error = error.for_log(), tenant = %upload.tenant, "an upload could not be settled; retrying later");
        }
    }
    clear_repositories(pool, registry).await
}

async fn settle_upload(pool: &PgPool, registry: &Distribution, upload: &OldUpload) -> Result<(), Error> {
    let Some(part) = store::claim_old_upload(pool, upload).await? else { return Ok(()) };
    let tenant = &upload.tenant;
    // An upload without a repository cannot continue.
    let Ok(repository) = upload.repository.parse::<RepositoryPath>() else {
        return store::delete_upload(pool, tenant, &part).await;
    };
    let name = format!("{tenant}/{repository}");
    let size = match &upload.digest {
        Some(digest) => registry.blob_size(&name, digest).await?,
        None => None,
    };
    let mut conn = db::begin(pool, tenant).await?;
    let active = store::tenant_state(&mut conn, tenant).await?.as_deref() == Some("active");
    drop(conn);
    if let (Some(digest), false) = (&upload.digest, active) {
        // Content that arrived while the tenant was suspended or offboarded does not stay.
        undo_commit(pool, registry, tenant, &repository, digest).await?;
        store::delete_upload(pool, tenant, &part).await?;
        return collect(registry, digest).await;
    }
    if let (Some(digest), Some(size)) = (&upload.digest, size) {
        store::commit_blob(pool, tenant, &repository, digest, size, Some(&upload.id)).await?;
        tracing::info!(%name, "recorded a blob whose push was cut off at its end");
    } else if upload.given_up {
        if let Some(collector) = registry.collector() {
            collector.remove_upload(tenant, &repository, &upload.id).await?;
        }
        store::delete_upload(pool, tenant, &part).await?;
    }
    Ok(())
}

/// Removes an unrecorded blob from a repository.
async fn undo_commit(
    pool: &PgPool,
    registry: &Distribution,
    tenant: &TenantName,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<(), Error> {
    let mut conn = db::begin(pool, tenant).await?;
    let known = store::has_blob(&mut conn, tenant, repository, digest).await?;
    drop(conn);
    if !known {
        registry.delete_blob(&format!("{tenant}/{repository}"), digest).await?;
        if let Some(collector) = registry.collector() {
            collector.remove_link(tenant, repository, RegistryLink::Layer, digest).await?;
        }
    }
    Ok(())
}

async fn clear_repositories(pool: &PgPool, registry: &Distribution) -> Result<(), Error> {
    let mut conn = pool.acquire().await?;
    let empty = store::list_empty_repositories(&mut conn).await?;
    drop(conn);
    for (tenant, name, repository) in empty {
        if let Err(error) = clear_repository(pool, registry, (tenant, &name), &repository).await {
            tracing::warn!(error = error.for_log(), tenant = %name, "an empty repository could not be removed; retrying later");
        }
    }
    Ok(())
}

/// Marks a repository, removes its folders, then its row. The tenant's quota is not locked during the
/// collector's work.
async fn clear_repository(
    pool: &PgPool,
    registry: &Distribution,
    tenant: (TenantId, &TenantName),
    repository: &RepositoryPath,
) -> Result<(), Error> {
    let mut tx = db::begin(pool, tenant.0).await?;
    store::lock_project_of(&mut tx, tenant.0).await?;
    let going = store::mark_repository(&mut tx, tenant.0, repository).await?;
    tx.commit().await?;
    if !going {
        return Ok(());
    }
    if let Some(collector) = registry.collector() {
        collector.remove_repository(tenant.1, repository).await?;
    }
    let mut tx = db::begin(pool, tenant.0).await?;
    store::delete_repository(&mut tx, tenant.0, repository).await?;
    tx.commit().await?;
    Ok(())
}
