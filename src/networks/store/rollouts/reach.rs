//! The tenants that a rollout has reached, and whether its change is applied there.

use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;

use super::Rollout;
use crate::error::Error;
use crate::ids::{TenantId, TenantName};
use crate::networks::AppPlan;

/// Reaches further tenants of a service: only those in `only`, at most `limit`. Returns their ids.
pub(in crate::networks) async fn reach_tenants(
    conn: &mut PgConnection,
    rollout: &Rollout,
    only: Option<&[i64]>,
    limit: i64,
) -> Result<Vec<i64>, Error> {
    Ok(sqlx::query_scalar!(
        "UPDATE tenant_service SET rollout_id = $1, endpoints = $5, coming = NULL, moved_at = now() \
         WHERE service_id = $2 AND tenant_id IN \
         (SELECT tenant_id FROM tenant_service WHERE service_id = $2 AND rollout_id IS DISTINCT FROM $1 \
          AND ($3::bigint[] IS NULL OR tenant_id = ANY ($3)) ORDER BY tenant_id LIMIT $4 FOR UPDATE) \
         RETURNING tenant_id",
        rollout.id,
        rollout.service_id,
        only,
        limit,
        serde_json::json!(rollout.endpoints)
    )
    .fetch_all(conn)
    .await?)
}

/// Starts counting use of the endpoints that will be removed, for at most `limit` further tenants. Returns
/// their ids.
pub(in crate::networks) async fn watch_tenants(
    conn: &mut PgConnection,
    rollout: &Rollout,
    limit: i64,
) -> Result<Vec<i64>, Error> {
    Ok(sqlx::query_scalar!(
        "UPDATE tenant_service SET coming = $3, moved_at = now() WHERE service_id = $1 AND tenant_id IN \
         (SELECT tenant_id FROM tenant_service WHERE service_id = $1 AND rollout_id IS NULL AND coming IS NULL \
          ORDER BY tenant_id LIMIT $2 FOR UPDATE) RETURNING tenant_id",
        rollout.service_id,
        limit,
        serde_json::json!(rollout.endpoints)
    )
    .fetch_all(conn)
    .await?)
}

