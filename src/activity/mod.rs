//! Views of the audit log: over the API, as JSON lines, and as a page.

use serde::Deserialize;
use sqlx::PgPool;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::audit::{self, AuditEntry, Filter};
use crate::db::{self, PageQuery, Within};
use crate::error::Error;
use crate::ids::TenantId;

pub mod api;
pub mod console;

/// Filters and cursor. All filters must match.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActivityQuery {
    limit: Option<u32>,
    cursor: Option<String>,
    #[serde(default)]
    actor: String,
    #[serde(default)]
    action: String,
    #[serde(default)]
    object: String,
    #[serde(default)]
    result: String,
    #[serde(default)]
    since: String,
    #[serde(default)]
    until: String,
}

fn some(text: &str) -> Option<String> {
    Some(text.trim()).filter(|text| !text.is_empty()).map(str::to_owned)
}

fn time(name: &str, text: &str) -> Result<Option<OffsetDateTime>, Error> {
    some(text)
        .map(|text| OffsetDateTime::parse(&text, &Rfc3339))
        .transpose()
        .map_err(|_| Error::Malformed(format!("{name} must be a time such as 2026-11-25T10:00:00Z")))
}

impl ActivityQuery {
    /// Builds the filter. Translates a displayed name to the recorded actor, such as `account:12 olga`.
    async fn filter(&self, pool: &PgPool, tenant: Option<TenantId>) -> Result<Filter, Error> {
        let page = PageQuery::new(self.limit, self.cursor.clone());
        if !matches!(self.result.as_str(), "" | "done" | "denied") {
            return Err(Error::Malformed("result must be done or denied".into()));
        }
        let filter = Filter {
            tenant,
            actor: match some(&self.actor) {
                Some(text) => Some(crate::access::actor_of(pool, &text, tenant).await?),
                None => None,
            },
            action: some(&self.action),
            object: some(&self.object),
            result: some(&self.result),
            since: time("since", &self.since)?,
            until: time("until", &self.until)?,
            before: page.after_number(i64::MAX)?,
            limit: page.limit()?,
        };
        Ok(filter)
    }
}

/// Reads one page of matching rows, and the cursor of the next page.
async fn read(pool: &PgPool, filter: &Filter) -> Result<(Vec<AuditEntry>, Option<i64>), Error> {
    let mut conn = db::begin(pool, filter.tenant.map_or(Within::Platform, Within::Tenant)).await?;
    audit::list(&mut conn, filter).await
}
