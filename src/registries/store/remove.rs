//! Deletions: tags at once; manifests and blobs after they were marked for deletion.

use sqlx::{PgConnection, PgPool};

use super::uploads::lock_digest;
use super::{FLOOR, add_used, lock_project, positive, signed, weight};
use crate::db;
use crate::error::Error;
use crate::ids::{Digest, RepositoryPath, Tag, TenantId, TenantName};
use crate::quotas::{self, Resource};
use crate::registries::collector::Blob;

/// Deletes a tag. Returns its digest.
pub(in crate::registries) async fn delete_tag(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    tag: &Tag,
) -> Result<Option<Digest>, Error> {
    Ok(sqlx::query_scalar!(
        r#"DELETE FROM tag WHERE tenant_id = $1 AND repository = $2 AND name = $3 RETURNING digest AS "digest: Digest""#,
        tenant.0,
        repository.as_str(),
        tag.as_str()
    )
    .fetch_optional(conn)
    .await?)
}

/// Returns the given manifests that nothing references: no tag, no release (`held`), and no remaining manifest
/// as its index or subject.
pub(in crate::registries) async fn list_loose(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    among: &[String],
    held: &[String],
) -> Result<Vec<String>, Error> {
    Ok(sqlx::query_scalar!(
        r#"WITH RECURSIVE link AS (
               SELECT p.digest AS whole, p.part AS piece FROM manifest_part p
               WHERE p.tenant_id = $1 AND p.repository = $2 AND NOT p.is_blob
               UNION ALL
               SELECT r.subject, r.digest FROM referrer r WHERE r.tenant_id = $1 AND r.repository = $2
           ), kept AS (
               SELECT m.digest FROM manifest m WHERE m.tenant_id = $1 AND m.repository = $2 AND m.digest = ANY($3)
                 AND m.doomed_at IS NULL AND (m.digest = ANY($4)
                 OR EXISTS (SELECT 1 FROM tag g
                            WHERE g.tenant_id = $1 AND g.repository = $2 AND g.digest = m.digest)
                 OR EXISTS (SELECT 1 FROM manifest_part p JOIN manifest w USING (tenant_id, repository, digest)
                            WHERE p.tenant_id = $1 AND p.repository = $2 AND p.part = m.digest AND NOT p.is_blob
                              AND w.doomed_at IS NULL AND p.digest <> ALL($3))
                 OR EXISTS (SELECT 1 FROM referrer r JOIN manifest w ON w.tenant_id = r.tenant_id
                            AND w.repository = r.repository AND w.digest = r.subject
                            WHERE r.tenant_id = $1 AND r.repository = $2 AND r.digest = m.digest
                              AND w.doomed_at IS NULL AND w.digest <> ALL($3)))
               UNION
               SELECT l.piece FROM kept k JOIN link l ON l.whole = k.digest
           )
           SELECT m.digest FROM manifest m WHERE m.tenant_id = $1 AND m.repository = $2 AND m.digest = ANY($3)
             AND NOT EXISTS (SELECT 1 FROM kept WHERE kept.digest = m.digest)"#,
        tenant.0,
        repository.as_str(),
        among,
        held
    )
    .fetch_all(conn)
    .await?)
}

/// The result of removing a blob from a repository.
pub(in crate::registries) enum Unplaced {
    /// The repository does not have it.
    Unknown,
    /// This manifest of the repository needs it.
    Needed(String),
    /// Removed from this repository, and marked for deletion if no other has it.
    Yes(TenantId),
}