/// Puts at most `limit` tenants back to the service's own endpoints. Returns their ids.
pub(in crate::networks) async fn leave_tenants(
    conn: &mut PgConnection,
    rollout: &Rollout,
    limit: i64,
) -> Result<Vec<i64>, Error> {
    Ok(sqlx::query_scalar!(
        "UPDATE tenant_service SET rollout_id = NULL, endpoints = NULL, coming = NULL, moved_at = now() \
         WHERE service_id = $2 AND tenant_id IN \
         (SELECT tenant_id FROM tenant_service WHERE service_id = $2 AND (rollout_id = $1 OR coming IS NOT NULL) \
          ORDER BY tenant_id LIMIT $3 FOR UPDATE) RETURNING tenant_id",
        rollout.id,
        rollout.service_id,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// Lists the tenants of a service that only have the service's own endpoints.
pub(in crate::networks) async fn list_unreached(
    conn: &mut PgConnection,
    service: i64,
) -> Result<Vec<i64>, Error> {
    Ok(sqlx::query_scalar!(
        "SELECT tenant_id FROM tenant_service WHERE service_id = $1 AND rollout_id IS NULL ORDER BY tenant_id",
        service
    )
    .fetch_all(conn)
    .await?)
}

/// Locks a service, so that no tenant gains access meanwhile.
pub(in crate::networks) async fn lock_service(conn: &mut PgConnection, service: i64) -> Result<(), Error> {
    sqlx::query!("SELECT id FROM service WHERE id = $1 FOR UPDATE", service).fetch_optional(conn).await?;
    Ok(())
}

/// Returns the number of tenants that may use a service.
pub(in crate::networks) async fn count_users(conn: &mut PgConnection, service: i64) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(r#"SELECT count(*) AS "n!" FROM tenant_service WHERE service_id = $1"#, service)
        .fetch_one(conn)
        .await?)
}

/// Copies a rollout's endpoints and description to the service.
pub(in crate::networks) async fn adopt(conn: &mut PgConnection, rollout: i64) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE service s SET endpoints = r.endpoints, description = r.description, generation = s.generation + 1, \
         changed_at = now() FROM network_rollout r WHERE r.id = $1 AND s.id = r.service_id",
        rollout
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Records a cause for these tenants and wakes their networks.
pub(in crate::networks) async fn note_tenants(
    conn: &mut PgConnection,
    tenants: &[i64],
    who: &str,
    why: &str,
) -> Result<(), Error> {
    if tenants.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "INSERT INTO network_cause (tenant_id, actor, words) SELECT unnest($1::bigint[]), $2, $3",
        tenants,
        who,
        why
    )
    .execute(&mut *conn)
    .await?;
    // Sorted, so that two concurrent calls do not deadlock.
    sqlx::query!(
        "INSERT INTO work (kind, object_id, tenant_id) SELECT 'network', t, t FROM unnest($1::bigint[]) t ORDER BY t \
         ON CONFLICT (kind, object_id) DO UPDATE SET wake = work.wake + 1, due_at = least(work.due_at, now()), \
         parked_at = NULL, attempt = 0",
        tenants
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Tenants whose plan is not applied yet.
#[derive(Debug)]
pub(in crate::networks) struct Unsettled {
    /// Their number.
    pub(in crate::networks) count: i64,
    /// One of them.
    pub(in crate::networks) example: String,
    /// Seconds for which the oldest has waited.
    pub(in crate::networks) seconds: i64,
}

/// Which tenants of a rollout to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::networks) enum TenantFilter {
    /// Tenants that it has reached.
    Reached,
    /// Tenants whose use is counted.
    Watched,
    /// Tenants that it was rolled back from.
    Left,
}

/// Finds the tenants of a rollout for which its change is not applied yet. It does not wait for decisions
/// that were made later for other reasons.
pub(in crate::networks) async fn find_unsettled(
    conn: &mut PgConnection,
    rollout: i64,
    whom: TenantFilter,
) -> Result<Option<Unsettled>, Error> {
    let row = sqlx::query!(
        r#"SELECT count(*) AS "count!", coalesce(min(t.name), '') AS "example!",
           coalesce(extract(epoch FROM now() - min(u.moved_at)), 0)::bigint AS "seconds!"
           FROM network_rollout r JOIN tenant_service u ON u.service_id = r.service_id
           JOIN tenant t ON t.id = u.tenant_id AND t.state IN ('active', 'suspended')
           LEFT JOIN tenant_plan p ON p.tenant_id = u.tenant_id
           WHERE r.id = $1 AND CASE $2 WHEN 'reached' THEN u.rollout_id = r.id WHEN 'watched' THEN u.coming IS NOT NULL
                               ELSE u.rollout_id IS NULL AND u.moved_at >= r.stage_at END
             AND (EXISTS (SELECT FROM network_cause c WHERE c.tenant_id = u.tenant_id AND c.at <= u.moved_at)
                  OR (NOT coalesce(p.in_force, false) AND NOT EXISTS
                      (SELECT FROM network_plan n WHERE n.tenant_id = u.tenant_id AND n.number >= p.number - 1000
                       AND n.created_at >= u.moved_at AND n.in_force_at IS NOT NULL)))"#,
        rollout,
        match whom {
            TenantFilter::Reached => "reached",
            TenantFilter::Watched => "watched",
            TenantFilter::Left => "left",
        }
    )
    .fetch_one(conn)
    .await?;
    let found = Unsettled { count: row.count, example: row.example, seconds: row.seconds };
    Ok(Some(found).filter(|found| found.count > 0))
}

/// Returns a tenant that the rollout has reached and whose plan has failed verification since, with the
/// reason. The flows that such a plan closes are applied as a plan of the same moment.
pub(in crate::networks) async fn find_unproven(
    conn: &mut PgConnection,
    rollout: i64,
) -> Result<Option<(String, String)>, Error> {
    let row = sqlx::query!(
        r#"SELECT t.name, p.message FROM tenant_service u JOIN tenant t ON t.id = u.tenant_id
           JOIN network_plan p ON p.tenant_id = u.tenant_id AND p.state = 'refused' AND p.created_at >= u.moved_at
           WHERE u.rollout_id = $1 AND NOT EXISTS (SELECT FROM network_plan n WHERE n.tenant_id = u.tenant_id
               AND n.state <> 'refused' AND n.created_at > p.created_at) LIMIT 1"#,
        rollout
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (row.name, row.message)))
}

/// Returns the first alarm since a time: a flow that must be closed was found open.
pub(in crate::networks) async fn find_alarm(
    conn: &mut PgConnection,
    since: OffsetDateTime,
) -> Result<Option<String>, Error> {
    Ok(sqlx::query_scalar!(
        "SELECT text FROM machine_event WHERE kind = 'probe_alarm' AND at >= $1 ORDER BY at LIMIT 1",
        since
    )
    .fetch_optional(conn)
    .await?)
}

/// A tenant's current plan.
pub(in crate::networks) struct PlanOf {
    pub(in crate::networks) tenant: TenantId,
    pub(in crate::networks) name: TenantName,
    pub(in crate::networks) apps: Vec<AppPlan>,
    /// Whether the tenant is in audit mode.
    pub(in crate::networks) on_trial: bool,
}

/// Which tenants' plans to return.
#[derive(Debug, Clone, Copy)]
pub(in crate::networks) enum Pick<'a> {
    /// Plans of these tenants.
    These(&'a [i64]),
    /// Plans of the tenants that were reached last.
    Last,
    /// Plans of a sample of tenants that is the same on every call.
    Some,
}

/// Lists the applied plans in which an app names the service, of tenants that are reached, or of those that
/// are not.
pub(in crate::networks) async fn list_using_plans(
    conn: &mut PgConnection,
    rollout: &Rollout,
    (pick, reached): (Pick<'_>, bool),
    limit: i64,
) -> Result<Vec<PlanOf>, Error> {
    let only = match pick {
        Pick::These(ids) => Some(ids),
        Pick::Last | Pick::Some => None,
    };
    let rows = sqlx::query!(
        r#"SELECT t.id, t.name AS "name: TenantName", p.flows AS "flows: Json<Vec<AppPlan>>",
           coalesce(p.trial_until > extract(epoch FROM now()), false) AS "on_trial!"
           FROM tenant_service u JOIN tenant t ON t.id = u.tenant_id JOIN tenant_plan p ON p.tenant_id = t.id
           WHERE u.service_id = $2 AND (u.rollout_id IS NOT DISTINCT FROM $1) = $7
             AND ($4::bigint[] IS NULL OR t.id = ANY ($4)) AND t.state = 'active' AND p.in_force
             AND p.flows @> jsonb_build_array(jsonb_build_object('flows', jsonb_build_array(
                 jsonb_build_object('name', $3::text, 'target', jsonb_build_object('service', '{}'::jsonb)))))
           ORDER BY CASE WHEN $6 THEN u.moved_at END DESC NULLS LAST, md5($1::text || ':' || t.id::text) LIMIT $5"#,
        rollout.id,
        rollout.service_id,
        rollout.service.as_str(),
        only,
        limit,
        matches!(pick, Pick::Last),
        reached
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| PlanOf {
            tenant: TenantId(row.id),
            name: row.name,
            apps: row.flows.0,
            on_trial: row.on_trial,
        })
        .collect())
}

/// Returns the ids of these tenants, of those that may use the service.
pub(in crate::networks) async fn list_users_named(
    conn: &mut PgConnection,
    service: i64,
    names: &[String],
) -> Result<Vec<(TenantName, TenantId)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT t.id, t.name AS "name: TenantName" FROM tenant t JOIN tenant_service u ON u.tenant_id = t.id
           WHERE u.service_id = $1 AND t.name = ANY ($2)"#,
        service,
        names
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.name, TenantId(row.id))).collect())
}
