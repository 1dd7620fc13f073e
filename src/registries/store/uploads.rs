//! Rows of uploads and repositories: recorded from the first request, counted by number and bytes.

use sqlx::{PgConnection, PgPool};

use super::{FLOOR, going, lock_active, lock_project, registry_use, signed};
use crate::db;
use crate::error::Error;
use crate::ids::{Digest, RepositoryPath, TenantId, TenantName};
use crate::quotas::{self, Resource};

/// The result of a reservation.
pub(in crate::registries) enum Reserve {
    /// The number of reserved bytes.
    Taken(u64),
    /// The remaining quota does not cover the immediate need.
    Full { used: u64, limit: u64 },
    /// The upload is not recorded (any more).
    Gone,
}

/// Records a repository if the tenant may have one more. The transaction holds the project's lock.
pub(super) async fn enter_repository(
    conn: &mut PgConnection,
    tenant: i64,
    repository: &RepositoryPath,
) -> Result<(), Error> {
    let known = sqlx::query_scalar!(
        r#"UPDATE repository SET used_at = now() WHERE tenant_id = $1 AND name = $2 RETURNING going AS "going!""#,
        tenant,
        repository.as_str()
    )
    .fetch_optional(&mut *conn)
    .await?;
    match known {
        Some(true) => return Err(going()),
        Some(false) => return Ok(()),
        None => {}
    }
    let count =
        sqlx::query_scalar!(r#"SELECT count(*) AS "n!" FROM repository WHERE tenant_id = $1"#, tenant)
            .fetch_one(&mut *conn)
            .await?;
    quotas::check_count(conn, TenantId(tenant), Resource::Repositories, count).await?;
    sqlx::query!("INSERT INTO repository (tenant_id, name) VALUES ($1, $2)", tenant, repository.as_str())
        .execute(conn)
        .await?;
    Ok(())
}

/// An open upload.
#[derive(Debug, Clone)]
pub(in crate::registries) struct OpenUpload {
    pub(in crate::registries) id: String,
    /// The registry's own state, signed by the registry.
    pub(in crate::registries) state: String,
    /// Bytes that the registry has received.
    pub(in crate::registries) received: u64,
}

/// Checks that one more upload fits, and records a new one.
pub(in crate::registries) async fn admit_upload(
    pool: &PgPool,
    tenant: &TenantName,
    repository: &RepositoryPath,
    new: Option<&OpenUpload>,
) -> Result<Reserve, Error> {
    let mut tx = db::begin(pool, tenant).await?;
    let tenant_id = lock_project(&mut tx, tenant).await?;
    // The registry purged these an hour ago.
    sqlx::query!(
        "DELETE FROM upload WHERE tenant_id = $1 AND changed_at < now() - interval '2 hours'",
        tenant_id
    )
    .execute(&mut *tx)
    .await?;
    let count = sqlx::query_scalar!(r#"SELECT count(*) AS "n!" FROM upload WHERE tenant_id = $1"#, tenant_id)
        .fetch_one(&mut *tx)
        .await?;
    quotas::check_count(&mut tx, TenantId(tenant_id), Resource::OpenUploads, count).await?;
    let (used, limit) = registry_use(&mut tx, tenant).await?;
    if used.saturating_add(FLOOR) > limit {
        return Ok(Reserve::Full { used, limit });
    }
    enter_repository(&mut tx, tenant_id, repository).await?;
    if let Some(new) = new {
        sqlx::query!(
            "INSERT INTO upload (tenant_id, id, repository, state) VALUES ($1, $2, $3, $4)",
            tenant_id,
            new.id,
            repository.as_str(),
            new.state
        )
        .execute(&mut *tx)
        .await?;
    }
    tx.commit().await?;
    Ok(Reserve::Taken(0))
}

/// Finds an upload of this repository that is not being committed.
pub(in crate::registries) async fn find_upload(
    conn: &mut PgConnection,
    tenant: &TenantName,
    repository: &RepositoryPath,
    id: &str,
) -> Result<Option<OpenUpload>, Error> {
    let row = sqlx::query!(
        r#"SELECT u.state AS "state!", u.received FROM upload u JOIN tenant t ON t.id = u.tenant_id WHERE t.name = $1
           AND u.repository = $2 AND u.id = $3 AND u.digest IS NULL AND u.state IS NOT NULL"#,
        tenant.as_str(),
        repository.as_str(),
        id
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| OpenUpload {
        id: id.to_owned(),
        state: row.state,
        received: super::positive(row.received),
    }))
}

/// Locks a digest until the transaction ends, so its bytes are never collected and committed at once. Take this
/// lock before any quota lock.
pub(in crate::registries) async fn lock_digest(
    conn: &mut PgConnection,
    digest: &Digest,
) -> Result<(), Error> {
    sqlx::query!("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", digest.as_str())
        .fetch_one(conn)
        .await?;
    Ok(())
}

/// Reserves quota for an upload: a whole step if it fits, otherwise the immediate need. The lock on the quota's
/// row keeps two uploads from reserving the same bytes.
pub(in crate::registries) async fn reserve_upload(
    pool: &PgPool,
    tenant: &TenantName,
    id: &str,
    step: u64,
    needed: u64,
) -> Result<Reserve, Error> {
    let mut tx = db::begin(pool, tenant).await?;
    let tenant_id = lock_active(&mut tx, tenant).await?;
    let (used, limit) = registry_use(&mut tx, tenant).await?;
    let left = limit.saturating_sub(used);
    if needed > left {
        return Ok(Reserve::Full { used, limit });
    }
    let taken = if step <= left { step } else { needed };
    let found = sqlx::query!(
        "UPDATE upload SET bytes = bytes + $3, changed_at = now() WHERE tenant_id = $1 AND id = $2",
        tenant_id,
        id,
        signed(taken)
    )
    .execute(&mut *tx)
    .await?
    .rows_affected();
    if found == 0 {
        return Ok(Reserve::Gone);
    }
    tx.commit().await?;
    Ok(Reserve::Taken(taken))
}

/// Returns unused reserved bytes of an upload.
pub(in crate::registries) async fn give_back(
    pool: &PgPool,
    tenant: &TenantName,
    id: &str,
    bytes: u64,
) -> Result<(), Error> {
    let mut tx = db::begin(pool, tenant).await?;
    sqlx::query!(
        "UPDATE upload u SET bytes = greatest(0, u.bytes - $3), changed_at = now() FROM tenant t \
         WHERE t.name = $1 AND u.tenant_id = t.id AND u.id = $2",
        tenant.as_str(),
        id,
        signed(bytes)
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(())
}

/// An upload found by the sweep.
pub(in crate::registries) struct OldUpload {
    pub(in crate::registries) tenant: TenantName,
    pub(in crate::registries) repository: String,
    pub(in crate::registries) id: String,
    /// Digest that the registry was asked to commit.
    pub(in crate::registries) digest: Option<Digest>,
    /// Whether it has been idle for so long that it is given up.
    pub(in crate::registries) given_up: bool,
}

/// Lists uploads with a commit unsettled for ten minutes, and uploads idle for an hour, except those claimed by
/// a request.
pub(in crate::registries) async fn list_old_uploads(
    conn: &mut PgConnection,
) -> Result<Vec<OldUpload>, Error> {
    Ok(sqlx::query_as!(
        OldUpload,
        r#"SELECT t.name AS "tenant: TenantName", u.repository, u.id, u.digest AS "digest: Digest",
           u.changed_at < now() - interval '1 hour' AS "given_up!"
           FROM upload u JOIN tenant t ON t.id = u.tenant_id
           WHERE (u.changed_at < now() - interval '1 hour'
              OR u.digest IS NOT NULL AND u.changed_at < now() - interval '10 minutes')
             AND (u.part IS NULL OR u.part_until < now())
           ORDER BY u.changed_at LIMIT 200"#
    )
    .fetch_all(conn)
    .await?)
}

/// Lists repositories without manifests, blobs or uploads for an hour.
pub(in crate::registries) async fn list_empty_repositories(
    conn: &mut PgConnection,
) -> Result<Vec<(TenantId, TenantName, RepositoryPath)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT r.tenant_id, t.name AS "tenant: TenantName", r.name AS "name: RepositoryPath"
           FROM repository r JOIN tenant t ON t.id = r.tenant_id
           WHERE (r.going OR r.used_at < now() - interval '1 hour')
           AND NOT EXISTS (SELECT 1 FROM manifest m WHERE m.tenant_id = r.tenant_id AND m.repository = r.name)
           AND NOT EXISTS (SELECT 1 FROM blob_place p WHERE p.tenant_id = r.tenant_id AND p.repository = r.name)
           AND NOT EXISTS (SELECT 1 FROM upload u WHERE u.tenant_id = r.tenant_id AND u.repository = r.name)
           LIMIT 200"#
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (TenantId(row.tenant_id), row.tenant, row.name)).collect())
}

