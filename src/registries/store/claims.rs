//! Claims on uploads: one request at a time writes to an upload, cancels it or commits it.

use sqlx::{PgConnection, PgPool};

use super::uploads::{OldUpload, OpenUpload, lock_digest};
use super::{require_active, signed};
use crate::db;
use crate::error::Error;
use crate::ids::{Digest, RepositoryPath, TenantName};

/// What came of asking for an upload.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::registries) enum Claimed {
    /// The upload is this request's, under this number.
    Taken(String),
    /// Another request writes to it, or its commit is not settled yet.
    Busy,
    /// There is no such upload in this repository.
    Unknown,
}

/// Claims an upload for a minute.
pub(in crate::registries) async fn claim_part(
    pool: &PgPool,
    tenant: &TenantName,
    repository: &RepositoryPath,
    id: &str,
) -> Result<Claimed, Error> {
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
        Some(part) => Claimed::Taken(part),
        None if is_on_record(&mut tx, tenant, repository, id).await? => Claimed::Busy,
        None => Claimed::Unknown,
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

/// The registry has taken bytes of a claimed upload: how far it is, and its state from then on. Whether the claim still
/// stands.
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

/// Puts on record that the registry is asked to commit a claimed upload; what is being collected at the moment is
/// waited for. Whether the claim still stands.
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

/// Puts a mount on record, where the repository that it comes from has the blob: until it is settled nobody collects the
/// blob. The number to settle it by; none where there is no such blob.
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

/// A mount came to nothing: the registry has not taken it.
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

/// Claims an upload that the sweep has found, unless a request has it, or something came since.
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

/// Renews a claim; whether it still stands.
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

/// What a request that ends leaves of its upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::registries) enum Ends {
    /// The registry has answered: the next request may come.
    Answered,
    /// The connection to the registry was cut: it may still write what is on its way, so the next request waits a few
    /// seconds.
    Cut,
}

/// Gives a claim back. Nothing was committed: that the registry was asked to is forgotten.
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

/// Forgets the upload of a claim: its bytes count no more.
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
