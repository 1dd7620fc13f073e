//! Queries of the audit log, newest first. One index leads, and a page reads a bounded number of rows, whatever
//! the filter and the length of the log.

use serde_json::Value;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::audit::AuditEntry;
use crate::error::Error;
use crate::ids::TenantId;

/// Maximum number of rows that a page examines. If several filters apply, only one can use an index. Larger
/// than any page.
const LOOK: i64 = 600;

/// Selects rows. All filters must match.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Rows of this tenant. `None` selects all tenants, and rows then name theirs.
    pub tenant: Option<TenantId>,
    /// Exactly this actor.
    pub actor: Option<String>,
    /// Exactly this action.
    pub action: Option<String>,
    /// Exactly this object.
    pub object: Option<String>,
    /// `done` or `denied`.
    pub result: Option<String>,
    /// At or after this time.
    pub since: Option<OffsetDateTime>,
    /// Before this time.
    pub until: Option<OffsetDateTime>,
    /// Rows with a smaller number only.
    pub before: i64,
    /// Maximum number of rows.
    pub limit: i64,
}

/// The filter that uses the index: the one that usually matches the fewest rows. Each has an index with and
/// without the tenant.
enum Leading<'a> {
    Object(&'a str),
    Actor(&'a str),
    Denied,
    Action(&'a str),
    Nothing,
}

impl Filter {
    fn leading(&self) -> Leading<'_> {
        match (&self.object, &self.actor, self.result.as_deref(), &self.action) {
            (Some(object), ..) => Leading::Object(object),
            (_, Some(actor), ..) => Leading::Actor(actor),
            (_, _, Some("denied"), _) => Leading::Denied,
            (.., Some(action)) => Leading::Action(action),
            _ => Leading::Nothing,
        }
    }
}

/// An examined row: whether it matches, and its position among the examined rows.
struct ExaminedRow {
    id: i64,
    at: OffsetDateTime,
    tenant: Option<String>,
    actor: String,
    via: Option<String>,
    action: String,
    object: String,
    result: String,
    request_id: String,
    detail: Value,
    fits: bool,
    count: i64,
}

impl From<ExaminedRow> for AuditEntry {
    fn from(row: ExaminedRow) -> Self {
        Self {
            id: row.id,
            at: row.at,
            tenant: row.tenant,
            actor: row.actor,
            via: row.via,
            action: row.action,
            object: row.object,
            result: row.result,
            request_id: row.request_id,
            detail: row.detail,
        }
    }
}

/// Returns the matching rows among the first 600 of the leading condition, and the last of the 600, matching or
/// not. There is one statement per condition, so its plan is made once per connection instead of once per page.
/// The equality of a column is written as a pair with the number, so that only the intended index has the
/// required order.
macro_rules! look {
    ($conn:expr, $filter:expr, $span:expr, $order:literal, $where:literal $(, $value:expr)*) => {
        sqlx::query_as!(
            ExaminedRow,
            r#"SELECT a.id, a.at, t.name AS "tenant?", a.actor, a.via, a.action, a.object, a.result, a.request_id,
               a.detail, a.fits AS "fits!", a.count AS "count!" FROM (SELECT *, row_number() OVER (ORDER BY "#
                + $order
                + ") AS count, ($5::text IS NULL OR actor = $5) AND ($6::text IS NULL OR action = $6) \
                   AND ($7::text IS NULL OR result = $7) AS fits FROM audit WHERE "
                + $where
                + "(id > $1 AND id < $2) AND at >= coalesce($3::timestamptz, '-infinity') \
                   AND at < coalesce($4::timestamptz, 'infinity') ORDER BY "
                + $order
                + " LIMIT 600) a LEFT JOIN tenant t ON t.id = a.tenant_id \
                   WHERE a.fits OR a.count = 600 ORDER BY "
                + $order
                + " LIMIT $8",
            $span.0,
            $span.1,
            $filter.since,
            $filter.until,
            $filter.actor,
            $filter.action,
            $filter.result,
            $filter.limit + 1
            $(, $value)*
        )
        .fetch_all($conn)
        .await?
    };
}

async fn look(conn: &mut PgConnection, filter: &Filter, span: (i64, i64)) -> Result<Vec<ExaminedRow>, Error> {
    let rows = match (filter.tenant.map(|tenant| tenant.0), filter.leading()) {
        (None, Leading::Nothing) => look!(conn, filter, span, "id DESC", ""),
        (None, Leading::Denied) => look!(conn, filter, span, "id DESC", "result = 'denied' AND "),
        (None, Leading::Object(object)) => {
            look!(
                conn,
                filter,
                span,
                "object DESC, id DESC",
                "(object, id) > ($9, $1) AND (object, id) < ($9, $2) AND ",
                object
            )
        }
        (None, Leading::Actor(actor)) => {
            look!(
                conn,
                filter,
                span,
                "actor DESC, id DESC",
                "(actor, id) > ($9, $1) AND (actor, id) < ($9, $2) AND ",
                actor
            )
        }
        (None, Leading::Action(action)) => {
            look!(
                conn,
                filter,
                span,
                "action DESC, id DESC",
                "(action, id) > ($9, $1) AND (action, id) < ($9, $2) AND ",
                action
            )
        }
        (Some(id), Leading::Nothing) => look!(conn, filter, span, "id DESC", "tenant_id = $9 AND ", id),
        (Some(id), Leading::Denied) => {
            look!(conn, filter, span, "id DESC", "tenant_id = $9 AND result = 'denied' AND ", id)
        }
        (Some(id), Leading::Object(object)) => look!(
            conn,
            filter,
            span,
            "object DESC, id DESC",
            "tenant_id = $9 AND (object, id) > ($10, $1) AND (object, id) < ($10, $2) AND ",
            id,
            object
        ),
        (Some(id), Leading::Actor(actor)) => look!(
            conn,
            filter,
            span,
            "actor DESC, id DESC",
            "tenant_id = $9 AND (actor, id) > ($10, $1) AND (actor, id) < ($10, $2) AND ",
            id,
            actor
        ),
        (Some(id), Leading::Action(action)) => look!(
            conn,
            filter,
            span,
            "action DESC, id DESC",
            "tenant_id = $9 AND (action, id) > ($10, $1) AND (action, id) < ($10, $2) AND ",
            id,
            action
        ),
    };
    Ok(rows)
}

/// Lists rows of the audit log, newest first, with the cursor of the next page. With several filters, a page
/// may have fewer rows than the limit, even none, although more match: it ends at the maximum number of
/// examined rows.
pub async fn list(conn: &mut PgConnection, filter: &Filter) -> Result<(Vec<AuditEntry>, Option<i64>), Error> {
    // Force the index order. The planner misjudges how few rows the row-level policy leaves.
    sqlx::query(
        "SELECT set_config('plan_cache_mode', 'force_generic_plan', true), set_config('enable_sort', 'off', true), \
         set_config('enable_bitmapscan', 'off', true), set_config('enable_seqscan', 'off', true)",
    )
    .execute(&mut *conn)
    .await?;
    let mut span = (0, filter.before);
    if filter.since.is_some() || filter.until.is_some() {
        let of_time = sqlx::query!(
            r#"SELECT after AS "after!", before AS "before!" FROM audit_numbers($1, $2)"#,
            filter.since,
            filter.until
        )
        .fetch_one(&mut *conn)
        .await?;
        span = (of_time.after, filter.before.min(of_time.before));
    }
    let mut rows = look(conn, filter, span).await?;
    let limit = usize::try_from(filter.limit).unwrap_or(usize::MAX);
    let full = rows.len() > limit;
    rows.truncate(limit);
    let next = rows.last().filter(|row| full || row.count == LOOK).map(|row| row.id);
    let mut entries: Vec<AuditEntry> =
        rows.into_iter().filter(|row| row.fits).map(AuditEntry::from).collect();
    if filter.tenant.is_some() {
        // A list of one tenant does not repeat its name.
        for entry in &mut entries {
            entry.tenant = None;
        }
    }
    Ok((entries, next))
}
