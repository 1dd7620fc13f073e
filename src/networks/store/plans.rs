//! Plans: the current one, past ones, and the decisions behind them.

use serde::Serialize;
use serde_json::Value;
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;

use crate::error::Error;
use crate::ids::TenantId;
use crate::networks::AppPlan;

/// The current plan.
#[derive(Debug, Clone)]
pub(in crate::networks) struct CurrentPlan {
    pub(in crate::networks) number: i64,
    pub(in crate::networks) hash: String,
    pub(in crate::networks) apps: Vec<AppPlan>,
    pub(in crate::networks) in_force: bool,
    /// End of audit mode under this plan, in seconds since 1970.
    pub(in crate::networks) trial: Option<i64>,
}

/// A row of the plan history.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Plan {
    /// Number.
    pub number: i64,
    /// The tenant of its apps.
    pub tenant: String,
    /// SHA-256 of everything that is open under it.
    pub hash: String,
    /// Descriptions of the flows that it opens.
    pub opens: Value,
    /// Descriptions of the flows that it closes.
    pub closes: Value,
    /// The decisions behind it, each with its actor.
    pub causes: Value,
    /// `proven`, `refused`, `in_force`, `superseded`.
    pub state: String,
    /// Why it is not applied; empty if it is.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// When it was made.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When it was applied.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub in_force_at: Option<OffsetDateTime>,
    /// The result of testing it from inside the tenant's apps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probed: Option<serde_json::Value>,
}

/// A decision behind a plan.
#[derive(Debug, Clone, Serialize)]
pub(in crate::networks) struct PlanCause {
    pub(in crate::networks) actor: String,
    pub(in crate::networks) words: String,
    #[serde(with = "time::serde::rfc3339")]
    pub(in crate::networks) at: OffsetDateTime,
}

