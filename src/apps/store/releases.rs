//! Rows of releases: written once, never changed. Each app keeps its newest releases and those that still run.

use serde_json::Value;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::apps::{App, Release};
use crate::driver::workload::InsideUser;
use crate::error::Error;
use crate::ids::{AppId, AppName, Digest, RepositoryPath, Tag, TenantId};

/// Inserts a release. The same statement deletes releases beyond the tenant's limit, so frequent deploys cannot
/// fill the disk. Releases that are desired, observed or running stay.
pub(in crate::apps) async fn insert_release(
    conn: &mut PgConnection,
    tenant: TenantId,
    app: AppId,
    release: &Release,
) -> Result<(), Error> {
    sqlx::query!(
        "WITH kept AS (SELECT coalesce(q.limit_, d.limit_) AS n FROM quota_default d \
             LEFT JOIN quota q ON q.resource = d.resource AND q.tenant_id = $1 WHERE d.resource = 'releases_kept'), \
         old AS (SELECT r.revision FROM release r JOIN app a ON a.tenant_id = r.tenant_id AND a.id = r.app_id \
             WHERE r.tenant_id = $1 AND r.app_id = $2 AND r.revision <= $3 - (SELECT n FROM kept) \
             AND r.revision <> a.revision AND r.revision <> coalesce((a.observed->>'revision')::bigint, 0) \
             AND NOT coalesce(jsonb_path_exists(a.observed, '$.instances[*].revision ? (@ == $r)', \
                              jsonb_build_object('r', r.revision)), false) ORDER BY r.revision LIMIT 20), \
         gone AS (DELETE FROM release r USING old WHERE r.tenant_id = $1 AND r.app_id = $2 AND r.revision = old.revision) \
         INSERT INTO release (tenant_id, app_id, revision, spec, repository, tag, index_digest, digest, \
         inside_uid, inside_gid, inside_groups, warnings, rolled_back_to, actor) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
        tenant.0,
        app.0,
        release.revision,
        release.spec,
        release.repository.as_str(),
        release.tag.as_ref().map(Tag::as_str),
        release.index_digest.as_str(),
        release.digest.as_str(),
        i32::from(release.user.uid),
        i32::from(release.user.gid),
        &release.groups.iter().map(|group| i32::from(*group)).collect::<Vec<_>>(),
        release.warnings,
        release.rolled_back_to,
        release.actor
    )
    .execute(conn)
    .await?;
    Ok(())
}

struct ReleaseRow {
    revision: i64,
    spec: Value,
    repository: RepositoryPath,
    tag: Option<Tag>,
    index_digest: Digest,
    digest: Digest,
    inside_uid: i32,
    inside_gid: i32,
    inside_groups: Vec<i32>,
    warnings: Value,
    rolled_back_to: Option<i64>,
    actor: String,
    created_at: OffsetDateTime,
}

impl From<ReleaseRow> for Release {
    fn from(row: ReleaseRow) -> Self {
        Self {
            revision: row.revision,
            spec: row.spec,
            repository: row.repository,
            tag: row.tag,
            index_digest: row.index_digest,
            digest: row.digest,
            user: InsideUser {
                uid: u16::try_from(row.inside_uid).unwrap_or(1000),
                gid: u16::try_from(row.inside_gid).unwrap_or(1000),
            },
            groups: row.inside_groups.iter().filter_map(|group| u16::try_from(*group).ok()).collect(),
            warnings: row.warnings,
            rolled_back_to: row.rolled_back_to,
            actor: row.actor,
            created_at: row.created_at,
        }
    }
}

/// Lists id, name and current spec of a tenant's apps that are not being deleted, by name.
pub(in crate::apps) async fn list_current(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<Vec<(AppId, AppName, Value)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT a.id, a.name AS "name: AppName", r.spec FROM app a
           JOIN release r ON r.tenant_id = a.tenant_id AND r.app_id = a.id AND r.revision = a.revision
           WHERE a.tenant_id = $1 AND a.removed_at IS NULL AND a.deleted_at IS NULL ORDER BY a.name"#,
        tenant.0
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (AppId(row.id), row.name, row.spec)).collect())
}

/// Lists id, name and current spec of the given apps of any tenants.
pub(in crate::apps) async fn list_current_of(
    conn: &mut PgConnection,
    tenants: &[i64],
    apps: &[i64],
) -> Result<Vec<(AppId, AppName, Value)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT a.id, a.name AS "name: AppName", r.spec FROM unnest($1::bigint[], $2::bigint[]) AS w (tenant_id, id)
           JOIN app a ON a.tenant_id = w.tenant_id AND a.id = w.id
           JOIN release r ON r.tenant_id = a.tenant_id AND r.app_id = a.id AND r.revision = a.revision
           WHERE a.removed_at IS NULL AND a.deleted_at IS NULL"#,
        tenants,
        apps
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (AppId(row.id), row.name, row.spec)).collect())
}