/// Removes a blob from a repository, unless a manifest there needs it.
pub(in crate::registries) async fn unplace_blob(
    pool: &PgPool,
    name: &TenantName,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<Unplaced, Error> {
    let mut tx = db::begin(pool, name).await?;
    let tenant = TenantId(lock_project(&mut tx, name).await?);
    if !super::has_blob(&mut tx, name, repository, digest).await? {
        return Ok(Unplaced::Unknown);
    }
    let needed = sqlx::query_scalar!(
        "SELECT p.digest FROM manifest_part p JOIN manifest m USING (tenant_id, repository, digest) \
         WHERE p.tenant_id = $1 AND p.repository = $2 AND p.part = $3 AND p.is_blob AND m.doomed_at IS NULL LIMIT 1",
        tenant.0,
        repository.as_str(),
        digest.as_str()
    )
    .fetch_optional(&mut *tx)
    .await?;
    if let Some(manifest) = needed {
        return Ok(Unplaced::Needed(manifest));
    }
    super::push::delete_place(&mut tx, tenant, repository, digest).await?;
    sqlx::query!(
        "UPDATE blob b SET doomed_at = now() WHERE b.tenant_id = $1 AND b.digest = $2 AND NOT EXISTS \
         (SELECT 1 FROM blob_place p WHERE p.tenant_id = b.tenant_id AND p.digest = b.digest)",
        tenant.0,
        digest.as_str()
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(Unplaced::Yes(tenant))
}

/// Marks manifests for deletion, within a transaction that holds the project's lock.
pub(in crate::registries) async fn doom_manifests(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digests: &[String],
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE manifest SET doomed_at = now() WHERE tenant_id = $1 AND repository = $2 AND digest = ANY($3) \
         AND doomed_at IS NULL",
        tenant.0,
        repository.as_str(),
        digests
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Lists the manifests marked for deletion.
pub(in crate::registries) async fn list_doomed(
    conn: &mut PgConnection,
) -> Result<Vec<(TenantId, TenantName, RepositoryPath, Digest)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT m.tenant_id, t.name AS "name: TenantName", m.repository AS "repository: RepositoryPath",
           m.digest AS "digest: Digest" FROM manifest m JOIN tenant t ON t.id = m.tenant_id
           WHERE m.doomed_at IS NOT NULL ORDER BY m.doomed_at LIMIT 100"#
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|r| (TenantId(r.tenant_id), r.name, r.repository, r.digest)).collect())
}

/// Returns whether a manifest is marked for deletion, within a transaction that locks its digest. A listed
/// manifest may have been deleted and pushed again since.
pub(in crate::registries) async fn is_doomed(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM manifest WHERE tenant_id = $1 AND repository = $2 AND digest = $3
           AND doomed_at IS NOT NULL) AS "yes!""#,
        tenant.0,
        repository.as_str(),
        digest.as_str()
    )
    .fetch_one(conn)
    .await?)
}

/// The reason for deleting a manifest's row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::registries) enum Why {
    /// It was marked for deletion.
    Doomed,
    /// The registry never stored it.
    NeverStored,
}

/// Deletes a manifest's row and frees its bytes, unless the reason no longer applies.
pub(in crate::registries) async fn delete_manifest(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digest: &Digest,
    why: Why,
) -> Result<(), Error> {
    let size = sqlx::query_scalar!(
        "DELETE FROM manifest WHERE tenant_id = $1 AND repository = $2 AND digest = $3 \
         AND CASE WHEN $4 THEN doomed_at IS NOT NULL ELSE NOT confirmed AND doomed_at IS NULL END RETURNING size",
        tenant.0,
        repository.as_str(),
        digest.as_str(),
        why == Why::Doomed
    )
    .fetch_optional(&mut *conn)
    .await?;
    if let Some(size) = size {
        add_used(conn, tenant, -weight(positive(size))).await?;
    }
    Ok(())
}

