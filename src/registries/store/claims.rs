//! Claims on uploads: one request at a time writes to an upload, cancels it or commits it.

use sqlx::{PgConnection, PgPool};

use super::uploads::{OldUpload, OpenUpload, lock_digest};
use super::{require_active, signed};
use crate::db;
use crate::error::Error;
use crate::ids::{Digest, RepositoryPath, TenantName};

/// The result of claiming an upload.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::registries) enum UploadClaimOutcome {
    /// This request holds the upload, under this claim number.
    Taken(String),
    /// Another request writes to it, or its commit is not settled.
    Busy,
    /// The repository has no such upload.
    Unknown,
}

/// Claims an upload for a minute.
pub(in crate::registries) async fn claim_part(
    pool: &PgPool,
    tenant: &TenantName,
    repository: &RepositoryPath,
    id: &str,
) -> Result<UploadClaimOutcome, Error> {
    let mut tx = db::begin(pool, tenant).await?;
    let part = sqlx::query_scalar!(
        r#"UPDATE upload u SET changed_at = now(), part = gen_random_uuid()::text,
           part_until = now() + interval '60 seconds' FROM tenant t WHERE t.name = $1 AND u.tenant_id = t.id
           AND u.repository = $2 AND u.id = $3 AND u.digest IS NULL AND (u.part IS NULL OR u.part_until < now())
           RETURNING u.part AS "part!""#,
        tenant.as_str(),
        repository.as_str(),
        id
    )
    .fetch_optional(&mut *tx)
    .await?;
    let claimed = match part {
        Some(part) => UploadClaimOutcome::Taken(part),
        None if is_on_record(&mut tx, tenant, repository, id).await? => UploadClaimOutcome::Busy,
        None => UploadClaimOutcome::Unknown,
    };
    tx.commit().await?;
    Ok(claimed)
}

async fn is_on_record(
    conn: &mut PgConnection,
    tenant: &TenantName,
    repository: &RepositoryPath,
    id: &str,
) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM upload u JOIN tenant t ON t.id = u.tenant_id WHERE t.name = $1
           AND u.repository = $2 AND u.id = $3) AS "yes!""#,
        tenant.as_str(),
        repository.as_str(),
        id
    )
    .fetch_one(conn)
    .await?)
}

/// Stores the progress and the registry's new state of a claimed upload. Returns whether the claim still holds.
pub(in crate::registries) async fn note_part(
    pool: &PgPool,
    tenant: &TenantName,
    part: &str,
    upload: &OpenUpload,
) -> Result<bool, Error> {
    let mut tx = db::begin(pool, tenant).await?;
    let noted = sqlx::query!(
        "UPDATE upload u SET changed_at = now(), state = $3, received = $4 FROM tenant t \
         WHERE t.name = $1 AND u.tenant_id = t.id AND u.part = $2",
        tenant.as_str(),
        part,
        upload.state,
        signed(upload.received)
    )
    .execute(&mut *tx)
    .await?
    .rows_affected();
    tx.commit().await?;
    Ok(noted == 1)
}

/// Records that the registry is about to commit a claimed upload; waits while the digest is being collected.
/// Returns whether the claim still holds.
pub(in crate::registries) async fn ask_commit(
    pool: &PgPool,
    tenant: &TenantName,
    part: &str,
    digest: &Digest,
) -> Result<bool, Error> {
    let mut tx = db::begin(pool, tenant).await?;
    lock_digest(&mut tx, digest).await?;
    require_active(&mut tx, tenant).await?;
    let asked = sqlx::query!(
        "UPDATE upload u SET changed_at = now(), digest = $3, part_until = now() + interval '60 seconds' \
         FROM tenant t WHERE t.name = $1 AND u.tenant_id = t.id AND u.part = $2",
        tenant.as_str(),
        part,
        digest.as_str()
    )
    .execute(&mut *tx)
    .await?
    .rows_affected();
    tx.commit().await?;
    Ok(asked == 1)
}

