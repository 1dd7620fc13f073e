//! Rows of a push: new blobs and manifests, and their quota use.

use sqlx::{PgConnection, PgPool};

use super::uploads::{enter_repository, lock_digest};
use super::{FLOOR, add_used, going, lock_active, lock_project, registry_use, signed, weight};
use crate::db;
use crate::error::Error;
use crate::ids::{Digest, RepositoryPath, Tag, TenantId, TenantName};
use crate::quotas::{self, Resource};
use crate::registries::proxy::ProxyRequest;

/// Records a blob: it counts once, and its upload no longer counts.
pub(in crate::registries) async fn commit_blob(
    pool: &PgPool,
    tenant: &TenantName,
    repository: &RepositoryPath,
    digest: &Digest,
    size: u64,
    upload: Option<&str>,
) -> Result<(), Error> {
    let mut tx = db::begin(pool, tenant).await?;
    let tenant_id = lock_active(&mut tx, tenant).await?;
    let doomed = sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM blob WHERE tenant_id = $1 AND digest = $2 AND doomed_at IS NOT NULL) AS "yes!""#,
        tenant_id,
        digest.as_str()
    )
    .fetch_one(&mut *tx)
    .await?;
    if doomed {
        return Err(going());
    }
    enter_repository(&mut tx, tenant_id, repository).await?;
    let new = sqlx::query!(
        "INSERT INTO blob (tenant_id, digest, size) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        tenant_id,
        digest.as_str(),
        signed(size)
    )
    .execute(&mut *tx)
    .await?
    .rows_affected();
    if new == 1 {
        add_used(&mut tx, TenantId(tenant_id), weight(size)).await?;
    }
    let placed = sqlx::query!(
        "INSERT INTO blob_place (tenant_id, digest, repository) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        tenant_id,
        digest.as_str(),
        repository.as_str()
    )
    .execute(&mut *tx)
    .await?
    .rows_affected();
    // Every further repository stores a folder for the blob.
    if placed == 1 && count_places(&mut tx, tenant_id, digest).await? > 1 {
        add_used(&mut tx, TenantId(tenant_id), signed(FLOOR)).await?;
    }
    if let Some(id) = upload {
        sqlx::query!("DELETE FROM upload WHERE tenant_id = $1 AND id = $2", tenant_id, id)
            .execute(&mut *tx)
            .await?;
    }
    tx.commit().await?;
    Ok(())
}

/// Counts the repositories of a tenant that have a blob.
async fn count_places(conn: &mut PgConnection, tenant: i64, digest: &Digest) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM blob_place WHERE tenant_id = $1 AND digest = $2"#,
        tenant,
        digest.as_str()
    )
    .fetch_one(conn)
    .await?)
}

/// A pushed manifest.
pub(in crate::registries) struct NewManifest {
    pub(in crate::registries) digest: Digest,
    pub(in crate::registries) media_type: String,
    pub(in crate::registries) size: u64,
    /// Bytes of its parts.
    pub(in crate::registries) total: u64,
    /// Digest, and whether the part is a blob.
    pub(in crate::registries) parts: Vec<(Digest, bool)>,
    pub(in crate::registries) pushed_by: String,
    /// Its subject, if it is attached to one.
    pub(in crate::registries) attached: Option<Attached>,
}

/// A manifest's entry in its subject's list of referrers.
pub(in crate::registries) struct Attached {
    pub(in crate::registries) subject: Digest,
    pub(in crate::registries) artifact_type: String,
    /// A JSON object as text.
    pub(in crate::registries) annotations: String,
}

/// The result of recording a manifest.
pub(in crate::registries) enum Noted {
    /// It is recorded.
    Yes,
    /// It exceeds the quota.
    Full { used: u64, limit: u64 },
    /// It references missing or deleted content.
    Unknown,
}

