//! Evidence for a rollout: packets to endpoints that will be removed, and probe results.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::driver::Used;
use crate::error::Error;
use crate::ids::{AppId, TenantId};
use crate::networks::rollouts::Check;

/// Records the use of endpoints that will be removed.
pub(in crate::networks) async fn put_uses(
    conn: &mut PgConnection,
    rollout: i64,
    uses: &[(TenantId, Used)],
) -> Result<(), Error> {
    let tenants: Vec<i64> = uses.iter().map(|(tenant, _)| tenant.0).collect();
    let apps: Vec<i64> = uses.iter().map(|(_, used)| used.app.0).collect();
    let networks: Vec<String> = uses.iter().map(|(_, used)| used.network.to_string()).collect();
    let protocols: Vec<String> = uses.iter().map(|(_, used)| used.protocol.to_string()).collect();
    let ports: Vec<i32> = uses.iter().map(|(_, used)| i32::from(used.port)).collect();
    let packets: Vec<i64> =
        uses.iter().map(|(_, used)| i64::try_from(used.packets).unwrap_or(i64::MAX)).collect();
    sqlx::query!(
        "INSERT INTO network_rollout_use AS u (rollout_id, tenant_id, app_id, app, network, protocol, port, packets) \
         SELECT $1, n.tenant, n.app, a.name, n.network, n.protocol, n.port, n.packets \
         FROM unnest($2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::int[], $7::bigint[]) \
              AS n (tenant, app, network, protocol, port, packets) \
         JOIN app a ON a.tenant_id = n.tenant AND a.id = n.app \
         ON CONFLICT (rollout_id, tenant_id, app_id, network, protocol, port) DO UPDATE \
         SET packets = EXCLUDED.packets, last_at = now() WHERE u.packets <> EXCLUDED.packets",
        rollout,
        &tenants,
        &apps,
        &networks,
        &protocols,
        &ports,
        &packets
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Recorded use of an endpoint that will be removed.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct UseRow {
    /// Tenant.
    pub tenant: String,
    /// App.
    pub app: String,
    /// Addresses.
    pub network: String,
    /// Protocol.
    pub protocol: String,
    /// Port.
    pub port: i32,
    /// When it was first seen.
    #[serde(with = "time::serde::rfc3339")]
    pub first_at: OffsetDateTime,
    /// When it was last seen.
    #[serde(with = "time::serde::rfc3339")]
    pub last_at: OffsetDateTime,
}

/// Lists the recorded use, the most recent first, with the total count.
pub(in crate::networks) async fn list_uses(
    conn: &mut PgConnection,
    rollout: i64,
    limit: i64,
) -> Result<(Vec<UseRow>, i64), Error> {
    let rows = sqlx::query_as!(
        UseRow,
        "SELECT t.name AS tenant, u.app, u.network, u.protocol, u.port, u.first_at, u.last_at \
         FROM network_rollout_use u JOIN tenant t ON t.id = u.tenant_id \
         WHERE u.rollout_id = $1 ORDER BY u.last_at DESC, t.name, u.app LIMIT $2",
        rollout,
        limit
    )
    .fetch_all(&mut *conn)
    .await?;
    let all = sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM network_rollout_use WHERE rollout_id = $1"#,
        rollout
    )
    .fetch_one(conn)
    .await?;
    Ok((rows, all))
}

/// Records probe results.
pub(in crate::networks) async fn put_checks(
    conn: &mut PgConnection,
    rollout: i64,
    stage: &str,
    checks: &[Check],
) -> Result<(), Error> {
    let tenants: Vec<i64> = checks.iter().map(|check| check.tenant.0).collect();
    let apps: Vec<i64> = checks.iter().map(|check| check.app.0).collect();
    let names: Vec<String> = checks.iter().map(|check| check.app_name.to_string()).collect();
    let networks: Vec<String> = checks.iter().map(|check| check.address.to_string()).collect();
    let protocols: Vec<String> = checks.iter().map(|check| check.protocol.to_string()).collect();
    let ports: Vec<i32> = checks.iter().map(|check| i32::from(check.port)).collect();
    let must: Vec<String> = checks.iter().map(|check| check.must_be().to_owned()).collect();
    let outcomes: Vec<String> = checks.iter().map(|check| check.outcome.to_string()).collect();
    let good: Vec<bool> = checks.iter().map(|check| check.good).collect();
    sqlx::query!(
        "INSERT INTO network_rollout_check (rollout_id, stage, tenant_id, app_id, app, network, protocol, port, must_be, \
         outcome, good) SELECT $1, $2, * FROM unnest($3::bigint[], $4::bigint[], $5::text[], $6::text[], $7::text[], \
         $8::int[], $9::text[], $10::text[], $11::bool[]) \
         ON CONFLICT (rollout_id, stage, tenant_id, app_id, network, protocol, port) DO UPDATE \
         SET must_be = EXCLUDED.must_be, outcome = EXCLUDED.outcome, good = EXCLUDED.good, at = now()",
        rollout,
        stage,
        &tenants,
        &apps,
        &names,
        &networks,
        &protocols,
        &ports,
        &must,
        &outcomes,
        &good
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A probe result.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct CheckRow {
    /// `before`, `canary`, `all`.
    pub stage: String,
    /// Tenant.
    pub tenant: String,
    /// The app in which the probe ran.
    pub app: String,
    /// Address.
    pub network: String,
    /// Protocol.
    pub protocol: String,
    /// Port.
    pub port: i32,
    /// `open` or `closed`.
    pub must_be: String,
    /// The outcome.
    pub outcome: String,
    /// Whether the outcome matches `must_be`.
    pub good: bool,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
}

/// Lists probe results, failed ones first, with the total count.
pub(in crate::networks) async fn list_checks(
    conn: &mut PgConnection,
    rollout: i64,
    limit: i64,
) -> Result<(Vec<CheckRow>, i64), Error> {
    let rows = sqlx::query_as!(
        CheckRow,
        "SELECT c.stage, t.name AS tenant, c.app, c.network, c.protocol, c.port, c.must_be, c.outcome, c.good, c.at \
         FROM network_rollout_check c JOIN tenant t ON t.id = c.tenant_id \
         WHERE c.rollout_id = $1 ORDER BY c.good, c.at DESC, t.name, c.app, c.network, c.port LIMIT $2",
        rollout,
        limit
    )
    .fetch_all(&mut *conn)
    .await?;
    let all = sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM network_rollout_check WHERE rollout_id = $1"#,
        rollout
    )
    .fetch_one(conn)
    .await?;
    Ok((rows, all))
}

/// Lists the probe results from before a rollout reached any tenant.
pub(in crate::networks) async fn list_before(
    conn: &mut PgConnection,
    rollout: i64,
) -> Result<Vec<Before>, Error> {
    Ok(sqlx::query_as!(
        Before,
        r#"SELECT app_id AS "app: AppId", network, protocol, port, good FROM network_rollout_check
           WHERE rollout_id = $1 AND stage = 'before'"#,
        rollout
    )
    .fetch_all(conn)
    .await?)
}

/// A probe result from before the rollout.
pub(in crate::networks) struct Before {
    pub(in crate::networks) app: AppId,
    pub(in crate::networks) network: String,
    pub(in crate::networks) protocol: String,
    pub(in crate::networks) port: i32,
    pub(in crate::networks) good: bool,
}

/// Returns the flows that a stage found open and that must be closed, each with its app.
pub(in crate::networks) async fn list_found_open(
    conn: &mut PgConnection,
    rollout: i64,
    stage: &str,
) -> Result<Vec<(AppId, String)>, Error> {
    let rows = sqlx::query!(
        "SELECT app_id, network || ' ' || protocol || ' ' || port AS \"place!\" FROM network_rollout_check \
         WHERE rollout_id = $1 AND stage = $2 AND must_be = 'closed' AND NOT good",
        rollout,
        stage
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (AppId(row.app_id), row.place)).collect())
}
