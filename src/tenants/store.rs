//! Rows of tenants.

use serde::Serialize;
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;

use super::Tenant;
use crate::error::Error;
use crate::ids::{TenantId, TenantName};
use crate::quotas::{Quota, Resource};

pub(super) async fn insert_tenant(
    conn: &mut PgConnection,
    name: &TenantName,
    display_name: &str,
) -> Result<TenantId, sqlx::Error> {
    let id = sqlx::query_scalar!(
        "INSERT INTO tenant (name, display_name) VALUES ($1, $2) RETURNING id",
        name.as_str(),
        display_name
    )
    .fetch_one(conn)
    .await?;
    Ok(TenantId(id))
}

pub(super) async fn insert_network(
    conn: &mut PgConnection,
    id: TenantId,
    limit: i64,
) -> Result<(), sqlx::Error> {
    sqlx::query!("INSERT INTO network (tenant_id, limit_) VALUES ($1, $2)", id.0, limit)
        .execute(conn)
        .await?;
    Ok(())
}

/// Returns the number of a tenant's network.
pub async fn tenant_network(conn: &mut PgConnection, id: TenantId) -> Result<u32, Error> {
    let number =
        sqlx::query_scalar!("SELECT number FROM network WHERE tenant_id = $1", id.0).fetch_one(conn).await?;
    u32::try_from(number).map_err(Error::internal)
}

/// Returns the state of a tenant.
pub async fn tenant_state(conn: &mut PgConnection, id: TenantId) -> Result<String, Error> {
    Ok(sqlx::query_scalar!("SELECT state FROM tenant WHERE id = $1", id.0).fetch_one(conn).await?)
}

/// Locks a tenant's row. Returns generation and state.
pub(super) async fn lock_tenant(conn: &mut PgConnection, id: TenantId) -> Result<(i64, String), Error> {
    let row = sqlx::query!("SELECT generation, state FROM tenant WHERE id = $1 FOR UPDATE", id.0)
        .fetch_one(conn)
        .await?;
    Ok((row.generation, row.state))
}

pub(super) async fn raise_generation(
    conn: &mut PgConnection,
    id: TenantId,
    state: &str,
) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        "UPDATE tenant SET generation = generation + 1, state = $2, changed_at = now() WHERE id = $1 \
         RETURNING generation",
        id.0,
        state
    )
    .fetch_one(conn)
    .await?)
}

pub(super) async fn set_display_name(conn: &mut PgConnection, id: TenantId, name: &str) -> Result<(), Error> {
    sqlx::query!("UPDATE tenant SET display_name = $2 WHERE id = $1", id.0, name).execute(conn).await?;
    Ok(())
}

/// Wakes all apps of the tenant after a change of the tenant's state.
pub(super) async fn wake_apps(conn: &mut PgConnection, id: TenantId) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE work SET wake = wake + 1, due_at = now(), parked_at = NULL, attempt = 0 \
         WHERE tenant_id = $1 AND kind = 'app'",
        id.0
    )
    .execute(conn)
    .await?;
    Ok(())
}

pub(super) async fn revoke_tokens(conn: &mut PgConnection, id: TenantId) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE api_token SET revoked_at = now() WHERE coalesce(tenant_id, 0) = $1 AND revoked_at IS NULL",
        id.0
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Revokes all access to the tenant: members, service accounts, open invitations.
pub(super) async fn end_access(conn: &mut PgConnection, id: TenantId) -> Result<(), Error> {
    sqlx::query!("DELETE FROM membership WHERE tenant_id = $1", id.0).execute(&mut *conn).await?;
    sqlx::query!(
        "UPDATE service_account SET deleted_at = now() WHERE tenant_id = $1 AND deleted_at IS NULL",
        id.0
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query!(
        "UPDATE invitation SET revoked_at = now() WHERE coalesce(tenant_id, 0) = $1 AND used_at IS NULL \
         AND revoked_at IS NULL",
        id.0
    )
    .execute(conn)
    .await?;
    Ok(())
}

pub(super) async fn count_good_tokens(conn: &mut PgConnection, id: TenantId) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM api_token WHERE coalesce(tenant_id, 0) = $1 AND revoked_at IS NULL"#,
        id.0
    )
    .fetch_one(conn)
    .await?)
}