/// Records a manifest before it is sent to the registry.
pub(in crate::registries) async fn insert_manifest(
    pool: &PgPool,
    tenant: &TenantName,
    repository: &RepositoryPath,
    new: &NewManifest,
    tag: Option<&Tag>,
) -> Result<Noted, Error> {
    let parts: Vec<String> = new.parts.iter().map(|(digest, _)| digest.to_string()).collect();
    let blobs: Vec<bool> = new.parts.iter().map(|(_, blob)| *blob).collect();
    let mut tx = db::begin(pool, tenant).await?;
    lock_digest(&mut tx, &new.digest).await?;
    let tenant_id = lock_active(&mut tx, tenant).await?;
    let state = sqlx::query!(
        r#"SELECT EXISTS (SELECT 1 FROM manifest WHERE tenant_id = $1 AND repository = $2 AND digest = $3
                          AND doomed_at IS NOT NULL) AS "doomed!",
           EXISTS (SELECT 1 FROM unnest($4::text[], $5::boolean[]) AS x (part, is_blob) WHERE CASE WHEN is_blob
             THEN NOT EXISTS (SELECT 1 FROM blob b JOIN blob_place p USING (tenant_id, digest) WHERE b.tenant_id = $1
                              AND b.digest = part AND p.repository = $2 AND b.doomed_at IS NULL)
             ELSE NOT EXISTS (SELECT 1 FROM manifest m WHERE m.tenant_id = $1 AND m.repository = $2
                              AND m.digest = part AND m.confirmed AND m.doomed_at IS NULL) END) AS "lacks!""#,
        tenant_id,
        repository.as_str(),
        new.digest.as_str(),
        &parts,
        &blobs
    )
    .fetch_one(&mut *tx)
    .await?;
    if state.doomed {
        return Err(going());
    }
    if state.lacks {
        return Ok(Noted::Unknown);
    }
    enter_repository(&mut tx, tenant_id, repository).await?;
    // Check the limits of the confirmation first: no manifest is stored that could not be confirmed.
    quotas::check_day(&mut tx, TenantId(tenant_id)).await?;
    if let Some(tag) = tag {
        check_tags(&mut tx, TenantId(tenant_id), repository, tag).await?;
    }
    let count =
        sqlx::query_scalar!(r#"SELECT count(*) AS "n!" FROM manifest WHERE tenant_id = $1"#, tenant_id)
            .fetch_one(&mut *tx)
            .await?;
    // A repeated push of an unconfirmed manifest renews its time.
    let inserted = sqlx::query_scalar!(
        "INSERT INTO manifest (tenant_id, repository, digest, media_type, size, total, pushed_by) \
         VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (tenant_id, repository, digest) \
         DO UPDATE SET pushed_at = now() WHERE NOT manifest.confirmed RETURNING xmax = 0 AS \"new!\"",
        tenant_id,
        repository.as_str(),
        new.digest.as_str(),
        new.media_type,
        signed(new.size),
        signed(new.total),
        new.pushed_by
    )
    .fetch_optional(&mut *tx)
    .await?;
    if inserted == Some(true) {
        quotas::check_count(&mut tx, TenantId(tenant_id), Resource::Manifests, count).await?;
        let (used, limit) = registry_use(&mut tx, tenant).await?;
        if used.saturating_add(new.size.max(FLOOR)) > limit {
            return Ok(Noted::Full { used, limit });
        }
        add_used(&mut tx, TenantId(tenant_id), weight(new.size)).await?;
        sqlx::query!(
            "INSERT INTO manifest_part (tenant_id, repository, digest, part, is_blob) \
             SELECT $1, $2, $3, p, b FROM unnest($4::text[], $5::boolean[]) AS x (p, b) ON CONFLICT DO NOTHING",
            tenant_id,
            repository.as_str(),
            new.digest.as_str(),
            &parts,
            &blobs
        )
        .execute(&mut *tx)
        .await?;
        if let Some(attached) = &new.attached {
            sqlx::query!(
                "INSERT INTO referrer (tenant_id, repository, subject, digest, artifact_type, annotations) \
                 VALUES ($1, $2, $3, $4, $5, $6)",
                tenant_id,
                repository.as_str(),
                attached.subject.as_str(),
                new.digest.as_str(),
                attached.artifact_type,
                attached.annotations
            )
            .execute(&mut *tx)
            .await?;
        }
    }
    tx.commit().await?;
    Ok(Noted::Yes)
}

