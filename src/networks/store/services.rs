//! The service catalogue, and the tenants' access to services.

use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;

use crate::error::Error;
use crate::ids::{ServiceName, TenantId};
use crate::networks::{Endpoint, Service};

struct ServiceRow {
    name: ServiceName,
    description: String,
    endpoints: Json<Vec<Endpoint>>,
    generation: i64,
    created_at: OffsetDateTime,
    changed_at: OffsetDateTime,
}

impl From<ServiceRow> for Service {
    fn from(row: ServiceRow) -> Self {
        let ServiceRow { name, description, endpoints: Json(endpoints), generation, created_at, changed_at } =
            row;
        Self { name, description, endpoints, generation, created_at, changed_at }
    }
}

/// Lists the catalogue by name, for the platform.
pub(in crate::networks) async fn list_services(
    conn: &mut PgConnection,
    after: &str,
    limit: i64,
) -> Result<Vec<Service>, Error> {
    let rows = sqlx::query_as!(
        ServiceRow,
        r#"SELECT name AS "name: ServiceName", description, endpoints AS "endpoints: Json<Vec<Endpoint>>",
           generation, created_at, changed_at FROM service WHERE name > $1 ORDER BY name LIMIT $2"#,
        after,
        limit
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(Into::into).collect())
}

/// Lists the services that a tenant may use, by name, each with the endpoints that apply to it.
pub(in crate::networks) async fn list_given_services(
    conn: &mut PgConnection,
    tenant: TenantId,
    after: &str,
    limit: i64,
) -> Result<Vec<Service>, Error> {
    let rows = sqlx::query_as!(
        ServiceRow,
        r#"SELECT s.name AS "name: ServiceName", s.description,
           coalesce(t.endpoints, s.endpoints) AS "endpoints!: Json<Vec<Endpoint>>",
           s.generation, s.created_at, s.changed_at FROM tenant_service t JOIN service s ON s.id = t.service_id
           WHERE t.tenant_id = $1 AND s.name > $2 ORDER BY s.name LIMIT $3"#,
        tenant.0,
        after,
        limit
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(Into::into).collect())
}

/// Returns a service with its id.
pub(in crate::networks) async fn find_service(
    conn: &mut PgConnection,
    name: &ServiceName,
) -> Result<Option<(i64, Service)>, Error> {
    let row = sqlx::query!(
        r#"SELECT id, name AS "name: ServiceName", description, endpoints AS "endpoints: Json<Vec<Endpoint>>",
           generation, created_at, changed_at FROM service WHERE name = $1"#,
        name.as_str()
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| {
        let service = Service {
            name: row.name,
            description: row.description,
            endpoints: row.endpoints.0,
            generation: row.generation,
            created_at: row.created_at,
            changed_at: row.changed_at,
        };
        (row.id, service)
    }))
}

/// Returns the visible ones of these services: inside a tenant's transaction, those that it may use.
pub(in crate::networks) async fn list_named_services(
    conn: &mut PgConnection,
    names: &[String],
) -> Result<Vec<String>, Error> {
    Ok(sqlx::query_scalar!("SELECT name FROM service WHERE name = ANY ($1)", names).fetch_all(conn).await?)
}

/// Creates or changes a service. Returns its generation.
pub(in crate::networks) async fn put_service(
    conn: &mut PgConnection,
    name: &ServiceName,
    description: &str,
    endpoints: &[Endpoint],
) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        "INSERT INTO service (name, description, endpoints) VALUES ($1, $2, $3) \
         ON CONFLICT (name) DO UPDATE SET description = EXCLUDED.description, endpoints = EXCLUDED.endpoints, \
         generation = service.generation + 1, changed_at = now() RETURNING generation",
        name.as_str(),
        description,
        serde_json::json!(endpoints)
    )
    .fetch_one(conn)
    .await?)
}

pub(in crate::networks) async fn delete_service(conn: &mut PgConnection, id: i64) -> Result<(), sqlx::Error> {
    sqlx::query!("DELETE FROM service WHERE id = $1", id).execute(conn).await.map(drop)
}

/// Gives a tenant access to a service. Returns whether it had none before.
pub(in crate::networks) async fn give_service(
    conn: &mut PgConnection,
    tenant: TenantId,
    service: i64,
    who: &str,
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "INSERT INTO tenant_service (tenant_id, service_id, given_by) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        tenant.0,
        service,
        who
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Removes a tenant's access to a service. Returns whether it had any.
pub(in crate::networks) async fn take_service(
    conn: &mut PgConnection,
    tenant: TenantId,
    service: &ServiceName,
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "DELETE FROM tenant_service t USING service s WHERE t.tenant_id = $1 AND t.service_id = s.id AND s.name = $2",
        tenant.0,
        service.as_str()
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}
