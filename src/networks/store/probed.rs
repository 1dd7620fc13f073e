//! What was tried of a plan, kept with it, and what is to be tried.

use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::driver::Probed;
use crate::error::Error;
use crate::ids::{TenantId, TenantName};

/// A plan that is in force and is to be tried.
pub(in crate::networks) struct Due {
    pub(in crate::networks) tenant_id: TenantId,
    pub(in crate::networks) tenant: TenantName,
    pub(in crate::networks) number: i64,
    pub(in crate::networks) in_force_at: OffsetDateTime,
    /// Apps that may begin to talk to something, or be talked to.
    pub(in crate::networks) apps: i64,
}

/// Plans that are due to be tried, the one that has waited longest first.
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

/// When the next plan is due to be tried.
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

/// Writes down with a plan what was tried, and after how many seconds it is tried again, if it is.
pub(in crate::networks) async fn set_probed(
    conn: &mut PgConnection,
    tenant: TenantId,
    number: i64,
    probed: Option<&Probed>,
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