/// Records a mount if the source repository has the blob. Until the mount is settled, the collector keeps the
/// blob. Returns the id for settling it; none without such a blob.
pub(in crate::registries) async fn begin_mount(
    pool: &PgPool,
    tenant: &TenantName,
    (from, to): (&RepositoryPath, &RepositoryPath),
    digest: &Digest,
) -> Result<Option<String>, Error> {
    let mut tx = db::begin(pool, tenant).await?;
    lock_digest(&mut tx, digest).await?;
    require_active(&mut tx, tenant).await?;
    let id = sqlx::query_scalar!(
        "INSERT INTO upload (tenant_id, id, repository, digest) \
         SELECT t.id, 'mount-' || gen_random_uuid(), $3, $4 FROM tenant t WHERE t.name = $1 AND EXISTS \
           (SELECT 1 FROM blob b JOIN blob_place p USING (tenant_id, digest) WHERE b.tenant_id = t.id \
            AND p.repository = $2 AND b.digest = $4 AND b.doomed_at IS NULL) RETURNING id",
        tenant.as_str(),
        from.as_str(),
        to.as_str(),
        digest.as_str()
    )
    .fetch_optional(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(id)
}

/// Removes a mount that the registry refused.
pub(in crate::registries) async fn end_mount(
    pool: &PgPool,
    tenant: &TenantName,
    id: &str,
) -> Result<(), Error> {
    let mut tx = db::begin(pool, tenant).await?;
    sqlx::query!(
        "DELETE FROM upload u USING tenant t WHERE t.name = $1 AND u.tenant_id = t.id AND u.id = $2",
        tenant.as_str(),
        id
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(())
}

/// Claims an upload for the sweep, unless a request holds it or it changed since.
pub(in crate::registries) async fn claim_old_upload(
    pool: &PgPool,
    old: &OldUpload,
) -> Result<Option<String>, Error> {
    let mut tx = db::begin(pool, &old.tenant).await?;
    let part = sqlx::query_scalar!(
        r#"UPDATE upload u SET part = gen_random_uuid()::text, part_until = now() + interval '60 seconds'
           FROM tenant t WHERE t.name = $1 AND u.tenant_id = t.id AND u.id = $2
           AND u.digest IS NOT DISTINCT FROM $3 AND u.changed_at < now() - interval '10 minutes'
           AND (u.part IS NULL OR u.part_until < now()) RETURNING u.part AS "part!""#,
        old.tenant.as_str(),
        old.id,
        old.digest.as_ref().map(Digest::as_str)
    )
    .fetch_optional(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(part)
}

/// Renews a claim. Returns whether it still holds.
pub(in crate::registries) async fn renew_part(
    pool: &PgPool,
    tenant: &TenantName,
    part: &str,
) -> Result<bool, Error> {
    let mut tx = db::begin(pool, tenant).await?;
    let renewed = sqlx::query!(
        "UPDATE upload u SET changed_at = now(), part_until = now() + interval '60 seconds' FROM tenant t \
         WHERE t.name = $1 AND u.tenant_id = t.id AND u.part = $2",
        tenant.as_str(),
        part
    )
    .execute(&mut *tx)
    .await?
    .rows_affected();
    tx.commit().await?;
    Ok(renewed == 1)
}

/// The state in which a request leaves its upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::registries) enum Ends {
    /// The registry answered: the next request may proceed.
    Answered,
    /// The connection to the registry was cut: data in transit may still be written, so the next request waits
    /// a few seconds.
    Cut,
}

/// Releases a claim without a commit, and clears the record of the requested commit.
pub(in crate::registries) async fn release_part(
    pool: &PgPool,
    tenant: &TenantName,
    part: &str,
    ends: Ends,
) -> Result<(), Error> {
    let mut tx = db::begin(pool, tenant).await?;
    sqlx::query!(
        "UPDATE upload u SET digest = NULL, part = CASE WHEN $3 THEN NULL ELSE u.part END, \
         part_until = CASE WHEN $3 THEN NULL ELSE now() + interval '5 seconds' END FROM tenant t \
         WHERE t.name = $1 AND u.tenant_id = t.id AND u.part = $2",
        tenant.as_str(),
        part,
        ends == Ends::Answered
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(())
}

/// Deletes the upload of a claim; its bytes no longer count.
pub(in crate::registries) async fn delete_upload(
    pool: &PgPool,
    tenant: &TenantName,
    part: &str,
) -> Result<(), Error> {
    let mut tx = db::begin(pool, tenant).await?;
    sqlx::query!(
        "DELETE FROM upload u USING tenant t WHERE t.name = $1 AND u.tenant_id = t.id AND u.part = $2",
        tenant.as_str(),
        part
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(())
}
