//! Apps over the API.

use actix_web::http::{StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::json;
use sqlx::PgPool;

use super::actions::{Apps, Deployed, Mode};
use super::sight::Sight;
use super::spec::{self, AppSpec, Format};
use super::store;
use super::view::{AppView, ReleaseView};
use crate::access::idempotency::{IdempotencyKey, Once};
use crate::access::{Deploy, Public, ReadTenant, TenantScope};
use crate::db::expected::Expected;
use crate::db::{self, Page, PageQuery};
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::http::asked::{Body, Query};
use crate::http::parse_json;
use crate::ids::AppName;
use crate::tenants::api::etag;

/// The app in the URL's path.
#[derive(Deserialize)]
pub struct AppPath {
    app: String,
}

impl AppPath {
    /// Parses the name. An invalid name is answered as an unknown app.
    pub fn name(&self) -> Result<AppName, Error> {
        self.app.parse().map_err(|_| Error::NotFound)
    }
}

/// `?dry_run=true`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PutQuery {
    #[serde(default)]
    dry_run: bool,
}

fn format(req: &HttpRequest) -> Result<Format, Error> {
    let kind = req.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    match kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
        "application/json" => Ok(Format::Json),
        "application/yaml" | "application/x-yaml" | "text/yaml" => Ok(Format::Yaml),
        _ => Err(Error::Malformed(
            "send the spec with Content-Type: application/yaml or application/json".into(),
        )),
    }
}

/// PUT /api/v1/tenants/{tenant}/apps/{app}
pub async fn put_app(
    scope: TenantScope<Deploy>,
    req: HttpRequest,
    path: web::Path<AppPath>,
    query: Query<PutQuery>,
    apps: web::Data<Apps>,
    expected: Expected,
    body: Body,
) -> Result<HttpResponse, Error> {
    let name = path.name()?;
    let spec = match AppSpec::parse(&body, format(&req)?) {
        Ok(spec) => spec,
        Err(faults) => {
            apps.count_refused(&faults).await;
            return Err(Error::Invalid(faults));
        }
    };
    if *spec.name() != name {
        return Err(Error::fault(
            Fault::new(
                Code(428),
                Kind::Conflict,
                "name",
                "the name in the spec differs from the name in the URL",
            )
            .because("the name of an app never changes; a different name is a different app"),
        ));
    }
    let by = scope.by();
    let mode = if query.dry_run { Mode::DryRun } else { Mode::Apply };
    let done = apps.deploy(by, &scope.tenant, &spec, &expected, mode).await?;
    let status = if done.changed && mode == Mode::Apply { StatusCode::ACCEPTED } else { StatusCode::OK };
    Ok(HttpResponse::build(status).insert_header(etag(done.generation)).json(deployed(&name, &done, mode)))
}

fn deployed(name: &AppName, done: &Deployed, mode: Mode) -> serde_json::Value {
    let mut body = json!({
        "name": name, "generation": done.generation, "revision": done.revision, "changed": done.changed,
        "digest": done.digest,
        "reserved": done.reserved,
    });
    body["reserved"]["words"] = json!(done.reserved_words);
    if !done.warnings.is_empty() {
        body["warnings"] = json!(done.warnings);
    }
    if mode == Mode::DryRun {
        body["dry_run"] = json!(true);
        body["would"] = json!(match (done.created, done.changed) {
            (true, _) => "create",
            (false, true) => "release",
            (false, false) => "change nothing",
        });
    }
    body
}

/// GET /api/v1/tenants/{tenant}/apps, ordered by name.
pub async fn list_apps(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    sight: web::Data<Sight>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let rows = store::list_apps(&mut conn, scope.tenant.id, &query.after_text()?, limit + 1).await?;
    let wanted = store::list_wanted(&mut conn, scope.tenant.id, &rows).await?;
    let views = rows
        .into_iter()
        .map(|app| {
            let release = wanted.get(&app.id);
            AppView::new((&scope.tenant.name, &scope.tenant.state), app, release, Vec::new(), &sight)
        })
        .collect();
    Ok(HttpResponse::Ok().json(Page::new(views, limit, |view: &AppView| view.name().clone())))
}

