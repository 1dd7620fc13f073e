//! Reads the decisions about one tenant's connections, for the reconcilers.

use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;

use crate::apps::connections::list_connecting_of;
use crate::error::Error;
use crate::ids::{AppId, AppName, EgressName, ServiceName, TenantId, TenantName};
use crate::networks::{Approved, EgressTarget, Endpoint, Granted};
use crate::policy::Protocol;

/// Returns the services that a tenant may use, each with the endpoints that apply to it.
pub(in crate::networks) async fn decided_services(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<Vec<(ServiceName, Vec<Endpoint>)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT s.name AS "name: ServiceName", coalesce(t.endpoints, s.endpoints) AS "endpoints!: Json<Vec<Endpoint>>"
           FROM tenant_service t JOIN service s ON s.id = t.service_id
           WHERE t.tenant_id = $1 ORDER BY s.name"#,
        tenant.0
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.name, row.endpoints.0)).collect())
}

/// Returns the services with a pending change for a tenant, each with its coming endpoints. Use of the other
/// endpoints is counted during the observation window.
pub(in crate::networks) async fn decided_windows(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<Vec<(ServiceName, Vec<Endpoint>)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT s.name AS "service: ServiceName", t.coming AS "endpoints!: Json<Vec<Endpoint>>"
           FROM tenant_service t JOIN service s ON s.id = t.service_id
           WHERE t.tenant_id = $1 AND t.coming IS NOT NULL ORDER BY s.name"#,
        tenant.0
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.service, row.endpoints.0)).collect())
}

/// Returns the accepted grants of other tenants' apps, and when the first of them expires.
pub(in crate::networks) async fn decided_grants(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<(Vec<Granted>, Option<OffsetDateTime>), Error> {
    let rows = sqlx::query!(
        r#"SELECT g.id AS giver, g.name AS "giver_name: TenantName", o.app_id, o.to_app AS "to_app: AppName", o.expires_at
           FROM grant_answer a JOIN grant_offer o ON o.tenant_id = a.from_tenant_id AND o.id = a.offer_id
           JOIN tenant g ON g.id = o.tenant_id JOIN tenant t ON t.id = a.tenant_id AND t.name = o.to_tenant
           WHERE a.tenant_id = $1 AND a.ended_at IS NULL AND o.withdrawn_at IS NULL
             AND (o.expires_at IS NULL OR o.expires_at > now()) AND g.state IN ('active', 'suspended')
           ORDER BY o.id"#,
        tenant.0
    )
    .fetch_all(&mut *conn)
    .await?;
    let apps: Vec<_> = rows.iter().map(|row| (TenantId(row.giver), AppId(row.app_id))).collect();
    let apps = list_connecting_of(conn, &apps).await?;
    let mut granted = Vec::with_capacity(rows.len());
    let mut ends = None;
    for row in rows {
        // A deleted or deleting app is not granted.
        let Some(app) = apps.iter().find(|app| app.id.0 == row.app_id) else { continue };
        ends = ends.into_iter().chain(row.expires_at).min();
        granted.push(Granted {
            tenant: row.giver_name,
            app: app.name.clone(),
            id: app.id,
            port: app.port,
            only: row.to_app,
            until: row.expires_at.map(OffsetDateTime::unix_timestamp),
        });
    }
    Ok((granted, ends))
}

/// Returns the approved egress targets, and when the first of them expires.
pub(in crate::networks) async fn decided_egress(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<(Vec<Approved>, Option<OffsetDateTime>), Error> {
    let rows = sqlx::query!(
        r#"SELECT name AS "name: EgressName", network::text AS network, domain, protocol, ports, expires_at
           FROM egress_target WHERE tenant_id = $1 AND state = 'approved'
             AND (expires_at IS NULL OR expires_at > now()) ORDER BY name"#,
        tenant.0
    )
    .fetch_all(conn)
    .await?;
    let ends = rows.iter().filter_map(|row| row.expires_at).min();
    let approved = rows
        .into_iter()
        .map(|row| {
            Ok(Approved {
                name: row.name,
                place: EgressTarget::of(row.network.as_deref(), row.domain.as_deref()).ok_or_else(|| {
                    Error::internal("an egress target has neither a network nor a domain, or both")
                })?,
                protocol: Protocol::parse(&row.protocol)
                    .ok_or_else(|| Error::internal("an egress target has an unknown protocol"))?,
                until: row.expires_at.map(OffsetDateTime::unix_timestamp),
                ports: row.ports.into_iter().filter_map(|port| u16::try_from(port).ok()).collect(),
            })
        })
        .collect::<Result<_, Error>>()?;
    Ok((approved, ends))
}

/// Returns the end of a tenant's audit mode, if it is on.
pub(in crate::networks) async fn decided_trial(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<Option<OffsetDateTime>, Error> {
    Ok(sqlx::query_scalar!(
        "SELECT until FROM network_trial WHERE tenant_id = $1 AND until > now()",
        tenant.0
    )
    .fetch_optional(conn)
    .await?)
}

/// Starts audit mode, or moves its end.
pub(in crate::networks) async fn put_trial(
    conn: &mut PgConnection,
    tenant: TenantId,
    hours: i32,
    who: &str,
) -> Result<OffsetDateTime, Error> {
    Ok(sqlx::query_scalar!(
        "INSERT INTO network_trial (tenant_id, until, begun_by) VALUES ($1, now() + make_interval(hours => $2), $3) \
         ON CONFLICT (tenant_id) DO UPDATE SET until = EXCLUDED.until, begun_by = EXCLUDED.begun_by, begun_at = now() \
         RETURNING until",
        tenant.0,
        hours,
        who
    )
    .fetch_one(conn)
    .await?)
}

/// Ends audit mode. Returns whether it was on.
pub(in crate::networks) async fn end_trial(conn: &mut PgConnection, tenant: TenantId) -> Result<bool, Error> {
    let done = sqlx::query!("DELETE FROM network_trial WHERE tenant_id = $1", tenant.0).execute(conn).await?;
    Ok(done.rows_affected() > 0)
}
