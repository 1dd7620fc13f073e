//! Repositories and tags over the API.

use actix_web::{HttpResponse, web};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::PgPool;

use super::{Distribution, Holders, remove, store};
use crate::access::{Deploy, ReadTenant, TenantScope};
use crate::db::{self, Page, PageQuery};
use crate::error::Error;
use crate::http::asked::Query;
use crate::ids::{RepositoryPath, Tag};

/// GET /api/v1/tenants/{tenant}/repositories, ordered by name.
pub async fn list_repositories(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let rows = store::list_repositories(&mut conn, scope.tenant.id, &query.after_text()?, limit + 1).await?;
    Ok(HttpResponse::Ok().json(Page::new(rows, limit, |row| row.name.clone())))
}

/// The path up to `/tags` is the repository; it may contain slashes.
#[derive(Deserialize)]
pub struct RepositoryParam {
    repository: String,
    tag: Option<String>,
}

impl RepositoryParam {
    fn repository(&self) -> Result<RepositoryPath, Error> {
        self.repository.parse().map_err(|_| Error::NotFound)
    }
}

#[derive(Serialize)]
struct TagView {
    #[serde(flatten)]
    row: store::TagRow,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    apps: Vec<String>,
}

/// GET /api/v1/tenants/{tenant}/repositories/{repository}/tags, ordered by name.
pub async fn list_tags(
    scope: TenantScope<ReadTenant>,
    pool: web::Data<PgPool>,
    holders: web::Data<dyn Holders>,
    path: web::Path<RepositoryParam>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let repository = path.repository()?;
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let rows =
        store::list_tags(&mut conn, scope.tenant.id, &repository, &query.after_text()?, limit + 1).await?;
    let digests: Vec<String> = rows.iter().map(|row| row.digest.clone()).collect();
    let held = holders.holders(&mut conn, scope.tenant.id, &repository, &digests).await?;
    let views = rows
        .into_iter()
        .map(|row| TagView {
            apps: held
                .iter()
                .filter(|(digest, _)| *digest == row.digest)
                .map(|(_, app)| app.clone())
                .collect(),
            row,
        })
        .collect();
    Ok(HttpResponse::Ok().json(Page::new(views, limit, |view: &TagView| view.row.name.clone())))
}

/// DELETE /api/v1/tenants/{tenant}/repositories/{repository}/tags/{tag}. An image that a release uses stays in
/// the registry; only its tag is deleted. Other images are deleted, and their bytes become free.
pub async fn delete_tag(
    scope: TenantScope<Deploy>,
    pool: web::Data<PgPool>,
    registry: web::Data<Distribution>,
    holders: web::Data<dyn Holders>,
    path: web::Path<RepositoryParam>,
) -> Result<HttpResponse, Error> {
    let repository = path.repository()?;
    let tag: Tag = path.tag.as_deref().unwrap_or_default().parse().map_err(|_| Error::NotFound)?;
    let mut tx = db::begin(&pool, scope.tenant.id).await?;
    store::lock_project_of(&mut tx, scope.tenant.id).await?;
    let (digest, family) = remove::untag(&mut tx, &**holders, scope.tenant.id, &repository, &tag).await?;
    let image = format!("{repository}:{tag}");
    scope.by().record(&mut tx, scope.tenant.id, "tag.delete", &image, json!({"digest": digest})).await?;
    tx.commit().await?;
    // The tag is deleted. Remove unreferenced content now; if that fails, the sweep does it later.
    let name = &scope.tenant.name;
    if let Err(error) =
        remove::clear(&pool, &registry, &**holders, (scope.tenant.id, name), &repository, &family).await
    {
        tracing::warn!(%error, "a deleted image could not be removed yet; the sweep retries");
    }
    Ok(HttpResponse::NoContent().finish())
}