/// Marks a tenant's unreferenced blobs for deletion. Recent blobs stay, because their manifest may still be
/// pushed.
pub(in crate::registries) async fn doom_loose_blobs(
    pool: &PgPool,
    name: &TenantName,
) -> Result<Vec<Digest>, Error> {
    let mut tx = db::begin(pool, name).await?;
    let tenant_id = lock_project(&mut tx, name).await?;
    let doomed = sqlx::query_scalar!(
        r#"WITH loose AS (
               SELECT b.digest FROM blob b WHERE b.tenant_id = $1 AND (b.doomed_at IS NOT NULL
                 OR b.at < now() - interval '2 hours' AND NOT EXISTS
                   (SELECT 1 FROM manifest_part m WHERE m.tenant_id = b.tenant_id AND m.part = b.digest))
               LIMIT 200
           )
           UPDATE blob b SET doomed_at = coalesce(b.doomed_at, now()) FROM loose l
           WHERE b.tenant_id = $1 AND b.digest = l.digest RETURNING b.digest AS "digest: Digest""#,
        tenant_id
    )
    .fetch_all(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(doomed)
}

/// Returns the repositories of a blob marked for deletion, within a transaction that locks its digest; none if
/// it is not marked (any more).
pub(in crate::registries) async fn list_doomed_places(
    conn: &mut PgConnection,
    tenant: TenantId,
    digest: &Digest,
) -> Result<Option<Vec<RepositoryPath>>, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT coalesce((SELECT array_agg(p.repository) FROM blob_place p
                            WHERE p.tenant_id = b.tenant_id AND p.digest = b.digest), '{}') AS "places!: Vec<RepositoryPath>"
           FROM blob b WHERE b.tenant_id = $1 AND b.digest = $2 AND b.doomed_at IS NOT NULL"#,
        tenant.0,
        digest.as_str()
    )
    .fetch_optional(conn)
    .await?)
}

/// Deletes a blob marked for deletion and frees its bytes.
pub(in crate::registries) async fn delete_blob(
    conn: &mut PgConnection,
    tenant: TenantId,
    digest: &Digest,
) -> Result<(), Error> {
    // The layer's report goes with it; no new report is written for a blob marked for deletion.
    let gone = sqlx::query!(
        r#"DELETE FROM blob b WHERE tenant_id = $1 AND digest = $2 AND doomed_at IS NOT NULL AND NOT EXISTS
           (SELECT 1 FROM manifest_part m WHERE m.tenant_id = b.tenant_id AND m.part = b.digest) RETURNING size,
           coalesce((SELECT l.bytes FROM layer l WHERE l.tenant_id = b.tenant_id AND l.digest = b.digest), 0)
           AS "unpacked!", (SELECT count(*) FROM blob_place p WHERE p.tenant_id = b.tenant_id
           AND p.digest = b.digest) AS "places!""#,
        tenant.0,
        digest.as_str()
    )
    .fetch_optional(&mut *conn)
    .await?;
    if let Some(gone) = gone {
        let places = signed(FLOOR) * (gone.places - 1).max(0);
        add_used(conn, tenant, -weight(positive(gone.size)) - places).await?;
        quotas::release(conn, tenant, Resource::ImageBytes, gone.unpacked).await?;
    }
    Ok(())
}

/// Lists the tenants with unreferenced blobs, in pages.
pub(in crate::registries) async fn list_tenants_with_loose_blobs(
    conn: &mut PgConnection,
    after: i64,
) -> Result<Vec<(TenantId, TenantName)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT id, name AS "name: TenantName" FROM tenant t WHERE id > $1
           AND EXISTS (SELECT 1 FROM blob b WHERE b.tenant_id = t.id AND (b.doomed_at IS NOT NULL
             OR b.at < now() - interval '2 hours' AND NOT EXISTS
               (SELECT 1 FROM manifest_part m WHERE m.tenant_id = b.tenant_id AND m.part = b.digest)))
           ORDER BY id LIMIT 200"#,
        after
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (TenantId(row.id), row.name)).collect())
}

/// Locks a tenant's project for a deletion.
pub(in crate::registries) async fn lock_project_of(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<(), Error> {
    crate::quotas::enter(conn, tenant).await
}

/// Lists a page of all manifests of a tenant's project.
pub(in crate::registries) async fn list_all_manifests(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<Vec<(RepositoryPath, Digest)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT repository AS "repository: RepositoryPath", digest AS "digest: Digest" FROM manifest
           WHERE tenant_id = $1 LIMIT 200"#,
        tenant.0
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.repository, row.digest)).collect())
}

