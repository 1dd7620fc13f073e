//! Access to Postgres: pools, transactions that name their tenant, errors of violated constraints, and pages.
//! Requests use one role and reconcilers another; `migrate.rs` creates both and the schema.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, PgConnection, PgPool, Postgres, SqlSafeStr as _, Transaction,
};
use tracing::Instrument as _;

use crate::config::Database;
use crate::error::Error;
use crate::ids::{TenantId, TenantName};

pub mod expected;
mod migrate;

pub use migrate::migrate;

/// The migrations of this binary.
pub static MIGRATOR: sqlx::migrate::Migrator = sqlx::migrate!();

/// A transaction.
pub type Tx = Transaction<'static, Postgres>;

/// The role of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Login {
    /// Requests.
    Runtime,
    /// Reconcilers, sweeps and the sealer of the audit log.
    Reconciler,
    /// Only `migrate`: may create roles.
    Admin,
}

/// Returns the connect options of the configuration. Reads the password from its file.
pub fn options(database: &Database, login: Login) -> std::io::Result<PgConnectOptions> {
    let (user, password_file) = match login {
        Login::Runtime => (&database.user, &database.password_file),
        Login::Reconciler => (&database.reconciler_user, &database.reconciler_password_file),
        Login::Admin => (&database.admin_user, &database.admin_password_file),
    };
    let mut options = PgConnectOptions::new_without_pgpass()
        .port(database.port)
        .database(&database.name)
        .username(user)
        .application_name("bulkhead")
        .options([("statement_timeout", "15s"), ("lock_timeout", "5s"), ("timezone", "UTC")]);
    options = if database.host.starts_with('/') {
        options.socket(&database.host)
    } else {
        options.host(&database.host)
    };
    if let Some(file) = password_file {
        options = options.password(std::fs::read_to_string(file)?.trim_end_matches('\n'));
    }
    // A migration on a slow disk would log a slow statement of thousands of lines.
    if matches!(login, Login::Admin) {
        options = options.disable_statement_logging();
    }
    Ok(options)
}

/// The rows that a transaction sees. Row level security hides all other rows from requests. Reconcilers see
/// all rows, whatever they name.
#[derive(Debug, Clone, Copy)]
pub enum Within<'a> {
    /// Rows of one tenant.
    Tenant(TenantId),
    /// Rows of the tenant with this name; none if there is no such tenant.
    Named(&'a TenantName),
    /// Rows that belong to no tenant, and the tenants' rows that platform accounts may read.
    Platform,
}

impl From<TenantId> for Within<'_> {
    fn from(id: TenantId) -> Self {
        Self::Tenant(id)
    }
}

impl<'a> From<&'a TenantName> for Within<'a> {
    fn from(name: &'a TenantName) -> Self {
        Self::Named(name)
    }
}

impl Within<'_> {
    /// The only place that builds a statement from text. The text is a number or a DNS label, neither of
    /// which can end the statement.
    fn statement(self) -> String {
        match self {
            Self::Tenant(id) => format!("SELECT set_config('app.tenant', '{}', true)", id.0),
            Self::Named(name) => format!(
                "SELECT set_config('app.tenant', coalesce((SELECT id::text FROM tenant WHERE name = '{name}'), ''), true)"
            ),
            Self::Platform => "SELECT set_config('app.platform', 'on', true)".to_owned(),
        }
    }
}

/// Begins a transaction and sets the rows it sees, in one message.
pub async fn begin<'a>(pool: &PgPool, within: impl Into<Within<'a>>) -> Result<Tx, sqlx::Error> {
    open(pool, format!("BEGIN; {}", within.into().statement())).await
}

/// Begins a transaction of a reconciler, which sees the rows of all tenants.
pub async fn begin_for_all(pool: &PgPool) -> Result<Tx, sqlx::Error> {
    open(pool, "BEGIN".to_owned()).await
}

/// Runs the first statement of a transaction in a task of its own: a caller that is dropped while the statement is under
/// way (a client that hangs up) would otherwise return the connection to the pool with the transaction still open, and
/// the next user would inherit its tenant (sqlx 0.9 queues no rollback before the depth is raised).
async fn open(pool: &PgPool, statement: String) -> Result<Tx, sqlx::Error> {
    let conn = pool.acquire().await?;
    let begun = tokio::spawn(
        Transaction::begin(conn, Some(AssertSqlSafe(statement).into_sql_str())).in_current_span(),
    );
    begun.await.unwrap_or_else(|error| Err(sqlx::Error::Io(std::io::Error::other(error))))
}