pub(in crate::apps) async fn find_release(
    conn: &mut PgConnection,
    tenant: TenantId,
    app: AppId,
    revision: i64,
) -> Result<Option<Release>, Error> {
    let row = sqlx::query_as!(
        ReleaseRow,
        r#"SELECT revision, spec, repository AS "repository: RepositoryPath", tag AS "tag: Tag",
           index_digest AS "index_digest: Digest", digest AS "digest: Digest", inside_uid, inside_gid, inside_groups, warnings,
           rolled_back_to, actor, created_at
           FROM release WHERE tenant_id = $1 AND app_id = $2 AND revision = $3"#,
        tenant.0,
        app.0,
        revision
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(Into::into))
}

/// Returns the desired releases of a page of apps, in one query.
pub(in crate::apps) async fn list_wanted(
    conn: &mut PgConnection,
    tenant: TenantId,
    apps: &[App],
) -> Result<std::collections::HashMap<AppId, Release>, Error> {
    let ids: Vec<i64> = apps.iter().map(|app| app.id.0).collect();
    let revisions: Vec<i64> = apps.iter().map(|app| app.revision).collect();
    let rows = sqlx::query!(
        r#"SELECT r.app_id, r.revision, r.spec, r.repository AS "repository: RepositoryPath", r.tag AS "tag: Tag",
           r.index_digest AS "index_digest: Digest", r.digest AS "digest: Digest", r.inside_uid, r.inside_gid, r.inside_groups,
           r.warnings, r.rolled_back_to, r.actor, r.created_at
           FROM unnest($2::bigint[], $3::bigint[]) AS w (app_id, revision)
           JOIN release r ON r.tenant_id = $1 AND r.app_id = w.app_id AND r.revision = w.revision"#,
        tenant.0,
        &ids,
        &revisions
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let release = ReleaseRow {
                revision: row.revision,
                spec: row.spec,
                repository: row.repository,
                tag: row.tag,
                index_digest: row.index_digest,
                digest: row.digest,
                inside_uid: row.inside_uid,
                inside_gid: row.inside_gid,
                inside_groups: row.inside_groups,
                warnings: row.warnings,
                rolled_back_to: row.rolled_back_to,
                actor: row.actor,
                created_at: row.created_at,
            };
            (AppId(row.app_id), release.into())
        })
        .collect())
}

/// Lists releases older than `before`, newest first.
pub(in crate::apps) async fn list_releases(
    conn: &mut PgConnection,
    tenant: TenantId,
    app: AppId,
    before: i64,
    limit: i64,
) -> Result<Vec<Release>, Error> {
    let rows = sqlx::query_as!(
        ReleaseRow,
        r#"SELECT revision, spec, repository AS "repository: RepositoryPath", tag AS "tag: Tag",
           index_digest AS "index_digest: Digest", digest AS "digest: Digest", inside_uid, inside_gid, inside_groups, warnings,
           rolled_back_to, actor, created_at
           FROM release WHERE tenant_id = $1 AND app_id = $2 AND revision < $3 ORDER BY revision DESC LIMIT $4"#,
        tenant.0,
        app.0,
        before,
        limit
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(Into::into).collect())
}

/// Returns the apps with one of these digests in any release that they can still roll back to.
pub(in crate::apps) async fn list_holders(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digests: &[String],
) -> Result<Vec<(String, String)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT DISTINCT d AS "digest!", a.name FROM unnest($3::text[]) d
           JOIN release r ON r.tenant_id = $1 AND r.repository = $2 AND (r.digest = d OR r.index_digest = d)
           JOIN app a ON a.tenant_id = r.tenant_id AND a.id = r.app_id AND a.removed_at IS NULL"#,
        tenant.0,
        repository.as_str(),
        digests
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.digest, row.name)).collect())
}

/// Removes releases beyond the limit, and all releases and events of removed apps, in batches. Returns the
/// number of removed rows.
pub(in crate::apps) async fn prune_releases(conn: &mut PgConnection, batch: i64) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        r#"WITH old AS (
             SELECT r.tenant_id, r.app_id, r.revision FROM release r
             JOIN app a ON a.tenant_id = r.tenant_id AND a.id = r.app_id
             WHERE a.removed_at < now() - interval '1 day'
                OR (r.revision <= a.last_revision - (SELECT coalesce(q.limit_, d.limit_) FROM quota_default d
                      LEFT JOIN quota q ON q.resource = d.resource AND q.tenant_id = r.tenant_id
                      WHERE d.resource = 'releases_kept')
                    AND r.revision <> a.revision AND r.revision <> coalesce((a.observed->>'revision')::bigint, 0)
                    AND NOT coalesce(jsonb_path_exists(a.observed, '$.instances[*].revision ? (@ == $r)',
                                     jsonb_build_object('r', r.revision)), false))
             LIMIT $1),
           events AS (DELETE FROM app_event WHERE (tenant_id, app_id, at, seq) IN (
             SELECT e.tenant_id, e.app_id, e.at, e.seq FROM app_event e
             JOIN app a ON a.tenant_id = e.tenant_id AND a.id = e.app_id
             WHERE a.removed_at < now() - interval '1 day' LIMIT $1) RETURNING 1),
           gone AS (DELETE FROM release r USING old o WHERE r.tenant_id = o.tenant_id AND r.app_id = o.app_id
             AND r.revision = o.revision RETURNING 1)
           SELECT (SELECT count(*) FROM gone) + (SELECT count(*) FROM events) AS "n!""#,
        batch
    )
    .fetch_one(conn)
    .await?)
}
