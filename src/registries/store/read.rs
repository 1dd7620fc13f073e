//! Reads of manifests, tags and repositories.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::error::Error;
use crate::ids::{Digest, RepositoryPath, Tag, TenantId, TenantName};

/// Returns the digest of a tag.
pub(in crate::registries) async fn find_tag(
    conn: &mut PgConnection,
    tenant: &TenantName,
    repository: &RepositoryPath,
    tag: &Tag,
) -> Result<Option<Digest>, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT g.digest AS "digest: Digest" FROM tag g JOIN tenant t ON t.id = g.tenant_id
           WHERE t.name = $1 AND g.repository = $2 AND g.name = $3"#,
        tenant.as_str(),
        repository.as_str(),
        tag.as_str()
    )
    .fetch_optional(conn)
    .await?)
}

/// Returns the digest if the repository has this manifest.
pub(in crate::registries) async fn find_manifest(
    conn: &mut PgConnection,
    tenant: &TenantName,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<Option<Digest>, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT m.digest AS "digest: Digest" FROM manifest m JOIN tenant t ON t.id = m.tenant_id
           WHERE t.name = $1 AND m.repository = $2 AND m.digest = $3 AND m.confirmed AND m.doomed_at IS NULL"#,
        tenant.as_str(),
        repository.as_str(),
        digest.as_str()
    )
    .fetch_optional(conn)
    .await?)
}

/// Returns whether a repository has a blob according to the database. Unrecorded blobs and blobs marked for
/// deletion do not count.
pub(in crate::registries) async fn has_blob(
    conn: &mut PgConnection,
    tenant: &TenantName,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM tenant t JOIN blob b ON b.tenant_id = t.id
           JOIN blob_place p ON p.tenant_id = t.id AND p.digest = b.digest
           WHERE t.name = $1 AND p.repository = $2 AND b.digest = $3 AND b.doomed_at IS NULL) AS "yes!""#,
        tenant.as_str(),
        repository.as_str(),
        digest.as_str()
    )
    .fetch_one(conn)
    .await?)
}

/// Returns whether all these manifests exist, within a transaction that holds the tenant's quota lock.
/// Deletions take the same lock, so the manifests stay until the transaction ends.
pub async fn are_manifests_there(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digests: &[&Digest],
) -> Result<bool, Error> {
    let texts: Vec<String> = digests.iter().map(ToString::to_string).collect();
    Ok(sqlx::query_scalar!(
        r#"SELECT NOT EXISTS (SELECT 1 FROM unnest($3::text[]) d WHERE NOT EXISTS
           (SELECT 1 FROM manifest m WHERE m.tenant_id = $1 AND m.repository = $2 AND m.digest = d
            AND m.confirmed AND m.doomed_at IS NULL)) AS "yes!""#,
        tenant.0,
        repository.as_str(),
        &texts
    )
    .fetch_one(conn)
    .await?)
}

/// Lists tag names in byte order after a name; none for an unknown repository.
pub(in crate::registries) async fn list_tag_names(
    conn: &mut PgConnection,
    tenant: &TenantName,
    repository: &RepositoryPath,
    after: &str,
    limit: i64,
) -> Result<Option<Vec<String>>, Error> {
    let row = sqlx::query!(
        r#"SELECT EXISTS (SELECT 1 FROM repository r WHERE r.tenant_id = t.id AND r.name = $2) AS "known!",
           ARRAY(SELECT g.name FROM tag g WHERE g.tenant_id = t.id AND g.repository = $2
                 AND g.name COLLATE "C" > $3 ORDER BY g.name COLLATE "C" LIMIT $4) AS "tags!"
           FROM tenant t WHERE t.name = $1"#,
        tenant.as_str(),
        repository.as_str(),
        after,
        limit
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.filter(|row| row.known).map(|row| row.tags))
}