/// Removes a recorded blob that the registry lost, so the next push sends it again.
pub(in crate::registries) async fn forget_blob(
    pool: &PgPool,
    tenant: &TenantName,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<(), Error> {
    let mut tx = db::begin(pool, tenant).await?;
    let tenant_id = lock_project(&mut tx, tenant).await?;
    delete_place(&mut tx, TenantId(tenant_id), repository, digest).await?;
    tx.commit().await?;
    Ok(())
}

/// Removes a blob from a repository. The transaction holds the project's lock.
pub(super) async fn delete_place(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<(), Error> {
    let gone = sqlx::query!(
        "DELETE FROM blob_place WHERE tenant_id = $1 AND repository = $2 AND digest = $3",
        tenant.0,
        repository.as_str(),
        digest.as_str()
    )
    .execute(&mut *conn)
    .await?
    .rows_affected();
    if gone == 1 && count_places(conn, tenant.0, digest).await? > 0 {
        add_used(conn, tenant, -signed(FLOOR)).await?;
    }
    Ok(())
}

/// Maximum tags of a repository.
const TAGS: i64 = 2_000;

/// Checks that a tag exists or that one more fits. The transaction holds the project's lock.
async fn check_tags(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    tag: &Tag,
) -> Result<(), Error> {
    let count = sqlx::query!(
        r#"SELECT count(*) AS "all!", count(*) FILTER (WHERE repository = $2) AS "here!" FROM tag
           WHERE tenant_id = $1 AND NOT (repository = $2 AND name = $3)"#,
        tenant.0,
        repository.as_str(),
        tag.as_str()
    )
    .fetch_one(&mut *conn)
    .await?;
    if count.here >= TAGS {
        return Err(Error::Conflict(format!("a repository has at most {TAGS} tags; delete some")));
    }
    quotas::check_count(conn, tenant, Resource::Tags, count.all).await
}

/// Confirms a manifest that the registry stored: moves the tag and records the push in the audit log.
pub(in crate::registries) async fn confirm_manifest(
    pool: &PgPool,
    asked: &ProxyRequest,
    new: &NewManifest,
    tag: Option<&Tag>,
) -> Result<(), Error> {
    let mut tx = db::begin(pool, &asked.tenant).await?;
    lock_project(&mut tx, &asked.tenant).await?;
    let tenant_id = sqlx::query_scalar!(
        "UPDATE manifest m SET confirmed = true FROM tenant t WHERE t.name = $1 AND m.tenant_id = t.id \
         AND m.repository = $2 AND m.digest = $3 AND m.doomed_at IS NULL RETURNING m.tenant_id",
        asked.tenant.as_str(),
        asked.repository.as_str(),
        new.digest.as_str()
    )
    .fetch_optional(&mut *tx)
    .await?
    .ok_or_else(going)?;
    if let Some(tag) = tag {
        check_tags(&mut tx, TenantId(tenant_id), &asked.repository, tag).await?;
        sqlx::query!(
            "INSERT INTO tag (tenant_id, repository, name, digest, pushed_by) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (tenant_id, repository, name) DO UPDATE SET digest = $4, pushed_by = $5, pushed_at = now()",
            tenant_id,
            asked.repository.as_str(),
            tag.as_str(),
            new.digest.as_str(),
            new.pushed_by
        )
        .execute(&mut *tx)
        .await?;
    }
    let actor = crate::ids::ActorId::new(&new.pushed_by);
    let event = crate::audit::AuditEvent {
        tenant: Some(TenantId(tenant_id)),
        actor: &actor,
        action: "image.push",
        object: asked.repository.as_str(),
        request_id: "registry",
        detail: serde_json::json!({"digest": new.digest, "tag": tag}),
    };
    crate::audit::record(&mut tx, event).await?;
    tx.commit().await?;
    Ok(())
}

/// Lists manifests that were recorded but not confirmed.
pub(in crate::registries) async fn list_unconfirmed(
    conn: &mut PgConnection,
) -> Result<Vec<(TenantId, TenantName, RepositoryPath, Digest)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT m.tenant_id, t.name AS "name: TenantName", m.repository AS "repository: RepositoryPath",
           m.digest AS "digest: Digest" FROM manifest m JOIN tenant t ON t.id = m.tenant_id
           WHERE NOT m.confirmed AND m.doomed_at IS NULL AND m.pushed_at < now() - interval '2 minutes' ORDER BY m.pushed_at LIMIT 100"#
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|r| (TenantId(r.tenant_id), r.name, r.repository, r.digest)).collect())
}

/// Returns whether a manifest is still unconfirmed and not pushed again, within a transaction that locks its
/// digest.
pub(in crate::registries) async fn is_unconfirmed(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM manifest WHERE tenant_id = $1 AND repository = $2 AND digest = $3
           AND NOT confirmed AND doomed_at IS NULL AND pushed_at < now() - interval '2 minutes') AS "yes!""#,
        tenant.0,
        repository.as_str(),
        digest.as_str()
    )
    .fetch_one(conn)
    .await?)
}

/// Confirms a manifest of an interrupted push that the registry has. The audit log shows the platform as the
/// actor.
pub(in crate::registries) async fn settle_manifest(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<(), Error> {
    let pushed_by = sqlx::query_scalar!(
        "UPDATE manifest SET confirmed = true WHERE tenant_id = $1 AND repository = $2 AND digest = $3 \
         AND NOT confirmed AND doomed_at IS NULL RETURNING pushed_by",
        tenant.0,
        repository.as_str(),
        digest.as_str()
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(pushed_by) = pushed_by else { return Ok(()) };
    let actor = crate::ids::ActorId::platform();
    let event = crate::audit::AuditEvent {
        tenant: Some(tenant),
        actor: &actor,
        action: "image.push",
        object: repository.as_str(),
        request_id: "registry",
        detail: serde_json::json!({"digest": digest, "pushed_by": pushed_by}),
    };
    crate::audit::record(conn, event).await
}
