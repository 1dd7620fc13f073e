//! Whom a roll-out has reached, and whether what it brings is in force there.

use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;

use crate::error::Error;
use crate::ids::{ServiceName, TenantId, TenantName};
use crate::networks::AppPlan;

/// Reaches tenants of a service that it has not reached yet: these alone, or at most so many. Who they are.
pub(in crate::networks) async fn reach_tenants(
    conn: &mut PgConnection,
    (rollout, service): (i64, i64),
    only: Option<&[i64]>,
    limit: i64,
) -> Result<Vec<i64>, Error> {
    Ok(sqlx::query_scalar!(
        "UPDATE tenant_service SET rollout_id = $1 WHERE service_id = $2 AND tenant_id IN \
         (SELECT tenant_id FROM tenant_service WHERE service_id = $2 AND rollout_id IS DISTINCT FROM $1 \
          AND ($3::bigint[] IS NULL OR tenant_id = ANY ($3)) ORDER BY tenant_id LIMIT $4 FOR UPDATE) \
         RETURNING tenant_id",
        rollout,
        service,
        only,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// What holds for whom it has reached is what the service says itself. Who they were.
pub(in crate::networks) async fn leave_tenants(
    conn: &mut PgConnection,
    rollout: i64,
) -> Result<Vec<i64>, Error> {
    Ok(sqlx::query_scalar!(
        "UPDATE tenant_service SET rollout_id = NULL WHERE rollout_id = $1 RETURNING tenant_id",
        rollout
    )
    .fetch_all(conn)
    .await?)
}

/// Who may use a service, and for whom only the service's own endpoints hold.
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

/// Holds a service's row, so that nobody is given it meanwhile.
pub(in crate::networks) async fn lock_service(conn: &mut PgConnection, service: i64) -> Result<(), Error> {
    sqlx::query!("SELECT id FROM service WHERE id = $1 FOR UPDATE", service).fetch_optional(conn).await?;
    Ok(())
}

/// How many tenants may use a service.
pub(in crate::networks) async fn count_users(conn: &mut PgConnection, service: i64) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(r#"SELECT count(*) AS "n!" FROM tenant_service WHERE service_id = $1"#, service)
        .fetch_one(conn)
        .await?)
}

/// What a roll-out says becomes what the service says.
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

/// There is something to do for these tenants' networks, and why.
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
    // In one order, so that two who do this do not wait for each other.
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

/// Whose plan is not in force yet.
#[derive(Debug)]
pub(in crate::networks) struct Unsettled {
    /// How many.
    pub(in crate::networks) count: i64,
    /// One of them.
    pub(in crate::networks) example: String,
    /// For how many seconds the eldest has waited.
    pub(in crate::networks) seconds: i64,
}

/// Of the users of a service (all, or whom a roll-out has reached) those whose plan is not in force.
pub(in crate::networks) async fn find_unsettled(
    conn: &mut PgConnection,
    service: i64,
    rollout: Option<i64>,
) -> Result<Option<Unsettled>, Error> {
    let row = sqlx::query!(
        r#"SELECT count(*) AS "count!", coalesce(min(t.name), '') AS "example!",
           coalesce(extract(epoch FROM now() - min(coalesce(c.at, p.changed_at))), 0)::bigint AS "seconds!"
           FROM tenant_service u JOIN tenant t ON t.id = u.tenant_id AND t.state IN ('active', 'suspended')
           LEFT JOIN tenant_plan p ON p.tenant_id = u.tenant_id
           LEFT JOIN LATERAL (SELECT min(at) AS at FROM network_cause WHERE tenant_id = u.tenant_id) c ON true
           WHERE u.service_id = $1 AND ($2::bigint IS NULL OR u.rollout_id = $2)
             AND (NOT coalesce(p.in_force, false) OR c.at IS NOT NULL)"#,
        service,
        rollout
    )
    .fetch_one(conn)
    .await?;
    let found = Unsettled { count: row.count, example: row.example, seconds: row.seconds };
    Ok(Some(found).filter(|found| found.count > 0))
}

/// One of whom a roll-out has reached, whose plan was not proven since then, and why.
pub(in crate::networks) async fn find_unproven(
    conn: &mut PgConnection,
    rollout: i64,
) -> Result<Option<(String, String)>, Error> {
    let row = sqlx::query!(
        r#"SELECT t.name, p.message FROM network_rollout r JOIN tenant_service u ON u.rollout_id = r.id
           JOIN tenant t ON t.id = u.tenant_id
           JOIN LATERAL (SELECT state, message, created_at FROM network_plan
                         WHERE tenant_id = u.tenant_id ORDER BY number DESC LIMIT 1) p ON true
           WHERE r.id = $1 AND p.state = 'refused' AND p.created_at >= r.begun_at LIMIT 1"#,
        rollout
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (row.name, row.message)))
}

/// Something that must be closed was found open since a roll-out went on.
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

/// A tenant's plan, as it stands.
pub(in crate::networks) struct PlanOf {
    pub(in crate::networks) tenant: TenantId,
    pub(in crate::networks) name: TenantName,
    pub(in crate::networks) apps: Vec<AppPlan>,
}

/// Plans of users of a service in which an app names it: of these tenants, or of some that stay the same however
/// often it is asked.
pub(in crate::networks) async fn list_using_plans(
    conn: &mut PgConnection,
    (rollout, service_id, service): (i64, i64, &ServiceName),
    only: Option<&[i64]>,
    limit: i64,
) -> Result<Vec<PlanOf>, Error> {
    let rows = sqlx::query!(
        r#"SELECT t.id, t.name AS "name: TenantName", p.flows AS "flows: Json<Vec<AppPlan>>"
           FROM tenant_service u JOIN tenant t ON t.id = u.tenant_id JOIN tenant_plan p ON p.tenant_id = t.id
           WHERE u.service_id = $2 AND ($4::bigint[] IS NULL OR t.id = ANY ($4)) AND t.state = 'active'
             AND p.flows @> jsonb_build_array(jsonb_build_object('flows', jsonb_build_array(
                 jsonb_build_object('name', $3::text))))
           ORDER BY md5($1::text || ':' || t.id::text) LIMIT $5"#,
        rollout.to_string(),
        service_id,
        service.as_str(),
        only,
        limit
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| PlanOf { tenant: TenantId(row.id), name: row.name, apps: row.flows.0 })
        .collect())
}

/// The identities of these tenants, of those that may use a service and are not reached yet.
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