/// Records a decision for the next plan. While no plan can be made, at most 500 causes are kept.
pub(in crate::networks) async fn insert_cause(
    conn: &mut PgConnection,
    tenant: TenantId,
    actor: &str,
    words: &str,
) -> Result<(), Error> {
    sqlx::query!(
        "INSERT INTO network_cause (tenant_id, actor, words) SELECT $1, $2, $3 \
         WHERE (SELECT count(*) FROM (SELECT FROM network_cause WHERE tenant_id = $1 LIMIT 500) n) < 500",
        tenant.0,
        actor,
        words
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Takes the decisions since the last plan.
pub(in crate::networks) async fn take_causes(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<Vec<PlanCause>, Error> {
    let mut causes = sqlx::query_as!(
        PlanCause,
        "DELETE FROM network_cause WHERE tenant_id = $1 RETURNING actor, words, at",
        tenant.0
    )
    .fetch_all(conn)
    .await?;
    causes.sort_by_key(|cause| cause.at);
    Ok(causes)
}

/// Reports whether a tenant's plan is applied and no decision was made since.
pub(in crate::networks) async fn is_settled(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<bool, Error> {
    let settled = sqlx::query_scalar!(
        r#"SELECT in_force AND NOT EXISTS (SELECT FROM network_cause c WHERE c.tenant_id = $1) AS "settled!"
           FROM tenant_plan WHERE tenant_id = $1"#,
        tenant.0
    )
    .fetch_optional(conn)
    .await?;
    Ok(settled.unwrap_or(false))
}

/// Returns the current plan, locked: plans of a tenant are made one after another.
pub(in crate::networks) async fn lock_plan(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<CurrentPlan, Error> {
    sqlx::query!("INSERT INTO tenant_plan (tenant_id) VALUES ($1) ON CONFLICT DO NOTHING", tenant.0)
        .execute(&mut *conn)
        .await?;
    let row = sqlx::query!(
        r#"SELECT number, hash, flows AS "flows: Json<Vec<AppPlan>>", in_force, trial_until FROM tenant_plan
           WHERE tenant_id = $1 FOR UPDATE"#,
        tenant.0
    )
    .fetch_one(conn)
    .await?;
    Ok(CurrentPlan {
        number: row.number,
        hash: row.hash,
        apps: row.flows.0,
        in_force: row.in_force,
        trial: row.trial_until,
    })
}

/// Returns the current plan; `None` before the first.
pub(in crate::networks) async fn find_standing(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<Option<CurrentPlan>, Error> {
    let row = sqlx::query!(
        r#"SELECT number, hash, flows AS "flows: Json<Vec<AppPlan>>", in_force, trial_until FROM tenant_plan WHERE tenant_id = $1"#,
        tenant.0
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| CurrentPlan {
        number: row.number,
        hash: row.hash,
        apps: row.flows.0,
        in_force: row.in_force,
        trial: row.trial_until,
    }))
}

/// A plan that has no number yet.
pub(in crate::networks) struct NewPlan<'a> {
    pub(in crate::networks) hash: &'a str,
    pub(in crate::networks) opens: &'a [String],
    pub(in crate::networks) closes: &'a [String],
    pub(in crate::networks) causes: &'a [PlanCause],
    pub(in crate::networks) refused: Option<&'a str>,
}

/// Inserts a plan. Of superseded and refused plans, a tenant keeps 500.
pub(in crate::networks) async fn insert_plan(
    conn: &mut PgConnection,
    tenant: TenantId,
    plan: &NewPlan<'_>,
) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        "WITH gone AS (DELETE FROM network_plan WHERE tenant_id = $1 AND number IN (SELECT number FROM network_plan \
           WHERE tenant_id = $1 AND state IN ('superseded', 'refused') ORDER BY number DESC OFFSET 500 LIMIT 20)) \
         INSERT INTO network_plan (tenant_id, hash, opens, closes, causes, state, message) \
         VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING number",
        tenant.0,
        plan.hash,
        serde_json::json!(plan.opens),
        serde_json::json!(plan.closes),
        serde_json::json!(plan.causes),
        if plan.refused.is_some() { "refused" } else { "proven" },
        plan.refused.unwrap_or_default()
    )
    .fetch_one(conn)
    .await?)
}

/// Makes a plan the current one.
pub(in crate::networks) async fn set_standing(
    conn: &mut PgConnection,
    tenant: TenantId,
    (number, hash): (i64, &str),
    (apps, trial): (&[AppPlan], Option<i64>),
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE tenant_plan SET number = $2, hash = $3, flows = $4, trial_until = $5, in_force = false, \
         changed_at = now() WHERE tenant_id = $1",
        tenant.0,
        number,
        hash,
        serde_json::json!(apps),
        trial
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Marks a plan as applied and earlier ones as superseded. Returns whether it was not applied before.
pub(in crate::networks) async fn set_in_force(
    conn: &mut PgConnection,
    tenant: TenantId,
    number: i64,
) -> Result<bool, Error> {
    sqlx::query!(
        "UPDATE tenant_plan SET in_force = true WHERE tenant_id = $1 AND number = $2",
        tenant.0,
        number
    )
    .execute(&mut *conn)
    .await?;
    let done = sqlx::query!(
        "UPDATE network_plan SET state = CASE WHEN number = $2 THEN 'in_force' ELSE 'superseded' END, \
         message = CASE WHEN number = $2 THEN '' ELSE message END, \
         in_force_at = CASE WHEN number = $2 THEN now() ELSE in_force_at END, \
         probe_at = CASE WHEN number = $2 THEN now() END \
         WHERE tenant_id = $1 AND number <= $2 AND state IN ('proven', 'in_force') \
           AND NOT (number = $2 AND state = 'in_force')",
        tenant.0,
        number
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Records why a plan is not applied yet.
pub(in crate::networks) async fn set_plan_message(
    conn: &mut PgConnection,
    tenant: TenantId,
    message: &str,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE network_plan p SET message = $2 FROM tenant_plan t WHERE t.tenant_id = $1 AND NOT t.in_force \
         AND p.tenant_id = t.tenant_id AND p.number = t.number",
        tenant.0,
        message
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Lists plans by number, the newest first: one tenant's, or all tenants' for `None`.
pub(in crate::networks) async fn list_plans(
    conn: &mut PgConnection,
    tenant: Option<TenantId>,
    before: i64,
    limit: i64,
) -> Result<Vec<Plan>, Error> {
    match tenant {
        Some(tenant) => Ok(sqlx::query_as!(
            Plan,
            r#"SELECT p.number, t.name AS tenant, p.hash, p.opens, p.closes, p.causes, p.state, p.message,
               p.created_at, p.in_force_at, p.probed FROM network_plan p JOIN tenant t ON t.id = p.tenant_id
               WHERE p.tenant_id = $1 AND p.number < $2 ORDER BY p.number DESC LIMIT $3"#,
            tenant.0,
            before,
            limit
        )
        .fetch_all(conn)
        .await?),
        None => Ok(sqlx::query_as!(
            Plan,
            r#"SELECT p.number, t.name AS tenant, p.hash, p.opens, p.closes, p.causes, p.state, p.message,
               p.created_at, p.in_force_at, p.probed FROM network_plan p JOIN tenant t ON t.id = p.tenant_id
               WHERE p.number < $1 ORDER BY p.number DESC LIMIT $2"#,
            before,
            limit
        )
        .fetch_all(conn)
        .await?),
    }
}

/// Returns one plan: one tenant's, or any tenant's for `None`.
pub(in crate::networks) async fn find_plan(
    conn: &mut PgConnection,
    tenant: Option<TenantId>,
    number: i64,
) -> Result<Option<Plan>, Error> {
    let found = list_plans(conn, tenant, number.saturating_add(1), 1).await?;
    Ok(found.into_iter().find(|plan| plan.number == number))
}

/// Ends all grants, requests and service access of a tenant in offboarding, and wakes the tenants that
/// accepted its grants.
pub(in crate::networks) async fn end_all(conn: &mut PgConnection, tenant: TenantId) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE grant_offer SET withdrawn_by = 'platform', withdrawn_at = now() \
         WHERE tenant_id = $1 AND withdrawn_at IS NULL",
        tenant.0
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query!(
        "UPDATE grant_answer SET ended_by = 'platform', ended_at = now() WHERE tenant_id = $1 AND ended_at IS NULL",
        tenant.0
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query!(
        "UPDATE egress_target SET state = 'withdrawn', ended_by = 'platform', ended_at = now() \
         WHERE tenant_id = $1 AND state IN ('asked', 'approved')",
        tenant.0
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query!("DELETE FROM tenant_service WHERE tenant_id = $1", tenant.0).execute(&mut *conn).await?;
    sqlx::query!("DELETE FROM network_trial WHERE tenant_id = $1", tenant.0).execute(&mut *conn).await?;
    sqlx::query!(
        "UPDATE work SET wake = wake + 1, due_at = least(due_at, now()), parked_at = NULL WHERE kind = 'network' \
         AND object_id IN (SELECT tenant_id FROM grant_answer WHERE from_tenant_id = $1)",
        tenant.0
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Returns the newest plan of a tenant if it has this hash and was refused.
pub(in crate::networks) async fn find_refused(
    conn: &mut PgConnection,
    tenant: TenantId,
    hash: &str,
) -> Result<Option<i64>, Error> {
    let newest = sqlx::query!(
        "SELECT number, hash, state FROM network_plan WHERE tenant_id = $1 ORDER BY number DESC LIMIT 1",
        tenant.0
    )
    .fetch_optional(conn)
    .await?;
    Ok(newest.filter(|plan| plan.hash == hash && plan.state == "refused").map(|plan| plan.number))
}

/// Raises the next plan number above one that the agent has seen.
pub(in crate::networks) async fn number_beyond(conn: &mut PgConnection, seen: i64) -> Result<(), Error> {
    sqlx::query!(
        "SELECT setval('network_plan_number', greatest($1, (SELECT last_value FROM network_plan_number)))",
        seen
    )
    .fetch_one(conn)
    .await?;
    Ok(())
}

/// Marks the plan as not applied: the next reconcile makes a new one.
pub(in crate::networks) async fn unset_standing(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<(), Error> {
    sqlx::query!("UPDATE tenant_plan SET hash = '', in_force = false WHERE tenant_id = $1", tenant.0)
        .execute(conn)
        .await?;
    Ok(())
}

/// Deletes plans that were superseded or refused over 90 days ago.
pub(in crate::networks) async fn prune(conn: &mut PgConnection) -> Result<(), Error> {
    sqlx::query!(
        "DELETE FROM network_plan WHERE state IN ('superseded', 'refused') AND created_at < now() - interval '90 days'"
    )
    .execute(conn)
    .await?;
    Ok(())
}