/// A manifest that is attached to another.
pub(in crate::registries) struct Referrer {
    pub(in crate::registries) digest: Digest,
    pub(in crate::registries) media_type: String,
    pub(in crate::registries) size: i64,
    pub(in crate::registries) artifact_type: String,
    /// A JSON object as text.
    pub(in crate::registries) annotations: String,
}

/// Lists the manifests attached to a subject, by digest, optionally of one type.
pub(in crate::registries) async fn list_referrers(
    conn: &mut PgConnection,
    (tenant, repository): (&TenantName, &RepositoryPath),
    subject: &Digest,
    artifact_type: Option<&str>,
    (after, limit): (&str, i64),
) -> Result<Vec<Referrer>, Error> {
    Ok(sqlx::query_as!(
        Referrer,
        r#"SELECT r.digest AS "digest: Digest", m.media_type, m.size, r.artifact_type, r.annotations
           FROM referrer r JOIN manifest m USING (tenant_id, repository, digest) JOIN tenant t ON t.id = r.tenant_id
           WHERE t.name = $1 AND r.repository = $2 AND r.subject = $3 AND ($4::text IS NULL OR r.artifact_type = $4)
             AND r.digest > $5 AND m.confirmed AND m.doomed_at IS NULL
           ORDER BY r.digest LIMIT $6"#,
        tenant.as_str(),
        repository.as_str(),
        subject.as_str(),
        artifact_type,
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// Returns the size of a blob if the repository has it in the sense of [`has_blob`].
pub(in crate::registries) async fn find_blob_size(
    conn: &mut PgConnection,
    tenant: &TenantName,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<Option<u64>, Error> {
    let size = sqlx::query_scalar!(
        "SELECT b.size FROM tenant t JOIN blob b ON b.tenant_id = t.id \
         JOIN blob_place p ON p.tenant_id = t.id AND p.digest = b.digest \
         WHERE t.name = $1 AND p.repository = $2 AND b.digest = $3 AND b.doomed_at IS NULL",
        tenant.as_str(),
        repository.as_str(),
        digest.as_str()
    )
    .fetch_optional(conn)
    .await?;
    Ok(size.map(super::positive))
}

/// Returns a repository of the tenant that has a blob.
pub(in crate::registries) async fn find_place(
    conn: &mut PgConnection,
    tenant: &TenantName,
    digest: &Digest,
) -> Result<Option<RepositoryPath>, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT p.repository AS "repository: RepositoryPath" FROM tenant t JOIN blob b ON b.tenant_id = t.id
           JOIN blob_place p ON p.tenant_id = t.id AND p.digest = b.digest
           WHERE t.name = $1 AND b.digest = $2 AND b.doomed_at IS NULL ORDER BY p.repository LIMIT 1"#,
        tenant.as_str(),
        digest.as_str()
    )
    .fetch_optional(conn)
    .await?)
}

/// Lists the names of a tenant's repositories.
pub(in crate::registries) async fn list_repository_names(
    conn: &mut PgConnection,
    tenant: &TenantName,
) -> Result<Vec<String>, Error> {
    Ok(sqlx::query_scalar!(
        "SELECT DISTINCT m.repository FROM manifest m JOIN tenant t ON t.id = m.tenant_id \
         WHERE t.name = $1 AND m.confirmed AND m.doomed_at IS NULL ORDER BY m.repository LIMIT 1000",
        tenant.as_str()
    )
    .fetch_all(conn)
    .await?)
}

/// Returns a repository of the tenant that has a manifest with this digest.
pub(in crate::registries) async fn find_manifest_place(
    conn: &mut PgConnection,
    tenant: &TenantName,
    digest: &Digest,
) -> Result<Option<String>, Error> {
    Ok(sqlx::query_scalar!(
        "SELECT m.repository FROM manifest m JOIN tenant t ON t.id = m.tenant_id \
         WHERE t.name = $1 AND m.digest = $2 AND m.confirmed AND m.doomed_at IS NULL ORDER BY m.repository LIMIT 1",
        tenant.as_str(),
        digest.as_str()
    )
    .fetch_optional(conn)
    .await?)
}

/// A repository in a list.
#[derive(Debug, Serialize)]
pub(in crate::registries) struct RepositoryRow {
    pub(in crate::registries) name: String,
    pub(in crate::registries) tags: i64,
    pub(in crate::registries) manifests: i64,
    #[serde(with = "time::serde::rfc3339")]
    pub(in crate::registries) pushed_at: OffsetDateTime,
}

pub(in crate::registries) async fn list_repositories(
    conn: &mut PgConnection,
    tenant: TenantId,
    after: &str,
    limit: i64,
) -> Result<Vec<RepositoryRow>, Error> {
    Ok(sqlx::query_as!(
        RepositoryRow,
        r#"SELECT m.repository AS name, count(*) AS "manifests!", max(m.pushed_at) AS "pushed_at!",
           (SELECT count(*) FROM tag g WHERE g.tenant_id = $1 AND g.repository = m.repository) AS "tags!"
           FROM manifest m WHERE m.tenant_id = $1 AND m.confirmed AND m.doomed_at IS NULL AND m.repository > $2
           GROUP BY m.repository ORDER BY m.repository LIMIT $3"#,
        tenant.0,
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// A tag in a list.
#[derive(Debug, Serialize)]
pub(in crate::registries) struct TagRow {
    pub(in crate::registries) name: String,
    pub(in crate::registries) digest: String,
    pub(in crate::registries) size: i64,
    pub(in crate::registries) pushed_by: String,
    #[serde(with = "time::serde::rfc3339")]
    pub(in crate::registries) pushed_at: OffsetDateTime,
}

pub(in crate::registries) async fn list_tags(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    after: &str,
    limit: i64,
) -> Result<Vec<TagRow>, Error> {
    Ok(sqlx::query_as!(
        TagRow,
        r#"SELECT g.name, g.digest, m.size + m.total AS "size!",
           coalesce((SELECT 'robot ' || r.name FROM robot r WHERE 'robot:' || r.id = g.pushed_by),
             (SELECT 'token ' || k.name FROM api_token k WHERE 'token:' || k.id = g.pushed_by), g.pushed_by) AS "pushed_by!",
           g.pushed_at
           FROM tag g JOIN manifest m USING (tenant_id, repository, digest)
           WHERE g.tenant_id = $1 AND g.repository = $2 AND g.name > $3 ORDER BY g.name LIMIT $4"#,
        tenant.0,
        repository.as_str(),
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// Returns a manifest's family: itself, the manifests of an index, and the manifests attached to any of them.
pub(in crate::registries) async fn list_family(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<Vec<String>, Error> {
    Ok(sqlx::query_scalar!(
        r#"WITH RECURSIVE link AS (
               SELECT p.digest AS whole, p.part AS piece FROM manifest_part p
               WHERE p.tenant_id = $1 AND p.repository = $2 AND NOT p.is_blob
               UNION ALL
               SELECT r.subject, r.digest FROM referrer r WHERE r.tenant_id = $1 AND r.repository = $2
           ), family AS (
               SELECT $3::text AS digest UNION SELECT l.piece FROM family f JOIN link l ON l.whole = f.digest
           ) SELECT digest AS "digest!" FROM family"#,
        tenant.0,
        repository.as_str(),
        digest.as_str()
    )
    .fetch_all(conn)
    .await?)
}

/// Returns an index that contains a manifest, if any.
pub(in crate::registries) async fn find_index_of(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<Option<String>, Error> {
    Ok(sqlx::query_scalar!(
        "SELECT p.digest FROM manifest_part p JOIN manifest m USING (tenant_id, repository, digest) \
         WHERE p.tenant_id = $1 AND p.repository = $2 AND p.part = $3 AND NOT p.is_blob AND m.doomed_at IS NULL \
         ORDER BY p.digest LIMIT 1",
        tenant.0,
        repository.as_str(),
        digest.as_str()
    )
    .fetch_optional(conn)
    .await?)
}
