//! Egress targets: requested by the tenant, decided by the platform.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::error::Error;
use crate::ids::{EgressName, TenantId};
use crate::networks::EgressTarget;
use crate::policy::Protocol;

/// A requested egress target.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct EgressRequest {
    /// Number. A decision refers to exactly this request.
    pub id: i64,
    /// Tenant.
    pub tenant: String,
    /// The tenant's name for it.
    pub name: String,
    /// Addresses, or a domain.
    pub place: String,
    /// Protocol.
    pub protocol: String,
    /// Ports.
    pub ports: Vec<i32>,
    /// Why the tenant needs it.
    pub reason: String,
    /// `asked`, `approved`, `refused`, `withdrawn`, `expired`.
    pub state: String,
    /// Actor who requested it.
    pub asked_by: String,
    /// When it was requested.
    #[serde(with = "time::serde::rfc3339")]
    pub asked_at: OffsetDateTime,
    /// Actor who decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decided_by: Option<String>,
    /// When it was decided.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub decided_at: Option<OffsetDateTime>,
    /// Note of the admin who decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// When it expires.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<OffsetDateTime>,
}

/// A new request for an egress target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEgressRequest {
    /// The tenant's name for it.
    pub name: EgressName,
    /// Addresses or domain.
    pub place: EgressTarget,
    /// Protocol.
    pub protocol: Protocol,
    /// Ports, in order.
    pub ports: Vec<u16>,
    /// Why the tenant needs it.
    pub reason: String,
    /// Days until it expires; `None` for no expiry.
    pub days: Option<i32>,
}

pub(in crate::networks) async fn insert_target(
    conn: &mut PgConnection,
    tenant: TenantId,
    wish: &NewEgressRequest,
    who: &str,
) -> Result<(), sqlx::Error> {
    let ports: Vec<i32> = wish.ports.iter().map(|port| i32::from(*port)).collect();
    sqlx::query!(
        "INSERT INTO egress_target (tenant_id, name, network, protocol, ports, reason, asked_by, expires_at, domain) \
         VALUES ($1, $2, $3::text::cidr, $4, $5, $6, $7, now() + make_interval(days => $8), $9)",
        tenant.0,
        wish.name.as_str(),
        match &wish.place {
            EgressTarget::Network(network) => Some(network.to_string()),
            EgressTarget::Domain(_) => None,
        },
        wish.protocol.as_str(),
        &ports,
        wish.reason,
        who,
        wish.days,
        match &wish.place {
            EgressTarget::Network(_) => None,
            EgressTarget::Domain(domain) => Some(domain.as_str()),
        }
    )
    .execute(conn)
    .await
    .map(drop)
}

/// Lists a tenant's targets by number, the newest first.
pub(in crate::networks) async fn list_targets(
    conn: &mut PgConnection,
    tenant: TenantId,
    before: i64,
    limit: i64,
) -> Result<Vec<EgressRequest>, Error> {
    Ok(sqlx::query_as!(
        EgressRequest,
        r#"SELECT e.id, t.name AS tenant, e.name, coalesce(regexp_replace(e.network::text, '/32$', ''), e.domain) AS "place!", e.protocol, e.ports, e.reason,
           CASE WHEN e.state = 'approved' AND e.expires_at <= now() THEN 'expired' ELSE e.state END AS "state!",
           e.asked_by, e.asked_at, e.decided_by, e.decided_at, e.note, e.expires_at
           FROM egress_target e JOIN tenant t ON t.id = e.tenant_id
           WHERE e.tenant_id = $1 AND e.id < $2 ORDER BY e.id DESC LIMIT $3"#,
        tenant.0,
        before,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// Returns the newest target of a name.
pub(in crate::networks) async fn find_target(
    conn: &mut PgConnection,
    tenant: TenantId,
    name: &EgressName,
) -> Result<Option<EgressRequest>, Error> {
    Ok(sqlx::query_as!(
        EgressRequest,
        r#"SELECT e.id, t.name AS tenant, e.name, coalesce(regexp_replace(e.network::text, '/32$', ''), e.domain) AS "place!", e.protocol, e.ports, e.reason,
           CASE WHEN e.state = 'approved' AND e.expires_at <= now() THEN 'expired' ELSE e.state END AS "state!",
           e.asked_by, e.asked_at, e.decided_by, e.decided_at, e.note, e.expires_at
           FROM egress_target e JOIN tenant t ON t.id = e.tenant_id
           WHERE e.tenant_id = $1 AND e.name = $2 ORDER BY e.id DESC LIMIT 1"#,
        tenant.0,
        name.as_str()
    )
    .fetch_optional(conn)
    .await?)
}

/// Lists the pending requests of all tenants, the oldest first.
pub(in crate::networks) async fn list_waiting(
    conn: &mut PgConnection,
    after: i64,
    limit: i64,
) -> Result<Vec<EgressRequest>, Error> {
    Ok(sqlx::query_as!(
        EgressRequest,
        r#"SELECT e.id, t.name AS tenant, e.name, coalesce(regexp_replace(e.network::text, '/32$', ''), e.domain) AS "place!", e.protocol, e.ports, e.reason,
           e.state, e.asked_by, e.asked_at, e.decided_by, e.decided_at, e.note, e.expires_at
           FROM egress_target e JOIN tenant t ON t.id = e.tenant_id
           WHERE e.state = 'asked' AND e.id > $1 ORDER BY e.id LIMIT $2"#,
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// Decides a request. Returns whether it was still pending.
pub(in crate::networks) async fn decide_target(
    conn: &mut PgConnection,
    tenant: TenantId,
    id: i64,
    (state, note, days): (&str, Option<&str>, Option<i32>),
    who: &str,
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE egress_target SET state = $3, note = $4, decided_by = $5, decided_at = now(), \
         expires_at = least(expires_at, now() + make_interval(days => $6)) \
         WHERE tenant_id = $1 AND id = $2 AND state = 'asked'",
        tenant.0,
        id,
        state,
        note,
        who,
        days
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Withdraws the pending or approved target of a name. Returns whether there was one.
pub(in crate::networks) async fn withdraw_target(
    conn: &mut PgConnection,
    tenant: TenantId,
    name: &EgressName,
    who: &str,
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE egress_target SET state = 'withdrawn', ended_by = $3, ended_at = now() \
         WHERE tenant_id = $1 AND name = $2 AND state IN ('asked', 'approved')",
        tenant.0,
        name.as_str(),
        who
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Returns the names that are not approved for the tenant now.
pub(in crate::networks) async fn list_closed_targets(
    conn: &mut PgConnection,
    tenant: TenantId,
    names: &[String],
) -> Result<Vec<String>, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT n AS "name!" FROM unnest($2::text[]) n WHERE NOT EXISTS
           (SELECT 1 FROM egress_target e WHERE e.tenant_id = $1 AND e.name = n AND e.state = 'approved'
            AND (e.expires_at IS NULL OR e.expires_at > now()))"#,
        tenant.0,
        names
    )
    .fetch_all(conn)
    .await?)
}

/// Returns the number of a tenant's pending requests.
pub(in crate::networks) async fn count_waiting(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM egress_target WHERE tenant_id = $1 AND state = 'asked'"#,
        tenant.0
    )
    .fetch_one(conn)
    .await?)
}