pub(super) async fn insert_steps(conn: &mut PgConnection, id: TenantId, steps: &[&str]) -> Result<(), Error> {
    let names: Vec<String> = steps.iter().map(ToString::to_string).collect();
    sqlx::query!(
        "INSERT INTO offboarding_step (tenant_id, position, name) \
         SELECT $1, place::int, name FROM unnest($2::text[]) WITH ORDINALITY AS s (name, place)",
        id.0,
        &names
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A step of an offboarding as shown.
#[derive(Debug, Clone, Serialize)]
pub(super) struct OffboardingStep {
    /// Name.
    pub name: String,
    /// `waiting`, `running`, `done`.
    pub state: String,
    /// What the step still waits for.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Start of the step.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub started_at: Option<OffsetDateTime>,
    /// Time at which a check confirmed the step.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<OffsetDateTime>,
}

pub(super) async fn list_steps(conn: &mut PgConnection, id: TenantId) -> Result<Vec<OffboardingStep>, Error> {
    Ok(sqlx::query_as!(
        OffboardingStep,
        "SELECT name, state, message, started_at, finished_at FROM offboarding_step \
         WHERE tenant_id = $1 ORDER BY position",
        id.0
    )
    .fetch_all(conn)
    .await?)
}

pub(super) async fn set_step(
    conn: &mut PgConnection,
    id: TenantId,
    name: &str,
    state: &str,
    message: &str,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE offboarding_step SET state = $3, message = $4, started_at = coalesce(started_at, now()), \
         finished_at = CASE WHEN $3 = 'done' THEN coalesce(finished_at, now()) END \
         WHERE tenant_id = $1 AND name = $2",
        id.0,
        name,
        state,
        message
    )
    .execute(conn)
    .await?;
    Ok(())
}

pub(super) async fn set_offboarded(conn: &mut PgConnection, id: TenantId) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE tenant SET state = 'offboarded', offboarded_at = now(), observed_generation = generation \
         WHERE id = $1",
        id.0
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A condition of one part of a tenant.
#[derive(Debug, Clone, Serialize)]
pub struct TenantCondition {
    /// Part.
    #[serde(rename = "type")]
    pub kind: String,
    /// `true`, `false` or `unknown`.
    pub status: String,
    /// A stable machine-readable word.
    pub reason: String,
    /// A message for users.
    pub message: String,
    /// Time of the last change of the status.
    #[serde(with = "time::serde::rfc3339")]
    pub since: OffsetDateTime,
}

/// Lists the conditions of a tenant, ordered by part.
pub async fn list_conditions(conn: &mut PgConnection, id: TenantId) -> Result<Vec<TenantCondition>, Error> {
    Ok(sqlx::query_as!(
        TenantCondition,
        "SELECT type AS kind, status, reason, message, since FROM tenant_condition WHERE tenant_id = $1 \
         ORDER BY type",
        id.0
    )
    .fetch_all(conn)
    .await?)
}

/// Sets a condition. The time changes only with the status. Nothing is written if nothing changed.
pub(super) async fn set_condition(
    conn: &mut PgConnection,
    id: TenantId,
    kind: &str,
    status: &str,
    reason: &str,
    message: &str,
) -> Result<(), Error> {
    sqlx::query!(
        "INSERT INTO tenant_condition AS c (tenant_id, type, status, reason, message) VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT (tenant_id, type) DO UPDATE SET status = $3, reason = $4, message = $5, \
         since = CASE WHEN c.status = $3 THEN c.since ELSE now() END \
         WHERE (c.status, c.reason, c.message) IS DISTINCT FROM ($3, $4, $5)",
        id.0,
        kind,
        status,
        reason,
        message
    )
    .execute(conn)
    .await?;
    Ok(())
}

pub(super) async fn set_observed(
    conn: &mut PgConnection,
    id: TenantId,
    generation: i64,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE tenant SET observed_generation = $2 WHERE id = $1 AND observed_generation < $2",
        id.0,
        generation
    )
    .execute(conn)
    .await?;
    Ok(())
}

