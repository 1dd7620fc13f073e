//! Tests of applied plans: their results, and the plans that are due.

use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::driver::ProbeSummary;
use crate::error::Error;
use crate::ids::{TenantId, TenantName};

/// An applied plan that is due for a test.
pub(in crate::networks) struct Due {
    pub(in crate::networks) tenant_id: TenantId,
    pub(in crate::networks) tenant: TenantName,
    pub(in crate::networks) number: i64,
    pub(in crate::networks) in_force_at: OffsetDateTime,
    /// Number of apps with a flow.
    pub(in crate::networks) apps: i64,
}

/// Lists the plans that are due for a test, the oldest first.
pub(in crate::networks) async fn list_due_probes(
    conn: &mut PgConnection,
    limit: i64,
) -> Result<Vec<Due>, Error> {
    Ok(sqlx::query_as!(
        Due,
        r#"SELECT t.id AS "tenant_id: TenantId", t.name AS "tenant: TenantName", p.number,
           p.in_force_at AS "in_force_at!", jsonb_array_length(s.flows)::bigint AS "apps!"
           FROM network_plan p JOIN tenant t ON t.id = p.tenant_id AND t.state = 'active'
           JOIN tenant_plan s ON s.tenant_id = t.id
           WHERE p.probe_at <= now() AND p.state = 'in_force' ORDER BY p.probe_at LIMIT $1"#,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// Returns when the next plan is due for a test.
pub(in crate::networks) async fn find_next_probe(
    conn: &mut PgConnection,
) -> Result<Option<OffsetDateTime>, Error> {
    Ok(sqlx::query_scalar!(
        "SELECT p.probe_at FROM network_plan p JOIN tenant t ON t.id = p.tenant_id AND t.state = 'active' \
         WHERE p.probe_at IS NOT NULL AND p.state = 'in_force' ORDER BY p.probe_at LIMIT 1"
    )
    .fetch_optional(conn)
    .await?
    .flatten())
}

/// Stores the result of a test. `again`: seconds until the next test, if any.
pub(in crate::networks) async fn set_probed(
    conn: &mut PgConnection,
    tenant: TenantId,
    number: i64,
    probed: Option<&ProbeSummary>,
    again: Option<i32>,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE network_plan SET probed = coalesce($3, probed), probe_at = now() + make_interval(secs => $4) \
         WHERE tenant_id = $1 AND number = $2 AND probe_at IS NOT NULL",
        tenant.0,
        number,
        probed.map(|probed| serde_json::json!(probed)),
        again.map(f64::from)
    )
    .execute(conn)
    .await?;
    Ok(())
}