/// Changes the rows that a transaction sees, for a tenant that was created in the same transaction.
pub async fn enter<'a>(conn: &mut PgConnection, within: impl Into<Within<'a>>) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(within.into().statement())).execute(conn).await.map(drop)
}

/// Refuses a role that bypasses row level security.
pub async fn check_role(pool: &PgPool) -> Result<(), Error> {
    let row: (String, bool) = sqlx::query_as(
        "SELECT current_user::text, rolsuper OR rolbypassrls OR pg_has_role(current_user, 'bulkhead_owner', 'MEMBER') \
         FROM pg_roles WHERE rolname = current_user",
    )
    .fetch_one(pool)
    .await?;
    if row.1 {
        return Err(Error::internal(format!(
            "the role {} bypasses row level security: set database.user and database.reconciler_user to roles of \
             their own (`bulkhead migrate` creates them)",
            row.0
        )));
    }
    Ok(())
}

/// Returns a pool that connects on demand and waits at most two seconds for a connection. A slow database
/// therefore leads to "try again" and never to a queue.
#[must_use]
pub fn pool(options: PgConnectOptions, connections: u32) -> PgPool {
    PgPoolOptions::new()
        .max_connections(connections)
        .min_connections(1)
        .acquire_timeout(Duration::from_secs(2))
        .idle_timeout(Duration::from_secs(300))
        // Testing each connection would double the latency of every short request, so only idle connections
        // are tested.
        .test_before_acquire(false)
        .before_acquire(|conn, meta| {
            Box::pin(async move {
                Ok(meta.idle_for < Duration::from_secs(1) || sqlx::Connection::ping(conn).await.is_ok())
            })
        })
        .connect_lazy_with(options)
}

/// Returns the name of the violated constraint, if the error is one.
#[must_use]
pub fn constraint(error: &sqlx::Error) -> Option<&str> {
    error.as_database_error().and_then(|error| error.constraint())
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        let away = match &error {
            sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::Io(_) => true,
            // Retryable classes: 08 connection, 53 resources, 57P shutdown, 40001, 40P01 and 55P03 conflicts.
            sqlx::Error::Database(database) => database.code().is_some_and(|code| {
                code.starts_with("08")
                    || code.starts_with("53")
                    || code.starts_with("57")
                    || matches!(&*code, "40001" | "40P01" | "55P03")
            }),
            _ => false,
        };
        if away {
            tracing::warn!(%error, "the database is not available");
            return Self::Unavailable("the database does not answer in time".into(), Duration::from_secs(2));
        }
        // Postgres rejects text with a NUL or with invalid UTF-8. No valid input has either.
        let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
        if code.is_some_and(|code| code == "22021") {
            return Self::Malformed("a text contains a character that cannot be stored".into());
        }
        Self::internal(error)
    }
}

/// The requested page of a list: `?limit=&cursor=`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageQuery {
    limit: Option<u32>,
    cursor: Option<String>,
}

/// Default and maximum length of a page.
const PAGE: (i64, i64) = (50, 200);

impl PageQuery {
    /// Builds a query from its two parts.
    #[must_use]
    pub fn new(limit: Option<u32>, cursor: Option<String>) -> Self {
        Self { limit, cursor }
    }

    /// Returns the length of the page: 50 by default, at most 200.
    pub fn limit(&self) -> Result<i64, Error> {
        match self.limit {
            None => Ok(PAGE.0),
            Some(n) if (1..=PAGE.1).contains(&i64::from(n)) => Ok(i64::from(n)),
            Some(_) => Err(Error::Malformed(format!("limit must be 1 to {}", PAGE.1))),
        }
    }

    /// Returns the text key after which the page starts; empty for the first page.
    pub fn after_text(&self) -> Result<String, Error> {
        let Some(cursor) = &self.cursor else { return Ok(String::new()) };
        data_encoding::BASE64URL_NOPAD
            .decode(cursor.as_bytes())
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .ok_or_else(|| {
                Error::Malformed(
                    "cursor does not come from this list: use the `next` of an earlier page".into(),
                )
            })
    }

