//! The audit table. Insert-only.

use sqlx::PgConnection;

use super::Event;
use crate::error::Error;

pub(super) async fn insert_event(conn: &mut PgConnection, event: &Event<'_>) -> Result<(), Error> {
    sqlx::query!(
        "INSERT INTO audit (tenant_id, actor, action, object, request_id, detail) VALUES ($1, $2, $3, $4, $5, $6)",
        event.tenant.map(|id| id.0),
        event.actor.as_str(),
        event.action,
        event.object,
        event.request_id,
        event.detail,
    )
    .execute(conn)
    .await?;
    Ok(())
}
