//! What was tried of a plan, kept with it.

use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::driver::Probed;
use crate::error::Error;
use crate::ids::{TenantId, TenantName};

/// A plan that is in force and was not wholly tried yet.
pub(in crate::networks) struct Unprobed {
    pub(in crate::networks) tenant: TenantName,
    pub(in crate::networks) number: i64,
    pub(in crate::networks) in_force_at: OffsetDateTime,
    /// Apps that may begin to talk to something, or be talked to.
    pub(in crate::networks) apps: i64,
}

/// The plan in force of a tenant that is there, if it is still to be tried.
pub(in crate::networks) async fn find_unprobed(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<Option<Unprobed>, Error> {
    Ok(sqlx::query_as!(
        Unprobed,
        r#"SELECT t.name AS "tenant: TenantName", p.number, p.in_force_at AS "in_force_at!",
           jsonb_array_length(s.flows)::bigint AS "apps!"
           FROM tenant t JOIN tenant_plan s ON s.tenant_id = t.id
           JOIN network_plan p ON p.tenant_id = t.id AND p.number = s.number
           WHERE t.id = $1 AND t.state = 'active' AND p.state = 'in_force' AND p.probed_at IS NULL"#,
        tenant.0
    )
    .fetch_optional(conn)
    .await?)
}

/// Writes down with a plan what was tried; whether that was all of it.
pub(in crate::networks) async fn set_probed(
    conn: &mut PgConnection,
    tenant: TenantId,
    number: i64,
    probed: &Probed,
    whole: bool,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE network_plan SET probed = $3, probed_at = CASE WHEN $4 THEN now() END \
         WHERE tenant_id = $1 AND number = $2",
        tenant.0,
        number,
        serde_json::json!(probed),
        whole
    )
    .execute(conn)
    .await?;
    Ok(())
}
