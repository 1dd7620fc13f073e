//! Registry credentials of a tenant (robots in the API). A secret is shown once and stored as a hash.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::json;
use sqlx::PgPool;

use super::store;
use crate::access::credentials::Secret;
use crate::access::{ManageCredentials, ReadTenant, TenantScope};
use crate::db::{self, Page, PageQuery, constraint};
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::http::asked::{Body, Query};
use crate::http::{OwnAddress, parse_json};
use crate::quotas::{self, Resource};

/// A validated request for a registry credential.
#[derive(Debug)]
pub struct NewRobot {
    pub(super) name: String,
    pub(super) push: bool,
    pub(super) days: i32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RobotBody {
    name: String,
    #[serde(default)]
    push: bool,
    #[serde(default = "month")]
    days: i32,
}

fn month() -> i32 {
    30
}

fn check(body: RobotBody) -> Result<NewRobot, Error> {
    let mut faults = Vec::new();
    let label = body.name.parse::<crate::ids::AppName>().is_ok() && (2..=32).contains(&body.name.len());
    if !label {
        let message = "the name has 2 to 32 characters of a to z, 0 to 9 and -, and starts with a letter";
        faults.push(Fault::new(Code(426), Kind::Invalid, "name", message));
    }
    if !(1..=365).contains(&body.days) {
        faults.push(Fault::new(Code(426), Kind::Invalid, "days", "days is 1 to 365"));
    }
    if faults.is_empty() {
        Ok(NewRobot { name: body.name, push: body.push, days: body.days })
    } else {
        Err(Error::Invalid(faults))
    }
}

/// POST /api/v1/tenants/{tenant}/robots
pub async fn create_robot(
    scope: TenantScope<ManageCredentials>,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    pool: web::Data<PgPool>,
    body: Body,
) -> Result<HttpResponse, Error> {
    let robot = check(parse_json(&req, &body)?)?;
    scope.tenant.require_active()?;
    scope.actor.require_recent()?;
    let end = time::OffsetDateTime::now_utc() + time::Duration::days(robot.days.into());
    if scope.actor.ends().is_some_and(|own| end > own) {
        let message = "a token cannot create a credential that outlives it";
        return Err(Error::fault(Fault::new(Code(426), Kind::Invalid, "days", message)));
    }
    let secret = Secret::generate("bhr_");
    let mut tx = db::begin(&pool, scope.tenant.id).await?;
    quotas::take_place(&mut tx, scope.tenant.id, Resource::RegistryCredentials).await?;
    store::insert_robot(&mut tx, scope.tenant.id, &robot, &secret.hash(), scope.actor.id.as_str())
        .await
        .map_err(|error| match constraint(&error) {
            Some("robot_name_is_taken") => Error::AlreadyExists(
                "a registry credential with this name exists; delete it first to create a new secret".into(),
            ),
            _ => error.into(),
        })?;
    let detail = json!({"push": robot.push, "days": robot.days});
    scope.by().record(&mut tx, scope.tenant.id, "robot.create", &robot.name, detail).await?;
    tx.commit().await?;
    let login = format!("{}+{}", scope.tenant.name, robot.name);
    let address = own.of(&req).unwrap_or_default();
    let host = address.split("://").nth(1).unwrap_or_default();
    let plain = if address.starts_with("http://") { " --tls-verify=false" } else { "" };
    Ok(HttpResponse::Created().json(json!({
        "name": robot.name, "login": login, "secret": secret.expose(), "push": robot.push,
        "registry": host, "command": format!("podman login{plain} --username {login} {host}"),
    })))
}

/// GET /api/v1/tenants/{tenant}/robots, ordered by name.
pub async fn list_robots(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let rows = store::list_robots(&mut conn, scope.tenant.id, &query.after_text()?, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.name.clone())))
}

/// The registry credential in the URL's path.
#[derive(Deserialize)]
pub struct RobotPath {
    robot: String,
}

/// DELETE /api/v1/tenants/{tenant}/robots/{robot}
pub async fn delete_robot(
    scope: TenantScope<ManageCredentials>,
    pool: web::Data<PgPool>,
    path: web::Path<RobotPath>,
) -> Result<HttpResponse, Error> {
    let mut tx = db::begin(&pool, scope.tenant.id).await?;
    if !store::revoke_robot(&mut tx, scope.tenant.id, &path.robot).await? {
        return Err(Error::NotFound);
    }
    scope.by().record(&mut tx, scope.tenant.id, "robot.delete", &path.robot, json!({})).await?;
    tx.commit().await?;
    Ok(HttpResponse::NoContent().finish())
}