/// Marks a repository for deletion if it is still empty, within a transaction that holds the project's lock.
/// Returns whether it is marked. A marked repository accepts no pushes.
pub(in crate::registries) async fn mark_repository(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
) -> Result<bool, Error> {
    let going = sqlx::query!(
        "UPDATE repository r SET going = true WHERE r.tenant_id = $1 AND r.name = $2 \
         AND (r.going OR r.used_at < now() - interval '1 hour') \
         AND NOT EXISTS (SELECT 1 FROM manifest m WHERE m.tenant_id = r.tenant_id AND m.repository = r.name) \
         AND NOT EXISTS (SELECT 1 FROM blob_place p WHERE p.tenant_id = r.tenant_id AND p.repository = r.name) \
         AND NOT EXISTS (SELECT 1 FROM upload u WHERE u.tenant_id = r.tenant_id AND u.repository = r.name)",
        tenant.0,
        repository.as_str()
    )
    .execute(conn)
    .await?
    .rows_affected();
    Ok(going == 1)
}

/// Deletes a marked repository.
pub(in crate::registries) async fn delete_repository(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
) -> Result<(), Error> {
    sqlx::query!(
        "DELETE FROM repository WHERE tenant_id = $1 AND name = $2 AND going",
        tenant.0,
        repository.as_str()
    )
    .execute(conn)
    .await?;
    Ok(())
}
