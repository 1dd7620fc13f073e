//! API of user ids: the owner of an id, and the use of the pool.

use actix_web::{HttpResponse, web};
use serde::Serialize;
use serde_json::json;
use sqlx::PgPool;

use super::store;
use crate::access::{PlatformScope, ReadPlatform};
use crate::config::Config;
use crate::db::{self, Page, PageQuery, Within};
use crate::error::Error;
use crate::http::asked::Query;

#[derive(Serialize)]
struct OwnerView {
    uid: i64,
    tenant: String,
    tenant_state: String,
    range: RangeView,
    #[serde(skip_serializing_if = "Option::is_none")]
    app: Option<AppRangeView>,
}

#[derive(Serialize)]
struct RangeView {
    start: i64,
    end: i64,
    state: &'static str,
}

#[derive(Serialize)]
struct AppRangeView {
    name: String,
    start: i64,
    end: i64,
    inside: i64,
    state: &'static str,
}

/// GET /api/v1/uids/{n}
pub async fn get_uid(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    uid: web::Path<String>,
) -> Result<HttpResponse, Error> {
    let uid: i64 = uid
        .parse::<u32>()
        .map_err(|_| Error::Malformed("a user id must be a number from 0 to 4294967295".into()))?
        .into();
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let row = store::find_owner(&mut conn, uid).await?.ok_or(Error::NotFound)?;
    let app = match (row.app, row.app_start, row.app_size) {
        (Some(name), Some(start), Some(size)) => Some(AppRangeView {
            name,
            start,
            end: start + size,
            inside: uid - start,
            state: if row.app_removed == Some(true) { "burnt" } else { "in use" },
        }),
        _ => None,
    };
    Ok(HttpResponse::Ok().json(OwnerView {
        uid,
        tenant: row.tenant,
        tenant_state: row.tenant_state,
        range: RangeView {
            start: row.start,
            end: row.end,
            state: if row.released { "burnt" } else { "in use" },
        },
        app,
    }))
}

/// GET /api/v1/uid-ranges
pub async fn list_uid_ranges(
    _: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    config: web::Data<Config>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let rows = store::list_pool(&mut conn, query.after_number(-1)?, limit + 1).await?;
    let (used, next) = store::count_pool(&mut conn).await?;
    let pools = &config.pools;
    let ranges = i64::from((pools.uid_end - pools.uid_start) / pools.range_size);
    let page = Page::new(rows, limit, |row| row.slot);
    Ok(HttpResponse::Ok().json(json!({
        "pool": {
            "start": pools.uid_start, "end": pools.uid_end, "range_size": pools.range_size,
            "block_size": pools.block_size, "ranges": ranges, "in_use": used,
            "burnt": next - used, "left": (ranges - next).max(0),
        },
        "items": page.items, "next": page.next,
    })))
}