struct TenantRow {
    id: i64,
    name: TenantName,
    display_name: String,
    state: String,
    generation: i64,
    observed_generation: i64,
    created_at: OffsetDateTime,
    quota: Json<Quota>,
}

impl From<TenantRow> for Tenant {
    fn from(row: TenantRow) -> Self {
        Self {
            id: TenantId(row.id),
            name: row.name,
            display_name: row.display_name,
            state: row.state,
            generation: row.generation,
            observed_generation: row.observed_generation,
            created_at: row.created_at,
            quota: row.quota.0,
        }
    }
}

/// Resources in a tenant's own row: those whose use needs no count.
fn own() -> Vec<String> {
    Resource::of_tenants()
        .filter(|resource| resource.is_own())
        .map(|resource| resource.name().to_owned())
        .collect()
}

pub(super) async fn find_tenant(conn: &mut PgConnection, id: TenantId) -> Result<Option<Tenant>, Error> {
    let row = sqlx::query_as!(
        TenantRow,
        r#"SELECT t.id, t.name AS "name: TenantName", t.display_name, t.state, t.generation, t.observed_generation,
           t.created_at, coalesce((SELECT jsonb_object_agg(q.resource, jsonb_build_object('limit',
             coalesce(q.limit_, d.limit_), 'used', q.used)) FROM quota q JOIN quota_default d USING (resource)
             WHERE q.tenant_id = t.id AND q.resource = ANY($2)), '{}') AS "quota!: Json<Quota>"
           FROM tenant t WHERE t.id = $1"#,
        id.0,
        &own()
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(Into::into))
}

/// Lists tenants ordered by name. Includes offboarded ones, because their names stay taken.
pub(super) async fn list_tenants(
    conn: &mut PgConnection,
    after: &str,
    limit: i64,
) -> Result<Vec<Tenant>, Error> {
    let rows = sqlx::query_as!(
        TenantRow,
        r#"SELECT t.id, t.name AS "name: TenantName", t.display_name, t.state, t.generation, t.observed_generation,
           t.created_at, coalesce((SELECT jsonb_object_agg(q.resource, jsonb_build_object('limit',
             coalesce(q.limit_, d.limit_), 'used', q.used)) FROM quota q JOIN quota_default d USING (resource)
             WHERE q.tenant_id = t.id AND q.resource = ANY($3)), '{}') AS "quota!: Json<Quota>"
           FROM tenant t WHERE t.name > $1 ORDER BY t.name LIMIT $2"#,
        after,
        limit,
        &own()
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(Into::into).collect())
}

/// Returns the name of a tenant.
pub async fn name_of(conn: &mut PgConnection, id: TenantId) -> Result<TenantName, Error> {
    Ok(sqlx::query_scalar!(r#"SELECT name AS "name: TenantName" FROM tenant WHERE id = $1"#, id.0)
        .fetch_one(conn)
        .await?)
}

/// Returns a tenant, for its page.
pub async fn find_for_console(conn: &mut PgConnection, id: TenantId) -> Result<Option<Tenant>, Error> {
    find_tenant(conn, id).await
}

/// Returns the id of an active or suspended tenant.
pub async fn id_of(conn: &mut PgConnection, name: &TenantName) -> Result<Option<TenantId>, Error> {
    let id = sqlx::query_scalar!(
        "SELECT id FROM tenant WHERE name = $1 AND state IN ('active', 'suspended')",
        name.as_str()
    )
    .fetch_optional(conn)
    .await?;
    Ok(id.map(TenantId))
}
