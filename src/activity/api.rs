//! API of the audit log: pages, newest first, and an export as JSON lines.

use actix_web::{HttpResponse, web};
use bytes::Bytes;
use sqlx::PgPool;

use super::{ActivityQuery, read};
use crate::access::turns::{Payer, Turns};
use crate::access::{Means, PlatformScope, ReadActivity, ReadPlatform, TenantScope};
use crate::audit::Filter;
use crate::db::Page;
use crate::error::Error;
use crate::http::asked::Query;
use crate::permits::Permit;

/// Number of rows that an export reads at a time.
const PART: i64 = 500;

async fn page(pool: &PgPool, filter: &Filter) -> Result<HttpResponse, Error> {
    let (rows, next) = read(pool, filter).await?;
    Ok(HttpResponse::Ok().json(Page::up_to(rows, next)))
}

/// GET /api/v1/tenants/{tenant}/audit: newest first.
pub async fn list_tenant(
    scope: TenantScope<ReadActivity>,
    pool: web::Data<PgPool>,
    query: Query<ActivityQuery>,
) -> Result<HttpResponse, Error> {
    let filter = query.filter(&pool, Some(scope.tenant.id)).await?;
    page(&pool, &filter).await
}

/// GET /api/v1/audit: events of all tenants and the platform, newest first.
pub async fn list_platform(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    query: Query<ActivityQuery>,
) -> Result<HttpResponse, Error> {
    let filter = query.filter(&pool, None).await?;
    page(&pool, &filter).await
}

/// Streams all rows that match the filter, one part at a time: the next part is read once the client took the
/// one before. The export ends when the reader loses the permission.
fn export(pool: PgPool, filter: Filter, watch: Watch) -> HttpResponse {
    let body =
        futures_util::stream::unfold((pool, Some(filter), watch), |(pool, filter, watch)| async move {
            let mut filter = filter?;
            let part = async {
                let (rows, next) = loop {
                    if !watch.still_may(&pool).await? {
                        return Ok((Vec::new(), None));
                    }
                    match read(&pool, &filter).await? {
                        // Nothing matched in this stretch: continue with the next one.
                        (rows, Some(next)) if rows.is_empty() => filter.before = next,
                        part => break part,
                    }
                };
                let mut text = Vec::new();
                for row in &rows {
                    serde_json::to_writer(&mut text, row).map_err(Error::internal)?;
                    text.push(b'\n');
                }
                Ok::<_, Error>((text, next))
            };
            match part.await {
                Ok((text, next)) => {
                    let next = next.map(|before| {
                        filter.before = before;
                        filter
                    });
                    (!text.is_empty()).then(|| (Ok(Bytes::from(text)), (pool, next, watch)))
                }
                Err(error) => Some((Err(error), (pool, None, watch))),
            }
        });
    HttpResponse::Ok()
        .content_type("application/x-ndjson")
        .insert_header(("content-disposition", "attachment; filename=\"audit.jsonl\""))
        .streaming(body)
}

/// The reader of an export, authorized again before each part.
struct Watch {
    means: Means,
    tenant: Option<crate::ids::TenantName>,
    /// Held until the export ends.
    _room: Permit<Payer>,
}

impl Watch {
    async fn still_may(&self, pool: &PgPool) -> Result<bool, Error> {
        match &self.tenant {
            Some(tenant) => {
                crate::access::extract::still_may::<ReadActivity>(pool, &self.means, tenant).await
            }
            None => crate::access::extract::still_reads_platform(pool, &self.means).await,
        }
    }
}

/// GET /api/v1/tenants/{tenant}/audit/export
pub async fn export_tenant(
    scope: TenantScope<ReadActivity>,
    pool: web::Data<PgPool>,
    query: Query<ActivityQuery>,
    turns: web::Data<Turns>,
) -> Result<HttpResponse, Error> {
    let mut filter = query.filter(&pool, Some(scope.tenant.id)).await?;
    filter.limit = PART;
    let room = turns.stream(&scope.actor, Some(&scope.tenant))?;
    let watch = Watch { means: scope.actor.means, tenant: Some(scope.tenant.name), _room: room };
    Ok(export(pool.get_ref().clone(), filter, watch))
}

/// GET /api/v1/audit/export
pub async fn export_platform(
    scope: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    query: Query<ActivityQuery>,
    turns: web::Data<Turns>,
) -> Result<HttpResponse, Error> {
    let mut filter = query.filter(&pool, None).await?;
    filter.limit = PART;
    let room = turns.stream(&scope.actor, None)?;
    let watch = Watch { means: scope.actor.means, tenant: None, _room: room };
    Ok(export(pool.get_ref().clone(), filter, watch))
}
