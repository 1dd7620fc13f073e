//! Pages of the audit log, for a tenant and for the platform.

use actix_web::{HttpResponse, web};
use askama::Template;
use sqlx::PgPool;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{ActivityQuery, read};
use crate::access::console::{platform_frame, tenant_frame, when, who};
use crate::access::{PlatformScope, ReadActivity, ReadPlatform, TenantScope};
use crate::audit::{AuditEntry, Filter};
use crate::db::Page;
use crate::error::Error;
use crate::http::html::{self, Frame};
use crate::keys::Keys;

/// Maximum number of stretches of the audit log that one page reads.
const STRETCHES: usize = 20;

struct ActivityRow {
    at: String,
    machine: String,
    tenant: String,
    actor: String,
    action: String,
    object: String,
    denied: bool,
    detail: String,
}

#[derive(Template)]
#[template(path = "access/activity.html")]
struct ActivityPage {
    frame: Frame,
    title: &'static str,
    tenant: String,
    export: String,
    actor: String,
    action: String,
    object: String,
    result: String,
    filtered: bool,
    rows: Vec<ActivityRow>,
    next: String,
}

/// Formats a JSON object as text: `role: owner, hours: 72`.
fn words(detail: &serde_json::Value) -> String {
    let Some(fields) = detail.as_object() else { return String::new() };
    let one = |(name, value): (&String, &serde_json::Value)| match value {
        serde_json::Value::String(text) => format!("{name}: {text}"),
        other => format!("{name}: {other}"),
    };
    fields.iter().map(one).collect::<Vec<_>>().join(", ")
}

impl From<AuditEntry> for ActivityRow {
    fn from(entry: AuditEntry) -> Self {
        Self {
            at: when(entry.at),
            machine: entry.at.format(&Rfc3339).unwrap_or_default(),
            tenant: entry.tenant.unwrap_or_default(),
            actor: match entry.via.as_deref().and_then(|via| via.split_once(' ')) {
                Some((_, token)) => format!("{}, by the token {token}", who(&entry.actor)),
                None => who(&entry.actor),
            },
            denied: entry.result == "denied",
            detail: words(&entry.detail),
            action: entry.action,
            object: entry.object,
        }
    }
}

fn encoded(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-_.".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

/// Reads until the page is full or a bounded number of stretches was read, so that users see no empty pages.
async fn gather(pool: &PgPool, mut filter: Filter) -> Result<Page<AuditEntry>, Error> {
    let mut all = Vec::new();
    for _ in 0..STRETCHES {
        let (rows, next) = read(pool, &filter).await?;
        filter.limit -= i64::try_from(rows.len()).unwrap_or(filter.limit);
        all.extend(rows);
        match next {
            Some(next) if filter.limit > 0 => filter.before = next,
            next => return Ok(Page::up_to(all, next)),
        }
    }
    Ok(Page::up_to(all, Some(filter.before)))
}

async fn page(
    pool: &PgPool,
    (frame, title, tenant): (Frame, &'static str, String),
    filter: Filter,
) -> Result<HttpResponse, Error> {
    let page = gather(pool, filter.clone()).await?;
    let time = |at: Option<OffsetDateTime>| at.and_then(|at| at.format(&Rfc3339).ok());
    let kept = [
        ("actor", filter.actor.clone()),
        ("action", filter.action.clone()),
        ("object", filter.object.clone()),
        ("result", filter.result.clone()),
        ("since", time(filter.since)),
        ("until", time(filter.until)),
    ];
    let query: String = kept
        .iter()
        .filter_map(|(name, value)| value.as_ref().map(|value| format!("&{name}={}", encoded(value))))
        .collect();
    let at = if tenant.is_empty() { String::new() } else { format!("/tenants/{tenant}") };
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    html::page(&ActivityPage {
        frame,
        title,
        export: format!("/api/v1{at}/audit/export?{}", query.trim_start_matches('&')),
        tenant,
        filtered: !query.is_empty(),
        next: page.next.map(|next| format!("?cursor={next}{query}")).unwrap_or_default(),
        actor: filter.actor.as_deref().map(who).unwrap_or_default(),
        action: text(&filter.action),
        object: text(&filter.object),
        result: text(&filter.result),
        rows: page.items.into_iter().map(ActivityRow::from).collect(),
    })
}

/// GET /tenants/{tenant}/activity
pub async fn tenant_page(
    scope: TenantScope<ReadActivity>,
    pool: web::Data<PgPool>,
    keys: web::Data<Keys>,
    query: web::Query<ActivityQuery>,
) -> Result<HttpResponse, Error> {
    let asked = query.filter(&pool, Some(scope.tenant.id)).await?;
    let frame = tenant_frame(&keys, &scope, "Activity");
    page(&pool, (frame, "Activity", scope.tenant.name.to_string()), asked).await
}

/// GET /audit
pub async fn platform_page(
    scope: PlatformScope<ReadPlatform>,
    pool: web::Data<PgPool>,
    keys: web::Data<Keys>,
    query: web::Query<ActivityQuery>,
) -> Result<HttpResponse, Error> {
    let asked = query.filter(&pool, None).await?;
    page(&pool, (platform_frame(&keys, &scope.actor, "Audit"), "Audit", String::new()), asked).await
}
