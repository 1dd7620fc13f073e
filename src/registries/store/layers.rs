//! Rows of layers: the measured report and the quota that it uses.

use sqlx::types::Json;
use sqlx::{PgConnection, PgPool};

use super::{lock_project, signed};
use crate::db;
use crate::error::Error;
use crate::ids::{Digest, RepositoryPath, TenantId, TenantName};
use crate::images::layers::LayerReport;
use crate::quotas::{self, Amount, Resource};

/// Returns the reports of the given layers that were measured.
pub(in crate::registries) async fn list_reports(
    conn: &mut PgConnection,
    tenant: &TenantName,
    digests: &[String],
) -> Result<Vec<(Digest, LayerReport)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT l.digest AS "digest: Digest", l.report AS "report: Json<LayerReport>" FROM layer l
           JOIN tenant t ON t.id = l.tenant_id WHERE t.name = $1 AND l.digest = ANY($2)"#,
        tenant.as_str(),
        digests
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.digest, row.report.0)).collect())
}

/// Stores a report and reserves its bytes in the quota; fails with the numbers when the quota is exceeded. Does
/// nothing for a layer that is already stored or whose blob is being deleted.
pub(in crate::registries) async fn insert_report(
    pool: &PgPool,
    tenant: &TenantName,
    digest: &Digest,
    report: &LayerReport,
) -> Result<(), Error> {
    let mut tx = db::begin(pool, tenant).await?;
    let tenant_id = lock_project(&mut tx, tenant).await?;
    let inserted = sqlx::query!(
        "INSERT INTO layer (tenant_id, digest, bytes, report) SELECT tenant_id, digest, $3, $4 FROM blob \
         WHERE tenant_id = $1 AND digest = $2 AND doomed_at IS NULL ON CONFLICT DO NOTHING",
        tenant_id,
        digest.as_str(),
        signed(report.bytes),
        Json(report) as _
    )
    .execute(&mut *tx)
    .await?
    .rows_affected();
    if inserted == 1 {
        quotas::reserve(&mut tx, TenantId(tenant_id), Resource::ImageBytes, signed(report.bytes)).await?;
    }
    tx.commit().await?;
    Ok(())
}

/// Returns limit and use of a tenant's quota of unpacked bytes.
pub(in crate::registries) async fn image_use(
    conn: &mut PgConnection,
    tenant: &TenantName,
) -> Result<Amount, Error> {
    Ok(sqlx::query_as!(
        Amount,
        r#"SELECT coalesce(q.limit_, d.limit_) AS "limit!", q.used FROM quota q
           JOIN quota_default d USING (resource) JOIN tenant t ON t.id = q.tenant_id
           WHERE t.name = $1 AND q.resource = 'image_bytes'"#,
        tenant.as_str()
    )
    .fetch_one(conn)
    .await?)
}

/// Returns the bytes that an image takes on the engine's disk, as far as measured; 0 for an image of an earlier
/// version.
pub async fn image_bytes(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<u64, Error> {
    let sum = sqlx::query_scalar!(
        r#"SELECT coalesce(sum(l.bytes), 0)::bigint AS "sum!" FROM manifest_part p
           JOIN layer l ON l.tenant_id = p.tenant_id AND l.digest = p.part
           WHERE p.tenant_id = $1 AND p.repository = $2 AND p.digest = $3"#,
        tenant.0,
        repository.as_str(),
        digest.as_str()
    )
    .fetch_one(conn)
    .await?;
    Ok(super::positive(sum))
}