    /// Returns the number after which the page starts (before which, in a descending list).
    pub fn after_number(&self, first: i64) -> Result<i64, Error> {
        let text = self.after_text()?;
        if text.is_empty() {
            return Ok(first);
        }
        text.parse().map_err(|_| {
            Error::Malformed("cursor does not come from this list: use the `next` of an earlier page".into())
        })
    }
}

/// A page of a list, as the API returns it.
#[derive(Debug, Serialize)]
pub struct Page<T> {
    /// The rows, in the list's order.
    pub items: Vec<T>,
    /// Cursor of the next page; null on the last page.
    pub next: Option<String>,
}

impl<T> Page<T> {
    /// Builds a page from up to `limit` + 1 rows; `key` returns the cursor of a row.
    pub fn new<K: std::fmt::Display>(mut rows: Vec<T>, limit: i64, key: impl Fn(&T) -> K) -> Self {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let next = if rows.len() > limit {
            rows.truncate(limit);
            rows.last().map(key)
        } else {
            None
        };
        Self::up_to(rows, next)
    }

    /// Builds a page from its rows and the cursor of the next page.
    pub fn up_to<K: std::fmt::Display>(items: Vec<T>, next: Option<K>) -> Self {
        let cursor = |key: K| data_encoding::BASE64URL_NOPAD.encode(key.to_string().as_bytes());
        Self { items, next: next.map(cursor) }
    }
}

/// Checks that the database answers.
pub async fn ping(pool: &PgPool) -> Result<(), sqlx::Error> {
    sqlx::query("SELECT 1").execute(pool).await.map(drop)
}

/// Refuses a schema that is older than this binary needs. A newer schema is fine: migrations expand before
/// they contract.
pub async fn check_schema(pool: &PgPool) -> Result<(), Error> {
    let applied: Vec<i64> =
        sqlx::query_scalar("SELECT version FROM _sqlx_migrations WHERE success ORDER BY version")
            .fetch_all(pool)
            .await
            .map_err(|error| {
                Error::internal(format!(
                    "the database has no schema yet, or cannot be read ({error}); run: bulkhead migrate"
                ))
            })?;
    let known: Vec<i64> = MIGRATOR.iter().map(|migration| migration.version).collect();
    if let Some(missing) = known.iter().find(|version| !applied.contains(version)) {
        return Err(Error::internal(format!("the schema lacks migration {missing}; run: bulkhead migrate")));
    }
    Ok(())
}

/// Records the installation that the database belongs to, or compares the configuration with the record. Ids
/// that were allocated under one pool must never be computed under another.
pub async fn claim_installation(
    conn: &mut PgConnection,
    id: &crate::ids::Installation,
    pools: &crate::config::Pools,
) -> Result<(), Error> {
    let wanted = (
        i64::from(pools.uid_start),
        i64::from(pools.uid_end),
        i64::from(pools.range_size),
        i64::from(pools.block_size),
        i64::from(u32::from(pools.network.address())),
        i32::from(pools.network.prefix()),
        i32::from(pools.subnet_prefix),
    );
    sqlx::query!(
        "INSERT INTO installation (id, uid_start, uid_end, range_size, block_size, network_start, network_prefix, \
         subnet_prefix) VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING",
        id.as_str(),
        wanted.0,
        wanted.1,
        wanted.2,
        wanted.3,
        wanted.4,
        wanted.5,
        wanted.6
    )
    .execute(&mut *conn)
    .await?;
    let row = sqlx::query!("SELECT * FROM installation").fetch_one(conn).await?;
    let known = (
        row.uid_start,
        row.uid_end,
        row.range_size,
        row.block_size,
        row.network_start,
        row.network_prefix,
        row.subnet_prefix,
    );
    if row.id != id.as_str() {
        return Err(Error::internal(format!(
            "this database belongs to the installation {}, not {id}",
            row.id
        )));
    }
    if known != wanted {
        return Err(Error::internal(
            "the pools in the configuration differ from the pools that this database was created with, and pools cannot change: restore the old values",
        ));
    }
    Ok(())
}