/// GET /api/v1/tenants/{tenant}/apps/{app}
pub async fn get_app(
    scope: TenantScope<ReadTenant>,
    apps: web::Data<Apps>,
    path: web::Path<AppPath>,
) -> Result<HttpResponse, Error> {
    let mut conn = db::begin(&apps.pool, scope.tenant.id).await?;
    let app = store::find_app(&mut conn, scope.tenant.id, &path.name()?).await?.ok_or(Error::NotFound)?;
    let release = store::find_release(&mut conn, scope.tenant.id, app.id, app.revision).await?;
    let events = store::list_events(&mut conn, scope.tenant.id, app.id, 20).await?;
    let missing = match &release {
        Some(release) => {
            let spec = release.parse_spec()?;
            apps.connections.absent(&mut conn, &scope.tenant, spec.connects()).await?
        }
        None => Vec::new(),
    };
    let view =
        AppView::new((&scope.tenant.name, &scope.tenant.state), app, release.as_ref(), events, &apps.sight)
            .connected(&missing);
    Ok(HttpResponse::Ok().insert_header(etag(view.generation())).json(view))
}

/// DELETE /api/v1/tenants/{tenant}/apps/{app}
pub async fn delete_app(
    scope: TenantScope<Deploy>,
    path: web::Path<AppPath>,
    apps: web::Data<Apps>,
    expected: Expected,
) -> Result<HttpResponse, Error> {
    let by = scope.by();
    let name = path.name()?;
    let generation = apps.delete(by, &scope.tenant, &name, &expected).await?;
    Ok(HttpResponse::Accepted().json(json!({"name": name, "generation": generation})))
}

/// GET /api/v1/tenants/{tenant}/apps/{app}/releases, newest first.
pub async fn list_releases(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    path: web::Path<AppPath>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let app = store::find_app(&mut conn, scope.tenant.id, &path.name()?).await?.ok_or(Error::NotFound)?;
    let before = query.after_number(i64::MAX)?;
    let rows = store::list_releases(&mut conn, scope.tenant.id, app.id, before, limit + 1).await?;
    let views = rows.into_iter().map(ReleaseView::from).collect();
    Ok(HttpResponse::Ok().json(Page::new(views, limit, |view: &ReleaseView| view.revision)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RollBackBody {
    revision: i64,
}

/// POST /api/v1/tenants/{tenant}/apps/{app}/releases rolls back.
pub async fn roll_back(
    scope: TenantScope<Deploy>,
    req: HttpRequest,
    path: web::Path<AppPath>,
    apps: web::Data<Apps>,
    asked: (Expected, IdempotencyKey),
    body: Body,
) -> Result<HttpResponse, Error> {
    let (expected, key) = asked;
    let input: RollBackBody = parse_json(&req, &body)?;
    let name = path.name()?;
    let once = Once::of(key, &req, &body);
    let mut tx = db::begin(&apps.pool, scope.tenant.id).await?;
    if let Some(kept) = once.kept(&mut tx, &scope.actor).await? {
        return Ok(HttpResponse::build(kept.status).json(kept.body));
    }
    let by = scope.by();
    let (generation, revision) =
        apps.roll_back(&mut tx, by, &scope.tenant, &name, (input.revision, &expected)).await?;
    let answer = json!({
        "name": name, "generation": generation, "revision": revision, "rolled_back_to": input.revision,
    });
    once.keep(&mut tx, &scope.actor, StatusCode::ACCEPTED, &answer).await?;
    tx.commit().await?;
    apps.waker.wake();
    Ok(HttpResponse::Accepted().insert_header(etag(generation)).json(answer))
}

/// GET /api/v1/schemas/app-spec
pub async fn app_spec_schema(_: Public) -> HttpResponse {
    HttpResponse::Ok().content_type("application/schema+json").json(spec::schema())
}