pub(in crate::registries) async fn delete_tags_of(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<(), Error> {
    sqlx::query!(
        "DELETE FROM tag WHERE tenant_id = $1 AND repository = $2 AND digest = $3",
        tenant.0,
        repository.as_str(),
        digest.as_str()
    )
    .execute(conn)
    .await?;
    Ok(())
}

pub(in crate::registries) async fn list_all_blobs(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<Vec<Digest>, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT digest AS "digest: Digest" FROM blob WHERE tenant_id = $1 LIMIT 200"#,
        tenant.0
    )
    .fetch_all(conn)
    .await?)
}

/// Marks all content of a tenant for deletion.
pub(in crate::registries) async fn doom_all(conn: &mut PgConnection, tenant: TenantId) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE manifest SET doomed_at = now() WHERE tenant_id = $1 AND doomed_at IS NULL",
        tenant.0
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query!("UPDATE blob SET doomed_at = now() WHERE tenant_id = $1 AND doomed_at IS NULL", tenant.0)
        .execute(conn)
        .await?;
    Ok(())
}

/// Locks a digest until the transaction ends. Returns whether any tenant has or pushes it. The transaction
/// belongs to a reconciler, which sees every tenant.
pub(in crate::registries) async fn hold_digest(
    conn: &mut PgConnection,
    digest: &Digest,
) -> Result<bool, Error> {
    lock_digest(conn, digest).await?;
    let unknown = list_unknown(conn, &[digest.to_string()], Doomed::Forgotten).await?;
    Ok(unknown.is_empty())
}

/// Whether content marked for deletion counts as known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::registries) enum Doomed {
    /// It counts until it is deleted.
    Known,
    /// It does not count.
    Forgotten,
}

/// Returns the given digests without a row: no blob, no manifest, no upload being committed.
pub(in crate::registries) async fn list_unknown(
    conn: &mut PgConnection,
    digests: &[String],
    doomed: Doomed,
) -> Result<Vec<Digest>, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT d AS "digest!: Digest" FROM unnest($1::text[]) d
           WHERE NOT EXISTS (SELECT 1 FROM blob b WHERE b.digest = d AND ($2 OR b.doomed_at IS NULL))
             AND NOT EXISTS (SELECT 1 FROM manifest m WHERE m.digest = d AND ($2 OR m.doomed_at IS NULL))
             AND NOT EXISTS (SELECT 1 FROM upload u WHERE u.digest = d)"#,
        digests,
        doomed == Doomed::Known
    )
    .fetch_all(conn)
    .await?)
}

/// Returns the blobs on the disk whose size differs from the recorded size.
pub(in crate::registries) async fn list_altered(
    conn: &mut PgConnection,
    blobs: &[Blob],
) -> Result<Vec<Digest>, Error> {
    let digests: Vec<String> = blobs.iter().map(|blob| blob.digest.to_string()).collect();
    let sizes: Vec<i64> = blobs.iter().map(|blob| signed(blob.bytes)).collect();
    Ok(sqlx::query_scalar!(
        r#"SELECT d AS "digest!: Digest" FROM unnest($1::text[], $2::bigint[]) AS x (d, size)
           WHERE EXISTS (SELECT 1 FROM blob b WHERE b.digest = d AND b.size <> x.size)
              OR EXISTS (SELECT 1 FROM manifest m WHERE m.digest = d AND m.size <> x.size)"#,
        &digests,
        &sizes
    )
    .fetch_all(conn)
    .await?)
}

/// Takes a lock until the transaction ends. Returns whether it was free.
pub(in crate::registries) async fn take_lease(conn: &mut PgConnection, number: i64) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(r#"SELECT pg_try_advisory_xact_lock($1) AS "yes!""#, number)
        .fetch_one(conn)
        .await?)
}
